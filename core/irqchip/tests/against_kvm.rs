//! The same random states and interrupts given to `/dev/kvm`'s irqchip and to this one: what
//! `KVM_GET_LAPIC` and `KVM_GET_IRQCHIP` say afterwards must be equal. No guest runs.
#![expect(unsafe_code, reason = "kvm_irqchip is a C union")]

use irqchip::*;
use kvm_bindings::*;
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

const VCPUS: usize = 4;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 32) % n
    }
}

struct Oracle {
    vm: VmFd,
    vcpus: Vec<VcpuFd>,
}

fn oracle() -> Option<Oracle> {
    let open = || -> Result<Oracle, kvm_ioctls::Error> {
        let kvm = Kvm::new()?;
        let vm = kvm.create_vm()?;
        vm.create_irq_chip()?;
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
        let vcpus = (0..VCPUS as u64)
            .map(|id| {
                let vcpu = vm.create_vcpu(id)?;
                vcpu.set_cpuid2(&cpuid)?;
                Ok(vcpu)
            })
            .collect::<Result<_, kvm_ioctls::Error>>()?;
        Ok(Oracle { vm, vcpus })
    };
    match open() {
        Ok(oracle) => Some(oracle),
        Err(error) => {
            eprintln!("SKIPPED: no /dev/kvm with an irqchip to compare with: {error}");
            None
        }
    }
}

impl Oracle {
    fn chip(&self, id: u32) -> [u8; 512] {
        let mut chip = kvm_irqchip {
            chip_id: id,
            ..Default::default()
        };
        self.vm.get_irqchip(&mut chip).unwrap();
        // SAFETY: every bit pattern is a valid array of bytes.
        unsafe { chip.chip.dummy }.map(|byte| byte as u8)
    }

    fn set_chip(&self, id: u32, bytes: &[u8]) {
        let mut dummy = [0; 512];
        for (to, from) in dummy.iter_mut().zip(bytes) {
            *to = *from as _;
        }
        let chip = kvm_irqchip {
            chip_id: id,
            pad: 0,
            chip: kvm_irqchip__bindgen_ty_1 { dummy },
        };
        self.vm.set_irqchip(&chip).unwrap();
    }

    fn lapic(&self, index: usize) -> [u8; LAPIC_STATE_SIZE] {
        self.vcpus[index]
            .get_lapic()
            .unwrap()
            .regs
            .map(|byte| byte as u8)
    }

    fn set_lapic(&self, index: usize, page: &[u8; LAPIC_STATE_SIZE]) {
        let regs = page.map(|byte| byte as _);
        self.vcpus[index]
            .set_lapic(&kvm_lapic_state { regs })
            .unwrap();
    }
}

fn ioapic_bytes(state: &IoapicState) -> Vec<u8> {
    let mut bytes = state.base_address.to_le_bytes().to_vec();
    for word in [state.ioregsel, state.id, state.irr, 0] {
        bytes.extend(word.to_le_bytes());
    }
    for entry in state.redirtbl {
        bytes.extend(entry.to_le_bytes());
    }
    bytes
}

fn pic_bytes(s: &PicState) -> [u8; 16] {
    [
        s.last_irr,
        s.irr,
        s.imr,
        s.isr,
        s.priority_add,
        s.irq_base,
        s.read_reg_select,
        s.poll,
        s.special_mask,
        s.init_state,
        s.auto_eoi,
        s.rotate_on_auto_eoi,
        s.special_fully_nested_mode,
        s.init4,
        s.elcr,
        s.elcr_mask,
    ]
}

fn put(page: &mut [u8; LAPIC_STATE_SIZE], offset: usize, value: u32) {
    page[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

fn first_difference(ours: &[u8], kvm: &[u8]) -> Option<String> {
    let at = ours.iter().zip(kvm).position(|(a, b)| a != b)? & !3;
    Some(format!(
        "at {at:#x}: ours {:02x?}, KVM {:02x?}",
        &ours[at..at + 4],
        &kvm[at..at + 4]
    ))
}

/// Ours, driven as `kvm_core` does.
struct Model {
    apics: Vec<Lapic>,
    ioapic: Ioapic,
    pic: Pic,
    routes: RoutingTable,
    /// Pins whose level interrupt found nobody. Whether KVM then sets remote IRR depends on which
    /// of its delivery paths ran; ours does not.
    unheard: u32,
}

impl Model {
    fn new() -> Self {
        let config = |id| LapicConfig::new(id, id == 0);
        Self {
            apics: (0..VCPUS as u32).map(|id| Lapic::new(config(id))).collect(),
            ioapic: Ioapic::new(),
            pic: Pic::new(),
            routes: RoutingTable::x86_default().unwrap(),
            unheard: 0,
        }
    }

    fn deliver(apics: &mut [Lapic], message: &ApicMessage) -> bool {
        let snapshots: Vec<_> = apics.iter().map(Lapic::destination).enumerate().collect();
        let mut accepted = false;
        let policy = DeliveryPolicy::default();
        for_each_target(message, None, policy, snapshots.iter().copied(), |key| {
            accepted |= apics[key].accept_message(message).is_accepted();
        });
        accepted
    }

    fn set_irq(&mut self, gsi: u32, level: bool) {
        for route in self.routes.lookup(gsi) {
            match route.target {
                RouteTarget::Pic(line) => {
                    self.pic.set_irq(line, IrqSource::Userspace, level);
                }
                RouteTarget::Ioapic(pin) => {
                    let outcome = self.ioapic.set_irq(pin, IrqSource::Userspace, level);
                    if let Some(message) = outcome.message()
                        && !Self::deliver(&mut self.apics, &message)
                    {
                        self.ioapic.not_accepted(pin);
                        self.unheard |= 1 << pin;
                    }
                }
                _ => {}
            }
        }
    }
}

#[test]
fn reset_states() {
    let Some(oracle) = oracle() else { return };
    let model = Model::new();
    for (i, apic) in model.apics.iter().enumerate() {
        let ours = apic.save(false, Now::default());
        assert_eq!(first_difference(&ours, &oracle.lapic(i)), None, "vCPU {i}");
    }
    let ours = ioapic_bytes(&model.ioapic.state());
    assert_eq!(
        first_difference(&ours, &oracle.chip(KVM_IRQCHIP_IOAPIC)),
        None
    );
    for (id, state) in (0..).zip(model.pic.state()) {
        assert_eq!(pic_bytes(&state), oracle.chip(id)[..16], "PIC {id}");
    }
}

fn random_apics(random: &mut Random, oracle: &Oracle, model: &mut Model, x2apic: bool) {
    let cluster = random.below(2) == 0;
    let one_hot = random.below(2) == 0;
    for (i, apic) in model.apics.iter_mut().enumerate() {
        let mut sregs = oracle.vcpus[i].get_sregs().unwrap();
        let mode = if x2apic && random.below(4) != 0 {
            0xc00
        } else {
            0x800
        };
        sregs.apic_base = sregs.apic_base & !0xc00 | mode;
        oracle.vcpus[i].set_sregs(&sregs).unwrap();
        apic.set_base(sregs.apic_base, true).unwrap();
        let mut page = Lapic::new(*apic.config()).save(false, Now::default());
        // KVM's hash may pick a software-disabled APIC, too, and drop the interrupt, when it
        // finds its candidates by the map of one-hot logical IDs.
        let disabled = !one_hot && !x2apic && random.below(8) == 0;
        put(&mut page, 0xf0, 0xff | u32::from(!disabled) << 8);
        let ldr = if one_hot {
            1 << (24 + i)
        } else {
            random.next() as u32 & 0xff00_0000
        };
        put(&mut page, 0xd0, ldr);
        put(
            &mut page,
            0xe0,
            if cluster { 0x0fff_ffff } else { u32::MAX },
        );
        put(&mut page, 0x80, random.below(256) as u32);
        put(
            &mut page,
            0x100 + 0x10 * random.below(8) as usize,
            random.next() as u32,
        );
        oracle.set_lapic(i, &page);
        apic.restore(&page, false, Now::default()).unwrap();
    }
}

/// A redirection entry whose delivery changes nothing but IRR and TMR.
fn random_entry(random: &mut Random) -> u64 {
    let vector = 0x10 + random.below(0xf0);
    let dest = match random.below(3) {
        0 => random.below(VCPUS as u64 + 1),
        1 => 0xff,
        _ => random.below(256),
    };
    let (lowest, logical) = (random.below(2), random.below(2));
    // KVM's vector hash counts the logical IDs in a destination that no vCPU has and then drops
    // the interrupt; ours does not, so name none of those.
    let dest = if lowest & logical != 0 && dest != 0xff {
        dest & 0xf
    } else {
        dest
    };
    let bits = vector | lowest << 8 | logical << 11 | random.below(2) << 15;
    bits | u64::from(random.below(8) == 0) << 16 | dest << 56
}

fn compare(oracle: &Oracle, model: &Model, what: &str) {
    for (i, apic) in model.apics.iter().enumerate() {
        let mut ours = apic.save(false, Now::default());
        let mut kvm = oracle.lapic(i);
        // PPR is derived, and KVM brings it up to date only when it looks at it.
        put(&mut ours, 0xa0, 0);
        put(&mut kvm, 0xa0, 0);
        assert_eq!(first_difference(&ours, &kvm), None, "LAPIC {i}, {what}");
    }
    let ours = ioapic_bytes(&model.ioapic.state());
    let mut kvm = oracle.chip(KVM_IRQCHIP_IOAPIC);
    for pin in (0..24).filter(|pin| model.unheard & (1 << pin) != 0) {
        kvm[24 + 8 * pin + 1] &= !0x40;
    }
    assert_eq!(first_difference(&ours, &kvm), None, "IOAPIC, {what}");
    for (id, state) in (0..).zip(model.pic.state()) {
        assert_eq!(pic_bytes(&state), oracle.chip(id)[..16], "PIC {id}, {what}");
    }
}

#[test]
fn lines_and_messages() {
    let Some(oracle) = oracle() else { return };
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut model = Model::new();
    for round in 0..300 {
        let x2apic = round % 2 == 1;
        model.unheard = 0;
        for gsi in 0..24 {
            oracle.vm.set_irq_line(gsi, false).unwrap();
            model.set_irq(gsi, false);
        }
        random_apics(&mut random, &oracle, &mut model, x2apic);
        let state = IoapicState {
            base_address: ioapic::DEFAULT_BASE,
            ioregsel: random.below(0x40) as u32,
            id: random.below(16) as u32,
            irr: 0,
            redirtbl: core::array::from_fn(|_| random_entry(&mut random)),
        };
        oracle.set_chip(KVM_IRQCHIP_IOAPIC, &ioapic_bytes(&state));
        model.ioapic.set_state(&state, |_, _| {});
        for (id, elcr_mask) in [(0, 0xf8), (1, 0xde)] {
            let mut byte = || random.next() as u8;
            let state = PicState {
                imr: byte(),
                isr: byte() & byte() & byte(),
                priority_add: byte() & 7,
                irq_base: byte() & 0xf8,
                elcr: byte() & elcr_mask,
                elcr_mask,
                ..Default::default()
            };
            oracle.set_chip(id, &pic_bytes(&state));
            if id == 0 {
                model.pic.set_master(&state);
            } else {
                model.pic.set_slave(&state);
            }
        }
        compare(&oracle, &model, &format!("round {round}"));
        for step in 0..40 {
            let what = if random.below(3) == 0 {
                let entry = random_entry(&mut random);
                // The redirection hint only where it chooses among the vCPUs there are.
                let hint = random.below(2) * u64::from(entry >> 56 < 0x10);
                let address =
                    0xfee0_0000 | (entry >> 56) << 12 | hint << 3 | (entry >> 11 & 1) << 2;
                let msi = Msi {
                    address,
                    data: entry as u32 & 0x81ff,
                };
                let raw = kvm_msi {
                    address_lo: msi.address as u32,
                    address_hi: (msi.address >> 32) as u32,
                    data: msi.data,
                    ..Default::default()
                };
                // An MSI that reaches nobody is an error to KVM, and no change.
                let _ = oracle.vm.signal_msi(raw);
                Model::deliver(&mut model.apics, &msi.message(false));
                format!("{msi:x?}")
            } else {
                let (gsi, level) = (random.below(24) as u32, random.below(2) == 0);
                oracle.vm.set_irq_line(gsi, level).unwrap();
                model.set_irq(gsi, level);
                format!(
                    "GSI {gsi} {level}, entry {:x}",
                    state.redirtbl[gsi as usize]
                )
            };
            compare(&oracle, &model, &format!("round {round}.{step}, {what}"));
        }
    }
}

#[test]
fn lapic_states_survive_a_round_trip_alike() {
    let Some(oracle) = oracle() else { return };
    let mut random = Random(0x2545_f491_4f6c_dd1d);
    let mut model = Model::new();
    for round in 0..200 {
        random_apics(&mut random, &oracle, &mut model, round % 2 == 1);
        for (i, apic) in model.apics.iter_mut().enumerate() {
            let mut page = [0; LAPIC_STATE_SIZE];
            page.fill_with(|| random.next() as u8);
            // The timer stands still, and the bytes between registers are not state.
            for (offset, byte) in page.iter_mut().enumerate() {
                if offset & 0xf > 3 || (0x380..0x3a0).contains(&offset) {
                    *byte = 0;
                }
            }
            put(&mut page, 0xa0, 0);
            oracle.set_lapic(i, &page);
            apic.restore(&page, false, Now::default()).unwrap();
            let mut ours = apic.save(false, Now::default());
            let mut kvm = oracle.lapic(i);
            for page in [&mut ours, &mut kvm] {
                put(page, 0xa0, 0);
                // KVM keeps the upper half of an x2APIC ICR here as well.
                put(page, 0x304, 0);
            }
            assert_eq!(
                first_difference(&ours, &kvm),
                None,
                "LAPIC {i}, round {round}"
            );
        }
    }
}

#[test]
fn pit_states() {
    let Some(oracle) = oracle() else { return };
    oracle.vm.create_pit2(kvm_pit_config::default()).unwrap();
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut pit = Pit::new();
    for round in 0..100 {
        let kvm = oracle.vm.get_pit2().unwrap();
        let ours = pit.state();
        assert_eq!(ours.flags, kvm.flags, "round {round}");
        for (a, b) in ours.channels.iter().zip(&kvm.channels) {
            let fields = [a.latched_count.into(), a.count];
            assert_eq!(fields, [b.latched_count.into(), b.count], "round {round}");
            let ours = [
                a.count_latched,
                a.status_latched,
                a.status,
                a.read_state,
                a.write_state,
            ];
            let kvm = [
                b.count_latched,
                b.status_latched,
                b.status,
                b.read_state,
                b.write_state,
            ];
            assert_eq!(ours, kvm, "round {round}");
            let ours = [a.write_latch, a.rw_mode, a.mode, a.bcd, a.gate];
            assert_eq!(
                ours,
                [b.write_latch, b.rw_mode, b.mode, b.bcd, b.gate],
                "round {round}"
            );
        }
        let mut byte = |n| random.below(n) as u8;
        let channels = core::array::from_fn(|_| PitChannelState {
            count: u32::from(byte(255)) * 257 + 1,
            latched_count: byte(256).into(),
            count_latched: byte(4),
            status_latched: byte(2),
            status: byte(256),
            read_state: byte(5),
            write_state: byte(5),
            write_latch: byte(256),
            rw_mode: byte(4),
            mode: byte(6),
            bcd: byte(2),
            gate: byte(2),
            count_load_time: 0,
        });
        let state = PitState {
            channels,
            flags: pit::FLAG_HPET_LEGACY,
        };
        pit.set_state(&state, 0);
        let mut raw = kvm_pit_state2 {
            flags: state.flags,
            ..Default::default()
        };
        for (to, from) in raw.channels.iter_mut().zip(state.channels) {
            to.count = from.count;
            to.latched_count = from.latched_count;
            to.count_latched = from.count_latched;
            to.status_latched = from.status_latched;
            to.status = from.status;
            to.read_state = from.read_state;
            to.write_state = from.write_state;
            to.write_latch = from.write_latch;
            to.rw_mode = from.rw_mode;
            to.mode = from.mode;
            to.bcd = from.bcd;
            to.gate = from.gate;
        }
        oracle.vm.set_pit2(&raw).unwrap();
    }
}
