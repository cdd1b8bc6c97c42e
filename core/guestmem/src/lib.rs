//! Guest memory as memslots describe it.
//!
//! A [`MemView`] is an immutable snapshot of a VM's memslots, sorted by guest-physical address.
//! Changing a slot makes a new snapshot ([`MemView::with_region`]), which the VM swaps in; readers
//! keep the `Arc` they have until they are told to take the new one. The dirty bitmap of a slot is
//! shared by all snapshots that contain the slot.
//!
//! Guest memory is shared with vCPUs and with user space, which may write at any time. So it is never
//! borrowed as a slice: it is reached by raw pointers with volatile or atomic accesses only.
#![no_std]
extern crate alloc;
#[cfg(test)]
extern crate std;

mod access;
mod dirty;
mod slots;

pub mod probe;

pub use access::{copy_from_guest, copy_to_guest, exchange_guest};
pub use dirty::DirtyLog;
pub use slots::{Change, MAX_SLOTS, MemSlot, MemView, Region, RegionError, SlotHint, flags};

/// Bytes per page of guest memory as KVM counts it.
pub const PAGE_SIZE: u64 = 4096;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` further on, or `None` where it wraps.
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map(Self)
            }
            /// Offset within the 4 KiB page.
            pub fn page_offset(self) -> u64 {
                self.0 & (PAGE_SIZE - 1)
            }
        }
    };
}
address!(
    /// A guest-physical address.
    Gpa
);
address!(
    /// A guest-virtual (linear) address.
    Gva
);
address!(
    /// An address in the process that owns the VM.
    Hva
);
