//! A processor and a little machine around it whose state the input chooses.
#![expect(unsafe_code, reason = "guest memory is a mapping of its own")]

use crate::input::Input;
use std::sync::Arc;
use x86emu::env::{Env, Exception, Exit, Features, Flush, HostCpu, NativeRegs, PhysMem, Stop};
use x86emu::state::{CpuState, DescriptorTable, Segment, XsaveArea, sreg};

/// Bytes of RAM, from guest-physical address 0.
pub const RAM: usize = 64 << 10;
/// Where the code is.
pub const CODE: u64 = 0x1000;
const GDT: u64 = 0x3000;
const IDT: u64 = 0x3800;
const TABLES: u64 = 0x4000;
const TSS: u64 = 0x8000;

/// Zeroed pages.
pub struct Memory {
    start: *mut u8,
    len: usize,
}

// SAFETY: plain memory that is accessed with volatile operations and by guest code only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    /// Maps `len` bytes.
    pub fn new(len: usize) -> Self {
        // SAFETY: a new anonymous mapping touches nothing that exists.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        assert_ne!(start, libc::MAP_FAILED, "no memory for the fuzzer");
        Self {
            start: start.cast(),
            len,
        }
    }

    /// The first byte.
    pub fn start(&self) -> *mut u8 {
        self.start
    }

    /// Writes what fits of `data` at `at`.
    pub fn write(&self, at: u64, data: &[u8]) {
        for (at, byte) in (at..self.len as u64).zip(data) {
            // SAFETY: in bounds.
            unsafe { self.start.add(at as usize).write_volatile(*byte) };
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`; whoever used it is gone.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// RAM, and devices and MSRs that answer as the input says. After a number of events it asks to
/// be left alone, so that no input runs for long.
pub struct Machine {
    memory: Arc<Memory>,
    features: Features,
    answers: Vec<u8>,
    next: usize,
    budget: u32,
    /// Instructions given to the host come back as done instead of as #UD.
    host_agrees: bool,
}

impl Machine {
    fn answer(&mut self) -> u8 {
        self.next += 1;
        match self.answers.get(self.next % self.answers.len().max(1)) {
            Some(byte) => *byte,
            None => 0,
        }
    }

    fn event(&mut self) -> Result<(), Stop> {
        match self.budget.checked_sub(1) {
            Some(left) => {
                self.budget = left;
                if self.answer() == 0xf5 {
                    return Err(Stop::Exit(Exit::UserSpace));
                }
                Ok(())
            }
            None => Err(Stop::Exit(Exit::InternalError)),
        }
    }

    /// No event is left.
    pub fn exhausted(&self) -> bool {
        self.budget == 0
    }
}

impl PhysMem for Machine {
    fn host_ptr(&mut self, gpa: u64, len: usize, write: bool) -> Option<*mut u8> {
        let end = gpa.checked_add(len as u64)?;
        assert!(
            len == 0 || gpa >> 12 == (end - 1) >> 12,
            "an access crosses a page"
        );
        // The last page is read-only.
        if end > RAM as u64 || write && end > RAM as u64 - 4096 {
            return None;
        }
        Some(self.memory.start().wrapping_add(gpa as usize))
    }
}

impl HostCpu for Machine {
    fn native(
        &mut self,
        insn: &[u8],
        regs: &mut NativeRegs,
        _: Option<&mut XsaveArea>,
    ) -> Result<(), u8> {
        assert!(!insn.is_empty() && insn.len() <= 16);
        if !self.host_agrees {
            return Err(6);
        }
        // Repeated instructions come to an end.
        if insn.iter().any(|byte| matches!(byte, 0xf2 | 0xf3)) {
            regs.gpr[1] = 0;
        }
        Ok(())
    }
}

impl Env for Machine {
    fn mmio_read(&mut self, _: u64, data: &mut [u8]) -> Result<(), Stop> {
        self.event()?;
        data.fill_with(|| self.answer());
        Ok(())
    }
    fn mmio_write(&mut self, _: u64, _: &[u8]) -> Result<(), Stop> {
        self.event()
    }
    fn io_in(&mut self, _: u16, data: &mut [u8]) -> Result<(), Stop> {
        self.event()?;
        data.fill_with(|| self.answer());
        Ok(())
    }
    fn io_out(&mut self, _: u16, _: &[u8]) -> Result<(), Stop> {
        self.event()
    }
    fn rdmsr(&mut self, _: &mut CpuState, index: u32) -> Result<u64, Stop> {
        self.event()?;
        match index & 3 {
            0 => Err(Stop::gp(0)),
            _ => Ok(u64::from(self.answer())),
        }
    }
    fn wrmsr(&mut self, cpu: &mut CpuState, index: u32, value: u64) -> Result<(), Stop> {
        self.event()?;
        match index {
            0xc000_0081 => cpu.star = value,
            0xc000_0082 => cpu.lstar = value,
            0xc000_0084 => cpu.fmask = value,
            0x174 => cpu.sysenter_cs = value,
            _ if index & 3 == 0 => return Err(Stop::gp(0)),
            _ => {}
        }
        Ok(())
    }
    fn cpuid(&mut self, _: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        if leaf == 0xd {
            // The XSAVE formats are the host's.
            let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
            return [r.eax, r.ebx, r.ecx, r.edx];
        }
        [leaf, subleaf, 0, 0]
    }
    fn features(&self) -> &Features {
        &self.features
    }
    fn tsc(&mut self, _: &CpuState) -> u64 {
        self.next as u64
    }
    fn cr8(&mut self) -> u64 {
        u64::from(self.answer() & 15)
    }
    fn set_cr8(&mut self, _: u64) {}
    fn flush(&mut self, _: Flush) {}
    fn hypercall(&mut self, _: &mut CpuState) -> Result<(), Stop> {
        self.event()
    }
    fn intercepts(&mut self, _: &CpuState, exception: &Exception) -> bool {
        exception.vector == 3 && self.answer() == 0xf3
    }
    fn retired(&mut self) {}
}

/// A machine and its processor, in a mode and a state that `input` chooses, and code at the
/// instruction pointer: what is left of the input.
pub fn machine(input: &mut Input<'_>) -> (CpuState, Machine) {
    let mode = input.u8();
    let memory = Arc::new(Memory::new(RAM));
    let mut cpu = CpuState::default();
    tables(&memory);
    match mode & 3 {
        0 => real(&mut cpu),
        1 => protected(&mut cpu),
        2 => {
            protected(&mut cpu);
            v86(&mut cpu);
        }
        _ => long(&mut cpu),
    }
    if mode & 4 != 0 {
        user(&mut cpu);
    }
    cpu.rip = CODE;
    for (n, register) in cpu.gpr.iter_mut().enumerate() {
        *register = 0x9000 + 0x40 * n as u64;
    }
    let changes = input.u8() & 31;
    for _ in 0..changes {
        disturb(&mut cpu, &memory, input);
    }
    let options = input.u8();
    let some = |bit: u8| if options & bit != 0 { u32::MAX } else { 0 };
    let answers = input.bytes(usize::from(options >> 5)).to_vec();
    memory.write(cpu.rip, input.rest());
    let all = some(1);
    let machine = Machine {
        memory,
        features: Features {
            cr4_allowed: 0x1_ffff_ffff,
            xcr0_allowed: 0xe7,
            efer_allowed: 0xd01,
            phys_bits: 46,
            amd: options & 2 != 0,
            leaf1_ecx: !all,
            leaf1_edx: !all,
            leaf7_ebx: !all,
            leaf7_ecx: !all,
            leaf7_edx: !all,
            ext1_ecx: !all,
            ext1_edx: !all,
            ..Features::default()
        },
        answers,
        next: 0,
        budget: 2000,
        host_agrees: options & 4 != 0,
    };
    (cpu, machine)
}

fn tables(memory: &Memory) {
    let put = |at: u64, value: u64| memory.write(at, &value.to_le_bytes());
    // Code and data of 64, 32 and 16 bits, for the kernel and for users; a TSS, an LDT, a gate.
    for (n, descriptor) in (1u64..).zip([
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00cf_9b00_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x0000_9b00_0000_ffff,
        0x0000_8900_8000_0067,
        0x0000_0000_0000_0000,
        0x0000_8200_3000_00ff,
        0x0000_ec00_0028_1000,
        0x0000_8500_0040_0000,
        0x0000_8100_8000_002b,
    ]) {
        put(GDT + n * 8, descriptor);
    }
    // Every vector leads to the code's page; even ones by interrupt gates, odd ones by trap gates
    // that users may call.
    for vector in 0..64u64 {
        let selector = if vector < 32 { 8 } else { 0x28 };
        let kind = if vector & 1 == 0 { 0x8e00 } else { 0xef00 };
        put(IDT + vector * 16, 0x1800 | selector << 16 | kind << 32);
    }
    put(TABLES, TABLES + 0x1007);
    put(TABLES + 0x1000, TABLES + 0x2007);
    put(TABLES + 0x2000, TABLES + 0x3007);
    // The second 2 MiB, and the last of 32-bit space, are the same again; the third is far away.
    put(TABLES + 0x2008, TABLES + 0x3007);
    put(TABLES + 0x2010, 0x1_0000_0087);
    for page in 0..512 {
        let flags = [0x67, 0x27, 7, 5, 3, 0x67, 0x107, 0x8000_0000_0000_0067];
        let flags = if page < 12 {
            0x67
        } else {
            flags[page as usize & 7]
        };
        put(TABLES + 0x3000 + page * 8, page << 12 | flags);
    }
    // Stack pointers of the task state segment.
    for at in (4..0x60).step_by(8) {
        put(TSS + at, 0x9800);
    }
}

fn segment(selector: u16, attr: u16) -> Segment {
    Segment {
        base: 0,
        limit: u32::MAX,
        selector,
        attr,
        unusable: false,
    }
}

fn real(cpu: &mut CpuState) {
    for segment in &mut cpu.seg {
        segment.base = 0;
        segment.selector = 0;
    }
}

fn protected(cpu: &mut CpuState) {
    cpu.cr0 = 0x8005_0033 & !0x8000_0000;
    cpu.cr4 = 0x600;
    cpu.seg = [segment(0x10, 0xc093); 6];
    cpu.seg[sreg::CS] = segment(0x28, 0xc09b);
    cpu.gdtr = DescriptorTable {
        base: GDT,
        limit: 0x7f,
    };
    cpu.idtr = DescriptorTable {
        base: IDT,
        limit: 0x3ff,
    };
    cpu.tr = Segment {
        base: TSS,
        limit: 0x67,
        selector: 0x40,
        attr: 0x8b,
        unusable: false,
    };
}

fn v86(cpu: &mut CpuState) {
    cpu.rflags |= 1 << 17 | 0x3000;
    cpu.cpl = 3;
    for segment in &mut cpu.seg {
        *segment = Segment {
            base: 0,
            limit: 0xffff,
            selector: 0,
            attr: 0xf3,
            unusable: false,
        };
    }
}

fn long(cpu: &mut CpuState) {
    protected(cpu);
    cpu.cr0 = 0x8005_0033;
    cpu.cr4 = 0x4_0620;
    cpu.cr3 = TABLES;
    cpu.efer = 0xd01;
    cpu.xcr0 = 7;
    cpu.seg[sreg::CS] = segment(8, 0xa09b);
}

fn user(cpu: &mut CpuState) {
    if cpu.cr0 & 1 == 0 {
        return;
    }
    cpu.cpl = 3;
    for segment in &mut cpu.seg {
        segment.attr |= 0x60;
        segment.selector |= 3;
    }
}

/// Changes one thing.
fn disturb(cpu: &mut CpuState, memory: &Memory, input: &mut Input<'_>) {
    match input.below(24) {
        0..4 => {
            let n = input.below(16);
            cpu.gpr[n] = input.value();
        }
        4 => cpu.rflags = input.value() & 0x3f_7fd7 | 2,
        5 => {
            let n = input.below(6);
            cpu.seg[n].base = input.value();
        }
        6 => {
            let n = input.below(6);
            cpu.seg[n].limit = input.value() as u32;
        }
        7 => {
            let n = input.below(6);
            cpu.seg[n].attr = input.u16() & 0xf0ff;
        }
        8 => {
            let n = input.below(6);
            cpu.seg[n].unusable = input.flag();
            cpu.seg[n].selector = input.u16();
        }
        9 => {
            cpu.tr.base = input.value();
            cpu.tr.limit = input.value() as u32;
            cpu.tr.attr = input.u16() & 0xf0ff;
        }
        10 => {
            cpu.ldtr.base = input.value();
            cpu.ldtr.limit = input.value() as u32;
            cpu.ldtr.attr = input.u16() & 0xf0ff;
        }
        11 => cpu.cr0 ^= 1 << (input.u8() & 31),
        12 => cpu.cr4 ^= 1 << (input.u8() & 31),
        13 => cpu.cr3 = input.value(),
        14 => cpu.efer ^= [1, 0x100, 0x400, 0x800][input.below(4)],
        15 => cpu.xcr0 = input.value() & 0xe7 | 1,
        16 => {
            let n = input.below(4);
            cpu.dr[n] = input.value();
            cpu.dr7 = input.value() & 0xffff_23ff | 0x400;
        }
        17 => cpu.cpl = input.u8() & 3,
        18 => {
            cpu.shadow = input.u8() & 3;
            cpu.nmi_blocked = input.flag();
        }
        19 => {
            cpu.gdtr.base = input.value();
            cpu.gdtr.limit = input.u16();
        }
        20 => {
            cpu.idtr.base = input.value();
            cpu.idtr.limit = input.u16();
        }
        21 => cpu.rip = input.value(),
        22 => {
            let at = input.value();
            memory.write(at, &input.array::<8>());
        }
        _ => input.disturb(&mut cpu.xsave.0),
    }
}
