//! Tests of AnyKVM from outside: each starts the command `anykvm` as its users do.
//!
//! `cargo run --release -p e2e -- kernels` boots real kernels from Debian's archive and prints a
//! table; `cargo test -p e2e` does a part of that, and runs hostile guests, commands and bad input.

pub mod archive;
pub mod kernels;
pub mod program;
pub mod session;
pub mod small;
pub mod trial;
