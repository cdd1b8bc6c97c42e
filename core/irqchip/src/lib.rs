#![no_std]
//! KVM's in-kernel irqchip as pure state machines: no clock, no locks, no I/O, no `unsafe`.
//!
//! Every device is a plain `Send` struct driven through `&mut self`; the caller owns locking,
//! timers and the waking of vCPUs. Time comes in as an argument: [`Now`] for the local APIC
//! (nanoseconds and guest TSC), monotonic nanoseconds for the PIT. Every register access and every
//! restored state is hostile: nothing panics and nothing overflows.
//!
//! # The pieces
//!
//! | type | what it is | how many, which lock |
//! |---|---|---|
//! | [`Lapic`] | local APIC, xAPIC and x2APIC, with its timer | one per vCPU, a lock each |
//! | [`Ioapic`] | 82093AA, 24 pins | one, in the chipset lock |
//! | [`Pic`] | 8259A pair with ELCR | one, in the chipset lock |
//! | [`Pit`] | 8254 and port 0x61 | one, in the chipset lock |
//! | [`RoutingTable`] | GSI to PIC line, IOAPIC pin, MSI or SynIC source | one, in the chipset lock |
//! | [`for_each_target`] | which vCPUs an [`ApicMessage`] addresses | works on [`Destination`] snapshots |
//!
//! # How they connect
//!
//! * **A GSI changes level** (`KVM_IRQ_LINE`, irqfd, the PIT): [`RoutingTable::lookup`]; for each
//!   target, [`Pic::set_irq`] then look at [`Pic::output`], or [`Ioapic::set_irq`] then send the
//!   message in the [`PinOutcome`], or (level 1 only) [`Msi::message`].
//! * **An [`ApicMessage`] is sent:** [`for_each_target`] over the [`Lapic::destination`] snapshots
//!   (cache them; an [`Effect::DestinationChanged`] says when one is stale), then [`Lapic::accept`]
//!   on each target, acting on the returned [`Accepted`]. If no target accepted a message that an
//!   IOAPIC pin sent, call [`Ioapic::not_accepted`] so that a level interrupt may try again.
//! * **A vCPU enters the guest:** [`Lapic::expire`] if its deadline passed, then
//!   [`Lapic::highest_pending`] and, when it injects, [`Lapic::ack`]. ExtINT: if
//!   [`Lapic::accepts_pic`] and [`Pic::output`], the vector is [`Pic::ack`].
//! * **The guest writes its local APIC:** [`Lapic::mmio_write`] or [`Lapic::msr_write`] give an
//!   [`Effect`]: an IPI to send, an EOI, a timer to re-arm ([`Lapic::next_deadline`]), and so on.
//! * **An EOI** ([`Effect::Eoi`]): for each pin of [`Ioapic::pins_with_vector`], notify that pin's
//!   GSI ([`RoutingTable::gsi_of`]: irqfd resampling, [`Pit::ack`]) and then call
//!   [`Ioapic::eoi_pin`] if [`EndOfInterrupt::broadcast`]; it may return a message, because a
//!   level line still asserted is sent again. [`Ioapic::eoi`] does it all when nobody listens. Likewise the PIC: after each port
//!   write, or [`Pic::ack`], [`Pic::take_acked`] is the mask of lines just acknowledged.
//! * **The PIT:** arm a timer at [`Pit::next_irq_deadline_ns`]; when it fires, [`Pit::expire`]
//!   tells how many pulses (level 1, then 0) to give the GSI; [`Pit::ack`] may ask for one more.
//!
//! # Differences from Linux KVM
//!
//! All on the side of the data sheets: illegal vectors set the local APIC's error status; x2APIC
//! writes fault on the reserved bits of TPR, EOI, SVR and the divide configuration; a
//! lowest-priority interrupt goes to a vCPU that exists and is enabled even where KVM's vector hash
//! would pick none and drop it; the 8259 has a special mask mode, clears its in-service bits on
//! ICW1, and sets one on a poll; the 8254 counts in BCD when asked to, and its gate stops it. The
//! RTC's coalescing tracker is not modelled. `tests/against_kvm.rs` compares the rest with a real
//! `/dev/kvm`.
extern crate alloc;
#[cfg(test)]
extern crate std;

mod delivery;
pub mod ioapic;
pub mod lapic;
mod message;
pub mod pic;
pub mod pit;
mod routing;
#[cfg(test)]
mod tests;

pub use delivery::{
    DeliveryPolicy, Destination, LowestPriority, X2APIC_BROADCAST, XAPIC_BROADCAST, for_each_target,
};
pub use ioapic::{Ioapic, IoapicState, PinOutcome};
pub use lapic::{
    Accepted, Deadline, Effect, EndOfInterrupt, GeneralProtection, LAPIC_STATE_SIZE, Lapic,
    LapicConfig, Lvt, Now, WrongApicId,
};
pub use message::{ApicMessage, DeliveryMode, DestMode, IrqSource, Msi, Shorthand, Trigger};
pub use pic::{LineOutcome, Pic, PicState};
pub use pit::{Pit, PitChannelState, PitState};
pub use routing::{MAX_ROUTES, Route, RouteError, RouteTarget, RoutingTable};
