use crate::*;
use std::vec::Vec;

const MSI: RouteTarget = RouteTarget::Msi(Msi {
    address: 0xfee0_0000,
    data: 0x31,
});

fn route(gsi: u32, target: RouteTarget) -> Route {
    Route { gsi, target }
}

#[test]
fn default_table() {
    let table = RoutingTable::x86_default().unwrap();
    let targets = |gsi| {
        table
            .lookup(gsi)
            .iter()
            .map(|r| r.target)
            .collect::<Vec<_>>()
    };
    assert_eq!(targets(0), [RouteTarget::Pic(0), RouteTarget::Ioapic(0)]);
    assert_eq!(targets(15), [RouteTarget::Pic(15), RouteTarget::Ioapic(15)]);
    assert_eq!(targets(16), [RouteTarget::Ioapic(16)]);
    assert_eq!(targets(23), [RouteTarget::Ioapic(23)]);
    assert!(targets(24).is_empty() && targets(u32::MAX).is_empty());
    assert_eq!(table.gsi_of(RouteTarget::Ioapic(2)), Some(2));
    assert_eq!(table.gsi_of(RouteTarget::Ioapic(24)), None);
    assert_eq!(table.routes().len(), 40);
}

#[test]
fn override_of_irq_0() {
    let table = RoutingTable::new(&[
        route(0, RouteTarget::Ioapic(2)),
        route(0, RouteTarget::Pic(0)),
        route(30, MSI),
    ])
    .unwrap();
    assert_eq!(table.gsi_of(RouteTarget::Ioapic(2)), Some(0));
    assert_eq!(table.lookup(0).len(), 2);
    assert_eq!(table.lookup(30), [route(30, MSI)]);
    assert!(RoutingTable::empty().lookup(0).is_empty());
}

#[test]
fn refused_tables() {
    let refused = |routes: &[Route]| RoutingTable::new(routes).unwrap_err();
    assert_eq!(refused(&[route(4096, MSI)]), RouteError::BadGsi);
    assert_eq!(
        refused(&[route(0, RouteTarget::Pic(16))]),
        RouteError::BadPin
    );
    assert_eq!(
        refused(&[route(0, RouteTarget::Ioapic(24))]),
        RouteError::BadPin
    );
    assert_eq!(
        refused(&[route(5, MSI), route(5, MSI)]),
        RouteError::Conflict
    );
    assert_eq!(
        refused(&[route(5, RouteTarget::Pic(5)), route(5, MSI)]),
        RouteError::Conflict
    );
    let twice = [route(5, RouteTarget::Pic(8)), route(5, RouteTarget::Pic(9))];
    assert_eq!(refused(&twice), RouteError::Conflict);
    let pair = [route(5, RouteTarget::Pic(7)), route(5, RouteTarget::Pic(8))];
    assert!(
        RoutingTable::new(&pair).is_ok(),
        "master and slave are two chips"
    );
    let many: Vec<_> = (0..4097).map(|gsi| route(gsi, MSI)).collect();
    assert_eq!(refused(&many), RouteError::TooMany);
    assert!(RoutingTable::new(&many[..4096]).is_ok());
}

#[test]
fn msi_decoding() {
    let msi = Msi {
        address: 0x0000_1200_fee5_600c,
        data: 0xc131,
    };
    let message = msi.message(false);
    assert_eq!((message.dest, message.vector), (0x56, 0x31));
    assert_eq!(message.dest_mode, DestMode::Logical);
    assert_eq!(message.delivery_mode, DeliveryMode::LowestPriority);
    assert_eq!(message.trigger, Trigger::Level);
    assert!(message.redirect_hint && message.level);
    assert_eq!(msi.message(true).dest, 0x1256);
    assert!(msi.is_valid(true));
    let bad = Msi {
        address: 0x0000_1201_fee5_6000,
        ..msi
    };
    assert!(!bad.is_valid(true) && bad.is_valid(false));
}
