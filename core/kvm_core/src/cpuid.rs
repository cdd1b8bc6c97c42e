//! CPUID: what is offered (KVM_GET_SUPPORTED_CPUID) and what a vCPU answers (KVM_SET_CPUID2).

use crate::host::Host;
use alloc::vec::Vec;
use kvm_abi::{Errno, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use x86defs::cpuid::{
    ext1_ecx, ext1_edx, kvm_feature, leaf, leaf1_ecx, leaf1_edx, leaf7_ebx, leaf7_ecx, leaf7_edx,
    leafd_eax,
};
use x86defs::{apic, cr4, efer, xcr0};
use x86emu::env::Features;
use x86emu::state::CpuState;

/// Physical-address bits that are offered at most.
const MAX_PHYS_BITS: u32 = 48;
/// State components that are offered where the host has them.
const XCR0_SERVED: u64 = xcr0::X87 | xcr0::SSE | xcr0::AVX | xcr0::AVX512;

/// IA32_ARCH_CAPABILITIES as offered.
///
/// The translator and the interpreter decide in software whether a guest access is allowed, and guest
/// returns and indirect branches are not the host's returns and indirect branches. So the guest-side
/// mitigations (page-table isolation, VERW, retpolines, safe returns) would protect nothing that
/// the process boundary around the VM does not protect, and cost much. RDCL_NO, IBRS_ALL,
/// SKIP_L1DFL_VMENTRY, SSB_NO, MDS_NO, PSCHANGE_MC_NO, TAA_NO, SBDR_SSDP_NO, FBSDP_NO, PSDP_NO, BHI_NO,
/// PBRSB_NO, GDS_NO, RFDS_NO, ITS_NO.
pub const ARCH_CAPABILITIES: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;

/// KVM's paravirtual features that are served.
pub const KVM_FEATURES: u32 = kvm_feature::CLOCKSOURCE
    | kvm_feature::NOP_IO_DELAY
    | kvm_feature::CLOCKSOURCE2
    | kvm_feature::ASYNC_PF
    | kvm_feature::STEAL_TIME
    | kvm_feature::PV_EOI
    | kvm_feature::PV_UNHALT
    | kvm_feature::PV_TLB_FLUSH
    | kvm_feature::PV_SEND_IPI
    | kvm_feature::POLL_CONTROL
    | kvm_feature::PV_SCHED_YIELD
    | kvm_feature::CLOCKSOURCE_STABLE;

/// The two vendor families whose differences matter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vendor {
    /// GenuineIntel, and whoever is neither.
    Intel,
    /// AuthenticAMD or HygonGenuine.
    Amd,
}

/// The vendor named by leaf 0 (EAX, EBX, ECX, EDX).
pub fn vendor(leaf0: [u32; 4]) -> Vendor {
    match leaf0[1] {
        // "Auth", "Hygo"
        0x6874_7541 | 0x6f67_7948 => Vendor::Amd,
        _ => Vendor::Intel,
    }
}

struct Builder<'a> {
    host: &'a dyn Host,
    entries: Vec<kvm_cpuid_entry2>,
}

impl Builder<'_> {
    fn push(&mut self, function: u32, index: Option<u32>, regs: [u32; 4]) {
        if self.entries.len() >= KVM_MAX_CPUID_ENTRIES || self.entries.try_reserve(1).is_err() {
            return;
        }
        self.entries.push(kvm_cpuid_entry2 {
            function,
            index: index.unwrap_or(0),
            flags: index.map_or(0, |_| KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
            eax: regs[0],
            ebx: regs[1],
            ecx: regs[2],
            edx: regs[3],
            padding: [0; 3],
        });
    }

    /// Copies a leaf with subleaves until one whose EAX[4:0] (the cache type) is 0.
    fn push_caches(&mut self, function: u32) {
        for index in 0..16 {
            let regs = self.host.cpuid(function, index);
            self.push(function, Some(index), regs);
            if regs[0] & 0x1f == 0 {
                break;
            }
        }
    }
}

/// What this host's VMs can have: the answer of KVM_GET_SUPPORTED_CPUID.
///
/// Instructions run on the host CPU, so what it has is offered; what the interpreter does in software
/// (paging features, MSRs, timers) is always offered; what neither serves (virtualization
/// extensions, performance counters, TSX, protection keys, CET, AMX, LA57) never is.
pub fn supported(host: &dyn Host) -> Vec<kvm_cpuid_entry2> {
    let mut b = Builder {
        host,
        entries: Vec::new(),
    };
    let leaf0 = host.cpuid(0, 0);
    let amd = vendor(leaf0) == Vendor::Amd;
    let max_basic = leaf0[0].clamp(7, 0x1f).max(0xd);
    let has = |n| leaf0[0] >= n;
    b.push(0, None, [max_basic, leaf0[1], leaf0[2], leaf0[3]]);

    let x = host.cpuid(1, 0);
    let xcr0 = supported_xcr0(host);
    b.push(
        1,
        None,
        [x[0], x[1], leaf1_ecx_of(x[2], xcr0), leaf1_edx_of(x[3])],
    );
    if has(2) {
        b.push(2, None, host.cpuid(2, 0));
    }
    if has(4) && !amd {
        b.push_caches(4);
    }
    // ARAT: the APIC timer never stops.
    b.push(6, None, [4, 0, 0, 0]);
    push_leaf7(&mut b, xcr0, amd, has(7));
    b.push(0xa, None, [0; 4]);
    b.push(0xb, Some(0), [0; 4]);
    push_leaf_d(&mut b, xcr0);
    if max_basic >= 0x1f {
        b.push(0x1f, Some(0), [0; 4]);
    }

    b.push(
        leaf::KVM_SIGNATURE,
        None,
        [
            leaf::KVM_FEATURES,
            KVM_SIGNATURE[0],
            KVM_SIGNATURE[1],
            KVM_SIGNATURE[2],
        ],
    );
    b.push(leaf::KVM_FEATURES, None, [KVM_FEATURES, 0, 0, 0]);

    push_extended(&mut b, amd);
    b.entries
}

/// Features that a guest can have whatever the host has: the answer of KVM_GET_EMULATED_CPUID.
pub fn emulated() -> [kvm_cpuid_entry2; 3] {
    let leaf = |function, eax, ecx, flags| kvm_cpuid_entry2 {
        function,
        flags,
        eax,
        ecx,
        ..Default::default()
    };
    [
        leaf(0, 7, 0, 0),
        leaf(1, 0, 0, 0),
        leaf(7, 0, leaf7_ecx::RDPID, KVM_CPUID_FLAG_SIGNIFCANT_INDEX),
    ]
}

/// The part of the host's XCR0 that guests may have.
pub fn supported_xcr0(host: &dyn Host) -> u64 {
    let mut bits = host.xcr0() & XCR0_SERVED;
    if bits & xcr0::AVX512 != xcr0::AVX512 {
        bits &= !xcr0::AVX512;
    }
    if bits & xcr0::AVX == 0 {
        bits &= xcr0::X87 | xcr0::SSE;
    }
    bits
}

fn leaf1_ecx_of(host: u32, xcr0: u64) -> u32 {
    use leaf1_ecx as c;
    let mut pass = c::SSE3
        | c::PCLMULQDQ
        | c::SSSE3
        | c::CX16
        | c::SSE4_1
        | c::SSE4_2
        | c::MOVBE
        | c::POPCNT
        | c::AES
        | c::RDRAND;
    if xcr0 != 0 {
        pass |= c::XSAVE;
    }
    if xcr0 & xcr0::AVX != 0 {
        pass |= c::AVX | c::FMA | c::F16C;
    }
    // TSC_DEADLINE needs the local APICs here: KVM_CAP_TSC_DEADLINE_TIMER tells of it, and user space
    // that has them sets the bit itself.
    host & pass | c::PCID | c::X2APIC | c::HYPERVISOR
}

fn leaf1_edx_of(host: u32) -> u32 {
    use leaf1_edx as d;
    host & (d::CMOV | d::CLFLUSH | d::MMX | d::FXSR | d::SSE | d::SSE2 | d::SS | d::CX8 | d::FPU)
        | d::VME
        | d::DE
        | d::PSE
        | d::TSC
        | d::MSR
        | d::PAE
        | d::MCE
        | d::APIC
        | d::SEP
        | d::MTRR
        | d::PGE
        | d::MCA
        | d::PAT
        | d::PSE36
}

fn push_leaf7(b: &mut Builder<'_>, xcr0: u64, amd: bool, host_has: bool) {
    use {leaf7_ebx as bx, leaf7_ecx as cx, leaf7_edx as dx};
    let x = if host_has { b.host.cpuid(7, 0) } else { [0; 4] };
    let mut ebx = bx::BMI1
        | bx::FDP_EXCPTN_ONLY
        | bx::BMI2
        | bx::ZERO_FCS_FDS
        | bx::RDSEED
        | bx::ADX
        | bx::CLFLUSHOPT
        | bx::CLWB
        | bx::SHA_NI;
    let mut ecx = cx::GFNI | cx::RDPID;
    if xcr0 & xcr0::AVX != 0 {
        ebx |= bx::AVX2;
        ecx |= cx::VAES | cx::VPCLMULQDQ;
    }
    let avx512 = xcr0 & xcr0::AVX512 == xcr0::AVX512;
    if avx512 {
        ebx |= bx::AVX512F
            | bx::AVX512DQ
            | bx::AVX512IFMA
            | bx::AVX512CD
            | bx::AVX512BW
            | bx::AVX512VL;
        ecx |= cx::AVX512VBMI
            | cx::AVX512_VBMI2
            | cx::AVX512_VNNI
            | cx::AVX512_BITALG
            | cx::AVX512_VPOPCNTDQ;
    }
    let ebx =
        x[1] & ebx | bx::FSGSBASE | bx::TSC_ADJUST | bx::SMEP | bx::ERMS | bx::INVPCID | bx::SMAP;
    let ecx = x[2] & ecx | cx::UMIP;
    let mut edx = x[3] & dx::FSRM | dx::ARCH_CAPABILITIES;
    if !amd {
        // Goes with IBRS_ALL; the MSR takes the bits and nothing depends on them.
        edx |= dx::SPEC_CTRL;
    }
    b.push(7, Some(0), [1, ebx, ecx, edx]);
    const AVX_VNNI: u32 = 1 << 4;
    const AVX512_BF16: u32 = 1 << 5;
    let x = if x[0] >= 1 {
        b.host.cpuid(7, 1)
    } else {
        [0; 4]
    };
    let mut eax = 0;
    if xcr0 & xcr0::AVX != 0 {
        eax |= AVX_VNNI;
    }
    if avx512 {
        eax |= AVX512_BF16;
    }
    b.push(7, Some(1), [x[0] & eax, 0, 0, 0]);
}

fn push_leaf_d(b: &mut Builder<'_>, xcr0: u64) {
    if xcr0 == 0 {
        b.push(0xd, Some(0), [0; 4]);
        return;
    }
    let mut size = 576;
    let mut parts = Vec::new();
    for i in 2..63 {
        if xcr0 & (1 << i) != 0 {
            let x = b.host.cpuid(0xd, i);
            size = size.max(x[0].saturating_add(x[1]));
            parts.push((i, x));
        }
    }
    b.push(0xd, Some(0), [xcr0 as u32, 576, size, (xcr0 >> 32) as u32]);
    let x = b.host.cpuid(0xd, 1);
    let eax = x[0] & (leafd_eax::XSAVEOPT | leafd_eax::XSAVEC | leafd_eax::XGETBV1);
    b.push(0xd, Some(1), [eax, 0, 0, 0]);
    for (i, x) in parts {
        // Of ECX only bit 1 (aligned to 64 bytes when compacted) has a meaning for user state.
        b.push(0xd, Some(i), [x[0], x[1], x[2] & 2, 0]);
    }
}

fn push_extended(b: &mut Builder<'_>, amd: bool) {
    let host = b.host;
    let max = host.cpuid(leaf::EXT_MAX, 0)[0];
    let has = |n| max >= n && max & 0xffff_0000 == 0x8000_0000;
    let limit = if amd { 0x8000_0021 } else { 0x8000_0008 };
    let x = host.cpuid(0x8000_0000, 0);
    b.push(0x8000_0000, None, [limit, x[1], x[2], x[3]]);

    let x = host.cpuid(0x8000_0001, 0);
    use {ext1_ecx as c, ext1_edx as d};
    let mut ecx = c::LAHF | c::ABM | c::PREFETCHW;
    if amd {
        ecx |= c::CMP_LEGACY | c::SSE4A | c::MISALIGNSSE | c::TOPOEXT;
    }
    let mut edx = d::SYSCALL | d::NX | d::PDPE1GB | d::LM | x[3] & d::RDTSCP;
    if amd {
        // AMD repeats the basic feature bits here.
        let shared = 0x0183_f3ff & !(1 << 11);
        edx |= leaf1_edx_of(host.cpuid(1, 0)[3]) & shared | x[3] & (d::MMXEXT | d::FXSR_OPT);
    }
    b.push(0x8000_0001, None, [x[0], x[1], x[2] & ecx, edx]);
    for n in 0x8000_0002..=0x8000_0006 {
        let x = if has(n) { host.cpuid(n, 0) } else { [0; 4] };
        b.push(n, None, x);
    }
    // Invariant TSC.
    b.push(0x8000_0007, None, [0, 0, 0, 1 << 8]);
    let x = if has(0x8000_0008) {
        host.cpuid(0x8000_0008, 0)
    } else {
        [36, 0, 0, 0]
    };
    let phys = (x[0] & 0xff).clamp(36, MAX_PHYS_BITS);
    const XSAVEERPTR: u32 = 1 << 2;
    const SSB_NO: u32 = 1 << 26;
    const BTC_NO: u32 = 1 << 29;
    let ebx = if amd {
        x[1] & XSAVEERPTR | SSB_NO | BTC_NO
    } else {
        0
    };
    b.push(0x8000_0008, None, [phys | 48 << 8, ebx, 0, 0]);
    if !amd {
        return;
    }
    for n in [0x8000_0019, 0x8000_001a] {
        if has(n) {
            b.push(n, None, host.cpuid(n, 0));
        }
    }
    if has(0x8000_001d) {
        b.push_caches(0x8000_001d);
    }
    b.push(0x8000_001e, None, [0; 4]);
    // LFENCE always serializing (as on the host), automatic IBRS, SRSO_NO, SRSO_USER_KERNEL_NO;
    // TSA_SQ_NO, TSA_L1_NO. See `ARCH_CAPABILITIES` for why.
    let x = if has(0x8000_0021) {
        host.cpuid(0x8000_0021, 0)
    } else {
        [0; 4]
    };
    let eax = x[0] & (1 << 2) | AMD_AUTOIBRS | 1 << 29 | 1 << 30;
    b.push(0x8000_0021, None, [eax, 0, 6, 0]);
}

/// "KVMKVMKVM" in EBX, ECX and EDX.
const KVM_SIGNATURE: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x4d];

/// CPUID.80000021H:EAX: automatic IBRS.
const AMD_AUTOIBRS: u32 = 1 << 8;

/// One vCPU's CPUID table.
#[derive(Clone, Debug, Default)]
pub struct Cpuid {
    entries: Vec<kvm_cpuid_entry2>,
    /// Vendor family.
    amd: bool,
}

impl Cpuid {
    /// The table of KVM_SET_CPUID2.
    ///
    /// # Errors
    /// E2BIG for more than 256 entries, ENOMEM.
    pub fn new(entries: &[kvm_cpuid_entry2]) -> Result<Self, Errno> {
        if entries.len() > KVM_MAX_CPUID_ENTRIES {
            return Err(Errno::E2BIG);
        }
        let mut copy = Vec::new();
        copy.try_reserve_exact(entries.len())
            .map_err(|_| Errno::ENOMEM)?;
        copy.extend_from_slice(entries);
        let mut cpuid = Cpuid {
            entries: copy,
            amd: false,
        };
        cpuid.amd = vendor(cpuid.regs(0, 0)) == Vendor::Amd;
        Ok(cpuid)
    }

    /// The entries as they were set.
    pub fn entries(&self) -> &[kvm_cpuid_entry2] {
        &self.entries
    }

    /// Whether the table names AMD as vendor.
    pub fn amd(&self) -> bool {
        self.amd
    }

    /// The entries with the bits that follow the vCPU's state as they are now.
    pub fn now(&self, cpu: &CpuState, apic_base: u64) -> Vec<kvm_cpuid_entry2> {
        let mut entries = self.entries.clone();
        for e in entries
            .iter_mut()
            .filter(|e| matches!(e.function, 1 | 7 | 0xd))
        {
            [e.eax, e.ebx, e.ecx, e.edx] = self.query(cpu, apic_base, e.function, e.index);
        }
        entries
    }

    /// Whether another table says the same, but for bits that follow the vCPU's state.
    pub fn same(&self, other: &Cpuid) -> bool {
        let stable = |e: &kvm_cpuid_entry2| {
            let mut e = *e;
            e.padding = [0; 3];
            match (e.function, e.index) {
                (1, _) => {
                    e.ecx &= !(leaf1_ecx::OSXSAVE | leaf1_ecx::MONITOR);
                    e.edx &= !leaf1_edx::APIC;
                }
                (0xd, 0 | 1) => e.ebx = 0,
                _ => {}
            }
            e
        };
        self.entries.len() == other.entries.len()
            && self
                .entries
                .iter()
                .zip(&other.entries)
                .all(|(a, b)| stable(a) == stable(b))
    }

    /// The leaf with KVM's own features: next to the one that bears KVM's signature.
    fn kvm_features_leaf(&self) -> Option<u32> {
        let bases = (leaf::KVM_SIGNATURE..leaf::KVM_SIGNATURE + 0x1_0000).step_by(0x100);
        let base = bases
            .into_iter()
            .find(|&base| self.regs(base, 0)[1..] == KVM_SIGNATURE)?;
        Some(base | leaf::KVM_FEATURES)
    }

    /// KVM's own features as the guest sees them.
    pub fn kvm_features(&self) -> u32 {
        self.kvm_features_leaf()
            .map_or(0, |function| self.regs(function, 0)[0])
    }

    /// Takes KVM_FEATURE_PV_UNHALT away.
    pub fn hide_pv_unhalt(&mut self) {
        let Some(function) = self.kvm_features_leaf() else {
            return;
        };
        for e in self.entries.iter_mut().filter(|e| e.function == function) {
            e.eax &= !kvm_feature::PV_UNHALT;
        }
    }

    fn find(&self, function: u32, index: u32) -> Option<&kvm_cpuid_entry2> {
        self.entries.iter().find(|e| {
            e.function == function
                && (e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX == 0 || e.index == index)
        })
    }

    /// The stored registers of a leaf; zeros where there is no entry.
    pub fn regs(&self, function: u32, index: u32) -> [u32; 4] {
        self.find(function, index)
            .map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
    }

    /// What the instruction returns, with the bits that follow the vCPU's state.
    pub fn query(&self, cpu: &CpuState, apic_base: u64, function: u32, index: u32) -> [u32; 4] {
        let Some(entry) = self.find(function, index) else {
            return self.out_of_range(cpu, apic_base, function, index);
        };
        let mut regs = [entry.eax, entry.ebx, entry.ecx, entry.edx];
        match function {
            1 => {
                regs[2] &= !leaf1_ecx::OSXSAVE;
                if cpu.cr4 & cr4::OSXSAVE != 0 {
                    regs[2] |= leaf1_ecx::OSXSAVE;
                }
                if apic_base & apic::BASE_ENABLE == 0 {
                    regs[3] &= !leaf1_edx::APIC;
                }
            }
            0xd if index == 0 => regs[1] = self.xsave_size(cpu.xcr0, false),
            0xd if index == 1 && regs[0] & (leafd_eax::XSAVEC | leafd_eax::XSAVES) != 0 => {
                regs[1] = self.xsave_size(cpu.xcr0, true);
            }
            _ => {}
        }
        regs
    }

    /// Intel CPUs answer leaves beyond the highest basic one with the data of that one; AMD ones
    /// with zeros. Topology leaves keep their index in ECX and the APIC id in EDX.
    fn out_of_range(&self, cpu: &CpuState, apic_base: u64, function: u32, index: u32) -> [u32; 4] {
        if matches!(function, 0xb | 0x1f)
            && let Some(first) = self.find(function, 0)
        {
            return [0, 0, index & 0xff, first.edx];
        }
        let max = self.regs(function & 0x8000_0000, 0)[0];
        let hypervisor = (0x4000_0000..0x5000_0000).contains(&function);
        if self.amd || hypervisor || function <= max {
            return [0; 4];
        }
        let max_basic = self.regs(0, 0)[0];
        if max_basic == function || self.find(max_basic, index).is_none() {
            return [0; 4];
        }
        self.query(cpu, apic_base, max_basic, index)
    }

    /// Bytes of the XSAVE area for the components in `xcr0`.
    fn xsave_size(&self, xcr0: u64, compacted: bool) -> u32 {
        let mut size: u32 = 576;
        for i in 2..63 {
            if xcr0 & (1 << i) == 0 {
                continue;
            }
            let [bytes, offset, flags, _] = self.regs(0xd, i);
            if compacted {
                if flags & 2 != 0 {
                    size = size.checked_next_multiple_of(64).unwrap_or(size);
                }
                size = size.saturating_add(bytes);
            } else {
                size = size.max(offset.saturating_add(bytes));
            }
        }
        size
    }

    /// The XCR0 bits of leaf 0DH.
    pub fn xcr0(&self) -> u64 {
        let x = self.regs(0xd, 0);
        u64::from(x[0]) | u64::from(x[3]) << 32
    }

    /// Guest-physical address bits.
    pub fn phys_bits(&self) -> u8 {
        match self.find(0x8000_0008, 0) {
            Some(e) if e.eax & 0xff != 0 => (e.eax & 0xff).min(52) as u8,
            _ => 36,
        }
    }

    /// What the interpreter may let the guest use. `host_xcr0`: see [`supported_xcr0`].
    pub fn features(&self, host_xcr0: u64) -> Features {
        let [_, _, leaf1_ecx, leaf1_edx] = self.regs(1, 0);
        let [_, leaf7_ebx, leaf7_ecx, leaf7_edx] = self.regs(7, 0);
        let [_, _, ext1_ecx, ext1_edx] = self.regs(0x8000_0001, 0);
        let mut cr4_allowed = cr4::TSD
            | cr4::DE
            | cr4::PSE
            | cr4::PAE
            | cr4::MCE
            | cr4::PGE
            | cr4::PCE
            | cr4::OSFXSR
            | cr4::OSXMMEXCPT
            | cr4::VME
            | cr4::PVI;
        for (present, bit) in [
            (leaf1_ecx & leaf1_ecx::XSAVE, cr4::OSXSAVE),
            (leaf1_ecx & leaf1_ecx::PCID, cr4::PCIDE),
            (leaf7_ebx & leaf7_ebx::FSGSBASE, cr4::FSGSBASE),
            (leaf7_ebx & leaf7_ebx::SMEP, cr4::SMEP),
            (leaf7_ebx & leaf7_ebx::SMAP, cr4::SMAP),
            (leaf7_ecx & leaf7_ecx::UMIP, cr4::UMIP),
        ] {
            if present != 0 {
                cr4_allowed |= bit;
            }
        }
        let mut efer_allowed = efer::SCE;
        if ext1_edx & ext1_edx::LM != 0 {
            efer_allowed |= efer::LME | efer::LMA;
        }
        if ext1_edx & ext1_edx::NX != 0 {
            efer_allowed |= efer::NX;
        }
        if ext1_edx & ext1_edx::FXSR_OPT != 0 {
            efer_allowed |= efer::FFXSR;
        }
        if self.regs(0x8000_0021, 0)[0] & AMD_AUTOIBRS != 0 {
            efer_allowed |= efer::AUTOIBRS;
        }
        Features {
            cr4_allowed,
            xcr0_allowed: self.xcr0() & host_xcr0 | xcr0::X87,
            efer_allowed,
            phys_bits: self.phys_bits(),
            amd: self.amd,
            leaf1_ecx,
            leaf1_edx,
            leaf7_ebx,
            leaf7_ecx,
            leaf7_edx,
            ext1_ecx,
            ext1_edx,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::{Timer, Waiter};
    use alloc::boxed::Box;
    use alloc::sync::Arc;
    use x86emu::env::HostCpu;

    /// A host CPU on which every feature bit there is is set.
    struct Everything {
        amd: bool,
        xcr0: u64,
    }

    impl Host for Everything {
        fn now_ns(&self) -> u64 {
            0
        }
        fn realtime_ns(&self) -> u64 {
            0
        }
        fn tsc(&self) -> u64 {
            0
        }
        fn tsc_khz(&self) -> u32 {
            1_000_000
        }
        fn cpuid(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
            let name = if self.amd {
                [0x6874_7541, 0x444d_4163, 0x6974_6e65]
            } else {
                [0x756e_6547, 0x6c65_746e, 0x4965_6e69]
            };
            match (leaf, subleaf) {
                (0, _) => [0x20, name[0], name[1], name[2]],
                (0x8000_0000, _) => [0x8000_0022, name[0], name[1], name[2]],
                (0x8000_0008, _) => [0x3934, !0, !0, !0],
                (4 | 0x8000_001d, 3..) => [0; 4],
                (0xd, 2) => [256, 576, 0, 0],
                (0xd, 5) => [64, 1088, 0, 0],
                (0xd, 6) => [512, 1152, 0, 0],
                (0xd, 7) => [1024, 1664, 0, 0],
                (0xd, 9) => [8, 2688, 0, 0],
                _ => [!0; 4],
            }
        }
        fn xcr0(&self) -> u64 {
            self.xcr0
        }
        fn waiter(&self) -> Option<Arc<dyn Waiter>> {
            None
        }
        fn timer(&self, _: Box<dyn Fn() + Send + Sync>) -> Option<Box<dyn Timer>> {
            None
        }
        fn native_cpu(&self) -> Option<Box<dyn HostCpu + Send>> {
            None
        }
    }

    fn table(amd: bool, xcr0: u64) -> Cpuid {
        Cpuid::new(&supported(&Everything { amd, xcr0 })).unwrap()
    }

    #[test]
    fn offers_nothing_that_is_not_served() {
        for amd in [false, true] {
            let t = table(amd, !0);
            let [_, _, c, _] = t.regs(1, 0);
            assert_eq!(c & (1 << 5), 0, "VMX");
            assert_eq!(c & leaf1_ecx::MONITOR, 0);
            let [_, b, c, d] = t.regs(7, 0);
            assert_eq!(b & (1 << 4 | 1 << 11 | 1 << 14), 0, "HLE, RTM, MPX");
            assert_eq!(
                c & (1 << 3 | 1 << 4 | 1 << 7 | 1 << 16),
                0,
                "PKU, OSPKE, CET_SS, LA57"
            );
            assert_eq!(d & (1 << 20 | 7 << 22), 0, "CET_IBT, AMX");
            assert_eq!(t.regs(0xa, 0), [0; 4], "PMU");
            assert_eq!(t.regs(0x8000_0001, 0)[2] & ext1_ecx::SVM, 0);
            assert_eq!(t.xcr0(), 0xe7, "no MPX, PKRU, AMX state");
            assert_eq!(t.regs(0xd, 1)[0] & leafd_eax::XSAVES, 0);
        }
    }

    #[test]
    fn avx_state_and_instructions_come_together() {
        let [_, _, c, _] = table(false, 3).regs(1, 0);
        assert_eq!(c & (leaf1_ecx::AVX | leaf1_ecx::FMA | leaf1_ecx::F16C), 0);
        assert_ne!(c & leaf1_ecx::XSAVE, 0);
        let t = table(false, 7);
        assert_ne!(t.regs(7, 0)[1] & leaf7_ebx::AVX2, 0);
        assert_eq!(t.regs(7, 0)[1] & leaf7_ebx::AVX512F, 0);
        let [_, _, c, _] = table(false, 0).regs(1, 0);
        assert_eq!(c & leaf1_ecx::XSAVE, 0);
    }

    #[test]
    fn xsave_sizes_follow_xcr0() {
        let t = table(true, 0xe7);
        let mut cpu = CpuState::default();
        assert_eq!(t.regs(0xd, 0)[2], 2688);
        for (xcr0, size) in [(1, 576), (3, 576), (7, 832), (0xe7, 2688)] {
            cpu.xcr0 = xcr0;
            assert_eq!(t.query(&cpu, 0, 0xd, 0)[1], size);
        }
        cpu.xcr0 = 0xe7;
        assert_eq!(t.query(&cpu, 0, 0xd, 1)[1], 576 + 256 + 64 + 512 + 1024);
    }

    #[test]
    fn dynamic_bits() {
        let t = table(false, 7);
        let mut cpu = CpuState::default();
        let osxsave =
            |cpu: &CpuState| t.query(cpu, apic::BASE_ENABLE, 1, 0)[2] & leaf1_ecx::OSXSAVE;
        assert_eq!(osxsave(&cpu), 0);
        cpu.cr4 |= cr4::OSXSAVE;
        assert_ne!(osxsave(&cpu), 0);
        assert_eq!(t.query(&cpu, 0, 1, 0)[3] & leaf1_edx::APIC, 0);
    }

    #[test]
    fn leaves_out_of_range() {
        let cpu = CpuState::default();
        let mut t = table(true, 7);
        assert_eq!(t.query(&cpu, 0, 0x1234, 0), [0; 4]);
        t = Cpuid::new(&[
            kvm_cpuid_entry2 {
                function: 0,
                eax: 2,
                ..Default::default()
            },
            kvm_cpuid_entry2 {
                function: 2,
                eax: 0x77,
                ..Default::default()
            },
        ])
        .unwrap();
        assert_eq!(t.query(&cpu, 0, 0x1234, 0)[0], 0x77);
        assert_eq!(t.query(&cpu, 0, 0x4000_1234, 0), [0; 4]);
        let many = [kvm_cpuid_entry2::default(); 257];
        assert_eq!(Cpuid::new(&many).unwrap_err(), Errno::E2BIG);
    }
}
