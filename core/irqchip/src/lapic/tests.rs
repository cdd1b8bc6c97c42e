use super::*;
use crate::{DeliveryPolicy, DestMode, LowestPriority, for_each_target};
use std::vec::Vec;

const T0: Now = Now {
    ns: 1_000_000,
    tsc: 3_000_000,
};

fn at(ns: u64) -> Now {
    Now {
        ns: T0.ns + ns,
        tsc: T0.tsc + 3 * ns,
    }
}

/// Software-enabled, in xAPIC mode.
fn xapic(id: u32) -> Lapic {
    let mut apic = Lapic::new(LapicConfig::new(id, id == 0));
    write(&mut apic, SVR, 0x1ff);
    apic
}

fn x2apic(id: u32) -> Lapic {
    let mut apic = xapic(id);
    apic.set_base(apic.base() | BASE_X2APIC, false).unwrap();
    apic
}

fn write(apic: &mut Lapic, offset: u32, value: u32) -> Effect {
    apic.mmio_write(offset.into(), 4, value, T0)
}

fn read(apic: &Lapic, offset: u32, now: Now) -> u32 {
    let mut data = [0; 4];
    apic.mmio_read(offset.into(), &mut data, now);
    u32::from_le_bytes(data)
}

fn fixed(apic: &mut Lapic, vector: u8) -> Accepted {
    apic.accept(DeliveryMode::Fixed, vector, Trigger::Edge, true)
}

fn targets(message: &ApicMessage, source: Option<usize>, apics: &[Lapic]) -> Vec<usize> {
    targets_by(DeliveryPolicy::default(), message, source, apics)
}

fn targets_by(
    policy: DeliveryPolicy,
    message: &ApicMessage,
    source: Option<usize>,
    apics: &[Lapic],
) -> Vec<usize> {
    let mut found = Vec::new();
    let snapshots = apics.iter().map(Lapic::destination).enumerate();
    let count = for_each_target(message, source, policy, snapshots, |key| found.push(key));
    assert_eq!(count, found.len());
    found
}

fn ipi(effect: Effect) -> ApicMessage {
    match effect {
        Effect::SendIpi(message) => message,
        other => panic!("no IPI but {other:?}"),
    }
}

#[test]
fn reset_state() {
    let apic = Lapic::new(LapicConfig::new(3, false));
    assert_eq!(read(&apic, ID, T0), 3 << 24);
    assert_eq!(read(&apic, VERSION, T0), 0x50014);
    assert_eq!(read(&apic, SVR, T0), 0xff);
    assert_eq!(read(&apic, DFR, T0), u32::MAX);
    assert_eq!(read(&apic, LVT_TIMER, T0), LVT_MASKED);
    assert_eq!(apic.base(), 0xfee0_0800);
    assert!(!apic.accepts_pic());
    let bsp = Lapic::new(LapicConfig::new(0, true));
    assert_eq!(bsp.base(), 0xfee0_0900);
    assert!(bsp.accepts_pic(), "LINT0 is ExtINT out of reset");
}

#[test]
fn priority_and_nesting() {
    let mut apic = xapic(0);
    assert_eq!(fixed(&mut apic, 0x31), Accepted::Pending);
    assert_eq!(fixed(&mut apic, 0x31), Accepted::Coalesced);
    fixed(&mut apic, 0x52);
    assert_eq!(apic.highest_pending(), Some(0x52));
    assert_eq!(apic.ack(), 0x52);
    assert_eq!(apic.ppr(), 0x50);
    assert_eq!(apic.highest_pending(), None);
    fixed(&mut apic, 0x5f);
    assert_eq!(apic.highest_pending(), None, "same class");
    fixed(&mut apic, 0x60);
    assert_eq!(apic.ack(), 0x60);
    let eoi = apic.eoi().unwrap();
    assert_eq!((eoi.vector, eoi.level, eoi.broadcast), (0x60, false, false));
    assert_eq!(apic.eoi().unwrap().vector, 0x52);
    assert_eq!(apic.ack(), 0x5f);
    write(&mut apic, EOI, 0);
    assert_eq!(apic.ack(), 0x31);
    write(&mut apic, EOI, 0);
    assert_eq!(apic.eoi(), None);
    assert_eq!(apic.ack(), 0xff, "spurious");
}

#[test]
fn tpr_holds_back_lower_classes() {
    let mut apic = xapic(0);
    fixed(&mut apic, 0x45);
    apic.set_cr8(4);
    assert_eq!(read(&apic, TPR, T0), 0x40);
    assert_eq!(apic.highest_pending(), None);
    assert_eq!(write(&mut apic, TPR, 0x3f), Effect::PriorityChanged);
    assert_eq!((apic.cr8(), apic.ppr()), (3, 0x3f));
    assert_eq!(apic.highest_pending(), Some(0x45));
}

#[test]
fn level_eoi_is_broadcast_unless_suppressed() {
    let mut config = LapicConfig::new(0, true);
    config.directed_eoi = true;
    let mut apic = Lapic::new(config);
    assert_eq!(read(&apic, VERSION, T0), 0x0105_0014);
    write(&mut apic, SVR, 0x1ff);
    for (svr, broadcast) in [(0x1ff, true), (0x11ff, false)] {
        write(&mut apic, SVR, svr);
        apic.accept(DeliveryMode::Fixed, 0x61, Trigger::Level, true);
        apic.ack();
        let due = EndOfInterrupt {
            vector: 0x61,
            level: true,
            broadcast,
        };
        assert_eq!(write(&mut apic, EOI, 0), Effect::Eoi(due));
    }
    // The trigger mode of the last arrival counts.
    apic.accept(DeliveryMode::Fixed, 0x61, Trigger::Edge, true);
    apic.ack();
    assert!(!apic.eoi().unwrap().level);
}

#[test]
fn acceptance_by_delivery_mode() {
    let mut apic = xapic(0);
    let mut accept = |mode, vector, trigger, level| apic.accept(mode, vector, trigger, level);
    use DeliveryMode as M;
    assert_eq!(accept(M::Nmi, 0, Trigger::Edge, true), Accepted::Nmi);
    assert_eq!(accept(M::Smi, 0, Trigger::Edge, true), Accepted::Smi);
    assert_eq!(accept(M::Init, 0, Trigger::Level, true), Accepted::Init);
    assert_eq!(accept(M::Init, 0, Trigger::Level, false), Accepted::No);
    assert_eq!(
        accept(M::Startup, 0x9a, Trigger::Edge, true),
        Accepted::Startup(0x9a)
    );
    assert_eq!(
        accept(M::RemoteRead, 0, Trigger::Edge, true),
        Accepted::RemoteRead
    );
    assert_eq!(accept(M::ExtInt, 0, Trigger::Edge, true), Accepted::No);
    assert_eq!(accept(M::Fixed, 0x40, Trigger::Level, false), Accepted::No);
    write(&mut apic, SVR, 0xff);
    assert_eq!(fixed(&mut apic, 0x40), Accepted::No, "software-disabled");
    assert_eq!(apic.accept(M::Nmi, 0, Trigger::Edge, true), Accepted::Nmi);
}

#[test]
fn illegal_vectors_set_esr_and_raise_the_error_interrupt() {
    let mut apic = xapic(0);
    write(&mut apic, LVT_ERROR, 0xfe);
    assert_eq!(fixed(&mut apic, 15), Accepted::No);
    assert_eq!(apic.highest_pending(), Some(0xfe));
    assert_eq!(write(&mut apic, ICR, 0x0000_4005), Effect::None);
    assert_eq!(read(&apic, ESR, T0), 0, "latched by a write");
    write(&mut apic, ESR, 0);
    assert_eq!(read(&apic, ESR, T0), 0x60);
    write(&mut apic, ESR, 0);
    assert_eq!(read(&apic, ESR, T0), 0);
}

#[test]
fn lvt_masks_and_software_disable() {
    let mut apic = xapic(0);
    write(&mut apic, LVT_TIMER, 0xffff_ffff);
    assert_eq!(read(&apic, LVT_TIMER, T0), 0x7_10ff);
    write(&mut apic, LVT_ERROR, 0x700 | 0xfe);
    assert_eq!(read(&apic, LVT_ERROR, T0), 0xfe);
    write(&mut apic, LVT_LINT0, 0x400);
    assert!(apic.lint0_is_nmi() && !apic.accepts_pic());
    assert_eq!(apic.deliver_lvt(Lvt::Lint0), Accepted::Nmi);
    write(&mut apic, LVT_PMC, 0x400);
    assert_eq!(apic.deliver_lvt(Lvt::Performance), Accepted::Nmi);
    assert_eq!(
        apic.deliver_lvt(Lvt::Performance),
        Accepted::No,
        "masks itself"
    );
    write(&mut apic, SVR, 0xff);
    assert_eq!(read(&apic, LVT_ERROR, T0), LVT_MASKED | 0xfe);
    write(&mut apic, LVT_ERROR, 0xfe);
    assert_eq!(read(&apic, LVT_ERROR, T0), LVT_MASKED | 0xfe);
    write(&mut apic, LVT_CMCI, 0xfe);
    assert_eq!(read(&apic, LVT_CMCI, T0), 0, "no such entry");
}

#[test]
fn icr_shorthands() {
    let apics: Vec<_> = (0..4).map(xapic).collect();
    for (icr, expected) in [
        (0x0004_4031, &[1][..]),
        (0x0008_4031, &[0, 1, 2, 3]),
        (0x000c_4031, &[0, 2, 3]),
        (0x0000_4031, &[2]),
    ] {
        let mut sender = apics[1].clone();
        write(&mut sender, ICR2, 2 << 24);
        let message = ipi(write(&mut sender, ICR, icr | ICR_BUSY));
        assert_eq!(message.vector, 0x31);
        assert_eq!(targets(&message, Some(1), &apics), expected, "ICR {icr:#x}");
        assert_eq!(read(&sender, ICR, T0), icr, "never busy");
    }
}

#[test]
fn icr_decodes_init_and_sipi() {
    let mut apic = xapic(0);
    write(&mut apic, ICR2, 1 << 24);
    let init = ipi(write(&mut apic, ICR, 0x0000_c500));
    assert_eq!((init.delivery_mode, init.level), (DeliveryMode::Init, true));
    let deassert = ipi(write(&mut apic, ICR, 0x0000_8500));
    assert_eq!(xapic(1).accept_message(&deassert), Accepted::No);
    let sipi = ipi(write(&mut apic, ICR, 0x0000_0698));
    assert_eq!(xapic(1).accept_message(&sipi), Accepted::Startup(0x98));
}

#[test]
fn destinations_physical_and_broadcast() {
    let mut apics: Vec<_> = (0..3).map(xapic).collect();
    let mut message = ipi(write(&mut apics[0], ICR, 0x4031));
    message.dest = 2;
    assert_eq!(targets(&message, Some(0), &apics), [2]);
    message.dest = 0xff;
    assert_eq!(targets(&message, Some(0), &apics), [0, 1, 2]);
    apics[1].set_base(DEFAULT_BASE, false).unwrap();
    assert_eq!(targets(&message, Some(0), &apics), [0, 2], "disabled");
    // The guest may renumber in xAPIC mode.
    assert_eq!(
        write(&mut apics[2], ID, 9 << 24),
        Effect::DestinationChanged
    );
    message.dest = 9;
    assert_eq!(targets(&message, Some(0), &apics), [2]);
}

#[test]
fn destinations_logical_flat_and_cluster() {
    let mut apics: Vec<_> = (0..4).map(xapic).collect();
    for (i, apic) in apics.iter_mut().enumerate() {
        write(apic, LDR, 1 << (24 + i));
    }
    let mut message = ipi(write(&mut apics[0], ICR, 0x4831));
    message.dest = 0b1010;
    assert_eq!(targets(&message, None, &apics), [1, 3]);
    for (i, apic) in apics.iter_mut().enumerate() {
        write(apic, DFR, 0);
        // Two clusters of two.
        write(apic, LDR, (((i as u32) >> 1) << 4 | 1 << (i & 1)) << 24);
    }
    message.dest = 0x13;
    assert_eq!(targets(&message, None, &apics), [2, 3]);
    message.dest = 0x02;
    assert_eq!(targets(&message, None, &apics), [1]);
    message.dest = 0xff;
    assert_eq!(targets(&message, None, &apics), [0, 1, 2, 3]);
}

#[test]
fn x2apic_id_ldr_and_logical_destinations() {
    let apics: Vec<_> = [0, 0x11, 0x12, 0x123].map(x2apic).into();
    assert_eq!(apics[3].msr_read(0x802, T0), Ok(0x123));
    assert_eq!(apics[3].msr_read(0x80d, T0), Ok(0x0012_0008));
    let mut sender = apics[0].clone();
    let effect = sender.msr_write(0x830, 0x0001_0006_0000_4831, T0).unwrap();
    assert_eq!(targets(&ipi(effect), Some(0), &apics), [1, 2]);
    assert_eq!(sender.msr_read(0x830, T0), Ok(0x0001_0006_0000_4831));
    let effect = sender.msr_write(0x830, 0x0000_0123_0000_4031, T0).unwrap();
    assert_eq!(targets(&ipi(effect), Some(0), &apics), [3]);
    let effect = sender.msr_write(0x830, 0xffff_ffff_0000_4031, T0).unwrap();
    assert_eq!(targets(&ipi(effect), Some(0), &apics), [0, 1, 2, 3]);
    let effect = sender.msr_write(0x83f, 0x44, T0).unwrap();
    assert_eq!(targets(&ipi(effect), Some(0), &apics), [0]);
    // A vCPU in xAPIC mode whose ID does not fit answers to the whole ID.
    let mixed = [x2apic(0), xapic(0x123)];
    let effect = sender.msr_write(0x830, 0x0000_0123_0000_4500, T0).unwrap();
    assert_eq!(targets(&ipi(effect), Some(0), &mixed), [1]);
}

#[test]
fn x2apic_broadcast_quirk() {
    let apics: Vec<_> = [1, 2].map(x2apic).into();
    let msi = crate::Msi {
        address: 0xfeef_f000,
        data: 0x31,
    }
    .message(false);
    assert_eq!(targets(&msi, None, &apics), [0, 1]);
    let policy = DeliveryPolicy {
        strict_x2apic_broadcast: true,
        ..Default::default()
    };
    assert!(targets_by(policy, &msi, None, &apics).is_empty());
    assert!(
        targets(&msi, Some(0), &apics).is_empty(),
        "an IPI is not an MSI"
    );
}

#[test]
fn lowest_priority_picks_one() {
    let mut apics: Vec<_> = (0..3).map(xapic).collect();
    let mut message = ipi(write(&mut apics[0], ICR, 0x4130));
    message.dest = 0xff;
    assert_eq!(
        targets(&message, None, &apics),
        [0, 1, 2],
        "a physical broadcast is fixed"
    );
    message.dest_mode = DestMode::Logical;
    for vector in 0x30..0x36 {
        message.vector = vector;
        assert_eq!(targets(&message, None, &apics), [usize::from(vector % 3)]);
    }
    write(&mut apics[0], SVR, 0xff);
    message.vector = 0x30;
    assert_eq!(
        targets(&message, None, &apics),
        [1],
        "not a software-disabled one"
    );
    let policy = DeliveryPolicy {
        lowest_priority: LowestPriority::RoundRobin,
        ..Default::default()
    };
    for expected in [1, 2, 1, 2] {
        assert_eq!(targets_by(policy, &message, None, &apics), [expected]);
        apics[expected].accept_message(&message);
    }
    message.dest_mode = DestMode::Physical;
    message.dest = 7;
    assert!(targets(&message, None, &apics).is_empty());
}

#[test]
fn base_transitions() {
    let mut apic = xapic(5);
    let (off, x, x2) = (DEFAULT_BASE, DEFAULT_BASE | 0x800, DEFAULT_BASE | 0xc00);
    assert!(
        apic.set_base(DEFAULT_BASE | 0x400, true).is_err(),
        "invalid mode"
    );
    assert!(apic.set_base(x | 1, true).is_err(), "reserved bit");
    assert!(
        apic.set_base(x | 1 << 46, true).is_err(),
        "beyond the physical width"
    );
    apic.set_base(x2, false).unwrap();
    assert_eq!(read(&apic, ID, T0), u32::MAX, "no register page");
    assert!(apic.set_base(x, false).is_err());
    apic.set_base(off, false).unwrap();
    assert!(!apic.is_enabled() && apic.accepts_pic());
    assert!(apic.set_base(x2, false).is_err());
    apic.set_base(x, false).unwrap();
    assert_eq!(read(&apic, ID, T0), 5 << 24);
    assert!(apic.msr_read(0x802, T0).is_err());
    apic.set_base(x2, true).unwrap();
    apic.set_base(x, true).unwrap();
    let mut config = *apic.config();
    config.x2apic = false;
    apic.set_config(config);
    assert!(apic.set_base(x2, false).is_err());
}

#[test]
fn x2apic_faults() {
    let mut apic = x2apic(0);
    for msr in [0x800, 0x809, 0x80b, 0x80e, 0x831, 0x83f, 0x8ff] {
        assert!(apic.msr_read(msr, T0).is_err(), "read {msr:#x}");
    }
    for (msr, value) in [
        (0x802, 0),
        (0x803, 0),
        (0x80d, 0),
        (0x808, 0x100),
        (0x80b, 1),
        (0x828, 1),
        (0x80f, 0x400),
        (0x830, 1 << 13),
        (0x830, 1 << 20),
        (0x832, 1 << 32),
        (0x839, 0),
        (0x83e, 4),
        (0x83f, 0x100),
    ] {
        assert!(
            apic.msr_write(msr, value, T0).is_err(),
            "write {msr:#x} {value:#x}"
        );
    }
    for (msr, value) in [
        (0x808, 0xff),
        (0x80b, 0),
        (0x828, 0),
        (0x80f, 0x1ff),
        (0x83e, 0xb),
    ] {
        assert!(
            apic.msr_write(msr, value, T0).is_ok(),
            "write {msr:#x} {value:#x}"
        );
    }
}

#[test]
fn one_shot_timer() {
    let mut apic = xapic(0);
    write(&mut apic, LVT_TIMER, 0x20);
    write(&mut apic, TIMER_DIVIDE, 0b1011);
    assert_eq!(write(&mut apic, TIMER_INITIAL, 1000), Effect::TimerChanged);
    assert_eq!(apic.next_deadline(), Some(Deadline::Ns(T0.ns + 1000)));
    assert_eq!(read(&apic, TIMER_CURRENT, T0), 1000);
    assert_eq!(read(&apic, TIMER_CURRENT, at(400)), 600);
    assert!(!apic.expire(at(999)));
    assert!(apic.expire(at(1000)));
    assert_eq!(apic.highest_pending(), Some(0x20));
    assert_eq!(apic.next_deadline(), None);
    assert_eq!(read(&apic, TIMER_CURRENT, at(2000)), 0);
    // The reset value of the divide configuration is 2.
    write(&mut apic, TIMER_DIVIDE, 0);
    write(&mut apic, TIMER_INITIAL, 1000);
    assert_eq!(apic.next_deadline(), Some(Deadline::Ns(T0.ns + 2000)));
    // Divisor 16: the rest counts eight times as slowly.
    apic.mmio_write(TIMER_DIVIDE.into(), 4, 3, at(1000));
    assert_eq!(read(&apic, TIMER_CURRENT, at(1000)), 500);
    assert_eq!(apic.next_deadline(), Some(Deadline::Ns(at(1000).ns + 8000)));
    write(&mut apic, TIMER_INITIAL, 0);
    assert_eq!(apic.next_deadline(), None);
}

#[test]
fn periodic_timer_coalesces_missed_periods() {
    let mut apic = xapic(0);
    write(&mut apic, LVT_TIMER, 1 << 17 | 0x20);
    write(&mut apic, TIMER_DIVIDE, 0b1011);
    write(&mut apic, TIMER_INITIAL, 1_000_000);
    assert!(apic.expire(at(1_000_000)));
    assert_eq!(apic.next_deadline(), Some(Deadline::Ns(at(2_000_000).ns)));
    assert_eq!(read(&apic, TIMER_CURRENT, at(1_250_000)), 750_000);
    assert_eq!(apic.ack(), 0x20);
    apic.eoi();
    assert!(apic.expire(at(5_500_000)));
    assert_eq!(apic.next_deadline(), Some(Deadline::Ns(at(6_000_000).ns)));
    // Masked, it goes on without interrupts.
    apic.ack();
    apic.eoi();
    write(&mut apic, LVT_TIMER, LVT_MASKED | 1 << 17 | 0x20);
    assert!(!apic.expire(at(6_000_000)));
    assert_eq!(apic.next_deadline(), Some(Deadline::Ns(at(7_000_000).ns)));
    // Too short a period is stretched.
    write(&mut apic, TIMER_INITIAL, 10);
    assert_eq!(apic.next_deadline(), Some(Deadline::Ns(at(200_000).ns)));
}

#[test]
fn tsc_deadline_timer() {
    let mut apic = xapic(0);
    apic.set_tsc_deadline(5);
    assert_eq!(apic.tsc_deadline(), 0, "not in this mode");
    write(&mut apic, LVT_TIMER, 2 << 17 | 0x20);
    write(&mut apic, TIMER_INITIAL, 77);
    assert_eq!(read(&apic, TIMER_INITIAL, T0), 0);
    apic.set_tsc_deadline(T0.tsc + 3001);
    let deadline = apic.next_deadline().unwrap();
    assert_eq!(deadline, Deadline::Tsc(T0.tsc + 3001));
    assert_eq!(deadline.to_ns(T0, 3_000_000), T0.ns + 1001);
    assert!(!apic.expire(at(1000)));
    assert!(apic.expire(at(1001)));
    assert_eq!((apic.tsc_deadline(), apic.next_deadline()), (0, None));
    apic.set_tsc_deadline(1);
    assert!(apic.expire(T0) || apic.highest_requested() == Some(0x20));
    apic.set_tsc_deadline(u64::MAX);
    assert_eq!(apic.next_deadline().unwrap().to_ns(T0, 1), u64::MAX);
    write(&mut apic, LVT_TIMER, 0x20);
    assert_eq!(apic.next_deadline(), None, "a mode change disarms");
}

#[test]
fn save_and_restore() {
    let mut apic = xapic(3);
    write(&mut apic, LVT_TIMER, 1 << 17 | 0x20);
    write(&mut apic, TIMER_INITIAL, 1_000_000);
    apic.accept(DeliveryMode::Fixed, 0x71, Trigger::Level, true);
    fixed(&mut apic, 0x93);
    apic.ack();
    let page = apic.save(false, at(500_000));
    assert_eq!(&page[0x20..0x24], &[0, 0, 0, 3]);
    let mut other = Lapic::new(LapicConfig::new(3, false));
    other.restore(&page, false, T0).unwrap();
    assert_eq!(other.save(false, T0), page);
    assert_eq!(other.next_deadline(), Some(Deadline::Ns(at(1_500_000).ns)));
    assert_eq!(other.eoi().unwrap().vector, 0x93);
    assert_eq!(other.ack(), 0x71);
    assert!(other.eoi().unwrap().broadcast);
}

#[test]
fn save_and_restore_in_x2apic_mode() {
    let mut apic = x2apic(0x123);
    apic.msr_write(0x830, 0x0000_0007_0000_4031, T0).unwrap();
    let wide = apic.save(true, T0);
    assert_eq!(&wide[0x20..0x24], &0x123u32.to_le_bytes());
    assert_eq!(&wide[0x310..0x314], &[7, 0, 0, 0]);
    let narrow = apic.save(false, T0);
    assert_eq!(&narrow[0x20..0x24], &[0, 0, 0, 0x23]);
    let mut other = x2apic(0x124);
    assert_eq!(other.restore(&wide, true, T0), Err(WrongApicId));
    other.restore(&narrow, false, T0).unwrap();
    assert_eq!(other.msr_read(0x802, T0), Ok(0x124));
    assert_eq!(other.msr_read(0x80d, T0), Ok(0x0012_0010));
    assert_eq!(other.msr_read(0x830, T0), Ok(0x0000_0007_0000_4031));
}

#[test]
fn init_keeps_base_and_id() {
    let mut apic = x2apic(0x21);
    apic.msr_write(0x808, 0x50, T0).unwrap();
    apic.reset(true);
    assert!(apic.is_x2apic() && !apic.is_software_enabled());
    assert_eq!(apic.msr_read(0x802, T0), Ok(0x21));
    assert_eq!(apic.msr_read(0x80d, T0), Ok(0x0002_0002));
    assert_eq!(apic.tpr(), 0);
    apic.reset(false);
    assert!(apic.is_xapic());
}

#[test]
fn partial_and_misaligned_accesses() {
    let mut apic = xapic(7);
    let mut byte = [0];
    apic.mmio_read(0x23, &mut byte, T0);
    assert_eq!(byte, [7]);
    let mut wide = [1; 8];
    apic.mmio_read(0x20, &mut wide, T0);
    assert_eq!(wide, [0; 8], "no more than 32 bits");
    apic.mmio_read(0xfff, &mut wide, T0);
    assert_eq!(apic.mmio_write(0x80, 2, 0x50, T0), Effect::None);
    assert_eq!(apic.mmio_write(0x84, 4, 0x50, T0), Effect::None);
    assert_eq!(apic.tpr(), 0);
}
