//! Text: UTF-8, searching, numbers to digits and back.

use crate::integer::prose;
use crate::random::mix;
use crate::suite::{Class, Row, Size, Task};

/// The workloads of this module.
pub const WORKLOADS: [Row; 3] = [
    ("utf8", Class::Integer, "checks and decodes UTF-8", utf8),
    (
        "search",
        Class::Integer,
        "finds strings in text, byte by byte",
        search,
    ),
    (
        "digits",
        Class::Integer,
        "formats and parses numbers",
        digits,
    ),
];

fn utf8(size: Size) -> Result<Task, String> {
    let bytes = prose(1 << 20);
    let rounds = size.of(24);
    Ok(Box::new(move || {
        let mut sum = 0;
        for _ in 0..rounds {
            let text = std::str::from_utf8(&bytes).unwrap_or_default();
            sum = text.chars().fold(sum, |sum: u64, c| {
                sum.wrapping_mul(31).wrapping_add(u64::from(u32::from(c)))
            });
        }
        sum
    }))
}

fn search(size: Size) -> Result<Task, String> {
    let text = prose(size.of(6 << 20) as usize);
    let needles = [
        "interrupt memory ",
        "register guest the page",
        "99999",
        "想 Über",
    ];
    Ok(Box::new(move || {
        let mut sum = 0;
        for needle in needles {
            let needle = needle.as_bytes();
            let found = text
                .windows(needle.len())
                .filter(|window| window.iter().zip(needle).all(|(a, b)| a == b))
                .count();
            sum = mix(sum, found as u64);
        }
        sum
    }))
}

fn digits(size: Size) -> Result<Task, String> {
    let count = size.of(1_500_000);
    Ok(Box::new(move || {
        use std::fmt::Write;
        let mut text = String::new();
        let mut sum = 0;
        for number in 0..count {
            text.clear();
            // Writing to a string does not fail.
            let _ = write!(text, "{},{:x}", number.wrapping_mul(7919), number);
            for field in text.split(',') {
                sum = mix(sum, field.parse().unwrap_or(1));
            }
        }
        sum
    }))
}
