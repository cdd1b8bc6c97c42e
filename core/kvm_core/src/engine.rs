//! What an engine is: something that turns vCPU state into execution until an exit.

use alloc::boxed::Box;
use alloc::sync::Arc;
use x86emu::env::{Env, Exit};
use x86emu::state::CpuState;

/// Why an engine object could not be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineError {
    /// Memory for code caches or state could not be had.
    OutOfMemory,
    /// The host lacks something the engine cannot do without.
    Unsupported(&'static str),
}

/// Per-VM side of an engine.
pub trait Engine: Send + Sync {
    /// Makes the engine's part of a vCPU, in the state after RESET.
    fn create_vcpu(&self, id: u32) -> Result<Box<dyn EngineVcpu>, EngineError>;

    /// The VM's memslots have changed: every vCPU must drop host pointers that it cached. Returns
    /// after no vCPU uses an old pointer any more (vCPUs outside [`EngineVcpu::run`] do so before
    /// they execute guest code again).
    fn memory_changed(&self);

    /// Dirty logging of a range was switched on or its log was fetched and cleared: the next write to
    /// each page of `[gpa, gpa + len)` must go through [`x86emu::env::PhysMem::host_ptr`] again.
    fn write_protect(&self, gpa: u64, len: u64);
}

/// Makes a running vCPU leave guest code soon; callable from any thread and from signal handlers.
pub trait Kick: Send + Sync {
    /// Raises the attention flag: [`EngineVcpu::run`] returns [`Exit::Interrupted`] at the next
    /// point where the guest's state is precise, or at once when it is entered later.
    fn kick(&self);
}

/// Per-vCPU side of an engine.
pub trait EngineVcpu: Send {
    /// The architectural state. Only valid to touch while the vCPU is not running.
    fn cpu(&mut self) -> &mut CpuState;

    /// The state, read-only.
    fn cpu_ref(&self) -> &CpuState;

    /// The handle that raises this vCPU's attention flag.
    fn kicker(&self) -> Arc<dyn Kick>;

    /// Clears the attention flag; the core does so before it looks at its requests.
    fn clear_attention(&mut self);

    /// Executes guest code until something needs a decision by the core. Exceptions that guest
    /// instructions raise are delivered to the guest by the engine itself (a triple fault is
    /// [`Exit::Shutdown`]).
    ///
    /// `irq_window`: an interrupt is pending that the guest cannot take now; return
    /// [`Exit::Interrupted`] as soon as RFLAGS.IF is set and no shadow holds it back.
    fn run(&mut self, env: &mut dyn Env, irq_window: bool) -> Exit;

    /// Executes exactly one instruction with the interpreter; `None` when it retired.
    fn step(&mut self, env: &mut dyn Env) -> Option<Exit>;

    /// Translation-cache consequences of state that user space wrote (KVM_SET_SREGS, MSRs, CPUID).
    fn state_changed(&mut self);
}
