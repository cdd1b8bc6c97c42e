//! The virtual machine as KVM defines it: VM, vCPUs, memslots, MSRs, CPUID, clock, irqchip wiring
//! and the main path (`run`), independent of the engine that executes guest code and of the home
//! that hosts it.
//!
//! Start reading at [`vcpu::Vcpu::run`] in `run.rs`.
#![no_std]
extern crate alloc;
#[cfg(test)]
extern crate std;

mod chipset;
mod clock;
mod coalesced;
pub mod cpuid;
mod debug;
pub mod dirty_ring;
pub mod engine;
mod env;
pub mod host;
mod hypercall;
mod inflight;
pub mod interp_engine;
pub mod ioctl;
pub mod ioeventfd;
mod memory;
pub mod msr;
mod paravirt;
mod regs;
mod run;
pub mod run_page;
pub mod shared_memory;
pub mod stats;
pub mod sync;
#[cfg(test)]
mod tests;
pub mod vcpu;
pub mod vm;

pub use memory::Memory;
pub use vcpu::Vcpu;
pub use vm::Vm;
