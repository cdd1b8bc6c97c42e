//! VMs with the reference engine, in a home of nothing but memory.

mod dirty;
mod fake;
mod irqchip;
mod slots;
mod stats;
