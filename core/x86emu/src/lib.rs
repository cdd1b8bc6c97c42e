//! The x86-64 processor in software, one instruction at a time.
//!
//! [`state::CpuState`] is the architectural state of one vCPU, shared by every engine.
//! [`step`] executes exactly one instruction (or one batch of a `rep` string instruction) on it;
//! [`event`] delivers exceptions and interrupts; [`paging`] walks guest page tables;
//! [`encoding`] takes instructions apart byte by byte and puts them together again with other
//! operands, so that arithmetic runs on the host CPU instead of being written again here.
//!
//! The interpreter has three jobs: the translator's slow path and single step, MMIO emulation for
//! the hardware engines, and the reference of the differential tests.
//!
//! Everything that is not the CPU itself comes through [`env::Env`].
#![no_std]
extern crate alloc;
#[cfg(test)]
extern crate std;
// Test files shared with the home name this crate from outside.
#[cfg(test)]
extern crate self as x86emu;

pub mod bits;
pub mod control;
pub mod encoding;
pub mod env;
pub mod event;
pub mod interp;
pub mod mem;
pub mod paging;
pub mod segment;
pub mod smm;
mod stack;
pub mod state;
pub mod system;
pub mod task;
pub mod transfer;

#[cfg(test)]
mod tests;
