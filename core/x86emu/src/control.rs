//! Control, debug and model-specific registers, and the other privileged instructions.

use crate::bits::*;
use crate::env::{Env, Exception, Flush, Stop};
use crate::mem;
use crate::paging::{self, Access};
use crate::state::{CodeSize, CpuState, sreg};

const DR7_GD: u64 = 1 << 13;
const DR6_BD: u64 = 1 << 13;

/// #GP(0) unless at CPL 0 (real mode always is).
pub fn require_cpl0(cpu: &CpuState) -> Result<(), Stop> {
    if cpu.cpl == 0 {
        Ok(())
    } else {
        Err(Stop::gp(0))
    }
}

/// #UD unless in 64-bit mode.
pub(crate) fn require_64bit(cpu: &CpuState) -> Result<(), Stop> {
    if cpu.code_size() == CodeSize::Bits64 {
        Ok(())
    } else {
        Err(Stop::ud())
    }
}

/// #GP(0) where CR4.UMIP hides SGDT, SIDT, SLDT, SMSW and STR.
pub(crate) fn check_umip(cpu: &CpuState) -> Result<(), Stop> {
    if cpu.cr4 & CR4_UMIP != 0 && cpu.cpl > 0 {
        return Err(Stop::gp(0));
    }
    Ok(())
}

/// Bits at and above MAXPHYADDR.
fn beyond_memory<E: Env + ?Sized>(env: &E) -> u64 {
    let bits = u32::from(env.features().phys_bits).clamp(32, 52);
    !((1u64 << bits) - 1)
}

/// MOV from CR0, CR2, CR3, CR4 or CR8.
pub fn read_cr<E: Env + ?Sized>(cpu: &CpuState, env: &mut E, index: u32) -> Result<u64, Stop> {
    if !matches!(index, 0 | 2 | 3 | 4 | 8) {
        return Err(Stop::ud());
    }
    require_cpl0(cpu)?;
    Ok(match index {
        0 => cpu.cr0,
        2 => cpu.cr2,
        3 => cpu.cr3,
        4 => cpu.cr4,
        _ => env.cr8() & 0xf,
    })
}

/// MOV to CR0, CR2, CR3, CR4 or CR8.
pub fn write_cr<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    index: u32,
    value: u64,
) -> Result<(), Stop> {
    if !matches!(index, 0 | 2 | 3 | 4 | 8) {
        return Err(Stop::ud());
    }
    require_cpl0(cpu)?;
    match index {
        0 => write_cr0(cpu, env, value),
        2 => {
            cpu.cr2 = value;
            Ok(())
        }
        3 => write_cr3(cpu, env, value),
        4 => write_cr4(cpu, env, value),
        _ if value & !0xf != 0 => Err(Stop::gp(0)),
        _ => {
            env.set_cr8(value);
            Ok(())
        }
    }
}

/// Loads the four PDPTEs that CR3 points to in PAE mode; #GP(0) for reserved bits.
pub fn load_pdptrs<E: Env + ?Sized>(env: &mut E, cr3: u64) -> Result<[u64; 4], Stop> {
    let mut pdptrs = [0; 4];
    let base = cr3 & 0xffff_ffe0;
    let mut bytes = [0; 32];
    // Outside RAM nothing is present.
    if env.host_ptr(base, 32, false).is_some() {
        mem::read_physical(env, base, &mut bytes)?;
    }
    let reserved = 0x1e6 | beyond_memory(env);
    for (entry, chunk) in pdptrs.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *entry = u64::from_le_bytes(*chunk);
        if *entry & 1 != 0 && *entry & reserved != 0 {
            return Err(Stop::gp(0));
        }
    }
    Ok(pdptrs)
}

fn pae_paging(cr0: u64, cr4: u64, efer: u64) -> bool {
    cr0 & CR0_PG != 0 && cr4 & CR4_PAE != 0 && efer & EFER_LMA == 0
}

/// MOV to CR0, without the privilege check: mode switches, with long-mode activation.
pub fn write_cr0<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E, value: u64) -> Result<(), Stop> {
    const DEFINED: u64 =
        CR0_PE | CR0_MP | CR0_EM | CR0_TS | CR0_NE | CR0_WP | CR0_AM | CR0_NW | CR0_CD | CR0_PG;
    let old = cpu.cr0;
    let new = (value & DEFINED) | CR0_ET;
    if value >> 32 != 0
        || new & CR0_PG != 0 && new & CR0_PE == 0
        || new & CR0_NW != 0 && new & CR0_CD == 0
    {
        return Err(Stop::gp(0));
    }
    let mut efer = cpu.efer;
    let mut pdptrs = None;
    let long_code = cpu.seg[sreg::CS].long();
    if new & !old & CR0_PG != 0 {
        if efer & EFER_LME != 0 {
            if cpu.cr4 & CR4_PAE == 0 || long_code {
                return Err(Stop::gp(0));
            }
            efer |= EFER_LMA;
        } else if cpu.cr4 & CR4_PAE != 0 {
            pdptrs = Some(load_pdptrs(env, cpu.cr3)?);
        }
    } else if old & !new & CR0_PG != 0 {
        if cpu.cr4 & CR4_PCIDE != 0 || cpu.long_mode() && long_code {
            return Err(Stop::gp(0));
        }
        efer &= !EFER_LMA;
    } else if (old ^ new) & (CR0_CD | CR0_NW) != 0 && pae_paging(new, cpu.cr4, efer) {
        pdptrs = Some(load_pdptrs(env, cpu.cr3)?);
    }
    cpu.cr0 = new;
    cpu.efer = efer;
    if let Some(pdptrs) = pdptrs {
        cpu.pdptrs = pdptrs;
    }
    if (old ^ new) & (CR0_PG | CR0_WP | CR0_PE) != 0 {
        env.flush(Flush::All);
    }
    Ok(())
}

/// MOV to CR3, without the privilege check: PCID and PDPTE rules.
pub fn write_cr3<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E, value: u64) -> Result<(), Stop> {
    let mut value = value;
    let mut keep = false;
    if cpu.long_mode() {
        if cpu.cr4 & CR4_PCIDE != 0 {
            keep = value >> 63 != 0;
            value &= !(1 << 63);
        }
        if value & beyond_memory(env) != 0 {
            return Err(Stop::gp(0));
        }
    } else {
        value &= 0xffff_ffff;
        if pae_paging(cpu.cr0, cpu.cr4, cpu.efer) {
            cpu.pdptrs = load_pdptrs(env, value)?;
        }
    }
    cpu.cr3 = value;
    if !keep {
        env.flush(Flush::Pcid(current_pcid(cpu)));
    }
    Ok(())
}

/// The PCID in use: 0 without CR4.PCIDE.
pub fn current_pcid(cpu: &CpuState) -> u16 {
    if cpu.cr4 & CR4_PCIDE != 0 {
        cpu.cr3 as u16 & 0xfff
    } else {
        0
    }
}

/// MOV to CR4, without the privilege check.
pub fn write_cr4<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E, value: u64) -> Result<(), Stop> {
    const FLUSHING: u64 =
        CR4_PGE | CR4_PAE | CR4_PSE | CR4_SMEP | CR4_SMAP | CR4_LA57 | CR4_PCIDE | 1 << 22;
    let old = cpu.cr4;
    let changed = old ^ value;
    if value & !env.features().cr4_allowed != 0 {
        return Err(Stop::gp(0));
    }
    if cpu.long_mode() && (value & CR4_PAE == 0 || changed & CR4_LA57 != 0) {
        return Err(Stop::gp(0));
    }
    if value & !old & CR4_PCIDE != 0 && (!cpu.long_mode() || cpu.cr3 & 0xfff != 0) {
        return Err(Stop::gp(0));
    }
    let reload = changed & (CR4_PGE | CR4_PAE | CR4_PSE | CR4_SMEP) != 0;
    if reload && pae_paging(cpu.cr0, value, cpu.efer) {
        cpu.pdptrs = load_pdptrs(env, cpu.cr3)?;
    }
    cpu.cr4 = value;
    if changed & FLUSHING != 0 {
        env.flush(Flush::All);
    }
    Ok(())
}

/// LMSW: the low four bits of CR0; PE can be set but not cleared.
pub fn lmsw<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E, value: u16) -> Result<(), Stop> {
    require_cpl0(cpu)?;
    let low = u64::from(value) & 0xf | cpu.cr0 & CR0_PE;
    write_cr0(cpu, env, (cpu.cr0 & !0xf) | low)
}

/// CLTS.
pub fn clts(cpu: &mut CpuState) -> Result<(), Stop> {
    require_cpl0(cpu)?;
    cpu.cr0 &= !CR0_TS;
    Ok(())
}

/// The checks of MOV to and from debug registers; gives the register after the DR4/DR5 alias.
fn debug_register(cpu: &CpuState, index: u32) -> Result<u32, Stop> {
    let index = match index {
        0..=3 | 6 | 7 => index,
        4 | 5 if cpu.cr4 & CR4_DE == 0 => index + 2,
        _ => return Err(Stop::ud()),
    };
    require_cpl0(cpu)?;
    if cpu.dr7 & DR7_GD != 0 {
        return Err(Stop::Exception(Exception {
            vector: 1,
            error: None,
            payload: DR6_BD,
        }));
    }
    Ok(index)
}

/// MOV from a debug register.
pub fn read_dr(cpu: &CpuState, index: u32) -> Result<u64, Stop> {
    Ok(match debug_register(cpu, index)? {
        6 => (cpu.dr6 | 0xfffe_0ff0) & 0xffff_efff,
        7 => cpu.dr7 | 0x400,
        n => cpu.dr[n as usize & 3],
    })
}

/// MOV to a debug register.
pub fn write_dr(cpu: &mut CpuState, index: u32, value: u64) -> Result<(), Stop> {
    let index = debug_register(cpu, index)?;
    if index >= 6 && value >> 32 != 0 {
        return Err(Stop::gp(0));
    }
    match index {
        6 => cpu.dr6 = (value & 0xe00f) | 0xffff_0ff0,
        7 => cpu.dr7 = (value & 0xffff_2bff) | 0x400,
        n => cpu.dr[n as usize & 3] = value,
    }
    Ok(())
}

/// XGETBV.
pub fn xgetbv(cpu: &CpuState, index: u32) -> Result<u64, Stop> {
    if cpu.cr4 & CR4_OSXSAVE == 0 {
        return Err(Stop::ud());
    }
    match index {
        // XINUSE may report every component as in use.
        0 | 1 => Ok(cpu.xcr0),
        _ => Err(Stop::gp(0)),
    }
}

/// XSETBV, for XCR0.
pub fn xsetbv<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    index: u32,
    value: u64,
) -> Result<(), Stop> {
    if cpu.cr4 & CR4_OSXSAVE == 0 {
        return Err(Stop::ud());
    }
    require_cpl0(cpu)?;
    if index != 0 || !valid_xcr0(value, env.features().xcr0_allowed) {
        return Err(Stop::gp(0));
    }
    cpu.xcr0 = value;
    Ok(())
}

/// Whether XCR0 may hold `value` (Intel SDM, "Extended Control Registers").
pub fn valid_xcr0(value: u64, allowed: u64) -> bool {
    let all_or_none = |bits: u64| value & bits == 0 || value & bits == bits;
    value & 1 != 0
        && value & !allowed == 0
        && (value & 4 == 0 || value & 2 != 0)
        && all_or_none(3 << 3)
        && all_or_none(7 << 5)
        && (value & (7 << 5) == 0 || value & 4 != 0)
        && all_or_none(3 << 17)
}

/// INVLPG at a linear address.
pub fn invlpg<E: Env + ?Sized>(cpu: &CpuState, env: &mut E, linear: u64) -> Result<(), Stop> {
    require_cpl0(cpu)?;
    if paging::canonical(cpu, linear) {
        env.flush(Flush::Page(linear));
    }
    Ok(())
}

/// INVPCID with the descriptor already read.
pub fn invpcid<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    kind: u64,
    descriptor: [u64; 2],
) -> Result<(), Stop> {
    let [pcid, linear] = descriptor;
    if kind > 3 || pcid >> 12 != 0 {
        return Err(Stop::gp(0));
    }
    if kind < 2 && cpu.cr4 & CR4_PCIDE == 0 && pcid != 0 {
        return Err(Stop::gp(0));
    }
    let pcid = pcid as u16;
    let what = match kind {
        0 if !paging::canonical(cpu, linear) => return Err(Stop::gp(0)),
        0 => Flush::PcidPage(pcid, linear),
        1 => Flush::Pcid(pcid),
        2 => Flush::All,
        _ => Flush::NonGlobal,
    };
    env.flush(what);
    Ok(())
}

/// SWAPGS.
pub fn swapgs(cpu: &mut CpuState) -> Result<(), Stop> {
    require_64bit(cpu)?;
    require_cpl0(cpu)?;
    core::mem::swap(&mut cpu.seg[sreg::GS].base, &mut cpu.kernel_gs_base);
    Ok(())
}

/// Checks of RDFSBASE, RDGSBASE, WRFSBASE and WRGSBASE.
pub fn check_fsgsbase(cpu: &CpuState) -> Result<(), Stop> {
    require_64bit(cpu)?;
    if cpu.cr4 & CR4_FSGSBASE == 0 {
        return Err(Stop::ud());
    }
    Ok(())
}

/// WRFSBASE and WRGSBASE.
pub fn write_segment_base(cpu: &mut CpuState, register: usize, value: u64) -> Result<(), Stop> {
    check_fsgsbase(cpu)?;
    if !paging::canonical(cpu, value) {
        return Err(Stop::gp(0));
    }
    cpu.seg[register.min(5)].base = value;
    Ok(())
}

/// RDTSC: the guest's TSC.
pub fn rdtsc<E: Env + ?Sized>(cpu: &CpuState, env: &mut E) -> Result<u64, Stop> {
    if cpu.cr4 & CR4_TSD != 0 && cpu.cpl != 0 {
        return Err(Stop::gp(0));
    }
    Ok(env.tsc(cpu))
}

/// RDPMC: no counter is ever offered, so every index is invalid.
pub fn rdpmc() -> Result<(), Stop> {
    Err(Stop::gp(0))
}

fn iopl(cpu: &CpuState) -> u8 {
    (cpu.rflags >> 12) as u8 & 3
}

/// Who sees CLI and STI: the real flag, the virtual one, or #GP.
enum InterruptFlag {
    Real,
    Virtual,
}

fn interrupt_flag(cpu: &CpuState) -> Result<InterruptFlag, Stop> {
    if !cpu.protected() {
        return Ok(InterruptFlag::Real);
    }
    if cpu.v86() {
        return if iopl(cpu) == 3 {
            Ok(InterruptFlag::Real)
        } else if cpu.cr4 & CR4_VME != 0 {
            Ok(InterruptFlag::Virtual)
        } else {
            Err(Stop::gp(0))
        };
    }
    if cpu.cpl <= iopl(cpu) {
        Ok(InterruptFlag::Real)
    } else if cpu.cpl == 3 && cpu.cr4 & CR4_PVI != 0 {
        Ok(InterruptFlag::Virtual)
    } else {
        Err(Stop::gp(0))
    }
}

/// CLI.
pub fn cli(cpu: &mut CpuState) -> Result<(), Stop> {
    match interrupt_flag(cpu)? {
        InterruptFlag::Real => cpu.rflags &= !IF,
        InterruptFlag::Virtual => cpu.rflags &= !VIF,
    }
    Ok(())
}

/// STI. True: the next instruction is in its shadow.
pub fn sti(cpu: &mut CpuState) -> Result<bool, Stop> {
    match interrupt_flag(cpu)? {
        InterruptFlag::Real => {
            let shadow = cpu.rflags & IF == 0;
            cpu.rflags |= IF;
            Ok(shadow)
        }
        InterruptFlag::Virtual if cpu.rflags & VIP != 0 => Err(Stop::gp(0)),
        InterruptFlag::Virtual => {
            cpu.rflags |= VIF;
            Ok(false)
        }
    }
}

/// The image that PUSHF writes, for an operand of `size` bytes.
pub fn pushf_image(cpu: &CpuState, size: usize) -> Result<u64, Stop> {
    let flags = cpu.rflags & !(RF | VM);
    if cpu.v86() && iopl(cpu) != 3 {
        if size != 2 || cpu.cr4 & CR4_VME == 0 {
            return Err(Stop::gp(0));
        }
        let interrupts = if cpu.rflags & VIF != 0 { IF } else { 0 };
        return Ok((flags & !IF) | interrupts | IOPL);
    }
    Ok(flags)
}

/// RFLAGS after POPF of `image`, an operand of `size` bytes.
pub fn popf_flags(cpu: &CpuState, image: u64, size: usize) -> Result<u64, Stop> {
    let mut mask = ARITH | TF | DF | NT;
    if size > 2 {
        mask |= AC | ID;
    }
    if cpu.v86() && iopl(cpu) != 3 {
        let pending = cpu.rflags & VIP != 0 && image & IF != 0;
        if size != 2 || cpu.cr4 & CR4_VME == 0 || pending || image & TF != 0 {
            return Err(Stop::gp(0));
        }
        let virtual_if = if image & IF != 0 { VIF } else { 0 };
        return Ok((cpu.rflags & !(mask | VIF | RF)) | (image & mask) | virtual_if | 2);
    }
    if cpu.cpl == 0 {
        mask |= IOPL;
    }
    if cpu.cpl <= iopl(cpu) {
        mask |= IF;
    }
    Ok((cpu.rflags & !(mask | RF)) | (image & mask) | 2)
}

/// Whether IN, OUT, INS or OUTS may touch `size` bytes of ports from `port`: IOPL, then the
/// permission bitmap in the TSS. The error is #GP(0), or the page fault of reading the TSS.
pub fn io_allowed<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    port: u16,
    size: usize,
) -> Result<(), Stop> {
    if !cpu.protected() || !cpu.v86() && cpu.cpl <= iopl(cpu) {
        return Ok(());
    }
    // Only 32-bit and 64-bit TSSs have a bitmap.
    if cpu.tr.unusable || cpu.tr.attr & 0xd != 9 || cpu.tr.limit < 103 {
        return Err(Stop::gp(0));
    }
    let base_field = cpu.tr.base.wrapping_add(102);
    let bitmap = mem::read_int(cpu, env, base_field, 2, Access::SYSTEM_READ)?;
    let byte = bitmap + u64::from(port / 8);
    if byte + 1 > u64::from(cpu.tr.limit) {
        return Err(Stop::gp(0));
    }
    let address = cpu.tr.base.wrapping_add(byte);
    let bits = mem::read_int(cpu, env, address, 2, Access::SYSTEM_READ)?;
    let mask = (1u64 << size.min(4)) - 1;
    if (bits >> (port & 7)) & mask != 0 {
        return Err(Stop::gp(0));
    }
    Ok(())
}
