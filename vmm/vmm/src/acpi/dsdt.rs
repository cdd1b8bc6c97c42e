//! The DSDT: CPUs, the PCI host bridge with its windows and interrupt routing, COM1, the
//! clock, and the sleep state that powers off.

use acpi_tables::Aml;
use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Name,
    Package, ResourceTemplate, Scope,
};

use crate::chipset::pm::SLP_TYP_S5;
use crate::layout::{
    ECAM_BASE, ECAM_SIZE, GPE0, GPE0_LEN, PCI_HOLE_START, PCI_WINDOW32_SIZE, PM1A_EVT, SERIAL_GSI,
    SERIAL_PORT,
};
use crate::pci::{SLOTS, intx};

/// 64-bit window for BARs that the guest moves: 64 GiB from 512 GiB. RAM ends below unless
/// there is more than that, and then guests keep to the 32-bit window.
const WINDOW64_START: u64 = 512 << 30;
const WINDOW64_END: u64 = (576 << 30) - 1;

/// The AML of a machine with `cpus` CPUs.
pub(super) fn build(cpus: u32) -> Vec<u8> {
    let mut aml = Vec::new();
    let s5 = Package::new(vec![&SLP_TYP_S5, &0u8, &0u8, &0u8]);
    Name::new("_S5_".into(), &s5).to_aml_bytes(&mut aml);
    processors(cpus, &mut aml);
    host_bridge(&mut aml);
    board(&mut aml);
    aml
}

fn processors(cpus: u32, aml: &mut Vec<u8>) {
    let mut devices = Vec::new();
    for id in 0..cpus {
        let path = format!("C{id:03X}");
        let hid = Name::new("_HID".into(), &"ACPI0007");
        let uid = Name::new("_UID".into(), &id);
        Device::new(path.as_str().into(), vec![&hid, &uid]).to_aml_bytes(&mut devices);
    }
    aml.extend(Scope::raw("_SB_".into(), devices));
}

fn host_bridge(aml: &mut Vec<u8>) {
    let window32_end = PCI_HOLE_START + PCI_WINDOW32_SIZE - 1;
    let buses = AddressSpace::new_bus_number(0u16, 0u16);
    let config_ports = IO::new(0xcf8, 0xcf8, 1, 8);
    let ports_low = AddressSpace::new_io(0x0u16, 0xcf7u16, None);
    let ports_high = AddressSpace::new_io(0xd00u16, 0xffffu16, None);
    let memory32 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        PCI_HOLE_START as u32,
        window32_end as u32,
        None,
    );
    let memory64 = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        WINDOW64_START,
        WINDOW64_END,
        None,
    );
    let resources = ResourceTemplate::new(vec![
        &buses,
        &config_ports,
        &ports_low,
        &ports_high,
        &memory32,
        &memory64,
    ]);
    // INTA# of each slot; the same for the other pins, which nothing uses.
    let routes: Vec<[u32; 4]> = (0..SLOTS as u32)
        .flat_map(|slot| {
            let gsi = intx::gsi(slot as u8);
            (0..4).map(move |pin| [slot << 16 | 0xffff, pin, 0, gsi])
        })
        .collect();
    let routes: Vec<Package<'_>> = routes
        .iter()
        .map(|route| Package::new(route.iter().map(|word| word as &dyn Aml).collect()))
        .collect();
    let routes = Package::new(routes.iter().map(|route| route as &dyn Aml).collect());
    let bridge = Device::new(
        "_SB_.PCI0".into(),
        vec![
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &0u8),
            &Name::new("_SEG".into(), &0u8),
            &Name::new("_BBN".into(), &0u8),
            &Name::new("_CRS".into(), &resources),
            &Name::new("_PRT".into(), &routes),
        ],
    )
    .to_bytes();
    aml.extend(bridge);
}

/// What is soldered on.
fn board(aml: &mut Vec<u8>) {
    let com1_ports = IO::new(SERIAL_PORT, SERIAL_PORT, 1, 8);
    let com1_irq = Interrupt::new(true, true, false, false, SERIAL_GSI);
    let com1_resources = ResourceTemplate::new(vec![&com1_ports, &com1_irq]);
    let rtc_ports = IO::new(0x70, 0x70, 1, 2);
    let rtc_resources = ResourceTemplate::new(vec![&rtc_ports]);
    // ECAM must be reserved here for Linux to use it.
    let ecam = Memory32Fixed::new(true, ECAM_BASE as u32, ECAM_SIZE as u32);
    let power_ports = IO::new(PM1A_EVT, PM1A_EVT, 1, (GPE0 + GPE0_LEN - PM1A_EVT) as u8);
    let system_resources = ResourceTemplate::new(vec![&ecam, &power_ports]);
    let hid = |id: &str| Name::new("_HID".into(), &EISAName::new(id));
    let uid = Name::new("_UID".into(), &0u8);
    for (path, id, resources) in [
        ("_SB_.COM1", "PNP0501", &com1_resources),
        ("_SB_.RTC_", "PNP0B00", &rtc_resources),
        ("_SB_.MRES", "PNP0C02", &system_resources),
    ] {
        let id = hid(id);
        let crs = Name::new("_CRS".into(), resources);
        Device::new(path.into(), vec![&id, &uid, &crs]).to_aml_bytes(aml);
    }
}

/// AML in bytes, for use inside expressions.
trait ToBytes {
    fn to_bytes(&self) -> Vec<u8>;
}

impl<T: Aml> ToBytes for T {
    fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.to_aml_bytes(&mut bytes);
        bytes
    }
}
