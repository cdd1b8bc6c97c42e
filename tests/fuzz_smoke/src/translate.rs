//! Decoding and translating alone: arbitrary pages in arbitrary contexts, nothing is executed.

use crate::input::Input;
use crate::programs::programs;
use engine_jit::fuzz::Translator;
use std::sync::OnceLock;

/// Translates blocks of a page that holds the input's code at its start, or across its end.
pub fn run(data: &[u8]) {
    static TRANSLATOR: OnceLock<Translator> = OnceLock::new();
    let translator =
        TRANSLATOR.get_or_init(|| Translator::new().expect("this host cannot run translated code"));
    let mut input = Input::new(data);
    let context = input.u32();
    let place = input.u8();
    let code = input.rest();
    let mut bytes = [0; 2 * 4096];
    let start = if place & 1 == 0 {
        0
    } else {
        4096 - usize::from(place >> 1)
    };
    for (byte, new) in bytes[start..].iter_mut().zip(code) {
        *byte = *new;
    }
    let mut at = start;
    for _ in 0..32 {
        if at >= 4096 || at >= start + code.len().max(1) {
            return;
        }
        at = translator.translate(&bytes, at, context);
    }
}

/// Programs in some contexts.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for program in programs() {
        // 64-bit kernel and user code, 32-bit flat and not, 16-bit; FPU of all kinds.
        for context in [0x1_ef7a_u32, 0x3fe, 0x37d, 0x101, 0x20] {
            for place in [0, 9] {
                let mut seed = context.to_le_bytes().to_vec();
                seed.push(place);
                seed.extend_from_slice(&program);
                all.push(seed);
            }
        }
    }
    all
}
