//! Where vector registers lie in the XSAVE area, and access to them as bytes.
//!
//! The area has the host's standard format, whose component offsets differ between vendors; CPUID
//! leaf 0DH of the host names them.

use crate::state::{XSAVE_SIZE, XsaveArea};
use core::arch::x86_64::{__cpuid, __cpuid_count};
use core::sync::atomic::{AtomicU64, Ordering};

/// XSAVE components.
pub(crate) mod component {
    pub(crate) const X87: usize = 0;
    pub(crate) const SSE: usize = 1;
    pub(crate) const AVX: usize = 2;
    pub(crate) const OPMASK: usize = 5;
    pub(crate) const ZMM_HIGH: usize = 6;
    pub(crate) const HIGH_ZMM: usize = 7;
}

/// Offset of XSTATE_BV in the area.
pub(crate) const XSTATE_BV: usize = 512;
const XMM: usize = 160;

/// offset << 32 | size << 1 | known, by component.
static LAYOUT: [AtomicU64; 64] = [const { AtomicU64::new(0) }; 64];

/// Offset and size of an extended component in the standard format; size 0 if the host lacks it.
pub(crate) fn layout(component: usize) -> (usize, usize) {
    match component {
        0 => return (0, 160),
        1 => return (XMM, 256),
        _ => {}
    }
    let Some(slot) = LAYOUT.get(component) else {
        return (0, 0);
    };
    let mut packed = slot.load(Ordering::Relaxed);
    if packed == 0 {
        let (mut offset, mut size) = (0, 0);
        if __cpuid(0).eax >= 0xd && __cpuid(1).ecx & (1 << 26) != 0 {
            let leaf = __cpuid_count(0xd, component as u32);
            (offset, size) = (u64::from(leaf.ebx), u64::from(leaf.eax));
        }
        if offset < 576 || offset + size > XSAVE_SIZE as u64 {
            (offset, size) = (0, 0);
        }
        packed = offset << 32 | size << 1 | 1;
        slot.store(packed, Ordering::Relaxed);
    }
    ((packed >> 32) as usize, (packed as u32 >> 1) as usize)
}

/// XSTATE_BV.
pub(crate) fn xstate_bv(area: &XsaveArea) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&area.0[XSTATE_BV..XSTATE_BV + 8]);
    u64::from_le_bytes(bytes)
}

pub(crate) fn set_xstate_bv(area: &mut XsaveArea, value: u64) {
    area.0[XSTATE_BV..XSTATE_BV + 8].copy_from_slice(&value.to_le_bytes());
}

/// The bytes of a component; `None` if it is in its initial state.
pub(crate) fn live(area: &XsaveArea, component: usize) -> Option<&[u8]> {
    if xstate_bv(area) & (1 << component) == 0 {
        return None;
    }
    let (offset, size) = layout(component);
    area.0.get(offset..offset + size)
}

/// The bytes of a component for writing, with the initial state filled in where it was not live.
pub(crate) fn live_mut(area: &mut XsaveArea, component: usize) -> &mut [u8] {
    let bv = xstate_bv(area);
    let (offset, size) = layout(component);
    if bv & (1 << component) == 0 {
        // MXCSR lies within the x87 component's bytes but is not part of it.
        let mxcsr: [u8; 8] = core::array::from_fn(|n| area.0[24 + n]);
        area.0[offset..offset + size].fill(0);
        if component == component::X87 {
            area.0[0..2].copy_from_slice(&0x37fu16.to_le_bytes());
            area.0[24..32].copy_from_slice(&mxcsr);
        }
        set_xstate_bv(area, bv | 1 << component);
    }
    &mut area.0[offset..offset + size]
}

fn part(area: &XsaveArea, component: usize, at: usize, out: &mut [u8]) {
    let found = live(area, component).and_then(|bytes| bytes.get(at..at + out.len()));
    match found {
        Some(bytes) => out.copy_from_slice(bytes),
        None => out.fill(0),
    }
}

fn set_part(area: &mut XsaveArea, component: usize, at: usize, data: &[u8]) {
    // Zeros need no component that is not live.
    if data.iter().all(|&b| b == 0) && live(area, component).is_none() {
        return;
    }
    if let Some(slot) = live_mut(area, component).get_mut(at..at + data.len()) {
        slot.copy_from_slice(data);
    }
}

/// ZMM `n` (0-31).
pub(crate) fn zmm(area: &XsaveArea, n: usize) -> [u8; 64] {
    let mut out = [0; 64];
    if n < 16 {
        part(area, component::SSE, 16 * n, &mut out[..16]);
        part(area, component::AVX, 16 * n, &mut out[16..32]);
        part(area, component::ZMM_HIGH, 32 * n, &mut out[32..]);
    } else {
        part(area, component::HIGH_ZMM, 64 * (n & 15), &mut out);
    }
    out
}

/// Sets all 64 bytes of ZMM `n`.
pub(crate) fn set_zmm(area: &mut XsaveArea, n: usize, value: &[u8; 64]) {
    if n < 16 {
        set_part(area, component::SSE, 16 * n, &value[..16]);
        set_part(area, component::AVX, 16 * n, &value[16..32]);
        set_part(area, component::ZMM_HIGH, 32 * n, &value[32..]);
    } else {
        set_part(area, component::HIGH_ZMM, 64 * (n & 15), value);
    }
}

/// Opmask register `n` (0-7).
pub(crate) fn opmask(area: &XsaveArea, n: usize) -> u64 {
    let mut bytes = [0; 8];
    part(area, component::OPMASK, 8 * (n & 7), &mut bytes);
    u64::from_le_bytes(bytes)
}

/// Sets opmask register `n`.
pub(crate) fn set_opmask(area: &mut XsaveArea, n: usize, value: u64) {
    set_part(area, component::OPMASK, 8 * (n & 7), &value.to_le_bytes());
}

/// MMX register `n` (0-7): the significand of physical x87 register `n`. The area holds the
/// registers by stack position, so TOP decides.
pub(crate) fn mmx(area: &XsaveArea, n: usize) -> u64 {
    let mut bytes = [0; 8];
    let top = live(area, component::X87).map_or(0, |b| usize::from(b[3] >> 3 & 7));
    let slot = n.wrapping_sub(top) & 7;
    part(area, component::X87, 32 + 16 * slot, &mut bytes);
    u64::from_le_bytes(bytes)
}
