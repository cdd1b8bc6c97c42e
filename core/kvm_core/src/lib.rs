//! The virtual machine as KVM defines it: VM, vCPUs, memslots, MSRs, CPUID, clock, irqchip wiring
//! and the main path (`run`), independent of the engine that executes guest code and of the home
//! that hosts it.
//!
//! Start reading at [`vcpu::Vcpu::run`] in `run.rs`.
#![no_std]
extern crate alloc;
#[cfg(test)]
extern crate std;

mod attr;
mod chipset;
mod clock;
mod coalesced;
pub mod cpuid;
mod debug;
pub mod dirty_ring;
pub mod engine;
mod env;
mod events;
pub mod host;
mod hypercall;
mod inflight;
pub mod interp_engine;
pub mod ioctl;
pub mod ioeventfd;
pub mod mce;
mod memory;
pub mod msr;
pub mod msr_filter;
mod nested;
mod paravirt;
mod regs;
mod run;
pub mod run_page;
mod settings;
pub mod shared_memory;
mod smm;
pub mod stats;
pub mod sync;
mod sync_regs;
#[cfg(test)]
mod tests;
pub mod vcpu;
pub mod vm;

pub use memory::Memory;
pub use vcpu::Vcpu;
pub use vm::Vm;
