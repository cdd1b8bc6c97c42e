//! Arbitrary bytes in arbitrary state: the interpreter must neither panic nor forget its promises.

use super::random::Random;
use super::setup::*;
use crate::env::Stop;
use crate::interp;
use crate::state::*;

const ROUNDS: usize = 100_000;

/// Random code, biased to prefixes and two-byte opcodes.
fn code(random: &mut Random) -> [u8; 24] {
    let mut bytes = [0; 24];
    random.fill(&mut bytes);
    for byte in &mut bytes[..4] {
        if random.one_in(4) {
            *byte = random.pick(&[
                0x66, 0x67, 0xf0, 0xf2, 0xf3, 0x0f, 0x48, 0x4c, 0xc4, 0xc5, 0x62, 0x65, 0x2e,
            ]);
        }
    }
    bytes
}

fn run(mode: CodeSize, seed: u64) {
    let mut env = machine();
    let mut random = Random(seed);
    let long = long_mode(&mut env, 0);
    let (mut done, mut faults) = (0, 0);
    for _ in 0..ROUNDS {
        let mut cpu = match mode {
            CodeSize::Bits64 => long.clone(),
            bits => flat_mode(bits, 0),
        };
        // The tables may have been overwritten.
        if random.one_in(16) {
            let _ = long_mode(&mut env, 0);
        }
        random.state(&mut cpu, true);
        for n in 0..16 {
            if random.one_in(2) {
                cpu.gpr[n] = random.below(0x20_0000);
            }
        }
        cpu.rflags = random.next() & 0x24_7fd5 | 2;
        if mode == CodeSize::Bits64 && random.one_in(2) {
            cpu.cpl = 3;
        }
        if random.one_in(8) {
            cpu.dr7 = random.next() & 0xffff_23ff | 0x400;
            cpu.dr = [random.below(0x2000); 4];
        }
        if random.one_in(8) {
            cpu.xsave.0[576..].fill(0x5a);
            cpu.xsave.0[512] = random.next() as u8 & 0xe7;
        }
        if random.one_in(8) {
            for segment in &mut cpu.seg {
                segment.base = random.value();
                segment.limit = random.value() as u32;
            }
            cpu.seg[sreg::CS].base = 0;
            cpu.seg[sreg::CS].limit = !0;
        }
        cpu.rip = random.pick(&[0x1000, 0x1ff8]);
        env.write(cpu.rip, &code(&mut random));
        let before = cpu.clone();
        match interp::step(&mut cpu, &mut env) {
            Ok(()) => done += 1,
            Err(Stop::Exception(e)) => {
                assert!(e.vector < 32);
                faults += 1;
                // Traps come after the instruction, faults leave RIP where it was.
                // After a task switch they belong to the new task.
                if e.vector != 1 && cpu.tr == before.tr {
                    assert_eq!(cpu.rip, before.rip, "{e:?}");
                }
            }
            Err(Stop::Exit(_)) => {}
        }
        assert_eq!(cpu.rflags & 2, 2);
        env.mmio.clear();
        env.ports.clear();
        env.flushes.clear();
        env.msrs.clear();
    }
    assert!(
        done > ROUNDS / 10 && faults > ROUNDS / 10,
        "{done} {faults}"
    );
}

#[test]
fn bytes_in_64_bit_mode() {
    run(CodeSize::Bits64, 126415);
}

#[test]
fn bytes_in_32_bit_mode() {
    run(CodeSize::Bits32, 126415);
}

#[test]
fn bytes_in_16_bit_mode() {
    run(CodeSize::Bits16, 126415);
}
