//! Integer programs.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, DefaultHasher};
use std::hint::black_box;

use crate::random::{Random, mix};
use crate::suite::{Class, Row, Size, Task};

/// The workloads of this module.
pub const WORKLOADS: [Row; 9] = [
    (
        "xorshift",
        Class::Integer,
        "arithmetic in registers",
        xorshift,
    ),
    ("sieve", Class::Integer, "sieve of Eratosthenes", sieve),
    (
        "quicksort",
        Class::Integer,
        "sorts 32-bit numbers",
        quicksort,
    ),
    ("crc32", Class::Integer, "CRC-32 by table", crc32),
    (
        "hash_map",
        Class::Integer,
        "the standard library's hash map",
        hash_map,
    ),
    (
        "sha256",
        Class::Integer,
        "SHA-256 without special instructions",
        sha256,
    ),
    (
        "lz",
        Class::Integer,
        "compresses and decompresses text, LZ77",
        lz,
    ),
    (
        "trees",
        Class::Integer,
        "allocates and frees binary trees",
        trees,
    ),
    ("bigint", Class::Crypto, "multiplies big integers", bigint),
];

fn xorshift(size: Size) -> Result<Task, String> {
    let steps = size.of(50_000_000);
    Ok(Box::new(move || {
        let mut random = Random::new(0x1234_5678_9abc_def1);
        let mut sum = 0u64;
        for _ in 0..steps {
            sum = sum.wrapping_add(random.next());
        }
        sum
    }))
}

fn sieve(size: Size) -> Result<Task, String> {
    let rounds = size.of(24);
    let mut composite = vec![false; 1 << 20];
    Ok(Box::new(move || {
        let mut primes = 0;
        for _ in 0..rounds {
            composite.fill(false);
            for n in 2..composite.len() {
                if !composite[n] {
                    primes += 1;
                    let mut multiple = n * 2;
                    while multiple < composite.len() {
                        composite[multiple] = true;
                        multiple += n;
                    }
                }
            }
        }
        primes
    }))
}

fn quicksort(size: Size) -> Result<Task, String> {
    fn sort(numbers: &mut [u32]) {
        if numbers.len() <= 16 {
            for end in 1..numbers.len() {
                let mut at = end;
                while at > 0 && numbers[at - 1] > numbers[at] {
                    numbers.swap(at - 1, at);
                    at -= 1;
                }
            }
            return;
        }
        let pivot = numbers[numbers.len() / 2];
        let (mut low, mut high) = (0, numbers.len() - 1);
        loop {
            while numbers[low] < pivot {
                low += 1;
            }
            while numbers[high] > pivot {
                high -= 1;
            }
            if low >= high {
                break;
            }
            numbers.swap(low, high);
            low += 1;
            high -= 1;
        }
        let (left, right) = numbers.split_at_mut(low);
        sort(left);
        sort(right);
    }

    let mut random = Random::new(42);
    let input: Vec<u32> = (0..size.of(1_000_000))
        .map(|_| random.next() as u32)
        .collect();
    Ok(Box::new(move || {
        let mut numbers = input.clone();
        sort(&mut numbers);
        let in_order = numbers.is_sorted();
        numbers
            .iter()
            .fold(u64::from(in_order), |sum, &n| mix(sum, u64::from(n)))
    }))
}

fn crc32(size: Size) -> Result<Task, String> {
    let mut table = [0u32; 256];
    for (byte, entry) in (0u32..).zip(&mut table) {
        *entry = (0..8).fold(byte, |crc, _| {
            (crc >> 1) ^ if crc & 1 == 1 { 0xedb8_8320 } else { 0 }
        });
    }
    let mut random = Random::new(7);
    let data: Vec<u8> = (0..1 << 18).map(|_| random.next() as u8).collect();
    let rounds = size.of(128);
    Ok(Box::new(move || {
        let mut crc = !0u32;
        for _ in 0..rounds {
            for &byte in &data {
                crc = (crc >> 8) ^ table[usize::from(crc as u8 ^ byte)];
            }
        }
        u64::from(!crc)
    }))
}

fn hash_map(size: Size) -> Result<Task, String> {
    let entries = u64::from(size.of(400_000));
    Ok(Box::new(move || {
        // Not the default hasher: its keys differ from process to process.
        let mut map: HashMap<u64, u64, BuildHasherDefault<DefaultHasher>> = HashMap::default();
        let mut random = Random::new(99);
        for n in 0..entries {
            *map.entry(random.below(entries)).or_insert(n) += n;
        }
        (0..entries).fold(map.len() as u64, |sum, n| {
            mix(sum, map.get(&n).copied().unwrap_or(1))
        })
    }))
}

const SHA256_K: [u32; 64] = [
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2,
];

/// The state before the first block (FIPS 180-4).
const SHA256_START: [u32; 8] = [
    0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19,
];

fn sha256_block(state: &mut [u32; 8], block: &[u8]) {
    let mut w = [0u32; 64];
    for (word, bytes) in w.iter_mut().zip(block.as_chunks::<4>().0) {
        *word = u32::from_be_bytes(*bytes);
    }
    for i in 16..64 {
        let s0 = w[i - 15].rotate_right(7) ^ w[i - 15].rotate_right(18) ^ (w[i - 15] >> 3);
        let s1 = w[i - 2].rotate_right(17) ^ w[i - 2].rotate_right(19) ^ (w[i - 2] >> 10);
        w[i] = w[i - 16]
            .wrapping_add(s0)
            .wrapping_add(w[i - 7])
            .wrapping_add(s1);
    }
    let [mut a, mut b, mut c, mut d, mut e, mut f, mut g, mut h] = *state;
    for (&k, &word) in SHA256_K.iter().zip(&w) {
        let s1 = e.rotate_right(6) ^ e.rotate_right(11) ^ e.rotate_right(25);
        let t1 = h
            .wrapping_add(s1)
            .wrapping_add((e & f) ^ (!e & g))
            .wrapping_add(k)
            .wrapping_add(word);
        let s0 = a.rotate_right(2) ^ a.rotate_right(13) ^ a.rotate_right(22);
        let t2 = s0.wrapping_add((a & b) ^ (a & c) ^ (b & c));
        (h, g, f, e, d, c, b, a) = (g, f, e, d.wrapping_add(t1), c, b, a, t1.wrapping_add(t2));
    }
    for (word, add) in state.iter_mut().zip([a, b, c, d, e, f, g, h]) {
        *word = word.wrapping_add(add);
    }
}

fn sha256(size: Size) -> Result<Task, String> {
    let mut random = Random::new(256);
    let data: Vec<u8> = (0..1 << 18).map(|_| random.next() as u8).collect();
    let rounds = size.of(64);
    Ok(Box::new(move || {
        let mut state = SHA256_START;
        for _ in 0..rounds {
            for block in data.as_chunks::<64>().0 {
                sha256_block(&mut state, block);
            }
        }
        state.iter().fold(0, |sum, &word| mix(sum, u64::from(word)))
    }))
}

/// Text that repeats itself as prose does.
pub fn prose(length: usize) -> Vec<u8> {
    const WORDS: [&str; 16] = [
        "the ",
        "machine ",
        "of ",
        "a ",
        "guest ",
        "and ",
        "memory ",
        "page ",
        "which ",
        "is ",
        "register ",
        "to ",
        "interrupt ",
        "then ",
        "Überlauf ",
        "仮想 ",
    ];
    let mut random = Random::new(31);
    let mut text = Vec::with_capacity(length + 32);
    while text.len() < length {
        let word = WORDS[(random.next() >> 60) as usize];
        text.extend_from_slice(word.as_bytes());
        if random.below(9) == 0 {
            text.extend_from_slice(random.below(100_000).to_string().as_bytes());
            text.extend_from_slice(b".\n");
        }
    }
    text
}

/// Literals and matches: a byte count and the bytes, then a distance and a length, until the end.
fn lz_compress(input: &[u8], output: &mut Vec<u8>) {
    const BITS: u32 = 15;
    let hash = |at: usize| {
        let bytes = [input[at], input[at + 1], input[at + 2], input[at + 3]];
        (u32::from_le_bytes(bytes).wrapping_mul(2_654_435_761) >> (32 - BITS)) as usize
    };
    let mut last = vec![usize::MAX; 1 << BITS];
    let (mut at, mut literals) = (0, 0);
    let flush = |output: &mut Vec<u8>, bytes: &[u8], distance: u16, length: u8| {
        let mut chunks = bytes.chunks(255).peekable();
        while let Some(chunk) = chunks.next_if(|c| c.len() == 255) {
            output.extend_from_slice(&[255, 0, 0, 0]);
            output.extend_from_slice(chunk);
        }
        let rest = chunks.next().unwrap_or_default();
        let [low, high] = distance.to_le_bytes();
        output.extend_from_slice(&[rest.len() as u8, low, high, length]);
        output.extend_from_slice(rest);
    };
    while at + 4 <= input.len() {
        let slot = hash(at);
        let candidate = last[slot];
        last[slot] = at;
        let length = match at.checked_sub(candidate) {
            Some(distance @ 1..=0xffff) => input[at..]
                .iter()
                .zip(&input[at - distance..])
                .take(255)
                .take_while(|(a, b)| a == b)
                .count(),
            _ => 0,
        };
        if length >= 4 {
            flush(
                output,
                &input[literals..at],
                (at - candidate) as u16,
                length as u8,
            );
            at += length;
            literals = at;
        } else {
            at += 1;
        }
    }
    flush(output, &input[literals..], 0, 0);
}

fn lz_decompress(input: &[u8], output: &mut Vec<u8>) {
    let mut rest = input;
    while let [literals, low, high, length, tail @ ..] = rest {
        let (bytes, tail) = tail.split_at(usize::from(*literals));
        output.extend_from_slice(bytes);
        let from = output.len() - usize::from(u16::from_le_bytes([*low, *high]));
        for at in from..from + usize::from(*length) {
            output.push(output[at]);
        }
        rest = tail;
    }
}

fn lz(size: Size) -> Result<Task, String> {
    let input = prose(size.of(6 << 20) as usize);
    let (mut packed, mut unpacked) = (Vec::new(), Vec::new());
    Ok(Box::new(move || {
        packed.clear();
        unpacked.clear();
        lz_compress(&input, &mut packed);
        lz_decompress(&packed, &mut unpacked);
        mix(packed.len() as u64, u64::from(unpacked == input))
    }))
}

fn trees(size: Size) -> Result<Task, String> {
    struct Node(Option<[Box<Node>; 2]>);
    fn grow(depth: u32) -> Box<Node> {
        Box::new(Node(
            (depth > 0).then(|| [grow(depth - 1), grow(depth - 1)]),
        ))
    }
    fn count(node: &Node) -> u64 {
        1 + node.0.iter().flatten().map(|n| count(n)).sum::<u64>()
    }
    let rounds = size.of(120);
    Ok(Box::new(move || {
        (0..rounds)
            .map(|_| {
                let tree = black_box(grow(14));
                count(&tree)
            })
            .sum()
    }))
}

fn bigint(size: Size) -> Result<Task, String> {
    const LIMBS: usize = 256;
    let mut random = Random::new(3);
    let a: Vec<u64> = (0..LIMBS).map(|_| random.next()).collect();
    let b: Vec<u64> = (0..LIMBS).map(|_| random.next()).collect();
    let rounds = size.of(1200);
    Ok(Box::new(move || {
        let mut product = vec![0u64; LIMBS * 2];
        for _ in 0..rounds {
            for (i, &x) in a.iter().enumerate() {
                let mut carry = 0u128;
                for (place, &y) in product[i..].iter_mut().zip(&b) {
                    let sum = u128::from(x) * u128::from(y) + u128::from(*place) + carry;
                    *place = sum as u64;
                    carry = sum >> 64;
                }
                product[i + LIMBS] = carry as u64;
            }
        }
        product.iter().fold(0, |sum, &limb| mix(sum, limb))
    }))
}
