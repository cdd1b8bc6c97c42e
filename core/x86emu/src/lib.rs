#![no_std]
//! See the crate description; filled in below.
extern crate alloc;
