//! Code that the program writes itself, as just-in-time compilers do.
#![expect(unsafe_code, reason = "writes machine code and calls it")]

use std::ptr;

use crate::random::{Random, mix};
use crate::suite::{Class, Row, Size, Task};

/// The workloads of this module.
pub const WORKLOADS: [Row; 3] = [
    (
        "jit_fresh",
        Class::Generated,
        "writes functions and calls each 20 times",
        fresh,
    ),
    (
        "jit_patch",
        Class::Generated,
        "changes a constant in a loop's code",
        patch,
    ),
    (
        "jit_beside",
        Class::Generated,
        "writes data beside code that runs",
        beside,
    ),
];

type Function = extern "sysv64" fn(u64) -> u64;

/// Memory to write code to and run it from.
struct Code {
    start: *mut u8,
}

impl Code {
    const LENGTH: usize = 64 << 10;

    fn new() -> Result<Self, String> {
        // SAFETY: makes a new mapping and changes none.
        let start = unsafe {
            libc::mmap(
                ptr::null_mut(),
                Self::LENGTH,
                libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err("the system allows no memory that is writable and executable".into());
        }
        Ok(Self {
            start: start.cast(),
        })
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= Self::LENGTH);
        // SAFETY: inside the mapping, which nothing in Rust refers to.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.start.add(at), bytes.len()) };
    }

    /// The function at `at`.
    ///
    /// # Safety
    /// There must be one.
    unsafe fn function(&self, at: usize) -> Function {
        // SAFETY: the caller says that a function is there.
        unsafe { std::mem::transmute::<*mut u8, Function>(self.start.add(at)) }
    }
}

/// A function of random arithmetic on its argument: `mov rax, rdi`, operations, `ret`.
fn random_function(random: &mut Random, operations: u64) -> Vec<u8> {
    let mut code = vec![0x48, 0x89, 0xf8];
    for _ in 0..operations {
        let constant = (random.next() as u32).to_le_bytes();
        // `add`, `xor`, `sub` of EAX-form with REX.W, or `imul rax, rax, constant`.
        let start: &[u8] = match random.below(4) {
            0 => &[0x48, 0x05],
            1 => &[0x48, 0x35],
            2 => &[0x48, 0x2d],
            _ => &[0x48, 0x69, 0xc0],
        };
        code.extend_from_slice(start);
        code.extend_from_slice(&constant);
    }
    code.push(0xc3);
    code
}

fn fresh(size: Size) -> Result<Task, String> {
    let code = Code::new()?;
    let mut random = Random::new(21);
    let bodies: Vec<Vec<u8>> = (0..64).map(|_| random_function(&mut random, 30)).collect();
    let rounds = size.of(200_000);
    Ok(Box::new(move || {
        let mut sum = 0;
        for round in 0..rounds as usize {
            let at = (round % 128) * 512;
            code.write(at, &bodies[round % 61]);
            // SAFETY: it was just written.
            let function = unsafe { code.function(at) };
            for n in 0..20 {
                sum = mix(sum, function(n));
            }
        }
        sum
    }))
}

/// `mov rax, rdi; mov ecx, 50; loop: imul rax, rax, K; dec ecx; jnz loop; ret`, and where K is.
const LOOP: ([u8; 20], usize) = (
    [
        0x48, 0x89, 0xf8, 0xb9, 50, 0, 0, 0, 0x48, 0x69, 0xc0, 3, 0, 0, 0, 0xff, 0xc9, 0x75, 0xf5,
        0xc3,
    ],
    11,
);

fn patch(size: Size) -> Result<Task, String> {
    let code = Code::new()?;
    let (body, constant) = LOOP;
    let rounds = size.of(600_000);
    Ok(Box::new(move || {
        code.write(0, &body);
        // SAFETY: it was just written.
        let function = unsafe { code.function(0) };
        (0..rounds).fold(1, |x, round| {
            code.write(constant, &(round | 1).to_le_bytes());
            function(x) | 1
        })
    }))
}

fn beside(size: Size) -> Result<Task, String> {
    let code = Code::new()?;
    let (body, _) = LOOP;
    let rounds = size.of(1_000_000);
    Ok(Box::new(move || {
        code.write(0, &body);
        // SAFETY: it was just written.
        let function = unsafe { code.function(0) };
        (0..rounds).fold(1, |x, _| {
            let x = function(x) | 1;
            // The same page, another cache line.
            code.write(2048, &x.to_le_bytes());
            x
        })
    }))
}
