//! KVM's calls as a hostile VMM makes them: any order, any arguments, any register state, and then
//! a run.
#![expect(unsafe_code, reason = "fills structures that are made of integers")]

use crate::input::{Input, Random, within};
use crate::machine::Memory;
use crate::programs::programs;
use home_user::{EngineKind, IoEventAddress, NoDatamatch, System, Vcpu, VcpuExit, Vm};
use kvm_bindings::*;
use std::time::Duration;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Bytes of guest memory.
const MEMORY: usize = 1 << 20;
const ENTRY: u64 = 0x1000;

struct Guest {
    // Dropped in this order.
    vcpus: Vec<Vcpu>,
    vm: Vm,
    memory: Memory,
    system: System,
    event: EventFd,
}

/// A VM, and then a call for each few bytes.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let options = input.u8();
    let engine = if options & 1 == 0 {
        EngineKind::Jit
    } else {
        EngineKind::Interp
    };
    let system = System::new(engine).expect("no engine");
    let vm = system.create_vm().expect("no VM");
    let event = EventFd::new(EFD_NONBLOCK).expect("no event descriptor");
    let memory = Memory::new(MEMORY);
    let len = usize::from(input.u16());
    memory.write(ENTRY, input.bytes(len));
    let mut guest = Guest {
        vcpus: Vec::new(),
        vm,
        memory,
        system,
        event,
    };
    if options & 2 != 0 {
        let _ = guest.vm.create_irq_chip();
        let _ = guest.vm.create_pit2(kvm_pit_config::default());
    }
    guest.slot(0, 0, 0, 0, MEMORY as u64);
    guest.add_vcpu(0);
    if options & 4 != 0 {
        guest.add_vcpu(1);
    }
    let mut runs = 0;
    while !input.is_empty() && runs < 4 {
        match input.below(8) {
            0..5 => {
                let n = input.below(guest.vcpus.len());
                if let Some(vcpu) = guest.vcpus.get_mut(n) {
                    vcpu_call(vcpu, &guest.system, &mut input);
                }
            }
            5 => {
                let n = input.below(guest.vcpus.len());
                if let Some(vcpu) = guest.vcpus.get_mut(n) {
                    enter(vcpu, &mut input);
                    runs += 1;
                }
            }
            _ => guest.vm_call(&mut input),
        }
    }
    if let Some(vcpu) = guest.vcpus.first_mut() {
        enter(vcpu, &mut Input::new(&[]));
    }
}

/// `value` with bytes changed as the input says.
fn disturb<T>(value: &mut T, input: &mut Input<'_>) {
    // SAFETY: used for KVM's structures only, which are made of integers, so that any bytes are a
    // value; the slice covers the value and nothing else.
    let bytes =
        unsafe { core::slice::from_raw_parts_mut((&raw mut *value).cast::<u8>(), size_of::<T>()) };
    input.disturb(bytes);
}

fn disturbed<T>(mut value: T, input: &mut Input<'_>) -> T {
    disturb(&mut value, input);
    value
}

impl Guest {
    fn slot(&self, slot: u32, flags: u32, gpa: u64, at: u64, size: u64) {
        let at = at % MEMORY as u64;
        // SAFETY: the slot covers a part of `memory`, or has a size that is refused; the memory
        // outlives VM and vCPUs.
        let _ = unsafe {
            self.vm.set_user_memory_region(kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: gpa,
                memory_size: size.min(MEMORY as u64 - at),
                userspace_addr: self.memory.start() as u64 + at,
            })
        };
    }

    fn add_vcpu(&mut self, id: u64) {
        if self.vcpus.len() >= 3 {
            return;
        }
        let Ok(vcpu) = self.vm.create_vcpu(id) else {
            return;
        };
        if let Ok(cpuid) = self.system.get_supported_cpuid(256) {
            let _ = vcpu.set_cpuid2(&cpuid);
        }
        if let (Ok(mut sregs), Ok(mut regs)) = (vcpu.get_sregs(), vcpu.get_regs()) {
            sregs.cs.base = 0;
            sregs.cs.selector = 0;
            regs.rip = ENTRY;
            regs.rsp = 0x8000;
            let _ = (vcpu.set_sregs(&sregs), vcpu.set_regs(&regs));
        }
        self.vcpus.push(vcpu);
    }

    fn vm_call(&mut self, input: &mut Input<'_>) {
        let vm = &self.vm;
        match input.below(22) {
            0 | 1 => {
                let (slot, flags) = (u32::from(input.u8() & 3), input.u32() & 0x1f);
                let (gpa, at, size) = (input.value(), input.value() << 12, input.value() << 12);
                self.slot(slot, flags, gpa, at, size);
            }
            2 => self.slot(
                input.u32(),
                input.u32(),
                input.value(),
                input.value(),
                input.value(),
            ),
            3 => drop(vm.create_irq_chip()),
            4 => drop(vm.create_pit2(disturbed(kvm_pit_config::default(), input))),
            5 => {
                let mut chip = kvm_irqchip {
                    chip_id: u32::from(input.u8() & 3),
                    ..Default::default()
                };
                if vm.get_irqchip(&mut chip).is_ok() {
                    disturb(&mut chip, input);
                    let _ = vm.set_irqchip(&chip);
                }
            }
            6 => {
                let state = vm.get_pit2().unwrap_or_default();
                let _ = vm.set_pit2(&disturbed(state, input));
            }
            7 => {
                let clock = vm.get_clock().unwrap_or_default();
                let _ = vm.set_clock(&disturbed(clock, input));
            }
            8 => {
                let msi = kvm_msi {
                    address_lo: 0xfee0_0000 | input.u32() & 0xf_ffff,
                    data: input.value() as u32,
                    ..Default::default()
                };
                let _ = vm.signal_msi(disturbed(msi, input));
            }
            9 => {
                let entries: Vec<_> = (0..input.below(6))
                    .map(|_| {
                        let mut entry = kvm_irq_routing_entry {
                            gsi: u32::from(input.u8()),
                            type_: u32::from(input.u8() & 3),
                            ..Default::default()
                        };
                        disturb(&mut entry, input);
                        entry
                    })
                    .collect();
                if let Ok(routing) = KvmIrqRouting::from_entries(&entries) {
                    let _ = vm.set_gsi_routing(&routing);
                }
            }
            10 | 11 => drop(vm.set_irq_line(input.value() as u32, input.flag())),
            12 => {
                let at = address(input);
                let _ = match input.below(4) {
                    0 => vm.register_ioevent(&self.event, &at, NoDatamatch),
                    1 => vm.register_ioevent(&self.event, &at, input.u8()),
                    2 => vm.register_ioevent(&self.event, &at, input.u32()),
                    _ => vm.register_ioevent(&self.event, &at, input.u64()),
                };
            }
            13 => drop(vm.unregister_ioevent(&self.event, &address(input), NoDatamatch)),
            14 => drop(vm.register_irqfd(&self.event, input.value() as u32)),
            15 => drop(vm.unregister_irqfd(&self.event, input.value() as u32)),
            16 => drop(vm.get_dirty_log(u32::from(input.u8() & 3), input.value() as usize >> 8)),
            17 => {
                let bitmap: Vec<_> = (0..input.below(8)).map(|_| input.value()).collect();
                let slot = u32::from(input.u8() & 3);
                let _ = vm.clear_dirty_log(slot, input.value(), input.value() as u32, &bitmap);
            }
            18 => {
                let cap = kvm_enable_cap {
                    cap: input.value() as u32,
                    args: [input.value(), 0, 0, 0],
                    ..Default::default()
                };
                let _ = vm.enable_cap(&disturbed(cap, input));
            }
            19 => {
                let _ = vm.set_tss_address(input.value() as usize);
                let _ = vm.set_identity_map_address(input.value());
                let _ = vm.check_extension_int(input.value() as u32);
            }
            20 => self.memory.write(input.value(), &input.array::<16>()),
            _ => self.add_vcpu(input.value()),
        }
    }
}

fn address(input: &mut Input<'_>) -> IoEventAddress {
    if input.flag() {
        IoEventAddress::Pio(input.value())
    } else {
        IoEventAddress::Mmio(input.value())
    }
}

fn vcpu_call(vcpu: &mut Vcpu, system: &System, input: &mut Input<'_>) {
    macro_rules! change {
        ($get:ident, $set:ident) => {
            if let Ok(mut state) = vcpu.$get() {
                disturb(&mut state, input);
                let _ = vcpu.$set(&state);
                let _ = vcpu.$get();
            }
        };
    }
    match input.below(24) {
        0..3 => {
            if let Ok(mut sregs) = vcpu.get_sregs() {
                for _ in 0..input.below(6) {
                    sreg(&mut sregs, input);
                }
                let _ = vcpu.set_sregs(&sregs);
            }
        }
        3 => change!(get_sregs, set_sregs),
        4 => {
            if let Ok(mut regs) = vcpu.get_regs() {
                for _ in 0..input.below(5) {
                    match input.below(6) {
                        0 => regs.rip = input.value(),
                        1 => regs.rflags = input.value(),
                        2 => regs.rsp = input.value(),
                        3 => regs.rax = input.value(),
                        4 => regs.rcx = input.value(),
                        _ => regs.rdx = input.value(),
                    }
                }
                let _ = vcpu.set_regs(&regs);
            }
        }
        5 => change!(get_regs, set_regs),
        6 => change!(get_fpu, set_fpu),
        7 => change!(get_xsave, set_xsave),
        8 => change!(get_xcrs, set_xcrs),
        9 => change!(get_lapic, set_lapic),
        10 => change!(get_vcpu_events, set_vcpu_events),
        11 => change!(get_debug_regs, set_debug_regs),
        12 => {
            let state = kvm_mp_state {
                mp_state: u32::from(input.u8() & 15),
            };
            let _ = vcpu.set_mp_state(disturbed(state, input));
            let _ = vcpu.get_mp_state();
        }
        13 => {
            let debug = kvm_guest_debug {
                control: input.u32() & 0x3f_001f,
                ..Default::default()
            };
            let _ = vcpu.set_guest_debug(&disturbed(debug, input));
        }
        14 | 15 => msrs(vcpu, system, input),
        16 => cpuid(vcpu, input),
        17 => drop(vcpu.translate_gva(input.value())),
        18 => drop(vcpu.interrupt(input.value() as u32)),
        19 => drop(vcpu.nmi()),
        20 => {
            let _ = vcpu.set_tsc_khz(input.value() as u32);
            let _ = vcpu.kvmclock_ctrl();
        }
        21 => {
            vcpu.set_kvm_request_interrupt_window(input.u8());
            vcpu.set_kvm_immediate_exit(input.u8());
        }
        22 => disturb(vcpu.get_kvm_run(), input),
        _ => long_mode(vcpu),
    }
}

/// Changes one field of the special registers.
fn sreg(sregs: &mut kvm_sregs, input: &mut Input<'_>) {
    let segment = |sregs: &mut kvm_sregs, input: &mut Input<'_>| {
        let segment = match input.below(8) {
            0 => &mut sregs.cs,
            1 => &mut sregs.ss,
            2 => &mut sregs.ds,
            3 => &mut sregs.es,
            4 => &mut sregs.fs,
            5 => &mut sregs.gs,
            6 => &mut sregs.tr,
            _ => &mut sregs.ldt,
        };
        match input.below(6) {
            0 => segment.base = input.value(),
            1 => segment.limit = input.value() as u32,
            2 => (segment.type_, segment.s) = (input.u8() & 15, input.u8() & 1),
            3 => (segment.l, segment.db) = (input.u8() & 1, input.u8() & 1),
            4 => (segment.dpl, segment.present) = (input.u8() & 3, input.u8() & 1),
            _ => (segment.selector, segment.unusable) = (input.u16(), input.u8() & 1),
        }
    };
    match input.below(10) {
        0 => sregs.cr0 ^= 1 << (input.u8() & 31),
        1 => sregs.cr4 ^= 1 << (input.u8() & 31),
        2 => sregs.efer ^= [1, 0x100, 0x400, 0x800][input.below(4)],
        3 => sregs.cr3 = input.value(),
        4 => (sregs.gdt.base, sregs.gdt.limit) = (input.value(), input.u16()),
        5 => (sregs.idt.base, sregs.idt.limit) = (input.value(), input.u16()),
        6 => sregs.apic_base = input.value(),
        7 => sregs.cr8 = input.value(),
        _ => segment(sregs, input),
    }
}

fn msrs(vcpu: &Vcpu, system: &System, input: &mut Input<'_>) {
    let listed = system.get_msr_index_list().expect("the list of MSRs");
    let entries: Vec<_> = (0..1 + input.below(4))
        .map(|_| kvm_msr_entry {
            index: match input.below(4) {
                0 => input.value() as u32,
                _ => input.pick(listed.as_slice()),
            },
            data: input.value(),
            ..Default::default()
        })
        .collect();
    if let Ok(mut msrs) = Msrs::from_entries(&entries) {
        let _ = vcpu.set_msrs(&msrs);
        let _ = vcpu.get_msrs(&mut msrs);
    }
}

fn cpuid(vcpu: &Vcpu, input: &mut Input<'_>) {
    let Ok(cpuid) = vcpu.get_cpuid2(256) else {
        return;
    };
    let mut entries = cpuid.as_slice().to_vec();
    for _ in 0..input.below(4) {
        let n = input.below(entries.len());
        match entries.get_mut(n) {
            Some(entry) => disturb(entry, input),
            None => entries.push(disturbed(kvm_cpuid_entry2::default(), input)),
        }
    }
    if let Ok(cpuid) = CpuId::from_entries(&entries) {
        let _ = vcpu.set_cpuid2(&cpuid);
    }
}

/// 64-bit mode with page tables that are whatever the memory holds.
fn long_mode(vcpu: &Vcpu) {
    let Ok(mut s) = vcpu.get_sregs() else { return };
    (s.cr0, s.cr3, s.cr4, s.efer) = (0x8005_0033, 0x2000, 0x620, 0xd01);
    for segment in [&mut s.cs, &mut s.ss, &mut s.ds, &mut s.es] {
        (segment.base, segment.limit, segment.g) = (0, u32::MAX, 1);
        (segment.type_, segment.s, segment.present, segment.db) = (3, 1, 1, 1);
        segment.selector = 0x10;
    }
    (s.cs.type_, s.cs.l, s.cs.db, s.cs.selector) = (11, 1, 0, 8);
    let _ = vcpu.set_sregs(&s);
}

/// Runs for a moment, and answers what the guest asks for.
fn enter(vcpu: &mut Vcpu, input: &mut Input<'_>) {
    let kicker = vcpu.kicker();
    within(
        Duration::from_millis(3),
        || kicker.kick(),
        || {
            for _ in 0..8 {
                match vcpu.run() {
                    Ok(VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data)) => {
                        data.fill_with(|| input.u8());
                    }
                    Ok(VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..)) => {
                        if input.u8() == 0xf7 {
                            disturb(vcpu.get_kvm_run(), input);
                        }
                    }
                    Ok(VcpuExit::Debug(_) | VcpuExit::IrqWindowOpen) => {}
                    _ => return,
                }
            }
        },
    );
}

/// Programs, then random calls.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut random = Random(11);
    let mut all = Vec::new();
    for program in programs() {
        for options in 0..8u8 {
            let mut seed = vec![options];
            seed.extend_from_slice(&(program.len() as u16).to_le_bytes());
            seed.extend_from_slice(&program);
            if options & 2 == 0 {
                // Page tables of one identity-mapped GiB, and long mode.
                for (at, entry) in [(0x2000u64, 0x3007u64), (0x3000, 0x87)] {
                    seed.extend_from_slice(&[7, 20, 0xb0]);
                    seed.extend_from_slice(&(at as u16).to_le_bytes());
                    seed.extend_from_slice(&entry.to_le_bytes());
                    seed.extend_from_slice(&[0; 8]);
                }
                seed.extend_from_slice(&[0, 0, 23, 5, 0]);
            }
            seed.extend(random.bytes(120));
            all.push(seed);
        }
    }
    all
}
