//! Registers in `kvm_run`.

use super::fake::{Cpu, out, vm, with_code};
use core::mem::offset_of;
use kvm_abi::run::{self, reason, sync};
use kvm_abi::{Errno, kvm_regs, kvm_sync_regs, vcpuevent};
use zerocopy::{FromZeros, IntoBytes};

fn synced(cpu: &Cpu) -> kvm_sync_regs {
    let mut s = kvm_sync_regs::new_zeroed();
    cpu.page.read(run::SYNC_REGS, s.as_mut_bytes());
    s
}

fn set_rbx(cpu: &Cpu, value: u64) {
    let at = run::SYNC_REGS + offset_of!(kvm_sync_regs, regs) + offset_of!(kvm_regs, rbx);
    cpu.page.write(at, &value.to_ne_bytes());
}

fn ask(cpu: &Cpu, valid: u64, dirty: u64) {
    cpu.page.write(run::VALID_REGS, &valid.to_ne_bytes());
    cpu.page.write(run::DIRTY_REGS, &dirty.to_ne_bytes());
}

fn machine() -> Cpu {
    let vm = vm();
    with_code(&vm, 8, &[out(1), out(2), out(3), out(4), out(5)].concat());
    let mut cpu = Cpu::new(&vm, 0);
    cpu.start(0x1000);
    cpu
}

#[test]
fn unknown_sets_are_refused() {
    let mut cpu = machine();
    for bad in [0x8000_0000, 8, 0x8000_0007, 1 << 63] {
        ask(&cpu, bad, 0);
        assert_eq!(cpu.vcpu.run(), Err(Errno::EINVAL));
        ask(&cpu, 0, bad);
        assert_eq!(cpu.vcpu.run(), Err(Errno::EINVAL));
    }
    ask(&cpu, 0, 0);
    assert_eq!((cpu.run(), cpu.port()), (reason::IO, 1));
}

#[test]
fn sets_are_shown_and_taken() {
    let mut cpu = machine();
    ask(&cpu, sync::ALL, 0);
    assert_eq!((cpu.run(), cpu.port()), (reason::IO, 1));
    let s = synced(&cpu);
    assert_eq!(s.regs, cpu.vcpu.regs());
    assert_eq!(s.sregs, cpu.vcpu.sregs());
    assert_eq!(s.events, cpu.vcpu.vcpu_events());
    assert_eq!(s.regs.rip, 0x1000);

    set_rbx(&cpu, 0xbad_1dea);
    ask(&cpu, sync::ALL, sync::ALL);
    assert_eq!((cpu.run(), cpu.port()), (reason::IO, 2));
    assert_eq!(cpu.vcpu.regs().rbx, 0xbad_1dea);
    assert_eq!(synced(&cpu).regs.rbx, 0xbad_1dea);
    let mut dirty = [0; 8];
    cpu.page.read(run::DIRTY_REGS, &mut dirty);
    assert_eq!(dirty, [0; 8], "taken");

    // Shown, not taken.
    set_rbx(&cpu, 1);
    ask(&cpu, sync::ALL, 0);
    assert_eq!((cpu.run(), cpu.port()), (reason::IO, 3));
    assert_eq!(synced(&cpu).regs.rbx, 0xbad_1dea);
    // Neither.
    set_rbx(&cpu, 2);
    ask(&cpu, 0, 0);
    assert_eq!((cpu.run(), cpu.port()), (reason::IO, 4));
    assert_eq!(
        (synced(&cpu).regs.rbx, cpu.vcpu.regs().rbx),
        (2, 0xbad_1dea)
    );
    // Taken, not shown. The page still says where the guest was long ago, but for RIP.
    let mut regs = cpu.vcpu.regs();
    regs.rbx = 3;
    cpu.page.write(run::SYNC_REGS, regs.as_bytes());
    ask(&cpu, 0, sync::REGS);
    assert_eq!((cpu.run(), cpu.port()), (reason::IO, 5));
    assert_eq!(cpu.vcpu.regs().rbx, 3);
    assert_eq!(synced(&cpu).regs.rip, regs.rip);
}

#[test]
fn what_the_calls_refuse_is_refused() {
    let mut cpu = machine();
    ask(&cpu, sync::ALL, 0);
    cpu.run();
    let good = synced(&cpu);
    let mut bad = good;
    bad.regs.rbx = 77;
    bad.sregs.cr0 = 1 << 31;
    cpu.page.write(run::SYNC_REGS, bad.as_bytes());
    ask(&cpu, 0, sync::ALL);
    assert_eq!(cpu.vcpu.run(), Err(Errno::EINVAL));
    assert_eq!(cpu.vcpu.regs().rbx, 77, "the sets before it are taken");
    assert_eq!(
        cpu.page.load(run::DIRTY_REGS),
        (sync::SREGS | sync::EVENTS) as u32
    );
    let mut bad = good;
    bad.events.flags = vcpuevent::VALID_PAYLOAD;
    cpu.page.write(run::SYNC_REGS, bad.as_bytes());
    ask(&cpu, 0, sync::EVENTS);
    assert_eq!(cpu.vcpu.run(), Err(Errno::EINVAL));
}

#[test]
fn cr8_is_user_spaces_without_a_local_apic() {
    let mut cpu = machine();
    ask(&cpu, sync::ALL, 0);
    cpu.page.write(run::CR8, &5u64.to_ne_bytes());
    cpu.run();
    assert_eq!(cpu.vcpu.sregs().cr8, 5);
    // The one in the page counts, not the one in the set.
    ask(&cpu, 0, sync::SREGS);
    cpu.page.write(run::CR8, &6u64.to_ne_bytes());
    cpu.run();
    assert_eq!(cpu.vcpu.sregs().cr8, 6);
}

#[test]
fn a_run_that_ends_at_once_keeps_the_exit() {
    let mut cpu = machine();
    assert_eq!((cpu.run(), cpu.port()), (reason::IO, 1));
    cpu.page.write(run::IMMEDIATE_EXIT, &[1]);
    assert_eq!(cpu.vcpu.run(), Err(Errno::EINTR));
    cpu.page.write(run::IMMEDIATE_EXIT, &[0]);
    assert_eq!(cpu.page.load(run::EXIT_REASON), reason::IO);
    assert_eq!(cpu.vcpu.regs().rip, 0x1002, "the access is over");
    cpu.vcpu.shared().user_kick();
    assert_eq!(cpu.vcpu.run(), Err(Errno::EINTR));
    assert_eq!(cpu.page.load(run::EXIT_REASON), reason::INTR);
}
