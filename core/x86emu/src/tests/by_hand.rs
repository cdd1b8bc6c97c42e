//! What the interpreter executes by hand: strings, stack, branches, traps, faults on the way.

use super::fake::Fake;
use super::random::Random;
use super::setup::*;
use crate::bits::*;
use crate::env::*;
use crate::interp::step;
use crate::state::*;
use std::vec;
use std::vec::Vec;

const NOT_PRESENT: u64 = 0x5000;

fn long(cpl: u8) -> (Fake, CpuState) {
    let mut env = machine();
    let cpu = long_mode(&mut env, cpl);
    (env, cpu)
}

/// Steps until RIP has passed `code`, at most `max` times.
fn run(cpu: &mut CpuState, env: &mut Fake, code: &[u8], max: usize) -> Result<usize, Stop> {
    cpu.rip = 0x1000;
    env.write(0x1000, code);
    for n in 1..=max {
        step(cpu, env)?;
        if cpu.rip == 0x1000 + code.len() as u64 {
            return Ok(n);
        }
        assert_eq!(cpu.rip, 0x1000);
    }
    panic!("still at it after {max} steps");
}

fn vector(stop: Stop) -> u8 {
    match stop {
        Stop::Exception(e) => e.vector,
        other => panic!("{other:?}"),
    }
}

#[test]
fn rep_movs_all_sizes_and_directions() {
    let mut random = Random(7);
    let (mut env, start) = long(0);
    for round in 0..400 {
        let mut cpu = start.clone();
        let size = 1usize << random.below(4);
        let down = random.one_in(3);
        let count = random.below(3000 / size as u64);
        let source = 0x20_000 + random.below(0x1800);
        // Often overlapping.
        let dest = if random.one_in(2) {
            source + random.below(64) - 32
        } else {
            0x30_000 + random.below(0x1800)
        };
        let mut memory = vec![0; 0x20_000];
        random.fill(&mut memory);
        env.write(0x1_8000, &memory);
        let step_by = |at: u64, n: u64| {
            let delta = n * size as u64;
            if down { at - delta } else { at + delta }
        };
        for n in 0..count {
            let from = (step_by(source + 0x2000, n) - 0x1_8000) as usize;
            let to = (step_by(dest + 0x2000, n) - 0x1_8000) as usize;
            let item = memory[from..from + size].to_vec();
            memory[to..to + size].copy_from_slice(&item);
        }
        cpu.gpr[gpr::RSI] = source + 0x2000;
        cpu.gpr[gpr::RDI] = dest + 0x2000;
        cpu.gpr[gpr::RCX] = count;
        if down {
            cpu.rflags |= DF;
        }
        let code: &[u8] = match size {
            1 => &[0xf3, 0xa4],
            2 => &[0x66, 0xf3, 0xa5],
            4 => &[0xf3, 0xa5],
            _ => &[0xf3, 0x48, 0xa5],
        };
        run(&mut cpu, &mut env, code, 5000).unwrap();
        assert_eq!(cpu.gpr[gpr::RCX], 0);
        assert_eq!(cpu.gpr[gpr::RSI], step_by(source + 0x2000, count));
        assert_eq!(cpu.gpr[gpr::RDI], step_by(dest + 0x2000, count));
        assert!(
            env.read(0x1_8000, memory.len()) == memory,
            "round {round}: size {size} down {down} count {count} {source:x} {dest:x}"
        );
    }
}

#[test]
fn rep_movs_stops_at_a_fault() {
    let (mut env, mut cpu) = long(0);
    env.w64(pte(NOT_PRESENT), 0);
    cpu.gpr[gpr::RSI] = 0x20_000;
    cpu.gpr[gpr::RDI] = NOT_PRESENT - 10;
    cpu.gpr[gpr::RCX] = 3;
    let stop = run(&mut cpu, &mut env, &[0xf3, 0x48, 0xa5], 9).unwrap_err();
    assert_eq!(stop, Stop::pf(2, NOT_PRESENT));
    // One whole element; the second crosses into the page that faults and writes nothing.
    assert_eq!(cpu.gpr[gpr::RCX], 2);
    assert_eq!(cpu.gpr[gpr::RDI], NOT_PRESENT - 2);
    assert_eq!(cpu.rip, 0x1000);
}

#[test]
fn stos_lods_xlat() {
    let (mut env, mut cpu) = long(0);
    cpu.gpr[gpr::RAX] = 0x1122_3344_5566_7788;
    // 67: EDI and ECX count, the upper halves are cleared.
    cpu.gpr[gpr::RDI] = 0xffff_0000_0000_2ff0;
    cpu.gpr[gpr::RCX] = 0xffff_0000_0000_0010;
    run(&mut cpu, &mut env, &[0x67, 0xf3, 0xab], 9).unwrap();
    assert_eq!(cpu.gpr[gpr::RDI], 0x3030);
    assert_eq!(cpu.gpr[gpr::RCX], 0);
    assert_eq!(env.r32(0x2fec), 0);
    assert!((0..16).all(|n| env.r32(0x2ff0 + 4 * n) == 0x5566_7788));
    cpu.gpr[gpr::RSI] = 0x2ff1;
    run(&mut cpu, &mut env, &[0xac], 1).unwrap();
    assert_eq!(cpu.gpr[gpr::RAX], 0x1122_3344_5566_7777);
    cpu.gpr[gpr::RBX] = 0x2ff0 - 0x77 + 3;
    run(&mut cpu, &mut env, &[0xd7], 1).unwrap();
    assert_eq!(cpu.gpr[gpr::RAX] & 0xff, 0x55);
    // A count of zero touches nothing.
    cpu.gpr[gpr::RCX] = 0;
    cpu.gpr[gpr::RSI] = 0xdead_0000_0000_0000;
    run(&mut cpu, &mut env, &[0xf3, 0xac], 1).unwrap();
}

#[test]
fn scas_and_cmps() {
    let (mut env, mut cpu) = long(0);
    env.write(0x2ff8, b"hello, world\0");
    // strlen across a page.
    cpu.gpr[gpr::RDI] = 0x2ff8;
    cpu.gpr[gpr::RCX] = !0;
    cpu.gpr[gpr::RAX] = 0;
    run(&mut cpu, &mut env, &[0xf2, 0xae], 9).unwrap();
    assert_eq!(!cpu.gpr[gpr::RCX] - 1, 12);
    assert!(cpu.rflags & ZF != 0);
    env.write(0x4ffb, b"hello, world!");
    cpu.gpr[gpr::RSI] = 0x2ff8;
    cpu.gpr[gpr::RDI] = 0x4ffb;
    cpu.gpr[gpr::RCX] = 100;
    run(&mut cpu, &mut env, &[0xf3, 0xa6], 9).unwrap();
    assert_eq!(cpu.gpr[gpr::RSI], 0x2ff8 + 13);
    assert_eq!(cpu.gpr[gpr::RCX], 87);
    assert!(cpu.rflags & (ZF | CF) == CF, "0 is below '!'");
    // A word that crosses the page is compared by hand.
    cpu.gpr[gpr::RSI] = 0x2fff;
    cpu.gpr[gpr::RDI] = 0x5002;
    cpu.gpr[gpr::RCX] = 1;
    run(&mut cpu, &mut env, &[0xf3, 0x66, 0xa7], 9).unwrap();
    assert!(cpu.rflags & ZF != 0);
    // Downwards.
    cpu.rflags |= DF;
    cpu.gpr[gpr::RAX] = u64::from(b'h');
    cpu.gpr[gpr::RDI] = 0x3004;
    cpu.gpr[gpr::RCX] = 100;
    run(&mut cpu, &mut env, &[0xf2, 0xae], 99).unwrap();
    assert_eq!(cpu.gpr[gpr::RDI], 0x2ff7);
    assert_eq!(cpu.gpr[gpr::RCX], 100 - 13);
}

#[test]
fn devices_see_every_element_once() {
    let (mut env, mut cpu) = long(0);
    env.device_byte = 0x5a;
    cpu.gpr[gpr::RSI] = 0x4000_0010;
    cpu.gpr[gpr::RDI] = 0x2000;
    cpu.gpr[gpr::RCX] = 4;
    env.write(0x1000, &[0xf3, 0xa5]);
    cpu.rip = 0x1000;
    let mut exits = 0;
    while cpu.rip == 0x1000 {
        env.not_yet = usize::from(exits % 2 == 0);
        match step(&mut cpu, &mut env) {
            Ok(()) => {}
            Err(stop) => assert_eq!(stop, Stop::Exit(Exit::UserSpace)),
        }
        exits += 1;
    }
    let reads: Vec<u64> = env.mmio.iter().map(|a| a.address).collect();
    assert_eq!(reads, [0xc000_0010, 0xc000_0014, 0xc000_0018, 0xc000_001c]);
    assert_eq!(env.read(0x2000, 16), [0x5a; 16]);
    // A read-modify-write of a device: one read, one write.
    env.mmio.clear();
    cpu.gpr[gpr::RBX] = 0x4000_0100;
    cpu.gpr[gpr::RAX] = 0x11;
    run(&mut cpu, &mut env, &[0xf0, 0x00, 0x03], 1).unwrap();
    assert_eq!(env.mmio.len(), 2);
    assert_eq!(env.mmio[1].data, [0x6b]);
    // Ports.
    cpu.gpr[gpr::RDX] = 0x3f8;
    cpu.gpr[gpr::RCX] = 3;
    cpu.gpr[gpr::RDI] = 0x2000;
    run(&mut cpu, &mut env, &[0xf3, 0x6d], 3).unwrap();
    cpu.gpr[gpr::RSI] = 0x2000;
    cpu.gpr[gpr::RCX] = 2;
    run(&mut cpu, &mut env, &[0xf3, 0x6e], 2).unwrap();
    run(&mut cpu, &mut env, &[0xe4, 0x60], 1).unwrap();
    run(&mut cpu, &mut env, &[0x66, 0xef], 1).unwrap();
    let sizes: Vec<(bool, usize)> = env.ports.iter().map(|a| (a.write, a.data.len())).collect();
    assert_eq!(
        sizes,
        [
            (false, 4),
            (false, 4),
            (false, 4),
            (true, 1),
            (true, 1),
            (false, 1),
            (true, 2)
        ]
    );
    // INS to a page that is not writable must not read the device.
    env.ports.clear();
    env.w64(pte(0x6000), 0x6001);
    cpu.gpr[gpr::RDI] = 0x6000;
    let stop = run(&mut cpu, &mut env, &[0x6d], 1).unwrap_err();
    assert_eq!(vector(stop), 14);
    assert!(env.ports.is_empty());
}

#[test]
fn stack_forms_in_64_bit_mode() {
    let (mut env, mut cpu) = long(0);
    let top = 0x8_0000;
    cpu.gpr[gpr::RAX] = 0x1111_2222_3333_4444;
    run(&mut cpu, &mut env, &[0x50], 1).unwrap();
    assert_eq!(env.r64(top - 8), 0x1111_2222_3333_4444);
    run(&mut cpu, &mut env, &[0x66, 0x50], 1).unwrap();
    assert_eq!(cpu.gpr[gpr::RSP], top - 10);
    run(&mut cpu, &mut env, &[0x66, 0x59], 1).unwrap();
    assert_eq!(cpu.gpr[gpr::RCX], 0x4444);
    // PUSH RSP pushes the old value, POP RSP keeps the popped one.
    run(&mut cpu, &mut env, &[0x54], 1).unwrap();
    assert_eq!(env.r64(top - 16), top - 8);
    run(&mut cpu, &mut env, &[0x5c], 1).unwrap();
    assert_eq!(cpu.gpr[gpr::RSP], top - 8);
    // Sign-extended immediates.
    run(&mut cpu, &mut env, &[0x6a, 0xfe], 1).unwrap();
    assert_eq!(env.r64(top - 16), -2i64 as u64);
    run(&mut cpu, &mut env, &[0x68, 0, 0, 0, 0x80], 1).unwrap();
    assert_eq!(env.r64(top - 24), 0xffff_ffff_8000_0000);
    // POP [RSP]: the address uses the incremented RSP.
    run(&mut cpu, &mut env, &[0x8f, 0x04, 0x24], 1).unwrap();
    assert_eq!(env.r64(top - 16), 0xffff_ffff_8000_0000);
    assert_eq!(cpu.gpr[gpr::RSP], top - 16);
    // PUSH [mem], PUSH FS.
    run(&mut cpu, &mut env, &[0xff, 0x34, 0x24], 1).unwrap();
    assert_eq!(env.r64(top - 24), 0xffff_ffff_8000_0000);
    cpu.seg[sreg::FS].selector = 0x53;
    run(&mut cpu, &mut env, &[0x0f, 0xa0], 1).unwrap();
    assert_eq!(env.r64(top - 32) & 0xffff, 0x53);
    // ENTER and LEAVE.
    cpu.gpr[gpr::RSP] = top;
    cpu.gpr[gpr::RBP] = 0x7_0000;
    env.w64(0x7_0000 - 8, 0xaaaa);
    env.w64(0x7_0000 - 16, 0xbbbb);
    run(&mut cpu, &mut env, &[0xc8, 0x20, 0, 3], 1).unwrap();
    assert_eq!(cpu.gpr[gpr::RBP], top - 8);
    assert_eq!(cpu.gpr[gpr::RSP], top - 8 - 24 - 0x20);
    assert_eq!(
        [1, 2, 3, 4].map(|n| env.r64(top - 8 * n)),
        [0x7_0000, 0xaaaa, 0xbbbb, top - 8]
    );
    run(&mut cpu, &mut env, &[0xc9], 1).unwrap();
    assert_eq!((cpu.gpr[gpr::RSP], cpu.gpr[gpr::RBP]), (top, 0x7_0000));
    // A fault leaves RSP alone.
    cpu.gpr[gpr::RSP] = NOT_PRESENT + 4;
    env.w64(pte(NOT_PRESENT), 0);
    let stop = run(&mut cpu, &mut env, &[0x50], 1).unwrap_err();
    assert_eq!(vector(stop), 14);
    assert_eq!(cpu.gpr[gpr::RSP], NOT_PRESENT + 4);
    // A stack beyond the canonical range is #SS.
    cpu.gpr[gpr::RSP] = 0x8000_0000_0000_0000;
    assert_eq!(run(&mut cpu, &mut env, &[0x50], 1), Err(Stop::ss(0)));
}

#[test]
fn stack_forms_outside_64_bit_mode() {
    for (bits, size) in [(CodeSize::Bits16, 2u64), (CodeSize::Bits32, 4)] {
        let mut env = machine();
        let mut cpu = flat_mode(bits, 0);
        for n in 0..8 {
            cpu.gpr[n] = 0x1111_1111 * (n as u64 + 1);
        }
        cpu.gpr[gpr::RSP] = 0x8000;
        run(&mut cpu, &mut env, &[0x60], 1).unwrap();
        assert_eq!(cpu.gpr[gpr::RSP], 0x8000 - 8 * size);
        let read = |env: &mut Fake, at: u64| {
            if size == 2 {
                u64::from(env.r16(at))
            } else {
                u64::from(env.r32(at))
            }
        };
        let mask = (1u64 << (8 * size)) - 1;
        assert_eq!(read(&mut env, 0x8000 - size), 0x1111_1111 & mask);
        assert_eq!(read(&mut env, 0x8000 - 5 * size), 0x8000);
        assert_eq!(read(&mut env, 0x8000 - 8 * size), 0x8888_8888 & mask);
        let before = cpu.gpr;
        cpu.gpr = [0; 16];
        cpu.gpr[gpr::RSP] = before[gpr::RSP];
        run(&mut cpu, &mut env, &[0x61], 1).unwrap();
        assert_eq!(cpu.gpr[gpr::RSP], 0x8000);
        assert_eq!(cpu.gpr[gpr::RDI], 0x8888_8888 & mask);
        // The other operand size.
        run(&mut cpu, &mut env, &[0x66, 0x50], 1).unwrap();
        assert_eq!(cpu.gpr[gpr::RSP], 0x8000 - (6 - size));
        run(&mut cpu, &mut env, &[0x66, 0x5b], 1).unwrap();
        // INC and DEC by their short forms; flags but not CF.
        cpu.gpr[gpr::RCX] = 0xffff_ffff;
        cpu.rflags |= CF;
        run(&mut cpu, &mut env, &[0x41], 1).unwrap();
        assert_eq!(cpu.gpr[gpr::RCX] & mask, 0);
        assert!(cpu.rflags & (CF | ZF) == CF | ZF);
        run(&mut cpu, &mut env, &[0x4c], 1).unwrap();
        assert_eq!(cpu.gpr[gpr::RSP], 0x7fff);
        cpu.gpr[gpr::RSP] = 0x8000;
        // CALL and RET n.
        env.write(0x1000, &[0xe8, 0xfd, 0x0f]);
        if size == 4 {
            env.write(0x1000, &[0xe8, 0xfb, 0x0f, 0, 0]);
        }
        cpu.rip = 0x1000;
        step(&mut cpu, &mut env).unwrap();
        assert_eq!(cpu.rip, 0x2000);
        assert_eq!(cpu.gpr[gpr::RSP], 0x8000 - size);
        env.write(0x2000, &[0xc2, 4, 0]);
        step(&mut cpu, &mut env).unwrap();
        assert_eq!(cpu.rip, 0x1000 + 1 + size);
        assert_eq!(cpu.gpr[gpr::RSP], 0x8004);
    }
    // A 16-bit stack wraps.
    let mut env = machine();
    let mut cpu = flat_mode(CodeSize::Bits16, 0);
    cpu.gpr[gpr::RSP] = 0xabcd_0000;
    cpu.gpr[gpr::RAX] = 0x1234;
    run(&mut cpu, &mut env, &[0x50], 1).unwrap();
    assert_eq!(cpu.gpr[gpr::RSP], 0xabcd_fffe);
    assert_eq!(env.r16(0xfffe), 0x1234);
    // A jump beyond the segment limit faults at the jump.
    assert_eq!(
        run(&mut cpu, &mut env, &[0x66, 0xe9, 0, 0, 1, 0], 1),
        Err(Stop::gp(0))
    );
}

#[test]
fn decimal_and_bound() {
    let mut env = machine();
    let mut cpu = flat_mode(CodeSize::Bits32, 0);
    // AAM and AAD.
    cpu.gpr[gpr::RAX] = 0x003f;
    run(&mut cpu, &mut env, &[0xd4, 10], 1).unwrap();
    assert_eq!(cpu.gpr[gpr::RAX], 0x0603);
    run(&mut cpu, &mut env, &[0xd5, 10], 1).unwrap();
    assert_eq!(cpu.gpr[gpr::RAX], 63);
    assert_eq!(run(&mut cpu, &mut env, &[0xd4, 0], 1), Err(Stop::de()));
    // 79 + 35 = 114 in BCD.
    cpu.gpr[gpr::RAX] = 0x79;
    cpu.gpr[gpr::RBX] = 0x35;
    run(&mut cpu, &mut env, &[0x00, 0xd8], 1).unwrap();
    run(&mut cpu, &mut env, &[0x27], 1).unwrap();
    assert_eq!(cpu.gpr[gpr::RAX] & 0xff, 0x14);
    assert!(cpu.rflags & CF != 0);
    // 35 - 47 = -12, which borrows.
    cpu.gpr[gpr::RAX] = 0x35;
    cpu.gpr[gpr::RBX] = 0x47;
    run(&mut cpu, &mut env, &[0x28, 0xd8], 1).unwrap();
    run(&mut cpu, &mut env, &[0x2f], 1).unwrap();
    assert_eq!(cpu.gpr[gpr::RAX] & 0xff, 0x88);
    assert!(cpu.rflags & CF != 0);
    // AAA.
    cpu.gpr[gpr::RAX] = 0x000f;
    cpu.rflags &= !0x8d5;
    run(&mut cpu, &mut env, &[0x37], 1).unwrap();
    assert_eq!(cpu.gpr[gpr::RAX], 0x0105);
    // SALC.
    run(&mut cpu, &mut env, &[0xd6], 1).unwrap();
    assert_eq!(cpu.gpr[gpr::RAX], 0x01ff);
    // BOUND.
    env.w32(0x2000, -5i32 as u32);
    env.w32(0x2004, 9);
    cpu.gpr[gpr::RBX] = 0x2000;
    for (index, fine) in [(-5i32, true), (9, true), (-6, false), (10, false)] {
        cpu.gpr[gpr::RCX] = u64::from(index as u32);
        let result = run(&mut cpu, &mut env, &[0x62, 0x0b], 1);
        assert_eq!(result.is_ok(), fine);
    }
}

#[test]
fn branches() {
    let (mut env, mut cpu) = long(0);
    let mut go = |cpu: &mut CpuState, code: &[u8]| {
        cpu.rip = 0x1000;
        env.write(0x1000, code);
        step(cpu, &mut env).map(|()| cpu.rip)
    };
    assert_eq!(go(&mut cpu, &[0xeb, 0x80]), Ok(0x0f82));
    assert_eq!(
        go(&mut cpu, &[0xe9, 0, 0, 0, 0x80]),
        Ok(0xffff_ffff_8000_1005)
    );
    cpu.gpr[gpr::RAX] = 0x1234_5678;
    assert_eq!(go(&mut cpu, &[0xff, 0xe0]), Ok(0x1234_5678));
    cpu.gpr[gpr::RAX] = 1 << 62;
    assert_eq!(go(&mut cpu, &[0xff, 0xe0]), Err(Stop::gp(0)));
    assert_eq!(cpu.rip, 0x1000);
    // LOOP by RCX and by ECX.
    cpu.gpr[gpr::RCX] = 1 << 32;
    assert_eq!(go(&mut cpu, &[0xe2, 0x10]), Ok(0x1012));
    assert_eq!(cpu.gpr[gpr::RCX], 0xffff_ffff);
    cpu.gpr[gpr::RCX] = 0xffff_0000_0000_0001;
    assert_eq!(go(&mut cpu, &[0x67, 0xe2, 0x10]), Ok(0x1003));
    assert_eq!(cpu.gpr[gpr::RCX], 0);
    assert_eq!(go(&mut cpu, &[0xe3, 0x10]), Ok(0x1012));
    // Every condition against the flags.
    for cc in 0..16u8 {
        for bits in 0..32u64 {
            let (cf, pf, zf, sf, of) = (
                bits & 1 != 0,
                bits & 2 != 0,
                bits & 4 != 0,
                bits & 8 != 0,
                bits & 16 != 0,
            );
            let flag = |set: bool, bit: u64| if set { bit } else { 0 };
            cpu.rflags =
                2 | flag(cf, 1) | flag(pf, 4) | flag(zf, 0x40) | flag(sf, 0x80) | flag(of, 0x800);
            let base = match cc >> 1 {
                0 => of,
                1 => cf,
                2 => zf,
                3 => cf || zf,
                4 => sf,
                5 => pf,
                6 => sf != of,
                _ => zf || sf != of,
            };
            let taken = base != (cc & 1 != 0);
            let want = if taken { 0x1022 } else { 0x1002 };
            assert_eq!(go(&mut cpu, &[0x70 | cc, 0x20]), Ok(want), "{cc} {bits}");
        }
    }
}

#[test]
fn instruction_fetch() {
    let (mut env, mut cpu) = long(0);
    // The second page is not needed, so it may be missing.
    env.w64(pte(NOT_PRESENT), 0);
    env.write(NOT_PRESENT - 2, &[0x89, 0xc8]);
    cpu.rip = NOT_PRESENT - 2;
    step(&mut cpu, &mut env).unwrap();
    // Here it is needed.
    env.write(NOT_PRESENT - 2, &[0x48, 0xb8]);
    cpu.rip = NOT_PRESENT - 2;
    assert_eq!(step(&mut cpu, &mut env), Err(Stop::pf(0x10, NOT_PRESENT)));
    // Sixteen bytes are too many.
    env.write(0x1000, &[0x66; 15]);
    cpu.rip = 0x1000;
    assert_eq!(step(&mut cpu, &mut env), Err(Stop::gp(0)));
    // LOCK without a memory destination, and on an instruction that knows none.
    for code in [
        &[0xf0u8, 0x01, 0xc8][..],
        &[0xf0, 0x8b, 0x03],
        &[0xf0, 0x90],
        &[0x0f, 0x0b],
    ] {
        assert_eq!(
            run(&mut cpu, &mut env, code, 1),
            Err(Stop::ud()),
            "{code:x?}"
        );
    }
    // Hint NOPs.
    for code in [
        &[0x0fu8, 0x1f, 0x44, 0, 0][..],
        &[0xf3, 0x0f, 0x1e, 0xfa],
        &[0x0f, 0x1c, 0x03],
        &[0x0f, 0x18, 0x23],
        &[0x0f, 0x0d, 0x0b],
        &[0xf3, 0x48, 0x0f, 0x1e, 0xc8],
        &[0xf3, 0x90],
        &[0x0f, 0xae, 0xf0],
    ] {
        run(&mut cpu, &mut env, code, 1).unwrap_or_else(|e| panic!("{code:x?}: {e:?}"));
    }
    // Code in a device's page cannot run.
    cpu.rip = 0x4000_0000;
    assert_eq!(
        step(&mut cpu, &mut env),
        Err(Stop::Exit(Exit::EmulationFailed))
    );
}

#[test]
fn single_step_and_shadows() {
    let (mut env, mut cpu) = long(0);
    env.write(0x1000, &[0x90, 0x90, 0xfb, 0x90, 0x90]);
    cpu.rip = 0x1000;
    cpu.rflags |= TF;
    let trap = Stop::Exception(Exception {
        vector: 1,
        error: None,
        payload: 1 << 14,
    });
    assert_eq!(step(&mut cpu, &mut env), Err(trap));
    assert_eq!(cpu.rip, 0x1001);
    cpu.rflags &= !TF;
    cpu.rflags |= RF;
    step(&mut cpu, &mut env).unwrap();
    assert_eq!(cpu.rflags & RF, 0);
    step(&mut cpu, &mut env).unwrap();
    assert_eq!(cpu.shadow, shadow::STI);
    step(&mut cpu, &mut env).unwrap();
    assert_eq!(cpu.shadow, 0);
    // Repeated strings trap after each iteration.
    cpu.rflags |= TF;
    cpu.gpr[gpr::RDI] = 0x2000;
    cpu.gpr[gpr::RCX] = 3;
    env.write(0x1000, &[0xf3, 0xaa]);
    cpu.rip = 0x1000;
    assert_eq!(step(&mut cpu, &mut env), Err(trap));
    assert_eq!((cpu.rip, cpu.gpr[gpr::RCX]), (0x1000, 2));
    // Breakpoints: instruction at 0x1000, data write at 0x2004.
    cpu.rflags &= !(TF | RF);
    cpu.dr = [0x1000, 0x2004, 0, 0];
    cpu.dr7 = 0x400 | 1 | 4 | 0xd << 20;
    let hit = |bits| {
        Err(Stop::Exception(Exception {
            vector: 1,
            error: None,
            payload: bits,
        }))
    };
    assert_eq!(step(&mut cpu, &mut env), hit(1));
    cpu.rflags |= RF;
    env.write(0x1000, &[0x89, 0x03]);
    cpu.gpr[gpr::RBX] = 0x2006;
    assert_eq!(step(&mut cpu, &mut env), hit(2));
    assert_eq!(cpu.rip, 0x1002);
    // MOV from there reads only.
    cpu.dr[0] = 0;
    run(&mut cpu, &mut env, &[0x8b, 0x03], 1).unwrap();
    // RMW by the host is seen too.
    assert_eq!(run(&mut cpu, &mut env, &[0x01, 0x03], 1), {
        hit(2).map(|()| 0)
    });
}

#[test]
fn availability() {
    let (mut env, mut cpu) = long(0);
    let addps = [0x0f, 0x58, 0xc1];
    let vaddps = [0xc5, 0xf0, 0x58, 0xc1];
    let fadd = [0xd8, 0xc1];
    let popcnt = [0xf3, 0x0f, 0xb8, 0xc1];
    cpu.cr0 |= CR0_TS;
    for code in [
        &addps[..],
        &vaddps,
        &fadd,
        &[0x9b],
        &[0x0f, 0x77],
        &[0x0f, 0xae, 0x03],
    ] {
        assert_eq!(
            run(&mut cpu, &mut env, code, 1),
            Err(Stop::nm()),
            "{code:x?}"
        );
    }
    run(&mut cpu, &mut env, &popcnt, 1).unwrap();
    cpu.cr0 &= !CR0_TS;
    cpu.cr0 |= CR0_EM;
    assert_eq!(run(&mut cpu, &mut env, &addps, 1), Err(Stop::ud()));
    assert_eq!(run(&mut cpu, &mut env, &fadd, 1), Err(Stop::nm()));
    cpu.cr0 &= !CR0_EM;
    cpu.cr4 &= !CR4_OSFXSR;
    assert_eq!(run(&mut cpu, &mut env, &addps, 1), Err(Stop::ud()));
    cpu.cr4 |= CR4_OSFXSR;
    cpu.xcr0 = 3;
    assert_eq!(run(&mut cpu, &mut env, &vaddps, 1), Err(Stop::ud()));
    cpu.xcr0 = 7;
    cpu.cr4 &= !CR4_OSXSAVE;
    assert_eq!(run(&mut cpu, &mut env, &vaddps, 1), Err(Stop::ud()));
    cpu.cr4 |= CR4_OSXSAVE;
    env.features.leaf1_ecx &= !(1 << 23);
    assert_eq!(run(&mut cpu, &mut env, &popcnt, 1), Err(Stop::ud()));
    // VEX does not exist in real mode.
    let mut real = flat_mode(CodeSize::Bits16, 0);
    assert_eq!(run(&mut real, &mut env, &vaddps, 1), Err(Stop::ud()));
    // An unmasked x87 exception is reported by the next waiting instruction.
    let mut cpu = long_mode(&mut env, 0);
    cpu.xsave.0[0..2].copy_from_slice(&0x33bu16.to_le_bytes());
    cpu.xsave.0[512] = 3;
    run(&mut cpu, &mut env, &[0xd9, 0xe8], 1).unwrap(); // fld1
    run(&mut cpu, &mut env, &[0xd9, 0xee], 1).unwrap(); // fldz
    run(&mut cpu, &mut env, &[0xde, 0xf9], 1).unwrap(); // fdivp
    assert_eq!(run(&mut cpu, &mut env, &[0x9b], 1), Err(Stop::mf()));
    assert_eq!(run(&mut cpu, &mut env, &[0xd9, 0xe8], 1), Err(Stop::mf()));
    run(&mut cpu, &mut env, &[0xdb, 0xe2], 1).unwrap(); // fnclex
    run(&mut cpu, &mut env, &[0x9b], 1).unwrap();
    // #AC.
    let mut cpu = long_mode(&mut env, 3);
    cpu.cr0 |= CR0_AM;
    cpu.rflags |= AC;
    cpu.gpr[gpr::RBX] = 0x2002;
    assert_eq!(run(&mut cpu, &mut env, &[0x8b, 0x03], 1), Err(Stop::ac()));
    assert_eq!(run(&mut cpu, &mut env, &[0x01, 0x03], 1), Err(Stop::ac()));
    run(&mut cpu, &mut env, &[0x66, 0x8b, 0x03], 1).unwrap();
}

#[test]
fn rsp_as_an_operand() {
    let (mut env, mut cpu) = long(0);
    cpu.gpr[gpr::RAX] = 0x20;
    run(&mut cpu, &mut env, &[0x48, 0x29, 0xc4], 1).unwrap(); // sub rsp, rax
    assert_eq!(cpu.gpr[gpr::RSP], 0x7_ffe0);
    run(&mut cpu, &mut env, &[0x48, 0x83, 0xc4, 0x20], 1).unwrap(); // add rsp, 32
    assert_eq!(cpu.gpr[gpr::RSP], 0x8_0000);
    run(&mut cpu, &mut env, &[0x48, 0x01, 0xe4], 1).unwrap(); // add rsp, rsp
    assert_eq!(cpu.gpr[gpr::RSP], 0x10_0000);
    run(&mut cpu, &mut env, &[0x48, 0x94], 1).unwrap(); // xchg rsp, rax
    assert_eq!((cpu.gpr[gpr::RSP], cpu.gpr[gpr::RAX]), (0x20, 0x10_0000));
    cpu.gpr[gpr::RBX] = 0x2000;
    run(&mut cpu, &mut env, &[0x48, 0x87, 0x23], 1).unwrap(); // xchg [rbx], rsp
    assert_eq!((cpu.gpr[gpr::RSP], env.r64(0x2000)), (0, 0x20));
    cpu.gpr[gpr::RSP] = 0x2008;
    run(&mut cpu, &mut env, &[0x48, 0x01, 0x24, 0x24], 1).unwrap(); // add [rsp], rsp
    assert_eq!(env.r64(0x2008), 0x2008);
    run(&mut cpu, &mut env, &[0x48, 0x0f, 0xcc], 1).unwrap(); // bswap rsp
    assert_eq!(cpu.gpr[gpr::RSP], 0x0820_0000_0000_0000);
    run(&mut cpu, &mut env, &[0x0f, 0xb6, 0xe4], 1).unwrap(); // movzx esp, ah
    assert_eq!(cpu.gpr[gpr::RSP], 0);
}

#[test]
fn addresses() {
    let (mut env, mut cpu) = long(0);
    env.w64(0x2000, 0x1111);
    // The last 2 MiB of the address space map the same RAM.
    let high = |at: u64| (at as u32).wrapping_sub(0x20_0000).to_le_bytes();
    let [a, b, c, d] = high(0x2000);
    run(&mut cpu, &mut env, &[0x48, 0x8b, 0x04, 0x25, a, b, c, d], 1).unwrap();
    assert_eq!(cpu.gpr[gpr::RAX], 0x1111);
    // With 67 the same displacement is not sign-extended.
    let stop = run(
        &mut cpu,
        &mut env,
        &[0x67, 0x48, 0x8b, 0x04, 0x25, a, b, c, d],
        1,
    );
    assert_eq!(stop, Err(Stop::pf(0, 0xffe0_2000)));
    // RIP-relative, with and without 67.
    env.write(0x1000, &[0x48, 0x8b, 0x0d, 0xf9, 0x0f, 0, 0]);
    cpu.rip = 0x1000;
    step(&mut cpu, &mut env).unwrap();
    assert_eq!(cpu.gpr[gpr::RCX], 0x1111);
    // moffs64, segment base, 32-bit base and index with wrap-around.
    run(
        &mut cpu,
        &mut env,
        &[0x48, 0xa1, 0, 0x20, 0, 0, 0, 0, 0, 0],
        1,
    )
    .unwrap();
    assert_eq!(cpu.gpr[gpr::RAX], 0x1111);
    cpu.seg[sreg::GS].base = 0x1ff0;
    run(
        &mut cpu,
        &mut env,
        &[0x65, 0x8b, 0x14, 0x25, 0x10, 0, 0, 0],
        1,
    )
    .unwrap();
    assert_eq!(cpu.gpr[gpr::RDX], 0x1111);
    cpu.gpr[gpr::RBX] = 0x5_ffff_fff0;
    cpu.gpr[gpr::RSI] = 0x7_0000_1008;
    run(&mut cpu, &mut env, &[0x67, 0x48, 0x03, 0x14, 0x73], 1).unwrap();
    assert_eq!(cpu.gpr[gpr::RDX], 0x2222);
    // LEA has no segment and no fault.
    cpu.gpr[gpr::RBX] = 0x8000_0000_0000_0000;
    run(&mut cpu, &mut env, &[0x65, 0x48, 0x8d, 0x43, 0xff], 1).unwrap();
    assert_eq!(cpu.gpr[gpr::RAX], 0x7fff_ffff_ffff_ffff);
    // A bit far outside the operand, both ways.
    cpu.gpr[gpr::RBX] = 0x2000;
    for bit in [-4097i64, -1, 0, 31, 32, 40_000] {
        cpu.gpr[gpr::RCX] = bit as u64;
        let byte = (0x2000 + bit.div_euclid(8)) as u64;
        let before = env.read(byte, 1)[0];
        run(&mut cpu, &mut env, &[0xf0, 0x48, 0x0f, 0xbb, 0x0b], 1).unwrap();
        let flipped = before ^ 1 << bit.rem_euclid(8);
        assert_eq!(env.read(byte, 1)[0], flipped, "bit {bit}");
    }
    // 16-bit addressing wraps within 64 KiB, and BP means SS.
    let mut real = flat_mode(CodeSize::Bits16, 0);
    real.seg[sreg::SS].base = 0x1_0000;
    real.gpr[gpr::RBP] = 0xfff0;
    real.gpr[gpr::RSI] = 0x2010;
    env.w16(0x1_2000, 0x4242);
    run(&mut real, &mut env, &[0x8b, 0x02], 1).unwrap();
    assert_eq!(real.gpr[gpr::RAX] & 0xffff, 0x4242);
    // Beyond the limit: #GP, through SS #SS.
    real.gpr[gpr::RBX] = 0xffff;
    assert_eq!(run(&mut real, &mut env, &[0x8b, 0x07], 1), Err(Stop::gp(0)));
    real.gpr[gpr::RBP] = 0xffff;
    assert_eq!(
        run(&mut real, &mut env, &[0x8b, 0x46, 0], 1),
        Err(Stop::ss(0))
    );
}

#[test]
fn steps_behind_a_trait_object() {
    let (mut env, mut cpu) = long(0);
    env.write(0x1000, &[0x48, 0xff, 0x03]);
    cpu.gpr[gpr::RBX] = 0x2000;
    let object: &mut dyn Env = &mut env;
    step(&mut cpu, object).unwrap();
    assert_eq!(env.r64(0x2000), 1);
}
