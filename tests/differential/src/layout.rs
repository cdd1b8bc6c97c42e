//! Where things lie in the test machine: linear addresses, guest-physical addresses, selectors.

/// Guest RAM in bytes.
pub const RAM: u64 = 4 << 20;
/// Size of a page.
pub const PAGE: u64 = 4096;

/// What user mode may do with a page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read, write, execute.
    All,
    /// Read and write.
    Data,
    /// Read.
    ReadOnly,
    /// Not mapped.
    Absent,
    /// Mapped for the supervisor.
    Supervisor,
}

/// A run of pages that user code can name.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// Linear address.
    pub linear: u64,
    /// Guest-physical address, inside [`USER`].
    pub gpa: u64,
    /// Access of each page.
    pub pages: &'static [Access],
}

use Access::{Absent, All, Data, ReadOnly, Supervisor};

/// Guest-physical start of all that user code can see.
pub const USER: u64 = 0x10_0000;
/// Its size: code, data, stack, high data.
pub const USER_SIZE: u64 = 18 * PAGE;

/// Code; writable, for self-modification.
pub const CODE: Region = Region {
    linear: 0x40_0000,
    gpa: USER,
    pages: &[All; 4],
};
/// The same pages as [`CODE`] at another address, without execution.
pub const ALIAS: Region = Region {
    linear: 0x50_0000,
    gpa: USER,
    pages: &[Data; 4],
};
/// Data with holes.
pub const DATA: Region = Region {
    linear: 0x80_0000,
    gpa: USER + 4 * PAGE,
    pages: &[Data, Data, ReadOnly, Data, Absent, Data, Supervisor, Data],
};
/// The stack.
pub const STACK: Region = Region {
    linear: 0x7000_0000,
    gpa: USER + 12 * PAGE,
    pages: &[Data; 4],
};
/// Data that needs a 64-bit address.
pub const HIGH: Region = Region {
    linear: 0x6000_0000_0000,
    gpa: USER + 16 * PAGE,
    pages: &[Data; 2],
};
/// All of them.
pub const REGIONS: [Region; 5] = [CODE, ALIAS, DATA, STACK, HIGH];

/// Linear address of the supervisor's pages.
pub const KERNEL: u64 = 0xffff_8000_0000_0000;
/// Guest-physical address of the supervisor's pages: IDT, GDT, TSS, handlers, stack.
pub const KERNEL_GPA: u64 = 0x1_0000;
/// Their number.
pub const KERNEL_PAGES: u64 = 8;
/// Offsets from [`KERNEL`].
pub const IDT: u64 = 0;
/// See [`IDT`].
pub const GDT: u64 = 0x1000;
/// See [`IDT`].
pub const TSS: u64 = 0x2000;
/// HLT for each vector, 16 bytes apart.
pub const HANDLERS: u64 = 0x3000;
/// Initial stack pointer of the handlers.
pub const KERNEL_STACK: u64 = 0x6000;
/// Guest-physical address of the page tables.
pub const TABLES: u64 = 0x4_0000;

/// The selectors that Linux gives user mode, so that far branches see the same table everywhere.
pub const CS32: u16 = 0x23;
/// Data and stack of user mode.
pub const DS: u16 = 0x2b;
/// 64-bit code of user mode.
pub const CS64: u16 = 0x33;
/// 64-bit code of the supervisor.
pub const KERNEL_CS: u16 = 0x10;
/// Task register.
pub const TR: u16 = 0x40;
