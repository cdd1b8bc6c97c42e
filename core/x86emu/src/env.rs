//! What the interpreter needs from whoever embeds it.

use crate::paging::{self, Access, Mapping};
use crate::state::{CpuState, XsaveArea};

/// An exception raised by an instruction, before delivery.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exception {
    /// Vector 0-31.
    pub vector: u8,
    /// Error code, for the vectors that push one.
    pub error: Option<u32>,
    /// CR2 for #PF; bits to set in DR6 for #DB; 0 otherwise.
    pub payload: u64,
}

/// Why guest code must stop running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// HLT retired.
    Hlt,
    /// PAUSE retired in a loop that looks like a spin; other vCPUs may want the CPU.
    Pause,
    /// A port, MMIO, MSR or hypercall access needs user space. The environment has recorded what is
    /// needed; the instruction has not retired and is executed again once the answer is there.
    UserSpace,
    /// The vCPU's attention flag was raised: requests, interrupts, signals.
    Interrupted,
    /// A triple fault.
    Shutdown,
    /// The instruction cannot be executed here: bytes that the interpreter does not know.
    EmulationFailed,
    /// Guest debugging (KVM_GUESTDBG) wants to see this #DB or #BP.
    Debug(Exception),
    /// The delivery of an event with this vector needs an access that user space would have to answer: its
    /// gate or its stack is not in RAM. There is no instruction to execute again.
    Vectoring(u8),
    /// Execution cannot go on for a reason inside the engine.
    InternalError,
}

/// Why an instruction did not retire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// It raised an exception, not yet delivered. RIP still points at it.
    Exception(Exception),
    /// The vCPU must leave guest mode.
    Exit(Exit),
}

/// Shorthands for the exceptions instructions raise.
impl Stop {
    fn of(vector: u8, error: Option<u32>) -> Self {
        Stop::Exception(Exception {
            vector,
            error,
            payload: 0,
        })
    }
    /// #DE
    pub fn de() -> Self {
        Self::of(0, None)
    }
    /// #UD
    pub fn ud() -> Self {
        Self::of(6, None)
    }
    /// #NM
    pub fn nm() -> Self {
        Self::of(7, None)
    }
    /// #TS(selector)
    pub fn ts(error: u32) -> Self {
        Self::of(10, Some(error))
    }
    /// #NP(selector)
    pub fn np(error: u32) -> Self {
        Self::of(11, Some(error))
    }
    /// #SS(error)
    pub fn ss(error: u32) -> Self {
        Self::of(12, Some(error))
    }
    /// #GP(error)
    pub fn gp(error: u32) -> Self {
        Self::of(13, Some(error))
    }
    /// #PF(error) at a linear address.
    pub fn pf(error: u32, address: u64) -> Self {
        Stop::Exception(Exception {
            vector: 14,
            error: Some(error),
            payload: address,
        })
    }
    /// #MF
    pub fn mf() -> Self {
        Self::of(16, None)
    }
    /// #AC(0)
    pub fn ac() -> Self {
        Self::of(17, Some(0))
    }
    /// #XM
    pub fn xm() -> Self {
        Self::of(19, None)
    }
}

/// What to drop from translation caches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flush {
    /// Every translation, global ones too (CR0.PG, CR4.PGE/PAE/PSE/SMEP…, EFER changes, INVPCID type 2).
    All,
    /// Every translation that is not global, all PCIDs (INVPCID type 3).
    NonGlobal,
    /// The non-global translations of one PCID (MOV CR3 without bit 63, INVPCID type 1).
    Pcid(u16),
    /// One linear address: global translations too in the current PCID (INVLPG).
    Page(u64),
    /// One linear address in one PCID, not global (INVPCID type 0).
    PcidPage(u16, u64),
}

/// Guest-physical memory.
pub trait PhysMem {
    /// A host pointer to `len` bytes at `gpa`, which do not cross a 4 KiB page, if they are RAM
    /// (`write`: writable RAM). The bytes are logged as dirty when `write`. `None`: MMIO, a hole, or
    /// a write to a read-only slot.
    ///
    /// The memory is shared with other vCPUs and user space: access it only with volatile or atomic
    /// operations or by instructions executed through [`HostCpu`]. The pointer stays valid until the
    /// instruction ends.
    fn host_ptr(&mut self, gpa: u64, len: usize, write: bool) -> Option<*mut u8>;

    /// The RAM around `gpa` that is contiguous on the host too, if the environment can tell. It stays so until
    /// the environment asks the engine to flush everything.
    fn ram_around(&mut self, gpa: u64) -> Option<RamRange> {
        let _ = gpa;
        None
    }
}

/// Guest RAM that is contiguous on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// First guest-physical address, page-aligned.
    pub gpa: u64,
    /// Bytes, a multiple of the page size.
    pub size: u64,
    /// Host address of the first byte.
    pub host: u64,
    /// It may be written, and nobody wants to know which pages are.
    pub quiet: bool,
}

/// The registers that a natively executed instruction starts from and leaves behind, by *host*
/// register number.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub struct NativeRegs {
    /// All sixteen; entry 4 (RSP) is ignored and kept.
    pub gpr: [u64; 16],
    /// The arithmetic flags (CF, PF, AF, ZF, SF, OF; DF must be 0).
    pub rflags: u64,
}

/// Execution of single instructions on the host CPU.
pub trait HostCpu {
    /// Executes `insn` (valid 64-bit code that neither branches nor touches RSP or segment
    /// registers, whose memory operands the caller has made point at valid host memory) on `regs`
    /// and, where `fpu` is given, on that x87/SSE/AVX state. On a fault nothing has changed and the
    /// vector is returned (0 #DE, 6 #UD, 13 #GP, 16 #MF, 17 #AC, 19 #XM).
    fn native(
        &mut self,
        insn: &[u8],
        regs: &mut NativeRegs,
        fpu: Option<&mut XsaveArea>,
    ) -> Result<(), u8>;
}

/// CPUID-derived facts that the interpreter checks before it accepts control bits or instructions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Features {
    /// CR4 bits the guest may set.
    pub cr4_allowed: u64,
    /// XCR0 bits the guest may set.
    pub xcr0_allowed: u64,
    /// EFER bits the guest may set.
    pub efer_allowed: u64,
    /// Physical address bits (MAXPHYADDR).
    pub phys_bits: u8,
    /// The CPU is an AMD one where the two vendors differ (SYSCALL in compatibility mode, null
    /// selector bases, far-branch operand sizes).
    pub amd: bool,
    /// CPUID.01H:ECX.
    pub leaf1_ecx: u32,
    /// CPUID.01H:EDX.
    pub leaf1_edx: u32,
    /// CPUID.07H.0:EBX.
    pub leaf7_ebx: u32,
    /// CPUID.07H.0:ECX.
    pub leaf7_ecx: u32,
    /// CPUID.07H.0:EDX.
    pub leaf7_edx: u32,
    /// CPUID.80000001H:ECX.
    pub ext1_ecx: u32,
    /// CPUID.80000001H:EDX.
    pub ext1_edx: u32,
    /// CPUID is #GP outside CPL 0 and SMM (MISC_FEATURES_ENABLES, "CPUID Faulting").
    pub cpuid_faulting: bool,
    /// MONITOR and MWAIT are #UD unless CPUID offers them.
    pub strict_monitor: bool,
    /// What becomes of the other vendor's hypercall instruction.
    pub foreign_hypercall: ForeignHypercall,
}

/// What VMCALL does on an AMD processor, and VMMCALL on an Intel one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ForeignHypercall {
    /// The same as the processor's own.
    #[default]
    Serve,
    /// The same, after the instruction was replaced in the guest's memory by the processor's own.
    Patch,
    /// #UD
    Undefined,
}

/// Everything around the CPU core: devices, MSRs, CPUID, time, translation caches.
///
/// Accesses that user space must answer return `Err(Stop::Exit(Exit::UserSpace))`. The
/// environment remembers the answers of the instruction in flight, in order, and gives them back when
/// the instruction is executed again, reads and writes alike, so that nothing happens twice;
/// [`Env::retired`] forgets them.
pub trait Env: PhysMem + HostCpu {
    /// Reads from guest-physical addresses that are not RAM (1-64 bytes, within a page).
    fn mmio_read(&mut self, gpa: u64, data: &mut [u8]) -> Result<(), Stop>;
    /// Writes to guest-physical addresses that are not writable RAM.
    fn mmio_write(&mut self, gpa: u64, data: &[u8]) -> Result<(), Stop>;
    /// IN: 1, 2 or 4 bytes.
    fn io_in(&mut self, port: u16, data: &mut [u8]) -> Result<(), Stop>;
    /// INS: fills `data` with as many elements of `size` bytes as one read of the port gives; how many,
    /// at least 1. `data` has room for one at least.
    ///
    /// # Errors
    /// As [`Env::io_in`].
    fn io_in_string(&mut self, port: u16, size: usize, data: &mut [u8]) -> Result<usize, Stop> {
        self.io_in(port, &mut data[..size])?;
        Ok(1)
    }
    /// OUT: 1, 2 or 4 bytes.
    fn io_out(&mut self, port: u16, data: &[u8]) -> Result<(), Stop>;
    /// RDMSR, for every index; the ones that live in `cpu` included.
    fn rdmsr(&mut self, cpu: &mut CpuState, index: u32) -> Result<u64, Stop>;
    /// WRMSR, for every index; the ones that live in `cpu` included. Flushes what must be flushed.
    fn wrmsr(&mut self, cpu: &mut CpuState, index: u32, value: u64) -> Result<(), Stop>;
    /// CPUID: EAX, EBX, ECX, EDX.
    fn cpuid(&mut self, cpu: &CpuState, leaf: u32, subleaf: u32) -> [u32; 4];
    /// What the guest's CPUID allows.
    fn features(&self) -> &Features;
    /// The guest's TSC now.
    fn tsc(&mut self, cpu: &CpuState) -> u64;
    /// CR8: the task-priority class of the local APIC (0-15).
    fn cr8(&mut self) -> u64;
    /// Writes CR8.
    fn set_cr8(&mut self, value: u64);
    /// Translates a linear address for `access`; the error is the #PF to raise. Environments with a
    /// translation cache look there first.
    fn translate(&mut self, cpu: &CpuState, gva: u64, access: Access) -> Result<Mapping, Stop> {
        let features = *self.features();
        paging::walk(cpu, &features, self, gva, access).map_err(Stop::Exception)
    }
    /// Whether guest debugging (KVM_GUESTDBG) takes this #DB or #BP: then it is not delivered and
    /// the vCPU leaves with [`Exit::Debug`], RIP still at the instruction for #BP.
    fn intercepts(&mut self, _cpu: &CpuState, _exception: &Exception) -> bool {
        false
    }
    /// Drops cached translations.
    fn flush(&mut self, what: Flush);
    /// VMCALL or VMMCALL: KVM's hypercalls. Advancing RIP is the interpreter's.
    fn hypercall(&mut self, cpu: &mut CpuState) -> Result<(), Stop>;
    /// RSM in system-management mode: the registers, RIP too, become those of the interrupted code.
    fn rsm(&mut self, _cpu: &mut CpuState) -> Result<(), Stop> {
        Err(Stop::ud())
    }
    /// The instruction in flight has retired, or an exception takes its place.
    fn retired(&mut self);
}
