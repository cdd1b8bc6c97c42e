//! An environment of a vector of RAM and records of everything asked for.
#![expect(unsafe_code, reason = "lends host pointers into its RAM")]

use crate::env::{Env, Exit, Features, Flush, HostCpu, NativeRegs, PhysMem, Stop};
use crate::state::{CpuState, XsaveArea};
use std::boxed::Box;
use std::collections::BTreeMap;
use std::ops::Range;
use std::vec;
use std::vec::Vec;

/// What an MMIO or port access did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Access {
    pub address: u64,
    pub write: bool,
    pub data: Vec<u8>,
}

/// Guest pages are page-aligned on the host, so that alignment faults come from the host itself.
#[repr(C, align(4096))]
#[derive(Clone)]
struct Page([u8; 4096]);

/// RAM from guest-physical address 0, and the rest of the machine as plain fields.
pub struct Fake {
    ram: Vec<Page>,
    /// RAM that refuses writes.
    pub rom: Range<u64>,
    pub features: Features,
    pub flushes: Vec<Flush>,
    pub mmio: Vec<Access>,
    pub ports: Vec<Access>,
    /// The byte that MMIO and port reads give.
    pub device_byte: u8,
    pub msrs: BTreeMap<u32, u64>,
    pub cr8: u64,
    pub tsc: u64,
    pub retired: usize,
    pub hypercalls: usize,
    pub intercept: bool,
    /// This many device accesses first need user space.
    pub not_yet: usize,
    /// Executes instructions on the host; without it every one is #UD.
    pub native: Option<Box<dyn HostCpu>>,
}

impl Fake {
    pub fn new(bytes: usize) -> Self {
        Fake {
            ram: vec![Page([0; 4096]); bytes.div_ceil(4096)],
            rom: 0..0,
            features: Features {
                cr4_allowed: 0x1_ffff_ffff,
                xcr0_allowed: 0xe7,
                efer_allowed: 0xd01,
                phys_bits: 46,
                amd: false,
                leaf1_ecx: u32::MAX,
                leaf1_edx: u32::MAX,
                leaf7_ebx: u32::MAX,
                leaf7_ecx: u32::MAX,
                leaf7_edx: u32::MAX,
                ext1_ecx: u32::MAX,
                ext1_edx: u32::MAX,
                ..Default::default()
            },
            flushes: Vec::new(),
            mmio: Vec::new(),
            ports: Vec::new(),
            device_byte: 0,
            msrs: BTreeMap::new(),
            cr8: 0,
            tsc: 0,
            retired: 0,
            hypercalls: 0,
            intercept: false,
            not_yet: 0,
            native: None,
        }
    }

    fn ready(&mut self) -> Result<(), Stop> {
        if self.not_yet > 0 {
            self.not_yet -= 1;
            return Err(Stop::Exit(Exit::UserSpace));
        }
        Ok(())
    }

    fn bytes(&mut self) -> &mut [u8] {
        let len = self.ram.len() * 4096;
        // SAFETY: the vector's own memory, viewed as bytes.
        unsafe { std::slice::from_raw_parts_mut(self.ram.as_mut_ptr().cast(), len) }
    }

    pub fn write(&mut self, gpa: u64, data: &[u8]) {
        let at = gpa as usize;
        self.bytes()[at..at + data.len()].copy_from_slice(data);
    }

    pub fn read(&mut self, gpa: u64, len: usize) -> Vec<u8> {
        let at = gpa as usize;
        self.bytes()[at..at + len].to_vec()
    }

    pub fn w16(&mut self, gpa: u64, value: u16) {
        self.write(gpa, &value.to_le_bytes());
    }
    pub fn w32(&mut self, gpa: u64, value: u32) {
        self.write(gpa, &value.to_le_bytes());
    }
    pub fn w64(&mut self, gpa: u64, value: u64) {
        self.write(gpa, &value.to_le_bytes());
    }
    pub fn r16(&mut self, gpa: u64) -> u16 {
        u16::from_le_bytes(self.read(gpa, 2).try_into().unwrap())
    }
    pub fn r32(&mut self, gpa: u64) -> u32 {
        u32::from_le_bytes(self.read(gpa, 4).try_into().unwrap())
    }
    pub fn r64(&mut self, gpa: u64) -> u64 {
        u64::from_le_bytes(self.read(gpa, 8).try_into().unwrap())
    }
}

impl PhysMem for Fake {
    fn host_ptr(&mut self, gpa: u64, len: usize, write: bool) -> Option<*mut u8> {
        let end = gpa.checked_add(len as u64)?;
        if end > self.ram.len() as u64 * 4096 || write && self.rom.contains(&gpa) {
            return None;
        }
        assert!(
            len == 0 || gpa >> 12 == (end - 1) >> 12,
            "access crosses a page"
        );
        Some(
            self.ram
                .as_mut_ptr()
                .cast::<u8>()
                .wrapping_add(gpa as usize),
        )
    }
}

impl HostCpu for Fake {
    fn native(
        &mut self,
        insn: &[u8],
        regs: &mut NativeRegs,
        fpu: Option<&mut XsaveArea>,
    ) -> Result<(), u8> {
        match &mut self.native {
            Some(host) => host.native(insn, regs, fpu),
            None => Err(6),
        }
    }
}

impl Env for Fake {
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) -> Result<(), Stop> {
        self.ready()?;
        data.fill(self.device_byte);
        self.mmio.push(Access {
            address: gpa,
            write: false,
            data: data.to_vec(),
        });
        Ok(())
    }
    fn mmio_write(&mut self, gpa: u64, data: &[u8]) -> Result<(), Stop> {
        self.ready()?;
        self.mmio.push(Access {
            address: gpa,
            write: true,
            data: data.to_vec(),
        });
        Ok(())
    }
    fn io_in(&mut self, port: u16, data: &mut [u8]) -> Result<(), Stop> {
        self.ready()?;
        data.fill(self.device_byte);
        self.ports.push(Access {
            address: u64::from(port),
            write: false,
            data: data.to_vec(),
        });
        Ok(())
    }
    fn io_out(&mut self, port: u16, data: &[u8]) -> Result<(), Stop> {
        self.ready()?;
        self.ports.push(Access {
            address: u64::from(port),
            write: true,
            data: data.to_vec(),
        });
        Ok(())
    }
    fn rdmsr(&mut self, _cpu: &mut CpuState, index: u32) -> Result<u64, Stop> {
        self.msrs.get(&index).copied().ok_or(Stop::gp(0))
    }
    fn wrmsr(&mut self, _cpu: &mut CpuState, index: u32, value: u64) -> Result<(), Stop> {
        if index == 0xdead {
            return Err(Stop::Exit(Exit::UserSpace));
        }
        self.msrs.insert(index, value);
        Ok(())
    }
    fn cpuid(&mut self, _cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4] {
        if leaf == 0xd {
            // The XSAVE formats are the host's.
            let r = core::arch::x86_64::__cpuid_count(leaf, subleaf);
            return [r.eax, r.ebx, r.ecx, r.edx];
        }
        [leaf, subleaf, 0x1234_5678, 0x9abc_def0]
    }
    fn features(&self) -> &Features {
        &self.features
    }
    fn tsc(&mut self, _cpu: &CpuState) -> u64 {
        self.tsc
    }
    fn cr8(&mut self) -> u64 {
        self.cr8
    }
    fn set_cr8(&mut self, value: u64) {
        self.cr8 = value;
    }
    fn flush(&mut self, what: Flush) {
        self.flushes.push(what);
    }
    fn intercepts(&mut self, _cpu: &CpuState, _exception: &crate::env::Exception) -> bool {
        self.intercept
    }
    fn hypercall(&mut self, _cpu: &mut CpuState) -> Result<(), Stop> {
        self.hypercalls += 1;
        Ok(())
    }
    fn retired(&mut self) {
        self.retired += 1;
    }
}
