//! Instructions that the host CPU executes: the guest's own encoding with its memory operand pointed
//! at host memory.
//!
//! An operand in RAM that does not cross a page is accessed in place, so that LOCK and wide accesses
//! keep their atomicity. Anything else goes through a bounce buffer: read, execute, write back. A
//! LOCKed access that crosses a page or touches a device is therefore atomic towards others of its kind
//! only.

use super::address::{effective_address, gpr_name};
use super::traits::Traits;
use super::{Flow, Step, masked, traits, vector};
use crate::bits::*;
use crate::encoding::{Encoding, Field, HostMem, MAX_LEN, gpr_field};
use crate::env::{Env, Exit, NativeRegs, Stop};
use crate::mem;
use crate::paging::Access;
use crate::state::{XsaveArea, gpr};
use alloc::boxed::Box;
use core::sync::atomic::{AtomicBool, Ordering};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

const CR4_OSXMMEXCPT: u64 = 1 << 10;
/// The largest operand is FNSAVE's 108 bytes.
const MAX_OPERAND: usize = 128;

/// Room for an operand at the guest's own alignment within a cache line.
#[repr(C, align(64))]
struct Bounce([u8; MAX_OPERAND + 64]);

/// What a buffer holds that an instruction is to fill.
const UNTOUCHED: u8 = 0xa5;

/// FSW.ES: an unmasked x87 exception is pending.
fn x87_exception(area: &XsaveArea) -> bool {
    vector::live(area, vector::component::X87).is_some_and(|bytes| bytes[2] & 0x80 != 0)
}

/// An instruction on its way to the host.
pub(super) struct Native {
    enc: Encoding,
    regs: NativeRegs,
    /// Host registers that hold no guest value.
    taken: u32,
    /// The host register that stands for the guest's RSP.
    rsp: Option<u8>,
    /// The host register that points at the memory operand.
    base: Option<u8>,
    /// Bit mask of the registers that the instruction names.
    named: u32,
}

impl Native {
    /// A host register that the instruction does not use. Without REX only the low eight are
    /// encodable; of those no instruction with AH-BH uses RSI, RDI or RBP implicitly.
    fn pick(&mut self) -> Option<u8> {
        const PLENTY: [u8; 8] = [11, 10, 9, 8, 15, 14, 13, 12];
        const LOW: [u8; 3] = [7, 6, 5];
        let pool: &[u8] = if self.enc.names_high_byte() {
            &LOW
        } else {
            &PLENTY
        };
        let free = pool
            .iter()
            .copied()
            .find(|&r| (self.taken | self.named) & (1 << r) == 0)?;
        self.taken |= 1 << free;
        Some(free)
    }
}

fn uses_mmx(insn: &Instruction) -> bool {
    (0..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Register && insn.op_register(n).is_mm())
}

fn interpret_vector(vector: u8, cr4: u64) -> Stop {
    match vector {
        0 => Stop::de(),
        6 => Stop::ud(),
        13 => Stop::gp(0),
        16 => Stop::mf(),
        17 => Stop::ac(),
        19 if cr4 & CR4_OSXMMEXCPT == 0 => Stop::ud(),
        19 => Stop::xm(),
        _ => Stop::Exit(Exit::InternalError),
    }
}

impl<E: Env + ?Sized> Step<'_, E> {
    /// Executes host code on `regs`, with the vCPU's vector state if `fpu`.
    pub(super) fn run_native(
        &mut self,
        code: &[u8],
        regs: &mut NativeRegs,
        fpu: bool,
    ) -> Result<(), Stop> {
        let area = fpu.then_some(&mut self.cpu.xsave);
        let done = self
            .env
            .native(code, regs, area)
            .map_err(|v| interpret_vector(v, self.cpu.cr4));
        if fpu && done == Err(Stop::xm()) && self.env.features().amd && uses_mmx(self.insn) {
            // AMD's processors have entered MMX mode when the conversion faults.
            self.enter_mmx();
        }
        done
    }

    /// Replaces the arithmetic flags.
    #[inline]
    pub(super) fn set_arith(&mut self, flags: u64) {
        self.cpu.rflags = self.cpu.rflags & !ARITH | flags & ARITH;
    }

    /// Takes the instruction apart and frees the registers that cannot be used as they are.
    fn prepare(&mut self) -> Result<Native, Stop> {
        let enc = Encoding::parse(self.bytes, self.insn, self.mode).ok_or_else(Stop::ud)?;
        let mut native = Native {
            enc,
            regs: NativeRegs {
                gpr: self.cpu.gpr,
                rflags: self.cpu.rflags & ARITH,
            },
            taken: 0,
            rsp: None,
            base: None,
            named: 1 << gpr::RSP,
        };
        let mut rsp_fields = [None; 4];
        for n in 0..self.insn.op_count().min(4) {
            let reg = self.insn.op_register(n);
            let Some(name) = gpr_name(reg) else { continue };
            native.named |= 1 << name.number;
            if name.number == gpr::RSP && !name.high {
                rsp_fields[n as usize] = gpr_field(self.insn, n);
            }
        }
        if rsp_fields.iter().any(Option::is_some) {
            let stand_in = native.pick().ok_or_else(Stop::ud)?;
            for field in rsp_fields.into_iter().flatten() {
                native.enc.set_register(field, stand_in);
            }
            native.regs.gpr[usize::from(stand_in)] = self.cpu.gpr[gpr::RSP];
            native.rsp = Some(stand_in);
        }
        Ok(native)
    }

    /// Emits and executes.
    fn launch(&mut self, native: &mut Native, fpu: Option<&mut XsaveArea>) -> Result<(), Stop> {
        let mut code = [0; MAX_LEN];
        let len = native.enc.emit(&mut code).ok_or_else(Stop::ud)?;
        self.env
            .native(&code[..len], &mut native.regs, fpu)
            .map_err(|v| interpret_vector(v, self.cpu.cr4))
    }

    /// [`Step::launch`] on the vCPU's own vector state.
    fn launch_here(&mut self, native: &mut Native, traits: Traits) -> Result<(), Stop> {
        let mut code = [0; MAX_LEN];
        let len = native.enc.emit(&mut code).ok_or_else(Stop::ud)?;
        self.run_native(&code[..len], &mut native.regs, traits.vector_state())
    }

    /// Gives the guest the results.
    fn commit(&mut self, native: &Native, traits: Traits) {
        let skip = native.taken | 1 << gpr::RSP;
        for (n, slot) in self.cpu.gpr.iter_mut().enumerate() {
            if skip & (1 << n) == 0 {
                *slot = native.regs.gpr[n];
            }
        }
        if let Some(stand_in) = native.rsp {
            self.cpu.gpr[gpr::RSP] = native.regs.gpr[usize::from(stand_in)];
        }
        self.set_arith(native.regs.rflags);
        if traits.x87() {
            // The last instruction and operand pointers are the host's: show none.
            self.cpu.xsave.0[8..24].fill(0);
        }
    }

    /// Executes the instruction on the host.
    pub(super) fn native(&mut self, traits: Traits) -> Result<Flow, Stop> {
        if traits.vsib() {
            return Err(Stop::ud());
        }
        let mut native = self.prepare()?;
        if !native.enc.has_memory() || !traits::has_memory(self.insn) {
            self.launch_here(&mut native, traits)?;
            self.commit(&native, traits);
            return Ok(Flow::Next);
        }
        let size = self.insn.memory_size().size();
        if size == 0 || size > MAX_OPERAND {
            return Err(Stop::ud());
        }
        let (seg, mut offset) = effective_address(self.cpu, self.insn);
        offset = offset.wrapping_add(self.bit_offset(&mut native, size)?);
        if super::address::address_size(self.insn) == 4 {
            offset &= 0xffff_ffff;
        } else if super::address::address_size(self.insn) == 2 {
            offset &= 0xffff;
        }
        let base = native.pick().ok_or_else(Stop::ud)?;
        // SIB index 4 is none.
        native.enc.set_memory(HostMem::BaseIndex(base, 4));
        native.base = Some(base);
        if self.conditional() {
            return match self.native_masked(&mut native, traits, seg, offset, size) {
                Err(stop) => Err(self.first_fault(&mut native, traits, (seg, offset), stop)),
                done => done,
            };
        }
        match self.native_at(&mut native, traits, seg, offset, size) {
            Err(stop) => Err(self.first_fault(&mut native, traits, (seg, offset), stop)),
            done => done,
        }
    }

    /// An instruction that the host does not have is #UD, and one that wants its operand aligned is
    /// #GP, before the operand's page or RFLAGS.AC is looked at: the host tells on other memory.
    #[cold]
    fn first_fault(
        &mut self,
        native: &mut Native,
        traits: Traits,
        (seg, offset): (usize, u64),
        stop: Stop,
    ) -> Stop {
        let late = matches!(stop, Stop::Exception(e) if matches!(e.vector, 12..=14 | 17));
        let Some(base) = native.base.filter(|_| late) else {
            return stop;
        };
        let mut buffer = Bounce([0; MAX_OPERAND + 64]);
        let at = (offset.wrapping_add(self.cpu.seg[seg].base) & 63) as usize;
        native.enc.clear_lock();
        native.regs.gpr[usize::from(base)] = buffer.0.as_mut_ptr().expose_provenance() as u64;
        native.regs.gpr[usize::from(base)] += at as u64;
        let mut area = traits
            .vector_state()
            .then(|| Box::new(self.cpu.xsave.clone()));
        match self.launch(native, area.as_deref_mut()) {
            Err(first) if first == Stop::ud() || first == Stop::gp(0) => first,
            _ => stop,
        }
    }

    /// Executes with the memory operand at `offset`.
    fn native_at(
        &mut self,
        native: &mut Native,
        traits: Traits,
        seg: usize,
        offset: u64,
        size: usize,
    ) -> Result<Flow, Stop> {
        let write = traits.writes();
        let base = native.base.ok_or_else(Stop::ud)?;
        let address = self.address(seg, offset, size, write)?;
        if (address & 0xfff) as usize + size <= 4096 {
            let access = Access {
                write,
                ..Access::read(self.cpu)
            };
            let gpa = self.env.translate(self.cpu, address, access)?.gpa;
            if let Some(ptr) = self.env.host_ptr(gpa, size, write) {
                native.regs.gpr[usize::from(base)] = ptr.expose_provenance() as u64;
                match self.launch_here(native, traits) {
                    // The host refuses split locks: without LOCK then.
                    Err(stop) if stop == Stop::ac() && self.locked() => {}
                    Err(stop) => return Err(stop),
                    Ok(()) => {
                        self.watch(address, size, write);
                        self.commit(native, traits);
                        return Ok(Flow::Next);
                    }
                }
            }
        }
        self.bounce(native, traits, address, size)
    }

    fn locked(&self) -> bool {
        self.insn.has_lock_prefix() || self.insn.mnemonic() == Mnemonic::Xchg
    }

    /// The access depends on a mask: elements that are masked out must not fault.
    fn conditional(&self) -> bool {
        self.insn.op_mask() != Register::None && !masked::unconditional(self.insn)
            || matches!(
                self.insn.mnemonic(),
                Mnemonic::Vmaskmovps
                    | Mnemonic::Vmaskmovpd
                    | Mnemonic::Vpmaskmovd
                    | Mnemonic::Vpmaskmovq
            )
    }

    /// BT, BTS, BTR, BTC with a register: the bit may lie outside the operand. Returns by how much
    /// the address moves and leaves the rest of the bit number in the register's place.
    fn bit_offset(&mut self, native: &mut Native, size: usize) -> Result<u64, Stop> {
        let bit_test = matches!(
            self.insn.mnemonic(),
            Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
        );
        let Some(name) = gpr_name(self.insn.op1_register()).filter(|_| bit_test) else {
            return Ok(0);
        };
        let bits = size as u32 * 8;
        let value = self.cpu.gpr[name.number & 15];
        let spare = 64 - bits.min(64);
        let signed = (value << spare) as i64 >> spare;
        let words = signed.div_euclid(i64::from(bits));
        let inside = signed.rem_euclid(i64::from(bits));
        let stand_in = native.pick().ok_or_else(Stop::ud)?;
        native.enc.set_register(Field::Reg, stand_in);
        native.regs.gpr[usize::from(stand_in)] = inside as u64;
        Ok(words.wrapping_mul(size as i64) as u64)
    }

    /// Through a buffer: page-crossing operands and devices.
    fn bounce(
        &mut self,
        native: &mut Native,
        traits: Traits,
        address: u64,
        size: usize,
    ) -> Result<Flow, Stop> {
        let mut buffer = Bounce([0; MAX_OPERAND + 64]);
        let locked = self.locked();
        let _turn = (locked && traits.writes()).then(SplitLock::take);
        if self.insn.mnemonic() == Mnemonic::Cmpxchg16b && address & 15 != 0 {
            return Err(Stop::gp(0));
        }
        // Aligned accesses keep their alignment; a locked one must not be split on the host.
        let at = if locked { 0 } else { (address & 63) as usize };
        native.enc.clear_lock();
        if traits.writes() {
            self.probe_write(address, size)?;
        }
        if traits.reads() {
            self.read_at(address, &mut buffer.0[at..at + size])?;
        } else {
            buffer.0[at..at + size].fill(UNTOUCHED);
        }
        if let Some(base) = native.base {
            let start = buffer.0.as_mut_ptr().expose_provenance() + at;
            native.regs.gpr[usize::from(base)] = start as u64;
        }
        if !traits.writes() {
            self.launch_here(native, traits)?;
            self.commit(native, traits);
            return Ok(Flow::Next);
        }
        // A device write may have to be repeated, so the vector state changes only afterwards.
        let mut area = if traits.vector_state() {
            Some(Box::new(self.cpu.xsave.clone()))
        } else {
            None
        };
        let done = self.launch(native, area.as_deref_mut());
        self.keep_mxcsr(area.as_deref(), done)?;
        let data = buffer.0;
        let data = &data[at..at + size];
        // An x87 store with an unmasked exception stores nothing.
        let refused = traits.x87()
            && area.as_deref().is_some_and(x87_exception)
            && data.iter().all(|&b| b == UNTOUCHED);
        if !refused {
            self.write_back(address, data)?;
        }
        if let Some(area) = area {
            self.cpu.xsave = *area;
        }
        self.commit(native, traits);
        Ok(Flow::Next)
    }

    /// A SIMD exception leaves its flags in MXCSR, and nothing else.
    fn keep_mxcsr(&mut self, area: Option<&XsaveArea>, done: Result<(), Stop>) -> Result<(), Stop> {
        if let (Some(area), Err(_)) = (area, done) {
            self.cpu.xsave.0[24..28].copy_from_slice(&area.0[24..28]);
        }
        done
    }

    /// Writes an operand of at most two pages: what lies outside RAM first, because that part may
    /// make the instruction start over.
    fn write_back(&mut self, address: u64, data: &[u8]) -> Result<(), Stop> {
        let access = Access::write(self.cpu);
        let first = data.len().min(4096 - (address & 0xfff) as usize);
        let (head, tail) = data.split_at(first);
        let mut parts = [(0u64, head), (0u64, tail)];
        let mut at = address;
        for part in &mut parts {
            if !part.1.is_empty() {
                part.0 = self.env.translate(self.cpu, at, access)?.gpa;
                at = at.wrapping_add(part.1.len() as u64);
                if !self.cpu.long_mode() {
                    at &= 0xffff_ffff;
                }
            }
        }
        for ram in [false, true] {
            for (gpa, part) in parts {
                if !part.is_empty() && self.env.host_ptr(gpa, part.len(), true).is_some() == ram {
                    mem::write_physical(self.env, gpa, part)?;
                }
            }
        }
        self.watch(address, data.len(), true);
        Ok(())
    }

    /// Masked loads and stores.
    fn native_masked(
        &mut self,
        native: &mut Native,
        traits: Traits,
        seg: usize,
        offset: u64,
        size: usize,
    ) -> Result<Flow, Stop> {
        let write = traits.writes();
        if masked::extracts(self.insn.mnemonic()) {
            let address = self.address(seg, offset, size, write)?;
            self.probe_write(address, size)?;
        }
        // Everything accessible and in one page of RAM: the host's own masking is exact.
        if let Ok(address) = self.address(seg, offset, size, write)
            && (address & 0xfff) as usize + size <= 4096
        {
            let access = Access {
                write,
                ..Access::read(self.cpu)
            };
            if let Ok(mapping) = self.env.translate(self.cpu, address, access)
                && let Some(ptr) = self.env.host_ptr(mapping.gpa, size, write)
                && let Some(base) = native.base
            {
                native.regs.gpr[usize::from(base)] = ptr.expose_provenance() as u64;
                self.launch_here(native, traits)?;
                self.watch(address, size, write);
                self.commit(native, traits);
                return Ok(Flow::Next);
            }
        }
        self.masked_bounce(native, traits, seg, offset, size)
    }

    /// Through a buffer: stores touch only the elements that the mask selects, and so do loads that
    /// would fault as a whole.
    fn masked_bounce(
        &mut self,
        native: &mut Native,
        traits: Traits,
        seg: usize,
        offset: u64,
        size: usize,
    ) -> Result<Flow, Stop> {
        let mut buffer = Bounce([0; MAX_OPERAND + 64]);
        let (element, selected) = self.selected_elements(size);
        let width = super::address::address_size(self.insn);
        let mask = super::address::size_mask(width);
        let base_at = (offset & 63) as usize;
        let write = traits.writes();
        // What can be read as a whole is read as a whole.
        let whole = !write
            && match self.address(seg, offset, size, false) {
                Ok(address) => {
                    match self.read_at(address, &mut buffer.0[base_at..base_at + size]) {
                        Ok(()) => true,
                        Err(stop @ Stop::Exit(_)) => return Err(stop),
                        Err(_) => false,
                    }
                }
                Err(_) => false,
            };
        for n in 0..(size / element.max(1)).min(64) {
            if whole || selected & (1 << n) == 0 {
                continue;
            }
            let at = base_at + n * element;
            let address = self.address(
                seg,
                offset.wrapping_add((n * element) as u64) & mask,
                element,
                write,
            )?;
            if write {
                self.probe_write(address, element)?;
            } else {
                let mut data = [0; 64];
                self.read_at(address, &mut data[..element.min(64)])?;
                buffer.0[at..at + element].copy_from_slice(&data[..element]);
            }
        }
        if let Some(base) = native.base {
            let start = buffer.0.as_mut_ptr().expose_provenance() + base_at;
            native.regs.gpr[usize::from(base)] = start as u64;
        }
        let mut area = Box::new(self.cpu.xsave.clone());
        let done = self.launch(native, Some(&mut area));
        self.keep_mxcsr(Some(&area), done)?;
        if write {
            let data = buffer.0;
            for n in 0..(size / element.max(1)).min(64) {
                if selected & (1 << n) != 0 {
                    let at = base_at + n * element;
                    let to = offset.wrapping_add((n * element) as u64) & mask;
                    let address = self.address(seg, to, element, true)?;
                    self.write_at(address, &data[at..at + element])?;
                }
            }
        }
        self.cpu.xsave = *area;
        self.commit(native, traits);
        Ok(Flow::Next)
    }
}

static SPLIT: AtomicBool = AtomicBool::new(false);

/// The right to execute a locked access that cannot be one on the host (across pages, or across cache
/// lines where the host refuses that): such accesses are atomic to each other. Nothing waits while it
/// holds this.
struct SplitLock;

impl SplitLock {
    fn take() -> Self {
        while SPLIT.swap(true, Ordering::Acquire) {
            core::hint::spin_loop();
        }
        SplitLock
    }
}

impl Drop for SplitLock {
    fn drop(&mut self) {
        SPLIT.store(false, Ordering::Release);
    }
}
