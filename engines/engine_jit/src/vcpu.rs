//! The engine's face to the core: [`Engine`] and [`EngineVcpu`].
#![expect(
    unsafe_code,
    reason = "hands out references into vCPU memory that emitted code shares"
)]

use crate::layout::VcpuMem;
use crate::recent::Recent;
use crate::run::{HELPERS, Runner};
use crate::stats::Stats;
use crate::world::{VcpuBox, World};
use kvm_core::engine::{Engine, EngineError, EngineVcpu, Kick};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use x86emu::env::{Env, Exit};
use x86emu::state::CpuState;

/// The software engine of one VM.
pub struct JitEngine {
    world: Arc<World>,
}

impl JitEngine {
    /// Reserves the code cache.
    ///
    /// # Errors
    /// When memory, or executable memory, cannot be had.
    pub fn new() -> Result<Self, EngineError> {
        crate::signal::note_filter();
        Ok(JitEngine {
            world: Arc::new(World::new(&HELPERS)?),
        })
    }
}

impl Engine for JitEngine {
    fn create_vcpu(&self, _id: u32) -> Result<Box<dyn EngineVcpu>, EngineError> {
        let mem = Arc::new(VcpuBox::new(&self.world.stubs)?);
        self.world.add(&mem);
        Ok(Box::new(JitVcpu {
            world: self.world.clone(),
            mem,
            recent: Recent::default(),
            stats: Stats {
                mnemonics: std::env::var_os("ANYKVM_JIT_STATS")
                    .is_some_and(|v| v == "2")
                    .then(|| Box::new([0; 4096])),
                ..Stats::default()
            },
        }))
    }

    fn memory_changed(&self) {
        let mut cache = self.world.cache_outside();
        self.world.stopped(&mut cache, None, |c| c.flush_memory());
        // Where a page was RAM there may be other RAM now: its bytes are compared when its code is
        // next looked up, as after any flush.
    }

    fn write_protect(&self, gpa: u64, len: u64) {
        let mut cache = self.world.cache_outside();
        self.world
            .stopped(&mut cache, None, |c| c.unwrite_range(gpa, len));
    }
}

/// The software engine of one vCPU.
pub struct JitVcpu {
    world: Arc<World>,
    mem: Arc<VcpuBox>,
    stats: Stats,
    recent: Recent,
}

impl JitVcpu {
    /// Event counts since the vCPU was made.
    pub fn stats(&self) -> &Stats {
        &self.stats
    }
}

impl JitVcpu {
    /// Runs guest code by `f`, after `prepare`, as a vCPU that the world counts as running.
    fn entered<R>(
        &mut self,
        env: &mut dyn Env,
        irq_window: bool,
        prepare: impl FnOnce(&mut VcpuMem),
        f: impl FnOnce(Runner<'_>) -> R,
    ) -> R {
        self.world.enter(&self.mem);
        // SAFETY: `running` is set: no other thread touches anything but the atomic flags.
        let vm = unsafe { &mut *self.mem.mem() };
        vm.irq_window = irq_window.into();
        prepare(vm);
        let (world, me) = (&self.world, &self.mem);
        let r = f(Runner::new(
            vm,
            env,
            world,
            me,
            &mut self.stats,
            &mut self.recent,
        ));
        self.world.leave(&self.mem);
        r
    }
}

impl EngineVcpu for JitVcpu {
    fn cpu(&mut self) -> &mut CpuState {
        // SAFETY: `&mut self` means the vCPU is not running, and other threads leave `cpu` alone.
        unsafe { &mut (*self.mem.mem()).cpu }
    }

    fn cpu_ref(&self) -> &CpuState {
        // SAFETY: as above; `run` needs `&mut self`.
        unsafe { &(*self.mem.mem()).cpu }
    }

    fn kicker(&self) -> Arc<dyn Kick> {
        self.mem.clone()
    }

    fn clear_attention(&mut self) {
        self.mem.attention().store(0, Ordering::SeqCst);
        // SAFETY: `&mut self` means the vCPU is not running; others touch atomics only.
        unsafe { &*self.mem.mem() }.settle();
    }

    fn run(&mut self, env: &mut dyn Env, irq_window: bool) -> Exit {
        self.entered(
            env,
            irq_window,
            |vm| {
                if vm.cpu.cr0 & x86defs::cr0::PG == 0 {
                    // Without paging the guest has no flushes that would show what devices and user space have
                    // written over its code.
                    vm.caches.flush_code();
                }
            },
            |runner| runner.run(),
        )
    }

    fn step(&mut self, env: &mut dyn Env) -> Option<Exit> {
        self.entered(env, false, |_| (), |runner| runner.step_once())
    }

    fn state_changed(&mut self) {
        self.world.enter(&self.mem);
        // SAFETY: as in `entered`.
        unsafe { (*self.mem.mem()).caches.flush_memory() };
        self.world.leave(&self.mem);
    }
}

impl Drop for JitVcpu {
    fn drop(&mut self) {
        // Whoever can kick the vCPU keeps its memory alive, but another may have its place for windows now.
        self.world.enter(&self.mem);
        // SAFETY: as in `entered`; nothing else refers to the caches.
        let windows = unsafe { &mut (*self.mem.mem()).caches.windows };
        windows.release();
        windows.forget_memory();
        self.world.leave(&self.mem);
        if let Some(path) = std::env::var_os("ANYKVM_JIT_DUMP")
            && let Err(e) = std::fs::write(path, self.world.cache_outside().arena.bytes())
        {
            log::warn!("engine_jit: cannot write ANYKVM_JIT_DUMP: {e}");
        }
        if std::env::var_os("ANYKVM_JIT_STATS").is_some() {
            let cache = self.world.cache_outside();
            // SAFETY: the vCPU is not running.
            let caches = unsafe { &(*self.mem.mem()).caches };
            eprintln!(
                "engine_jit: {:?}\n  windows: {} faults mapped, {} mappings, taken {} times, given up {}, Mcycles with, without and mapping {:?}\n  TLB refills in emitted code {}, flushes {}, jump-cache flushes {}, context switches {}, blocks {}, code {} KiB",
                self.stats,
                caches.windows.faults,
                caches.windows.mappings,
                caches.heat.taken,
                caches.heat.refused,
                caches.heat.total.map(|t| t / 1_000_000),
                caches.structures.refills,
                caches.flushes,
                caches.jump_flushes,
                caches.switches,
                cache.translated,
                cache.arena.used() >> 10
            );
        }
    }
}
