//! Dirty logs and dirty rings.

use super::fake::{Cpu, out, touch, vm, with_code};
use guestmem::flags::LOG_DIRTY_PAGES;
use kvm_abi::Errno;
use kvm_abi::run::reason;
use std::vec::Vec;

#[test]
fn rules_of_enabling() {
    let vm = vm();
    assert_eq!(vm.reset_dirty_rings(), Err(Errno::EINVAL));
    assert_eq!(vm.enable_dirty_ring(100), Err(Errno::EINVAL));
    assert_eq!(vm.enable_dirty_ring(1 << 21), Err(Errno::E2BIG));
    vm.enable_dirty_ring(4096).unwrap();
    assert_eq!(vm.enable_dirty_ring(4096), Err(Errno::EINVAL));
    assert_eq!(vm.get_dirty_log(0), Err(Errno::ENXIO));
    assert_eq!(vm.clear_dirty_log(0, 0, 64, &[0]), Err(Errno::ENXIO));
    let late = super::fake::vm();
    let _cpu = Cpu::new(&late, 0);
    assert_eq!(late.enable_dirty_ring(4096), Err(Errno::EINVAL));
}

#[test]
fn pages_enter_the_ring_once_until_they_are_reset() {
    let vm = vm();
    vm.enable_dirty_ring(4096).unwrap();
    let code = [
        touch(0x3000),
        touch(0x3004),
        touch(0x5000),
        out(1),
        touch(0x3000),
        out(2),
        touch(0x5000),
        out(3),
    ]
    .concat();
    let (mut region, _memory) = with_code(&vm, 16, &code);
    region.flags = LOG_DIRTY_PAGES;
    vm.set_memory_region(&region).unwrap();
    let mut cpu = Cpu::new(&vm, 0);
    cpu.start(0x1000);
    assert_eq!((cpu.run(), cpu.port()), (reason::IO, 1));
    let ring = cpu.ring.take().unwrap();
    let entry = |i: usize| {
        (
            ring.load(i * 16),
            ring.load(i * 16 + 4),
            ring.load(i * 16 + 8),
        )
    };
    assert_eq!(entry(0), (1, 0, 3));
    assert_eq!(entry(1), (1, 0, 5));
    assert_eq!(entry(2).0, 0);
    // Page 3 is harvested, page 5 not yet.
    ring.store(0, 3);
    assert_eq!(vm.reset_dirty_rings(), Ok(1));
    assert_eq!(vm.reset_dirty_rings(), Ok(0));
    assert_eq!((cpu.run(), cpu.port()), (reason::IO, 2));
    assert_eq!(entry(2), (1, 0, 3));
    assert_eq!((cpu.run(), cpu.port()), (reason::IO, 3));
    assert_eq!(entry(3).0, 0, "page 5 is in the ring already");
}

#[test]
fn a_full_ring_stops_the_vcpu() {
    let vm = vm();
    vm.enable_dirty_ring(4096).unwrap();
    // 192 pages and a few more, in 4 KiB of code, through a segment that moves on.
    let mut code = Vec::new();
    for page in 0..200u16 {
        // mov ds, ax needs a register: mov ax, imm16; mov ds, ax.
        let [low, high] = (0x200 + page * 0x100).to_le_bytes();
        code.extend([0xb8, low, high, 0x8e, 0xd8]);
        code.extend(touch(0));
    }
    code.extend(out(1));
    let (mut region, _memory) = with_code(&vm, 256, &code);
    region.flags = LOG_DIRTY_PAGES;
    vm.set_memory_region(&region).unwrap();
    let mut cpu = Cpu::new(&vm, 0);
    cpu.start(0x1000);
    assert_eq!(cpu.run(), reason::DIRTY_RING_FULL);
    assert_eq!(cpu.run(), reason::DIRTY_RING_FULL);
    let ring = cpu.ring.take().unwrap();
    let full = (0..256).filter(|i| ring.load(i * 16) == 1).count();
    assert_eq!(full, 192);
    ring.store(0, 3);
    assert_eq!(vm.reset_dirty_rings(), Ok(1));
    assert_eq!(cpu.run(), reason::DIRTY_RING_FULL);
    for i in 0..256 {
        if ring.load(i * 16) == 1 {
            ring.store(i * 16, 3);
        }
    }
    vm.reset_dirty_rings().unwrap();
    assert_eq!((cpu.run(), cpu.port()), (reason::IO, 1));
}

#[test]
fn rules_of_dirty_logs() {
    let vm = vm();
    let (mut region, _memory) = with_code(&vm, 100, &[]);
    assert_eq!(vm.get_dirty_log(0), Err(Errno::ENOENT), "not logged");
    region.flags = LOG_DIRTY_PAGES;
    vm.set_memory_region(&region).unwrap();
    assert_eq!(vm.get_dirty_log(1), Err(Errno::ENOENT));
    assert_eq!(vm.get_dirty_log(32764), Err(Errno::EINVAL));
    assert_eq!(vm.get_dirty_log(0), Ok(Vec::from([0, 0])));
    let clear = |first, pages| vm.clear_dirty_log(0, first, pages, &[u64::MAX; 2]);
    assert_eq!(clear(1, 64), Err(Errno::EINVAL));
    assert_eq!(clear(0, 63), Err(Errno::EINVAL));
    assert_eq!(clear(64, 64), Err(Errno::EINVAL));
    assert_eq!(clear(128, 0), Err(Errno::EINVAL));
    assert_eq!(clear(0, 64), Ok(()));
    assert_eq!(clear(64, 36), Ok(()));
    assert_eq!(clear(0, 100), Ok(()));
    assert_eq!(
        vm.clear_dirty_log(0, u64::MAX - 63, 64, &[0]),
        Err(Errno::EINVAL)
    );
    // An odd first page is found before the slot is.
    assert_eq!(vm.clear_dirty_log(1, 1, 64, &[0]), Err(Errno::EINVAL));
    assert_eq!(vm.clear_dirty_log(1, 0, 64, &[0]), Err(Errno::ENOENT));
}

#[test]
fn manual_protection() {
    let vm = vm();
    assert_eq!(vm.set_manual_dirty_log(2), Err(Errno::EINVAL));
    assert_eq!(vm.set_manual_dirty_log(4), Err(Errno::EINVAL));
    vm.set_manual_dirty_log(3).unwrap();
    let (mut region, _memory) = with_code(&vm, 16, &[touch(0x3000), out(1)].concat());
    region.flags = LOG_DIRTY_PAGES;
    vm.set_memory_region(&region).unwrap();
    assert_eq!(
        vm.get_dirty_log(0),
        Ok(Vec::from([0xffff])),
        "all set at first"
    );
    assert_eq!(
        vm.get_dirty_log(0),
        Ok(Vec::from([0xffff])),
        "reading leaves them"
    );
    vm.clear_dirty_log(0, 0, 16, &[u64::MAX]).unwrap();
    let mut cpu = Cpu::new(&vm, 0);
    cpu.start(0x1000);
    assert_eq!(cpu.run(), reason::IO);
    assert_eq!(vm.get_dirty_log(0), Ok(Vec::from([8])));
    vm.clear_dirty_log(0, 0, 16, &[8]).unwrap();
    assert_eq!(vm.get_dirty_log(0), Ok(Vec::from([0])));
}
