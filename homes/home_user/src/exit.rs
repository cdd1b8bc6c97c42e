//! What a run of a vCPU ended with, read from its `kvm_run`.
#![expect(unsafe_code, reason = "kvm_run and the port data are one mapping")]

use kvm_abi::run::{self, reason};
use kvm_bindings::kvm_debug_exit_arch;
use kvm_core::run_page::RunPage;

/// Why [`Vcpu::run`](crate::Vcpu::run) returned; the variants of kvm-ioctls' `VcpuExit` that x86 has.
#[derive(Debug)]
pub enum VcpuExit<'a> {
    /// OUT: port and data.
    IoOut(u16, &'a [u8]),
    /// IN: port and where to put the data.
    IoIn(u16, &'a mut [u8]),
    /// A read outside RAM: address and where to put the data.
    MmioRead(u64, &'a mut [u8]),
    /// A write outside RAM: address and data.
    MmioWrite(u64, &'a [u8]),
    /// KVM_EXIT_UNKNOWN
    Unknown,
    /// KVM_EXIT_EXCEPTION
    Exception,
    /// KVM_EXIT_DEBUG
    Debug(kvm_debug_exit_arch),
    /// KVM_EXIT_HLT; only without an in-kernel local APIC.
    Hlt,
    /// KVM_EXIT_IRQ_WINDOW_OPEN
    IrqWindowOpen,
    /// KVM_EXIT_SHUTDOWN: a triple fault.
    Shutdown,
    /// KVM_EXIT_FAIL_ENTRY: hardware reason and CPU.
    FailEntry(u64, u32),
    /// KVM_EXIT_INTR
    Intr,
    /// KVM_EXIT_SET_TPR
    SetTpr,
    /// KVM_EXIT_INTERNAL_ERROR
    InternalError,
    /// KVM_EXIT_SYSTEM_EVENT: type and data.
    SystemEvent(u32, &'a [u64]),
    /// KVM_EXIT_IOAPIC_EOI
    IoapicEoi(u8),
    /// An exit reason that has no variant.
    Unsupported(u32),
}

fn u32_at(page: &RunPage, offset: usize) -> u32 {
    let mut b = [0; 4];
    page.read(offset, &mut b);
    u32::from_ne_bytes(b)
}

/// The exit that `page` describes.
///
/// # Safety
/// Nobody else may access the page for as long as the result lives.
pub unsafe fn decode(page: &RunPage) -> VcpuExit<'_> {
    let bytes = |offset: usize, len: usize| {
        // SAFETY: offset + len is within the mapping at every use below; the caller promises that
        // the borrow is the only access.
        unsafe { core::slice::from_raw_parts_mut(page.base().as_ptr().add(offset), len) }
    };
    match u32_at(page, run::EXIT_REASON) {
        reason::IO => {
            let mut head = [0; 6];
            page.read(run::EXIT, &mut head);
            let port = u16::from_ne_bytes([head[2], head[3]]);
            let count = usize::from(u16::from_ne_bytes([head[4], head[5]]));
            let len = usize::from(head[1]) * count;
            let data = bytes(run::PIO_OFFSET, len.min(run::MMAP_SIZE - run::PIO_OFFSET));
            if head[0] == run::IO_OUT {
                VcpuExit::IoOut(port, data)
            } else {
                VcpuExit::IoIn(port, data)
            }
        }
        reason::MMIO => {
            let gpa = page.u64(run::EXIT);
            let len = u32_at(page, run::EXIT + 16).min(8) as usize;
            let data = bytes(run::EXIT + 8, len);
            if page.u8(run::EXIT + 20) != 0 {
                VcpuExit::MmioWrite(gpa, data)
            } else {
                VcpuExit::MmioRead(gpa, data)
            }
        }
        reason::DEBUG => VcpuExit::Debug(kvm_debug_exit_arch {
            exception: u32_at(page, run::EXIT),
            pad: 0,
            pc: page.u64(run::EXIT + 8),
            dr6: page.u64(run::EXIT + 16),
            dr7: page.u64(run::EXIT + 24),
        }),
        reason::UNKNOWN => VcpuExit::Unknown,
        reason::EXCEPTION => VcpuExit::Exception,
        reason::HLT => VcpuExit::Hlt,
        reason::IRQ_WINDOW_OPEN => VcpuExit::IrqWindowOpen,
        reason::SHUTDOWN => VcpuExit::Shutdown,
        reason::FAIL_ENTRY => VcpuExit::FailEntry(page.u64(run::EXIT), 0),
        reason::INTR => VcpuExit::Intr,
        reason::SET_TPR => VcpuExit::SetTpr,
        reason::INTERNAL_ERROR => VcpuExit::InternalError,
        reason::IOAPIC_EOI => VcpuExit::IoapicEoi(page.u8(run::EXIT)),
        reason::SYSTEM_EVENT => VcpuExit::SystemEvent(u32_at(page, run::EXIT), &[]),
        other => VcpuExit::Unsupported(other),
    }
}
