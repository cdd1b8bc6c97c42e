//! The `anykvm` command: its options, the default guest, the terminal, and what `check` finds out.
//! The virtual machine itself is the crate `vmm`.

pub mod bench;
pub mod check;
pub mod cli;
pub mod disk;
pub mod error;
pub mod exec;
pub mod guest;
pub mod options;
pub mod progress;
pub mod run;
pub mod scratch;
pub mod terminal;

pub use error::Error;
