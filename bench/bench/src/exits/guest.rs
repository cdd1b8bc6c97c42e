//! The small VMM: a guest of a few instructions for each case.
#![expect(unsafe_code, reason = "gives a VM its memory")]

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kvm_bindings::{kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, Kvm, NoDatamatch, VcpuExit, VcpuFd, VmFd};
use serde_json::json;

use vmm_sys_util::eventfd::EventFd;

use crate::Result;
use crate::statistics::median;

/// Exits per sample, and samples.
const CHUNK: u32 = 1000;
const CHUNKS: usize = 40;
/// Interrupts per case.
const INTERRUPTS: usize = 400;
const RAM: usize = 64 << 10;
/// Where code begins.
const ENTRY: u64 = 0x1000;
/// The interrupt's handler.
const HANDLER: u16 = 0x2000;
/// IRQ 4, as the guest programs the 8259.
const VECTOR: usize = 0x24;
const GSI: u32 = 4;

#[repr(C, align(4096))]
struct Ram([u8; RAM]);

struct Machine {
    vm: VmFd,
    vcpu: VcpuFd,
}

fn fail(what: &str) -> impl Fn(kvm_ioctls::Error) -> String + '_ {
    move |e| format!("{what}: {e}")
}

impl Machine {
    /// A machine that is about to execute `code`: 32-bit flat with `protected`, else real mode.
    fn new(code: &[u8], protected: bool) -> Result<Self> {
        let kvm = Kvm::new().map_err(fail("/dev/kvm"))?;
        let vm = kvm.create_vm().map_err(fail("KVM_CREATE_VM"))?;
        vm.set_tss_address(0xfffb_d000)
            .map_err(fail("KVM_SET_TSS_ADDR"))?;
        vm.create_irq_chip().map_err(fail("KVM_CREATE_IRQCHIP"))?;
        vm.create_pit2(kvm_pit_config::default())
            .map_err(fail("KVM_CREATE_PIT2"))?;
        let ram = Box::leak(Box::new(Ram([0; RAM])));
        ram.0[ENTRY as usize..][..code.len()].copy_from_slice(code);
        // The real-mode vector: offset, segment 0. mov al,0x20; out 0x20,al (EOI); out 0x31,al; iret.
        ram.0[VECTOR * 4..][..2].copy_from_slice(&HANDLER.to_le_bytes());
        let handler = [0xb0, 0x20, 0xe6, 0x20, 0xe6, 0x31, 0xcf];
        ram.0[usize::from(HANDLER)..][..handler.len()].copy_from_slice(&handler);
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: RAM as u64,
            userspace_addr: ram.0.as_ptr() as u64,
        };
        // SAFETY: the memory is leaked, so it outlives the VM, and nothing here looks at it again.
        unsafe { vm.set_user_memory_region(region) }.map_err(fail("memory"))?;
        let vcpu = vm.create_vcpu(0).map_err(fail("KVM_CREATE_VCPU"))?;
        let cpuid = kvm
            .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
            .map_err(fail("CPUID"))?;
        vcpu.set_cpuid2(&cpuid).map_err(fail("KVM_SET_CPUID2"))?;
        let mut sregs = vcpu.get_sregs().map_err(fail("KVM_GET_SREGS"))?;
        sregs.cs.base = 0;
        sregs.cs.selector = 0;
        if protected {
            sregs.cr0 |= 1;
            let all = [
                &mut sregs.cs,
                &mut sregs.ds,
                &mut sregs.es,
                &mut sregs.fs,
                &mut sregs.gs,
                &mut sregs.ss,
            ];
            for segment in all {
                segment.base = 0;
                segment.limit = u32::MAX;
                segment.g = 1;
                segment.db = 1;
                segment.selector = 16;
            }
            sregs.cs.selector = 8;
        }
        vcpu.set_sregs(&sregs).map_err(fail("KVM_SET_SREGS"))?;
        let mut regs = vcpu.get_regs().map_err(fail("KVM_GET_REGS"))?;
        regs.rip = ENTRY;
        regs.rsp = 0x8000;
        regs.rflags = 2;
        vcpu.set_regs(&regs).map_err(fail("KVM_SET_REGS"))?;
        Ok(Machine { vm, vcpu })
    }

    /// Runs until the guest writes to `port`.
    fn until(&mut self, port: u16) -> Result<()> {
        loop {
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(p, _)) if p == port => return Ok(()),
                Ok(VcpuExit::IoIn(_, data) | VcpuExit::MmioRead(_, data)) => data.fill(1),
                Ok(VcpuExit::IoOut(..) | VcpuExit::MmioWrite(..)) => {}
                Ok(other) => return Err(format!("exit {other:?}")),
                Err(e) => return Err(format!("KVM_RUN: {e}")),
            }
        }
    }
}

/// Nanoseconds per round of `body`, 32-bit code that keeps EBP.
fn per_round(body: &[u8], prepare: impl Fn(&VmFd) -> Result<()>) -> Result<f64> {
    // outer: mov ebp, CHUNK; again: body; dec ebp; jnz again; out 0x10, al; jmp outer
    let mut code = vec![0xbd];
    code.extend(CHUNK.to_le_bytes());
    let again = code.len();
    code.extend(body);
    code.push(0x4d);
    code.extend([0x0f, 0x85]);
    let back = again as i32 - (code.len() as i32 + 4);
    code.extend(back.to_le_bytes());
    code.extend([0xe6, 0x10, 0xe9]);
    let back = -(code.len() as i32 + 4);
    code.extend(back.to_le_bytes());
    let mut machine = Machine::new(&code, true)?;
    prepare(&machine.vm)?;
    let mut samples = Vec::new();
    for chunk in 0..=CHUNKS {
        let start = Instant::now();
        machine.until(0x10)?;
        // The first round warms up.
        if chunk > 0 {
            samples.push(start.elapsed().as_nanos() as f64 / f64::from(CHUNK));
        }
    }
    median(&samples).ok_or_else(|| "no samples".into())
}

/// Nanoseconds from the write to an irqfd until user space sees what its handler does.
fn interrupt(halted: bool) -> Result<f64> {
    // ICW1-4 for the master 8259 at vector 0x20, all masked but IRQ 4; sti; then wait.
    let mut code = Vec::new();
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 4),
        (0x21, 1),
        (0x21, 0xef),
    ] {
        code.extend([0xb0, value, 0xe6, port]);
    }
    code.extend([0xe6, 0x10, 0xfb]);
    code.extend(if halted {
        [0xf4, 0xeb, 0xfd]
    } else {
        [0xeb, 0xfe, 0x90]
    });
    let mut machine = Machine::new(&code, false)?;
    let event = EventFd::new(libc::EFD_NONBLOCK).map_err(|e| format!("eventfd: {e}"))?;
    machine
        .vm
        .register_irqfd(&event, GSI)
        .map_err(fail("KVM_IRQFD"))?;
    machine.until(0x10)?;
    let zero = Instant::now();
    // When the handler was seen, in nanoseconds since `zero`; 0: not yet.
    let seen = AtomicU64::new(0);
    let over = AtomicBool::new(false);
    let mut samples = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        scope.spawn(|| {
            while machine.until(0x31).is_ok() {
                seen.store(zero.elapsed().as_nanos() as u64, Ordering::Release);
                if over.load(Ordering::Acquire) {
                    return;
                }
            }
        });
        let mut result = Ok(());
        for i in 0..=INTERRUPTS {
            // Long enough for the guest to halt.
            std::thread::sleep(Duration::from_micros(200));
            seen.store(0, Ordering::Release);
            over.store(i == INTERRUPTS, Ordering::Release);
            let start = zero.elapsed().as_nanos() as u64;
            event.write(1).map_err(|e| format!("eventfd: {e}"))?;
            let at = loop {
                match seen.load(Ordering::Acquire) {
                    0 if zero.elapsed() > Duration::from_secs(60) => {
                        result = Err("the interrupt did not arrive".to_owned());
                        break 0;
                    }
                    0 => std::thread::yield_now(),
                    at => break at,
                }
            };
            if result.is_err() {
                // The other thread cannot be stopped.
                println!("{{}}");
                std::process::exit(1);
            }
            samples.push(at.saturating_sub(start) as f64);
        }
        result
    })?;
    median(&samples).ok_or_else(|| "no samples".into())
}

/// Nanoseconds of a call on a vCPU that runs nothing.
fn call() -> Result<f64> {
    let machine = Machine::new(&[0xf4], true)?;
    let mut samples = Vec::new();
    for _ in 0..=CHUNKS {
        let start = Instant::now();
        for _ in 0..CHUNK {
            machine
                .vcpu
                .get_mp_state()
                .map_err(fail("KVM_GET_MP_STATE"))?;
        }
        samples.push(start.elapsed().as_nanos() as f64 / f64::from(CHUNK));
    }
    median(&samples).ok_or_else(|| "no samples".into())
}

/// Measures everything and prints one line of JSON.
///
/// # Errors
/// What could not be measured.
pub fn child() -> Result<()> {
    let nothing = |_: &VmFd| Ok(());
    // An eventfd nobody reads: its counter does not fill up in this time.
    let bell = EventFd::new(libc::EFD_NONBLOCK).map_err(|e| format!("eventfd: {e}"))?;
    let ring = |vm: &VmFd| {
        vm.register_ioevent(&bell, &IoEventAddress::Pio(0x20_00), NoDatamatch)
            .map_err(fail("KVM_IOEVENTFD"))
    };
    // The empty loop is taken off.
    let empty = per_round(&[], nothing)?;
    let of = |ns: f64| (ns - empty).max(0.0);
    let value = json!({
        "empty": empty,
        "out": of(per_round(&[0xe6, 0x40 + 0x40], nothing)?),
        "in": of(per_round(&[0xe4, 0x80], nothing)?),
        // mov [0xfef00000], eax; mov eax, [0xfef00000]
        "mmio_write": of(per_round(&[0xa3, 0, 0, 0xf0, 0xfe], nothing)?),
        "mmio_read": of(per_round(&[0xa1, 0, 0, 0xf0, 0xfe], nothing)?),
        // mov dx, 0x2000; out dx, al
        "ioeventfd": of(per_round(&[0x66, 0xba, 0, 0x20, 0xee], ring)?),
        // xor eax, eax; cpuid
        "cpuid": of(per_round(&[0x31, 0xc0, 0x0f, 0xa2], nothing)?),
        "ioctl": call()?,
        "irqfd": interrupt(false)?,
        "hlt": interrupt(true)?,
    });
    println!("{value}");
    Ok(())
}
