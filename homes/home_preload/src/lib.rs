//! The drop-in `/dev/kvm` for programs that use a C library: `LD_PRELOAD`ed, it stands in front of the
//! functions through which such a program reaches KVM, and leaves everything else to the C library.
//!
//! What it stands in for: opening and looking at `/dev/kvm` (`path`) and
//! `/sys/module/kvm*/parameters` (`parameters`), ioctl and the end of descriptors
//! (`descriptor`), sigaction (`signal`). The work is done by `home_user::process`. A program that never
//! opens `/dev/kvm` pays a comparison per such call: nothing is allocated, no thread started, no handler
//! installed.
//!
//! Set by `anykvm exec`: `ANYKVM_ENGINE` (jit, interp), `ANYKVM_LOG` (off, error, warn, info, debug, trace).
#![expect(unsafe_code, reason = "stands in for functions of the C library")]

mod descriptor;
mod parameters;
mod path;
mod real;
mod settings;
mod signal;
