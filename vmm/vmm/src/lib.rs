//! The virtual machine monitor of AnyKVM.
//!
//! A [`machine::Machine`] is a PC with PCI, ACPI and virtio devices that boots a kernel
//! directly. It reaches the engine that runs it only through [`hypervisor`], which is KVM's
//! interface; so a real `/dev/kvm` and the software engine are interchangeable at run time.

pub mod acpi;
pub mod boot;
pub mod channel;
pub mod chipset;
mod cpuid;
mod entropy;
pub mod heap;
pub mod hypervisor;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod pci;
mod poll;
pub mod virtio;
