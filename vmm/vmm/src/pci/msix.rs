//! MSI-X: the table of messages, masks and pending bits. See "MSI-X Capability and Table
//! Structures" in the PCI specification.
//!
//! A message goes to the engine by `KVM_SIGNAL_MSI`: one call from the device's thread, and
//! no routing entries that could go stale when the guest rewrites its table.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_bindings::kvm_msi;

use crate::hypervisor::Vm;

/// Bytes of a table entry.
pub const ENTRY_SIZE: usize = 16;
/// `Message Control`: MSI-X is on.
const ENABLE: u16 = 1 << 15;
/// `Message Control`: all vectors are masked.
const FUNCTION_MASK: u16 = 1 << 14;
const VECTOR_MASKED: u8 = 1;

/// The MSI-X state of a function, shared by its configuration and its queues' threads.
pub struct Msix {
    vm: Option<Arc<Vm>>,
    state: Mutex<State>,
}

struct State {
    control: u16,
    table: Vec<[u8; ENTRY_SIZE]>,
    pending: Vec<bool>,
}

impl Msix {
    /// A table of `vectors` masked entries; messages go to `vm`, or nowhere in tests.
    #[must_use]
    pub fn new(vm: Option<Arc<Vm>>, vectors: u16) -> Self {
        let mut entry = [0; ENTRY_SIZE];
        entry[12] = VECTOR_MASKED;
        let vectors = usize::from(vectors);
        let state = State {
            control: 0,
            table: vec![entry; vectors],
            pending: vec![false; vectors],
        };
        Self {
            vm,
            state: Mutex::new(state),
        }
    }

    /// Number of vectors.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        self.lock().table.len() as u16
    }

    /// Whether the guest uses MSI-X rather than INTx.
    #[must_use]
    pub fn enabled(&self) -> bool {
        self.lock().control & ENABLE != 0
    }

    /// The guest writes `Message Control`.
    pub fn set_control(&self, control: u16) {
        let mut state = self.lock();
        state.control = control & (ENABLE | FUNCTION_MASK);
        for vector in 0..state.table.len() {
            self.deliver_pending(&mut state, vector);
        }
    }

    /// Sends the message of `vector`, or keeps it pending while masked.
    pub fn trigger(&self, vector: u16) {
        let mut state = self.lock();
        if let Some(pending) = state.pending.get_mut(usize::from(vector)) {
            *pending = true;
            self.deliver_pending(&mut state, usize::from(vector));
        }
    }

    /// The guest reads the table.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (byte, at) in data.iter_mut().zip(0u64..) {
            *byte = state.entry_byte(offset.saturating_add(at)).unwrap_or(0);
        }
    }

    /// The guest writes the table.
    pub fn table_write(&self, offset: u64, data: &[u8]) {
        let mut state = self.lock();
        for (&value, at) in data.iter().zip(0u64..) {
            let at = offset.saturating_add(at);
            let (entry, field) = ((at / 16) as usize, (at % 16) as usize);
            if let Some(entry) = state.table.get_mut(entry) {
                match field {
                    0..12 => entry[field] = value,
                    12 => entry[field] = value & VECTOR_MASKED,
                    _ => {}
                }
            }
        }
        // A message is sent when the mask goes, with all of the entry written.
        self.deliver_pending(&mut state, (offset / 16) as usize);
    }

    /// The guest reads the pending bits.
    pub fn pending_read(&self, offset: u64, data: &mut [u8]) {
        let state = self.lock();
        for (byte, at) in data.iter_mut().zip(0u64..) {
            let first = offset.saturating_add(at).saturating_mul(8);
            *byte = (0..8u64)
                .filter(|bit| {
                    let vector = usize::try_from(first.saturating_add(*bit)).unwrap_or(usize::MAX);
                    state.pending.get(vector).copied().unwrap_or(false)
                })
                .fold(0, |byte, bit| byte | 1 << bit);
        }
    }

    fn deliver_pending(&self, state: &mut State, vector: usize) {
        let (Some(entry), Some(&true)) = (state.table.get(vector), state.pending.get(vector))
        else {
            return;
        };
        if state.control & (ENABLE | FUNCTION_MASK) != ENABLE || entry[12] & VECTOR_MASKED != 0 {
            return;
        }
        let dword = |at: usize| {
            u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]])
        };
        let msi = kvm_msi {
            address_lo: dword(0),
            address_hi: dword(4),
            data: dword(8),
            ..Default::default()
        };
        state.pending[vector] = false;
        if let Some(vm) = &self.vm
            && let Err(e) = vm.signal_msi(msi)
        {
            // The guest chose a message that is no interrupt.
            log::debug!("message-signalled interrupt {msi:x?}: {e}");
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn entry_byte(&self, at: u64) -> Option<u8> {
        self.table
            .get(usize::try_from(at / 16).ok()?)
            .map(|entry| entry[(at % 16) as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pending(msix: &Msix) -> u8 {
        let mut data = [0];
        msix.pending_read(0, &mut data);
        data[0]
    }

    #[test]
    fn masked_messages_wait() {
        let msix = Msix::new(None, 3);
        msix.trigger(1);
        assert_eq!(pending(&msix), 2, "MSI-X is off");
        msix.set_control(ENABLE);
        assert_eq!(pending(&msix), 2, "the vector is masked");
        msix.table_write(ENTRY_SIZE as u64 + 12, &[0; 4]);
        assert_eq!(pending(&msix), 0);
        msix.set_control(ENABLE | FUNCTION_MASK);
        msix.trigger(1);
        assert_eq!(pending(&msix), 2, "the function is masked");
        msix.set_control(ENABLE);
        assert_eq!(pending(&msix), 0);
        msix.trigger(900);
        msix.table_write(u64::MAX, &[1; 8]);
        msix.table_read(u64::MAX - 3, &mut [0; 8]);
        msix.pending_read(u64::MAX - 3, &mut [0; 8]);
    }
}
