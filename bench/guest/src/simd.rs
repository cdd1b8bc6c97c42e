//! Vector instructions by name, and the x87 unit.
#![expect(unsafe_code, reason = "vector intrinsics and inline assembly")]

use std::arch::asm;
use std::arch::x86_64::*;

use crate::random::{Random, mix};
use crate::suite::{Class, Row, Size, Task};

/// The workloads of this module.
pub const WORKLOADS: [Row; 5] = [
    ("sse2_sum", Class::Float, "sums of floats, SSE2", sse2_sum),
    (
        "sse2_int",
        Class::Float,
        "bytes of an image blended, SSE2",
        sse2_int,
    ),
    (
        "avx2_int",
        Class::Float,
        "32-bit integer products, AVX2",
        avx2_int,
    ),
    (
        "avx_fma",
        Class::Float,
        "dot products, AVX and FMA",
        avx_fma,
    ),
    ("x87", Class::Float, "a polynomial on the x87 stack", x87),
];

const COUNT: usize = 1 << 16;

fn floats(seed: u64) -> Vec<f32> {
    let mut random = Random::new(seed);
    (0..COUNT)
        .map(|_| random.below(2048) as f32 / 1024.0 - 1.0)
        .collect()
}

#[target_feature(enable = "sse2")]
fn sum(a: &[f32], b: &[f32], rounds: u32) -> u64 {
    let mut sum = _mm_setzero_ps();
    for _ in 0..rounds {
        for (x, y) in a.as_chunks::<4>().0.iter().zip(b.as_chunks::<4>().0) {
            // SAFETY: both point to four floats.
            let (x, y) = unsafe { (_mm_loadu_ps(x.as_ptr()), _mm_loadu_ps(y.as_ptr())) };
            sum = _mm_add_ps(sum, _mm_max_ps(_mm_mul_ps(x, y), _mm_sub_ps(x, y)));
        }
    }
    let mut parts = [0f32; 4];
    // SAFETY: `parts` holds four floats.
    unsafe { _mm_storeu_ps(parts.as_mut_ptr(), sum) };
    parts
        .iter()
        .fold(0, |sum, x| mix(sum, u64::from(x.to_bits())))
}

fn sse2_sum(size: Size) -> Result<Task, String> {
    let (a, b) = (floats(1), floats(2));
    let rounds = size.of(4000);
    // SAFETY: every x86-64 CPU has SSE2.
    Ok(Box::new(move || unsafe { sum(&a, &b, rounds) }))
}

#[target_feature(enable = "sse2")]
fn blend(a: &[u8], b: &[u8], rounds: u32) -> u64 {
    let mut sum = _mm_setzero_si128();
    for _ in 0..rounds {
        for (x, y) in a.as_chunks::<16>().0.iter().zip(b.as_chunks::<16>().0) {
            // SAFETY: both point to 16 bytes.
            let (x, y) = unsafe {
                (
                    _mm_loadu_si128(x.as_ptr().cast()),
                    _mm_loadu_si128(y.as_ptr().cast()),
                )
            };
            let blended = _mm_avg_epu8(_mm_adds_epu8(x, sum), _mm_subs_epu8(y, x));
            sum = _mm_xor_si128(sum, _mm_shuffle_epi32::<0b00_11_10_01>(blended));
        }
    }
    let mut parts = [0u64; 2];
    // SAFETY: `parts` holds 16 bytes.
    unsafe { _mm_storeu_si128(parts.as_mut_ptr().cast(), sum) };
    mix(parts[0], parts[1])
}

fn sse2_int(size: Size) -> Result<Task, String> {
    let mut random = Random::new(3);
    let a: Vec<u8> = (0..COUNT).map(|_| random.next() as u8).collect();
    let b: Vec<u8> = (0..COUNT).map(|_| random.next() as u8).collect();
    let rounds = size.of(14000);
    // SAFETY: every x86-64 CPU has SSE2.
    Ok(Box::new(move || unsafe { blend(&a, &b, rounds) }))
}

#[target_feature(enable = "avx2")]
fn products(a: &[u32], b: &[u32], rounds: u32) -> u64 {
    let mut sum = _mm256_setzero_si256();
    for _ in 0..rounds {
        for (x, y) in a.as_chunks::<8>().0.iter().zip(b.as_chunks::<8>().0) {
            // SAFETY: both point to 32 bytes.
            let (x, y) = unsafe {
                (
                    _mm256_loadu_si256(x.as_ptr().cast()),
                    _mm256_loadu_si256(y.as_ptr().cast()),
                )
            };
            let product = _mm256_mullo_epi32(x, y);
            sum = _mm256_add_epi32(sum, _mm256_xor_si256(product, _mm256_srli_epi32::<7>(x)));
        }
    }
    let mut parts = [0u64; 4];
    // SAFETY: `parts` holds 32 bytes.
    unsafe { _mm256_storeu_si256(parts.as_mut_ptr().cast(), sum) };
    parts.into_iter().fold(0, mix)
}

fn avx2_int(size: Size) -> Result<Task, String> {
    if !is_x86_feature_detected!("avx2") {
        return Err("the CPU has no AVX2".into());
    }
    let mut random = Random::new(4);
    let a: Vec<u32> = (0..COUNT / 2).map(|_| random.next() as u32).collect();
    let b: Vec<u32> = (0..COUNT / 2).map(|_| random.next() as u32).collect();
    let rounds = size.of(14000);
    // SAFETY: the CPU has AVX2.
    Ok(Box::new(move || unsafe { products(&a, &b, rounds) }))
}

#[target_feature(enable = "avx,fma")]
fn dot(a: &[f32], b: &[f32], rounds: u32) -> u64 {
    let mut sums = [_mm256_setzero_ps(); 4];
    for _ in 0..rounds {
        for (x, y) in a.as_chunks::<32>().0.iter().zip(b.as_chunks::<32>().0) {
            for (part, sum) in sums.iter_mut().enumerate() {
                // SAFETY: both arrays hold 32 floats, of which these are a quarter.
                let (x, y) = unsafe {
                    (
                        _mm256_loadu_ps(x.as_ptr().add(part * 8)),
                        _mm256_loadu_ps(y.as_ptr().add(part * 8)),
                    )
                };
                *sum = _mm256_fmadd_ps(x, y, *sum);
            }
        }
    }
    let mut result = 0;
    for sum in sums {
        let mut parts = [0f32; 8];
        // SAFETY: `parts` holds eight floats.
        unsafe { _mm256_storeu_ps(parts.as_mut_ptr(), sum) };
        for part in parts {
            result = mix(result, u64::from(part.to_bits()));
        }
    }
    result
}

fn avx_fma(size: Size) -> Result<Task, String> {
    if !(is_x86_feature_detected!("avx") && is_x86_feature_detected!("fma")) {
        return Err("the CPU has no AVX with FMA".into());
    }
    let (a, b) = (floats(5), floats(6));
    let rounds = size.of(14000);
    // SAFETY: the CPU has AVX and FMA.
    Ok(Box::new(move || unsafe { dot(&a, &b, rounds) }))
}

fn x87(size: Size) -> Result<Task, String> {
    let numbers: Vec<f64> = floats(7).into_iter().map(f64::from).collect();
    let rounds = size.of(150);
    Ok(Box::new(move || {
        let mut sum = 0;
        for _ in 0..rounds {
            for x in &numbers {
                let mut y = 0.0f64;
                // SAFETY: reads `x`, writes `y`, and leaves the x87 stack empty as it was.
                unsafe {
                    asm!(
                        "fld qword ptr [{x}]",
                        "fld st(0)",
                        "fmul st(0), st(1)",
                        "fld1",
                        "faddp st(1), st(0)",
                        "fmul st(0), st(1)",
                        "fxch st(1)",
                        "fabs",
                        "fsqrt",
                        "faddp st(1), st(0)",
                        "fstp qword ptr [{y}]",
                        x = in(reg) x,
                        y = in(reg) &raw mut y,
                        out("st(0)") _, out("st(1)") _, out("st(2)") _, out("st(3)") _,
                        out("st(4)") _, out("st(5)") _, out("st(6)") _, out("st(7)") _,
                        options(nostack),
                    );
                }
                sum = mix(sum, y.to_bits());
            }
        }
        sum
    }))
}
