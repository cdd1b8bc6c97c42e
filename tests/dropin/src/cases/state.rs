//! All of a VM's state is read at random moments and written to a new VM, which goes on with a copy of the memory:
//! what the guest computes and counts is what it would be undisturbed.

use crate::kvm::{self, EXIT_IO, ioctl, ior, iow, iowr};
use crate::signal::{Target, handle};
use iced_x86::code_asm::*;
use kvm_bindings::*;
use libc::{c_int, c_void, siginfo_t};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering::SeqCst};

/// Bytes of guest memory.
const SIZE: usize = 2 << 20;
const GDT: u64 = 0x800;
const IDT: u64 = 0x1000;
const TABLES: u64 = 0x10000;
const VALUES: u64 = 0x2000;
const STACK: u64 = 0x8000;
const CODE: u64 = 0x9000;
const SECOND: u64 = 0xc000;
const HANDLERS: u64 = 0xe000;
/// Where the guest has its local APIC's registers.
const LAPIC: u64 = 0x4000_0000;
/// Where it has counters.
const TICKS: u64 = VALUES + 0x20;
const NMIS: u64 = VALUES + 0x28;
const STEPS: u64 = VALUES + 0x30;
const FLAG: u64 = VALUES + 0x38;
const READY: u64 = VALUES + 0x40;
/// Ports: a value, the end.
const REPORT: u8 = 0x10;
const END: u8 = 0xf4;

extern "C" fn nothing(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

#[repr(C)]
#[derive(Clone, Copy)]
struct Entries<T: Copy, const N: usize> {
    head: [u32; 2],
    entries: [T; N],
}

type CpuidList = Entries<kvm_cpuid_entry2, 256>;
type MsrList = Entries<kvm_msr_entry, 255>;

const GET_SUPPORTED_CPUID: u64 = iowr::<kvm_cpuid2>(0x05);
const GET_MSR_INDEX_LIST: u64 = iowr::<kvm_msr_list>(0x02);

/// A vCPU's state.
struct VcpuState {
    cpuid: CpuidList,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    msrs: MsrList,
    lapic: kvm_lapic_state,
    mp: kvm_mp_state,
    events: kvm_vcpu_events,
    debug: kvm_debugregs,
}

fn zeroed<T>() -> T {
    // SAFETY: used for KVM's structures, for which zeroes are a value.
    unsafe { std::mem::zeroed() }
}

fn get<T>(fd: c_int, request: u64) -> T {
    let mut value = zeroed();
    kvm::call(fd, request, &mut value);
    value
}

fn set<T>(fd: c_int, request: u64, value: &T) -> c_int {
    let result = ioctl(fd, request, std::ptr::from_ref(value) as u64);
    assert!(result >= 0, "ioctl {request:#x}: error {}", -result);
    result
}

fn supported_cpuid() -> CpuidList {
    let system = kvm::open();
    let mut list: CpuidList = zeroed();
    list.head[0] = 256;
    kvm::call(system, GET_SUPPORTED_CPUID, &mut list);
    kvm::close(system);
    list
}

fn msr_indices() -> Vec<u32> {
    let system = kvm::open();
    let mut list = [0u32; 512];
    list[0] = 511;
    kvm::call(system, GET_MSR_INDEX_LIST, &mut list);
    kvm::close(system);
    list[1..=list[0] as usize].to_vec()
}

impl VcpuState {
    fn of(fd: c_int, indices: &[u32]) -> Self {
        let mut cpuid: CpuidList = zeroed();
        cpuid.head[0] = 256;
        kvm::call(fd, iowr::<kvm_cpuid2>(0x91), &mut cpuid);
        let mut msrs: MsrList = zeroed();
        let mut n = 0;
        for &index in indices {
            let mut one: Entries<kvm_msr_entry, 1> = zeroed();
            one.head[0] = 1;
            one.entries[0].index = index;
            if ioctl(fd, iowr::<kvm_msrs>(0x88), &raw mut one as u64) == 1 {
                msrs.entries[n] = one.entries[0];
                n += 1;
            }
        }
        msrs.head[0] = n as u32;
        VcpuState {
            cpuid,
            // MP state first: reading it can change others.
            mp: get(fd, ior::<kvm_mp_state>(0x98)),
            regs: get(fd, kvm::GET_REGS),
            sregs: get(fd, kvm::GET_SREGS),
            xsave: get(fd, ior::<kvm_xsave>(0xa4)),
            xcrs: get(fd, ior::<kvm_xcrs>(0xa6)),
            debug: get(fd, ior::<kvm_debugregs>(0xa1)),
            lapic: get(fd, ior::<kvm_lapic_state>(0x8e)),
            events: get(fd, ior::<kvm_vcpu_events>(0x9f)),
            msrs,
        }
    }

    fn write(&self, fd: c_int) {
        set(fd, iow::<kvm_cpuid2>(0x90), &self.cpuid);
        set(fd, iow::<kvm_mp_state>(0x99), &self.mp);
        set(fd, kvm::SET_REGS, &self.regs);
        set(fd, kvm::SET_SREGS, &self.sregs);
        set(fd, iow::<kvm_xsave>(0xa5), &self.xsave);
        set(fd, iow::<kvm_xcrs>(0xa7), &self.xcrs);
        set(fd, iow::<kvm_debugregs>(0xa2), &self.debug);
        set(fd, iow::<kvm_lapic_state>(0x8f), &self.lapic);
        let done = set(fd, iow::<kvm_msrs>(0x89), &self.msrs);
        let refused = &self.msrs.entries[done as usize];
        assert_eq!(done as u32, self.msrs.head[0], "MSR {:#x}", refused.index);
        set(fd, iow::<kvm_vcpu_events>(0xa0), &self.events);
    }
}

/// A VM with interrupt controllers.
struct Machine {
    vm: c_int,
    memory: *mut u8,
    vcpus: Vec<kvm::Vcpu>,
}

// SAFETY: descriptors and plain memory.
unsafe impl Send for Machine {}

impl Machine {
    fn new(vcpus: u64) -> Self {
        let system = kvm::open();
        let vm = ioctl(system, kvm::CREATE_VM, 0);
        assert!(vm >= 0, "KVM_CREATE_VM: error {}", -vm);
        kvm::close(system);
        ioctl(vm, kvm::io(0x47), 0xfffb_d000);
        assert_eq!(ioctl(vm, kvm::CREATE_IRQCHIP, 0), 0);
        set(vm, iow::<kvm_pit_config>(0x77), &kvm_pit_config::default());
        let memory = kvm::map_anonymous(SIZE);
        let region = kvm_userspace_memory_region {
            memory_size: SIZE as u64,
            userspace_addr: memory as u64,
            ..Default::default()
        };
        set(vm, kvm::SET_USER_MEMORY_REGION, &region);
        let vcpus = (0..vcpus).map(|id| {
            let fd = ioctl(vm, kvm::CREATE_VCPU, id);
            assert!(fd >= 0, "KVM_CREATE_VCPU: error {}", -fd);
            let run = kvm::map_run(fd);
            kvm::Vcpu { fd, run }
        });
        Machine {
            vm,
            memory,
            vcpus: vcpus.collect(),
        }
    }

    fn write(&self, at: u64, bytes: &[u8]) {
        assert!(at as usize + bytes.len() <= SIZE);
        // SAFETY: in bounds; no vCPU runs.
        unsafe {
            let to = self.memory.add(at as usize);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }

    fn u64(&self, at: u64) -> u64 {
        // SAFETY: the values are in bounds and aligned.
        unsafe { self.memory.add(at as usize).cast::<u64>().read_volatile() }
    }

    /// For messages.
    fn describe(&self) -> String {
        let mut text = format!("flag {}, ticks {}", self.u64(FLAG), self.u64(TICKS));
        for vcpu in &self.vcpus {
            let regs = vcpu.regs();
            let mp: kvm_mp_state = get(vcpu.fd, ior::<kvm_mp_state>(0x98));
            let events: kvm_vcpu_events = get(vcpu.fd, ior::<kvm_vcpu_events>(0x9f));
            let lapic: kvm_lapic_state = get(vcpu.fd, ior::<kvm_lapic_state>(0x8e));
            let word = |at: usize| lapic.regs[at] as u8 | lapic.regs[at + 1] as u8;
            text += &format!(
                "\nrip {:#x} rflags {:#x} rbx {} mp {} injected {:?} shadow {} irr {:#x} isr {:#x} icr {:x?}",
                regs.rip,
                regs.rflags,
                regs.rbx,
                mp.mp_state,
                events.interrupt,
                events.interrupt.shadow,
                word(0x220),
                word(0x120),
                &lapic.regs[0x300..0x304],
            );
        }
        text
    }

    /// All state goes to a new machine; this one ends.
    fn moved(self, indices: &[u32]) -> Self {
        for vcpu in &self.vcpus {
            // What user space was asked for is finished first.
            vcpu.set_immediate_exit(1);
            assert_eq!(vcpu.run(), -libc::EINTR);
        }
        let states: Vec<_> = self
            .vcpus
            .iter()
            .map(|v| VcpuState::of(v.fd, indices))
            .collect();
        let chips = [0, 1, 2].map(|id| {
            let mut chip: kvm_irqchip = zeroed();
            chip.chip_id = id;
            kvm::call(self.vm, iowr::<kvm_irqchip>(0x62), &mut chip);
            chip
        });
        let pit: kvm_pit_state2 = get(self.vm, ior::<kvm_pit_state2>(0x9f));
        let mut clock: kvm_clock_data = get(self.vm, ior::<kvm_clock_data>(0x7c));
        let next = Machine::new(self.vcpus.len() as u64);
        // SAFETY: both are as large, and no vCPU runs.
        unsafe { std::ptr::copy_nonoverlapping(self.memory, next.memory, SIZE) };
        for chip in &chips {
            set(next.vm, ior::<kvm_irqchip>(0x63), chip);
        }
        set(next.vm, iow::<kvm_pit_state2>(0xa0), &pit);
        clock.flags = 0;
        set(next.vm, iow::<kvm_clock_data>(0x7b), &clock);
        for (state, vcpu) in states.iter().zip(&next.vcpus) {
            state.write(vcpu.fd);
        }
        // What was written is what is read.
        for (state, vcpu) in states.iter().zip(&next.vcpus) {
            let again = VcpuState::of(vcpu.fd, indices);
            assert_eq!(again.regs, state.regs);
            assert_eq!(again.sregs, state.sregs);
            assert_eq!(again.events, state.events);
            assert_eq!(again.debug, state.debug);
            assert_eq!(again.mp, state.mp);
            assert!(again.xsave.region == state.xsave.region, "XSAVE");
            for (before, after) in state.msrs.entries.iter().zip(&again.msrs.entries) {
                // Time goes on; of the second vCPU, read later, it is set to be the first's.
                let runs = [0x10, 0xe7, 0xe8].contains(&before.index);
                let slack = if states.len() > 1 { 1 << 26 } else { 0 };
                let kept = before.data == after.data || runs && after.data + slack > before.data;
                assert!(
                    kept,
                    "MSR {:#x}: {:#x}, then {:#x}",
                    before.index, before.data, after.data
                );
            }
        }
        next
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        for vcpu in &self.vcpus {
            vcpu.close();
        }
        kvm::close(self.vm);
        // SAFETY: nobody uses it any more.
        unsafe { libc::munmap(self.memory.cast(), SIZE) };
    }
}

/// A number that looks random.
fn random(state: &mut u64) -> u64 {
    *state = state
        .wrapping_mul(6_364_136_223_846_793_005)
        .wrapping_add(1_442_695_040_888_963_407);
    *state >> 33
}

/// SIGALRM after some microseconds.
fn alarm(microseconds: u64) {
    let timer = libc::itimerval {
        it_interval: zeroed(),
        it_value: libc::timeval {
            tv_sec: 0,
            tv_usec: microseconds.max(1) as libc::suseconds_t,
        },
    };
    // SAFETY: the structure outlives the call.
    unsafe { libc::setitimer(libc::ITIMER_REAL, &timer, std::ptr::null_mut()) };
}

fn debug(fd: c_int, control: u32) {
    let debug = kvm_guest_debug {
        control,
        ..Default::default()
    };
    set(fd, iow::<kvm_guest_debug>(0x9b), &debug);
}

/// Runs a machine of one vCPU to its end; what it reports, and how often it was moved.
fn finish(mut machine: Machine, moves: bool, steps: bool) -> (Vec<u32>, u32, Machine) {
    handle(libc::SIGALRM, nothing, 0, &[]);
    let indices = msr_indices();
    let (mut reports, mut moved, mut seed) = (Vec::new(), 0, 42);
    let start = std::time::Instant::now();
    loop {
        let vcpu = machine.vcpus[0];
        if moves {
            alarm(100 + random(&mut seed) % 2500);
        }
        let result = vcpu.run();
        if moves {
            alarm(1_000_000);
        }
        assert!(
            start.elapsed().as_secs() < 90,
            "at {:#x?}, {reports:x?}",
            vcpu.regs()
        );
        if result == 0 {
            assert_eq!(vcpu.reason(), EXIT_IO, "{:#x?}", vcpu.regs());
            // SAFETY: the reason says that this is what the exit has; the data is in the mapping.
            let (port, value) = unsafe {
                let io = (*vcpu.run).__bindgen_anon_1.io;
                let data = vcpu.run.cast::<u8>().add(io.data_offset as usize);
                (io.port, data.cast::<u32>().read_unaligned())
            };
            if port == u16::from(END) {
                alarm(u64::from(u32::MAX));
                return (reports, moved, machine);
            }
            reports.push(value);
            continue;
        }
        assert_eq!(result, -libc::EINTR);
        if steps && random(&mut seed).is_multiple_of(3) {
            // On, instruction by instruction: also into handlers and shadows.
            debug(vcpu.fd, KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP);
            for _ in 0..random(&mut seed) % 30 {
                if vcpu.run() != 0 || vcpu.reason() != KVM_EXIT_DEBUG {
                    break;
                }
            }
            debug(vcpu.fd, 0);
            if vcpu.reason() == EXIT_IO {
                continue;
            }
        }
        machine = machine.moved(&indices);
        moved += 1;
    }
}

fn segment(selector: u16, kind: u8, db: u8, l: u8) -> kvm_segment {
    kvm_segment {
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        db,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    }
}

/// Modes: real, protected, PAE, compatibility, long.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Real,
    Protected,
    Pae,
    Compatibility,
    Long,
}

impl Mode {
    fn bits(self) -> u32 {
        match self {
            Mode::Real => 16,
            Mode::Long => 64,
            _ => 32,
        }
    }
}

/// Descriptors, page tables, and the vCPU in a mode.
fn prepare(machine: &Machine, vcpu: kvm::Vcpu, id: u32, mode: Mode, entry: u64, stack: u64) {
    let mut cpuid = supported_cpuid();
    for e in &mut cpuid.entries {
        match e.function {
            1 => e.ebx = e.ebx & 0x00ff_ffff | id << 24,
            0xb | 0x1f => e.edx = id,
            _ => {}
        }
    }
    set(vcpu.fd, iow::<kvm_cpuid2>(0x90), &cpuid);
    let word = |at: u64, value: u64| machine.write(at, &value.to_le_bytes());
    word(GDT + 8, 0x00af_9b00_0000_ffff);
    word(GDT + 16, 0x00cf_9300_0000_ffff);
    word(GDT + 24, 0x00cf_9b00_0000_ffff);
    // PML4, PDPT, directories of the first 2 GiB; the PDPT alone is PAE's root.
    word(TABLES, TABLES + 0x1007);
    let present = if mode == Mode::Pae { 1 } else { 7 };
    for n in 0..2 {
        word(
            TABLES + 0x1000 + 8 * n,
            (TABLES + 0x2000 + 0x1000 * n) | present,
        );
        for m in 0..512 {
            word(
                TABLES + 0x2000 + 0x1000 * n + 8 * m,
                (n << 30 | m << 21) | 0x87,
            );
        }
    }
    word(TABLES + 0x3000, 0xfee0_0000 | 0x9f);
    let mut s: kvm_sregs = get(vcpu.fd, kvm::GET_SREGS);
    let data = segment(16, 3, 1, 0);
    for register in [&mut s.ds, &mut s.es, &mut s.fs, &mut s.gs, &mut s.ss] {
        *register = data;
    }
    (s.gdt.base, s.gdt.limit) = (GDT, 31);
    (s.idt.base, s.idt.limit) = (IDT, 0xfff);
    s.cr4 = 0x620;
    (s.cr0, s.cs) = match mode {
        Mode::Real => (0x10, zeroed()),
        Mode::Long => (0x8005_0033, segment(8, 11, 0, 1)),
        Mode::Protected => (0x33, segment(24, 11, 1, 0)),
        _ => (0x8005_0033, segment(24, 11, 1, 0)),
    };
    match mode {
        Mode::Real => {
            s = get(vcpu.fd, kvm::GET_SREGS);
            (s.cs.base, s.cs.selector) = (0, 0);
            s.cr4 = 0x600;
        }
        Mode::Protected => {}
        Mode::Pae => s.cr3 = TABLES + 0x1000,
        Mode::Compatibility | Mode::Long => {
            s.cr3 = TABLES;
            s.efer = 0xd00;
        }
    }
    let avx = cpuid
        .entries
        .iter()
        .any(|e| e.function == 1 && e.ecx >> 28 & 1 != 0);
    if avx {
        s.cr4 |= 1 << 18;
    }
    set(vcpu.fd, kvm::SET_SREGS, &s);
    if avx {
        let mut xcrs: kvm_xcrs = get(vcpu.fd, ior::<kvm_xcrs>(0xa6));
        xcrs.nr_xcrs = 1;
        xcrs.xcrs[0].value = 7;
        set(vcpu.fd, iow::<kvm_xcrs>(0xa7), &xcrs);
    }
    let regs = kvm_regs {
        rip: entry,
        rsp: stack,
        rflags: 2,
        rax: 0x1234_5678,
        ..Default::default()
    };
    set(vcpu.fd, kvm::SET_REGS, &regs);
    set(vcpu.fd, iow::<kvm_mp_state>(0x99), &kvm_mp_state::default());
}

fn report(a: &mut CodeAssembler) -> Result<(), IcedError> {
    a.out(u32::from(REPORT), eax)
}

/// Mixes registers of all kinds `rounds` times.
fn mix(a: &mut CodeAssembler, rounds: u32) -> Result<(), IcedError> {
    let mut again = a.create_label();
    a.mov(ecx, rounds)?;
    a.set_label(&mut again)?;
    a.add(eax, ecx)?;
    a.rol(eax, 5)?;
    a.xor(eax, dword_ptr(VALUES as u32))?;
    a.mov(dword_ptr(VALUES as u32), eax)?;
    a.movd(xmm0, eax)?;
    a.paddd(xmm1, xmm0)?;
    a.pxor(xmm7, xmm1)?;
    a.adc(edx, eax)?;
    a.fild(dword_ptr(VALUES as u32))?;
    a.faddp(st1, st0)?;
    a.dec(ecx)?;
    a.jnz(again)
}

/// Reports what [`mix`] has made.
fn results(a: &mut CodeAssembler) -> Result<(), IcedError> {
    report(a)?;
    a.mov(eax, edx)?;
    report(a)?;
    a.movd(eax, xmm1)?;
    report(a)?;
    a.movd(eax, xmm7)?;
    report(a)?;
    a.fst(dword_ptr((VALUES + 8) as u32))?;
    a.mov(eax, dword_ptr((VALUES + 8) as u32))?;
    report(a)?;
    a.out(u32::from(END), eax)?;
    a.hlt()
}

fn assembled(
    bits: u32,
    at: u64,
    write: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).expect("a mode");
    write(&mut a).expect("instructions");
    a.assemble(at).expect("code")
}

/// In each mode, registers of all kinds live.
pub fn state_of_modes() {
    for mode in [
        Mode::Real,
        Mode::Protected,
        Mode::Pae,
        Mode::Compatibility,
        Mode::Long,
    ] {
        let code = assembled(mode.bits(), CODE, |a| {
            a.fldz()?;
            mix(a, 6_000_000)?;
            results(a)
        });
        let begin = || {
            let machine = Machine::new(1);
            machine.write(CODE, &code);
            prepare(&machine, machine.vcpus[0], 0, mode, CODE, STACK);
            machine
        };
        let (expected, _, _) = finish(begin(), false, false);
        let (reports, moved, _) = finish(begin(), true, true);
        println!("{mode:?}: moved {moved} times");
        assert_eq!(reports, expected, "{mode:?}");
        assert!(moved > 1, "{mode:?}");
    }
}

fn gate(machine: &Machine, vector: u64, at: u64) {
    let low = at & 0xffff | 8 << 16 | 0x8e00 << 32 | (at >> 16 & 0xffff) << 48;
    machine.write(IDT + 16 * vector, &low.to_le_bytes());
    machine.write(IDT + 16 * vector + 8, &(at >> 32).to_le_bytes());
}

fn register(offset: u64) -> AsmMemoryOperand {
    dword_ptr(LAPIC + offset)
}

/// A timer that ticks, NMIs within NMIs, HLT, single steps, shadows, MSRs, AVX.
pub fn state_of_everything() {
    const ROUNDS: u32 = 150;
    let avx = std::arch::is_x86_feature_detected!("avx");
    let code = assembled(64, CODE, |a| {
        a.fldz()?;
        a.mov(register(0xf0), 0x1ff)?;
        a.mov(register(0x3e0), 0xb)?;
        a.mov(register(0x320), 0x2_0040)?;
        a.mov(register(0x380), 300_000)?;
        // Some MSRs: LSTAR, KERNEL_GS_BASE, FS_BASE, SYSENTER_EIP.
        for (n, msr) in [0xc000_0082u32, 0xc000_0102, 0xc000_0100, 0x176]
            .into_iter()
            .enumerate()
        {
            a.mov(ecx, msr)?;
            a.mov(eax, 0x1111_1000 * (n as u32 + 1))?;
            a.mov(edx, 0x7f)?;
            a.wrmsr()?;
        }
        a.mov(eax, 1)?;
        a.mov(edx, 2)?;
        a.sti()?;
        a.xor(ebx, ebx)?;
        a.xor(r15, r15)?;
        let mut round = a.create_label();
        a.set_label(&mut round)?;
        mix(a, 3000)?;
        if avx {
            a.vinsertf128(ymm1, ymm1, xmm7, 1)?;
            a.vxorps(ymm2, ymm2, ymm1)?;
        }
        // Two NMIs, the second sent by the handler of the first.
        a.add(ebx, 2)?;
        a.mov(register(0x310), 0)?;
        a.mov(register(0x300), 0x4400)?;
        let mut wait = a.create_label();
        a.set_label(&mut wait)?;
        a.cmp(dword_ptr(NMIS), ebx)?;
        a.jne(wait)?;
        // Six single steps.
        a.pushfq()?;
        a.or(qword_ptr(rsp), 0x100)?;
        a.popfq()?;
        a.nop()?;
        a.nop()?;
        a.nop()?;
        a.pushfq()?;
        a.and(qword_ptr(rsp), !0x100)?;
        a.popfq()?;
        // Shadows.
        for _ in 0..20 {
            a.cli()?;
            a.mov(r14d, ss)?;
            a.sti()?;
            a.nop()?;
            a.mov(ss, r14d)?;
            a.nop()?;
        }
        // The clock does not go back.
        a.mov(r12d, eax)?;
        a.mov(r13d, edx)?;
        a.rdtsc()?;
        a.shl(rdx, 32)?;
        a.or(rax, rdx)?;
        let mut later = a.create_label();
        a.cmp(rax, r15)?;
        a.ja(later)?;
        a.mov(eax, 0xbad)?;
        report(a)?;
        a.set_label(&mut later)?;
        a.mov(r15, rax)?;
        a.mov(eax, r12d)?;
        a.mov(edx, r13d)?;
        // A tick.
        a.hlt()?;
        a.cmp(ebx, 2 * ROUNDS)?;
        a.jne(round)?;
        if avx {
            a.vextractf128(xmm3, ymm2, 1)?;
            a.pxor(xmm7, xmm3)?;
        }
        a.mov(r12d, eax)?;
        a.mov(r13d, edx)?;
        for msr in [0xc000_0082u32, 0xc000_0102, 0xc000_0100, 0x176] {
            a.mov(ecx, msr)?;
            a.rdmsr()?;
            report(a)?;
        }
        a.mov(eax, dword_ptr(NMIS))?;
        report(a)?;
        a.mov(eax, dword_ptr(STEPS))?;
        report(a)?;
        a.mov(eax, r12d)?;
        a.mov(edx, r13d)?;
        results(a)
    });
    let handler = |n: u64, write: &dyn Fn(&mut CodeAssembler) -> Result<(), IcedError>| {
        assembled(64, HANDLERS + 0x100 * n, |a| write(a))
    };
    let nmi = handler(0, &|a| {
        let (mut even, mut again) = (a.create_label(), a.create_label());
        a.inc(dword_ptr(NMIS))?;
        a.test(dword_ptr(NMIS), 1)?;
        a.jz(even)?;
        a.mov(register(0x300), 0x4400)?;
        a.set_label(&mut even)?;
        a.push(rcx)?;
        a.mov(ecx, 300)?;
        a.set_label(&mut again)?;
        a.dec(ecx)?;
        a.jnz(again)?;
        a.pop(rcx)?;
        a.iretq()
    });
    let step = handler(1, &|a| {
        a.inc(dword_ptr(STEPS))?;
        a.iretq()
    });
    let tick = handler(2, &|a| {
        a.inc(dword_ptr(TICKS))?;
        a.mov(register(0xb0), 0)?;
        a.iretq()
    });
    let begin = || {
        let machine = Machine::new(1);
        machine.write(CODE, &code);
        for (n, (vector, code)) in [(2, &nmi), (1, &step), (0x40, &tick)]
            .into_iter()
            .enumerate()
        {
            machine.write(HANDLERS + 0x100 * n as u64, code);
            gate(&machine, vector, HANDLERS + 0x100 * n as u64);
        }
        prepare(&machine, machine.vcpus[0], 0, Mode::Long, CODE, STACK);
        machine
    };
    let (expected, _, _) = finish(begin(), false, false);
    assert_eq!(expected[4..6], [2 * ROUNDS, 6 * ROUNDS]);
    let (reports, moved, machine) = finish(begin(), true, false);
    println!("moved {moved} times, {} ticks", machine.u64(TICKS));
    assert_eq!(reports, expected);
    assert!(moved > 1);
}

/// Two vCPUs that send each other interrupts and halt in between.
pub fn state_of_two() {
    const ROUNDS: u32 = 4000;
    handle(libc::SIGUSR1, nothing, 0, &[]);
    let first = assembled(64, CODE, |a| {
        a.mov(register(0xf0), 0x1ff)?;
        // A local APIC that is not enabled yet takes no interrupts.
        let mut other = a.create_label();
        a.set_label(&mut other)?;
        a.cmp(dword_ptr(READY), 0)?;
        a.je(other)?;
        a.sti()?;
        a.xor(ebx, ebx)?;
        let (mut round, mut wait, mut there) =
            (a.create_label(), a.create_label(), a.create_label());
        a.set_label(&mut round)?;
        a.inc(ebx)?;
        a.mov(register(0x310), 1 << 24)?;
        a.mov(register(0x300), 0x4041)?;
        // The answer may come before the HLT.
        a.set_label(&mut wait)?;
        a.cli()?;
        a.cmp(dword_ptr(TICKS), ebx)?;
        a.je(there)?;
        a.sti()?;
        a.hlt()?;
        a.jmp(wait)?;
        a.set_label(&mut there)?;
        a.sti()?;
        a.cmp(ebx, ROUNDS)?;
        a.jne(round)?;
        a.mov(eax, dword_ptr(TICKS))?;
        a.out(u32::from(END), eax)?;
        a.hlt()
    });
    let second = assembled(64, SECOND, |a| {
        a.mov(register(0xf0), 0x1ff)?;
        a.mov(dword_ptr(READY), 1)?;
        a.sti()?;
        let mut again = a.create_label();
        a.set_label(&mut again)?;
        a.hlt()?;
        a.jmp(again)
    });
    // The second counts and answers; the first only wakes.
    let asked = assembled(64, HANDLERS, |a| {
        a.inc(dword_ptr(FLAG))?;
        a.mov(register(0x310), 0)?;
        a.mov(register(0x300), 0x4042)?;
        a.mov(register(0xb0), 0)?;
        a.iretq()
    });
    let answered = assembled(64, HANDLERS + 0x100, |a| {
        a.inc(dword_ptr(TICKS))?;
        a.mov(register(0xb0), 0)?;
        a.iretq()
    });
    let mut machine = Machine::new(2);
    machine.write(CODE, &first);
    machine.write(SECOND, &second);
    machine.write(HANDLERS, &asked);
    machine.write(HANDLERS + 0x100, &answered);
    gate(&machine, 0x41, HANDLERS);
    gate(&machine, 0x42, HANDLERS + 0x100);
    let at = [(CODE, STACK), (SECOND, STACK - 0x1000)];
    for (id, (entry, stack)) in at.into_iter().enumerate() {
        prepare(
            &machine,
            machine.vcpus[id],
            id as u32,
            Mode::Long,
            entry,
            stack,
        );
    }
    let indices = msr_indices();
    let (mut moved, mut seed) = (0, 7);
    let done = AtomicBool::new(false);
    let start = std::time::Instant::now();
    loop {
        let left = AtomicU32::new(2);
        std::thread::scope(|scope| {
            let threads: Vec<_> = machine
                .vcpus
                .iter()
                .map(|&vcpu| {
                    let (done, left) = (&done, &left);
                    let (sender, receiver) = std::sync::mpsc::channel();
                    scope.spawn(move || {
                        let vcpu = vcpu;
                        sender.send(Target::me()).expect("the case waits");
                        if vcpu.run() == 0 {
                            assert_eq!(vcpu.reason(), EXIT_IO, "{:#x?}", vcpu.regs());
                            done.store(true, SeqCst);
                        }
                        left.fetch_sub(1, SeqCst);
                        // As long as it may be signalled.
                        while left.load(SeqCst) != 0 {
                            std::thread::yield_now();
                        }
                    });
                    receiver.recv().expect("a thread")
                })
                .collect();
            std::thread::sleep(std::time::Duration::from_micros(
                200 + random(&mut seed) % 4000,
            ));
            while left.load(SeqCst) != 0 {
                for (target, vcpu) in threads.iter().zip(&machine.vcpus) {
                    vcpu.set_immediate_exit(1);
                    target.send(libc::SIGUSR1);
                }
                std::thread::sleep(std::time::Duration::from_micros(100));
            }
        });
        if done.load(SeqCst) {
            break;
        }
        let late = start.elapsed().as_secs() > 40;
        assert!(!late, "moved {moved} times, then {}", machine.describe());
        machine = machine.moved(&indices);
        moved += 1;
    }
    println!("moved {moved} times");
    assert_eq!(machine.u64(FLAG), u64::from(ROUNDS));
    assert_eq!(machine.u64(TICKS), u64::from(ROUNDS));
}
