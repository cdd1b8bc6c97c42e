//! The front half of the engine by itself, for the fuzz targets: nothing is executed.

use crate::context::Context;
use crate::frontend::{self, BEYOND};
use crate::run::HELPERS;
use crate::translate::{Ask, translate};
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
        let code = translate(
            &block,
            context,
            &self.0.stubs,
            base,
            self.0.bmi2,
            &Ask {
                site: &|_| crate::translate::Site::Window(0),
                far: 0,
                page: 0,
            },
        );
        assert!(code.direct <= code.direct_fpu && code.direct_fpu <= code.bytes.len());
        usize::from(block.end).max(start + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    /// `cargo test --release -p engine_jit translation_speed -- --ignored --nocapture`
    #[test]
    #[ignore = "prints a figure"]
    fn translation_speed() {
        let translator = Translator::new().unwrap();
        // 64-bit user code with AVX.
        let context = 0x2fe;
        // This program, as a compiler made it.
        let exe = std::fs::read(std::env::current_exe().unwrap()).unwrap();
        let blocks = |work: &mut dyn FnMut(&[u8; 8192], usize, usize)| {
            for page in exe[exe.len() / 4..][..1 << 20].windows(8192).step_by(4096) {
                let page: &[u8; 8192] = page.try_into().unwrap();
                let mut at = 0;
                while at < 4096 {
                    let Some(b) = frontend::decode(&page[..4096], at, Context(context)) else {
                        break;
                    };
                    work(page, at, b.ops.len());
                    at = usize::from(b.end).max(at + 1);
                }
            }
        };
        let (mut ops, mut count) = (0, 0);
        let time = |f: &mut dyn FnMut()| {
            let best = |n: Duration, _| {
                let start = Instant::now();
                f();
                n.min(start.elapsed())
            };
            (0..5).fold(Duration::MAX, best).as_nanos() as f64
        };
        blocks(&mut |_, _, n| (ops, count) = (ops + n, count + 1));
        let decode = time(&mut || blocks(&mut |_, _, _| ()));
        let both = time(&mut || {
            blocks(&mut |page, at, _| {
                translator.translate(page, at, context);
            });
        });
        let ops = ops as f64;
        println!(
            "{:.0} ns per instruction, {:.0} of them to decode; {:.1} instructions per block",
            (both - decode) / ops,
            decode / ops,
            ops / f64::from(count)
        );
    }
}
