//! The guest's memory map, as firmware would report it.

use crate::layout::{
    ACPI_TABLES, ACPI_TABLES_SIZE, ECAM_BASE, ECAM_SIZE, HIGH_RAM_START, IDENTITY_MAP,
    KVM_RESERVED_END, LOW_RAM_END,
};
use crate::memory;

/// What a range is, with the numbers that E820 and PVH use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    Ram = 1,
    Reserved = 2,
}

/// One entry of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Range {
    pub start: u64,
    pub len: u64,
    pub kind: Kind,
}

/// The memory map of a guest with `size` bytes of RAM, sorted by address.
pub(super) fn build(size: u64) -> Vec<Range> {
    let range = |start, end: u64, kind| Range {
        start,
        len: end - start,
        kind,
    };
    let mut map = vec![
        range(0, LOW_RAM_END, Kind::Ram),
        range(LOW_RAM_END, 0xa_0000, Kind::Reserved),
        range(ACPI_TABLES, ACPI_TABLES + ACPI_TABLES_SIZE, Kind::Reserved),
    ];
    let mut pieces = memory::pieces(size).into_iter();
    if let Some((_, _, low)) = pieces.next() {
        map.push(range(HIGH_RAM_START, low, Kind::Ram));
    }
    map.push(range(ECAM_BASE, ECAM_BASE + ECAM_SIZE, Kind::Reserved));
    map.push(range(IDENTITY_MAP, KVM_RESERVED_END, Kind::Reserved));
    for (start, _, len) in pieces {
        map.push(Range {
            start,
            len,
            kind: Kind::Ram,
        });
    }
    map
}
