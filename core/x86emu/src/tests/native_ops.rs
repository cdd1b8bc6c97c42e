//! Data processing against the host CPU: random instructions of every opcode that runs natively are
//! executed by the interpreter on guest memory and directly on host memory, and registers, flags,
//! vector state, memory and faults must agree.

use super::fake::Fake;
use super::native::Native;
use super::random::{Random, host_components};
use super::setup::*;
use crate::env::*;
use crate::interp::traits::{self, Class};
use crate::interp::{self, decode};
use crate::state::*;
use iced_x86::{Code, Encoder, Instruction, Mnemonic};
use std::boxed::Box;
use std::string::String;
use std::vec;
use std::vec::Vec;
use std::{format, println};

/// Linear address of the data: two pages that are not neighbours in physical memory.
const DATA: u64 = 0x4000;
const PHYSICAL: [u64; 2] = [0x9000, 0x6000];
/// Linear address of a device's page.
const DEVICE: u64 = 0x4000_0000;

#[repr(C, align(4096))]
struct Host([u8; 8192]);

struct Bench {
    env: Fake,
    start: CpuState,
    oracle: Native,
    host: Box<Host>,
    random: Random,
}

/// Operand register values that make an address land on `target`.
fn aim(insn: &Instruction, index: u64, target: u64) -> u64 {
    let scaled = if insn.memory_index() == iced_x86::Register::None {
        0
    } else {
        index.wrapping_mul(u64::from(insn.memory_index_scale()))
    };
    target
        .wrapping_sub(scaled)
        .wrapping_sub(insn.memory_displacement64())
}

/// Instructions whose results differ from one execution to the next.
fn random_result(m: Mnemonic) -> bool {
    matches!(m, Mnemonic::Rdrand | Mnemonic::Rdseed)
}

fn bit_test(m: Mnemonic) -> bool {
    matches!(
        m,
        Mnemonic::Bt | Mnemonic::Bts | Mnemonic::Btr | Mnemonic::Btc
    )
}

#[derive(Clone, Copy, PartialEq, Debug)]
enum Place {
    Registers,
    Page,
    Crossing,
    Device,
}

impl Bench {
    fn new(seed: u64) -> Self {
        let mut env = machine();
        let mut start = long_mode(&mut env, 0);
        start.cr4 |= 1 << 10;
        for (n, page) in PHYSICAL.iter().enumerate() {
            env.w64(pte(DATA + 4096 * n as u64), page | 7);
        }
        Bench {
            env,
            start,
            oracle: Native::new().unwrap(),
            host: Box::new(Host([0; 8192])),
            random: Random(seed),
        }
    }

    /// One instruction, both ways. Returns whether it executed without a fault.
    fn compare(&mut self, insn: &Instruction, place: Place) -> Result<bool, String> {
        let mut encoder = Encoder::new(64);
        if let Err(e) = encoder.encode(insn, 0x1000) {
            std::eprintln!("{e}");
            return Ok(false);
        }
        let code = encoder.take_buffer();
        let Ok(back) = decode(CodeSize::Bits64, &code, 0x1000, false) else {
            return Ok(false);
        };
        if back.code() != insn.code() {
            return Ok(false);
        }
        let size = insn.memory_size().size();
        let mut cpu = self.start.clone();
        self.random.state(&mut cpu, true);
        // Division by random numbers overflows nearly always.
        if matches!(insn.mnemonic(), Mnemonic::Div | Mnemonic::Idiv) && self.random.one_in(2) {
            cpu.gpr[gpr::RDX] = 0;
        }
        cpu.rip = 0x1000;
        self.env.write(0x1000, &code);
        let index = self.random.below(64);
        cpu.gpr[gpr::RSI] = index;
        if bit_test(insn.mnemonic()) && insn.op1_kind() == iced_x86::OpKind::Register {
            let register = insn.op1_register().full_register().number();
            cpu.gpr[register] = (self.random.below(4096) as i64 - 2048) as u64;
        }
        let align = if self.random.one_in(4) { 1 } else { 64 };
        let offset = match place {
            Place::Crossing => 4096 - self.random.below(size.max(2) as u64 - 1) - 1,
            _ => (1024 + self.random.below(2048)) & !(align - 1),
        };
        self.random.fill(&mut self.host.0);
        if place == Place::Device {
            let byte = self.random.next() as u8;
            self.host.0.fill(byte);
            self.env.device_byte = byte;
            self.env.mmio.clear();
        } else {
            self.env.write(PHYSICAL[0], &self.host.0[..4096]);
            self.env.write(PHYSICAL[1], &self.host.0[4096..]);
        }
        let mut regs = NativeRegs {
            gpr: cpu.gpr,
            rflags: cpu.rflags & 0x8d5,
        };
        let mut area = cpu.xsave.clone();
        let host_at = self.host.0.as_mut_ptr() as u64 + offset;
        regs.gpr[gpr::RBX] = aim(insn, index, host_at);
        let linear = if place == Place::Device { DEVICE } else { DATA };
        cpu.gpr[gpr::RBX] = aim(insn, index, linear + offset);
        let before = cpu.clone();
        let want = self.oracle.native(&code, &mut regs, Some(&mut area));
        let got = interp::step(&mut cpu, &mut self.env);
        let fail = |what: &str| Err(format!("{what}: {:?} {code:02x?} {place:?}", insn.code()));
        match (want, got) {
            (Ok(()), Ok(())) => {}
            (Err(v), Err(Stop::Exception(e))) if e.vector == v => {
                if cpu.gpr != before.gpr || cpu.rip != before.rip || cpu.rflags != before.rflags {
                    return fail("state changed by a fault");
                }
                return if cpu.xsave.0[32..] == before.xsave.0[32..] {
                    Ok(false)
                } else {
                    fail("vector state changed by a fault")
                };
            }
            // Alignment in a device page is checked by the host all the same.
            (want, got) => return fail(&format!("faults {want:?} {got:?}")),
        }
        if random_result(insn.mnemonic()) {
            return Ok(true);
        }
        for n in 0..16 {
            if n != gpr::RSP && n != gpr::RBX && cpu.gpr[n] != regs.gpr[n] {
                return fail(&format!("register {n}: {:x} {:x}", regs.gpr[n], cpu.gpr[n]));
            }
        }
        if cpu.gpr[gpr::RBX] != before.gpr[gpr::RBX] || cpu.gpr[gpr::RSP] != before.gpr[gpr::RSP] {
            return fail("RBX or RSP");
        }
        let defined = 0x8d5 & !undefined_flags(insn);
        if (cpu.rflags ^ regs.rflags) & defined != 0 || (cpu.rflags ^ before.rflags) & !0x8d5 != 0 {
            return fail(&format!("flags: {:x} {:x}", regs.rflags, cpu.rflags));
        }
        for at in 0..2752 {
            // The last instruction's opcode and pointers are not kept.
            if (6..24).contains(&at) || (28..32).contains(&at) || (464..512).contains(&at) {
                continue;
            }
            if cpu.xsave.0[at] != area.0[at] {
                return fail(&format!(
                    "vector state at {at}: {:x} {:x}",
                    area.0[at], cpu.xsave.0[at]
                ));
            }
        }
        if place == Place::Device {
            return self.check_device(offset, size).or_else(|what| fail(&what));
        }
        let mut memory = self.env.read(PHYSICAL[0], 4096);
        memory.extend(self.env.read(PHYSICAL[1], 4096));
        if let Some(at) = (0..8192).find(|&at| memory[at] != self.host.0[at]) {
            return fail(&format!("memory at {at:#x} (operand at {offset:#x})"));
        }
        Ok(true)
    }

    /// What was written to the device must be what the host's memory shows.
    fn check_device(&mut self, offset: u64, size: usize) -> Result<bool, String> {
        let byte = self.env.device_byte;
        let mut expected = vec![byte; 8192];
        for access in &self.env.mmio {
            let at = (access.address & 0xfff) as usize;
            if access.write {
                expected[at..at + access.data.len()].copy_from_slice(&access.data);
            }
        }
        let window = offset as usize..offset as usize + size.max(1);
        if expected[window.clone()] != self.host.0[window] {
            return Err(format!("device writes {:x?}", self.env.mmio));
        }
        Ok(true)
    }
}

impl Bench {
    /// An instruction in 16- or 32-bit code against its 64-bit form.
    fn compare_narrow(&mut self, insn: &Instruction, bits: CodeSize) -> Result<bool, String> {
        let (base, index) = (iced_x86::Register::RBX, iced_x86::Register::RSI);
        let mut wide = *insn;
        if insn.memory_base() != iced_x86::Register::None {
            wide.set_memory_base(base);
            wide.set_memory_displ_size(8);
        }
        if insn.memory_index() != iced_x86::Register::None {
            wide.set_memory_index(index);
        }
        let mut encoder = Encoder::new(bits as u32);
        let mut wide_encoder = Encoder::new(64);
        if encoder.encode(insn, 0x1000).is_err() || wide_encoder.encode(&wide, 0x1000).is_err() {
            return Ok(false);
        }
        let (code, wide_code) = (encoder.take_buffer(), wide_encoder.take_buffer());
        let Ok(back) = decode(bits, &code, 0x1000, false) else {
            return Ok(false);
        };
        if back.code() != insn.code() {
            return Ok(false);
        }
        let mut cpu = flat_mode(bits, 0);
        cpu.cr4 |= 1 << 10;
        self.random.state(&mut cpu, true);
        for value in &mut cpu.gpr {
            *value &= 0xffff_ffff;
        }
        let at = self.random.below(64);
        cpu.gpr[gpr::RSI] = at;
        if bit_test(insn.mnemonic()) && insn.op1_kind() == iced_x86::OpKind::Register {
            let register = insn.op1_register().full_register().number();
            cpu.gpr[register] = self.random.below(1024);
        }
        self.env.write(0x1000, &code);
        let offset = (1024 + self.random.below(2048)) & !63;
        self.random.fill(&mut self.host.0);
        self.env.write(DATA, &self.host.0);
        let mut regs = NativeRegs {
            gpr: cpu.gpr,
            rflags: cpu.rflags & 0x8d5,
        };
        let mut area = cpu.xsave.clone();
        regs.gpr[gpr::RBX] = aim(insn, at, self.host.0.as_mut_ptr() as u64 + offset);
        cpu.gpr[gpr::RBX] = aim(insn, at, DATA + offset);
        let want = self.oracle.native(&wide_code, &mut regs, Some(&mut area));
        let got = interp::step(&mut cpu, &mut self.env);
        let fail = |what: &str| Err(format!("{what}: {:?} {code:02x?} {bits:?}", insn.code()));
        match (want, got) {
            (Ok(()), Ok(())) => {}
            (Err(v), Err(Stop::Exception(e))) if e.vector == v => return Ok(false),
            // VEX does not exist in real mode.
            (_, Err(stop)) if stop == Stop::ud() && traits::of(insn).vex() => return Ok(false),
            (want, got) => return fail(&format!("faults {want:?} {got:?}")),
        }
        if random_result(insn.mnemonic()) {
            return Ok(true);
        }
        for n in 0..8 {
            if n != gpr::RSP && n != gpr::RBX && (cpu.gpr[n] ^ regs.gpr[n]) as u32 != 0 {
                return fail(&format!("register {n}: {:x} {:x}", regs.gpr[n], cpu.gpr[n]));
            }
        }
        if (cpu.rflags ^ regs.rflags) & 0x8d5 & !undefined_flags(insn) != 0 {
            return fail(&format!("flags: {:x} {:x}", regs.rflags, cpu.rflags));
        }
        if (160..416).any(|at| cpu.xsave.0[at] != area.0[at])
            || (24..160).any(|at| !(28..32).contains(&at) && cpu.xsave.0[at] != area.0[at])
        {
            return fail("vector state");
        }
        if self.env.read(DATA, 8192) != self.host.0 {
            return fail("memory");
        }
        if cpu.rip != 0x1000 + code.len() as u64 {
            return fail("rip");
        }
        Ok(true)
    }
}

fn sweep_narrow(bits: CodeSize, seed: u64) {
    let mut bench = Bench::new(seed);
    let mut opcodes = 0;
    let mut failures: Vec<String> = Vec::new();
    for code in Code::values() {
        let op = code.op_code();
        if !op.mode64() || !op.mode32() || !op.is_instruction() {
            continue;
        }
        for memory in [false, true] {
            let mut any = false;
            for _ in 0..8 {
                let Some(insn) = bench.random.instruction(code, memory, bits as u32) else {
                    break;
                };
                if traits::of(&insn).class() != Class::Native {
                    break;
                }
                match bench.compare_narrow(&insn, bits) {
                    Ok(ran) => any |= ran,
                    Err(what) => {
                        failures.push(what);
                        break;
                    }
                }
            }
            opcodes += usize::from(any);
        }
    }
    println!("{bits:?}: {opcodes} opcodes");
    for failure in failures.iter().take(40) {
        println!("{failure}");
    }
    assert!(failures.is_empty(), "{} opcodes disagree", failures.len());
    assert!(opcodes > 400);
}

#[test]
fn code_of_32_bits() {
    sweep_narrow(CodeSize::Bits32, 5);
}

#[test]
fn code_of_16_bits() {
    sweep_narrow(CodeSize::Bits16, 6);
}

fn undefined_flags(insn: &Instruction) -> u64 {
    use iced_x86::RflagsBits as B;
    let flags = insn.rflags_undefined();
    let mut bits = 0;
    for (from, to) in [
        (B::OF, 0x800),
        (B::SF, 0x80),
        (B::ZF, 0x40),
        (B::AF, 0x10),
        (B::CF, 1),
        (B::PF, 4),
    ] {
        if flags & from != 0 {
            bits |= to;
        }
    }
    bits
}

fn sweep(place: Place, seed: u64, rounds: usize) {
    let mut bench = Bench::new(seed);
    let mut opcodes = 0;
    let mut executed = 0;
    let mut failures: Vec<String> = Vec::new();
    for code in Code::values() {
        let op = code.op_code();
        if !op.mode64() || !op.is_instruction() {
            continue;
        }
        let memory = place != Place::Registers;
        let mut any = false;
        for _ in 0..rounds {
            let Some(insn) = bench.random.instruction(code, memory, 64) else {
                break;
            };
            if traits::of(&insn).class() != Class::Native
                || place == Place::Device && bit_test(insn.mnemonic())
            {
                break;
            }
            match bench.compare(&insn, place) {
                Ok(ran) => {
                    any |= ran;
                    executed += usize::from(ran);
                }
                Err(what) => {
                    failures.push(what);
                    break;
                }
            }
        }
        opcodes += usize::from(any);
    }
    println!("{place:?}: {opcodes} opcodes, {executed} executions");
    for failure in failures.iter().take(40) {
        println!("{failure}");
    }
    assert!(failures.is_empty(), "{} opcodes disagree", failures.len());
    assert!(opcodes > if host_components() & 4 != 0 { 600 } else { 200 });
}

#[test]
fn registers() {
    sweep(Place::Registers, 1, 16);
}

#[test]
fn memory_in_a_page() {
    sweep(Place::Page, 2, 16);
}

#[test]
fn memory_across_pages() {
    sweep(Place::Crossing, 3, 10);
}

#[test]
fn devices() {
    sweep(Place::Device, 4, 6);
}
