//! The virtual machine as KVM defines it: VM, vCPUs, memslots, MSRs, CPUID, clock, irqchip wiring
//! and the main path (`run`), independent of the engine that executes guest code and of the home
//! that hosts it.
#![no_std]
extern crate alloc;

pub mod engine;
