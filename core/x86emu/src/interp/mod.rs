//! The one-instruction interpreter: fetch, decode, check, execute, retire.
//!
//! Control flow, stack, string and data-movement instructions are executed by hand; everything that
//! computes runs on the host CPU ([`native`]); what belongs to the system side goes to
//! [`crate::system::system_step`].
//!
//! Nothing architectural changes unless the instruction retires. Two exceptions follow the manual:
//! string and gather instructions keep the progress they made, and the traps (single step, data
//! breakpoints) come as `Err` *after* the instruction has retired, with RIP behind it.

pub(crate) mod address;
mod branch;
mod debug;
mod gather;
mod hints;
mod legacy;
mod masked;
mod moves;
mod native;
mod operand;
mod stack;
mod string;
pub(crate) mod traits;
pub(crate) mod vector;
mod xsave;

use crate::bits::*;
use crate::env::{Env, Exception, Exit, Stop};
use crate::mem;
use crate::paging::{self, Access};
use crate::state::{CodeSize, CpuState, shadow, sreg};
use crate::system::system_step;
use iced_x86::{Code, Decoder, DecoderError, DecoderOptions, FlowControl, Instruction, Mnemonic};
use traits::{Class, Traits};

/// The longest instruction.
const MAX_INSN: usize = 15;

/// What an executed instruction did to RIP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    /// Nothing: the next instruction follows.
    Next,
    /// RIP is set.
    Jumped,
    /// A repeated string instruction has more iterations to go: RIP stays.
    Again,
}

/// One instruction in flight.
struct Step<'a, E: ?Sized> {
    cpu: &'a mut CpuState,
    env: &'a mut E,
    insn: &'a Instruction,
    bytes: &'a [u8],
    mode: CodeSize,
    /// DR6 bits of data and I/O breakpoints hit so far.
    hits: u64,
    /// The instruction is traced: RFLAGS.TF was set when it began.
    traced: bool,
}

/// Executes one instruction, or one batch of iterations of a repeated string instruction.
///
/// # Errors
/// [`Stop::Exception`]: the exception is not yet delivered; RIP points at the instruction for faults
/// and behind it for traps (#DB of single step and data breakpoints). [`Stop::Exit`]: guest mode
/// must be left; for [`Exit::UserSpace`] the instruction is executed again later.
pub fn step<E: Env + ?Sized>(cpu: &mut CpuState, env: &mut E) -> Result<(), Stop> {
    let mut bytes = [0; MAX_INSN];
    let fetched = if cpu.dr7 & 0xff != 0 {
        fetch_breakpoint(cpu).and_then(|()| fetch(cpu, env, &mut bytes))
    } else {
        fetch(cpu, env, &mut bytes)
    };
    match fetched {
        Ok(insn) => execute(cpu, env, &bytes[..insn.len()], &insn),
        Err(stop) => {
            if matches!(stop, Stop::Exception(_)) {
                env.retired();
            }
            Err(stop)
        }
    }
}

/// As [`step`], with the instruction already fetched and decoded in the current mode at the current
/// RIP: `bytes` are its bytes. Instruction breakpoints are checked here too.
pub fn step_decoded<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    bytes: &[u8],
    insn: &Instruction,
) -> Result<(), Stop> {
    if cpu.dr7 & 0xff != 0
        && let Err(stop) = fetch_breakpoint(cpu)
    {
        env.retired();
        return Err(stop);
    }
    execute(cpu, env, bytes, insn)
}

/// Decodes at most one instruction from `bytes` at `rip`, as the interpreter does; also for the
/// translator, so that both see the same instructions.
///
/// `amd`: as AMD's processors do, where an operand-size prefix makes branches of 64-bit code 16 bits
/// wide.
///
/// # Errors
/// `true`: `bytes` end within the instruction. `false`: #UD.
pub fn decode(mode: CodeSize, bytes: &[u8], rip: u64, amd: bool) -> Result<Instruction, bool> {
    let mut insn = Instruction::default();
    let bytes = bytes.get(..MAX_INSN).unwrap_or(bytes);
    let bits = mode as u32;
    let mut decoder = Decoder::with_ip(bits, bytes, rip, decoder_options(amd));
    decoder.decode_out(&mut insn);
    match decoder.last_error() {
        DecoderError::None => Ok(insn),
        DecoderError::NoMoreBytes => Err(true),
        _ if bytes.len() == MAX_INSN && too_long(bits, bytes) => Err(true),
        _ => decode_hint(bits, bytes, rip),
    }
}

/// Whether 15 bytes that are no instruction are the beginning of a longer one. Only redundant
/// prefixes make one so long, so without its first byte it is incomplete, not invalid.
#[cold]
fn too_long(bits: u32, bytes: &[u8]) -> bool {
    let mut decoder = Decoder::new(bits, &bytes[1..], DecoderOptions::NONE);
    decoder.decode_out(&mut Instruction::default());
    decoder.last_error() == DecoderError::NoMoreBytes
}

/// The options that [`decode`] uses.
pub fn decoder_options(amd: bool) -> u32 {
    if amd {
        DecoderOptions::AMD
    } else {
        DecoderOptions::NONE
    }
}

/// The hint-NOP opcodes that iced only knows when told to.
#[cold]
fn decode_hint(bits: u32, bytes: &[u8], rip: u64) -> Result<Instruction, bool> {
    let mut decoder = Decoder::with_ip(bits, bytes, rip, DecoderOptions::FORCE_RESERVED_NOP);
    let insn = decoder.decode();
    match decoder.last_error() {
        DecoderError::None if insn.mnemonic() == Mnemonic::Reservednop => Ok(insn),
        DecoderError::NoMoreBytes => Err(true),
        _ => Err(false),
    }
}

/// Fetches and decodes. The second page is only touched if the instruction reaches into it.
fn fetch<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    bytes: &mut [u8; MAX_INSN],
) -> Result<Instruction, Stop> {
    let mode = cpu.code_size();
    let rip = cpu.rip;
    // How many bytes the segment limit or the end of the canonical range leaves.
    let (address, allowed) = if mode == CodeSize::Bits64 {
        if !paging::canonical(cpu, rip) {
            return Err(Stop::gp(0));
        }
        (rip, MAX_INSN)
    } else {
        let limit = u64::from(cpu.seg[sreg::CS].limit);
        if rip > limit {
            return Err(Stop::gp(0));
        }
        let left = (limit - rip).min(MAX_INSN as u64 - 1) as usize + 1;
        (cpu.seg[sreg::CS].base.wrapping_add(rip) & 0xffff_ffff, left)
    };
    let first = allowed.min(4096 - (address as usize & 0xfff));
    read_code(cpu, env, address, &mut bytes[..first])?;
    match decode(mode, &bytes[..first], rip, env.features().amd) {
        Ok(insn) => return Ok(insn),
        Err(false) => return Err(Stop::ud()),
        Err(true) if first == allowed => return Err(Stop::gp(0)),
        Err(true) => {}
    }
    let mut next = address.wrapping_add(first as u64);
    if mode == CodeSize::Bits64 {
        if !paging::canonical(cpu, next) {
            return Err(Stop::gp(0));
        }
    } else {
        next &= 0xffff_ffff;
    }
    read_code(cpu, env, next, &mut bytes[first..allowed])?;
    match decode(mode, &bytes[..allowed], rip, env.features().amd) {
        Ok(insn) => Ok(insn),
        Err(false) => Err(Stop::ud()),
        Err(true) => Err(Stop::gp(0)),
    }
}

/// Code bytes of one page. Code in MMIO cannot be executed.
fn read_code<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    address: u64,
    data: &mut [u8],
) -> Result<(), Stop> {
    let gpa = env.translate(cpu, address, Access::fetch(cpu))?.gpa;
    if env.host_ptr(gpa, data.len(), false).is_none() {
        return Err(Stop::Exit(Exit::EmulationFailed));
    }
    mem::read_physical(env, gpa, data)
}

/// #DB for an instruction breakpoint at RIP. RFLAGS.RF and the MOV SS shadow suppress it.
#[cold]
fn fetch_breakpoint(cpu: &CpuState) -> Result<(), Stop> {
    if cpu.rflags & RF != 0 || cpu.shadow & shadow::MOV_SS != 0 {
        return Ok(());
    }
    let address = if cpu.code_size() == CodeSize::Bits64 {
        cpu.rip
    } else {
        cpu.seg[sreg::CS].base.wrapping_add(cpu.rip) & 0xffff_ffff
    };
    match debug::fetch_hits(cpu, address) {
        0 => Ok(()),
        hits => Err(trap(hits)),
    }
}

fn trap(payload: u64) -> Stop {
    Stop::Exception(Exception {
        vector: 1,
        error: None,
        payload,
    })
}

fn execute<E: Env + ?Sized>(
    cpu: &mut CpuState,
    env: &mut E,
    bytes: &[u8],
    insn: &Instruction,
) -> Result<(), Stop> {
    let held = (cpu.rflags & RF, cpu.shadow);
    cpu.rflags &= !RF;
    cpu.shadow = 0;
    let mut step = Step {
        mode: cpu.code_size(),
        traced: cpu.rflags & TF != 0,
        hits: 0,
        cpu,
        env,
        insn,
        bytes,
    };
    match step.execute() {
        Ok(flow) => step.retire(flow, held.1),
        Err(stop) => {
            step.abandon(stop, held);
            Err(stop)
        }
    }
}

impl<E: Env + ?Sized> Step<'_, E> {
    /// RIP of the next instruction.
    #[inline]
    fn next_rip(&self) -> u64 {
        let next = self.cpu.rip.wrapping_add(self.insn.len() as u64);
        if self.mode == CodeSize::Bits64 {
            next
        } else {
            next & 0xffff_ffff
        }
    }

    fn execute(&mut self) -> Result<Flow, Stop> {
        let traits = traits::of(self.insn);
        if traits.gated() {
            traits::check_features(self.env.features(), self.insn.code())?;
        }
        if traits.vector_state() || traits.vex() {
            self.check_units(traits)?;
        }
        match traits.class() {
            Class::Native => self.native(traits),
            Class::Hand => self.by_hand(traits),
            Class::System => self.system(),
            Class::Undefined => Err(Stop::ud()),
        }
    }

    /// CR0.EM/TS/MP, CR4.OSFXSR/OSXSAVE and XCR0 against what the instruction uses.
    fn check_units(&self, traits: Traits) -> Result<(), Stop> {
        let (cr0, cr4) = (self.cpu.cr0, self.cpu.cr4);
        let ud = |bad: bool| if bad { Err(Stop::ud()) } else { Ok(()) };
        if traits.vex() {
            ud(!self.cpu.protected() || self.cpu.v86())?;
        }
        if traits.avx() || traits.avx512() {
            let needed = if traits.avx512() { 0xe6 } else { 6 };
            ud(cr4 & CR4_OSXSAVE == 0 || self.cpu.xcr0 & needed != needed)?;
        } else if traits.sse() {
            ud(cr0 & CR0_EM != 0 || cr4 & CR4_OSFXSR == 0)?;
        } else if traits.mmx() {
            ud(cr0 & CR0_EM != 0)?;
        }
        let ts = cr0 & CR0_TS != 0;
        if self.insn.mnemonic() == Mnemonic::Wait {
            if ts && cr0 & CR0_MP != 0 {
                return Err(Stop::nm());
            }
        } else if traits.vector_state() && ts || traits.x87() && cr0 & CR0_EM != 0 {
            return Err(Stop::nm());
        }
        Ok(())
    }

    fn by_hand(&mut self, traits: Traits) -> Result<Flow, Stop> {
        use Mnemonic as M;
        match self.insn.mnemonic() {
            M::Mov | M::Movzx | M::Movsx | M::Movsxd => self.mov(),
            M::Lea => self.lea(),
            M::Push => self.push_insn(),
            M::Pop => {
                if self.insn.op0_register().is_segment_register() {
                    self.system()
                } else {
                    self.pop_insn()
                }
            }
            M::Pusha | M::Pushad => self.pusha(),
            M::Popa | M::Popad => self.popa(),
            M::Enter => self.enter(),
            M::Leave => self.leave(),
            M::Call => {
                if self.insn.is_call_far() || self.insn.is_call_far_indirect() {
                    self.system()
                } else {
                    self.call()
                }
            }
            M::Jmp => {
                if self.insn.is_jmp_far() || self.insn.is_jmp_far_indirect() {
                    self.system()
                } else {
                    self.jmp()
                }
            }
            M::Ret => self.ret(),
            M::Loop | M::Loope | M::Loopne => self.loop_(),
            M::Jcxz | M::Jecxz | M::Jrcxz => self.jcxz(),
            M::Xlatb => self.xlat(),
            M::Movsd | M::Cmpsd if traits.sse() => self.native(traits),
            M::Movsb | M::Movsw | M::Movsd | M::Movsq => self.movs(),
            M::Stosb | M::Stosw | M::Stosd | M::Stosq => self.stos(),
            M::Lodsb | M::Lodsw | M::Lodsd | M::Lodsq => self.lods(),
            M::Scasb | M::Scasw | M::Scasd | M::Scasq => self.scas(),
            M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq => self.cmps(),
            M::Insb | M::Insw | M::Insd => self.ins(),
            M::Outsb | M::Outsw | M::Outsd => self.outs(),
            M::In => self.input(),
            M::Out => self.output(),
            _ if self.insn.flow_control() == FlowControl::ConditionalBranch => self.jcc(),
            _ => self.hint(traits),
        }
    }

    /// The system side.
    fn system(&mut self) -> Result<Flow, Stop> {
        use Mnemonic as M;
        system_step(self.cpu, self.env, self.insn).unwrap_or_else(|| Err(Stop::ud()))?;
        // These are traced with the flags that their target runs with.
        if matches!(
            self.insn.mnemonic(),
            M::Int | M::Int3 | M::Into | M::Int1 | M::Syscall | M::Sysenter
        ) {
            self.traced &= self.cpu.rflags & TF != 0;
        }
        Ok(Flow::Jumped)
    }

    /// The instruction is done: RIP, shadows, traps.
    #[inline]
    fn retire(&mut self, flow: Flow, old_shadow: u8) -> Result<(), Stop> {
        match flow {
            Flow::Next => self.cpu.rip = self.next_rip(),
            Flow::Jumped => {}
            Flow::Again => {
                self.cpu.rflags |= RF;
                self.cpu.shadow = old_shadow;
            }
        }
        self.env.retired();
        let mut payload = self.hits;
        if self.traced {
            payload |= debug::DR6_BS;
        }
        if payload != 0 && self.cpu.shadow & shadow::MOV_SS == 0 {
            return Err(trap(payload));
        }
        Ok(())
    }

    /// The instruction did not retire.
    #[cold]
    fn abandon(&mut self, stop: Stop, held: (u64, u8)) {
        if stop == Stop::Exit(Exit::Hlt) {
            // HLT has retired.
            self.env.retired();
            return;
        }
        self.cpu.rflags |= held.0;
        self.cpu.shadow = held.1;
        if matches!(stop, Stop::Exception(_)) {
            self.env.retired();
        }
    }
}

/// Code values that move a segment register.
fn moves_segment(code: Code) -> bool {
    matches!(
        code,
        Code::Mov_rm16_Sreg
            | Code::Mov_r32m16_Sreg
            | Code::Mov_r64m16_Sreg
            | Code::Mov_Sreg_rm16
            | Code::Mov_Sreg_r32m16
            | Code::Mov_Sreg_r64m16
    )
}
