//! The interrupt controllers and the timer: register accesses and restored states in any order.

use crate::input::{Input, Random};
use irqchip::*;

const PORTS: [u16; 12] = [
    0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1, 0x40, 0x41, 0x42, 0x43, 0x61, 0xffff,
];
const SOURCES: [IrqSource; 3] = [
    IrqSource::Userspace,
    IrqSource::IrqfdResample,
    IrqSource::Pit,
];

struct Board {
    apics: [Lapic; 3],
    ioapic: Ioapic,
    pic: Pic,
    pit: Pit,
    routes: RoutingTable,
    now: Now,
}

/// Each few bytes are an access.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let eoi_register = input.flag();
    let mut board = Board {
        apics: core::array::from_fn(|n| Lapic::new(LapicConfig::new(n as u32, n == 0))),
        ioapic: if eoi_register {
            Ioapic::with_eoi_register()
        } else {
            Ioapic::new()
        },
        pic: Pic::new(),
        pit: Pit::new(),
        routes: RoutingTable::x86_default().expect("memory for the default routes"),
        now: Now::default(),
    };
    while !input.is_empty() {
        board.act(&mut input);
    }
}

impl Board {
    fn act(&mut self, input: &mut Input<'_>) {
        match input.below(16) {
            0..7 => self.lapic(input),
            7..9 => self.ioapic(input),
            9 | 10 => self.ports(input),
            11 => self.line(input),
            12 => {
                self.now.ns = self.now.ns.saturating_add(input.value());
                self.now.tsc = self.now.tsc.saturating_add(input.value());
                self.timers();
            }
            13 => self.restore(input),
            14 => {
                let _ = (self.pic.ack(), self.pic.take_acked(), self.pit.ack());
                self.ioapic.eoi(input.u8(), |_, _| {});
                self.ioapic.not_accepted(input.u8());
                let _ = self.ioapic.eoi_pin(input.u8());
                self.ioapic.retry_deferred(|_, _| {});
            }
            _ => {
                let msi = Msi {
                    address: input.value(),
                    data: input.value() as u32,
                };
                self.send(&msi.message(input.flag()), None);
            }
        }
    }

    fn send(&mut self, message: &ApicMessage, from: Option<usize>) {
        let apics: [_; 3] = core::array::from_fn(|n| (n, self.apics[n].destination()));
        let mut targets = 0;
        for_each_target(
            message,
            from,
            DeliveryPolicy::default(),
            apics.into_iter(),
            |n| {
                targets += 1;
                let _ = self.apics[n].accept_message(message);
            },
        );
        assert!(targets <= 3, "each vCPU is a target once");
    }

    fn lapic(&mut self, input: &mut Input<'_>) {
        let n = input.below(3);
        let now = self.now;
        let apic = &mut self.apics[n];
        let mut effect = Effect::None;
        match input.below(14) {
            0..3 => {
                effect = apic.mmio_write(u64::from(input.u8()) * 16, 4, input.value() as u32, now)
            }
            3 => {
                let size = input.below(9);
                effect = apic.mmio_write(input.value(), size, input.value() as u32, now);
            }
            4..6 => {
                let msr = 0x800 + u32::from(input.u8() & 0x3f);
                effect = apic.msr_write(msr, input.value(), now).unwrap_or(effect);
            }
            6 => {
                let mut data = [0; 16];
                let len = input.below(17);
                apic.mmio_read(input.value(), &mut data[..len], now);
                let _ = apic.msr_read(input.value() as u32, now);
            }
            7 => {
                let _ = apic.set_base(input.value(), input.flag());
            }
            8 => {
                let base = lapic::DEFAULT_BASE | u64::from(input.u8() & 3) << 10;
                let _ = apic.set_base(base, input.flag());
            }
            9 => {
                apic.set_tsc_deadline(input.value());
                apic.set_cr8(input.value());
            }
            10 => {
                let mut page = apic.save(input.flag(), now);
                input.disturb(&mut page);
                let _ = apic.restore(&page, input.flag(), now);
            }
            11 => {
                let mode = DeliveryMode::from_bits(input.u8());
                let trigger = if input.flag() {
                    Trigger::Level
                } else {
                    Trigger::Edge
                };
                apic.accept(mode, input.u8(), trigger, input.flag());
                apic.deliver_lvt(Lvt::Performance);
            }
            12 => {
                let mut config = LapicConfig::new(input.value() as u32, input.flag());
                config.max_phys_addr = input.u8();
                config.bus_cycle_ns = input.value() as u32;
                apic.set_config(config);
                apic.reset(input.flag());
            }
            _ => {
                let pending = apic.highest_pending();
                let vector = apic.ack();
                assert!(pending.is_none_or(|pending| pending == vector));
                assert!(apic.highest_pending().is_none_or(|next| next > vector));
            }
        }
        if let Effect::SendIpi(message) = effect {
            self.send(&message, Some(n));
        }
    }

    fn ioapic(&mut self, input: &mut Input<'_>) {
        let offset = match input.below(8) {
            0 => input.value(),
            n => [0, 0x10, 0x40][n % 3],
        };
        self.ioapic
            .mmio_write(offset, input.value() as u32, |pin, _| assert!(pin < 24));
        let _ = self.ioapic.mmio_read(offset);
    }

    fn ports(&mut self, input: &mut Input<'_>) {
        let (port, value) = (input.pick(&PORTS), input.u8());
        self.pic.port_write(port, value);
        self.pit.port_write(port, value, self.now.ns);
        let _ = self.pic.port_read(port);
        let _ = self.pit.port_read(port, self.now.ns);
    }

    fn line(&mut self, input: &mut Input<'_>) {
        let (gsi, source, level) = (input.u8(), input.pick(&SOURCES), input.flag());
        let routes = self.routes.lookup(u32::from(gsi)).to_vec();
        for _route in routes {
            self.pic.set_irq(gsi, source, level);
            if let Some(message) = self.ioapic.set_irq(gsi, source, level).message() {
                self.send(&message, None);
            }
        }
        let _ = self.ioapic.set_irq(gsi, source, level);
        let _ = self.pic.set_irq(gsi, source, level);
    }

    fn timers(&mut self) {
        let now = self.now;
        for apic in &mut self.apics {
            let _ = apic.next_deadline().map(|d| d.to_ns(now, 2_000_000));
            apic.expire(now);
        }
        let _ = self.pit.next_irq_deadline_ns();
        assert!(self.pit.expire(now.ns) <= 1);
    }

    fn restore(&mut self, input: &mut Input<'_>) {
        match input.below(3) {
            0 => {
                let mut state = self.ioapic.state();
                state.base_address = input.value();
                state.ioregsel = input.value() as u32;
                state.id = input.value() as u32;
                state.irr = input.value() as u32;
                let pin = input.below(24);
                state.redirtbl[pin] = input.value();
                self.ioapic.set_state(&state, |pin, _| assert!(pin < 24));
            }
            1 => {
                let mut next = || input.u8();
                let state = PicState {
                    last_irr: next(),
                    irr: next(),
                    imr: next(),
                    isr: next(),
                    priority_add: next(),
                    irq_base: next(),
                    read_reg_select: next(),
                    poll: next(),
                    special_mask: next(),
                    init_state: next(),
                    auto_eoi: next(),
                    rotate_on_auto_eoi: next(),
                    special_fully_nested_mode: next(),
                    init4: next(),
                    elcr: next(),
                    elcr_mask: next(),
                };
                if next() & 1 == 0 {
                    self.pic.set_master(&state);
                } else {
                    self.pic.set_slave(&state);
                }
            }
            _ => {
                let mut state = self.pit.state();
                let n = input.below(3);
                state.channels[n] = PitChannelState {
                    count: input.value() as u32,
                    latched_count: input.u16(),
                    count_latched: input.u8(),
                    status_latched: input.u8(),
                    status: input.u8(),
                    read_state: input.u8(),
                    write_state: input.u8(),
                    write_latch: input.u8(),
                    rw_mode: input.u8(),
                    mode: input.u8(),
                    bcd: input.u8(),
                    gate: input.u8(),
                    count_load_time: input.value() as i64,
                };
                state.flags = input.u32();
                self.pit.set_state(&state, self.now.ns);
                self.pit.set_reinject(input.flag());
            }
        }
    }
}

/// Random accesses.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut random = Random(7);
    (0..16).map(|_| random.bytes(200)).collect()
}
