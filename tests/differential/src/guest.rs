//! The executors that emulate: the interpreter and the translator.

use crate::case::{FAILED, Outcome, Regs, Start, TIMEOUT, normalize};
use crate::layout::*;
use crate::machine::Machine;
use kvm_core::engine::{Engine, EngineVcpu, Kick};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use x86emu::env::{Exit, Stop};
use x86emu::event::{self, Event};
use x86emu::state::{CpuState, XsaveArea, gpr, sreg};

/// Instructions after which a case counts as endless.
const LIMIT: usize = 100_000;

fn load(cpu: &mut CpuState, machine: &Machine, bits: u32, regs: &Regs) {
    *cpu = machine.cpu(bits);
    cpu.gpr = regs.gpr;
    cpu.rip = regs.rip;
    cpu.rflags = regs.rflags;
    cpu.seg[sreg::FS].base = regs.fs_base;
    cpu.seg[sreg::GS].base = regs.gs_base;
    cpu.xsave = XsaveArea(regs.xsave.0);
}

/// Vectors that push an error code.
fn has_error(vector: u32) -> bool {
    matches!(vector, 8 | 10..=14 | 17 | 21)
}

fn outcome(cpu: &CpuState, machine: &mut Machine, exit: Exit) -> Outcome {
    let mut regs = Regs {
        gpr: cpu.gpr,
        rip: cpu.rip,
        rflags: cpu.rflags,
        fs_base: cpu.seg[sreg::FS].base,
        gs_base: cpu.seg[sreg::GS].base,
        xsave: Box::new(XsaveArea(cpu.xsave.0)),
    };
    let mut vector = match exit {
        Exit::Interrupted => TIMEOUT,
        _ => FAILED,
    };
    let (mut error, mut cr2, mut cs) = (0, 0, cpu.seg[sreg::CS].selector);
    let start = KERNEL + HANDLERS;
    if exit == Exit::Hlt && (start..start + 0x1000).contains(&cpu.rip) {
        vector = ((cpu.rip - start) / 16) as u32;
        let mut frame = cpu.gpr[gpr::RSP];
        let mut word = |machine: &mut Machine| {
            let at = frame.wrapping_sub(KERNEL);
            frame = frame.wrapping_add(8);
            if at >= KERNEL_PAGES * PAGE {
                return 0xdead_dead;
            }
            machine.ram.r64(KERNEL_GPA + at)
        };
        if has_error(vector) {
            error = word(machine);
        }
        regs.rip = word(machine);
        cs = word(machine) as u16;
        regs.rflags = word(machine);
        regs.gpr[gpr::RSP] = word(machine);
        if vector == 14 {
            cr2 = cpu.cr2;
        }
    }
    normalize(&mut regs.xsave);
    Outcome {
        regs,
        vector,
        error,
        cr2,
        cs,
        memory: machine.ram.bytes(USER, USER_SIZE).to_vec(),
    }
}

/// Runs a case in the interpreter.
pub fn interpret(machine: &mut Machine, case: &Start) -> Outcome {
    let mut cpu = machine.cpu(case.bits);
    load(&mut cpu, machine, case.bits, &case.regs);
    machine
        .ram
        .bytes(USER, USER_SIZE)
        .copy_from_slice(&case.memory);
    let mut exit = Exit::Interrupted;
    for _ in 0..LIMIT {
        match x86emu::interp::step(&mut cpu, machine) {
            Ok(()) => {}
            Err(Stop::Exit(e)) => {
                exit = e;
                break;
            }
            Err(Stop::Exception(e)) => {
                if let Err(e) = event::deliver(&mut cpu, machine, Event::from(e)) {
                    exit = e;
                    break;
                }
            }
        }
    }
    outcome(&cpu, machine, exit)
}

/// Deadline of the running case in milliseconds since the start; 0: none.
struct Watchdog {
    deadline: Arc<AtomicU64>,
    start: Instant,
}

/// A vCPU of the translator.
pub struct Translator {
    engine: engine_jit::JitEngine,
    vcpu: Box<dyn EngineVcpu>,
    watchdog: Watchdog,
}

impl Default for Translator {
    fn default() -> Self {
        Self::new()
    }
}

impl Translator {
    /// An engine with one vCPU. The [`Machine`] must exist already: its signal handlers come first.
    pub fn new() -> Self {
        let engine = engine_jit::JitEngine::new().expect("memory for translations");
        let vcpu = engine.create_vcpu(0).expect("memory for a vCPU");
        let watchdog = Watchdog {
            deadline: Arc::new(AtomicU64::new(0)),
            start: Instant::now(),
        };
        let (weak, start) = (Arc::downgrade(&watchdog.deadline), watchdog.start);
        let kicker: Arc<dyn Kick> = vcpu.kicker();
        std::thread::spawn(move || {
            while let Some(deadline) = weak.upgrade() {
                let d = deadline.load(Ordering::SeqCst);
                if d != 0 && start.elapsed().as_millis() as u64 > d {
                    kicker.kick();
                }
                drop(deadline);
                std::thread::sleep(Duration::from_millis(100));
            }
        });
        Translator {
            engine,
            vcpu,
            watchdog,
        }
    }

    /// Runs a case. `fresh`: with all cached translations of addresses dropped, as memory may have
    /// been changed behind the engine's back.
    pub fn run(&mut self, machine: &mut Machine, case: &Start, fresh: bool) -> Outcome {
        load(self.vcpu.cpu(), machine, case.bits, &case.regs);
        machine
            .ram
            .bytes(USER, USER_SIZE)
            .copy_from_slice(&case.memory);
        if fresh {
            self.vcpu.state_changed();
        }
        self.vcpu.clear_attention();
        let now = self.watchdog.start.elapsed().as_millis() as u64;
        self.watchdog.deadline.store(now + 3000, Ordering::SeqCst);
        let mut exit = self.vcpu.run(machine, false);
        // Other than by the watchdog, the engine leaves when it had to stop in the middle.
        while exit == Exit::Interrupted
            && (self.watchdog.start.elapsed().as_millis() as u64) < now + 2900
        {
            self.vcpu.clear_attention();
            exit = self.vcpu.run(machine, false);
        }
        self.watchdog.deadline.store(0, Ordering::SeqCst);
        outcome(self.vcpu.cpu_ref(), machine, exit)
    }

    /// The engine.
    pub fn engine(&self) -> &engine_jit::JitEngine {
        &self.engine
    }
}
