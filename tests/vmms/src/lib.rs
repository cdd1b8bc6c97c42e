//! Published software that knows nothing of AnyKVM, over AnyKVM: the tests of the crate `kvm-ioctls`, the
//! VMM `alioth` booting Linux, libkrun, libvirt driving QEMU. `cargo run --release -p vmms_e2e` runs all of it,
//! `cargo test -p vmms_e2e` what does not take long.
//!
//! Each part fetches what it needs: crates with cargo, Debian's packages with apt.

pub mod alioth;
pub mod kvm_ioctls;
pub mod libkrun;
pub mod libvirt;
mod terminal;

use qemu_e2e::error::Error;

/// Why a part did not run or did not pass.
#[derive(Debug)]
pub enum Outcome {
    /// What it needs is not to be had here.
    Skipped(String),
    /// It failed.
    Failed(Error),
}

impl<E: Into<Error>> From<E> for Outcome {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Skipped(why) => write!(f, "skipped: {why}"),
            Self::Failed(error) => error.fmt(f),
        }
    }
}
