//! What a running vCPU's instructions find around the CPU core: devices, MSRs, CPUID, time.

use crate::cpuid::{self, Cpuid};
use crate::debug::Breakpoints;
use crate::host::Timer;
use crate::hypercall;
use crate::inflight::{InFlight, Op, Pending};
use crate::memory::Reader;
use crate::msr::Msrs;
use crate::paravirt::Paravirt;
use crate::run_page::RunPage;
use crate::stats::Counter;
use crate::vcpu::VcpuShared;
use crate::vm::Vm;
use alloc::boxed::Box;
use alloc::sync::Arc;
use irqchip::{Effect, Lapic, Now};
use kvm_abi::run::{self, reason};
use kvm_abi::{guestdbg, mp_state, quirk};
use x86defs::{apic, vector};
use x86emu::env::{
    Env, Exception, Exit, Features, Flush, ForeignHypercall, HostCpu, NativeRegs, PhysMem,
    RamRange, Stop,
};
use x86emu::state::{CpuState, XsaveArea, sreg};

/// Events on their way to the guest that the interrupt controllers do not hold.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Events {
    /// An exception that user space injects.
    pub exception: Option<Exception>,
    /// `exception` has not changed any register yet, not even CR2 or DR6.
    pub exception_pending: bool,
    /// The processor is about to shut down.
    pub triple_fault: bool,
    /// An SMI waits.
    pub smi: bool,
    /// An INIT waits for the end of SMM.
    pub latched_init: bool,
    /// An interrupt that user space injects, or that was acknowledged and not yet delivered.
    pub interrupt: Option<u8>,
    /// The 8259's interrupt, when that is user space's and the local APIC is not (KVM_INTERRUPT).
    pub extint: Option<u8>,
    /// `interrupt` was taken from its source already: it does not wait for RFLAGS.IF.
    pub interrupt_acked: bool,
    /// NMIs waiting, at most 2.
    pub nmis: u8,
}

/// Everything of a vCPU but its CPU core.
pub(crate) struct VcpuEnv {
    pub vm: Arc<Vm>,
    pub shared: Arc<VcpuShared>,
    /// Position in the VM's list of vCPUs.
    pub index: usize,
    pub memory: Reader,
    /// What the vCPU sees in SMM instead.
    pub smram: Reader,
    /// [`CpuState::smm`] again.
    pub smm: bool,
    /// NMIs were blocked when the vCPU entered SMM.
    pub smm_inside_nmi: bool,
    pub cpuid: Cpuid,
    pub features: Features,
    pub msrs: Msrs,
    pub paravirt: Paravirt,
    /// IA32_APIC_BASE and CR8 when the local APIC is user space's.
    pub user_apic_base: u64,
    pub user_cr8: u64,
    pub run: RunPage,
    pub inflight: InFlight,
    /// The generation of the memslots when the last turn began.
    pub slots_seen: u64,
    pub events: Events,
    /// Guest memory that the host does not have: KVM_RUN ends with EFAULT.
    pub host_fault: bool,
    pub mp_state: u32,
    /// Vectors whose end the I/O APIC in user space is to hear of.
    pub eoi_exits: [u64; 4],
    /// Guest code has run: CPUID is settled.
    pub has_run: bool,
    /// KVM_CAP_ENFORCE_PV_FEATURE_CPUID: what the guest's CPUID does not show of KVM's own features is not there.
    pub enforce_pv_cpuid: bool,
    /// What KVM_GET_TSC_KHZ answers.
    pub tsc_khz: u32,
    /// KVM_SET_GUEST_DEBUG's control.
    pub guest_debug: u32,
    /// The debugger's hardware breakpoints; the guest's while the debugger's are in place.
    pub breakpoints: Breakpoints,
    native: Box<dyn HostCpu + Send>,
    timer: Box<dyn Timer>,
    armed_ns: Option<u64>,
    /// [`CpuState::tsc_offset`] again, for when the CPU state is not at hand.
    pub tsc_offset: u64,
}

impl VcpuEnv {
    pub fn new(
        vm: Arc<Vm>,
        shared: Arc<VcpuShared>,
        index: usize,
        timer: Box<dyn Timer>,
        native: Box<dyn HostCpu + Send>,
        run: RunPage,
    ) -> Self {
        let cpuid = Cpuid::default();
        let host_xcr0 = cpuid::supported_xcr0(&*vm.host);
        let mut features = cpuid.features(host_xcr0);
        features.phys_bits = 36;
        let in_kernel = vm.irqchip_in_kernel();
        let bsp = shared.is_bsp();
        VcpuEnv {
            memory: Reader::for_vcpu(&vm.memory, &shared),
            smram: Reader::for_vcpu(&vm.smram, &shared),
            smm: false,
            smm_inside_nmi: false,
            has_run: false,
            enforce_pv_cpuid: false,
            tsc_khz: vm.default_tsc_khz(),
            cpuid,
            features,
            msrs: Msrs::new(cpuid::vendor(vm.host.cpuid(0, 0))),
            paravirt: Paravirt::default(),
            user_apic_base: apic::DEFAULT_BASE
                | apic::BASE_ENABLE
                | if bsp { apic::BASE_BSP } else { 0 },
            user_cr8: 0,
            run,
            inflight: InFlight::default(),
            slots_seen: 0,
            events: Events::default(),
            host_fault: false,
            // Without an in-kernel local APIC nobody could start the others.
            mp_state: if bsp || !in_kernel {
                mp_state::RUNNABLE
            } else {
                mp_state::UNINITIALIZED
            },
            eoi_exits: [0; 4],
            guest_debug: 0,
            breakpoints: Breakpoints::default(),
            native,
            timer,
            armed_ns: None,
            tsc_offset: 0,
            vm,
            shared,
            index,
        }
    }

    /// Replaces CPUID.
    pub fn set_cpuid(&mut self, cpuid: Cpuid) {
        self.cpuid = cpuid;
        self.refresh_settings();
        self.configure_lapic();
    }

    /// Tells the local APIC what it depends on.
    pub fn configure_lapic(&mut self) {
        use x86defs::cpuid::leaf1_ecx;
        let Some(lapic) = self.shared.lapic() else {
            return;
        };
        let mut lapic = lapic.lock();
        let mut config = *lapic.config();
        if !self.cpuid.entries().is_empty() {
            config.x2apic = self.features.leaf1_ecx & leaf1_ecx::X2APIC != 0;
            config.tsc_deadline = self.features.leaf1_ecx & leaf1_ecx::TSC_DEADLINE != 0;
            config.max_phys_addr = self.cpuid.phys_bits();
            config.directed_eoi = config.x2apic && !self.vm.pic_in_kernel();
        }
        config.cmci = self.msrs.mce.cmci();
        config.lint0_reenabled = self.vm.settings.quirk(quirk::LINT0_REENABLED);
        lapic.set_config(config);
    }

    /// CPUID.01H:ECX as MISC_ENABLE has it: it can hide MONITOR and MWAIT.
    fn monitor_feature(&self, ecx: u32) -> u32 {
        const MONITOR: u32 = x86defs::cpuid::leaf1_ecx::MONITOR;
        if self.vm.settings.quirk(quirk::MISC_ENABLE_NO_MWAIT) {
            ecx
        } else if self.msrs.monitor_enabled() {
            ecx | MONITOR
        } else {
            ecx & !MONITOR
        }
    }

    /// Looks again at what CPUID, MSRs and the VM's settings say about the processor.
    pub fn refresh_settings(&mut self) {
        let settings = &self.vm.settings;
        let mut features = self.cpuid.features(cpuid::supported_xcr0(&*self.vm.host));
        features.leaf1_ecx = self.monitor_feature(features.leaf1_ecx);
        features.cpuid_faulting = self.msrs.cpuid_faulting();
        features.strict_monitor = !settings.quirk(quirk::MWAIT_NEVER_UD_FAULTS);
        features.foreign_hypercall = if settings.quirk(quirk::FIX_HYPERCALL_INSN) {
            ForeignHypercall::Patch
        } else {
            ForeignHypercall::Undefined
        };
        self.features = features;
    }

    /// Both clocks.
    pub fn now(&self) -> Now {
        Now {
            ns: self.vm.host.now_ns(),
            tsc: self.vm.host.tsc().wrapping_add(self.tsc_offset),
        }
    }

    pub fn apic_base(&self) -> u64 {
        self.shared
            .lapic()
            .map_or(self.user_apic_base, |l| l.lock().base())
    }

    /// The gpa's offset in the local APIC's page, if that is where it is.
    fn lapic_offset(&self, gpa: u64) -> Option<u64> {
        let lapic = self.shared.lapic()?.lock();
        let offset = gpa.wrapping_sub(lapic.base_address());
        // Outside xAPIC mode reads give ones and writes are dropped, as long as nobody minds.
        let hole = self.vm.settings.quirk(quirk::LAPIC_MMIO_HOLE);
        (offset < irqchip::lapic::MMIO_SIZE && (lapic.is_xapic() || hole)).then_some(offset)
    }

    /// Acts on what a write to the local APIC asks for.
    pub fn lapic_effect(&mut self, effect: Effect) {
        match effect {
            Effect::None | Effect::DestinationChanged => {}
            // Whether user space's 8259 is listened to is looked at between two turns.
            Effect::LvtChanged if self.vm.pic_in_kernel() => {}
            Effect::LvtChanged => self.shared.kick(),
            Effect::SendIpi(message) => {
                let policy = Default::default();
                crate::chipset::deliver(&self.vm.vcpus(), &message, Some(self.index), policy);
            }
            Effect::Eoi(eoi) => {
                if self.vm.eoi(eoi, self.index) {
                    let (word, bit) = (usize::from(eoi.vector / 64), eoi.vector % 64);
                    self.eoi_exits[word] |= 1 << bit;
                    self.shared.kick();
                }
                self.recheck_interrupts();
            }
            Effect::PriorityChanged => self.recheck_interrupts(),
            Effect::TimerChanged => self.arm_timer(),
        }
    }

    /// Leaves guest mode when an interrupt has become deliverable.
    fn recheck_interrupts(&mut self) {
        if let Some(lapic) = self.shared.lapic()
            && lapic.lock().highest_pending().is_some()
        {
            self.shared.kick();
        }
    }

    /// The local APIC timer's deadline in host time.
    pub fn timer_deadline(&self) -> Option<u64> {
        let deadline = self.shared.lapic()?.lock().next_deadline()?;
        Some(deadline.to_ns(self.now(), self.vm.host.tsc_khz()))
    }

    /// Makes sure that the vCPU leaves guest mode when its APIC timer expires. A timer that fires too
    /// early finds nothing to do and is armed again; so moving a deadline back costs nothing.
    pub fn arm_timer(&mut self) {
        let Some(deadline) = self.timer_deadline() else {
            return;
        };
        let now = self.vm.host.now_ns();
        if deadline <= now {
            self.shared.kick();
        } else if self.armed_ns.is_none_or(|at| at > deadline || at <= now) {
            self.armed_ns = Some(deadline);
            self.timer.set(Some(deadline));
        }
    }

    fn with_lapic<R>(&mut self, f: impl FnOnce(&mut Lapic, Now) -> R) -> Option<R> {
        self.sync_pv_eoi();
        let now = self.now();
        Some(f(&mut self.shared.lapic()?.lock(), now))
    }

    /// Reads an x2APIC MSR.
    pub fn x2apic_read(&mut self, index: u32) -> Option<u64> {
        self.with_lapic(|l, now| l.msr_read(index, now))?.ok()
    }

    /// Writes an x2APIC MSR.
    pub fn x2apic_write(&mut self, index: u32, value: u64) -> Option<()> {
        let effect = self
            .with_lapic(|l, now| l.msr_write(index, value, now))?
            .ok()?;
        self.lapic_effect(effect);
        Some(())
    }

    /// A read that some in-kernel device answers.
    fn kernel_read(&mut self, op: Op, data: &mut [u8]) -> bool {
        match op {
            Op::In(port) => self.vm.port_read(port, data),
            Op::Read(gpa) => match self.lapic_offset(gpa) {
                Some(offset) => {
                    self.with_lapic(|l, now| l.mmio_read(offset, data, now));
                    true
                }
                None => self.vm.mmio_read(gpa, data),
            },
            _ => false,
        }
    }

    /// A write that some in-kernel device or ioeventfd takes.
    fn kernel_write(&mut self, op: Op, data: &[u8]) -> bool {
        match op {
            Op::Out(port) => self.vm.port_write(port, data),
            Op::Write(gpa) => match self.lapic_offset(gpa) {
                Some(offset) => {
                    let value = match *data {
                        [a, b, c, d] => u32::from_le_bytes([a, b, c, d]),
                        _ => 0,
                    };
                    let effect =
                        self.with_lapic(|l, now| l.mmio_write(offset, data.len(), value, now));
                    if let Some(effect) = effect {
                        self.lapic_effect(effect);
                    }
                    true
                }
                None => self.vm.mmio_write(gpa, data),
            },
            _ => false,
        }
    }

    /// One access of at most 8 bytes, answered from the past, by an in-kernel device, or by user
    /// space later.
    fn read(&mut self, op: Op, data: &mut [u8]) -> Result<(), Stop> {
        if let Some(bytes) = self.inflight.recall(op, data.len()) {
            data.copy_from_slice(&bytes[..data.len()]);
            return Ok(());
        }
        if self.kernel_read(op, data) {
            return self.record(op, data);
        }
        self.ask_user(op, data, 1)
    }

    fn write(&mut self, op: Op, data: &[u8]) -> Result<(), Stop> {
        if self.inflight.recall(op, data.len()).is_some() {
            return Ok(());
        }
        if self.kernel_write(op, data) {
            return self.record(op, data);
        }
        self.ask_user(op, data, 1)
    }

    fn record(&mut self, op: Op, data: &[u8]) -> Result<(), Stop> {
        if self.inflight.record(op, data) {
            Ok(())
        } else {
            Err(Stop::Exit(Exit::InternalError))
        }
    }

    /// Nothing is MMIO only because the host's memory is gone: the instruction waits until user space
    /// has put that right.
    fn check_host_memory(&mut self, gpa: u64) -> Result<(), Stop> {
        if self.host_fault {
            log::debug!(
                "vcpu {}: the host memory behind guest address {gpa:#x} is not accessible",
                self.shared.id()
            );
            return Err(Stop::Exit(Exit::UserSpace));
        }
        Ok(())
    }

    /// Counts the changes of the memslots that the vCPU sees now.
    pub fn slots_generation(&self) -> u64 {
        if self.smm {
            self.vm.smram.generation()
        } else {
            self.vm.memory.generation()
        }
    }

    /// Fills `kvm_run` for an access; the run loop returns to user space with it.
    fn ask_user(&mut self, op: Op, data: &[u8], count: u16) -> Result<(), Stop> {
        if matches!(op, Op::Read(_) | Op::Write(_))
            && self.inflight.is_empty()
            && self.slots_seen != self.slots_generation()
        {
            // The page walk may have found other slots than the access: both once more, in another turn.
            return Err(Stop::Exit(Exit::Interrupted));
        }
        let len = data.len().min(8);
        self.inflight.pending = Some(Pending {
            op,
            len: len as u8,
            count,
            linear_rip: 0,
        });
        let page = &self.run;
        match op {
            Op::In(port) | Op::Out(port) => {
                self.shared.stats.count(Counter::IoExits);
                page.set_reason(reason::IO);
                let out = !op.reads();
                let mut head = [0; 8];
                head[0] = if out { run::IO_OUT } else { run::IO_IN };
                head[1] = len as u8;
                head[2..4].copy_from_slice(&port.to_ne_bytes());
                head[4..6].copy_from_slice(&count.to_ne_bytes());
                page.write(run::EXIT, &head);
                page.set_u64(run::EXIT + 8, run::PIO_OFFSET as u64);
                if out {
                    page.write(run::PIO_OFFSET, &data[..len]);
                }
            }
            Op::Read(gpa) | Op::Write(gpa) => {
                self.shared.stats.count(Counter::MmioExits);
                page.set_reason(reason::MMIO);
                page.set_u64(run::EXIT, gpa);
                let mut bytes = [0; 8];
                if !op.reads() {
                    bytes[..len].copy_from_slice(&data[..len]);
                }
                page.write(run::EXIT + 8, &bytes);
                page.set_u32(run::EXIT + 16, len as u32);
                page.write(run::EXIT + 20, &[u8::from(!op.reads())]);
            }
            // These have a way of their own.
            Op::Rdmsr(_) | Op::Wrmsr(_) | Op::MsrFault => {}
        }
        Err(Stop::Exit(Exit::UserSpace))
    }

    /// Takes user space's answer to the pending access.
    pub fn take_answer(&mut self, pending: Pending) -> bool {
        let mut data = [0; 8];
        let len = usize::from(pending.len);
        match pending.op {
            Op::In(port) if pending.count > 1 => {
                let page = &self.run;
                let count = usize::from(pending.count);
                let recorded = self
                    .inflight
                    .record_input(port, len, count, |data| page.read(run::PIO_OFFSET, data));
                self.inflight.rewind();
                return recorded;
            }
            Op::In(_) => self.run.read(run::PIO_OFFSET, &mut data[..len]),
            Op::Read(_) => self.run.read(run::EXIT + 8, &mut data[..len]),
            Op::Out(_) | Op::Write(_) => {}
            Op::Rdmsr(_) | Op::Wrmsr(_) | Op::MsrFault => {
                let recorded = self.take_msr_answer(pending.op);
                self.inflight.rewind();
                return recorded;
            }
        }
        let recorded = self.inflight.record(pending.op, &data[..len]);
        self.inflight.rewind();
        recorded
    }
}

/// CS base + RIP.
pub(crate) fn linear_rip(cpu: &CpuState) -> u64 {
    if cpu.long_mode() && cpu.seg[sreg::CS].long() {
        cpu.rip
    } else {
        cpu.seg[sreg::CS].base.wrapping_add(cpu.rip) & 0xffff_ffff
    }
}

impl PhysMem for VcpuEnv {
    fn host_ptr(&mut self, gpa: u64, len: usize, write: bool) -> Option<*mut u8> {
        let (reader, memory) = if self.smm {
            (&mut self.smram, &self.vm.smram)
        } else {
            (&mut self.memory, &self.vm.memory)
        };
        let p = reader.host_ptr(memory, gpa, len, write);
        if p.is_none() && reader.faults(gpa, write) {
            // An access stops at `check_host_memory`. A page walk cannot say so; it goes on without
            // the page, and the run loop ends it.
            self.host_fault = true;
            self.shared.kick();
        }
        p
    }

    fn ram_around(&mut self, gpa: u64) -> Option<RamRange> {
        if self.smm {
            self.smram.ram_around(&self.vm.smram, gpa)
        } else {
            self.memory.ram_around(&self.vm.memory, gpa)
        }
    }
}

impl HostCpu for VcpuEnv {
    fn native(
        &mut self,
        insn: &[u8],
        regs: &mut NativeRegs,
        fpu: Option<&mut XsaveArea>,
    ) -> Result<(), u8> {
        self.native.native(insn, regs, fpu)
    }
}

impl Env for VcpuEnv {
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) -> Result<(), Stop> {
        self.check_host_memory(gpa)?;
        for (i, chunk) in data.chunks_mut(8).enumerate() {
            self.read(Op::Read(gpa.wrapping_add(i as u64 * 8)), chunk)?;
        }
        Ok(())
    }

    fn mmio_write(&mut self, gpa: u64, data: &[u8]) -> Result<(), Stop> {
        self.check_host_memory(gpa)?;
        for (i, chunk) in data.chunks(8).enumerate() {
            self.write(Op::Write(gpa.wrapping_add(i as u64 * 8)), chunk)?;
        }
        Ok(())
    }

    fn io_in(&mut self, port: u16, data: &mut [u8]) -> Result<(), Stop> {
        self.read(Op::In(port), data)
    }

    fn io_in_string(&mut self, port: u16, size: usize, data: &mut [u8]) -> Result<usize, Stop> {
        let op = Op::In(port);
        let count = data.len() / size;
        if let Some(n) = self.inflight.recall_input(port, size, data) {
            return Ok(n);
        }
        if count == 1 || self.inflight.next().is_some() {
            self.read(op, &mut data[..size])?;
            return Ok(1);
        }
        if self.kernel_read(op, &mut data[..size]) {
            self.record(op, &data[..size])?;
            return Ok(1);
        }
        // The mapping has a page for it.
        let count = count.min(guestmem::PAGE_SIZE as usize / size) as u16;
        self.ask_user(op, &data[..size], count)?;
        Ok(0)
    }
    fn io_out(&mut self, port: u16, data: &[u8]) -> Result<(), Stop> {
        self.write(Op::Out(port), data)
    }

    fn rdmsr(&mut self, cpu: &mut CpuState, index: u32) -> Result<u64, Stop> {
        self.guest_rdmsr(cpu, index)
    }

    fn wrmsr(&mut self, cpu: &mut CpuState, index: u32, value: u64) -> Result<(), Stop> {
        self.guest_wrmsr(cpu, index, value)
    }

    fn cpuid(&mut self, cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        let mut regs = self.cpuid.query(cpu, self.apic_base(), leaf, subleaf);
        if leaf == 1 {
            regs[2] = self.monitor_feature(regs[2]);
        }
        regs
    }

    fn features(&self) -> &Features {
        &self.features
    }

    fn tsc(&mut self, cpu: &CpuState) -> u64 {
        self.vm.host.tsc().wrapping_add(cpu.tsc_offset)
    }

    fn cr8(&mut self) -> u64 {
        self.shared
            .lapic()
            .map_or(self.user_cr8, |l| l.lock().cr8())
    }

    fn set_cr8(&mut self, value: u64) {
        match self.shared.lapic() {
            Some(lapic) => {
                lapic.lock().set_cr8(value);
                self.recheck_interrupts();
            }
            None => self.user_cr8 = value & 0xf,
        }
    }

    fn intercepts(&mut self, _cpu: &CpuState, exception: &Exception) -> bool {
        if self.guest_debug & guestdbg::ENABLE == 0 {
            return false;
        }
        match exception.vector {
            vector::BP => self.guest_debug & guestdbg::USE_SW_BP != 0,
            vector::DB => self.guest_debug & (guestdbg::SINGLESTEP | guestdbg::USE_HW_BP) != 0,
            _ => false,
        }
    }

    /// Engines that cache translations wrap this environment and act on it there; the core caches
    /// none.
    fn flush(&mut self, _what: Flush) {}

    fn hypercall(&mut self, cpu: &mut CpuState) -> Result<(), Stop> {
        self.shared.stats.count(Counter::Hypercalls);
        hypercall::call(self, cpu)
    }

    fn rsm(&mut self, cpu: &mut CpuState) -> Result<(), Stop> {
        self.leave_smm(cpu)
    }

    fn retired(&mut self) {
        self.inflight.clear();
    }
}
