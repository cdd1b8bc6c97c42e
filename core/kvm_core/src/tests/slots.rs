//! Coalesced writes, ioeventfds, and who comes first.

use super::fake::{Count, Cpu, out, touch, vm, with_code};
use crate::ioeventfd::{Bus, Match};
use crate::shared_memory::tests::Pages;
use kvm_abi::kvm_coalesced_mmio_zone;
use kvm_abi::run;
use kvm_abi::run::reason;
use std::sync::Arc;

#[test]
fn coalesced_writes_do_not_leave_the_guest() {
    let vm = vm();
    let zone = |addr, size, pio| kvm_coalesced_mmio_zone { addr, size, pio };
    let ring = Pages::new(1);
    vm.set_coalesced_ring(ring.clone()).unwrap();
    // Memory ends at 0x8000.
    vm.register_coalesced(&zone(0x9000, 0x100, 0)).unwrap();
    vm.register_coalesced(&zone(0x80, 1, 1)).unwrap();
    let code = [
        touch(0x9008),
        out(0x80),
        out(0x81),
        touch(0x9008),
        touch(0x9100),
    ]
    .concat();
    with_code(&vm, 8, &code);
    let mut cpu = Cpu::new(&vm, 0);
    cpu.start(0x1000);
    assert_eq!((cpu.run(), cpu.port()), (reason::IO, 0x81));
    let ring = ring.window();
    assert_eq!((ring.load(0), ring.load(4)), (0, 2));
    // Address, length, bus, data.
    let entry = |i: usize| {
        let at = 8 + i * 24;
        (
            ring.load(at),
            ring.load(at + 8),
            ring.load(at + 12),
            ring.load(at + 16),
        )
    };
    assert_eq!(entry(0), (0x9008, 1, 0, 1));
    assert_eq!(entry(1), (0x80, 1, 1, 0));
    vm.unregister_coalesced(&zone(0x9000, 0x100, 0)).unwrap();
    assert_eq!(cpu.run(), reason::MMIO);
    assert_eq!(cpu.run(), reason::MMIO);
    assert_eq!(ring.load(4), 2);
}

#[test]
fn an_event_whose_gate_is_not_in_ram() {
    let vm = vm();
    // UD2, with the interrupt table at 64 KiB, where there is nothing.
    with_code(&vm, 8, &[0x0f, 0x0b]);
    let mut cpu = Cpu::new(&vm, 0);
    cpu.start(0x1000);
    let mut s = cpu.vcpu.sregs();
    s.idt.base = 0x10000;
    s.idt.limit = 0x3ff;
    cpu.vcpu.set_sregs(&s).unwrap();
    assert_eq!(cpu.run(), reason::INTERNAL_ERROR);
    let word = |at: usize| cpu.page.load(run::EXIT + at);
    assert_eq!((word(0), word(4)), (run::internal::DELIVERY_EV, 5));
    assert_eq!(word(8), 1 << 31 | 3 << 8 | 6);
    assert_eq!(
        (word(32), word(36)),
        (0x10000 + 6 * 4, 0),
        "the gate's address"
    );
    // The next run starts over instead of waiting for an answer.
    assert_eq!(cpu.run(), reason::INTERNAL_ERROR);
}

#[test]
fn an_ioeventfd_comes_before_a_zone() {
    let vm = vm();
    let ring = Pages::new(1);
    vm.set_coalesced_ring(ring.clone()).unwrap();
    let zone = kvm_coalesced_mmio_zone {
        addr: 0x80,
        size: 2,
        pio: 1,
    };
    vm.register_coalesced(&zone).unwrap();
    let event = Count::new(1);
    let what = Match {
        bus: Bus::Pio,
        addr: 0x80,
        len: 1,
        data: None,
    };
    vm.register_ioevent(what, event.clone()).unwrap();
    with_code(&vm, 8, &[out(0x80), out(0x81), out(0x82)].concat());
    let mut cpu = Cpu::new(&vm, 0);
    cpu.start(0x1000);
    assert_eq!((cpu.run(), cpu.port()), (reason::IO, 0x82));
    assert_eq!((event.get(), ring.window().load(4)), (1, 1));
    assert_eq!(Arc::strong_count(&event), 2);
    vm.unregister_ioevent(what, 1).unwrap();
    assert_eq!(Arc::strong_count(&event), 1);
}
