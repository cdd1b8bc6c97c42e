//! What leaving translated code costs: round trips to user space, interpreted instructions that the core
//! serves, timers and wake-ups. Prints nanoseconds per operation.
//!
//! `cargo run --release -p home_user --example latency`
#![expect(unsafe_code, reason = "reads the thread's CPU time")]

#[path = "../tests/machine/mod.rs"]
mod machine;

use home_user::{EngineKind, Errno, Vcpu, VcpuExit};
use iced_x86::code_asm::*;
use machine::{ENTRY, Machine, expect_out};
use std::time::Instant;

const ROUNDS: u32 = 100_000;

fn x2apic(a: &mut CodeAssembler) {
    wrmsr(a, 0x1b, 0xfee0_0d00);
    wrmsr(a, 0x80f, 0x1ff);
}

fn wrmsr(a: &mut CodeAssembler, index: u32, value: u32) {
    a.mov(ecx, index).unwrap();
    a.mov(eax, value).unwrap();
    a.xor(edx, edx).unwrap();
    a.wrmsr().unwrap();
}

/// CPU time of this thread in nanoseconds: other load on the machine does not count.
fn cpu_ns() -> f64 {
    let mut ts = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure outlives the call.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut ts) };
    ts.tv_sec as f64 * 1e9 + ts.tv_nsec as f64
}

/// Nanoseconds per round of `body`, which keeps RBP.
fn per_round(engine: EngineKind, rounds: u32, body: impl Fn(&mut CodeAssembler)) -> f64 {
    let m = Machine::new(engine, true);
    m.load(ENTRY, 64, |a| {
        let mut again = a.create_label();
        x2apic(a);
        a.mov(ebp, rounds).unwrap();
        a.out(0x10, al).unwrap();
        a.set_label(&mut again).unwrap();
        body(a);
        a.dec(ebp).unwrap();
        a.jnz(again).unwrap();
        a.out(0x11, al).unwrap();
    });
    let mut v = m.vcpu(0);
    m.long_mode(&v);
    expect_out(&mut v, 0x10);
    let start = cpu_ns();
    loop {
        match v.run().unwrap() {
            VcpuExit::IoOut(0x11, _) => break,
            VcpuExit::IoOut(0x20..0x30, _) | VcpuExit::MmioWrite(..) => {}
            VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data) => data.fill(1),
            other => panic!("{other:?}"),
        }
    }
    (cpu_ns() - start) / f64::from(rounds)
}

/// From the deadline that a guest writes into IA32_TSC_DEADLINE to its handler, halted or spinning.
fn timer(engine: EngineKind, halted: bool) -> f64 {
    const N: u32 = 2000;
    let m = Machine::new(engine, true);
    m.load(ENTRY, 64, |a| {
        let (mut again, mut wait) = (a.create_label(), a.create_label());
        x2apic(a);
        wrmsr(a, 0x832, 0x4_0050);
        a.xor(r8d, r8d).unwrap();
        a.mov(ebp, N).unwrap();
        a.set_label(&mut again).unwrap();
        a.cli().unwrap();
        a.mov(dword_ptr(0x4000), 0).unwrap();
        a.rdtsc().unwrap();
        a.shl(rdx, 32).unwrap();
        a.or(rax, rdx).unwrap();
        a.add(rax, 300_000).unwrap();
        a.mov(r9, rax).unwrap();
        a.mov(rdx, rax).unwrap();
        a.shr(rdx, 32).unwrap();
        a.mov(eax, eax).unwrap();
        a.mov(ecx, 0x6e0).unwrap();
        a.wrmsr().unwrap();
        a.sti().unwrap();
        a.set_label(&mut wait).unwrap();
        if halted {
            a.hlt().unwrap();
        }
        a.cmp(dword_ptr(0x4000), 0).unwrap();
        a.je(wait).unwrap();
        a.sub(r10, r9).unwrap();
        a.add(r8, r10).unwrap();
        a.dec(ebp).unwrap();
        a.jnz(again).unwrap();
        a.mov(qword_ptr(0x4008), r8).unwrap();
        a.out(0x11, al).unwrap();
    });
    m.load(0x3000, 64, |a| {
        a.rdtsc().unwrap();
        a.shl(rdx, 32).unwrap();
        a.or(rax, rdx).unwrap();
        a.mov(r10, rax).unwrap();
        a.mov(dword_ptr(0x4000), 1).unwrap();
        wrmsr(a, 0x80b, 0);
        a.iretq().unwrap();
    });
    let mut v = m.vcpu(0);
    m.long_mode(&v);
    m.set_idt(&v, 0x50, 0x3000);
    expect_out(&mut v, 0x11);
    let khz = f64::from(v.get_tsc_khz().unwrap());
    m.memory.u64(0x4008) as f64 / f64::from(N) * 1e6 / khz
}

/// Two vCPUs that wake each other from HLT by IPIs: nanoseconds per wake-up.
fn ping_pong(engine: EngineKind) -> f64 {
    const N: u32 = 20_000;
    let m = Machine::new(engine, true);
    let program = |a: &mut CodeAssembler, first: bool| {
        let (mut again, mut wait, mut end) = (a.create_label(), a.create_label(), a.create_label());
        x2apic(a);
        a.mov(edi, u32::from(first)).unwrap();
        a.mov(esi, u32::from(!first)).unwrap();
        a.mov(ebp, N).unwrap();
        a.out(0x10, al).unwrap();
        a.set_label(&mut again).unwrap();
        if first {
            a.mov(dword_ptr(0x4000), edi).unwrap();
            a.mov(edx, edi).unwrap();
            a.mov(eax, 0x4050).unwrap();
            a.mov(ecx, 0x830).unwrap();
            a.wrmsr().unwrap();
        }
        a.nop().unwrap();
        a.set_label(&mut wait).unwrap();
        a.cli().unwrap();
        a.cmp(dword_ptr(0x4000), esi).unwrap();
        a.je(end).unwrap();
        a.sti().unwrap();
        a.hlt().unwrap();
        a.jmp(wait).unwrap();
        a.set_label(&mut end).unwrap();
        a.sti().unwrap();
        if !first {
            a.mov(dword_ptr(0x4000), edi).unwrap();
            a.mov(edx, edi).unwrap();
            a.mov(eax, 0x4050).unwrap();
            a.mov(ecx, 0x830).unwrap();
            a.wrmsr().unwrap();
        }
        a.dec(ebp).unwrap();
        a.jnz(again).unwrap();
        a.out(0x11, al).unwrap();
    };
    m.load(ENTRY, 64, |a| program(a, true));
    m.load(0x2000, 64, |a| program(a, false));
    m.load(0x3000, 64, |a| {
        wrmsr(a, 0x80b, 0);
        a.iretq().unwrap();
    });
    let prepare = |v: &Vcpu| {
        m.long_mode(v);
        m.set_idt(v, 0x50, 0x3000);
    };
    let mut v0 = m.vcpu(0);
    prepare(&v0);
    let mut v1 = m.vcpu(1);
    prepare(&v1);
    v1.set_mp_state(kvm_bindings::kvm_mp_state { mp_state: 0 })
        .unwrap();
    let mut regs = v1.get_regs().unwrap();
    (regs.rip, regs.rsp, regs.rflags) = (0x2000, 0x9000, 2);
    v1.set_regs(&regs).unwrap();
    m.memory.write(0x4000, &0u32.to_le_bytes());
    expect_out(&mut v1, 0x10);
    expect_out(&mut v0, 0x10);
    std::thread::scope(|s| {
        s.spawn(move || while matches!(v1.run(), Err(Errno::EAGAIN)) {});
        let start = Instant::now();
        expect_out(&mut v0, 0x11);
        start.elapsed().as_nanos() as f64 / f64::from(2 * N)
    })
}

fn main() {
    let engine = match std::env::args().nth(1).as_deref() {
        Some("interp") => EngineKind::Interp,
        _ => EngineKind::Jit,
    };
    let show = |what: &str, ns: f64| println!("{what:44} {ns:9.0} ns");
    show("empty loop", per_round(engine, ROUNDS, |_| ()));
    show(
        "OUT to user space",
        per_round(engine, ROUNDS, |a| a.out(0x20, al).unwrap()),
    );
    show(
        "IN from user space",
        per_round(engine, ROUNDS, |a| a.in_(al, 0x20).unwrap()),
    );
    show(
        "MMIO write to user space",
        per_round(engine, ROUNDS, |a| {
            a.mov(ecx, 0xfef0_0000u32).unwrap();
            a.mov(dword_ptr(rcx), eax).unwrap();
        }),
    );
    show(
        "MMIO read of the IOAPIC",
        per_round(engine, ROUNDS, |a| {
            a.mov(ecx, 0xfec0_0000u32).unwrap();
            a.mov(eax, dword_ptr(rcx)).unwrap();
        }),
    );
    show(
        "IN from the PIT",
        per_round(engine, ROUNDS, |a| a.in_(al, 0x42).unwrap()),
    );
    show(
        "CPUID",
        per_round(engine, ROUNDS, |a| {
            a.mov(eax, 1).unwrap();
            a.cpuid().unwrap();
        }),
    );
    show(
        "CPUID leaf 0x8000001e",
        per_round(engine, ROUNDS, |a| {
            a.mov(eax, 0x8000_001eu32).unwrap();
            a.cpuid().unwrap();
        }),
    );
    show("RDTSC", per_round(engine, ROUNDS, |a| a.rdtsc().unwrap()));
    show(
        "RDMSR IA32_EFER",
        per_round(engine, ROUNDS, |a| {
            a.mov(ecx, 0xc000_0080u32).unwrap();
            a.rdmsr().unwrap();
        }),
    );
    show(
        "WRMSR IA32_KERNEL_GS_BASE",
        per_round(engine, ROUNDS, |a| wrmsr(a, 0xc000_0102, 0x1000)),
    );
    show(
        "WRMSR x2APIC EOI",
        per_round(engine, ROUNDS, |a| wrmsr(a, 0x80b, 0)),
    );
    show(
        "WRMSR x2APIC ICR, to oneself, masked",
        per_round(engine, ROUNDS, |a| wrmsr(a, 0x830, 0x50)),
    );
    for (what, step) in [("later each time", 1000i32), ("earlier each time", -1000)] {
        show(
            &format!("WRMSR IA32_TSC_DEADLINE, {what}"),
            per_round(engine, ROUNDS, |a| {
                let mut armed = a.create_label();
                a.test(rbx, rbx).unwrap();
                a.jnz(armed).unwrap();
                a.mov(ecx, 0x832).unwrap();
                a.mov(eax, 0x5_0050).unwrap();
                a.xor(edx, edx).unwrap();
                a.wrmsr().unwrap();
                a.rdtsc().unwrap();
                a.shl(rdx, 32).unwrap();
                a.lea(rbx, qword_ptr(rax + rdx * 1)).unwrap();
                a.mov(rax, 60_000_000_000u64).unwrap();
                a.add(rbx, rax).unwrap();
                a.set_label(&mut armed).unwrap();
                a.add(rbx, step).unwrap();
                a.mov(eax, ebx).unwrap();
                a.mov(rdx, rbx).unwrap();
                a.shr(rdx, 32).unwrap();
                a.mov(ecx, 0x6e0).unwrap();
                a.wrmsr().unwrap();
            }),
        );
    }
    show(
        "VMCALL (KVM_HC_VAPIC_POLL_IRQ)",
        per_round(engine, ROUNDS, |a| {
            a.mov(eax, 1).unwrap();
            a.vmcall().unwrap();
        }),
    );
    show("timer to handler, spinning", timer(engine, false));
    show("timer to handler, from HLT", timer(engine, true));
    show(
        "IPI to a halted vCPU and its answer, each",
        ping_pong(engine),
    );
}
