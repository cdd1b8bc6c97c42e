//! The home, and a machine in it.
#![expect(unsafe_code, reason = "lends memory to the VM and to vCPUs")]

use crate::host::{Event, Host, Timer, Waiter, Wake};
use crate::interp_engine::InterpEngine;
use crate::run_page::RunPage;
use crate::shared_memory::tests::Pages;
use crate::shared_memory::{SharedMemory, Window};
use crate::{Vcpu, Vm};
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use guestmem::Region;
use kvm_abi::run;
use std::boxed::Box;
use std::sync::Arc;
use std::vec::Vec;
use x86emu::env::{HostCpu, NativeRegs};
use x86emu::state::XsaveArea;

/// Time stands still, timers never fire, and a sleep that nobody has ended before is ended by a signal.
pub struct FakeHost;

struct Alarm(AtomicBool);

impl Waiter for Alarm {
    fn wait(&self, _deadline_ns: Option<u64>) -> Wake {
        if self.0.swap(false, Ordering::AcqRel) {
            Wake::Woken
        } else {
            Wake::Signal
        }
    }
    fn wake(&self) {
        self.0.store(true, Ordering::Release);
    }
}

struct Never;

impl Timer for Never {
    fn set(&self, _deadline_ns: Option<u64>) {}
}

struct NoNative;

impl HostCpu for NoNative {
    fn native(
        &mut self,
        insn: &[u8],
        _regs: &mut NativeRegs,
        _fpu: Option<&mut XsaveArea>,
    ) -> Result<(), u8> {
        panic!("these tests' guests do without {insn:x?}");
    }
}

impl Host for FakeHost {
    fn now_ns(&self) -> u64 {
        1_000_000
    }
    fn realtime_ns(&self) -> u64 {
        1_000_000_000
    }
    fn tsc(&self) -> u64 {
        3_000_000
    }
    fn tsc_khz(&self) -> u32 {
        3_000_000
    }
    fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
        [r.eax, r.ebx, r.ecx, r.edx]
    }
    fn xcr0(&self) -> u64 {
        0
    }
    fn waiter(&self) -> Option<Arc<dyn Waiter>> {
        Some(Arc::new(Alarm(AtomicBool::new(false))))
    }
    fn timer(&self, _expired: Box<dyn Fn() + Send + Sync>) -> Option<Box<dyn Timer>> {
        Some(Box::new(Never))
    }
    fn native_cpu(&self) -> Option<Box<dyn HostCpu + Send>> {
        Some(Box::new(NoNative))
    }
}

/// Counts signals.
pub struct Count(pub u64, pub AtomicU32);

impl Count {
    pub fn new(id: u64) -> Arc<Self> {
        Arc::new(Count(id, AtomicU32::new(0)))
    }
    pub fn get(&self) -> u32 {
        self.1.load(Ordering::Relaxed)
    }
}

impl Event for Count {
    fn signal(&self) {
        self.1.fetch_add(1, Ordering::Relaxed);
    }
    fn id(&self) -> u64 {
        self.0
    }
}

pub fn vm() -> Arc<Vm> {
    Vm::new(Arc::new(FakeHost), Box::new(InterpEngine::default()))
}

/// A vCPU with its mapping.
pub struct Cpu {
    pub vcpu: Vcpu,
    pub page: Window,
    pub ring: Option<Window>,
}

impl Cpu {
    pub fn new(vm: &Arc<Vm>, id: u32) -> Self {
        Self::try_new(vm, id).unwrap()
    }

    pub fn try_new(vm: &Arc<Vm>, id: u32) -> Result<Self, kvm_abi::Errno> {
        let page = Pages::new(run::MMAP_SIZE / 4096);
        let bytes = vm.dirty_ring_bytes() as usize;
        let ring = (bytes != 0).then(|| Pages::new(bytes / 4096));
        // SAFETY: the mapping is leaked with one reference to it.
        let run = unsafe { RunPage::new(page.base()) };
        core::mem::forget(page.clone());
        let memory = ring.clone().map(|r| r as Arc<dyn SharedMemory>);
        Ok(Cpu {
            vcpu: vm.create_vcpu_with_ring(id, run, memory)?,
            page: page.window(),
            ring: ring.map(|r| r.window()),
        })
    }

    /// Real mode at `ip` in the first 64 KiB.
    pub fn start(&mut self, ip: u64) {
        let mut s = self.vcpu.sregs();
        s.cs.base = 0;
        s.cs.selector = 0;
        self.vcpu.set_sregs(&s).unwrap();
        let mut r = self.vcpu.regs();
        r.rip = ip;
        r.rflags = 2;
        self.vcpu.set_regs(&r);
    }

    /// Runs; the exit reason.
    pub fn run(&mut self) -> u32 {
        self.vcpu.run().unwrap();
        self.page.load(run::EXIT_REASON)
    }

    /// The port of a KVM_EXIT_IO.
    pub fn port(&self) -> u16 {
        (self.page.load(run::EXIT) >> 16) as u16
    }
}

/// A memslot's memory, leaked.
pub fn slot_memory(pages: usize) -> (Region, Window) {
    let memory = Pages::new(pages);
    core::mem::forget(memory.clone());
    let region = Region {
        slot: 0,
        flags: 0,
        gpa: 0,
        size: (pages * 4096) as u64,
        hva: memory.base().as_ptr().expose_provenance() as u64,
    };
    (region, memory.window())
}

/// A VM with `pages` pages of memory at 0 and `code` at 0x1000.
pub fn with_code(vm: &Arc<Vm>, pages: usize, code: &[u8]) -> (Region, Window) {
    let (region, memory) = slot_memory(pages);
    memory.write(0x1000, code);
    vm.set_memory_region(&region).unwrap();
    (region, memory)
}

/// `mov byte [address], 1`, for addresses below 64 KiB.
pub fn touch(address: u16) -> Vec<u8> {
    let [low, high] = address.to_le_bytes();
    Vec::from([0xc6, 0x06, low, high, 1])
}

/// `out port, al`
pub fn out(port: u8) -> Vec<u8> {
    Vec::from([0xe6, port])
}
