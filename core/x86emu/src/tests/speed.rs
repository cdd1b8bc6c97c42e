//! What a step costs; run with `cargo test --release -p x86emu speed -- --ignored --nocapture`.

use super::setup::*;
use crate::interp;
use crate::state::*;
use std::println;
use std::time::Instant;

fn measure(what: &str, code: &[u8]) {
    let mut env = machine();
    let mut cpu = long_mode(&mut env, 0);
    env.write(0x1000, code);
    let batch = 1000;
    // The best batch: others share this machine.
    let best = (0..200)
        .map(|_| {
            let start = Instant::now();
            for _ in 0..batch {
                cpu.rip = 0x1000;
                cpu.gpr[gpr::RSP] = 0x8_0000;
                cpu.gpr[gpr::RBX] = 0x2000;
                cpu.gpr[gpr::RSI] = 0x3000;
                cpu.gpr[gpr::RDI] = 0x4000;
                cpu.gpr[gpr::RCX] = 512;
                interp::step(&mut cpu, &mut env).unwrap();
            }
            start.elapsed().as_nanos() as u64
        })
        .min()
        .unwrap_or(0);
    println!("{what:32} {:6.1} ns", best as f64 / f64::from(batch));
}

#[test]
#[ignore = "a measurement"]
fn speed() {
    measure("jmp", &[0xeb, 0x10]);
    measure("jne", &[0x75, 0x10]);
    measure("nop", &[0x90]);
    measure("mov rax, [rbx]", &[0x48, 0x8b, 0x03]);
    measure("mov [rbx], rax", &[0x48, 0x89, 0x03]);
    measure("push rax", &[0x50]);
    measure("call", &[0xe8, 0, 0, 0, 0]);
    measure("ret", &[0xc3]);
    measure("add rax, rcx", &[0x48, 0x01, 0xc8]);
    measure("add [rbx], rax", &[0x48, 0x01, 0x03]);
    measure("lock xadd [rbx], eax", &[0xf0, 0x0f, 0xc1, 0x03]);
    measure("movaps xmm0, [rbx]", &[0x0f, 0x28, 0x03]);
    measure("addps xmm0, [rbx]", &[0x0f, 0x58, 0x03]);
    measure("fld qword [rbx]", &[0xdd, 0x03]);
    measure("rep movsq, a page", &[0xf3, 0x48, 0xa5]);
    measure("movsb", &[0xa4]);
    measure("fxsave [rbx]", &[0x0f, 0xae, 0x03]);
}
