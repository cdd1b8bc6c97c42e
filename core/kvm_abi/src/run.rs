//! The layout of the `kvm_run` mapping.

/// Bytes of a vCPU's mapping (KVM_GET_VCPU_MMAP_SIZE): `kvm_run`, the port-I/O page, the coalesced-MMIO
/// ring.
pub const MMAP_SIZE: usize = 3 * 4096;
/// Offset of the port-I/O data (KVM_PIO_PAGE_OFFSET pages).
pub const PIO_OFFSET: usize = 4096;
/// Offset of the ring of coalesced writes (KVM_COALESCED_MMIO_PAGE_OFFSET pages).
pub const COALESCED_OFFSET: usize = 2 * 4096;
/// Offset of the dirty ring, which is mapped separately (KVM_DIRTY_LOG_PAGE_OFFSET pages).
pub const DIRTY_RING_OFFSET: usize = 64 * 4096;

pub const REQUEST_INTERRUPT_WINDOW: usize = 0;
pub const IMMEDIATE_EXIT: usize = 1;
pub const EXIT_REASON: usize = 8;
pub const READY_FOR_INTERRUPT_INJECTION: usize = 12;
pub const IF_FLAG: usize = 13;
pub const FLAGS: usize = 14;
pub const CR8: usize = 16;
pub const APIC_BASE: usize = 24;
/// The union of the exits' data.
pub const EXIT: usize = 32;
pub const VALID_REGS: usize = 288;
pub const DIRTY_REGS: usize = 296;
pub const SYNC_REGS: usize = 304;

/// `kvm_run::exit_reason`.
pub mod reason {
    pub const UNKNOWN: u32 = 0;
    pub const EXCEPTION: u32 = 1;
    pub const IO: u32 = 2;
    pub const HYPERCALL: u32 = 3;
    pub const DEBUG: u32 = 4;
    pub const HLT: u32 = 5;
    pub const MMIO: u32 = 6;
    pub const IRQ_WINDOW_OPEN: u32 = 7;
    pub const SHUTDOWN: u32 = 8;
    pub const FAIL_ENTRY: u32 = 9;
    pub const INTR: u32 = 10;
    pub const SET_TPR: u32 = 11;
    pub const INTERNAL_ERROR: u32 = 17;
    pub const SYSTEM_EVENT: u32 = 24;
    pub const IOAPIC_EOI: u32 = 26;
    pub const X86_RDMSR: u32 = 29;
    pub const X86_WRMSR: u32 = 30;
    pub const DIRTY_RING_FULL: u32 = 31;
}

/// `kvm_run::io.direction`.
pub const IO_IN: u8 = 0;
/// `kvm_run::io.direction`.
pub const IO_OUT: u8 = 1;

/// `kvm_run::internal.suberror`.
pub mod internal {
    pub const EMULATION: u32 = 1;
    pub const SIMUL_EX: u32 = 2;
    pub const DELIVERY_EV: u32 = 3;
}

/// `kvm_run::kvm_valid_regs`.
pub mod sync {
    pub const REGS: u64 = 1;
    pub const SREGS: u64 = 2;
    pub const EVENTS: u64 = 4;
    pub const ALL: u64 = 7;
}

/// `kvm_run::flags`: the vCPU is in SMM.
pub const FLAG_SMM: u16 = 1;

/// `kvm_run::emulation_failure.flags`: the instruction's bytes are there.
pub const EMULATION_FLAG_BYTES: u64 = 1;

/// Reasons of user-space MSR exits.
pub mod msr_reason {
    /// KVM_MSR_EXIT_REASON_VALID_MASK
    pub const VALID: u32 = 7;
    pub const INVAL: u32 = 1;
    pub const UNKNOWN: u32 = 2;
    pub const FILTER: u32 = 4;
}
