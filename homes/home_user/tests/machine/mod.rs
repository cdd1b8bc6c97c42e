//! A VM with a little memory, for tests.
#![expect(unsafe_code, reason = "guest memory is a mapping")]
#![allow(dead_code, reason = "not every test uses everything")]

use home_user::{EngineKind, System, Vcpu, VcpuExit, Vm};
use iced_x86::code_asm::CodeAssembler;
use kvm_bindings::{kvm_pit_config, kvm_userspace_memory_region};
use std::ptr;

/// Bytes of guest memory, from guest-physical address 0.
pub const MEMORY: usize = 2 << 20;
/// Where test programs start.
pub const ENTRY: u64 = 0x1000;

/// The engines to test; ANYKVM_ENGINE picks one.
pub fn engines() -> Vec<EngineKind> {
    match std::env::var("ANYKVM_ENGINE").as_deref() {
        Ok("interp") => vec![EngineKind::Interp],
        Ok("jit") => vec![EngineKind::Jit],
        _ => vec![EngineKind::Interp, EngineKind::Jit],
    }
}

/// Runs `test` on every engine.
pub fn each(test: impl Fn(EngineKind)) {
    for engine in engines() {
        eprintln!("engine: {engine:?}");
        test(engine);
    }
}

pub struct Memory(pub *mut u8);

// SAFETY: plain memory, accessed with volatile operations only.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    pub fn new() -> Self {
        // SAFETY: a new anonymous mapping.
        let p = unsafe {
            libc::mmap(
                ptr::null_mut(),
                MEMORY,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(p, libc::MAP_FAILED);
        Memory(p.cast())
    }
    pub fn write(&self, gpa: u64, data: &[u8]) {
        assert!(gpa as usize + data.len() <= MEMORY);
        for (i, b) in data.iter().enumerate() {
            // SAFETY: in bounds.
            unsafe { self.0.add(gpa as usize + i).write_volatile(*b) };
        }
    }
    pub fn u8(&self, gpa: u64) -> u8 {
        assert!((gpa as usize) < MEMORY);
        // SAFETY: in bounds.
        unsafe { self.0.add(gpa as usize).read_volatile() }
    }
    pub fn u32(&self, gpa: u64) -> u32 {
        u32::from_le_bytes(std::array::from_fn(|i| self.u8(gpa + i as u64)))
    }
    pub fn u64(&self, gpa: u64) -> u64 {
        u64::from_le_bytes(std::array::from_fn(|i| self.u8(gpa + i as u64)))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the VM that used it is dropped before (see `Machine`).
        unsafe { libc::munmap(self.0.cast(), MEMORY) };
    }
}

pub struct Machine {
    // Dropped in this order.
    pub vm: Vm,
    pub memory: Memory,
    pub system: System,
}

impl Machine {
    /// A VM with memory and, with `irqchip`, with irqchip and PIT.
    pub fn new(engine: EngineKind, irqchip: bool) -> Self {
        let system = System::new(engine).unwrap();
        let vm = system.create_vm().unwrap();
        vm.set_tss_address(0xfffb_d000).unwrap();
        if irqchip {
            vm.create_irq_chip().unwrap();
            vm.create_pit2(kvm_pit_config::default()).unwrap();
        }
        let memory = Memory::new();
        let machine = Machine { vm, memory, system };
        machine.set_slot(0);
        machine
    }

    /// (Re)registers slot 0 with `flags`.
    pub fn set_slot(&self, flags: u32) {
        // SAFETY: the mapping outlives the VM and its vCPUs in every test.
        unsafe {
            self.vm
                .set_user_memory_region(kvm_userspace_memory_region {
                    slot: 0,
                    flags,
                    guest_phys_addr: 0,
                    memory_size: MEMORY as u64,
                    userspace_addr: self.memory.0 as u64,
                })
                .unwrap();
        }
    }

    /// A vCPU in real mode at [`ENTRY`], CS = 0, with all supported CPUID.
    pub fn vcpu(&self, id: u64) -> Vcpu {
        let vcpu = self.vm.create_vcpu(id).unwrap();
        let mut cpuid = self.system.get_supported_cpuid(256).unwrap();
        for entry in cpuid.as_mut_slice().iter_mut().filter(|e| e.function == 1) {
            // KVM_CAP_TSC_DEADLINE_TIMER tells of it.
            entry.ecx |= 1 << 24;
        }
        vcpu.set_cpuid2(&cpuid).unwrap();
        if id == 0 {
            let mut sregs = vcpu.get_sregs().unwrap();
            sregs.cs.base = 0;
            sregs.cs.selector = 0;
            vcpu.set_sregs(&sregs).unwrap();
            let mut regs = vcpu.get_regs().unwrap();
            regs.rip = ENTRY;
            regs.rsp = 0x8000;
            regs.rflags = 2;
            vcpu.set_regs(&regs).unwrap();
        }
        vcpu
    }

    /// Assembles a program of `bits` and loads it at `gpa`.
    pub fn load(&self, gpa: u64, bits: u32, program: impl Fn(&mut CodeAssembler)) {
        let mut a = CodeAssembler::new(bits).unwrap();
        program(&mut a);
        self.memory.write(gpa, &a.assemble(gpa).unwrap());
    }

    /// Puts the vCPU into 64-bit mode with the low 1 GiB mapped one to one, flat segments, page
    /// tables from 0x10_0000 on, a GDT at 0x10_f000 and an IDT (limit 0) nowhere.
    pub fn long_mode(&self, vcpu: &Vcpu) {
        let m = &self.memory;
        m.write(0x10_0000, &0x10_1007u64.to_le_bytes());
        m.write(0x10_1000, &0x10_2007u64.to_le_bytes());
        // The fourth GiB, with the APIC, one to one as well.
        m.write(0x10_1018, &0x10_3007u64.to_le_bytes());
        for i in 0..512u64 {
            m.write(0x10_2000 + i * 8, &(i << 21 | 0x87).to_le_bytes());
            m.write(
                0x10_3000 + i * 8,
                &((3 << 30) | i << 21 | 0x97).to_le_bytes(),
            );
        }
        m.write(0x10_f008, &0x00af_9b00_0000_ffffu64.to_le_bytes());
        m.write(0x10_f010, &0x00cf_9300_0000_ffffu64.to_le_bytes());
        let mut s = vcpu.get_sregs().unwrap();
        s.cr0 = 0x8005_0033;
        s.cr3 = 0x10_0000;
        s.cr4 = 0x620;
        s.efer = 0xd00;
        s.gdt.base = 0x10_f000;
        s.gdt.limit = 0x17;
        s.idt.limit = 0;
        s.cs.selector = 8;
        s.cs.base = 0;
        s.cs.limit = 0xffff_ffff;
        s.cs.type_ = 0xb;
        s.cs.l = 1;
        s.cs.db = 0;
        s.cs.g = 1;
        for seg in [&mut s.ds, &mut s.es, &mut s.ss, &mut s.fs, &mut s.gs] {
            seg.selector = 0x10;
            seg.base = 0;
            seg.limit = 0xffff_ffff;
            seg.type_ = 3;
            seg.db = 1;
            seg.g = 1;
        }
        vcpu.set_sregs(&s).unwrap();
    }

    /// An IDT at 0x10_e000 whose vector `vector` leads to `handler`.
    pub fn set_idt(&self, vcpu: &Vcpu, vector: u8, handler: u64) {
        let low = (handler & 0xffff) | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        let at = 0x10_e000 + u64::from(vector) * 16;
        self.memory.write(at, &low.to_le_bytes());
        self.memory.write(at + 8, &(handler >> 32).to_le_bytes());
        let mut s = vcpu.get_sregs().unwrap();
        s.idt.base = 0x10_e000;
        s.idt.limit = 0xfff;
        vcpu.set_sregs(&s).unwrap();
    }
}

/// Runs until OUT to `port`, which must be the next exit; its data.
pub fn expect_out(vcpu: &mut Vcpu, port: u16) -> Vec<u8> {
    match vcpu.run().unwrap() {
        VcpuExit::IoOut(p, data) if p == port => data.to_vec(),
        other => panic!("expected OUT to {port:#x}, got {other:?}"),
    }
}
