//! What the fuzz targets in `fuzz/` do with their input: one module per surface that takes
//! hostile input. `tests/smoke.rs` feeds them all with a seeded generator on a stable compiler;
//! `cargo fuzz` explores them (see `fuzz/README.md`).

pub mod devices;
pub mod dropin;
pub mod encoding;
pub mod frames;
pub mod guest;
pub mod input;
pub mod interpret;
pub mod irqchip;
pub mod kvm_calls;
pub mod loaders;
pub mod machine;
mod programs;
pub mod translate;

/// A fuzz target.
pub struct Target {
    /// Its name: that of the module, of the file in `fuzz/fuzz_targets` and of the corpus.
    pub name: &'static str,
    /// Feeds it one input.
    pub run: fn(&[u8]),
    /// Inputs to start from.
    pub seeds: fn() -> Vec<Vec<u8>>,
}

macro_rules! targets {
    ($($name:ident),* $(,)?) => {
        /// All of them.
        pub const TARGETS: &[Target] = &[$(Target {
            name: stringify!($name),
            run: $name::run,
            seeds: $name::seeds,
        }),*];
    };
}

targets!(
    encoding, interpret, translate, guest, irqchip, kvm_calls, dropin, devices, loaders, frames
);
