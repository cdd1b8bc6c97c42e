//! The interpreter's environment while the software engine runs it: the core's, with the translation
//! caches and the tracking of code pages in between.

use crate::layout::{TLB_KERNEL, TLB_KERNEL_AC, TLB_USER};
use crate::tlb::Caches;
use crate::world::World;
use x86defs::{cr4, rflags};
use x86emu::env::{Env, Exception, Features, Flush, HostCpu, NativeRegs, PhysMem, RamRange, Stop};
use x86emu::paging::{Access, Mapping};
use x86emu::state::{CpuState, XsaveArea};

/// Pages with code that one instruction can write to at most: operands and stack, page-crossing.
const MAX_WRITES: usize = 16;

/// See the module's description.
pub struct JitEnv<'a> {
    /// The core's environment.
    pub inner: &'a mut dyn Env,
    /// What vCPUs share.
    pub world: &'a World,
    /// This vCPU's caches.
    pub caches: &'a mut Caches,
    /// Writes to pages with code: page number and lines.
    pub written: &'a mut Written,
}

/// Writes to code pages by the instruction in flight.
#[derive(Default)]
pub struct Written {
    entries: [(u64, u64); MAX_WRITES],
    len: usize,
}

impl Written {
    /// Nothing was written.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    fn push(&mut self, gfn: u64, lines: u64) {
        if let Some(e) = self.entries[..self.len].iter_mut().find(|e| e.0 == gfn) {
            e.1 |= lines;
        } else if self.len < MAX_WRITES {
            self.entries[self.len] = (gfn, lines);
            self.len += 1;
        } else {
            // More than an instruction can do: drop whole pages.
            for e in &mut self.entries {
                e.1 = u64::MAX;
            }
            self.entries[MAX_WRITES - 1] = (gfn, u64::MAX);
        }
    }

    /// Takes the list.
    pub fn take(&mut self) -> impl Iterator<Item = (u64, u64)> + use<> {
        let (entries, len) = (self.entries, self.len);
        self.len = 0;
        entries.into_iter().take(len)
    }
}

impl PhysMem for JitEnv<'_> {
    fn host_ptr(&mut self, gpa: u64, len: usize, write: bool) -> Option<*mut u8> {
        if write
            && let Some(flags) = self.world.code_map.page(gpa)
            && self.world.note_write(flags)
        {
            self.written.push(
                gpa >> 12,
                crate::cache::lines_of((gpa & 0xfff) as usize, len),
            );
        }
        self.inner.host_ptr(gpa, len, write)
    }

    fn ram_around(&mut self, gpa: u64) -> Option<RamRange> {
        self.inner.ram_around(gpa)
    }
}

impl HostCpu for JitEnv<'_> {
    fn native(
        &mut self,
        insn: &[u8],
        regs: &mut NativeRegs,
        fpu: Option<&mut XsaveArea>,
    ) -> Result<(), u8> {
        self.inner.native(insn, regs, fpu)
    }
}

/// The software TLB that an access at the current privilege uses.
fn tlb_for(cpu: &CpuState, access: Access) -> Option<usize> {
    if access.implicit || access.fetch {
        return None;
    }
    Some(if access.user {
        TLB_USER
    } else if cpu.cpl == 3 {
        return None;
    } else if cpu.rflags & rflags::AC != 0 || cpu.cr4 & cr4::SMAP == 0 {
        TLB_KERNEL_AC
    } else {
        TLB_KERNEL
    })
}

impl Env for JitEnv<'_> {
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) -> Result<(), Stop> {
        self.inner.mmio_read(gpa, data)
    }
    fn mmio_write(&mut self, gpa: u64, data: &[u8]) -> Result<(), Stop> {
        self.inner.mmio_write(gpa, data)
    }
    fn io_in(&mut self, port: u16, data: &mut [u8]) -> Result<(), Stop> {
        self.inner.io_in(port, data)
    }
    fn io_in_string(&mut self, port: u16, size: usize, data: &mut [u8]) -> Result<usize, Stop> {
        self.inner.io_in_string(port, size, data)
    }
    fn io_out(&mut self, port: u16, data: &[u8]) -> Result<(), Stop> {
        self.inner.io_out(port, data)
    }
    fn rdmsr(&mut self, cpu: &mut CpuState, index: u32) -> Result<u64, Stop> {
        self.inner.rdmsr(cpu, index)
    }
    fn wrmsr(&mut self, cpu: &mut CpuState, index: u32, value: u64) -> Result<(), Stop> {
        let efer = cpu.efer;
        let result = self.inner.wrmsr(cpu, index, value);
        if cpu.efer != efer {
            self.caches.flush(Flush::All);
        }
        result
    }
    fn cpuid(&mut self, cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.inner.cpuid(cpu, leaf, subleaf)
    }
    fn features(&self) -> &Features {
        self.inner.features()
    }
    fn tsc(&mut self, cpu: &CpuState) -> u64 {
        self.inner.tsc(cpu)
    }
    fn cr8(&mut self) -> u64 {
        self.inner.cr8()
    }
    fn set_cr8(&mut self, value: u64) {
        self.inner.set_cr8(value);
    }
    fn translate(&mut self, cpu: &CpuState, gva: u64, access: Access) -> Result<Mapping, Stop> {
        if access.fetch {
            if let Some(page) = self.caches.code_page(access.user, gva) {
                return Ok(Mapping {
                    gpa: page | gva & 0xfff,
                    page_bits: 12,
                    writable: false,
                    user: access.user,
                    nx: false,
                    global: false,
                    dirty: false,
                    from: None,
                });
            }
        } else if let Some(which) = tlb_for(cpu, access) {
            let e = self.caches.entry(which, gva);
            let tag = if access.write { e.write } else { e.read };
            if tag == gva & !0xfff {
                return Ok(Mapping {
                    gpa: e.gpa & !0xfff | gva & 0xfff,
                    page_bits: 12,
                    writable: access.write,
                    user: access.user,
                    nx: false,
                    global: e.gpa & 1 != 0,
                    dirty: access.write,
                    from: None,
                });
            }
        }
        let features = *self.features();
        x86emu::paging::walk(cpu, &features, self, gva, access).map_err(Stop::Exception)
    }
    fn intercepts(&mut self, cpu: &CpuState, exception: &Exception) -> bool {
        self.inner.intercepts(cpu, exception)
    }
    fn flush(&mut self, what: Flush) {
        self.caches.flush(what);
        self.inner.flush(what);
    }
    fn hypercall(&mut self, cpu: &mut CpuState) -> Result<(), Stop> {
        self.inner.hypercall(cpu)
    }
    fn rsm(&mut self, cpu: &mut CpuState) -> Result<(), Stop> {
        let result = self.inner.rsm(cpu);
        // Guest-physical addresses mean other memory now.
        self.caches.flush(Flush::All);
        result
    }
    fn retired(&mut self) {
        self.inner.retired();
    }
}
