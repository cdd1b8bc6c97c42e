//! The engines behind KVM's calls.
#![expect(unsafe_code, reason = "memslots make memory the guest's")]

use crate::memory::Memory;
use crate::watchdog::{Kick, this_thread};
use home_user::EngineKind;
use kvm_bindings::*;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// What executes guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// In process: the interpreter.
    Interp,
    /// In process: the translator.
    Jit,
    /// The host's `/dev/kvm`.
    Kvm,
}

impl Engine {
    /// A number of rounds that takes bearable time: all of them only in the translator.
    pub fn rounds(self, all: u32) -> u32 {
        match self {
            Engine::Jit => all,
            Engine::Interp => (all / 4).max(1),
            Engine::Kvm => (all / 50).max(1),
        }
    }
}

/// What the oracle may take of the whole suite's time: guest kernels are emulated slowly on some.
const KVM_BUDGET_MILLIS: u64 = 15_000;
static KVM_MILLIS: AtomicU64 = AtomicU64::new(0);

fn run(engine: Engine, test: &impl Fn(Engine)) {
    eprintln!("engine: {engine:?}");
    test(engine);
}

fn chosen() -> Option<Engine> {
    match std::env::var("ANYKVM_ENGINE").as_deref() {
        Ok("interp") => Some(Engine::Interp),
        Ok("jit") => Some(Engine::Jit),
        Ok("kvm") => Some(Engine::Kvm),
        _ => None,
    }
}

/// Runs `test` on every engine.
pub fn each(test: impl Fn(Engine)) {
    if let Some(engine) = chosen() {
        return run(engine, &test);
    }
    run(Engine::Interp, &test);
    run(Engine::Jit, &test);
    if kvm_ioctls::Kvm::new().is_err() {
        return eprintln!("kvm: not run, there is no usable /dev/kvm");
    }
    if KVM_MILLIS.load(Ordering::Relaxed) > KVM_BUDGET_MILLIS {
        return eprintln!("kvm: not run, its time is up; ANYKVM_ENGINE=kvm runs all of it");
    }
    let start = Instant::now();
    // An oracle that may be wrong: see the crate's documentation.
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| run(Engine::Kvm, &test))) {
        eprintln!("kvm: DEVIATES (see the message above); not counted");
        if std::env::var_os("ANYKVM_KVM_COUNTS").is_some() {
            resume_unwind(panic);
        }
    }
    KVM_MILLIS.fetch_add(start.elapsed().as_millis() as u64, Ordering::Relaxed);
}

/// Runs `test` on the engines in this process; `reason` says why not on a `/dev/kvm`.
pub fn each_but_kvm(reason: &str, test: impl Fn(Engine)) {
    match chosen() {
        Some(Engine::Kvm) => {}
        Some(engine) => return run(engine, &test),
        None => {
            run(Engine::Interp, &test);
            run(Engine::Jit, &test);
        }
    }
    eprintln!("kvm: not run: {reason}");
}

/// Why a run of a vCPU ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// OUT: port and value.
    Out(u16, u32),
    /// IN of a port; [`Vcpu::answer`] gives the value, all ones before it is set.
    In(u16),
    /// A read outside RAM; [`Vcpu::answer`] gives the value.
    MmioRead(u64, usize),
    /// A write outside RAM: address, length and value.
    MmioWrite(u64, usize, u64),
    /// KVM_EXIT_HLT
    Hlt,
    /// KVM_EXIT_SHUTDOWN
    Shutdown,
    /// KVM_EXIT_IRQ_WINDOW_OPEN
    IrqWindow,
    /// KVM_EXIT_DEBUG: vector, address, DR6.
    Debug(u32, u64, u64),
    /// EINTR or EAGAIN.
    Interrupted,
    /// Anything else.
    Other(String),
}

/// A virtual machine.
pub enum Vm {
    /// In process.
    User(home_user::Vm, home_user::System),
    /// The host's.
    Kvm(kvm_ioctls::VmFd, kvm_ioctls::Kvm),
}

/// A call that both have with the same name and equal arguments.
macro_rules! both {
    ($self:expr, $t:ident, $vm:ident => $call:expr, $what:literal) => {
        match $self {
            $t::User($vm, ..) => $call.map_err(|e| format!("{e:?}")),
            $t::Kvm($vm, ..) => $call.map_err(|e| format!("{e:?}")),
        }
        .unwrap_or_else(|e| panic!(concat!($what, ": {}"), e))
    };
}

impl Vm {
    /// A machine without memory.
    pub fn new(engine: Engine) -> Self {
        match engine {
            Engine::Kvm => {
                let kvm = kvm_ioctls::Kvm::new().expect("no usable /dev/kvm");
                Vm::Kvm(kvm.create_vm().expect("KVM_CREATE_VM"), kvm)
            }
            _ => {
                let kind = match engine {
                    Engine::Jit => EngineKind::Jit,
                    _ => EngineKind::Interp,
                };
                let system = home_user::System::new(kind).expect("no engine");
                Vm::User(system.create_vm().expect("create_vm"), system)
            }
        }
    }

    /// In-kernel interrupt controllers and PIT.
    pub fn create_irqchip(&self) {
        both!(self, Vm, vm => vm.create_irq_chip(), "KVM_CREATE_IRQCHIP");
        both!(self, Vm, vm => vm.create_pit2(kvm_pit_config::default()), "KVM_CREATE_PIT2");
    }

    /// KVM_SET_TSS_ADDR
    pub fn set_tss_address(&self, at: usize) {
        both!(self, Vm, vm => vm.set_tss_address(at), "KVM_SET_TSS_ADDR");
    }

    /// KVM_SET_USER_MEMORY_REGION with `size` bytes of `memory` from `offset`; 0 deletes.
    pub fn set_slot(
        &self,
        slot: u32,
        gpa: u64,
        memory: &Memory,
        offset: u64,
        size: u64,
        flags: u32,
    ) {
        assert!(offset + size <= memory.size());
        let region = kvm_userspace_memory_region {
            slot,
            flags,
            guest_phys_addr: gpa,
            memory_size: size,
            userspace_addr: memory.hva() + offset,
        };
        // SAFETY: the memory outlives the VM in every test (see `Machine`).
        both!(self, Vm, vm => unsafe { vm.set_user_memory_region(region) }, "KVM_SET_USER_MEMORY_REGION");
    }

    /// KVM_GET_DIRTY_LOG, as page numbers in the slot.
    pub fn dirty_pages(&self, slot: u32, size: u64) -> Vec<u64> {
        let log = both!(self, Vm, vm => vm.get_dirty_log(slot, size as usize), "KVM_GET_DIRTY_LOG");
        (0..size / 4096)
            .filter(|p| log[(p / 64) as usize] >> (p % 64) & 1 != 0)
            .collect()
    }

    /// KVM_IRQ_LINE
    pub fn set_irq_line(&self, gsi: u32, level: bool) {
        both!(self, Vm, vm => vm.set_irq_line(gsi, level), "KVM_IRQ_LINE");
    }

    /// KVM_SIGNAL_MSI
    pub fn signal_msi(&self, address: u32, data: u32) {
        let msi = kvm_msi {
            address_lo: address,
            data,
            ..Default::default()
        };
        both!(self, Vm, vm => vm.signal_msi(msi), "KVM_SIGNAL_MSI");
    }

    /// KVM_CREATE_VCPU with all the CPUID there is.
    pub fn create_vcpu(&self, id: u64) -> Vcpu {
        let (inner, mut cpuid) = match self {
            Vm::User(vm, system) => (
                Inner::User(Box::new(vm.create_vcpu(id).expect("KVM_CREATE_VCPU"))),
                system.get_supported_cpuid(256).expect("CPUID"),
            ),
            Vm::Kvm(vm, kvm) => (
                Inner::Kvm(vm.create_vcpu(id).expect("KVM_CREATE_VCPU")),
                kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
                    .expect("CPUID"),
            ),
        };
        for e in cpuid.as_mut_slice() {
            match e.function {
                1 => {
                    e.ebx = e.ebx & 0x00ff_ffff | (id as u32) << 24;
                    // KVM_CAP_TSC_DEADLINE_TIMER tells of it.
                    e.ecx |= 1 << 24;
                }
                0xb | 0x1f => e.edx = id as u32,
                _ => {}
            }
        }
        let vcpu = Vcpu {
            inner,
            id,
            answer: u64::MAX,
        };
        both!(&vcpu.inner, Inner, v => v.set_cpuid2(&cpuid), "KVM_SET_CPUID2");
        vcpu
    }
}

enum Inner {
    User(Box<home_user::Vcpu>),
    Kvm(kvm_ioctls::VcpuFd),
}

/// A vCPU.
pub struct Vcpu {
    inner: Inner,
    /// Its number.
    pub id: u64,
    /// What IN and reads outside RAM give from now on.
    pub answer: u64,
}

/// The arms of both exit enums, which have the same names.
macro_rules! decode {
    ($exit:expr, $e:ident, $answer:expr) => {
        match $exit {
            $e::IoOut(port, data) => {
                let mut b = [0; 4];
                for (to, from) in b.iter_mut().zip(data.iter()) {
                    *to = *from;
                }
                Exit::Out(port, u32::from_le_bytes(b))
            }
            $e::IoIn(port, data) => {
                let n = data.len().min(8);
                data[..n].copy_from_slice(&$answer.to_le_bytes()[..n]);
                Exit::In(port)
            }
            $e::MmioRead(at, data) => {
                let n = data.len().min(8);
                data[..n].copy_from_slice(&$answer.to_le_bytes()[..n]);
                Exit::MmioRead(at, n)
            }
            $e::MmioWrite(at, data) => {
                let mut b = [0; 8];
                b[..data.len()].copy_from_slice(data);
                Exit::MmioWrite(at, data.len(), u64::from_le_bytes(b))
            }
            $e::Hlt => Exit::Hlt,
            $e::Shutdown => Exit::Shutdown,
            $e::IrqWindowOpen => Exit::IrqWindow,
            $e::Debug(d) => Exit::Debug(d.exception, d.pc, d.dr6),
            $e::Intr => Exit::Interrupted,
            other => Exit::Other(format!("{other:?}")),
        }
    };
}

impl Vcpu {
    /// KVM_RUN
    pub fn run(&mut self) -> Exit {
        use home_user::{Errno, VcpuExit as U};
        use kvm_ioctls::VcpuExit as K;
        match &mut self.inner {
            Inner::User(v) => match v.run() {
                Ok(exit) => decode!(exit, U, self.answer),
                Err(e) if e == Errno::EINTR || e == Errno::EAGAIN => Exit::Interrupted,
                Err(e) => Exit::Other(format!("{e:?}")),
            },
            Inner::Kvm(v) => match v.run() {
                Ok(exit) => decode!(exit, K, self.answer),
                Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {
                    Exit::Interrupted
                }
                Err(e) => Exit::Other(format!("{e:?}")),
            },
        }
    }

    /// What ends a run of the present thread.
    pub fn kick(&self) -> Kick {
        match &self.inner {
            Inner::User(v) => Kick::User(v.kicker()),
            Inner::Kvm(_) => this_thread(),
        }
    }

    /// KVM_GET_REGS
    pub fn regs(&self) -> kvm_regs {
        both!(&self.inner, Inner, v => v.get_regs(), "KVM_GET_REGS")
    }

    /// KVM_SET_REGS
    pub fn set_regs(&self, regs: &kvm_regs) {
        both!(&self.inner, Inner, v => v.set_regs(regs), "KVM_SET_REGS");
    }

    /// KVM_GET_SREGS
    pub fn sregs(&self) -> kvm_sregs {
        both!(&self.inner, Inner, v => v.get_sregs(), "KVM_GET_SREGS")
    }

    /// KVM_SET_SREGS
    pub fn set_sregs(&self, sregs: &kvm_sregs) {
        both!(&self.inner, Inner, v => v.set_sregs(sregs), "KVM_SET_SREGS");
    }

    /// KVM_SET_MP_STATE: runnable.
    pub fn set_runnable(&self) {
        let state = kvm_mp_state::default();
        both!(&self.inner, Inner, v => v.set_mp_state(state), "KVM_SET_MP_STATE");
    }

    /// KVM_GET_MSRS of one MSR.
    pub fn msr(&self, index: u32) -> u64 {
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut msrs = Msrs::from_entries(&[entry]).expect("one entry");
        let n = both!(&self.inner, Inner, v => v.get_msrs(&mut msrs), "KVM_GET_MSRS");
        assert_eq!(n, 1, "MSR {index:#x}");
        msrs.as_slice()[0].data
    }

    /// KVM_GET_VCPU_EVENTS
    pub fn events(&self) -> kvm_vcpu_events {
        both!(&self.inner, Inner, v => v.get_vcpu_events(), "KVM_GET_VCPU_EVENTS")
    }

    /// KVM_NMI
    pub fn nmi(&self) {
        both!(&self.inner, Inner, v => v.nmi(), "KVM_NMI");
    }

    /// KVM_INTERRUPT
    pub fn interrupt(&self, vector: u8) {
        match &self.inner {
            Inner::User(v) => v.interrupt(u32::from(vector)).expect("KVM_INTERRUPT"),
            Inner::Kvm(v) => {
                use std::os::fd::AsRawFd;
                let irq = kvm_interrupt {
                    irq: u32::from(vector),
                };
                const KVM_INTERRUPT: libc::c_ulong = 0x4004_ae86;
                // SAFETY: the structure that the call takes.
                let r = unsafe { libc::ioctl(v.as_raw_fd(), KVM_INTERRUPT, &irq) };
                assert_eq!(r, 0, "KVM_INTERRUPT");
            }
        }
    }

    /// The kvm_run structure.
    pub fn kvm_run(&mut self) -> &mut kvm_run {
        match &mut self.inner {
            Inner::User(v) => v.get_kvm_run(),
            Inner::Kvm(v) => v.get_kvm_run(),
        }
    }

    /// KVM_SET_GUEST_DEBUG
    pub fn set_guest_debug(&self, debug: &kvm_guest_debug) {
        both!(&self.inner, Inner, v => v.set_guest_debug(debug), "KVM_SET_GUEST_DEBUG");
    }
}

impl Vcpu {
    /// A bit of the CPUID that the vCPU shows; `register` counts from EAX.
    pub fn has(&self, leaf: u32, subleaf: u32, register: usize, bit: u32) -> bool {
        let cpuid =
            both!(&self.inner, Inner, v => v.get_cpuid2(KVM_MAX_CPUID_ENTRIES), "KVM_GET_CPUID2");
        cpuid
            .as_slice()
            .iter()
            .find(|e| e.function == leaf && (e.index == subleaf || e.flags & 1 == 0))
            .is_some_and(|e| [e.eax, e.ebx, e.ecx, e.edx][register] >> bit & 1 != 0)
    }
}

impl Vcpu {
    /// KVM_SET_MSRS
    pub fn set_msrs(&self, list: &[(u32, u64)]) {
        let entries: Vec<_> = list
            .iter()
            .map(|&(index, data)| kvm_msr_entry {
                index,
                data,
                ..Default::default()
            })
            .collect();
        let msrs = Msrs::from_entries(&entries).expect("few entries");
        let n = both!(&self.inner, Inner, v => v.set_msrs(&msrs), "KVM_SET_MSRS");
        assert_eq!(n, list.len(), "an MSR was refused");
    }
}
