//! ACPI tables: what the machine has, for the guest.
//!
//! The tables say honestly what is not there (no keyboard controller, no VGA), so that a
//! guest does not wait for it.

mod dsdt;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress};

use crate::chipset::rtc;
use crate::layout::{
    ACPI_TABLES, ACPI_TABLES_SIZE, ECAM_BASE, GPE0, GPE0_LEN, IOAPIC_BASE, LAPIC_BASE, PM_TIMER,
    PM1A_CNT, PM1A_EVT, RESET_PORT, SCI_GSI,
};
use crate::memory::GuestMem;

const OEM: [u8; 6] = *b"ANYKVM";
const OEM_TABLE: [u8; 8] = *b"ANYKVMPC";
const OEM_REVISION: u32 = 1;

/// IA-PC boot flags: what a guest need not look for. The keyboard controller answers only to
/// the reset command, so its bit is off.
const NO_VGA: u16 = 1 << 2;
const NO_ASPM: u16 = 1 << 4;
/// "MADT: multiple APIC flags": two 8259s are there as well.
const PCAT_COMPAT: u32 = 1;
/// Value for the reset port: full reset.
const RESET_VALUE: u8 = 6;

/// The tables do not fit where they go, which no supported number of CPUs makes them.
#[derive(Debug, thiserror::Error)]
#[error("the ACPI tables do not fit")]
pub struct Error;

/// Writes the tables of a machine with `cpus` CPUs at [`ACPI_TABLES`], the RSDP first.
///
/// # Errors
/// When they do not fit.
pub fn write(mem: &GuestMem, cpus: u32) -> Result<(), Error> {
    let image = build(cpus);
    if image.len() as u64 > ACPI_TABLES_SIZE {
        return Err(Error);
    }
    mem.write_slice(&image, GuestAddress(ACPI_TABLES))
        .map_err(|_| Error)
}

/// Tables one after the other, as they will lie in guest memory.
struct Image(Vec<u8>);

impl Image {
    /// Appends a table and returns its address.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        self.0.resize(self.0.len().next_multiple_of(16), 0);
        let address = ACPI_TABLES + self.0.len() as u64;
        table.to_aml_bytes(&mut self.0);
        address
    }
}

fn build(cpus: u32) -> Vec<u8> {
    // The RSDP goes first, when the XSDT's address is known.
    let mut image = Image(vec![0; Rsdp::len()]);
    let dsdt = {
        let mut table = Sdt::new(*b"DSDT", 36, 2, OEM, OEM_TABLE, OEM_REVISION);
        table.append_slice(&dsdt::build(cpus));
        image.add(&table)
    };
    let facs = {
        image.0.resize(image.0.len().next_multiple_of(64), 0);
        image.add(&facs())
    };
    let tables = [
        image.add(&fadt(dsdt, facs)),
        image.add(&madt(cpus)),
        image.add(&mcfg()),
    ];
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for table in tables {
        xsdt.add_entry(table);
    }
    let xsdt = image.add(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM, xsdt).to_aml_bytes(&mut rsdp);
    image.0[..rsdp.len()].copy_from_slice(&rsdp);
    image.0
}

/// Firmware control structure: the global lock and the wake-up vector, neither used.
fn facs() -> Table {
    let mut bytes = vec![0; 64];
    bytes[..4].copy_from_slice(b"FACS");
    bytes[4] = 64;
    bytes[32] = 2; // version
    Table(bytes)
}

fn port(address: u16, bits: u8, access: AccessSize) -> GAS {
    GAS::new(AddressSpace::SystemIo, bits, 0, access, u64::from(address))
}

fn fadt(dsdt: u64, facs: u64) -> acpi_tables::fadt::FADT {
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::Wbinvd)
        .flag(Flags::ProcC1)
        .flag(Flags::SlpButton)
        .flag(Flags::FixRtc)
        .flag(Flags::TmrValExt)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Headless)
        .dsdt_64(dsdt)
        .gpe_info(GPE0.into(), 0, GPE0_LEN as u8, 0, 0);
    // Old readers want the 32-bit addresses; both are the same here.
    fadt.dsdt = (dsdt as u32).into();
    fadt.firmware_ctrl = (facs as u32).into();
    fadt.sci_int = (SCI_GSI as u16).into();
    fadt.pm1a_evt_blk = u32::from(PM1A_EVT).into();
    fadt.pm1_evt_len = 4;
    fadt.pm1a_cnt_blk = u32::from(PM1A_CNT).into();
    fadt.pm1_cnt_len = 2;
    fadt.pm_tmr_blk = u32::from(PM_TIMER).into();
    fadt.pm_tmr_len = 4;
    fadt.x_pm1a_evt_blk = port(PM1A_EVT, 32, AccessSize::WordAccess);
    fadt.x_pm1a_cnt_blk = port(PM1A_CNT, 16, AccessSize::WordAccess);
    fadt.x_pm_tmr_blk = port(PM_TIMER, 32, AccessSize::DwordAccess);
    fadt.x_gpe0_blk = port(GPE0, GPE0_LEN as u8 * 8, AccessSize::ByteAccess);
    fadt.p_lvl2_lat = 0xfff.into(); // no C2
    fadt.p_lvl3_lat = 0xfff.into(); // no C3
    fadt.century = rtc::CENTURY;
    fadt.iapc_boot_arch = (NO_VGA | NO_ASPM).into();
    fadt.reset_reg = port(RESET_PORT, 8, AccessSize::ByteAccess);
    fadt.reset_value = RESET_VALUE;
    fadt.finalize()
}

/// "Multiple APIC Description Table": the interrupt controllers.
fn madt(cpus: u32) -> Sdt {
    const LOCAL_APIC: u8 = 0;
    const IO_APIC: u8 = 1;
    const OVERRIDE: u8 = 2;
    const LOCAL_NMI: u8 = 4;
    /// Level-triggered, active high.
    const LEVEL_HIGH: u8 = 0xd;
    /// LINT1 is NMI on all CPUs.
    const ALL_CPUS: u8 = 0xff;
    let mut madt = Sdt::new(*b"APIC", 44, 3, OEM, OEM_TABLE, OEM_REVISION);
    madt.write_u32(36, LAPIC_BASE);
    madt.write_u32(40, PCAT_COMPAT);
    // CPU ids fit a byte: `MAX_CPUS`.
    for id in (0..cpus).map(|id| id as u8) {
        madt.append_slice(&[LOCAL_APIC, 8, id, id, 1, 0, 0, 0]);
    }
    let base = IOAPIC_BASE.to_le_bytes();
    madt.append_slice(&[
        IO_APIC, 12, 0, 0, base[0], base[1], base[2], base[3], 0, 0, 0, 0,
    ]);
    // The timer's line is pin 2 of the I/O APIC; the SCI is level-triggered.
    let sci = SCI_GSI as u8;
    madt.append_slice(&[OVERRIDE, 10, 0, 0, 2, 0, 0, 0, 0, 0]);
    madt.append_slice(&[OVERRIDE, 10, 0, sci, sci, 0, 0, 0, LEVEL_HIGH, 0]);
    madt.append_slice(&[LOCAL_NMI, 6, ALL_CPUS, 0, 0, 1]);
    madt
}

/// A table in bytes.
struct Table(Vec<u8>);

impl Aml for Table {
    fn to_aml_bytes(&self, sink: &mut dyn acpi_tables::AmlSink) {
        sink.vec(&self.0);
    }
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(ECAM_BASE, 0, 0, 0);
    mcfg
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, b| sum.wrapping_add(*b))
    }

    #[test]
    fn every_table_can_be_reached_and_adds_up() {
        for cpus in [1, 2, 254] {
            let mem = memory::create(16 << 20).unwrap();
            write(&mem, cpus).unwrap();
            let bytes = |at: u64, len: usize| {
                let mut bytes = vec![0; len];
                mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
                bytes
            };
            let u64_at = |at| mem.read_obj::<u64>(GuestAddress(at)).unwrap();
            let u32_at = |at| mem.read_obj::<u32>(GuestAddress(at)).unwrap();
            let table = |at: u64| {
                let table = bytes(at, u32_at(at + 4) as usize);
                assert_eq!(sum(&table), 0, "{:?}", &table[..4]);
                table
            };
            let rsdp = bytes(ACPI_TABLES, 36);
            assert_eq!(&rsdp[..8], b"RSD PTR ");
            assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
            let xsdt = table(u64_at(ACPI_TABLES + 24));
            let entries: Vec<u64> = xsdt[36..]
                .chunks_exact(8)
                .map(|e| u64::from_le_bytes(e.try_into().unwrap()))
                .collect();
            let names: Vec<Vec<u8>> = entries.iter().map(|&at| table(at)[..4].to_vec()).collect();
            assert_eq!(names, [b"FACP", b"APIC", b"MCFG"]);
            let fadt = table(entries[0]);
            let dsdt = u64::from_le_bytes(fadt[140..148].try_into().unwrap());
            assert_eq!(&table(dsdt)[..4], b"DSDT");
            assert_eq!(bytes(u32_at(entries[0] + 36).into(), 4), b"FACS");
            assert_eq!(
                table(entries[1]).len(),
                44 + 8 * cpus as usize + 12 + 20 + 6
            );
        }
    }

    /// ACPICA's own compiler, where there is one, must understand the DSDT.
    #[test]
    fn acpica_understands_the_dsdt() {
        let dir = std::env::temp_dir().join(format!("anykvm-acpi-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let image = build(2);
        let at = Rsdp::len().next_multiple_of(16);
        let len = u32::from_le_bytes(image[at + 4..at + 8].try_into().unwrap()) as usize;
        std::fs::write(dir.join("dsdt.aml"), &image[at..at + len]).unwrap();
        let run = |args: &[&str]| {
            std::process::Command::new("iasl")
                .args(args)
                .current_dir(&dir)
                .output()
        };
        match run(&["-d", "dsdt.aml"]) {
            Err(e) => eprintln!("skipped: iasl (Debian: acpica-tools): {e}"),
            Ok(output) => {
                assert!(output.status.success(), "{output:?}");
                let output = run(&["-tc", "dsdt.dsl"]).unwrap();
                let text = String::from_utf8_lossy(&output.stdout).into_owned();
                assert!(
                    output.status.success() && text.contains("0 Errors, 0 Warnings"),
                    "{text}"
                );
            }
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
