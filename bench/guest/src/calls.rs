//! Calls, returns and jumps that are hard to predict.
#![expect(
    unsafe_code,
    reason = "saves and restores the stack as setjmp and longjmp do"
)]

use std::arch::naked_asm;
use std::hint::black_box;

use crate::random::{Random, mix};
use crate::suite::{Class, Row, Size, Task};

/// The workloads of this module.
pub const WORKLOADS: [Row; 6] = [
    ("fib", Class::Calls, "recursive Fibonacci numbers", fib),
    (
        "indirect",
        Class::Calls,
        "calls through a table of functions",
        indirect,
    ),
    (
        "virtual",
        Class::Calls,
        "calls of trait objects",
        virtual_calls,
    ),
    (
        "interpreter",
        Class::Calls,
        "an interpreter of byte code",
        interpreter,
    ),
    ("deep", Class::Calls, "recursion 10,000 calls deep", deep),
    (
        "longjmp",
        Class::Calls,
        "leaves nested calls by a jump",
        longjmp,
    ),
];

fn fib(size: Size) -> Result<Task, String> {
    #[inline(never)]
    fn fib(n: u64) -> u64 {
        if n < 2 {
            n
        } else {
            // Without black_box the compiler turns half of the calls into a loop.
            black_box(fib(n - 1)) + fib(n - 2)
        }
    }
    let rounds = size.of(16);
    Ok(Box::new(move || {
        (0..rounds).map(|_| fib(black_box(29))).sum()
    }))
}

fn indirect(size: Size) -> Result<Task, String> {
    macro_rules! functions {
        ($($n:literal)*) => { [$({
            #[inline(never)]
            fn f(x: u64) -> u64 { x.rotate_left($n).wrapping_add($n * 0x1_0001) }
            f as fn(u64) -> u64
        }),*] };
    }
    let table = functions!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16);
    let mut random = Random::new(5);
    let order: Vec<u8> = (0..4096).map(|_| (random.next() >> 60) as u8).collect();
    let rounds = size.of(3000);
    Ok(Box::new(move || {
        let table = black_box(&table);
        let mut x = 1;
        for _ in 0..rounds {
            for &n in &order {
                x = table[usize::from(n & 15)](x);
            }
        }
        x
    }))
}

fn virtual_calls(size: Size) -> Result<Task, String> {
    trait Shape {
        fn area(&self, scale: u64) -> u64;
    }
    struct Square(u64);
    struct Box2(u64, u64);
    struct Triangle(u64, u64);
    struct Nothing;
    impl Shape for Square {
        fn area(&self, scale: u64) -> u64 {
            self.0 * self.0 * scale
        }
    }
    impl Shape for Box2 {
        fn area(&self, scale: u64) -> u64 {
            self.0 * self.1 * scale
        }
    }
    impl Shape for Triangle {
        fn area(&self, scale: u64) -> u64 {
            self.0 * self.1 * scale / 2
        }
    }
    impl Shape for Nothing {
        fn area(&self, scale: u64) -> u64 {
            scale & 1
        }
    }
    let mut random = Random::new(77);
    let shapes: Vec<Box<dyn Shape>> = (0..2000)
        .map(|_| -> Box<dyn Shape> {
            let (a, b) = (random.below(100), random.below(100));
            match random.below(4) {
                0 => Box::new(Square(a)),
                1 => Box::new(Box2(a, b)),
                2 => Box::new(Triangle(a, b)),
                _ => Box::new(Nothing),
            }
        })
        .collect();
    let rounds = u64::from(size.of(5000));
    Ok(Box::new(move || {
        let mut sum = 0u64;
        for scale in 0..rounds {
            for shape in &shapes {
                sum = sum.wrapping_add(shape.area(scale));
            }
        }
        sum
    }))
}

/// Byte code of the interpreter: a stack machine with four variables.
#[derive(Clone, Copy)]
enum Op {
    Push(i64),
    Load(u8),
    Store(u8),
    Add,
    Mul,
    Mod,
    Less,
    JumpIfZero(u16),
    Jump(u16),
    End,
}

fn interpreter(size: Size) -> Result<Task, String> {
    use Op::{Add, End, Jump, JumpIfZero, Less, Load, Mod, Mul, Push, Store};
    // i = 0; s = 1; while i < n { if i % 3 == 0 { s = (s * 31 + i) % 1000003 } else { s = s + i }; i = i + 1 }
    let program = [
        Push(0),
        Store(0),
        Push(1),
        Store(1),
        Load(0),
        Load(2),
        Less,
        JumpIfZero(30),
        Load(0),
        Push(3),
        Mod,
        JumpIfZero(17),
        Load(1),
        Load(0),
        Add,
        Store(1),
        Jump(25),
        Load(1),
        Push(31),
        Mul,
        Load(0),
        Add,
        Push(1_000_003),
        Mod,
        Store(1),
        Load(0),
        Push(1),
        Add,
        Store(0),
        Jump(4),
        End,
    ];
    let limit = i64::from(size.of(1_200_000));
    Ok(Box::new(move || {
        let program = black_box(&program[..]);
        let mut variables = [0i64; 4];
        variables[2] = limit;
        let mut stack: Vec<i64> = Vec::with_capacity(16);
        let mut at = 0;
        // The program pops only what it pushed; the numbers for an empty stack are never used.
        while let Some(&op) = program.get(at) {
            at += 1;
            match op {
                Push(n) => stack.push(n),
                Load(v) => stack.push(variables[usize::from(v & 3)]),
                Store(v) => variables[usize::from(v & 3)] = stack.pop().unwrap_or(0),
                Add | Mul | Mod | Less => {
                    let b = stack.pop().unwrap_or(1);
                    let a = stack.pop().unwrap_or(1);
                    stack.push(match op {
                        Add => a.wrapping_add(b),
                        Mul => a.wrapping_mul(b),
                        Mod => a.wrapping_rem(b.max(1)),
                        _ => i64::from(a < b),
                    });
                }
                JumpIfZero(to) => {
                    if stack.pop() == Some(0) {
                        at = usize::from(to);
                    }
                }
                Jump(to) => at = usize::from(to),
                End => break,
            }
        }
        mix(variables[0] as u64, variables[1] as u64)
    }))
}

fn deep(size: Size) -> Result<Task, String> {
    #[inline(never)]
    fn down(depth: u32, x: u64) -> u64 {
        if depth == 0 {
            return x;
        }
        black_box(down(depth - 1, x.wrapping_mul(5).wrapping_add(1))) ^ u64::from(depth)
    }
    let rounds = size.of(1600);
    Ok(Box::new(move || {
        (0..rounds).fold(1, |x, _| down(black_box(10_000), x))
    }))
}

/// What a jump back needs: the return address, RSP and the registers that a function must preserve.
#[repr(C)]
#[derive(Default)]
struct Place([u64; 8]);

/// Calls `work(place, depth)` with the place to jump back to; returns what it returns, or what a
/// [`jump`] to the place says.
#[unsafe(naked)]
unsafe extern "sysv64" fn catch(
    place: *mut Place,
    depth: u64,
    work: unsafe extern "sysv64" fn(*mut Place, u64) -> u64,
) -> u64 {
    naked_asm!(
        "mov [rdi], rbx",
        "mov [rdi + 8], rbp",
        "mov [rdi + 16], r12",
        "mov [rdi + 24], r13",
        "mov [rdi + 32], r14",
        "mov [rdi + 40], r15",
        "mov [rdi + 48], rsp",
        "mov rax, [rsp]",
        "mov [rdi + 56], rax",
        "sub rsp, 8",
        "call rdx",
        "add rsp, 8",
        "ret",
    )
}

/// Leaves all calls since the [`catch`] of `place`.
#[unsafe(naked)]
unsafe extern "sysv64" fn jump(place: *const Place, value: u64) -> ! {
    naked_asm!(
        "mov rax, rsi",
        "mov rbx, [rdi]",
        "mov rbp, [rdi + 8]",
        "mov r12, [rdi + 16]",
        "mov r13, [rdi + 24]",
        "mov r14, [rdi + 32]",
        "mov r15, [rdi + 40]",
        "mov rsp, [rdi + 48]",
        "mov rdx, [rdi + 56]",
        "add rsp, 8",
        "jmp rdx",
    )
}

#[inline(never)]
unsafe extern "sysv64" fn nested(place: *mut Place, depth: u64) -> u64 {
    if depth == 0 {
        // SAFETY: `catch` filled the place and is still on the stack; the frames in between own
        // nothing.
        unsafe { jump(place, 7) }
    }
    // SAFETY: as the caller's promise for this call.
    black_box(unsafe { nested(place, depth - 1) }) + 1
}

fn longjmp(size: Size) -> Result<Task, String> {
    let rounds = u64::from(size.of(6_000_000));
    Ok(Box::new(move || {
        let mut place = Place::default();
        let mut sum = 0;
        for round in 0..rounds {
            // SAFETY: `nested` jumps to the place only while `catch` is on the stack.
            sum += unsafe { catch(&raw mut place, 8 + (round & 7), nested) };
        }
        sum
    }))
}
