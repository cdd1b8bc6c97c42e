//! What a run ended with, read from the vCPU's run area (`struct kvm_run`).
#![expect(unsafe_code, reason = "reads unions and data beside them")]

use kvm_bindings::{
    KVM_EXIT_DEBUG, KVM_EXIT_FAIL_ENTRY, KVM_EXIT_HLT, KVM_EXIT_INTERNAL_ERROR, KVM_EXIT_INTR,
    KVM_EXIT_IO, KVM_EXIT_IO_OUT, KVM_EXIT_IRQ_WINDOW_OPEN, KVM_EXIT_MMIO, KVM_EXIT_SHUTDOWN,
    KVM_EXIT_SYSTEM_EVENT, kvm_run,
};

use super::Exit;

/// Decodes the exit that `area` describes.
///
/// # Safety
/// `area` is a run area that the engine has filled in, it stays mapped for `'a`, and nobody
/// else touches it meanwhile.
pub(super) unsafe fn decode<'a>(area: *mut kvm_run) -> Exit<'a> {
    // SAFETY: the caller promises that the area is live and ours.
    let run = unsafe { &mut *area };
    match run.exit_reason {
        KVM_EXIT_IO => {
            // SAFETY: `io` is the union's member for this exit reason.
            let io = unsafe { run.__bindgen_anon_1.io };
            let len = usize::from(io.size) * io.count as usize;
            // SAFETY: KVM's interface promises `len` bytes at `data_offset` inside the mapping,
            // beyond `kvm_run` itself.
            let data = unsafe {
                let start = area.cast::<u8>().add(io.data_offset as usize);
                std::slice::from_raw_parts_mut(start, len)
            };
            if u32::from(io.direction) == KVM_EXIT_IO_OUT {
                Exit::IoOut {
                    port: io.port,
                    size: io.size,
                    data,
                }
            } else {
                Exit::IoIn {
                    port: io.port,
                    size: io.size,
                    data,
                }
            }
        }
        KVM_EXIT_MMIO => {
            // SAFETY: `mmio` is the union's member for this exit reason.
            let mmio = unsafe { &mut run.__bindgen_anon_1.mmio };
            let len = (mmio.len as usize).min(mmio.data.len());
            let data = &mut mmio.data[..len];
            if mmio.is_write != 0 {
                Exit::MmioWrite {
                    addr: mmio.phys_addr,
                    data,
                }
            } else {
                Exit::MmioRead {
                    addr: mmio.phys_addr,
                    data,
                }
            }
        }
        KVM_EXIT_HLT => Exit::Hlt,
        KVM_EXIT_SHUTDOWN => Exit::Shutdown,
        KVM_EXIT_SYSTEM_EVENT => {
            // SAFETY: `system_event` is the union's member for this exit reason.
            Exit::SystemEvent(unsafe { run.__bindgen_anon_1.system_event.type_ })
        }
        KVM_EXIT_INTR | KVM_EXIT_IRQ_WINDOW_OPEN => Exit::Intr,
        KVM_EXIT_DEBUG => Exit::Debug,
        KVM_EXIT_INTERNAL_ERROR => {
            // SAFETY: `internal` is the union's member for this exit reason.
            let internal = unsafe { run.__bindgen_anon_1.internal };
            let count = (internal.ndata as usize).min(internal.data.len());
            Exit::InternalError {
                suberror: internal.suberror,
                data: internal.data[..count].to_vec(),
            }
        }
        KVM_EXIT_FAIL_ENTRY => {
            // SAFETY: `fail_entry` is the union's member for this exit reason.
            let entry = unsafe { run.__bindgen_anon_1.fail_entry };
            Exit::FailEntry(entry.hardware_entry_failure_reason)
        }
        other => Exit::Unknown(other),
    }
}
