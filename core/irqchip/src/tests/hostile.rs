//! Deterministic random input: no panic, no overflow (overflow checks are on in tests), no hang.

use crate::*;

/// xorshift64*.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Small values, powers of two and full-width ones.
    fn value(&mut self) -> u64 {
        let bits = self.next();
        match bits & 3 {
            0 => bits >> 2 & 0x1f,
            1 => 1 << (bits >> 2 & 63),
            2 => u64::MAX << (bits >> 2 & 63),
            _ => self.next(),
        }
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        bytes.fill_with(|| self.next() as u8);
    }
}

fn is_send<T: Send>() {}

#[test]
fn types_are_send() {
    is_send::<Lapic>();
    is_send::<Ioapic>();
    is_send::<Pic>();
    is_send::<Pit>();
    is_send::<RoutingTable>();
}

#[test]
fn lapic() {
    let mut random = Random(0x1234_5678_9abc_def1);
    let mut apics: [_; 4] =
        core::array::from_fn(|i| Lapic::new(LapicConfig::new(i as u32, i == 0)));
    let mut now = Now::default();
    for step in 0..400_000 {
        now.ns = now.ns.saturating_add(random.value() >> random.below(64));
        now.tsc = now.tsc.saturating_add(random.value() >> random.below(64));
        if step % 1000 == 0 {
            now = Now {
                ns: random.value(),
                tsc: random.value(),
            };
        }
        let index = random.below(4) as usize;
        let apic = &mut apics[index];
        let mut effect = Effect::None;
        match random.below(16) {
            0..4 => {
                let size = random.below(9) as usize;
                effect = apic.mmio_write(random.value(), size, random.value() as u32, now);
            }
            4..7 => {
                let offset = random.below(64) * 16;
                effect = apic.mmio_write(offset, 4, random.value() as u32, now);
            }
            7..9 => {
                let msr = 0x800 + random.below(0x40) as u32;
                effect = apic
                    .msr_write(msr, random.value(), now)
                    .unwrap_or(Effect::None);
                let _ = apic.msr_read(random.value() as u32, now);
            }
            9 => {
                let mut data = [0; 9];
                let len = random.below(10) as usize;
                apic.mmio_read(random.value(), &mut data[..len], now);
                let _ = apic.msr_read(0x800 + random.below(0x40) as u32, now);
            }
            10 => {
                let value = lapic::DEFAULT_BASE | random.below(4) << 10;
                let _ = apic.set_base(value, random.below(2) == 0);
            }
            11 => {
                apic.set_tsc_deadline(random.value());
                apic.set_cr8(random.value());
            }
            12 if random.below(16) == 0 => {
                let mut page = [0; LAPIC_STATE_SIZE];
                random.fill(&mut page);
                let _ = apic.restore(&page, random.below(2) == 0, now);
            }
            12 if random.below(16) == 0 => {
                let mut config = LapicConfig::new(random.value() as u32, false);
                config.max_phys_addr = random.value() as u8;
                config.bus_cycle_ns = random.value() as u32;
                config.cmci = true;
                apic.set_config(config);
            }
            12 if random.below(64) == 0 => apic.reset(random.below(2) == 0),
            12 => {
                let _ = apic.save(random.below(2) == 0, now);
            }
            13 => {
                let mode = DeliveryMode::from_bits(random.next() as u8);
                apic.accept(
                    mode,
                    random.next() as u8,
                    Trigger::Level,
                    random.below(2) == 0,
                );
                apic.deliver_lvt(Lvt::Performance);
            }
            14 => {
                let _ = apic
                    .next_deadline()
                    .map(|d| d.to_ns(now, random.value() as u32));
                apic.expire(now);
            }
            _ => {
                let pending = apic.highest_pending();
                let vector = apic.ack();
                assert!(pending.is_none_or(|p| p == vector));
                assert!(apic.highest_pending().is_none_or(|next| next > vector));
            }
        }
        if let Effect::SendIpi(message) = effect {
            let snapshots: [_; 4] = core::array::from_fn(|i| (i, apics[i].destination()));
            let policy = DeliveryPolicy::default();
            for_each_target(
                &message,
                Some(index),
                policy,
                snapshots.into_iter(),
                |target| {
                    apics[target].accept_message(&message);
                },
            );
        }
    }
}

#[test]
fn chipset() {
    let mut random = Random(0xfedc_ba98_7654_3211);
    let mut ioapic = Ioapic::with_eoi_register();
    let mut pic = Pic::new();
    let mut pit = Pit::new();
    let sources = [
        IrqSource::Userspace,
        IrqSource::IrqfdResample,
        IrqSource::Pit,
    ];
    let ports = [
        0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x61, 0xffff,
    ];
    let mut now = 0u64;
    for step in 0..400_000 {
        now = now.saturating_add(random.value() >> random.below(64));
        if step % 1000 == 0 {
            now = random.value();
        }
        let source = sources[random.below(3) as usize];
        match random.below(10) {
            0..3 => {
                let offset = [0, 0x10, 0x40, random.value()][random.below(4) as usize];
                ioapic.mmio_write(offset, random.value() as u32, |pin, _| assert!(pin < 24));
                let _ = ioapic.mmio_read(offset);
            }
            3 => {
                let line = random.below(32) as u8;
                let _ = ioapic.set_irq(line, source, random.below(2) == 0);
                pic.set_irq(line, source, random.below(2) == 0);
                ioapic.not_accepted(random.next() as u8);
                let _ = ioapic.eoi_pin(random.next() as u8);
                let _ = ioapic.pin_message(random.next() as u8);
            }
            4 => ioapic.eoi(random.value() as u8, |_, _| {}),
            5..8 => {
                let port = ports[random.below(12) as usize];
                pic.port_write(port, random.value() as u8);
                pit.port_write(port, random.value() as u8, now);
                pic.port_read(port);
                pit.port_read(port, now);
                pic.ack();
                pic.take_acked();
            }
            8 => {
                let _ = pit.next_irq_deadline_ns();
                assert!(pit.expire(now) <= 1);
                pit.ack();
            }
            _ if random.below(32) == 0 => {
                restore(&mut random, &mut ioapic, &mut pic, &mut pit, now)
            }
            _ => {}
        }
    }
}

fn restore(random: &mut Random, ioapic: &mut Ioapic, pic: &mut Pic, pit: &mut Pit, now: u64) {
    let state = IoapicState {
        base_address: random.value(),
        ioregsel: random.value() as u32,
        id: random.value() as u32,
        irr: random.value() as u32,
        redirtbl: core::array::from_fn(|_| random.next()),
    };
    ioapic.set_state(&state, |_, _| {});
    let mut byte = || random.next() as u8;
    let state = PicState {
        last_irr: byte(),
        irr: byte(),
        imr: byte(),
        isr: byte(),
        priority_add: byte(),
        irq_base: byte(),
        read_reg_select: byte(),
        poll: byte(),
        special_mask: byte(),
        init_state: byte(),
        auto_eoi: byte(),
        rotate_on_auto_eoi: byte(),
        special_fully_nested_mode: byte(),
        init4: byte(),
        elcr: byte(),
        elcr_mask: byte(),
    };
    pic.set_master(&state);
    pic.set_slave(&state);
    let channels = core::array::from_fn(|_| PitChannelState {
        count: random.value() as u32,
        latched_count: random.value() as u16,
        count_latched: random.value() as u8,
        status_latched: random.value() as u8,
        status: random.value() as u8,
        read_state: random.value() as u8,
        write_state: random.value() as u8,
        write_latch: random.value() as u8,
        rw_mode: random.value() as u8,
        mode: random.below(8) as u8,
        bcd: random.below(3) as u8,
        gate: random.below(3) as u8,
        count_load_time: random.value() as i64,
    });
    pit.set_state(
        &PitState {
            channels,
            flags: random.value() as u32,
        },
        now,
    );
    pit.set_reinject(random.below(2) == 0);
}
