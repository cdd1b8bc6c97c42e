//! Arbitrary state: nothing may panic or hang, whatever the guest or user space put there.

use super::machine::*;
use crate::bits::*;
use crate::env::{Exception, Stop};
use crate::event::{Event, deliver};
use crate::state::{CpuState, Segment, sreg};
use crate::system::system_step;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    /// Mostly small or extreme values, sometimes anything.
    fn odd(&mut self) -> u64 {
        let value = self.next();
        match value >> 61 {
            0 => value & 0xffff,
            1 => value & 0xf_ffff,
            2 => !(value & 0xff),
            3 => (1 << 47) - (value & 0xf),
            4 => 0xffff_fff0 + (value & 0x1f),
            _ => value,
        }
    }
    fn segment(&mut self) -> Segment {
        Segment {
            base: self.odd(),
            limit: self.odd() as u32,
            selector: self.odd() as u16 & 0x1ff,
            attr: self.next() as u16 & 0xf0ff,
            unusable: self.next() & 7 == 0,
        }
    }
}

/// Half of the fields of a working machine, half noise.
fn disturb(cpu: &mut CpuState, random: &mut Random) {
    for register in &mut cpu.gpr {
        *register = random.odd();
    }
    let noise = random.next();
    for index in 0..6 {
        if noise & (1 << index) != 0 {
            cpu.seg[index] = random.segment();
        }
    }
    if noise & 0x40 != 0 {
        cpu.tr = random.segment();
    }
    if noise & 0x80 != 0 {
        cpu.ldtr = random.segment();
    }
    if noise & 0x100 != 0 {
        cpu.rflags = random.next() & ALL_FLAGS | 2;
    }
    if noise & 0x200 != 0 {
        cpu.cpl = random.next() as u8 & 3;
    }
    if noise & 0x400 != 0 {
        cpu.cr0 ^= 1 << (random.next() & 31);
    }
    if noise & 0x800 != 0 {
        cpu.cr4 ^= random.next() & 0xff_ffff;
    }
    if noise & 0x7000 == 0 {
        cpu.cr3 = random.odd();
        cpu.pdptrs = std::array::from_fn(|_| random.odd());
    }
    if noise & 0x3_8000 == 0 {
        cpu.efer ^= EFER_LMA;
    }
    if noise & 0x1c_0000 == 0 {
        cpu.gdtr.base = random.odd();
        cpu.gdtr.limit = random.next() as u16;
        cpu.idtr.base = random.odd();
        cpu.idtr.limit = random.next() as u16;
    }
    cpu.sysenter_cs = random.odd();
    cpu.star = random.odd();
    cpu.rip = random.odd();
}

#[test]
fn arbitrary_state_does_not_panic() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let mut executed = 0;
    let mut delivered = 0;
    for round in 0..40_000 {
        let (mut cpu, mut env) = match round % 4 {
            0 => long_mode(),
            1 => protected(),
            2 => v86(),
            _ => real(),
        };
        // Noise over the tables and stacks.
        for _ in 0..(random.next() & 31) {
            let (at, value) = (random.next() % 0xfff0, random.odd());
            env.w64(at, value);
        }
        disturb(&mut cpu, &mut random);
        for _ in 0..8 {
            let mut bytes = random.next().to_le_bytes();
            if bytes[7] & 1 != 0 {
                bytes[0] = [0xcf, 0xea, 0x9a, 0xcb, 0xca, 0xcd, 0x9d, 0x0f][bytes[7] as usize >> 5];
            }
            let bits = cpu.code_size() as u32;
            let insn = iced_x86::Decoder::with_ip(bits, &bytes, cpu.rip, 0).decode();
            if insn.is_invalid() {
                continue;
            }
            match system_step(&mut cpu, &mut env, &insn) {
                Some(Ok(())) => executed += 1,
                Some(Err(Stop::Exception(exception))) => {
                    delivered += usize::from(deliver(&mut cpu, &mut env, exception.into()).is_ok());
                }
                _ => {}
            }
        }
        let vector = random.next() as u8;
        let event = match random.next() & 3 {
            0 => Event::external(vector),
            1 => Event::nmi(),
            _ => Event::from(Exception {
                vector: vector & 31,
                error: (vector & 64 != 0).then_some(u32::from(vector)),
                payload: random.odd(),
            }),
        };
        delivered += usize::from(deliver(&mut cpu, &mut env, event).is_ok());
        assert!(cpu.cpl <= 3);
        let _ = cpu.seg[sreg::CS].dpl();
    }
    assert!(
        executed > 1000 && delivered > 1000,
        "{executed} {delivered}"
    );
}
