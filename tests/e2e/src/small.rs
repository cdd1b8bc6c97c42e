//! Guests of a few instructions, and machines for them.

use std::io::Write;
use std::process::Command;

use iced_x86::IcedError;
use iced_x86::code_asm::*;
use tempfile::NamedTempFile;

use crate::program;

/// Where the guests are loaded and entered, in long mode with the first 4 GiB mapped to themselves.
pub const LOAD: u64 = 0x10_0000;
/// Memory behind the code that belongs to the guest.
const ROOM: u64 = 1 << 20;
/// A guest's own data.
const STACK_TOP: u64 = LOAD + ROOM - 0x1000;
const IDT: u64 = LOAD + ROOM / 2;
const IDT_POINTER: u64 = IDT + 0x1000;
/// Random code is written and run here.
const SCRATCH: u64 = IDT + 0x2000;
const SCRATCH_SIZE: u64 = 0x2000;
/// State of a guest's random numbers, and its countdown: in the first megabyte, away from its code.
const SEED: u64 = 0x7_0000;
const LEFT: u64 = 0x7_0008;

const SERIAL: u16 = 0x3f8;
const ACPI_CONTROL: u16 = 0x604;
const ACPI_SLEEP_S5: u16 = 0x3400;
const RESET: u16 = 0xcf9;

/// A kernel file with `code` at [`LOAD`].
///
/// # Panics
/// If the host's disk is full.
pub fn kernel(code: &[u8]) -> NamedTempFile {
    let mut file = NamedTempFile::new().expect("a temporary file");
    file.write_all(&elf(code)).expect("a temporary file");
    file
}

/// An ELF-64 kernel without a PVH note, so that it is entered in long mode.
pub fn elf(code: &[u8]) -> Vec<u8> {
    const HEADERS: u64 = 64 + 56;
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    let length = code.len() as u64;
    elf.extend([2, 0, 62, 0, 1, 0, 0, 0]);
    for value in [LOAD, 64, 0] {
        elf.extend(value.to_le_bytes());
    }
    elf.extend([0; 4]);
    for value in [64u16, 56, 1, 0, 0, 0] {
        elf.extend(value.to_le_bytes());
    }
    elf.extend([1, 0, 0, 0, 7, 0, 0, 0]);
    for value in [HEADERS, LOAD, LOAD, length, length.max(1) + ROOM, 4096] {
        elf.extend(value.to_le_bytes());
    }
    elf.extend(code);
    elf
}

/// A run of a small guest: no network, little memory.
pub fn run(kernel: &NamedTempFile) -> Command {
    let mut command = program::run();
    command
        .args(["--memory", "32M", "--engine", "jit", "--kernel"])
        .arg(kernel.path());
    command
}

/// Assembles a guest.
fn assemble(build: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) -> Vec<u8> {
    let mut code = CodeAssembler::new(64).expect("64 is a bitness");
    build(&mut code).expect("valid instructions");
    code.assemble(LOAD).expect("labels in reach")
}

fn say(code: &mut CodeAssembler, text: &str) -> Result<(), IcedError> {
    code.mov(dx, u32::from(SERIAL))?;
    for byte in text.bytes() {
        code.mov(al, u32::from(byte))?;
        code.out(dx, al)?;
    }
    Ok(())
}

fn power_off(code: &mut CodeAssembler) -> Result<(), IcedError> {
    code.mov(dx, u32::from(ACPI_CONTROL))?;
    code.mov(ax, u32::from(ACPI_SLEEP_S5))?;
    code.out(dx, ax)?;
    halt(code)
}

fn halt(code: &mut CodeAssembler) -> Result<(), IcedError> {
    let mut again = code.create_label();
    code.cli()?;
    code.set_label(&mut again)?;
    code.hlt()?;
    code.jmp(again)
}

/// RAX := the next random number; clobbers RCX.
fn random(code: &mut CodeAssembler) -> Result<(), IcedError> {
    code.mov(rax, qword_ptr(SEED))?;
    for (left, by) in [(true, 13u32), (false, 7), (true, 17)] {
        code.mov(rcx, rax)?;
        match left {
            true => code.shl(rcx, by)?,
            false => code.shr(rcx, by)?,
        }
        code.xor(rax, rcx)?;
    }
    code.mov(qword_ptr(SEED), rax)
}

/// Sets up the stack and the random numbers.
fn start(code: &mut CodeAssembler, seed: u64, rounds: u64) -> Result<(), IcedError> {
    code.cld()?;
    code.cli()?;
    code.mov(rsp, STACK_TOP)?;
    code.mov(rax, seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)?;
    code.mov(qword_ptr(SEED), rax)?;
    code.mov(rax, rounds)?;
    code.mov(qword_ptr(LEFT), rax)
}

/// Says `text` and halts for good.
pub fn says_and_halts(text: &str) -> Vec<u8> {
    assemble(|code| {
        say(code, text)?;
        halt(code)
    })
}

/// Says `text` and switches the machine off.
pub fn says_and_powers_off(text: &str) -> Vec<u8> {
    assemble(|code| {
        say(code, text)?;
        power_off(code)
    })
}

/// Runs into an exception without a way to handle it.
pub fn triple_fault() -> Vec<u8> {
    assemble(|code| {
        say(code, "before the fault")?;
        code.mov(rsp, STACK_TOP)?;
        code.push(0)?;
        code.push(0)?;
        code.lidt(ptr(rsp))?;
        code.ud2()
    })
}

/// Random bytes as the kernel's code.
pub fn garbage(seed: u64) -> Vec<u8> {
    crate::trial::noise(seed, 0x1_0000)
}

/// Runs `rounds` pieces of random code, each until its first exception, then switches off. A piece may
/// do that itself, or break the guest for good.
pub fn garbage_with_handlers(seed: u64, rounds: u64) -> Vec<u8> {
    assemble(|code| {
        let mut handler = code.create_label();
        let mut fill = code.create_label();
        let mut fill_idt = code.create_label();
        let mut done = code.create_label();
        start(code, seed, rounds)?;
        // Every vector leads to the handler.
        code.lea(rax, ptr(handler))?;
        code.mov(rdi, IDT)?;
        code.mov(ecx, 256u32)?;
        code.set_label(&mut fill_idt)?;
        code.mov(word_ptr(rdi), ax)?;
        code.mov(bx, cs)?;
        code.mov(word_ptr(rdi + 2), bx)?;
        code.mov(word_ptr(rdi + 4), 0x8e00u32)?;
        code.mov(rbx, rax)?;
        code.shr(rbx, 16u32)?;
        code.mov(dword_ptr(rdi + 6), ebx)?;
        code.mov(dword_ptr(rdi + 10), 0u32)?;
        code.mov(word_ptr(rdi + 14), 0u32)?;
        code.add(rdi, 16)?;
        code.dec(ecx)?;
        code.jnz(fill_idt)?;
        code.mov(word_ptr(IDT_POINTER), 0xfffu32)?;
        code.mov(rax, IDT)?;
        code.mov(qword_ptr(IDT_POINTER + 2), rax)?;
        code.lidt(ptr(IDT_POINTER))?;
        code.set_label(&mut handler)?;
        code.cld()?;
        code.mov(rsp, STACK_TOP)?;
        code.dec(qword_ptr(LEFT))?;
        code.jz(done)?;
        code.mov(rdi, SCRATCH)?;
        code.mov(rsi, SCRATCH_SIZE / 8)?;
        code.set_label(&mut fill)?;
        random(code)?;
        code.mov(qword_ptr(rdi), rax)?;
        code.add(rdi, 8)?;
        code.dec(rsi)?;
        code.jnz(fill)?;
        // Registers that are sometimes good addresses.
        for register in [
            rbx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15,
        ] {
            random(code)?;
            code.mov(register, rax)?;
        }
        code.and(ebx, 0x1f_ffffu32 as i32)?;
        code.and(esi, 0x1f_ffffu32 as i32)?;
        code.mov(edi, edi)?;
        random(code)?;
        code.and(eax, (SCRATCH_SIZE / 2 - 1) as i32)?;
        code.add(rax, SCRATCH as i32)?;
        code.jmp(rax)?;
        code.set_label(&mut done)?;
        say(code, "through")?;
        power_off(code)
    })
}

/// Reads and writes random ports, `rounds` times, but not those that end the run.
pub fn random_ports(seed: u64, rounds: u64) -> Vec<u8> {
    assemble(|code| {
        let mut again = code.create_label();
        let mut skip = code.create_label();
        start(code, seed, rounds)?;
        code.set_label(&mut again)?;
        random(code)?;
        code.mov(rbx, rax)?;
        code.mov(edx, eax)?;
        // Half of the ports below 0x1000, where devices are.
        code.bt(rbx, 20u32)?;
        let mut anywhere = code.create_label();
        code.jc(anywhere)?;
        code.and(edx, 0xfff)?;
        code.set_label(&mut anywhere)?;
        code.movzx(edx, dx)?;
        for end in [ACPI_CONTROL - 3..ACPI_CONTROL + 2, RESET - 3..RESET + 1] {
            let mut other = code.create_label();
            code.cmp(edx, i32::from(end.start))?;
            code.jb(other)?;
            code.cmp(edx, i32::from(end.end))?;
            code.jb(skip)?;
            code.set_label(&mut other)?;
        }
        random(code)?;
        let mut read = code.create_label();
        let mut narrow = code.create_label();
        let mut medium = code.create_label();
        code.bt(rbx, 40u32)?;
        code.jc(read)?;
        code.bt(rbx, 41u32)?;
        code.jc(narrow)?;
        code.bt(rbx, 42u32)?;
        code.jc(medium)?;
        code.out(dx, eax)?;
        code.jmp(skip)?;
        code.set_label(&mut medium)?;
        code.out(dx, ax)?;
        code.jmp(skip)?;
        code.set_label(&mut narrow)?;
        code.out(dx, al)?;
        code.jmp(skip)?;
        code.set_label(&mut read)?;
        code.in_(eax, dx)?;
        code.set_label(&mut skip)?;
        code.dec(qword_ptr(LEFT))?;
        code.jnz(again)?;
        // The serial port may be in any state by now.
        power_off(code)
    })
}

/// Gives the virtio devices their addresses, then writes and reads random values all over the PCI
/// windows, the configuration space and the interrupt controllers, `rounds` times.
pub fn random_mmio(seed: u64, rounds: u64) -> Vec<u8> {
    const WINDOW: u64 = vmm::layout::PCI_HOLE_START;
    const TARGETS: [(u64, u32); 6] = [
        (WINDOW, 0xffff),
        (WINDOW, 0x3f_ffff),
        (vmm::layout::ECAM_BASE, 0x7fff),
        (vmm::layout::IOAPIC_BASE as u64, 0xff),
        (vmm::layout::LAPIC_BASE as u64, 0xfff),
        (0xfed0_0000, 0x7fff),
    ];
    assemble(|code| {
        start(code, seed, rounds)?;
        // Devices 0 to 7: memory and bus master on, each BAR at its own megabyte.
        for device in 0..8u64 {
            let config = vmm::layout::ECAM_BASE + (device << 15);
            code.mov(rdi, config)?;
            for bar in 0..6u64 {
                let place = WINDOW + device * 0x8000 + bar * 0x1000 * (1 + device % 2);
                code.mov(eax, place as u32)?;
                code.mov(dword_ptr(rdi + 0x10 + bar * 4), eax)?;
            }
            code.mov(word_ptr(rdi + 4), 7u32)?;
        }
        let mut again = code.create_label();
        let mut next = code.create_label();
        let mut targets = [(); TARGETS.len()].map(|()| code.create_label());
        let mut access = code.create_label();
        code.set_label(&mut again)?;
        random(code)?;
        code.mov(rbx, rax)?;
        code.shr(rax, 48u32)?;
        for (index, target) in targets.iter().enumerate() {
            code.cmp(ax, ((index as u32 + 1) * 0x1_0000 / 7) as i32)?;
            code.jb(*target)?;
        }
        // Where random numbers point: anywhere in the 4 GiB.
        code.mov(edi, ebx)?;
        code.cmp(edi, 0x0800_0000)?;
        code.jb(next)?;
        code.jmp(access)?;
        for (target, (base, mask)) in targets.iter_mut().zip(TARGETS) {
            code.set_label(target)?;
            code.mov(edi, ebx)?;
            code.and(edi, mask as i32)?;
            code.mov(ecx, base as u32)?;
            code.add(rdi, rcx)?;
            code.jmp(access)?;
        }
        code.set_label(&mut access)?;
        random(code)?;
        let kinds = [(); 5].map(|()| code.create_label());
        for (index, kind) in kinds.iter().enumerate() {
            code.bt(rbx, 40 + index as u32)?;
            code.jc(*kind)?;
        }
        code.mov(rax, qword_ptr(rdi))?;
        code.jmp(next)?;
        for (index, mut kind) in kinds.into_iter().enumerate() {
            code.set_label(&mut kind)?;
            match index {
                0 => code.mov(dword_ptr(rdi), eax)?,
                1 => code.mov(word_ptr(rdi), ax)?,
                2 => code.mov(byte_ptr(rdi), al)?,
                3 => code.mov(qword_ptr(rdi), rax)?,
                // Small numbers are what registers take.
                _ => {
                    code.and(eax, 0xf)?;
                    code.mov(dword_ptr(rdi), eax)?;
                }
            }
            code.jmp(next)?;
        }
        code.set_label(&mut next)?;
        code.nop()?;
        code.dec(qword_ptr(LEFT))?;
        code.jnz(again)?;
        power_off(code)
    })
}
