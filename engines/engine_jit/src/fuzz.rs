//! The front half of the engine by itself, for the fuzz targets: nothing is executed.

use crate::context::Context;
use crate::frontend::{self, BEYOND};
use crate::run::HELPERS;
use crate::translate::translate;
use crate::world::World;
use kvm_core::engine::EngineError;

/// Decodes and translates.
pub struct Translator(World);

impl Translator {
    /// Reserves the code cache.
    ///
    /// # Errors
    /// As for [`crate::JitEngine::new`].
    pub fn new() -> Result<Self, EngineError> {
        World::new(&HELPERS).map(Self)
    }

    /// Translates the block at offset `start` of the first of two guest pages, in the context that
    /// the bits of `context` mean; the offset at which the block ends, or the next instruction's if it
    /// cannot be told. An offset beyond the first page is its end.
    pub fn translate(&self, pages: &[u8; 2 * 4096], start: usize, context: u32) -> usize {
        let context = Context(context);
        let start = start.min(4095);
        let block = match frontend::decode(&pages[..4096], start, context) {
            Some(block) => block,
            None => match frontend::decode(&pages[..4096 + BEYOND], start, context) {
                Some(block) => block,
                None => return start + 1,
            },
        };
        let base = self.0.code.end - (1 << 20);
        let code = translate(&block, context, &self.0.stubs, base, self.0.bmi2);
        assert!(code.direct <= code.direct_fpu && code.direct_fpu <= code.bytes.len());
        usize::from(block.end).max(start + 1)
    }
}
