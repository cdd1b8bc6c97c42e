//! Instructions made for cryptography.
#![expect(unsafe_code, reason = "intrinsics of optional instructions")]

use std::arch::x86_64::*;

use crate::random::{Random, mix};
use crate::suite::{Class, Row, Size, Task};

/// The workloads of this module.
pub const WORKLOADS: [Row; 3] = [
    ("aes", Class::Crypto, "AES-128 in counter mode, AES-NI", aes),
    ("sha_ni", Class::Crypto, "SHA-256 rounds, SHA-NI", sha_ni),
    (
        "clmul",
        Class::Crypto,
        "carry-less products, PCLMULQDQ",
        clmul,
    ),
];

/// Checksum of a vector.
#[target_feature(enable = "sse2")]
fn parts(value: __m128i) -> u64 {
    mix(
        _mm_cvtsi128_si64(value).cast_unsigned(),
        _mm_cvtsi128_si64(_mm_unpackhi_epi64(value, value)).cast_unsigned(),
    )
}

#[target_feature(enable = "aes")]
fn counter_mode(keys: [[i64; 2]; 11], blocks: u32) -> u64 {
    let keys = keys.map(|[low, high]| _mm_set_epi64x(high, low));
    let mut sum = _mm_setzero_si128();
    for block in (0..i64::from(blocks)).step_by(4) {
        for n in block..block + 4 {
            let mut text = _mm_xor_si128(_mm_set_epi64x(17, n), keys[0]);
            for &key in &keys[1..10] {
                text = _mm_aesenc_si128(text, key);
            }
            sum = _mm_xor_si128(sum, _mm_aesenclast_si128(text, keys[10]));
        }
    }
    parts(sum)
}

fn aes(size: Size) -> Result<Task, String> {
    if !is_x86_feature_detected!("aes") {
        return Err("the CPU has no AES-NI".into());
    }
    let mut random = Random::new(128);
    // Round keys that no key schedule gave cost the same.
    let keys = [(); 11].map(|()| [(); 2].map(|()| random.next().cast_signed()));
    let blocks = size.of(20_000_000);
    // SAFETY: the CPU has AES-NI.
    Ok(Box::new(move || unsafe { counter_mode(keys, blocks) }))
}

#[target_feature(enable = "sha,sse4.1,ssse3")]
fn sha_rounds(count: u32) -> u64 {
    let mut state = (_mm_set_epi64x(1, 2), _mm_set_epi64x(3, 4));
    let mut words = [
        _mm_set_epi64x(5, 6),
        _mm_set_epi64x(7, 8),
        _mm_set_epi64x(9, 10),
        _mm_set_epi64x(11, 12),
    ];
    for _ in 0..count {
        // Four rounds and the message schedule for four words.
        let low = words[0];
        state.1 = _mm_sha256rnds2_epu32(state.1, state.0, low);
        state.0 = _mm_sha256rnds2_epu32(state.0, state.1, _mm_shuffle_epi32::<0x0e>(low));
        let next = _mm_add_epi32(
            _mm_sha256msg1_epu32(words[0], words[1]),
            _mm_alignr_epi8::<4>(words[3], words[2]),
        );
        let next = _mm_sha256msg2_epu32(next, words[3]);
        words = [words[1], words[2], words[3], next];
    }
    mix(parts(state.0), parts(state.1))
}

fn sha_ni(size: Size) -> Result<Task, String> {
    if !(is_x86_feature_detected!("sha") && is_x86_feature_detected!("sse4.1")) {
        return Err("the CPU has no SHA-NI".into());
    }
    let count = size.of(20_000_000);
    // SAFETY: the CPU has SHA-NI and SSE4.1.
    Ok(Box::new(move || unsafe { sha_rounds(count) }))
}

#[target_feature(enable = "pclmulqdq")]
fn fold(data: &[[u8; 16]], rounds: u32) -> u64 {
    let factor = _mm_set_epi64x(0x1_5474_2ac9, 0x1_c6e4_1596);
    let mut sum = _mm_set_epi64x(0, 1);
    for _ in 0..rounds {
        for block in data {
            // SAFETY: `block` is 16 bytes.
            let block = unsafe { _mm_loadu_si128(block.as_ptr().cast()) };
            let low = _mm_clmulepi64_si128::<0x00>(sum, factor);
            let high = _mm_clmulepi64_si128::<0x11>(sum, factor);
            sum = _mm_xor_si128(_mm_xor_si128(low, high), block);
        }
    }
    parts(sum)
}

fn clmul(size: Size) -> Result<Task, String> {
    if !is_x86_feature_detected!("pclmulqdq") {
        return Err("the CPU has no PCLMULQDQ".into());
    }
    let mut random = Random::new(64);
    let data: Vec<[u8; 16]> = (0..4096)
        .map(|_| {
            u128::from(random.next())
                .wrapping_mul(0x1_0000_0001_0000_0001)
                .to_le_bytes()
        })
        .collect();
    let rounds = size.of(7000);
    // SAFETY: the CPU has PCLMULQDQ.
    Ok(Box::new(move || unsafe { fold(&data, rounds) }))
}
