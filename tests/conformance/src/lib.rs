//! The harness of the conformance suite: small virtual machines over every engine, driven through
//! KVM's calls, and the little kernels that guest programs stand on.
//!
//! A test writes a guest with iced-x86's assembler, runs it to [`layout::PORT_END`] and compares what
//! it reported ([`layout::PORT_REPORT`]) and what exceptions it took ([`machine::Fault`]) with what the
//! manuals say. The same test runs in the translator, in the interpreter and, as an oracle, on a real
//! `/dev/kvm` where there is one.
//!
//! `ANYKVM_ENGINE=jit|interp|kvm` picks one engine. Without it, what a real `/dev/kvm` does differently
//! is printed and fails nothing, because not every `/dev/kvm` is hardware.

pub mod asm;
pub mod backend;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod tables;
pub mod watchdog;

pub use backend::{Engine, Exit, each, each_but_kvm};
pub use machine::{Fault, Machine};
