//! FXSAVE, FXRSTOR and the XSAVE family, on the vCPU's XSAVE area (Intel SDM, "Managing State Using
//! the XSAVE Feature Set").

use super::vector::{self, component};
use super::{Flow, Step};
use crate::bits::*;
use crate::env::{Env, NativeRegs, Stop};
use crate::state::{CodeSize, XSAVE_SIZE, XsaveArea, gpr};
use alloc::boxed::Box;
use core::arch::x86_64::__cpuid_count;
use core::sync::atomic::{AtomicU8, Ordering};
use iced_x86::Mnemonic;

/// Bytes of the legacy region that instructions write: the rest is for software.
const LEGACY_USED: usize = 416;
/// Legacy region and header.
const EXTENDED: usize = 576;
const COMPACT: u64 = 1 << 63;
const MXCSR_INIT: u32 = 0x1f80;

/// The compacted format puts a component on a 64-byte boundary.
fn aligned(component: usize) -> bool {
    static KNOWN: [AtomicU8; 64] = [const { AtomicU8::new(0) }; 64];
    let Some(slot) = KNOWN.get(component) else {
        return false;
    };
    match slot.load(Ordering::Relaxed) {
        0 => {
            let set = __cpuid_count(0xd, component as u32).ecx & 2 != 0;
            slot.store(1 + u8::from(set), Ordering::Relaxed);
            set
        }
        known => known == 2,
    }
}

/// Extended components of `mask` that the area has room for, with offset and size in the standard
/// or (`compact`: the components present) the compacted format.
fn extended(mask: u64, compact: Option<u64>) -> impl Iterator<Item = (usize, usize, usize)> {
    let mut at = EXTENDED;
    (2..63).filter_map(move |n| {
        let (offset, size) = vector::layout(n);
        let place = match compact {
            None => offset,
            Some(present) => {
                if present & (1 << n) == 0 {
                    return None;
                }
                if aligned(n) {
                    at = at.next_multiple_of(64);
                }
                let place = at;
                at += size;
                place
            }
        };
        (mask & (1 << n) != 0 && size > 0).then_some((n, place, size))
    })
}

fn word(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

fn mxcsr(bytes: &[u8]) -> u32 {
    word(bytes, 24) as u32
}

impl<E: Env + ?Sized> Step<'_, E> {
    pub(super) fn save_restore(&mut self) -> Result<Flow, Stop> {
        use Mnemonic as M;
        let m = self.insn.mnemonic();
        let fx = matches!(m, M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64);
        if fx {
            if self.cpu.cr0 & (CR0_EM | CR0_TS) != 0 {
                return Err(Stop::nm());
            }
        } else {
            self.check_xsave(m)?;
        }
        let (len, align) = if fx { (512, 15) } else { (EXTENDED, 63) };
        let write = matches!(
            m,
            M::Fxsave
                | M::Fxsave64
                | M::Xsave
                | M::Xsave64
                | M::Xsaveopt
                | M::Xsaveopt64
                | M::Xsavec
                | M::Xsavec64
                | M::Xsaves
                | M::Xsaves64
        );
        let address = self.operand_address(len, write)?;
        if address & align != 0 {
            return Err(Stop::gp(0));
        }
        self.know_mxcsr_mask()?;
        let mask = (self.cpu.gpr[gpr::RDX] << 32) | (self.cpu.gpr[gpr::RAX] & 0xffff_ffff);
        let mask = mask & self.cpu.xcr0;
        let wide = matches!(
            m,
            M::Fxsave64
                | M::Fxrstor64
                | M::Xsave64
                | M::Xsaveopt64
                | M::Xsavec64
                | M::Xsaves64
                | M::Xrstor64
                | M::Xrstors64
        );
        match m {
            M::Fxsave | M::Fxsave64 => self.fxsave(address, wide)?,
            M::Fxrstor | M::Fxrstor64 => self.fxrstor(address, wide)?,
            M::Xsave | M::Xsave64 => self.xsave(address, mask, wide, false)?,
            M::Xsaveopt | M::Xsaveopt64 => self.xsave(address, mask, wide, true)?,
            M::Xsavec | M::Xsavec64 | M::Xsaves | M::Xsaves64 => {
                self.xsave_compact(address, mask, wide)?;
            }
            _ => self.xrstor(address, mask, wide)?,
        }
        Ok(Flow::Next)
    }

    fn check_xsave(&mut self, m: Mnemonic) -> Result<(), Stop> {
        use Mnemonic as M;
        // CPUID.(EAX=0DH,ECX=1):EAX enumerates the later members.
        let bit = match m {
            M::Xsaveopt | M::Xsaveopt64 => Some(0),
            M::Xsavec | M::Xsavec64 => Some(1),
            M::Xsaves | M::Xsaves64 | M::Xrstors | M::Xrstors64 => Some(3),
            _ => None,
        };
        if self.cpu.cr4 & CR4_OSXSAVE == 0 {
            return Err(Stop::ud());
        }
        if let Some(bit) = bit
            && self.env.cpuid(self.cpu, 0xd, 1)[0] & (1 << bit) == 0
        {
            return Err(Stop::ud());
        }
        if self.cpu.cr0 & CR0_TS != 0 {
            return Err(Stop::nm());
        }
        if bit == Some(3) && self.cpu.cpl != 0 {
            return Err(Stop::gp(0));
        }
        Ok(())
    }

    /// MXCSR_MASK gets into the area when the host saves it for the first time.
    fn know_mxcsr_mask(&mut self) -> Result<(), Stop> {
        if self.cpu.xsave.0[28..32] == [0; 4] {
            self.run_native(&[0x90], &mut NativeRegs::default(), true)?;
        }
        Ok(())
    }

    /// #GP(0) for reserved MXCSR bits.
    fn check_mxcsr(&self, value: u32) -> Result<(), Stop> {
        let mut mask = (word(&self.cpu.xsave.0, 24) >> 32) as u32;
        if mask == 0 {
            mask = 0xffbf;
        }
        if value & !mask != 0 {
            return Err(Stop::gp(0));
        }
        Ok(())
    }

    /// The legacy region as FXSAVE writes it.
    fn legacy_image(&self, wide: bool) -> [u8; LEGACY_USED] {
        let area = &self.cpu.xsave;
        let mut image = [0; LEGACY_USED];
        match vector::live(area, component::X87) {
            Some(bytes) => image[..160].copy_from_slice(bytes),
            None => image[..2].copy_from_slice(&0x37fu16.to_le_bytes()),
        }
        image[24..32].copy_from_slice(&area.0[24..32]);
        if let Some(bytes) = vector::live(area, component::SSE) {
            image[160..].copy_from_slice(bytes);
        }
        if !wide {
            // The upper halves hold selectors, which are not kept.
            image[12..16].fill(0);
            image[20..24].fill(0);
        }
        image
    }

    /// Where the XMM registers that the mode can name end in the legacy region.
    fn legacy_end(&self) -> usize {
        if self.mode == CodeSize::Bits64 {
            LEGACY_USED
        } else {
            288
        }
    }

    fn fxsave(&mut self, address: u64, wide: bool) -> Result<(), Stop> {
        let image = self.legacy_image(wide);
        let end = self.legacy_end();
        self.write_at(address, &image[..end])
    }

    fn fxrstor(&mut self, address: u64, wide: bool) -> Result<(), Stop> {
        let mut image = [0; 512];
        self.read_at(address, &mut image)?;
        let sse = self.cpu.cr4 & CR4_OSFXSR != 0;
        if sse {
            self.check_mxcsr(mxcsr(&image))?;
        }
        let end = self.legacy_end();
        load_x87(&mut self.cpu.xsave, &image, wide);
        if sse {
            self.cpu.xsave.0[24..28].copy_from_slice(&image[24..28]);
            vector::live_mut(&mut self.cpu.xsave, component::SSE)[..end - 160]
                .copy_from_slice(&image[160..end]);
        }
        Ok(())
    }

    /// XSAVE and (`optimized`) XSAVEOPT: the standard format.
    fn xsave(&mut self, address: u64, mask: u64, wide: bool, optimized: bool) -> Result<(), Stop> {
        let in_use = vector::xstate_bv(&self.cpu.xsave);
        let write = if optimized { mask & in_use } else { mask };
        self.probe_write(address, EXTENDED)?;
        let mut old = [0; 8];
        self.read_at(address.wrapping_add(512), &mut old)?;
        let image = self.legacy_image(wide);
        self.save_legacy(address, &image, write, mask & 6 != 0)?;
        for (n, offset, size) in extended(write, None) {
            self.save_component(address, n, offset, size)?;
        }
        let bv = u64::from_le_bytes(old) & !mask | mask & in_use;
        self.write_at(address.wrapping_add(512), &bv.to_le_bytes())
    }

    fn save_legacy(
        &mut self,
        address: u64,
        image: &[u8; LEGACY_USED],
        write: u64,
        with_mxcsr: bool,
    ) -> Result<(), Stop> {
        if write & 1 != 0 {
            self.write_at(address, &image[..24])?;
            self.write_at(address.wrapping_add(32), &image[32..160])?;
        }
        if with_mxcsr {
            self.write_at(address.wrapping_add(24), &image[24..32])?;
        }
        if write & 2 != 0 {
            let end = self.legacy_end();
            self.write_at(address.wrapping_add(160), &image[160..end])?;
        }
        Ok(())
    }

    fn save_component(
        &mut self,
        address: u64,
        n: usize,
        offset: usize,
        size: usize,
    ) -> Result<(), Stop> {
        let mut data = [0; XSAVE_SIZE];
        let data = &mut data[..size.min(XSAVE_SIZE)];
        if let Some(bytes) = vector::live(&self.cpu.xsave, n) {
            data.copy_from_slice(bytes);
        }
        self.write_at(address.wrapping_add(offset as u64), data)
    }

    /// XSAVEC and XSAVES. No supervisor component exists, so they differ only in privilege.
    fn xsave_compact(&mut self, address: u64, mask: u64, wide: bool) -> Result<(), Stop> {
        let mut in_use = vector::xstate_bv(&self.cpu.xsave);
        if mxcsr(&self.cpu.xsave.0) != MXCSR_INIT {
            in_use |= 2;
        }
        let write = mask & in_use;
        let image = self.legacy_image(wide);
        self.save_legacy(address, &image, write, write & 2 != 0)?;
        for (n, offset, size) in extended(write, Some(mask)) {
            self.save_component(address, n, offset, size)?;
        }
        let mut header = [0; 16];
        header[..8].copy_from_slice(&write.to_le_bytes());
        header[8..].copy_from_slice(&(mask | COMPACT).to_le_bytes());
        self.write_at(address.wrapping_add(512), &header)
    }

    /// XRSTOR and XRSTORS.
    fn xrstor(&mut self, address: u64, mask: u64, wide: bool) -> Result<(), Stop> {
        let supervisor = matches!(
            self.insn.mnemonic(),
            Mnemonic::Xrstors | Mnemonic::Xrstors64
        );
        let mut image = [0; EXTENDED];
        self.read_at(address, &mut image)?;
        let (bv, comp) = (word(&image, 512), word(&image, 520));
        let xcr0 = self.cpu.xcr0;
        let compact = comp & COMPACT != 0;
        let bad = if compact {
            self.env.cpuid(self.cpu, 0xd, 1)[0] & 2 == 0
                || comp & !COMPACT & !xcr0 != 0
                || bv & !comp != 0
                || bv & COMPACT != 0
                || image[528..].iter().any(|&b| b != 0)
        } else {
            supervisor || bv & !xcr0 != 0 || image[520..536].iter().any(|&b| b != 0)
        };
        if bad {
            return Err(Stop::gp(0));
        }
        let load_mxcsr = if compact {
            mask & bv & 2 != 0
        } else {
            mask & 6 != 0
        };
        if load_mxcsr {
            self.check_mxcsr(mxcsr(&image))?;
        }
        // Everything is read before anything changes.
        let mut area = Box::new(self.cpu.xsave.clone());
        let present = compact.then_some(comp & !COMPACT);
        for (n, offset, size) in extended(mask & bv, present) {
            let mut data = [0; XSAVE_SIZE];
            let data = &mut data[..size.min(XSAVE_SIZE)];
            self.read_at(address.wrapping_add(offset as u64), data)?;
            vector::live_mut(&mut area, n).copy_from_slice(data);
        }
        let end = self.legacy_end();
        if mask & bv & 1 != 0 {
            load_x87(&mut area, &image, wide);
        }
        if mask & bv & 2 != 0 {
            vector::live_mut(&mut area, component::SSE)[..end - 160]
                .copy_from_slice(&image[160..end]);
        }
        if load_mxcsr {
            area.0[24..28].copy_from_slice(&image[24..28]);
        } else if compact && mask & 2 != 0 {
            area.0[24..28].copy_from_slice(&MXCSR_INIT.to_le_bytes());
        }
        let live = vector::xstate_bv(&area) & !(mask & !bv);
        vector::set_xstate_bv(&mut area, live);
        self.cpu.xsave = *area;
        Ok(())
    }
}

/// Loads the x87 component from a legacy region.
fn load_x87(area: &mut XsaveArea, image: &[u8], wide: bool) {
    let bytes = vector::live_mut(area, component::X87);
    bytes[..24].copy_from_slice(&image[..24]);
    if !wide {
        bytes[12..16].fill(0);
        bytes[20..24].fill(0);
    }
    bytes[32..160].copy_from_slice(&image[32..160]);
}
