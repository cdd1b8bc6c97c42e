//! The guest's surroundings: RAM with tables for 64-bit mode, and no devices.
#![expect(unsafe_code, reason = "maps RAM and lends host pointers into it")]

use crate::layout::*;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use x86emu::env::{Env, Features, Flush, HostCpu, NativeRegs, PhysMem, RamRange, Stop};
use x86emu::state::{CpuState, Segment, XsaveArea, sreg};

/// Guest RAM in a memfd, which the native executor maps too.
pub struct Ram {
    base: *mut u8,
    /// The memfd.
    pub fd: i32,
}

// SAFETY: plain memory, used by one thread at a time.
unsafe impl Send for Ram {}

impl Ram {
    fn new() -> Self {
        // SAFETY: plain system calls; the results are checked.
        unsafe {
            let fd = libc::memfd_create(c"guest".as_ptr(), 0);
            assert!(fd >= 0 && libc::ftruncate(fd, RAM as i64) == 0);
            let base = libc::mmap(
                std::ptr::null_mut(),
                RAM as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                0,
            );
            assert!(base != libc::MAP_FAILED);
            Ram {
                base: base.cast(),
                fd,
            }
        }
    }

    /// `len` bytes at `gpa`.
    pub fn bytes(&mut self, gpa: u64, len: u64) -> &mut [u8] {
        assert!(gpa + len <= RAM);
        // SAFETY: in bounds; no guest runs while the harness looks at memory.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(gpa as usize), len as usize) }
    }

    /// Reads a quadword.
    pub fn r64(&mut self, gpa: u64) -> u64 {
        let mut b = [0; 8];
        b.copy_from_slice(self.bytes(gpa, 8));
        u64::from_le_bytes(b)
    }

    fn w64(&mut self, gpa: u64, v: u64) {
        self.bytes(gpa, 8).copy_from_slice(&v.to_le_bytes());
    }
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: made by `new`.
        unsafe {
            libc::munmap(self.base.cast(), RAM as usize);
            libc::close(self.fd);
        }
    }
}

/// The environment of both guest executors.
pub struct Machine {
    /// Guest RAM.
    pub ram: Ram,
    features: Features,
    host: home_user::Native,
    next_table: u64,
}

fn features() -> Features {
    let (l1, l7, e1) = (__cpuid(1), __cpuid_count(7, 0), __cpuid(0x8000_0001));
    let vendor = __cpuid(0);
    Features {
        cr4_allowed: 0x1_ffff_ffff,
        xcr0_allowed: crate::case::host_components(),
        efer_allowed: 0xd01,
        phys_bits: 46,
        amd: vendor.ebx == u32::from_le_bytes(*b"Auth"),
        leaf1_ecx: l1.ecx,
        leaf1_edx: l1.edx,
        leaf7_ebx: l7.ebx,
        leaf7_ecx: l7.ecx,
        leaf7_edx: l7.edx,
        ext1_ecx: e1.ecx,
        ext1_edx: e1.edx,
        ..Features::default()
    }
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Machine {
    /// Maps RAM and writes the tables.
    pub fn new() -> Self {
        let mut m = Machine {
            ram: Ram::new(),
            features: features(),
            host: home_user::Native::new().expect("memory for host code"),
            next_table: TABLES + PAGE,
        };
        for region in REGIONS {
            for (n, access) in region.pages.iter().enumerate() {
                let nx = 1 << 63;
                let flags = match access {
                    Access::All => 7,
                    Access::Data => 7 | nx,
                    Access::ReadOnly => 5 | nx,
                    Access::Absent => continue,
                    Access::Supervisor => 3 | nx,
                };
                let at = n as u64 * PAGE;
                m.map(region.linear + at, region.gpa + at, flags);
            }
        }
        for n in 0..KERNEL_PAGES {
            m.map(KERNEL + n * PAGE, KERNEL_GPA + n * PAGE, 3);
        }
        for v in 0..256 {
            let handler = KERNEL + HANDLERS + v * 16;
            // Vectors 3 and 4 may be raised by INT3 and INTO.
            let attr: u64 = if matches!(v, 3 | 4) { 0xee } else { 0x8e };
            let low = handler & 0xffff
                | u64::from(KERNEL_CS) << 16
                | attr << 40
                | (handler >> 16 & 0xffff) << 48;
            m.ram.w64(KERNEL_GPA + IDT + v * 16, low);
            m.ram.w64(KERNEL_GPA + IDT + v * 16 + 8, handler >> 32);
            m.ram.bytes(KERNEL_GPA + HANDLERS + v * 16, 1)[0] = 0xf4;
        }
        let tss = KERNEL + TSS;
        let gdt: [u64; 16] = [
            0,
            0x00cf_9b00_0000_ffff,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0,
            0x67 | (tss & 0xff_ffff) << 16 | 0x8b << 40 | (tss >> 24 & 0xff) << 56,
            tss >> 32,
            0,
            0,
            0,
            0,
            0,
            0x0040_f500_0000_0000,
        ];
        for (n, d) in gdt.into_iter().enumerate() {
            m.ram.w64(KERNEL_GPA + GDT + n as u64 * 8, d);
        }
        m.ram.w64(KERNEL_GPA + TSS + 4, KERNEL + KERNEL_STACK);
        // No I/O bitmap.
        m.ram.w64(KERNEL_GPA + TSS + 0x60, 0x68 << 48);
        m
    }

    fn map(&mut self, linear: u64, gpa: u64, flags: u64) {
        let mut table = TABLES;
        for shift in [39, 30, 21] {
            let entry = table + (linear >> shift & 511) * 8;
            let mut next = self.ram.r64(entry) & !0xfff;
            if next == 0 {
                next = self.next_table;
                self.next_table += PAGE;
                self.ram.w64(entry, next | 7);
            }
            table = next;
        }
        self.ram.w64(table + (linear >> 12 & 511) * 8, gpa | flags);
    }

    /// A vCPU's state for user mode with `bits` of 64 or 32.
    pub fn cpu(&self, bits: u32) -> CpuState {
        let mut cpu = CpuState {
            cpl: 3,
            cr0: 0x8005_0033,
            cr4: 0x5_0620,
            cr3: TABLES,
            efer: 0xd01,
            xcr0: crate::case::host_components(),
            rflags: 0x202,
            ..CpuState::default()
        };
        let data = Segment {
            base: 0,
            limit: !0,
            selector: DS,
            attr: 0xc0f3,
            unusable: false,
        };
        let null = Segment {
            base: 0,
            limit: 0,
            selector: 0,
            attr: 0,
            unusable: true,
        };
        let code = |selector, attr| Segment {
            base: 0,
            limit: !0,
            selector,
            attr,
            unusable: false,
        };
        cpu.seg = [if bits == 64 { null } else { data }; 6];
        cpu.seg[sreg::FS] = null;
        cpu.seg[sreg::GS] = null;
        cpu.seg[sreg::SS] = data;
        cpu.seg[sreg::CS] = if bits == 64 {
            code(CS64, 0xa0fb)
        } else {
            code(CS32, 0xc0fb)
        };
        if bits == 32 {
            cpu.seg[sreg::FS] = data;
            cpu.seg[sreg::GS] = data;
        }
        cpu.gdtr.base = KERNEL + GDT;
        cpu.gdtr.limit = 127;
        cpu.idtr.base = KERNEL + IDT;
        cpu.idtr.limit = 0xfff;
        cpu.tr = Segment {
            base: KERNEL + TSS,
            limit: 0x67,
            selector: TR,
            attr: 0x8b,
            unusable: false,
        };
        cpu.ldtr = null;
        cpu
    }
}

impl PhysMem for Machine {
    fn host_ptr(&mut self, gpa: u64, len: usize, _write: bool) -> Option<*mut u8> {
        let end = gpa.checked_add(len as u64)?;
        assert!(
            len == 0 || gpa >> 12 == (end - 1) >> 12,
            "access crosses a page"
        );
        // SAFETY: in bounds.
        (end <= RAM).then(|| unsafe { self.ram.base.add(gpa as usize) })
    }

    fn ram_around(&mut self, gpa: u64) -> Option<RamRange> {
        (gpa < RAM).then_some(RamRange {
            gpa: 0,
            size: RAM,
            host: self.ram.base as u64,
            quiet: true,
        })
    }
}

impl HostCpu for Machine {
    fn native(
        &mut self,
        insn: &[u8],
        regs: &mut NativeRegs,
        fpu: Option<&mut XsaveArea>,
    ) -> Result<(), u8> {
        self.host.native(insn, regs, fpu)
    }
}

impl Env for Machine {
    fn mmio_read(&mut self, _gpa: u64, data: &mut [u8]) -> Result<(), Stop> {
        data.fill(0xff);
        Ok(())
    }
    fn mmio_write(&mut self, _gpa: u64, _data: &[u8]) -> Result<(), Stop> {
        Ok(())
    }
    fn io_in(&mut self, _port: u16, data: &mut [u8]) -> Result<(), Stop> {
        data.fill(0xff);
        Ok(())
    }
    fn io_out(&mut self, _port: u16, _data: &[u8]) -> Result<(), Stop> {
        Ok(())
    }
    fn rdmsr(&mut self, _cpu: &mut CpuState, _index: u32) -> Result<u64, Stop> {
        Err(Stop::gp(0))
    }
    fn wrmsr(&mut self, _cpu: &mut CpuState, _index: u32, _value: u64) -> Result<(), Stop> {
        Err(Stop::gp(0))
    }
    fn cpuid(&mut self, _cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        let r = __cpuid_count(leaf, subleaf);
        [r.eax, r.ebx, r.ecx, r.edx]
    }
    fn features(&self) -> &Features {
        &self.features
    }
    fn tsc(&mut self, _cpu: &CpuState) -> u64 {
        0x1234_5678_9abc
    }
    fn cr8(&mut self) -> u64 {
        0
    }
    fn set_cr8(&mut self, _value: u64) {}
    fn flush(&mut self, _what: Flush) {}
    fn hypercall(&mut self, _cpu: &mut CpuState) -> Result<(), Stop> {
        Ok(())
    }
    fn retired(&mut self) {}
}
