//! QEMU from Debian, unmodified, over AnyKVM: `cargo run --release -p qemu_e2e` runs every case and
//! prints a table, `cargo test -p qemu_e2e` a short part of them.
//!
//! A case starts QEMU, drives it over QMP and the guest's serial console, and looks at last whether
//! the guest still works. The guests are Debian's kernels with busybox; QEMU, firmware and boot
//! loaders are Debian's packages, unpacked into a cache without root.

pub mod cases;
pub mod debian;
pub mod disk;
pub mod emulator;
pub mod error;
pub mod guest;
pub mod qmp;
pub mod rsp;
pub mod vm;
