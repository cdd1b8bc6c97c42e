//! Masked accesses, gathers and scatters, and the XSAVE family: against the host CPU where it can
//! tell, else against the manual.

use super::fake::Fake;
use super::native::Native;
use super::random::{Random, host_components};
use super::setup::*;
use crate::env::*;
use crate::interp::step;
use crate::interp::vector;
use crate::state::*;
use iced_x86::{Code, Encoder, Instruction, MemoryOperand, Register};
use std::println;
use std::vec::Vec;

const NOT_PRESENT: u64 = 0x5000;

#[repr(C, align(4096))]
struct Host([u8; 8192]);

fn avx512() -> bool {
    let have = host_components() & 0xe0 == 0xe0;
    if !have {
        println!("skipped: the host has no AVX-512");
    }
    have
}

fn avx() -> bool {
    let have = host_components() & 4 != 0;
    if !have {
        println!("skipped: the host has no AVX");
    }
    have
}

fn setup() -> (Fake, CpuState) {
    let mut env = machine();
    let cpu = long_mode(&mut env, 0);
    env.w64(pte(NOT_PRESENT), 0);
    (env, cpu)
}

fn go(cpu: &mut CpuState, env: &mut Fake, code: &[u8]) -> Result<(), Stop> {
    cpu.rip = 0x1000;
    env.write(0x1000, code);
    step(cpu, env)
}

fn counting() -> [u8; 64] {
    core::array::from_fn(|n| n as u8 + 1)
}

#[test]
fn masked_avx_stops_at_the_page() {
    if !avx() {
        return;
    }
    let (mut env, mut cpu) = setup();
    let mut mask = [0; 64];
    mask[3] = 0x80;
    mask[7] = 0x80;
    vector::set_zmm(&mut cpu.xsave, 1, &mask);
    vector::set_zmm(&mut cpu.xsave, 2, &counting());
    // vmaskmovps [rbx], ymm1, ymm2: two elements before the page that is missing.
    cpu.gpr[gpr::RBX] = NOT_PRESENT - 8;
    go(&mut cpu, &mut env, &[0xc4, 0xe2, 0x75, 0x2e, 0x13]).unwrap();
    assert_eq!(env.read(NOT_PRESENT - 8, 8), [1, 2, 3, 4, 5, 6, 7, 8]);
    // And back: vmaskmovps ymm3, ymm1, [rbx].
    go(&mut cpu, &mut env, &[0xc4, 0xe2, 0x75, 0x2c, 0x1b]).unwrap();
    let value = vector::zmm(&cpu.xsave, 3);
    assert_eq!(value[..8], counting()[..8]);
    assert!(value[8..].iter().all(|&b| b == 0));
    // A third element faults, and writes nothing.
    mask[11] = 0x80;
    vector::set_zmm(&mut cpu.xsave, 1, &mask);
    env.w64(NOT_PRESENT - 8, 0);
    let stop = go(&mut cpu, &mut env, &[0xc4, 0xe2, 0x75, 0x2e, 0x13]);
    assert_eq!(stop, Err(Stop::pf(2, NOT_PRESENT)));
    assert_eq!(env.r64(NOT_PRESENT - 8), 0);
}

#[test]
fn masked_avx512_stops_at_the_page() {
    if !avx512() {
        return;
    }
    let (mut env, mut cpu) = setup();
    vector::set_zmm(&mut cpu.xsave, 2, &counting());
    vector::set_opmask(&mut cpu.xsave, 1, 0b101);
    cpu.gpr[gpr::RBX] = NOT_PRESENT - 12;
    // vmovdqu32 [rbx]{k1}, zmm2
    go(&mut cpu, &mut env, &[0x62, 0xf1, 0x7e, 0x49, 0x7f, 0x13]).unwrap();
    assert_eq!(
        env.read(NOT_PRESENT - 12, 12),
        [1, 2, 3, 4, 0, 0, 0, 0, 9, 10, 11, 12]
    );
    // vpcompressd [rbx]{k1}, zmm2: two elements, packed.
    vector::set_opmask(&mut cpu.xsave, 1, 0x8001);
    go(&mut cpu, &mut env, &[0x62, 0xf2, 0x7d, 0x49, 0x8b, 0x13]).unwrap();
    assert_eq!(
        env.read(NOT_PRESENT - 12, 12),
        [1, 2, 3, 4, 61, 62, 63, 64, 9, 10, 11, 12]
    );
    // vpaddd zmm3{k1}{z}, zmm2, [rbx]: element 15 is beyond the page.
    let stop = go(&mut cpu, &mut env, &[0x62, 0xf1, 0x6d, 0xc9, 0xfe, 0x1b]);
    assert_eq!(stop, Err(Stop::pf(0, NOT_PRESENT - 12 + 60)));
    vector::set_opmask(&mut cpu.xsave, 1, 1);
    go(&mut cpu, &mut env, &[0x62, 0xf1, 0x6d, 0xc9, 0xfe, 0x1b]).unwrap();
    assert_eq!(vector::zmm(&cpu.xsave, 3)[..8], [2, 4, 6, 8, 0, 0, 0, 0]);
    // A broadcast with nothing selected does not touch memory.
    cpu.gpr[gpr::RBX] = NOT_PRESENT;
    vector::set_opmask(&mut cpu.xsave, 1, 0);
    go(&mut cpu, &mut env, &[0x62, 0xf1, 0x6d, 0xd9, 0xfe, 0x1b]).unwrap();
    // A shuffle reads all of its operand whatever the mask: vpunpckldq zmm3{k1}, zmm2, [rbx].
    let stop = go(&mut cpu, &mut env, &[0x62, 0xf1, 0x6d, 0x49, 0x62, 0x1b]);
    assert_eq!(stop, Err(Stop::pf(0, NOT_PRESENT)));
}

#[test]
fn maskmov_writes_chosen_bytes() {
    let (mut env, mut cpu) = setup();
    let mut mask = [0; 64];
    mask[0] = 0x80;
    mask[5] = 0xff;
    mask[6] = 0x7f;
    vector::set_zmm(&mut cpu.xsave, 1, &counting());
    vector::set_zmm(&mut cpu.xsave, 2, &mask);
    cpu.gpr[gpr::RDI] = NOT_PRESENT - 6;
    go(&mut cpu, &mut env, &[0x66, 0x0f, 0xf7, 0xca]).unwrap();
    assert_eq!(env.read(NOT_PRESENT - 6, 6), [1, 0, 0, 0, 0, 6]);
    // MMX: mm1 through mm2, loaded by the host.
    env.w64(0x2000, u64::from_le_bytes([1, 2, 3, 4, 5, 6, 7, 8]));
    env.w64(0x2008, 0x80_0000_0000_0080);
    cpu.gpr[gpr::RBX] = 0x2000;
    go(&mut cpu, &mut env, &[0x0f, 0x6f, 0x0b]).unwrap();
    go(&mut cpu, &mut env, &[0x0f, 0x6f, 0x53, 8]).unwrap();
    cpu.gpr[gpr::RDI] = 0x3000;
    go(&mut cpu, &mut env, &[0x0f, 0xf7, 0xca]).unwrap();
    assert_eq!(env.read(0x3000, 8), [1, 0, 0, 0, 0, 0, 7, 0]);
}

/// Every gather and scatter, with random masks and indices, and then with a fault half-way.
#[test]
fn gathers_and_scatters() {
    if !avx() {
        return;
    }
    let mut random = Random(21);
    let mut oracle = Native::new().unwrap();
    let mut host = std::boxed::Box::new(Host([0; 8192]));
    let (mut env, fresh_cpu) = setup();
    let mut tried = 0;
    for code in Code::values() {
        let op = code.op_code();
        use iced_x86::OpCodeOperandKind as K;
        let vsib = op.op_kinds().iter().find_map(|kind| match kind {
            K::mem_vsib32x | K::mem_vsib64x => Some(Register::XMM9),
            K::mem_vsib32y | K::mem_vsib64y => Some(Register::YMM9),
            K::mem_vsib32z | K::mem_vsib64z => Some(Register::ZMM9),
            _ => None,
        });
        let evex = op.encoding() == iced_x86::EncodingKind::EVEX;
        let prefetch = op.op_count() == 1;
        let (Some(index), false) = (vsib, prefetch) else {
            continue;
        };
        if evex && host_components() & 0xe0 != 0xe0 || !op.mode64() {
            continue;
        }
        for _ in 0..20 {
            let mut insn = Instruction::default();
            insn.set_code(code);
            let memory =
                MemoryOperand::with_base_index_scale_displ_size(Register::RBX, index, 4, 0x40, 8);
            for n in 0..op.op_count() {
                let register = match op.op_kind(n) {
                    K::xmm_reg | K::xmm_vvvv => Register::XMM1,
                    K::ymm_reg | K::ymm_vvvv => Register::YMM1,
                    K::zmm_reg => Register::ZMM1,
                    _ => {
                        insn.set_op_kind(n, iced_x86::OpKind::Memory);
                        insn.set_memory_base(memory.base);
                        insn.set_memory_index(memory.index);
                        insn.set_memory_index_scale(memory.scale);
                        insn.set_memory_displacement64(0x40);
                        insn.set_memory_displ_size(8);
                        continue;
                    }
                };
                // Data in register 1, a vector mask in register 3.
                let number = if n == 2 { 2 } else { 0 };
                let register = Register::values()
                    .nth(register as usize + number)
                    .unwrap_or(register);
                insn.set_op_kind(n, iced_x86::OpKind::Register);
                insn.set_op_register(n, register);
            }
            if evex {
                insn.set_op_mask(Register::K2);
            }
            let mut encoder = Encoder::new(64);
            encoder.encode(&insn, 0x1000).unwrap();
            let bytes = encoder.take_buffer();
            env.w64(pte(0x9000), 0x9007);
            let mut cpu = fresh_cpu.clone();
            random.state(&mut cpu, false);
            let mut indices = [0; 64];
            let wide = op
                .op_kinds()
                .iter()
                .any(|k| matches!(k, K::mem_vsib64x | K::mem_vsib64y | K::mem_vsib64z));
            let size = if wide { 8 } else { 4 };
            for chunk in indices.chunks_exact_mut(size) {
                let value = random.below(900) as i64 - 100;
                chunk.copy_from_slice(&value.to_le_bytes()[..size]);
            }
            vector::set_zmm(&mut cpu.xsave, 9, &indices);
            random.fill(&mut host.0);
            env.write(0x8000, &host.0);
            let mut regs = NativeRegs {
                gpr: cpu.gpr,
                rflags: 0,
            };
            let mut area = cpu.xsave.clone();
            regs.gpr[gpr::RBX] = host.0.as_mut_ptr() as u64 + 0x800;
            cpu.gpr[gpr::RBX] = 0x8800;
            let start = cpu.clone();
            oracle.native(&bytes, &mut regs, Some(&mut area)).unwrap();
            go(&mut cpu, &mut env, &bytes).unwrap_or_else(|e| panic!("{code:?}: {e:?}"));
            for n in 0..32 {
                assert_eq!(
                    vector::zmm(&cpu.xsave, n),
                    vector::zmm(&area, n),
                    "{code:?} {n}"
                );
            }
            for n in 0..8 {
                assert_eq!(
                    vector::opmask(&cpu.xsave, n),
                    vector::opmask(&area, n),
                    "{code:?}"
                );
            }
            assert!(env.read(0x8000, 8192) == host.0, "{code:?}");
            tried += 1;
            // With its second page missing it stops there; repaired, it goes on to the same end.
            let mut late = start;
            random.fill(&mut host.0);
            let fresh = host.0;
            env.write(0x8000, &fresh);
            let mut whole = late.clone();
            go(&mut whole, &mut env, &bytes).unwrap();
            let wanted = env.read(0x8000, 8192);
            env.write(0x8000, &fresh);
            env.w64(pte(0x9000), 0);
            match go(&mut late, &mut env, &bytes) {
                Ok(()) => {}
                Err(stop) => {
                    assert!(matches!(stop, Stop::Exception(e) if e.vector == 14));
                    env.w64(pte(0x9000), 0x9007);
                    go(&mut late, &mut env, &bytes).unwrap();
                }
            }
            assert_eq!(vector::zmm(&late.xsave, 1), vector::zmm(&whole.xsave, 1));
            assert!(env.read(0x8000, 8192) == wanted, "{code:?}");
        }
    }
    assert!(tried > 100, "{tried}");
}

/// The host's own save instructions on the same state write the same bytes, and what either side
/// saves the other can restore.
#[test]
fn save_and_restore_agree_with_the_host() {
    let mut random = Random(33);
    let mut oracle = Native::new().unwrap();
    let mut host = std::boxed::Box::new(Host([0; 8192]));
    let leaf = core::arch::x86_64::__cpuid_count(0xd, 1).eax;
    // FXSAVE64, XSAVE64, XSAVEOPT64, XSAVEC64 and their restores, all on [rbx].
    let forms: [(&[u8], &[u8], bool); 4] = [
        (&[0x48, 0x0f, 0xae, 0x03], &[0x48, 0x0f, 0xae, 0x0b], true),
        (&[0x48, 0x0f, 0xae, 0x23], &[0x48, 0x0f, 0xae, 0x2b], true),
        (
            &[0x48, 0x0f, 0xae, 0x33],
            &[0x48, 0x0f, 0xae, 0x2b],
            leaf & 1 != 0,
        ),
        (
            &[0x48, 0x0f, 0xc7, 0x23],
            &[0x48, 0x0f, 0xae, 0x2b],
            leaf & 2 != 0,
        ),
    ];
    let (mut env, fresh_cpu) = setup();
    for round in 0..200 {
        for (save, restore, present) in forms {
            if !present {
                continue;
            }
            let mut cpu = fresh_cpu.clone();
            random.state(&mut cpu, false);
            // Some components in their initial state.
            cpu.xsave.0[512] &= random.next() as u8 | 1;
            cpu.xcr0 = u64::from(host_components());
            let mask = if random.one_in(2) { !0 } else { random.next() };
            cpu.gpr[gpr::RAX] = mask & 0xffff_ffff;
            cpu.gpr[gpr::RDX] = mask >> 32;
            cpu.gpr[gpr::RBX] = 0x8000;
            random.fill(&mut host.0[..4096]);
            // A header that a restore will accept.
            host.0[512..576].fill(0);
            env.write(0x8000, &host.0[..4096]);
            let mut regs = NativeRegs {
                gpr: cpu.gpr,
                rflags: 0,
            };
            regs.gpr[gpr::RAX] &= cpu.xcr0;
            regs.gpr[gpr::RDX] = 0;
            regs.gpr[gpr::RBX] = host.0.as_mut_ptr() as u64;
            let mut area = cpu.xsave.clone();
            oracle.native(save, &mut regs, Some(&mut area)).unwrap();
            go(&mut cpu, &mut env, save).unwrap();
            let guest = env.read(0x8000, 4096);
            // The host's FIP and FDP belong to the host; its MXCSR_MASK is the same.
            let differs = (0..4096).find(|&at| !(6..24).contains(&at) && guest[at] != host.0[at]);
            assert_eq!(
                differs,
                None,
                "round {round} {save:x?} mask {mask:x}: {:x?} {:x?}",
                &guest[512..528],
                &host.0[512..528]
            );
            // Restore into another state.
            random.state(&mut cpu, false);
            cpu.gpr[gpr::RAX] = regs.gpr[gpr::RAX];
            cpu.gpr[gpr::RDX] = 0;
            cpu.gpr[gpr::RBX] = 0x8000;
            let mut area = cpu.xsave.clone();
            if save[1] == 0x0f && save[3] == 0x33 {
                // XSAVEOPT leaves old bytes, whose MXCSR may be anything.
                let mxcsr = 0x1f80u32.to_le_bytes();
                host.0[24..28].copy_from_slice(&mxcsr);
                env.write(0x8018, &mxcsr);
            }
            let want = oracle.native(restore, &mut regs, Some(&mut area));
            let got = go(&mut cpu, &mut env, restore);
            match (want, got) {
                (Ok(()), Ok(())) => {}
                (Err(13), Err(stop)) if stop == Stop::gp(0) => continue,
                other => panic!("{restore:x?}: {other:?}"),
            }
            for n in 0..32 {
                assert_eq!(
                    vector::zmm(&cpu.xsave, n),
                    vector::zmm(&area, n),
                    "{save:x?} {n}"
                );
            }
            for n in 0..8 {
                assert_eq!(vector::opmask(&cpu.xsave, n), vector::opmask(&area, n));
            }
            assert_eq!(cpu.xsave.0[24..28], area.0[24..28], "{save:x?}");
            let x87 = |area: &XsaveArea| -> Vec<u8> {
                vector::live(area, 0).map_or_else(Vec::new, |b| {
                    let mut bytes = b.to_vec();
                    bytes[6..32].fill(0);
                    bytes
                })
            };
            let (left, right) = (x87(&cpu.xsave), x87(&area));
            assert!(
                left == right || left.is_empty() || right.is_empty(),
                "{save:x?}"
            );
        }
    }
}

#[test]
fn save_and_restore_checks() {
    let (mut env, mut cpu) = setup();
    cpu.gpr[gpr::RAX] = 7;
    cpu.gpr[gpr::RDX] = 0;
    cpu.gpr[gpr::RBX] = 0x8008;
    let (fxsave, fxrstor) = ([0x0f, 0xae, 0x03], [0x0f, 0xae, 0x0b]);
    let (xsave, xrstor) = ([0x0f, 0xae, 0x23], [0x0f, 0xae, 0x2b]);
    for code in [&fxsave, &fxrstor, &xsave, &xrstor] {
        assert_eq!(go(&mut cpu, &mut env, code), Err(Stop::gp(0)));
    }
    cpu.gpr[gpr::RBX] = 0x8000;
    go(&mut cpu, &mut env, &xsave).unwrap();
    go(&mut cpu, &mut env, &xrstor).unwrap();
    // Reserved bits: MXCSR, XSTATE_BV, XCOMP_BV and the rest of the header.
    for (at, value) in [(24, 0x8000_1f80u64), (512, 1 << 60), (520, 1), (528, 1)] {
        let old = env.r64(0x8000 + at);
        env.w64(0x8000 + at, value);
        let before = cpu.xsave.0;
        assert_eq!(go(&mut cpu, &mut env, &xrstor), Err(Stop::gp(0)), "{at}");
        assert!(cpu.xsave.0 == before);
        env.w64(0x8000 + at, old);
    }
    env.w32(0x8018, 0x8000_0000);
    assert_eq!(go(&mut cpu, &mut env, &fxrstor), Err(Stop::gp(0)));
    env.w32(0x2000, 0x8000_0000);
    cpu.gpr[gpr::RBX] = 0x2000;
    assert_eq!(
        go(&mut cpu, &mut env, &[0x0f, 0xae, 0x13]),
        Err(Stop::gp(0))
    );
    cpu.cr4 &= !(1 << 18);
    assert_eq!(go(&mut cpu, &mut env, &xsave), Err(Stop::ud()));
    // XSAVES only at CPL 0.
    let mut cpu = long_mode(&mut env, 3);
    cpu.gpr[gpr::RBX] = 0x8000;
    assert_eq!(
        go(&mut cpu, &mut env, &[0x0f, 0xc7, 0x2b]),
        Err(Stop::gp(0))
    );
}
