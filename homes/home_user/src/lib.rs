//! AnyKVM inside a user process: a virtual machine monitor links this crate and gets KVM without
//! `/dev/kvm`.
//!
//! [`System`], [`Vm`] and [`Vcpu`] have the methods, names and types (`kvm_bindings`) of `Kvm`, `VmFd`
//! and `VcpuFd` of kvm-ioctls, so that a VMM can hold both behind an enum. Where KVM looks for pending
//! signals there is [`Kicker`], and [`interrupt_current`] for handlers of signals that are there already.
//!
//! One thread per VM serves irqfds and timers; vCPUs run on the threads that call [`Vcpu::run`].

mod abi;
mod events;
mod exit;
mod host;
mod interrupt;
mod native;
pub mod process;
mod system;
mod vcpu;
mod vm;
mod waiter;

pub use exit::VcpuExit;
pub use interrupt::interrupt_current;
pub use kvm_abi::Errno;
pub use native::Native;
pub use system::{EngineKind, System};
pub use vcpu::{Kicker, Vcpu};
pub use vm::{IoEventAddress, NoDatamatch, Vm};
