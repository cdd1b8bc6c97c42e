//! A VM's memslots: the current snapshot, its replacement, and access to guest memory on the VM's own
//! behalf.
#![expect(
    unsafe_code,
    reason = "guest memory is reached through raw host pointers"
)]

use crate::dirty_ring::DirtyPage;
use crate::sync::Mutex;
use crate::vcpu::VcpuShared;
use alloc::sync::Arc;
use core::sync::atomic::{AtomicU64, Ordering};
use guestmem::{MemView, PAGE_SIZE, SlotHint};
use x86emu::env::RamRange;

/// The memslots of a VM.
pub struct Memory {
    view: Mutex<Arc<MemView>>,
    generation: AtomicU64,
}

impl Default for Memory {
    fn default() -> Self {
        Memory {
            view: Mutex::new(Arc::new(MemView::default())),
            generation: AtomicU64::new(1),
        }
    }
}

impl Memory {
    /// The current snapshot.
    pub fn view(&self) -> Arc<MemView> {
        self.view.lock().clone()
    }

    /// Counts the snapshots; changes after a new one is in place.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Puts a new snapshot in place. Changes are serialized by the caller.
    pub(crate) fn replace(&self, view: MemView) {
        let view = Arc::new(view);
        let old = core::mem::replace(&mut *self.view.lock(), view);
        self.generation.fetch_add(1, Ordering::AcqRel);
        drop(old);
    }
}

/// One reader's copy of the snapshot, renewed when it is out of date.
pub struct Reader {
    view: Arc<MemView>,
    generation: u64,
    hint: SlotHint,
    /// Whose dirty ring gets the pages that are written.
    vcpu: Option<Arc<VcpuShared>>,
}

impl Reader {
    /// A reader of `memory`.
    pub fn new(memory: &Memory) -> Self {
        Reader {
            generation: memory.generation(),
            view: memory.view(),
            hint: SlotHint::default(),
            vcpu: None,
        }
    }

    /// A vCPU's reader of `memory`.
    pub fn for_vcpu(memory: &Memory, vcpu: &Arc<VcpuShared>) -> Self {
        let vcpu = vcpu.dirty_ring().is_some().then(|| vcpu.clone());
        Reader {
            vcpu,
            ..Reader::new(memory)
        }
    }

    /// The slot that holds `gpa`, as host memory that is not there any more or (`write`) not writable:
    /// why [`Self::host_ptr`] gave no pointer. Asks the slots that were looked at then: others may be there by
    /// now.
    pub fn faults(&self, gpa: u64, write: bool) -> bool {
        self.view
            .find(gpa, &self.hint)
            .is_some_and(|slot| !(write && slot.read_only()))
    }

    fn renew(&mut self, memory: &Memory) {
        let generation = memory.generation();
        if generation != self.generation {
            self.generation = generation;
            self.view = memory.view();
        }
    }

    /// See [`MemView::host_ptr`]. The host page was there a moment ago.
    pub fn host_ptr(
        &mut self,
        memory: &Memory,
        gpa: u64,
        len: usize,
        write: bool,
    ) -> Option<*mut u8> {
        self.renew(memory);
        let newly = |slot, page| {
            if let Some(vcpu) = &self.vcpu
                && let Some(ring) = vcpu.dirty_ring()
                && ring.push(DirtyPage { slot, page })
            {
                vcpu.kick();
            }
        };
        self.view
            .host_ptr_telling(gpa, len, write, &self.hint, newly)
            // SAFETY: the pointer is a slot's; making vCPUs, the home has put its handler in place.
            .filter(|&p| unsafe { guestmem::probe::accessible(p, write) })
    }

    /// The memslot around `gpa`.
    pub fn ram_around(&mut self, memory: &Memory, gpa: u64) -> Option<RamRange> {
        self.renew(memory);
        let slot = self.view.find(gpa, &self.hint)?;
        Some(RamRange {
            gpa: slot.gpa,
            size: slot.size,
            host: slot.hva,
            quiet: !slot.read_only() && slot.dirty.is_none(),
        })
    }

    /// Reads guest memory; `false` where part of it is not RAM.
    pub fn read(&mut self, memory: &Memory, gpa: u64, out: &mut [u8]) -> bool {
        let mut done = 0;
        while done < out.len() {
            let Some((gpa, len)) = step(gpa, done, out.len()) else {
                return false;
            };
            let Some(p) = self.host_ptr(memory, gpa, len, false) else {
                return false;
            };
            // SAFETY: user space keeps memslots mapped as long as they exist; `len` bytes at `p` are
            // in one slot of a snapshot that was current just now.
            unsafe { guestmem::copy_from_guest(p, &mut out[done..done + len]) };
            done += len;
        }
        true
    }

    /// Writes guest memory; `false` where part of it is not writable RAM.
    pub fn write(&mut self, memory: &Memory, gpa: u64, data: &[u8]) -> bool {
        let mut done = 0;
        while done < data.len() {
            let Some((gpa, len)) = step(gpa, done, data.len()) else {
                return false;
            };
            let Some(p) = self.host_ptr(memory, gpa, len, true) else {
                return false;
            };
            // SAFETY: as in `read`; the slot is writable.
            unsafe { guestmem::copy_to_guest(p, &data[done..done + len]) };
            done += len;
        }
        true
    }

    /// Replaces a byte of guest memory in one atomic operation; what was there before. `None`: not
    /// writable RAM.
    pub fn exchange(&mut self, memory: &Memory, gpa: u64, value: u8) -> Option<u8> {
        let p = self.host_ptr(memory, gpa, 1, true)?;
        // SAFETY: as in `write`.
        Some(unsafe { guestmem::exchange_guest(p, value) })
    }
}

/// The part of an access that starts `done` bytes in and stays within one page.
fn step(gpa: u64, done: usize, total: usize) -> Option<(u64, usize)> {
    let gpa = gpa.checked_add(done as u64)?;
    let in_page = (PAGE_SIZE - gpa % PAGE_SIZE) as usize;
    Some((gpa, in_page.min(total - done)))
}
