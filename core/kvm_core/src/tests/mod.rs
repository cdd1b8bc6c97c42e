//! VMs with the reference engine, in a home of nothing but memory.

mod dirty;
mod events;
mod fake;
mod irqchip;
mod msr;
mod slots;
mod smm;
mod state;
mod stats;
mod sync_regs;
