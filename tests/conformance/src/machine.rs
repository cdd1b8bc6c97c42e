//! A small virtual machine with a little kernel: descriptor tables, page tables, and handlers that
//! record exceptions.

use crate::asm;
use crate::backend::{Engine, Exit, Vcpu, Vm};
use crate::layout::*;
use crate::memory::Memory;
use crate::tables::{self, *};
use crate::watchdog::watch;
use iced_x86::code_asm::*;
use kvm_bindings::{kvm_regs, kvm_segment, kvm_sregs};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How long a guest may run.
fn patience(engine: Engine) -> Duration {
    // The oracle is not worth waiting for.
    Duration::from_secs(if engine == Engine::Kvm { 4 } else { 20 })
}

/// An exception that a guest took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub struct Fault {
    pub vector: u64,
    pub error: u64,
    pub rip: u64,
    pub cs: u64,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub cr2: u64,
}

/// See the module.
pub struct Machine {
    // Dropped in this order.
    /// The virtual machine.
    pub vm: Vm,
    /// Slot 0.
    pub memory: Memory,
    /// What executes it.
    pub engine: Engine,
    next_table: AtomicU64,
    root: AtomicU64,
}

/// CR0 of the kernels: PE, MP, ET, NE, WP.
pub const CR0: u64 = 0x1_0033;
/// CR0.PG
pub const PG: u64 = 0x8000_0000;
/// CR4.OSFXSR and OSXMMEXCPT
pub const CR4: u64 = 0x600;
/// CR4.PAE
pub const PAE: u64 = 0x20;
/// CR4.PSE
pub const PSE: u64 = 0x10;

fn segment(selector: u16, kind: u8, db: u8, l: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        dpl: (selector & 3) as u8,
        db,
        s: 1,
        l,
        g: 1,
        ..Default::default()
    }
}

impl Machine {
    /// With memory and the kernels' tables; without interrupt controllers.
    pub fn new(engine: Engine) -> Self {
        Machine::build(engine, false)
    }

    /// With interrupt controllers and PIT.
    pub fn with_irqchip(engine: Engine) -> Self {
        Machine::build(engine, true)
    }

    fn build(engine: Engine, irqchip: bool) -> Self {
        let vm = Vm::new(engine);
        vm.set_tss_address(0xfffb_d000);
        if irqchip {
            vm.create_irqchip();
        }
        let m = Machine {
            vm,
            memory: Memory::new(MEMORY),
            engine,
            next_table: AtomicU64::new(TABLES),
            root: AtomicU64::new(0),
        };
        m.vm.set_slot(0, 0, &m.memory, 0, MEMORY, 0);
        m.write_kernel();
        m
    }

    fn write_kernel(&self) {
        let memory = &self.memory;
        for (i, d) in DESCRIPTORS.iter().enumerate() {
            memory.set_u64(GDT + 8 * i as u64, *d);
        }
        // The TSS: stacks; no I/O permission bitmap.
        memory.write(TSS + 4, &RSP0.to_le_bytes());
        memory.write(TSS + 0x24, &IST1.to_le_bytes());
        memory.write(TSS + 0x2c, &IST2.to_le_bytes());
        memory.write(TSS + 0x66, &0x68u16.to_le_bytes());
        set_descriptor(memory, TR, descriptor(TSS as u32, 0x67, 0x8b, 0));
        memory.set_u64(GDT + u64::from(TR) + 8, 0);
        for v in 0..=255u8 {
            self.set_gate(v, STUBS + 16 * u64::from(v), 0, 0);
            memory.set_u64(
                IDT32 + 8 * u64::from(v),
                gate(CODE32, STUBS32 + 16 * u64::from(v), 0x8e, 0),
            );
            for (stubs, common) in [(STUBS, COMMON), (STUBS32, COMMON32)] {
                let at = stubs + 16 * u64::from(v);
                let mut code = vec![];
                if !matches!(v, 8 | 10..=14 | 17 | 21) {
                    code.extend([0x6a, 0]);
                }
                code.push(0x68);
                code.extend(u32::from(v).to_le_bytes());
                let from = at + code.len() as u64 + 5;
                code.push(0xe9);
                code.extend((common.wrapping_sub(from) as u32).to_le_bytes());
                memory.write(at, &code);
            }
        }
        self.set_gate(0x80, USER_END, 3, 0);
        self.load(COMMON, 64, |a| {
            let mut unexpected = a.create_label();
            asm!(a;
                push(rax);
                push(rbx);
                push(rcx);
                mov(ecx, 1);
                lock.xadd(qword_ptr(LOG), rcx);
                cmp(rcx, LOG_MAX as i32);
                jae(unexpected);
                shl(rcx, 6);
            );
            for i in 0..7i32 {
                asm!(a;
                    mov(rax, qword_ptr(rsp + 24 + 8 * i));
                    mov(qword_ptr(rcx + LOG_FIRST as i32 + 8 * i), rax);
                );
            }
            asm!(a;
                mov(rax, cr2);
                mov(qword_ptr(rcx + LOG_FIRST as i32 + 56), rax);
                test(r15, r15);
                jz(unexpected);
                mov(qword_ptr(rsp + 40), r15);
                pop(rcx);
                pop(rbx);
                pop(rax);
                add(rsp, 16);
                iretq();
                set_label(&mut unexpected);
                out(u32::from(PORT_UNEXPECTED), al);
                hlt();
            );
        });
        self.load(USER_END, 64, |a| {
            asm!(a;
                mov(rsp, STACK - 0x100);
                jmp(qword_ptr(USER_RETURN));
            );
        });
        self.load(COMMON32, 32, |a| {
            let mut unexpected = a.create_label();
            asm!(a;
                push(eax);
                push(ebx);
                push(ecx);
                mov(ecx, 1);
                lock.xadd(dword_ptr(LOG), ecx);
                cmp(ecx, LOG_MAX as i32);
                jae(unexpected);
                shl(ecx, 6);
            );
            for i in 0..7i32 {
                asm!(a;
                    mov(eax, dword_ptr(esp + 12 + 4 * i));
                    mov(dword_ptr(ecx + LOG_FIRST as i32 + 8 * i), eax);
                );
            }
            asm!(a;
                mov(eax, cr2);
                mov(dword_ptr(ecx + LOG_FIRST as i32 + 56), eax);
                test(ebp, ebp);
                jz(unexpected);
                mov(dword_ptr(esp + 20), ebp);
                pop(ecx);
                pop(ebx);
                pop(eax);
                add(esp, 8);
                iretd();
                set_label(&mut unexpected);
                out(u32::from(PORT_UNEXPECTED), al);
                hlt();
            );
        });
    }

    /// An interrupt gate of the 64-bit IDT.
    pub fn set_gate(&self, vector: u8, handler: u64, dpl: u8, ist: u8) {
        let at = IDT + 16 * u64::from(vector);
        self.memory
            .set_u64(at, gate(CODE, handler, 0x8e | dpl << 5, ist));
        self.memory.set_u64(at + 8, handler >> 32);
    }

    /// A vector of the real-mode table, handled in segment 0.
    pub fn set_real_vector(&self, vector: u8, handler: u16) {
        self.memory
            .set_u32(4 * u64::from(vector), u32::from(handler));
    }

    /// Assembles a program and puts it where it runs.
    pub fn load(&self, at: u64, bits: u32, program: impl FnOnce(&mut CodeAssembler)) {
        self.load_at(at, at, bits, program);
    }

    /// Assembles a program that runs at `ip` and puts it at `gpa`; its length.
    pub fn load_at(
        &self,
        gpa: u64,
        ip: u64,
        bits: u32,
        program: impl FnOnce(&mut CodeAssembler),
    ) -> u64 {
        let code = assemble(ip, bits, program);
        self.memory.write(gpa, &code);
        code.len() as u64
    }

    /// The page tables that the next [`Self::vcpu_paged`] gets: new ones, or those made before.
    pub fn tables(&self, paging: Paging) -> PageTables<'_> {
        if self.root.load(Ordering::Relaxed) == 0 {
            let t = PageTables::new(&self.memory, paging, &self.next_table);
            self.root.store(t.root, Ordering::Relaxed);
            return t;
        }
        PageTables::at(
            &self.memory,
            paging,
            self.root.load(Ordering::Relaxed),
            &self.next_table,
        )
    }

    /// Other page tables than those.
    pub fn more_tables(&self, paging: Paging) -> PageTables<'_> {
        PageTables::new(&self.memory, paging, &self.next_table)
    }

    /// The usual address space: the first 2 MiB in small pages, [`SECOND`] to 640 KiB for user code, the
    /// rest of memory in large pages.
    pub fn fill(&self, t: &PageTables<'_>, paging: Paging) {
        t.identity(0, SECOND, P | W | A | D);
        t.identity(SECOND, 0xa_0000 - SECOND, P | W | U | A | D);
        match paging {
            Paging::Legacy => {
                t.identity(0xa_0000, 0x40_0000 - 0xa_0000, P | W | A | D);
                for at in (0x40_0000..MEMORY).step_by(0x40_0000) {
                    t.map_large(2, at, at, P | W | A | D);
                }
            }
            _ => {
                t.identity(0xa_0000, 0x20_0000 - 0xa_0000, P | W | A | D);
                for at in (0x20_0000..MEMORY).step_by(0x20_0000) {
                    t.map_large(2, at, at, P | W | A | D);
                }
            }
        }
    }

    fn common(&self, vcpu: &Vcpu) -> kvm_sregs {
        let mut s = vcpu.sregs();
        let data = segment(KDATA, 3, 1, 0);
        s.ds = data;
        s.es = data;
        s.fs = data;
        s.gs = data;
        s.ss = data;
        s.tr = kvm_segment {
            base: TSS,
            limit: 0x67,
            selector: TR,
            type_: 11,
            present: 1,
            ..Default::default()
        };
        s.gdt.base = GDT;
        s.gdt.limit = GDT_LIMIT;
        s.idt.base = IDT;
        s.idt.limit = 0xfff;
        s.cr4 = CR4;
        s
    }

    fn start(&self, vcpu: &Vcpu, s: &kvm_sregs, rip: u64) {
        vcpu.set_sregs(s);
        vcpu.set_regs(&kvm_regs {
            rip,
            rsp: if vcpu.id == 0 {
                STACK
            } else {
                AP_STACKS + 4096 * (vcpu.id + 1)
            },
            rflags: 2,
            ..Default::default()
        });
        vcpu.set_runnable();
    }

    /// A vCPU in 64-bit mode at `rip` in the usual address space.
    pub fn long(&self, id: u64, rip: u64) -> Vcpu {
        if self.root.load(Ordering::Relaxed) == 0 {
            self.fill(&self.tables(Paging::Long), Paging::Long);
        }
        let vcpu = self.vm.create_vcpu(id);
        let mut s = self.common(&vcpu);
        s.cs = segment(CODE, 11, 0, 1);
        s.cr0 = CR0 | PG;
        s.cr3 = self.root.load(Ordering::Relaxed);
        s.cr4 |= PAE;
        // SCE, LME, LMA, NXE
        s.efer = 0xd01;
        self.start(&vcpu, &s, rip);
        vcpu
    }

    /// A vCPU in 32-bit protected mode at [`ENTRY`].
    pub fn protected(&self, paging: Option<Paging>) -> Vcpu {
        let vcpu = self.vm.create_vcpu(0);
        let mut s = self.common(&vcpu);
        s.cs = segment(CODE32, 11, 1, 0);
        s.cr0 = CR0;
        s.idt.base = IDT32;
        s.idt.limit = 0x7ff;
        if let Some(paging) = paging {
            if self.root.load(Ordering::Relaxed) == 0 {
                self.fill(&self.tables(paging), paging);
            }
            s.cr3 = self.root.load(Ordering::Relaxed);
            s.cr0 |= PG;
            s.cr4 |= PSE;
            if paging == Paging::Pae {
                s.cr4 |= PAE;
                // NXE
                s.efer = 0x800;
            }
        }
        self.start(&vcpu, &s, ENTRY);
        vcpu
    }

    /// A vCPU in real mode at [`REAL`], segments 0.
    pub fn real(&self) -> Vcpu {
        let vcpu = self.vm.create_vcpu(0);
        let mut s = vcpu.sregs();
        s.cs.base = 0;
        s.cs.selector = 0;
        vcpu.set_sregs(&s);
        vcpu.set_regs(&kvm_regs {
            rip: REAL,
            rsp: 0xf000,
            rflags: 2,
            ..Default::default()
        });
        vcpu
    }

    /// Runs to the end of the program: what it reported.
    pub fn finish(&self, vcpu: &mut Vcpu) -> Vec<u32> {
        self.finish_with(vcpu, |_, exit| panic!("unexpected exit: {exit:x?}"))
    }

    /// Runs to the end of the program; `host` sees to exits that are neither reports nor the end.
    pub fn finish_with(&self, vcpu: &mut Vcpu, mut host: impl FnMut(&mut Vcpu, Exit)) -> Vec<u32> {
        let mut reports = vec![];
        let start = std::time::Instant::now();
        let watch = watch(vcpu.kick(), patience(self.engine));
        loop {
            match vcpu.run() {
                Exit::Out(PORT_REPORT, value) => reports.push(value),
                Exit::Out(PORT_END, _) => break,
                Exit::Out(PORT_UNEXPECTED, _) => panic!(
                    "unexpected exception: {:x?}, reports {reports:x?}",
                    self.faults()
                ),
                Exit::Interrupted if start.elapsed() < patience(self.engine) => {}
                exit @ (Exit::Interrupted | Exit::Other(_) | Exit::Shutdown) => panic!(
                    "vcpu {} ended with {exit:?}: {:x?}, cr2 {:#x}, faults {:x?}, reports {reports:x?}",
                    vcpu.id,
                    vcpu.regs(),
                    vcpu.sregs().cr2,
                    self.faults()
                ),
                other => host(vcpu, other),
            }
        }
        drop(watch);
        reports
    }

    /// Runs one vCPU, which ends with a triple fault.
    pub fn expect_shutdown(&self, vcpu: &mut Vcpu) {
        let watch = watch(vcpu.kick(), patience(self.engine));
        let exit = vcpu.run();
        assert_eq!(exit, Exit::Shutdown, "faults {:x?}", self.faults());
        drop(watch);
    }

    /// Runs several vCPUs at once, each to its end.
    pub fn finish_all(&self, vcpus: Vec<Vcpu>) -> Vec<Vec<u32>> {
        std::thread::scope(|scope| {
            let threads: Vec<_> = vcpus
                .into_iter()
                .map(|mut v| scope.spawn(move || self.finish(&mut v)))
                .collect();
            threads
                .into_iter()
                .map(|t| t.join().expect("a vCPU failed"))
                .collect()
        })
    }

    /// The exceptions so far.
    pub fn faults(&self) -> Vec<Fault> {
        let m = &self.memory;
        (0..m.u64(LOG).min(LOG_MAX))
            .map(|i| {
                let at = LOG_FIRST + 64 * i;
                Fault {
                    vector: m.u64(at),
                    error: m.u64(at + 8),
                    rip: m.u64(at + 16),
                    cs: m.u64(at + 24),
                    rflags: m.u64(at + 32),
                    rsp: m.u64(at + 40),
                    ss: m.u64(at + 48),
                    cr2: m.u64(at + 56),
                }
            })
            .collect()
    }

    /// The exceptions so far, as vector and error code.
    pub fn vectors(&self) -> Vec<(u64, u64)> {
        self.faults().iter().map(|f| (f.vector, f.error)).collect()
    }

    /// The page faults so far, as error code and address; other exceptions fail.
    pub fn page_faults(&self) -> Vec<(u64, u64)> {
        let faults = self.faults();
        assert!(faults.iter().all(|f| f.vector == 14), "{faults:x?}");
        faults.iter().map(|f| (f.error, f.cr2)).collect()
    }

    /// The privilege level etc. of user descriptors, for tests that make their own.
    pub fn set_descriptor(&self, selector: u16, value: u64) {
        tables::set_descriptor(&self.memory, selector, value);
    }
}

/// Assembles a program that runs at `ip`.
pub fn assemble(ip: u64, bits: u32, program: impl FnOnce(&mut CodeAssembler)) -> Vec<u8> {
    let mut a = CodeAssembler::new(bits).expect("16, 32 or 64 bits");
    program(&mut a);
    a.assemble(ip).expect("a program that can be encoded")
}
