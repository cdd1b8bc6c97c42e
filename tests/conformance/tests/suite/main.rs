//! The conformance suite: see the crate's documentation.
#![recursion_limit = "512"]

mod code;
mod exceptions;
mod paging;
mod smp;
