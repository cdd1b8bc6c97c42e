//! The main path: a vCPU's life between two returns to user space.
//!
//! [`Vcpu::run`] finishes the access that user space was asked to answer, and then takes turns
//! ([`Vcpu::turn`]): see to requests, sleep if halted, inject what is pending, let the engine run
//! guest code until it exits, decide what the exit means.

use crate::env::linear_rip;
use crate::inflight::Op;
use crate::stats::Counter;
use crate::sync::yield_now;
use crate::vcpu::{Vcpu, request};
use kvm_abi::run::{self, internal, reason};
use kvm_abi::{Errno, guestdbg, mp_state, quirk};
use x86defs::{cr0, rflags, vector};
use x86emu::env::{Exception, Exit};
use x86emu::event::{self, Event};
use x86emu::paging;
use x86emu::state::{CpuState, Segment, gpr, shadow, sreg};

use crate::host::Wake;

/// What comes after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Another turn.
    Turn,
    /// Back to user space; `kvm_run` says why.
    User,
}

/// What fills the room behind an instruction's bytes.
const NOP: u8 = 0x90;

/// Requests that wake a sleeping vCPU whatever its state.
const WAKE_ALWAYS: u32 = request::INIT | request::SIPI | request::USER;

impl Vcpu {
    /// KVM_RUN: executes guest code until user space is needed; `kvm_run` says what for.
    ///
    /// # Errors
    /// EINTR: kicked, a signal, or `immediate_exit`; EAGAIN: the vCPU waited for its start-up IPI;
    /// EFAULT: the host memory behind a memslot is not there; the instruction has not happened.
    pub fn run(&mut self) -> Result<(), Errno> {
        self.env.host_fault = false;
        let at_once = self.env.run.immediate_exit();
        self.env.refresh_settings();
        self.env.enter_steal_time();
        self.resume();
        let result = self.run_inner();
        self.env.sync_pv_eoi();
        self.env.mark_preempted();
        // A run that ends at once leaves the last exit's description alone.
        if result == Err(Errno::EINTR) && !at_once {
            self.env.shared.stats.count(Counter::SignalExits);
            // `immediate_exit` leaves the last exit as it was: user space completes it so.
            if !self.env.run.immediate_exit() {
                self.env.run.set_reason(reason::INTR);
            }
        }
        self.put_sync_regs();
        self.publish();
        result
    }

    /// The vCPU's thread goes on with guest code.
    fn resume(&mut self) {
        if self.env.mark_running() {
            self.engine.state_changed();
        }
    }

    fn run_inner(&mut self) -> Result<(), Errno> {
        if self.env.mp_state == mp_state::UNINITIALIZED {
            self.check_user_exit()?;
            self.process_requests();
            if self.env.mp_state == mp_state::UNINITIALIZED {
                self.sleep(None)?;
                self.process_requests();
            }
            return Err(Errno::EAGAIN);
        }
        self.take_sync_regs()?;
        // CR8 is user space's to set when it has the local APIC.
        if self.env.shared.lapic().is_none() {
            self.env.user_cr8 = self.env.run.u64(run::CR8) & 0xf;
        }
        if self.complete_access()? == Next::User {
            return Ok(());
        }
        self.check_user_exit()?;
        while self.turn()? == Next::Turn {}
        Ok(())
    }

    /// One round of requests, injection, guest code, exit.
    fn turn(&mut self) -> Result<Next, Errno> {
        // First the flag, then what it stands for: whatever is raised from here on makes the engine
        // return at once.
        self.engine.clear_attention();
        self.env.slots_seen = self.env.slots_generation();
        self.env.sync_pv_eoi();
        self.check_host_fault()?;
        self.check_user_exit()?;
        self.process_requests();
        if core::mem::take(&mut self.env.events.triple_fault) {
            self.env.run.set_reason(reason::SHUTDOWN);
            return Ok(Next::User);
        }
        if self.must_tell_user() {
            return Ok(Next::User);
        }
        match self.env.mp_state {
            mp_state::RUNNABLE => {}
            mp_state::HALTED => {
                if !self.wakes() {
                    self.sleep(self.env.timer_deadline())?;
                    return Ok(Next::Turn);
                }
                self.env.mp_state = mp_state::RUNNABLE;
            }
            _ => {
                self.sleep(None)?;
                return Ok(Next::Turn);
            }
        }
        self.env.has_run = true;
        self.env.arm_timer();
        let irq_window = match self.inject() {
            Ok(Injected::Nothing) => false,
            Ok(Injected::Blocked) => true,
            Ok(Injected::NmiBlocked) => {
                // Only the end of the handler or of a shadow opens the way, and no engine reports
                // that; so the vCPU goes step by step until then.
                self.env.shared.stats.count(Counter::NmiWindowExits);
                let exit = self.engine.step(&mut self.env);
                return exit.map_or(Ok(Next::Turn), |exit| self.decide(exit));
            }
            Err(exit) => return self.decide(exit),
        };
        let user_window =
            self.env.run.u8(run::REQUEST_INTERRUPT_WINDOW) != 0 && self.accepts_user_interrupt();
        if user_window && self.ready_for_interrupt() {
            self.env.shared.stats.count(Counter::RequestIrqExits);
            self.env.run.set_reason(reason::IRQ_WINDOW_OPEN);
            return Ok(Next::User);
        }
        if self.env.guest_debug != 0 {
            return self.debugged_turn(irq_window || user_window);
        }
        let exit = self.engine.run(&mut self.env, irq_window || user_window);
        let stats = &self.env.shared.stats;
        stats.count(Counter::Exits);
        if exit == Exit::Interrupted {
            let open = irq_window && self.engine.cpu_ref().rflags & rflags::IF != 0;
            stats.count(if open {
                Counter::IrqWindowExits
            } else {
                Counter::IrqExits
            });
        }
        self.decide(exit)
    }

    /// What user space must hear of before the guest goes on, whatever state the vCPU is in.
    fn must_tell_user(&mut self) -> bool {
        if let Some(ring) = self.env.shared.dirty_ring() {
            ring.drain();
            if ring.is_full() {
                self.env.run.set_reason(reason::DIRTY_RING_FULL);
                return true;
            }
        }
        let Some(word) = self.env.eoi_exits.iter().position(|&word| word != 0) else {
            return false;
        };
        let bit = self.env.eoi_exits[word].trailing_zeros();
        self.env.eoi_exits[word] &= !(1 << bit);
        self.env.run.set_reason(reason::IOAPIC_EOI);
        self.env
            .run
            .write(run::EXIT, &[(word * 64) as u8 + bit as u8]);
        true
    }

    /// What an exit means.
    pub(crate) fn decide(&mut self, exit: Exit) -> Result<Next, Errno> {
        self.check_host_fault()?;
        if exit == Exit::UserSpace && self.retires_before_exit() {
            return self.retire_then_exit();
        }
        let page = &self.env.run;
        match exit {
            Exit::Interrupted => return Ok(Next::Turn),
            Exit::Pause => {
                yield_now();
                return Ok(Next::Turn);
            }
            Exit::Hlt => {
                self.env.shared.stats.count(Counter::HaltExits);
                if self.env.shared.lapic().is_some() || self.env.vm.settings.hlt_in_guest() {
                    self.env.mp_state = mp_state::HALTED;
                    return Ok(Next::Turn);
                }
                page.set_reason(reason::HLT);
            }
            Exit::UserSpace => {
                let rip = linear_rip(self.engine.cpu_ref());
                match &mut self.env.inflight.pending {
                    Some(pending) => pending.linear_rip = rip,
                    None => {
                        log::error!("an engine asked for user space without an access");
                        self.internal_error(internal::EMULATION);
                    }
                }
            }
            Exit::Shutdown => page.set_reason(reason::SHUTDOWN),
            Exit::EmulationFailed => {
                self.env.shared.stats.count(Counter::InsnEmulationFail);
                let cpu = self.engine.cpu_ref();
                log::info!(
                    "vcpu {}: cannot execute the instruction at {:#x}:{:#x}",
                    self.env.shared.id(),
                    cpu.seg[sreg::CS].selector,
                    cpu.rip
                );
                return Ok(self.emulation_failed());
            }
            Exit::InternalError => self.internal_error(internal::EMULATION),
            Exit::Vectoring(vector) => self.vectoring_error(vector),
            Exit::Debug(exception) => self.debug_exit(&exception),
        }
        Ok(Next::User)
    }

    // Coming from and going to user space.

    fn check_user_exit(&mut self) -> Result<(), Errno> {
        if self.env.run.immediate_exit() || self.env.shared.take_requests(request::USER) != 0 {
            // Whoever stops a vCPU may change its memory, a debugger its code.
            self.engine.state_changed();
            return Err(Errno::EINTR);
        }
        Ok(())
    }

    fn check_host_fault(&mut self) -> Result<(), Errno> {
        if core::mem::take(&mut self.env.host_fault) {
            self.env.inflight.clear();
            return Err(Errno::EFAULT);
        }
        Ok(())
    }

    /// Takes user space's answer to the pending access and finishes the instruction with it.
    fn complete_access(&mut self) -> Result<Next, Errno> {
        let Some(pending) = self.env.inflight.pending.take() else {
            return Ok(Next::Turn);
        };
        if pending.linear_rip != linear_rip(self.engine.cpu_ref()) {
            // User space has moved the vCPU elsewhere.
            self.env.inflight.clear();
            return Ok(Next::Turn);
        }
        if !self.env.take_answer(pending) {
            self.internal_error(internal::EMULATION);
            return Ok(Next::User);
        }
        self.env.shared.stats.count(Counter::InsnEmulation);
        match self.engine.step(&mut self.env) {
            None => Ok(Next::Turn),
            Some(exit) => self.decide(exit),
        }
    }

    /// Writes what `kvm_run` shows at every return.
    pub(crate) fn publish(&mut self) {
        let cpu = self.engine.cpu_ref();
        let if_flag = cpu.rflags & rflags::IF != 0;
        let (apic_base, cr8) = match self.env.shared.lapic() {
            Some(lapic) => {
                let lapic = lapic.lock();
                (lapic.base(), lapic.cr8())
            }
            None => (self.env.user_apic_base, self.env.user_cr8),
        };
        let ready = self.env.vm.pic_in_kernel()
            || (self.accepts_user_interrupt() && self.ready_for_interrupt());
        let page = &self.env.run;
        let flags = if self.env.smm { run::FLAG_SMM } else { 0 };
        page.write(run::FLAGS, &flags.to_ne_bytes());
        page.write(run::IF_FLAG, &[u8::from(if_flag)]);
        page.write(run::READY_FOR_INTERRUPT_INJECTION, &[u8::from(ready)]);
        page.set_u64(run::CR8, cr8);
        page.set_u64(run::APIC_BASE, apic_base);
    }

    /// There is a place for KVM_INTERRUPT's vector, and the vCPU listens to it.
    fn accepts_user_interrupt(&self) -> bool {
        match self.env.shared.lapic() {
            None => true,
            Some(_) if self.env.vm.pic_in_kernel() => false,
            Some(lapic) => self.env.events.extint.is_none() && lapic.lock().accepts_pic(),
        }
    }

    /// KVM_INTERRUPT would be delivered now.
    fn ready_for_interrupt(&self) -> bool {
        let cpu = self.engine.cpu_ref();
        cpu.rflags & rflags::IF != 0
            && cpu.shadow == 0
            && self.env.events.interrupt.is_none()
            && self.env.events.exception.is_none()
    }

    /// An event's gate or stack is not in RAM. The data are KVM's: what was delivered, two words that only
    /// hardware has, the guest-physical address, the host CPU that is not known here.
    fn vectoring_error(&mut self, vector: u8) {
        const VALID_EXCEPTION: u64 = 1 << 31 | 3 << 8;
        let gpa = match self.env.inflight.pending.map(|pending| pending.op) {
            Some(Op::Read(gpa) | Op::Write(gpa)) => gpa,
            _ => u64::MAX,
        };
        self.internal_error(internal::DELIVERY_EV);
        let page = &self.env.run;
        let data = [VALID_EXCEPTION | u64::from(vector), 0, 0, gpa, 0];
        page.set_u32(run::EXIT + 4, data.len() as u32);
        for (i, value) in data.into_iter().enumerate() {
            page.set_u64(run::EXIT + 8 + i * 8, value);
        }
    }

    pub(crate) fn internal_error(&mut self, suberror: u32) {
        let page = &self.env.run;
        page.set_reason(reason::INTERNAL_ERROR);
        page.set_u32(run::EXIT, suberror);
        page.set_u32(run::EXIT + 4, 0);
        self.env.inflight.clear();
    }

    /// OUT to port 7EH, whose listeners in user space expect RIP behind it, unless told otherwise.
    fn retires_before_exit(&mut self) -> bool {
        let pending = self.env.inflight.pending;
        if !pending.is_some_and(|p| p.op == Op::Out(0x7e))
            || !self.env.vm.settings.quirk(quirk::OUT_7E_INC_RIP)
        {
            return false;
        }
        let mut bytes = [0; 2];
        let opcode = match self.code_bytes(&mut bytes) {
            2 if bytes[0] == 0x66 => bytes[1],
            0 => return false,
            _ => bytes[0],
        };
        // Not OUTS, which may have more to write.
        matches!(opcode, 0xe6 | 0xe7 | 0xee | 0xef)
    }

    /// Finishes the instruction whose access `kvm_run` describes.
    fn retire_then_exit(&mut self) -> Result<Next, Errno> {
        if let Some(pending) = self.env.inflight.pending.take()
            && self.env.take_answer(pending)
            && let Some(exit) = self.engine.step(&mut self.env)
        {
            return self.decide(exit);
        }
        Ok(Next::User)
    }

    /// An instruction that nobody can execute: #UD for programs, and user space's to know of for the rest, or
    /// always if it wants to.
    fn emulation_failed(&mut self) -> Next {
        let always = self.env.vm.settings.exit_on_emulation_failure();
        let cpu = self.engine.cpu_ref();
        let cpl = cpu.cpl;
        if !always {
            self.env.events.exception = Some(Exception {
                vector: vector::UD,
                error: None,
                payload: 0,
            });
            self.env.events.exception_pending = true;
            if cpl != 0 {
                self.env.inflight.clear();
                return Next::Turn;
            }
        }
        self.internal_error(internal::EMULATION);
        let mut bytes = [NOP; 15];
        let size = self.code_bytes(&mut bytes);
        let page = &self.env.run;
        if size != 0 {
            page.set_u32(run::EXIT + 4, 3); // ndata: flags, size and bytes
            page.set_u64(run::EXIT + 8, run::EMULATION_FLAG_BYTES);
            page.write(run::EXIT + 16, &[size as u8]);
            page.write(run::EXIT + 17, &bytes);
        } else {
            page.set_u32(run::EXIT + 4, 1);
            page.set_u64(run::EXIT + 8, 0);
        }
        Next::User
    }

    /// The bytes at RIP, as far as they can be read; how many.
    fn code_bytes(&mut self, bytes: &mut [u8]) -> usize {
        let mut done = 0;
        while done < bytes.len() {
            let cpu = self.engine.cpu_ref();
            let linear = linear_rip(cpu).wrapping_add(done as u64);
            let Some(mapping) = paging::peek(cpu, &mut self.env, linear) else {
                break;
            };
            let part = (4096 - (linear & 0xfff) as usize).min(bytes.len() - done);
            let env = &mut self.env;
            let (reader, memory) = if env.smm {
                (&mut env.smram, &env.vm.smram)
            } else {
                (&mut env.memory, &env.vm.memory)
            };
            if !reader.read(memory, mapping.gpa, &mut bytes[done..done + part]) {
                break;
            }
            done += part;
        }
        done
    }

    // Requests and sleep.

    /// Sees to what other threads asked for.
    pub(crate) fn process_requests(&mut self) {
        let shared = self.env.shared.clone();
        if shared.take_requests(request::NMI) != 0 {
            let cpu = self.engine.cpu_ref();
            // One in service and one waiting, or two waiting: more are lost, as on hardware.
            let limit = if cpu.nmi_blocked { 1 } else { 2 };
            self.env.events.nmis = self
                .env
                .events
                .nmis
                .saturating_add(shared.take_nmis())
                .min(limit);
        }
        if shared.take_requests(request::SMI) != 0 {
            self.env.events.smi = true;
        }
        if shared.take_requests(request::CLOCK) != 0 {
            self.env.write_time_info(self.engine.cpu_ref());
        }
        // Both at once: a start-up IPI that is here without its INIT came outside of the protocol and
        // means nothing, but one that comes right behind its INIT must not be mistaken for that.
        let mut taken = shared.take_requests(request::INIT | request::SIPI);
        if self.env.smm {
            self.env.events.latched_init |= taken & request::INIT != 0;
            taken = 0;
        } else if core::mem::take(&mut self.env.events.latched_init) {
            taken |= request::INIT;
        }
        if taken & request::INIT != 0 {
            self.init();
        }
        if taken & request::SIPI != 0 && self.env.mp_state == mp_state::INIT_RECEIVED {
            self.start_up(shared.sipi_vector());
        }
        if let Some(lapic) = shared.lapic() {
            let now = self.env.now();
            lapic.lock().expire(now);
            self.env.update_steal_time(now.ns);
        }
    }

    /// INIT: the CPU as after RESET, but for caches, FPU and some MSRs. Application processors then
    /// wait for a start-up IPI.
    fn init(&mut self) {
        reset_cpu(self.engine.cpu(), true, self.env.cpuid.regs(1, 0)[0]);
        self.env.smm = false;
        self.env.smm_inside_nmi = false;
        self.engine.state_changed();
        self.env.reset_msrs(true);
        self.env.inflight.clear();
        self.env.events = Default::default();
        let mut bsp = true;
        self.env.configure_lapic();
        if let Some(lapic) = self.env.shared.lapic() {
            let mut lapic = lapic.lock();
            lapic.reset(true);
            bsp = lapic.config().bsp;
        }
        self.env.mp_state = if bsp {
            mp_state::RUNNABLE
        } else {
            mp_state::INIT_RECEIVED
        };
    }

    /// A start-up IPI: real mode, at the page that the vector names.
    fn start_up(&mut self, page: u8) {
        let cpu = self.engine.cpu();
        cpu.seg[sreg::CS] = Segment {
            base: u64::from(page) << 12,
            limit: 0xffff,
            selector: u16::from(page) << 8,
            attr: 0x9b,
            unusable: false,
        };
        cpu.rip = 0;
        self.engine.state_changed();
        self.env.mp_state = mp_state::RUNNABLE;
    }

    /// Whether a halted vCPU has a reason to go on.
    fn wakes(&mut self) -> bool {
        let cpu = self.engine.cpu_ref();
        let events = &self.env.events;
        if events.exception.is_some()
            || (events.nmis != 0 && !cpu.nmi_blocked)
            || (events.smi && !cpu.smm)
        {
            return true;
        }
        // Who waits for an interrupt that user space has yet to give.
        if self.env.run.u8(run::REQUEST_INTERRUPT_WINDOW) != 0
            && self.env.shared.lapic().is_none()
            && self.ready_for_interrupt()
        {
            return true;
        }
        if self.env.shared.take_requests(request::UNHALT) != 0 {
            return true;
        }
        cpu.rflags & rflags::IF != 0 && (events.interrupt.is_some() || self.interrupt_pending())
    }

    fn sleep(&mut self, deadline_ns: Option<u64>) -> Result<(), Errno> {
        if self.env.shared.has_requests(WAKE_ALWAYS) {
            return Ok(());
        }
        self.env.mark_preempted();
        let stats = &self.env.shared.stats;
        let before = self.env.vm.host.now_ns();
        stats.set_blocking(true);
        let wake = self.env.shared.waiter().wait(deadline_ns);
        stats.set_blocking(false);
        stats.slept(self.env.vm.host.now_ns().saturating_sub(before));
        if wake != Wake::Signal {
            stats.count(Counter::HaltWakeup);
        }
        self.resume();
        match wake {
            Wake::Woken | Wake::Deadline => Ok(()),
            Wake::Signal => Err(Errno::EINTR),
        }
    }

    // Injection.

    /// Whether the interrupt controllers have something for this vCPU.
    fn interrupt_pending(&self) -> bool {
        let Some(lapic) = self.env.shared.lapic() else {
            return false;
        };
        let pic = {
            let lapic = lapic.lock();
            if lapic.highest_pending().is_some() {
                return true;
            }
            lapic.accepts_pic()
        };
        pic && (self.env.events.extint.is_some() || self.env.vm.pic_output())
    }

    /// Takes the interrupt to deliver from its controller.
    fn acknowledge(&mut self) -> Option<u8> {
        let lapic = self.env.shared.lapic()?;
        let pic = lapic.lock().accepts_pic();
        // The 8259's interrupt comes past the local APIC's priorities.
        if pic && let Some(vector) = self.env.events.extint.take() {
            return Some(vector);
        }
        if pic && let Some(vector) = self.env.vm.pic_ack() {
            return Some(vector);
        }
        let mut lapic = lapic.lock();
        lapic.highest_pending()?;
        Some(lapic.ack())
    }

    /// Delivers the most urgent pending event, if the guest can take it now.
    fn inject(&mut self) -> Result<Injected, Exit> {
        if let Some(exception) = self.env.events.exception.take() {
            self.env.events.exception_pending = false;
            // User space injects it for the guest; a debugger does not get it back.
            let debug = core::mem::take(&mut self.env.guest_debug);
            let result = self.deliver(Event::from(exception));
            self.env.guest_debug = debug;
            result?;
        }
        let cpu = self.engine.cpu_ref();
        if self.env.events.interrupt_acked
            && let Some(vector) = self.env.events.interrupt.take()
        {
            self.env.events.interrupt_acked = false;
            self.env.shared.stats.count(Counter::IrqInjections);
            self.deliver(Event::external(vector))?;
            return Ok(self.left_over());
        }
        if self.env.guest_debug & guestdbg::BLOCKIRQ != 0 {
            return Ok(Injected::Nothing);
        }
        if self.env.events.smi && !cpu.smm {
            self.env.events.smi = false;
            self.enter_smm();
            return Ok(self.left_over());
        }
        if self.env.events.nmis != 0 {
            if cpu.nmi_blocked || cpu.shadow & (shadow::MOV_SS | shadow::STI) != 0 {
                return Ok(Injected::NmiBlocked);
            }
            self.env.events.nmis -= 1;
            self.env.shared.stats.count(Counter::NmiInjections);
            self.deliver(Event::nmi())?;
            return Ok(self.left_over());
        }
        if self.env.events.interrupt.is_none() && !self.interrupt_pending() {
            return Ok(Injected::Nothing);
        }
        let cpu = self.engine.cpu_ref();
        if cpu.rflags & rflags::IF == 0 || cpu.shadow != 0 {
            return Ok(Injected::Blocked);
        }
        let vector = match self.env.events.interrupt.take() {
            Some(vector) => Some(vector),
            None => self.acknowledge(),
        };
        if let Some(vector) = vector {
            self.env.shared.stats.count(Counter::IrqInjections);
            self.deliver(Event::external(vector))?;
            self.env.offer_pv_eoi();
        }
        Ok(self.left_over())
    }

    /// What still waits after a delivery.
    fn left_over(&self) -> Injected {
        let cpu = self.engine.cpu_ref();
        if self.env.events.nmis != 0 && (cpu.nmi_blocked || cpu.shadow != 0) {
            Injected::NmiBlocked
        } else if self.env.events.interrupt.is_some() || self.interrupt_pending() {
            Injected::Blocked
        } else {
            Injected::Nothing
        }
    }

    fn deliver(&mut self, event: Event) -> Result<(), Exit> {
        event::deliver(self.engine.cpu(), &mut self.env, event)
    }
}

/// What [`Vcpu::inject`] came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Injected {
    /// Nothing is pending any more.
    Nothing,
    /// An interrupt waits for the guest to allow interrupts.
    Blocked,
    /// An NMI waits for the end of an NMI handler or of an interrupt shadow.
    NmiBlocked,
}

/// RESET, or INIT, which keeps the FPU, the TSC and most MSRs.
fn reset_cpu(cpu: &mut CpuState, init: bool, signature: u32) {
    let old = cpu.clone();
    *cpu = CpuState::default();
    // Family, model and stepping.
    cpu.gpr[gpr::RDX] = u64::from(if signature != 0 { signature } else { 0x600 });
    if !init {
        return;
    }
    let cache = cr0::CD | cr0::NW;
    cpu.cr0 = cpu.cr0 & !cache | old.cr0 & cache;
    cpu.xsave = old.xsave;
    cpu.xcr0 = old.xcr0;
    cpu.tsc_offset = old.tsc_offset;
    cpu.tsc_aux = old.tsc_aux;
    cpu.star = old.star;
    cpu.lstar = old.lstar;
    cpu.cstar = old.cstar;
    cpu.fmask = old.fmask;
    cpu.kernel_gs_base = old.kernel_gs_base;
    cpu.sysenter_cs = old.sysenter_cs;
    cpu.sysenter_esp = old.sysenter_esp;
    cpu.sysenter_eip = old.sysenter_eip;
}
