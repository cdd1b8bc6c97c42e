//! The conformance suite: see the crate's documentation.
#![recursion_limit = "512"]

mod calls;
mod code;
mod exceptions;
mod groups;
mod interrupts;
mod memslots;
mod modes;
mod paging;
mod smp;
mod window_places;
mod windows;
