//! The software engine: binary translation from x86-64 to x86-64, in a user process, with no
//! hardware virtualization and no privileges.
//!
//! The unit is the guest instruction, copied with its operands replaced (`translate`); what cannot be
//! copied goes to the interpreter (`run`). Memory accesses go through a software TLB that emitted code
//! probes (`tlb`). Translations are keyed by guest-physical address and context (`cache`,
//! `context`), so one translation of a library serves every process of the guest, and they are
//! position-independent. `docs/translator.md` tells the whole story.

mod arena;
mod asm;
mod block;
mod cache;
mod code_page;
mod code_writes;
mod context;
mod env;
mod far;
mod flags;
mod frontend;
#[doc(hidden)]
pub mod fuzz;
mod heat;
mod layout;
mod liveness;
mod lookup;
mod miss;
mod perf;
mod ram_files;
mod recent;
mod refill;
mod run;
mod shadow;
mod signal;
mod stats;
mod stubs;
mod tlb;
mod translate;
mod vcpu;
mod window;
mod world;

pub use signal::install_handlers;
pub use stats::Stats;
pub use vcpu::{JitEngine, JitVcpu};
