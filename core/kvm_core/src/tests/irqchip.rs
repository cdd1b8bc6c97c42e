//! The interrupt controllers in the kernel, all of them or the local APICs alone.

use super::fake::{Count, Cpu, out, vm, with_code};
use kvm_abi::run::{self, reason};
use kvm_abi::{
    Errno, irq_routing, kvm_irq_routing_entry, kvm_lapic_state, kvm_msi, kvm_pit_state, mp_state,
};
use std::sync::Arc;
use std::vec::Vec;

fn msi_route(gsi: u32, vector: u32, level: bool) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: irq_routing::MSI,
        u: [
            0xfee0_0000,
            u64::from(vector | u32::from(level) << 15),
            0,
            0,
        ],
        ..Default::default()
    }
}

fn chip_route(gsi: u32, chip: u64, pin: u64) -> kvm_irq_routing_entry {
    kvm_irq_routing_entry {
        gsi,
        type_: irq_routing::IRQCHIP,
        u: [pin << 32 | chip, 0, 0, 0],
        ..Default::default()
    }
}

/// Turns the local APIC on.
fn enable_lapic(cpu: &mut Cpu) {
    let mut state: kvm_lapic_state = cpu.vcpu.lapic().unwrap();
    state.regs[0xf1] = 1;
    cpu.vcpu.set_lapic(&state).unwrap();
}

/// An interrupt handler at 0x2000 for `vector`, and whatever the real-mode stack needs.
fn handler(memory: &crate::shared_memory::Window, vector: u8, code: &[u8]) {
    memory.write(usize::from(vector) * 4, &[0, 0x20, 0, 0]);
    memory.write(0x2000, code);
}

#[test]
fn rules_of_creation() {
    let one = vm();
    assert_eq!(one.enable_split_irqchip(4097), Err(Errno::EINVAL));
    one.enable_split_irqchip(120).unwrap();
    assert_eq!(one.enable_split_irqchip(24), Err(Errno::EEXIST));
    assert_eq!(one.create_irqchip(), Err(Errno::EEXIST));
    assert!(one.irqchip_in_kernel() && !one.pic_in_kernel());
    assert!(one.irqfd_allowed(false) && !one.irqfd_allowed(true));
    assert_eq!(one.create_pit(0), Err(Errno::ENOENT));
    assert_eq!(one.get_irqchip(0).map(|_| ()), Err(Errno::ENXIO));
    let full = vm();
    assert!(!full.irqfd_allowed(false));
    full.create_irqchip().unwrap();
    assert!(full.irqfd_allowed(true));
    assert_eq!(full.enable_split_irqchip(0), Err(Errno::EEXIST));
    full.create_pit(0xff).unwrap();
    assert_eq!(full.create_pit(0), Err(Errno::EEXIST));
    let late = vm();
    let _cpu = Cpu::new(&late, 0);
    assert_eq!(late.enable_split_irqchip(0), Err(Errno::EEXIST));
    assert_eq!(late.create_irqchip(), Err(Errno::EINVAL));
}

#[test]
fn rules_of_routes() {
    let none = vm();
    assert_eq!(none.set_gsi_routing(&[]), Err(Errno::EINVAL));
    let split = vm();
    split.enable_split_irqchip(24).unwrap();
    let set = |entries: &[_]| split.set_gsi_routing(entries);
    assert_eq!(set(&[chip_route(1, 2, 1)]), Err(Errno::EINVAL));
    assert_eq!(set(&[msi_route(1, 0x30, false)]), Ok(()));
    let full = vm();
    full.create_irqchip().unwrap();
    let set = |entries: &[_]| full.set_gsi_routing(entries);
    assert_eq!(set(&[chip_route(1, 0, 1), chip_route(1, 2, 1)]), Ok(()));
    assert_eq!(
        set(&[chip_route(1, 2, 1), chip_route(1, 2, 2)]),
        Err(Errno::EINVAL)
    );
    assert_eq!(set(&[chip_route(1, 2, 24)]), Err(Errno::EINVAL));
    assert_eq!(set(&[chip_route(1, 0, 8)]), Err(Errno::EINVAL));
    assert_eq!(set(&[chip_route(1, 3, 0)]), Err(Errno::EINVAL));
    assert_eq!(set(&[chip_route(4096, 2, 0)]), Err(Errno::EINVAL));
    assert_eq!(set(&[chip_route(4095, 2, 0)]), Ok(()));
    assert_eq!(
        set(&[msi_route(1, 0x30, false), chip_route(1, 2, 1)]),
        Err(Errno::EINVAL)
    );
    // A device id may come with an MSI, and means nothing here.
    let mut route = msi_route(1, 0x30, false);
    route.flags = 1;
    assert_eq!(set(&[route]), Ok(()));
    route.flags = 2;
    assert_eq!(set(&[route]), Err(Errno::EINVAL));
    let mut route = chip_route(1, 2, 1);
    route.flags = 1;
    assert_eq!(set(&[route]), Err(Errno::EINVAL));
    let many: Vec<_> = (0..4096).map(|gsi| msi_route(gsi, 0x30, false)).collect();
    assert_eq!(set(&many), Ok(()));
    // With 32-bit ids, address bits 39:32 are reserved.
    let mut wide = msi_route(1, 0x30, false);
    wide.u[0] |= 1 << 32;
    assert_eq!(set(&[wide]), Ok(()));
    assert_eq!(full.enable_x2apic_api(4), Err(Errno::EINVAL));
    full.enable_x2apic_api(1).unwrap();
    assert_eq!(set(&[wide]), Err(Errno::EINVAL));
    let msi = kvm_msi {
        address_lo: 0xfee0_0000,
        address_hi: 1,
        ..Default::default()
    };
    assert_eq!(full.signal_msi(&msi), Err(Errno::EPERM));
}

/// STI; NOP-free idling: `jmp $` is left by interrupts alone.
const STI_LOOP: [u8; 3] = [0xfb, 0xeb, 0xfe];

#[test]
fn user_space_hears_of_its_level_interrupts() {
    let vm = vm();
    vm.enable_split_irqchip(24).unwrap();
    let (_, memory) = with_code(&vm, 16, &STI_LOOP);
    // The handler asks user space, which ends the interrupt by the APIC's state; then IRET.
    handler(&memory, 0x30, &[out(1), Vec::from([0xcf])].concat());
    let mut cpu = Cpu::new(&vm, 0);
    cpu.start(0x1000);
    let mut regs = cpu.vcpu.regs();
    regs.rsp = 0x8000;
    cpu.vcpu.set_regs(&regs);
    enable_lapic(&mut cpu);
    vm.set_gsi_routing(&[
        msi_route(5, 0x30, true),
        msi_route(6, 0x31, false),
        msi_route(30, 0x32, true),
    ])
    .unwrap();
    assert!(vm.ioapic_has(0x30), "level");
    assert!(!vm.ioapic_has(0x31), "edge");
    assert!(!vm.ioapic_has(0x32), "not a pin of user space's I/O APIC");
    assert_eq!(vm.set_irq_line(5, true), Ok(1));
    assert_eq!(vm.set_irq_line(5, false), Ok(-1));
    assert_eq!((cpu.run(), cpu.port()), (reason::IO, 1));
    // The guest's write to the EOI register.
    let effect = cpu.vcpu.env.shared.lapic().unwrap().lock().eoi().unwrap();
    cpu.vcpu.env.lapic_effect(irqchip::Effect::Eoi(effect));
    assert_eq!(cpu.run(), reason::IOAPIC_EOI);
    assert_eq!(cpu.page.load(run::EXIT) as u8, 0x30);
    cpu.vcpu.shared().user_kick();
    assert_eq!(cpu.vcpu.run(), Err(Errno::EINTR), "once only");
    // Routes to another vCPU's APIC are none of this one's business.
    let mut other = msi_route(5, 0x30, true);
    other.u[0] |= 1 << 12;
    vm.set_gsi_routing(&[other]).unwrap();
    assert!(vm.ioapic_has(0x30));
    let eoi = irqchip::EndOfInterrupt {
        vector: 0x30,
        level: true,
        broadcast: true,
    };
    assert!(!vm.eoi(eoi, 0));
}

#[test]
fn the_8259_of_user_space() {
    let vm = vm();
    vm.enable_split_irqchip(24).unwrap();
    // CLI is how it starts: port 1, then STI and wait.
    let (_, memory) = with_code(&vm, 16, &[out(1), Vec::from(STI_LOOP)].concat());
    handler(&memory, 0x40, &out(2));
    let mut cpu = Cpu::new(&vm, 0);
    cpu.start(0x1000);
    let mut regs = cpu.vcpu.regs();
    regs.rsp = 0x8000;
    cpu.vcpu.set_regs(&regs);
    assert_eq!((cpu.run(), cpu.port()), (reason::IO, 1));
    let ready = run::READY_FOR_INTERRUPT_INJECTION;
    assert_eq!(cpu.page.load(ready) & 1, 0, "interrupts are off");
    cpu.page.write(run::REQUEST_INTERRUPT_WINDOW, &[1]);
    assert_eq!(cpu.run(), reason::IRQ_WINDOW_OPEN);
    assert_eq!(cpu.page.load(ready) & 1, 1);
    cpu.page.write(run::REQUEST_INTERRUPT_WINDOW, &[0]);
    assert_eq!(cpu.vcpu.interrupt(256), Err(Errno::EINVAL));
    cpu.vcpu.interrupt(0x40).unwrap();
    assert_eq!(cpu.vcpu.interrupt(0x41), Err(Errno::EEXIST));
    assert_eq!((cpu.run(), cpu.port()), (reason::IO, 2));
    cpu.vcpu.interrupt(0x41).unwrap();
}

#[test]
fn a_masked_lint0_opens_no_window() {
    let vm = vm();
    vm.enable_split_irqchip(24).unwrap();
    with_code(&vm, 16, &[Vec::from([0xfb]), out(1)].concat());
    let mut cpu = Cpu::new(&vm, 0);
    cpu.start(0x1000);
    let mut state = cpu.vcpu.lapic().unwrap();
    state.regs[0x352] |= 1;
    cpu.vcpu.set_lapic(&state).unwrap();
    cpu.page.write(run::REQUEST_INTERRUPT_WINDOW, &[1]);
    assert_eq!((cpu.run(), cpu.port()), (reason::IO, 1));
    assert_eq!(cpu.page.load(run::READY_FOR_INTERRUPT_INJECTION) & 1, 0);
}

#[test]
fn with_all_in_the_kernel_interrupts_come_from_there() {
    let vm = vm();
    vm.create_irqchip().unwrap();
    let mut cpu = Cpu::new(&vm, 0);
    assert_eq!(cpu.vcpu.interrupt(0x40), Err(Errno::ENXIO));
}

#[test]
fn the_bootstrap_processor_may_be_another() {
    let vm = vm();
    vm.create_irqchip().unwrap();
    vm.set_boot_vcpu(2).unwrap();
    let mut cpus: Vec<_> = (0..3).map(|id| Cpu::new(&vm, id)).collect();
    assert_eq!(vm.set_boot_vcpu(0), Err(Errno::EBUSY));
    let bsp = |cpu: &Cpu| cpu.vcpu.env.apic_base() & 0x100 != 0;
    assert_eq!(
        cpus.iter().map(bsp).collect::<Vec<_>>(),
        [false, false, true]
    );
    let state = |cpu: &mut Cpu| cpu.vcpu.mp_state().mp_state;
    assert_eq!(state(&mut cpus[0]), mp_state::UNINITIALIZED);
    assert_eq!(state(&mut cpus[2]), mp_state::RUNNABLE);
    // Nobody at all.
    let nobody = super::fake::vm();
    nobody.create_irqchip().unwrap();
    let max = u64::from(kvm_abi::cap::MAX_VCPU_ID);
    assert_eq!(nobody.set_boot_vcpu(max + 1), Err(Errno::EINVAL));
    assert_eq!(nobody.set_boot_vcpu(1 << 32), Err(Errno::EINVAL));
    nobody.set_boot_vcpu(max).unwrap();
    assert!(!bsp(&Cpu::new(&nobody, 0)));
}

#[test]
fn limits_of_vcpu_ids() {
    let vm = vm();
    let max = u64::from(kvm_abi::cap::MAX_VCPU_ID);
    assert_eq!(vm.set_max_vcpu_ids(max + 1), Err(Errno::EINVAL));
    vm.set_boot_vcpu(4).unwrap();
    assert_eq!(vm.set_max_vcpu_ids(3), Err(Errno::EINVAL));
    vm.set_max_vcpu_ids(4).unwrap();
    assert_eq!(vm.set_boot_vcpu(5), Err(Errno::EINVAL));
    vm.set_max_vcpu_ids(4).unwrap();
    assert_eq!(vm.set_max_vcpu_ids(3), Err(Errno::EINVAL));
    assert_eq!(Cpu::try_new(&vm, 4).map(|_| ()), Err(Errno::EINVAL));
    let _cpu = Cpu::new(&vm, 3);
    assert_eq!(Cpu::try_new(&vm, 3).map(|_| ()), Err(Errno::EEXIST));
    let late = super::fake::vm();
    let _cpu = Cpu::new(&late, kvm_abi::cap::MAX_VCPU_ID - 1);
    assert_eq!(late.set_max_vcpu_ids(4), Err(Errno::EINVAL));
    assert_eq!(
        Cpu::try_new(&late, kvm_abi::cap::MAX_VCPU_ID).map(|_| ()),
        Err(Errno::EINVAL)
    );
}

#[test]
fn wide_apic_ids() {
    let vm = vm();
    vm.create_irqchip().unwrap();
    vm.enable_x2apic_api(3).unwrap();
    let mut cpus: Vec<_> = [0, 1, 254].map(|id| Cpu::new(&vm, id)).into();
    for cpu in &mut cpus {
        let mut s = cpu.vcpu.sregs();
        s.apic_base |= 0xc00;
        cpu.vcpu.set_sregs(&s).unwrap();
        enable_lapic(cpu);
    }
    let state = cpus[2].vcpu.lapic().unwrap();
    assert_eq!(state.regs[0x20..0x24], 254u32.to_le_bytes());
    assert_eq!(cpus[1].vcpu.set_lapic(&state), Err(Errno::EINVAL));
    let msi = |dest: u32| kvm_msi {
        address_lo: 0xfee0_0000 | (dest & 0xff) << 12,
        address_hi: dest & 0xffff_ff00,
        data: 0x50,
        ..Default::default()
    };
    assert_eq!(vm.signal_msi(&msi(254)), Ok(1));
    // Without the quirk 255 is an id as any other.
    assert_eq!(vm.signal_msi(&msi(255)), Ok(0));
    assert_eq!(vm.signal_msi(&msi(0xffff_ffff)), Ok(3));
    assert_eq!(vm.signal_msi(&msi(0x101)), Ok(0));
}

#[test]
fn the_broadcast_quirk() {
    let vm = vm();
    vm.create_irqchip().unwrap();
    let mut cpus: Vec<_> = [0, 1].map(|id| Cpu::new(&vm, id)).into();
    for cpu in &mut cpus {
        let mut s = cpu.vcpu.sregs();
        s.apic_base |= 0xc00;
        cpu.vcpu.set_sregs(&s).unwrap();
        enable_lapic(cpu);
    }
    let msi = kvm_msi {
        address_lo: 0xfeef_f000,
        data: 0x50,
        ..Default::default()
    };
    assert_eq!(vm.signal_msi(&msi), Ok(2));
}

#[test]
fn line_status() {
    let vm = vm();
    assert_eq!(vm.set_irq_line(1, true), Err(Errno::ENXIO));
    vm.create_irqchip().unwrap();
    let mut cpu = Cpu::new(&vm, 0);
    enable_lapic(&mut cpu);
    assert_eq!(vm.set_irq_line(4000, true), Ok(-1), "leads nowhere");
    vm.set_gsi_routing(&[msi_route(7, 0x50, false)]).unwrap();
    assert_eq!(vm.set_irq_line(7, true), Ok(1));
    assert_eq!(vm.set_irq_line(7, true), Ok(1), "an MSI is never coalesced");
    assert_eq!(vm.set_irq_line(7, false), Ok(-1));
}

#[test]
fn several_resamplers_of_one_line() {
    let vm = vm();
    let (a, b) = (Count::new(1), Count::new(2));
    assert_eq!(vm.add_resampler(9, a.clone()), Err(Errno::ENXIO));
    vm.create_irqchip().unwrap();
    vm.add_resampler(9, a.clone()).unwrap();
    vm.add_resampler(9, b.clone()).unwrap();
    // Pin 9: level-triggered, vector 0x60.
    let mut chip = vm.get_irqchip(2).unwrap();
    if let crate::vm::ChipState::Ioapic(ioapic) = &mut chip {
        ioapic.redirtbl[9] = 0x8060;
    }
    vm.set_irqchip(2, &chip).unwrap();
    let mut cpu = Cpu::new(&vm, 0);
    enable_lapic(&mut cpu);
    let lapic = |f: &mut dyn FnMut(&mut irqchip::Lapic)| {
        f(&mut cpu.vcpu.env.shared.lapic().unwrap().lock());
    };
    let pending = || {
        let mut found = None;
        lapic(&mut |l| found = l.highest_pending());
        found
    };
    let end = || {
        let mut eoi = None;
        lapic(&mut |l| {
            l.ack();
            eoi = l.eoi();
        });
        assert!(!vm.eoi(eoi.unwrap(), 0));
    };
    vm.irqfd(9, true);
    assert_eq!(pending(), Some(0x60));
    end();
    assert_eq!((a.get(), b.get()), (1, 1));
    assert_eq!(pending(), None, "the line went low");
    // One of them still has a reason.
    vm.irqfd(9, true);
    assert_eq!(pending(), Some(0x60));
    vm.remove_resampler(9, 1);
    end();
    assert_eq!((a.get(), b.get()), (1, 2));
    assert_eq!(Arc::strong_count(&a), 1);
    // The last one takes its level with it.
    vm.irqfd(9, true);
    vm.remove_resampler(9, 2);
    end();
    assert_eq!(pending(), None);
}

#[test]
fn the_first_version_of_the_pits_state() {
    let vm = vm();
    assert_eq!(vm.get_pit_channels(), Err(Errno::ENXIO));
    assert_eq!(
        vm.set_pit_channels(&kvm_pit_state::default()),
        Err(Errno::ENXIO)
    );
    vm.create_irqchip().unwrap();
    vm.create_pit(0).unwrap();
    let mut state = vm.get_pit().unwrap();
    state.flags = 1;
    state.channels[1].count = 0x1234;
    vm.set_pit(&state).unwrap();
    let mut channels = vm.get_pit_channels().unwrap();
    assert_eq!(channels.channels[1].count, 0x1234);
    channels.channels[2].count = 0x99;
    vm.set_pit_channels(&channels).unwrap();
    let state = vm.get_pit().unwrap();
    assert_eq!((state.channels[2].count, state.flags), (0x99, 1));
}
