//! The Linux kernel's own KVM selftests, over AnyKVM: fetched from Debian as source, built, and run with
//! `anykvm exec`.
//!
//! `cargo run --release -p selftests` runs them all and says which result was not expected;
//! `cargo test -p selftests` runs a quick part.

pub mod catalog;
pub mod report;
pub mod run;
pub mod source;
