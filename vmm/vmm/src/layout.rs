//! Where things are in the guest's physical address space and port space.
//!
//! RAM lies in two pieces: from 0 up to [`PCI_HOLE_START`], and the rest from 4 GiB up. The
//! gap holds PCI windows and the interrupt controllers.

/// Initial GDT.
pub const GDT: u64 = 0x500;
/// PVH start info, followed by its module list and memory map.
pub const PVH_START_INFO: u64 = 0x6000;
/// Linux boot parameters ("zero page").
pub const ZERO_PAGE: u64 = 0x7000;
/// `setup_data` chain of the Linux boot protocol.
pub const SETUP_DATA: u64 = 0x8000;
/// Initial page tables: PML4, PDPT and four page directories.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Room for the kernel command line with its NUL.
pub const CMDLINE_MAX: usize = 0x1_0000;
/// Top of conventional memory; the EBDA would be above.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables, RSDP first.
pub const ACPI_TABLES: u64 = 0xe_0000;
/// Room for the ACPI tables.
pub const ACPI_TABLES_SIZE: u64 = 0x2_0000;
/// First byte of extended memory; kernels are loaded from here up.
pub const HIGH_RAM_START: u64 = 0x10_0000;

/// End of the lower piece of RAM and start of the 32-bit PCI window.
pub const PCI_HOLE_START: u64 = 0xc000_0000;
/// Size of the 32-bit PCI window.
pub const PCI_WINDOW32_SIZE: u64 = 0x2000_0000;
/// PCI configuration space (ECAM), one bus.
pub const ECAM_BASE: u64 = 0xe000_0000;
/// Size of the ECAM of one bus.
pub const ECAM_SIZE: u64 = 0x10_0000;
/// I/O APIC.
pub const IOAPIC_BASE: u32 = 0xfec0_0000;
/// Local APICs.
pub const LAPIC_BASE: u32 = 0xfee0_0000;
/// The page that KVM uses for real mode on old Intel CPUs, and the TSS pages after it.
pub const IDENTITY_MAP: u64 = 0xfffb_c000;
/// Three pages for KVM's real-mode TSS.
pub const KVM_TSS: u32 = 0xfffb_d000;
/// End of the reserved pages of KVM.
pub const KVM_RESERVED_END: u64 = 0xfffc_0000;
/// Start of the upper piece of RAM.
pub const FOUR_GIB: u64 = 0x1_0000_0000;

/// COM1.
pub const SERIAL_PORT: u16 = 0x3f8;
/// COM1's interrupt.
pub const SERIAL_GSI: u32 = 4;
/// ACPI PM1a event block (status, enable).
pub const PM1A_EVT: u16 = 0x600;
/// ACPI PM1a control block.
pub const PM1A_CNT: u16 = 0x604;
/// ACPI PM timer.
pub const PM_TIMER: u16 = 0x608;
/// ACPI general-purpose event block 0 (status, enable).
pub const GPE0: u16 = 0x620;
/// Bytes of [`GPE0`].
pub const GPE0_LEN: u16 = 4;
/// ACPI's system control interrupt.
pub const SCI_GSI: u32 = 9;
/// Reset control register.
pub const RESET_PORT: u16 = 0xcf9;
/// First global system interrupt for PCI INTx lines.
pub const INTX_GSI_BASE: u32 = 16;
/// Number of global system interrupts for PCI INTx lines.
pub const INTX_GSIS: u32 = 8;
