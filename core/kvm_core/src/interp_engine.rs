//! The reference engine: nothing but the interpreter, one instruction after the other.

use crate::engine::{Engine, EngineError, EngineVcpu, Kick};
use crate::sync::{Mutex, yield_now};
use alloc::boxed::Box;
use alloc::sync::{Arc, Weak};
use alloc::vec::Vec;
use core::sync::atomic::{AtomicBool, Ordering};
use x86defs::rflags;
use x86emu::env::{Env, Exit, Stop};
use x86emu::event::{self, Event};
use x86emu::interp;
use x86emu::state::CpuState;

/// What other threads see of an interpreted vCPU.
#[derive(Default)]
struct Attention {
    raised: AtomicBool,
    /// In [`EngineVcpu::run`] or `step`, where host pointers may be in use.
    running: AtomicBool,
}

impl Kick for Attention {
    fn kick(&self) {
        self.raised.store(true, Ordering::SeqCst);
    }
}

/// The interpreter as an engine.
#[derive(Default)]
pub struct InterpEngine {
    vcpus: Mutex<Vec<Weak<Attention>>>,
}

impl InterpEngine {
    fn quiesce(&self) {
        let vcpus: Vec<_> = self.vcpus.lock().iter().filter_map(Weak::upgrade).collect();
        for vcpu in &vcpus {
            vcpu.kick();
        }
        // Each vCPU leaves after the instruction it is at, and reads the new snapshot when it comes
        // back; `SeqCst` orders its mark against the snapshot's generation.
        for vcpu in vcpus {
            while vcpu.running.load(Ordering::SeqCst) && vcpu.raised.load(Ordering::SeqCst) {
                yield_now();
            }
        }
    }
}

impl Engine for InterpEngine {
    fn create_vcpu(&self, _id: u32) -> Result<Box<dyn EngineVcpu>, EngineError> {
        let attention = Arc::new(Attention::default());
        let mut vcpus = self.vcpus.lock();
        vcpus.try_reserve(1).map_err(|_| EngineError::OutOfMemory)?;
        vcpus.push(Arc::downgrade(&attention));
        Ok(Box::new(InterpVcpu {
            cpu: Box::default(),
            attention,
        }))
    }

    fn memory_changed(&self) {
        self.quiesce();
    }

    /// Every write asks for its host pointer anew, so only those in flight matter.
    fn write_protect(&self, _gpa: u64, _len: u64) {
        self.quiesce();
    }
}

struct InterpVcpu {
    cpu: Box<CpuState>,
    attention: Arc<Attention>,
}

impl InterpVcpu {
    fn step_once(&mut self, env: &mut dyn Env) -> Result<(), Exit> {
        match interp::step(&mut self.cpu, env) {
            Ok(()) => Ok(()),
            Err(Stop::Exception(e)) => event::deliver(&mut self.cpu, env, Event::from(e)),
            Err(Stop::Exit(exit)) => Err(exit),
        }
    }
}

impl EngineVcpu for InterpVcpu {
    fn cpu(&mut self) -> &mut CpuState {
        &mut self.cpu
    }

    fn cpu_ref(&self) -> &CpuState {
        &self.cpu
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.attention.clone()
    }

    fn clear_attention(&mut self) {
        self.attention.raised.store(false, Ordering::SeqCst);
    }

    fn run(&mut self, env: &mut dyn Env, irq_window: bool) -> Exit {
        self.attention.running.store(true, Ordering::SeqCst);
        let exit = loop {
            if self.attention.raised.load(Ordering::SeqCst) {
                break Exit::Interrupted;
            }
            if irq_window && self.cpu.rflags & rflags::IF != 0 && self.cpu.shadow == 0 {
                break Exit::Interrupted;
            }
            if let Err(exit) = self.step_once(env) {
                break exit;
            }
        };
        self.attention.running.store(false, Ordering::SeqCst);
        exit
    }

    fn step(&mut self, env: &mut dyn Env) -> Option<Exit> {
        self.attention.running.store(true, Ordering::SeqCst);
        let result = self.step_once(env);
        self.attention.running.store(false, Ordering::SeqCst);
        result.err()
    }

    fn state_changed(&mut self) {}
}
