//! Model-specific registers, those in [`CpuState`] and all others.
//!
//! Unknown ones are #GP for the guest and stop KVM_GET_MSRS and KVM_SET_MSRS. User space
//! (`host_initiated` in KVM's words, `host` here) may write what is read-only for the guest.

use crate::cpuid::{ARCH_CAPABILITIES, Vendor};
use crate::env::VcpuEnv;
use crate::mce::Mce;
use kvm_abi::paravirt::time_info;
use x86defs::cpuid::{ext1_edx, kvm_feature, leaf7_ebx, leaf7_ecx, leaf7_edx};
use x86defs::{cr0, efer, msr};
use x86emu::state::{CpuState, sreg};

/// PAT after RESET.
const PAT_RESET: u64 = 0x0007_0406_0007_0406;
/// MTRRCAP: 8 variable ranges, fixed ranges, write combining.
const MTRRCAP: u64 = 0x508;
const MTRR_VARIABLE: usize = 8;
/// PLATFORM_INFO and MISC_FEATURES_ENABLES: CPUID faulting is there; it is on.
const PLATFORM_CPUID_FAULTING: u64 = 1 << 31;
const CPUID_FAULTING: u64 = 1;
/// MISC_ENABLE: MONITOR and MWAIT are there.
const MISC_ENABLE_MWAIT: u64 = 1 << 18;
/// HWCR: software may write MCi_STATUS.
const HWCR_MC_STATUS_WRITE: u64 = 1 << 18;
/// SMBASE after RESET.
const SMBASE_RESET: u64 = 0x3_0000;
/// MISC_ENABLE: no BTS, no PEBS. Whether strings are fast is user space's to say.
const MISC_ENABLE_RESET: u64 = 1 << 11 | 1 << 12;
/// What the guest must leave as it is there, and what it may try to change.
const MISC_ENABLE_FIXED: u64 = 1 << 11 | 1 << 12;
const MISC_ENABLE_IGNORED: u64 = 1 << 7;
/// HWCR: the TSC counts at the P0 frequency.
const HWCR_TSC_AT_P0: u64 = 1 << 24;

/// The MSRs that no instruction but RDMSR and WRMSR looks at.
#[derive(Clone, Debug)]
pub(crate) struct Msrs {
    vendor: Vendor,
    pat: u64,
    mtrr_fixed: [u64; 11],
    mtrr_variable: [u64; 2 * MTRR_VARIABLE],
    mtrr_default: u64,
    misc_enable: u64,
    pub mce: Mce,
    power_ctl: u64,
    tsc_adjust: u64,
    spec_ctrl: u64,
    arch_capabilities: u64,
    platform_info: u64,
    misc_features: u64,
    microcode: u64,
    hwcr: u64,
    de_cfg: u64,
    smbase: u64,
    smi_count: u64,
    wall_clock: u64,
    system_time: u64,
    system_time_old: bool,
    time_version: u32,
    steal_time: u64,
    pv_eoi: u64,
    async_pf: u64,
    poll_control: u64,
    guest_stopped: bool,
}

impl Msrs {
    pub fn new(vendor: Vendor) -> Self {
        Msrs {
            vendor,
            pat: PAT_RESET,
            mtrr_fixed: [0; 11],
            mtrr_variable: [0; 16],
            mtrr_default: 0,
            misc_enable: MISC_ENABLE_RESET,
            mce: Mce::default(),
            power_ctl: 0,
            tsc_adjust: 0,
            spec_ctrl: 0,
            arch_capabilities: ARCH_CAPABILITIES,
            platform_info: PLATFORM_CPUID_FAULTING,
            misc_features: 0,
            microcode: match vendor {
                Vendor::Intel => 0x1_0000_0000,
                Vendor::Amd => 0x0100_0065,
            },
            hwcr: 0,
            de_cfg: 0,
            smbase: SMBASE_RESET,
            smi_count: 0,
            wall_clock: 0,
            system_time: 0,
            system_time_old: false,
            time_version: 0,
            steal_time: 0,
            pv_eoi: 0,
            async_pf: 0,
            poll_control: 1,
            guest_stopped: false,
        }
    }

    /// The host's vendor.
    pub fn vendor(&self) -> Vendor {
        self.vendor
    }

    /// MISC_ENABLE says that MONITOR and MWAIT are there.
    pub fn monitor_enabled(&self) -> bool {
        self.misc_enable & MISC_ENABLE_MWAIT != 0
    }

    /// CPUID is #GP for programs.
    pub fn cpuid_faulting(&self) -> bool {
        self.misc_features & CPUID_FAULTING != 0
    }

    /// SMBASE.
    pub fn smbase(&self) -> u64 {
        self.smbase
    }

    /// RSM sets it.
    pub fn set_smbase(&mut self, value: u64) {
        self.smbase = value;
    }

    /// An SMI was taken.
    pub fn count_smi(&mut self) {
        self.smi_count = self.smi_count.wrapping_add(1);
    }

    /// MSR_KVM_PV_EOI_EN.
    pub fn pv_eoi(&self) -> u64 {
        self.pv_eoi
    }

    /// MSR_KVM_STEAL_TIME.
    pub fn steal_time(&self) -> u64 {
        self.steal_time
    }

    /// Index into `mtrr_fixed`.
    fn fixed(index: u32) -> Option<usize> {
        Some(match index {
            msr::MTRR_FIX64K => 0,
            msr::MTRR_FIX16K_0 => 1,
            msr::MTRR_FIX16K_1 => 2,
            msr::MTRR_FIX4K_0..=msr::MTRR_FIX4K_7 => 3 + (index - msr::MTRR_FIX4K_0) as usize,
            _ => return None,
        })
    }
}

/// KVM_GET_MSR_INDEX_LIST: what there is to save and restore.
pub const INDEX_LIST: &[u32] = &[
    msr::SYSENTER_CS,
    msr::SYSENTER_ESP,
    msr::SYSENTER_EIP,
    msr::STAR,
    msr::CSTAR,
    msr::KERNEL_GS_BASE,
    msr::FMASK,
    msr::LSTAR,
    msr::TSC,
    msr::PAT,
    msr::TSC_AUX,
    msr::SPEC_CTRL,
    msr::ARCH_CAPABILITIES,
    msr::EFER,
    msr::FS_BASE,
    msr::GS_BASE,
    msr::APIC_BASE,
    msr::TSC_ADJUST,
    msr::TSC_DEADLINE,
    msr::MISC_ENABLE,
    msr::MISC_FEATURES_ENABLES,
    msr::PLATFORM_INFO,
    msr::POWER_CTL,
    msr::MCG_STATUS,
    msr::MCG_CTL,
    msr::SMBASE,
    msr::SMI_COUNT,
    msr::BIOS_SIGN_ID,
    msr::MTRR_DEF_TYPE,
    msr::MTRR_FIX64K,
    msr::MTRR_FIX16K_0,
    msr::MTRR_FIX16K_1,
    msr::MTRR_FIX4K_0,
    msr::MTRR_FIX4K_0 + 1,
    msr::MTRR_FIX4K_0 + 2,
    msr::MTRR_FIX4K_0 + 3,
    msr::MTRR_FIX4K_0 + 4,
    msr::MTRR_FIX4K_0 + 5,
    msr::MTRR_FIX4K_0 + 6,
    msr::MTRR_FIX4K_7,
    0x200,
    0x201,
    0x202,
    0x203,
    0x204,
    0x205,
    0x206,
    0x207,
    0x208,
    0x209,
    0x20a,
    0x20b,
    0x20c,
    0x20d,
    0x20e,
    0x20f,
    msr::AMD_HWCR,
    msr::KVM_WALL_CLOCK,
    msr::KVM_SYSTEM_TIME,
    msr::KVM_WALL_CLOCK_NEW,
    msr::KVM_SYSTEM_TIME_NEW,
    msr::KVM_ASYNC_PF_EN,
    msr::KVM_STEAL_TIME,
    msr::KVM_PV_EOI_EN,
    msr::KVM_POLL_CONTROL,
];

/// KVM_GET_MSR_FEATURE_INDEX_LIST.
pub const FEATURE_LIST: &[u32] = &[
    msr::ARCH_CAPABILITIES,
    msr::BIOS_SIGN_ID,
    msr::PLATFORM_INFO,
    msr::AMD_DE_CFG,
    msr::PERF_CAPABILITIES,
];

/// A feature MSR's value (KVM_GET_MSRS on the system).
pub fn feature(index: u32, vendor: Vendor) -> Option<u64> {
    let msrs = Msrs::new(vendor);
    Some(match index {
        msr::ARCH_CAPABILITIES => msrs.arch_capabilities,
        msr::BIOS_SIGN_ID => msrs.microcode,
        msr::PLATFORM_INFO => msrs.platform_info,
        msr::AMD_DE_CFG => msr::AMD_DE_CFG_LFENCE,
        // No performance counters.
        msr::PERF_CAPABILITIES => 0,
        _ => return None,
    })
}

/// Sign-extended from bit 47.
fn canonical(address: u64) -> bool {
    ((address << 16) as i64 >> 16) as u64 == address
}

/// PAT memory types and MTRR types that exist.
fn memory_type(kind: u8, pat: bool) -> bool {
    matches!(kind, 0 | 1 | 4 | 5 | 6) || (pat && kind == 7)
}

/// Why an MSR access cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// There is no such MSR.
    Unknown,
    /// There is, but not for this vCPU, or not with this value.
    Invalid,
}

impl Fault {
    /// Of an access to MSR `index` that was refused.
    fn of(index: u32) -> Self {
        let known = INDEX_LIST.contains(&index)
            || FEATURE_LIST.contains(&index)
            || Mce::owns(index)
            || matches!(
                index,
                msr::X2APIC_BASE..=msr::X2APIC_END
                    | msr::MTRRCAP
                    | msr::PRED_CMD
                    | msr::FLUSH_CMD
                    | msr::DEBUGCTL
                    | msr::PERF_STATUS
                    | msr::PERF_CTL
                    | msr::AMD_BU_CFG2
                    | msr::K7_EVNTSEL0..=msr::K7_PERFCTR3
            );
        if known {
            Fault::Invalid
        } else {
            Fault::Unknown
        }
    }
}

impl VcpuEnv {
    /// RDMSR, or KVM_GET_MSRS where `host`.
    pub fn get_msr(&mut self, cpu: &CpuState, index: u32, host: bool) -> Result<u64, Fault> {
        self.read_msr(cpu, index, host).ok_or(Fault::of(index))
    }

    /// WRMSR, or KVM_SET_MSRS where `host`.
    pub fn set_msr(
        &mut self,
        cpu: &mut CpuState,
        index: u32,
        value: u64,
        host: bool,
    ) -> Result<(), Fault> {
        self.write_msr(cpu, index, value, host)
            .ok_or(Fault::of(index))
    }

    /// Whether the guest's CPUID shows what KVM's own MSR belongs to, where that matters.
    fn pv_msr_offered(&self, index: u32) -> bool {
        let feature = match index {
            msr::KVM_WALL_CLOCK | msr::KVM_SYSTEM_TIME => kvm_feature::CLOCKSOURCE,
            msr::KVM_WALL_CLOCK_NEW | msr::KVM_SYSTEM_TIME_NEW => kvm_feature::CLOCKSOURCE2,
            msr::KVM_ASYNC_PF_EN => kvm_feature::ASYNC_PF,
            msr::KVM_STEAL_TIME => kvm_feature::STEAL_TIME,
            msr::KVM_PV_EOI_EN => kvm_feature::PV_EOI,
            msr::KVM_POLL_CONTROL => kvm_feature::POLL_CONTROL,
            _ => return true,
        };
        self.pv_offered(feature)
    }

    /// Whether the guest may use one of KVM's own features.
    pub fn pv_offered(&self, feature: u32) -> bool {
        !self.enforce_pv_cpuid || self.cpuid.kvm_features() & feature != 0
    }

    /// RDMSR, or KVM_GET_MSRS where `host`. `None`: #GP.
    fn read_msr(&mut self, cpu: &CpuState, index: u32, host: bool) -> Option<u64> {
        if !self.pv_msr_offered(index) {
            return None;
        }
        let m = &self.msrs;
        let amd = m.vendor == Vendor::Amd;
        Some(match index {
            msr::FS_BASE => cpu.seg[sreg::FS].base,
            msr::GS_BASE => cpu.seg[sreg::GS].base,
            msr::KERNEL_GS_BASE => cpu.kernel_gs_base,
            msr::EFER => cpu.efer,
            msr::STAR => cpu.star,
            msr::LSTAR => cpu.lstar,
            msr::CSTAR => cpu.cstar,
            msr::FMASK => cpu.fmask,
            msr::SYSENTER_CS => cpu.sysenter_cs,
            // Without SYSENTER in long mode, AMD's processors have no more than 32 bits of these.
            msr::SYSENTER_ESP if self.features.amd => cpu.sysenter_esp & 0xffff_ffff,
            msr::SYSENTER_EIP if self.features.amd => cpu.sysenter_eip & 0xffff_ffff,
            msr::SYSENTER_ESP => cpu.sysenter_esp,
            msr::SYSENTER_EIP => cpu.sysenter_eip,
            msr::TSC_AUX if host || self.has_tsc_aux() => cpu.tsc_aux,
            msr::TSC => self.vm.host.tsc().wrapping_add(cpu.tsc_offset),
            msr::TSC_ADJUST => m.tsc_adjust,
            msr::TSC_DEADLINE => self.shared.lapic().map_or(0, |l| l.lock().tsc_deadline()),
            msr::APIC_BASE => self.apic_base(),
            msr::X2APIC_BASE..=msr::X2APIC_END => return self.x2apic_read(index),
            msr::PAT => m.pat,
            msr::MTRRCAP => MTRRCAP,
            msr::MTRR_DEF_TYPE => m.mtrr_default,
            msr::MTRR_PHYSBASE0..=msr::MTRR_PHYSMASK7 => {
                m.mtrr_variable[(index - msr::MTRR_PHYSBASE0) as usize]
            }
            _ if Msrs::fixed(index).is_some() => m.mtrr_fixed[Msrs::fixed(index)?],
            msr::MISC_ENABLE => m.misc_enable,
            msr::MISC_FEATURES_ENABLES => m.misc_features,
            msr::PLATFORM_INFO if host || !self.vm.settings.hide_platform_info() => m.platform_info,
            msr::POWER_CTL => m.power_ctl,
            msr::ARCH_CAPABILITIES if host || self.has_arch_capabilities() => m.arch_capabilities,
            msr::SPEC_CTRL if host || self.has_spec_ctrl() => m.spec_ctrl,
            msr::PERF_CAPABILITIES if host => 0,
            msr::BIOS_SIGN_ID => m.microcode,
            msr::SMBASE if host => m.smbase,
            msr::SMI_COUNT => m.smi_count,
            _ if Mce::owns(index) => return m.mce.read(index, host),
            msr::PERF_STATUS => 1000 | 4 << 40,
            msr::FSB_FREQ => 3,
            // EBC_FREQUENCY_ID: a bus at 100 MHz, as KVM says.
            0x2c => 1 << 24,
            msr::BBL_CR_CTL3 => 0xbe70_2111,
            msr::P5_MC_ADDR
            | msr::P5_MC_TYPE
            | msr::PLATFORM_ID
            | msr::EBL_CR_POWERON
            | msr::DEBUGCTL
            | msr::LASTBRANCHFROMIP
            | msr::LASTBRANCHTOIP
            | msr::LASTINTFROMIP
            | msr::LASTINTTOIP
            | msr::PERF_CTL => 0,
            // RAPL: no energy counters.
            msr::RAPL_POWER_UNIT | 0x611 | 0x619 | 0x639 | 0x641 => 0,
            msr::AMD_HWCR if amd || host => m.hwcr,
            msr::AMD_DE_CFG if amd || host => m.de_cfg,
            msr::K7_EVNTSEL0..=msr::K7_PERFCTR3
            | msr::AMD_SYSCFG
            | msr::AMD_NB_CFG
            | msr::AMD_INT_PENDING
            | msr::AMD_MMIO_CONF_BASE
            | msr::AMD_VM_CR
            | msr::AMD_DC_CFG
            | msr::AMD_BU_CFG2
            | msr::AMD_LS_CFG
            | msr::AMD_RAPL_POWER_UNIT
            | msr::AMD_TOP_MEM
            | msr::AMD_TOP_MEM2
            // TSEG base and mask, VM_HSAVE_PA, TW_CFG, EX_CFG
            | 0xc001_0112
            | 0xc001_0113
            | 0xc001_0117
            | 0xc001_1023
            | 0xc001_102c
                if amd =>
            {
                0
            }
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => m.wall_clock,
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => m.system_time,
            msr::KVM_ASYNC_PF_EN => m.async_pf,
            msr::KVM_STEAL_TIME => m.steal_time,
            msr::KVM_PV_EOI_EN => m.pv_eoi,
            msr::KVM_POLL_CONTROL => m.poll_control,
            _ => return None,
        })
    }

    /// WRMSR, or KVM_SET_MSRS where `host`. `None`: #GP.
    fn write_msr(&mut self, cpu: &mut CpuState, index: u32, value: u64, host: bool) -> Option<()> {
        if !self.pv_msr_offered(index) {
            return None;
        }
        let ok = |condition: bool| condition.then_some(());
        let amd = self.msrs.vendor == Vendor::Amd;
        match index {
            msr::FS_BASE => {
                ok(canonical(value))?;
                cpu.seg[sreg::FS].base = value;
            }
            msr::GS_BASE => {
                ok(canonical(value))?;
                cpu.seg[sreg::GS].base = value;
            }
            msr::KERNEL_GS_BASE => {
                ok(canonical(value))?;
                cpu.kernel_gs_base = value;
            }
            msr::LSTAR => {
                ok(canonical(value))?;
                cpu.lstar = value;
            }
            msr::CSTAR => {
                ok(canonical(value))?;
                cpu.cstar = value;
            }
            msr::SYSENTER_ESP => {
                ok(canonical(value))?;
                cpu.sysenter_esp = value;
            }
            msr::SYSENTER_EIP => {
                ok(canonical(value))?;
                cpu.sysenter_eip = value;
            }
            msr::EFER => self.set_efer(cpu, value, host)?,
            msr::STAR => cpu.star = value,
            msr::FMASK => cpu.fmask = value & 0xffff_ffff,
            msr::SYSENTER_CS => cpu.sysenter_cs = value & 0xffff_ffff,
            msr::TSC_AUX if host || self.has_tsc_aux() => {
                // AMD's processors ignore what Intel's refuse.
                ok(value >> 32 == 0 || self.features.amd)?;
                cpu.tsc_aux = value & 0xffff_ffff;
            }
            msr::TSC => self.write_tsc(cpu, value, host),
            msr::TSC_ADJUST => {
                if self.features.leaf7_ebx & leaf7_ebx::TSC_ADJUST != 0 && !host {
                    let delta = value.wrapping_sub(self.msrs.tsc_adjust);
                    self.set_tsc_offset(cpu, cpu.tsc_offset.wrapping_add(delta));
                }
                self.msrs.tsc_adjust = value;
            }
            msr::TSC_DEADLINE => {
                if let Some(lapic) = self.shared.lapic() {
                    lapic.lock().set_tsc_deadline(value);
                    self.arm_timer();
                }
            }
            msr::APIC_BASE => match self.shared.lapic() {
                Some(lapic) => lapic.lock().set_base(value, host).ok()?,
                None => self.user_apic_base = value,
            },
            msr::X2APIC_BASE..=msr::X2APIC_END => self.x2apic_write(index, value)?,
            msr::PAT => {
                ok(value.to_le_bytes().iter().all(|&b| memory_type(b, true)))?;
                self.msrs.pat = value;
            }
            msr::MTRR_DEF_TYPE => {
                ok(value & !0xcff == 0 && memory_type(value as u8, false))?;
                self.msrs.mtrr_default = value;
            }
            msr::MTRR_PHYSBASE0..=msr::MTRR_PHYSMASK7 => {
                let beyond = u64::MAX << self.features.phys_bits.min(63);
                let reserved = if index & 1 == 0 { 0xf00 } else { 0x7ff };
                ok(value & (beyond | reserved) == 0)?;
                ok(index & 1 == 1 || memory_type(value as u8, false))?;
                self.msrs.mtrr_variable[(index - msr::MTRR_PHYSBASE0) as usize] = value;
            }
            _ if Msrs::fixed(index).is_some() => {
                ok(value.to_le_bytes().iter().all(|&b| memory_type(b, false)))?;
                self.msrs.mtrr_fixed[Msrs::fixed(index)?] = value;
            }
            msr::MTRRCAP => ok(host && value == MTRRCAP)?,
            msr::MISC_ENABLE => {
                let (old, mut value) = (self.msrs.misc_enable, value);
                if !host {
                    ok((old ^ value) & MISC_ENABLE_FIXED == 0)?;
                    value = value & !MISC_ENABLE_IGNORED | old & MISC_ENABLE_IGNORED;
                }
                self.msrs.misc_enable = value;
                self.refresh_settings();
            }
            msr::MISC_FEATURES_ENABLES => {
                let offered = self.msrs.platform_info & PLATFORM_CPUID_FAULTING != 0;
                ok(value & !CPUID_FAULTING == 0 && (value == 0 || offered))?;
                self.msrs.misc_features = value;
                self.refresh_settings();
            }
            msr::PLATFORM_INFO => {
                let offered = value & PLATFORM_CPUID_FAULTING != 0;
                ok(host && (offered || !self.msrs.cpuid_faulting()))?;
                self.msrs.platform_info = value;
            }
            msr::POWER_CTL => self.msrs.power_ctl = value,
            msr::ARCH_CAPABILITIES => {
                ok(host)?;
                self.msrs.arch_capabilities = value;
            }
            msr::PERF_CAPABILITIES => ok(host && value == 0)?,
            msr::SPEC_CTRL if host || self.has_spec_ctrl() => {
                ok(value & !0x7 == 0)?;
                self.msrs.spec_ctrl = value;
            }
            msr::PRED_CMD if host || self.has_spec_ctrl() => ok(value & !1 == 0)?,
            msr::FLUSH_CMD => {
                let offered = self.features.leaf7_edx & leaf7_edx::FLUSH_L1D != 0;
                ok((host || offered) && value & !1 == 0)?;
            }
            msr::BIOS_SIGN_ID => {
                if host {
                    self.msrs.microcode = value;
                }
            }
            msr::BIOS_UPDT_TRIG | msr::AMD_PATCH_LOADER => {}
            msr::SMBASE => {
                ok(host)?;
                self.msrs.smbase = value;
            }
            msr::SMI_COUNT => {
                ok(host)?;
                self.msrs.smi_count = value;
            }
            _ if Mce::owns(index) => {
                let writable = self.msrs.hwcr & HWCR_MC_STATUS_WRITE != 0;
                self.msrs.mce.write(index, value, host, writable)?;
            }
            msr::DEBUGCTL => ok(value & !3 == 0)?,
            msr::PERF_CTL | msr::PERF_STATUS | msr::EBL_CR_POWERON => {}
            msr::AMD_HWCR if amd || host => {
                // FFDIS, MONMWAITUSEREN and TLBCACHEDIS mean nothing here.
                let value = value & !(1 << 6 | 1 << 8 | 1 << 3);
                ok(value & !(HWCR_MC_STATUS_WRITE | HWCR_TSC_AT_P0) == 0)?;
                self.msrs.hwcr = value;
            }
            msr::AMD_DE_CFG if amd || host => {
                ok(value & !msr::AMD_DE_CFG_LFENCE == 0)?;
                self.msrs.de_cfg = value;
            }
            msr::AMD_BU_CFG2 | msr::K7_EVNTSEL0..=msr::K7_PERFCTR3 if amd => ok(value == 0)?,
            msr::AMD_SYSCFG
            | msr::AMD_NB_CFG
            | msr::AMD_VM_CR
            | msr::AMD_DC_CFG
            | msr::AMD_LS_CFG
            | 0xc001_0117
                if amd => {}
            msr::KVM_WALL_CLOCK | msr::KVM_WALL_CLOCK_NEW => {
                self.msrs.wall_clock = value;
                if !host {
                    self.write_wall_clock(value);
                }
            }
            msr::KVM_SYSTEM_TIME | msr::KVM_SYSTEM_TIME_NEW => {
                self.msrs.system_time = value;
                self.msrs.system_time_old = index == msr::KVM_SYSTEM_TIME;
                self.write_time_info(cpu);
            }
            // The host may deliver page faults asynchronously; it never has to here.
            msr::KVM_ASYNC_PF_EN => {
                // Neither as a nested exit nor as an interrupt, and no reserved bit.
                ok(value & 0x3c == 0)?;
                self.msrs.async_pf = value;
            }
            msr::KVM_STEAL_TIME => {
                ok(value & 0x3e == 0)?;
                self.msrs.steal_time = value;
                if value & 1 != 0 {
                    self.start_steal_time(host);
                }
            }
            msr::KVM_PV_EOI_EN => {
                ok(value & 2 == 0)?;
                self.sync_pv_eoi();
                self.msrs.pv_eoi = value;
            }
            msr::KVM_POLL_CONTROL => {
                ok(value & !1 == 0)?;
                self.msrs.poll_control = value;
            }
            _ => return None,
        }
        Some(())
    }

    /// RDTSCP or RDPID reads it.
    fn has_tsc_aux(&self) -> bool {
        self.features.ext1_edx & ext1_edx::RDTSCP != 0
            || self.features.leaf7_ecx & leaf7_ecx::RDPID != 0
    }

    fn has_arch_capabilities(&self) -> bool {
        self.features.leaf7_edx & leaf7_edx::ARCH_CAPABILITIES != 0
    }

    fn has_spec_ctrl(&self) -> bool {
        let amd = self.cpuid.regs(0x8000_0008, 0)[1];
        // IBRS_ALL of ARCH_CAPABILITIES makes guests set IBRS, whatever the vendor.
        self.has_arch_capabilities()
            || self.features.leaf7_edx & leaf7_edx::SPEC_CTRL != 0
            || amd & (7 << 12) != 0
    }

    /// Engines notice a change of EFER themselves: it is in the CPU state that they pass.
    fn set_efer(&mut self, cpu: &mut CpuState, value: u64, host: bool) -> Option<()> {
        let mut allowed = self.features.efer_allowed;
        if host {
            // User space may restore state before it sets CPUID.
            allowed |= efer::SCE | efer::LME | efer::LMA | efer::NX | efer::FFXSR | efer::AUTOIBRS;
        }
        if value & !(allowed | efer::LMA) != 0 {
            return None;
        }
        if !host && cpu.cr0 & cr0::PG != 0 && (value ^ cpu.efer) & efer::LME != 0 {
            return None;
        }
        let lma = if host { value } else { cpu.efer } & efer::LMA;
        cpu.efer = value & !efer::LMA | lma;
        Some(())
    }

    // Time.

    /// Starts the TSC of a new vCPU: 0 for the first, in step with it for the others.
    pub fn init_tsc(&mut self, cpu: &mut CpuState) {
        let offset = self.host_tsc_write(0, false);
        self.set_tsc_offset(cpu, offset);
    }

    pub fn set_tsc_offset(&mut self, cpu: &mut CpuState, offset: u64) {
        cpu.tsc_offset = offset;
        self.tsc_offset = offset;
        self.write_time_info(cpu);
        self.arm_timer();
    }

    /// A write of IA32_TSC. Values that user space writes to several vCPUs within about a second of
    /// the same moment mean that they shall be synchronized, as in KVM (since Linux 6.7 not with the 0 that vCPUs
    /// start with: a VM that is restored may have been young).
    fn write_tsc(&mut self, cpu: &mut CpuState, value: u64, host: bool) {
        let offset = if host {
            self.host_tsc_write(value, true)
        } else {
            let offset = value.wrapping_sub(self.vm.host.tsc());
            let delta = offset.wrapping_sub(cpu.tsc_offset);
            self.msrs.tsc_adjust = self.msrs.tsc_adjust.wrapping_add(delta);
            offset
        };
        self.set_tsc_offset(cpu, offset);
    }

    /// The offset for a TSC that is `value` now.
    fn host_tsc_write(&self, value: u64, by_user: bool) -> u64 {
        let now = self.vm.host.tsc();
        let mut offset = value.wrapping_sub(now);
        let hz = u64::from(self.vm.host.tsc_khz()) * 1000;
        let mut last = self.vm.tsc.lock();
        if last.valid {
            let expected = last.value.wrapping_add(now.wrapping_sub(last.host_tsc));
            if value == 0 || last.by_user && value.abs_diff(expected) < hz {
                offset = last.offset;
            }
        }
        *last = crate::vm::TscWrite {
            valid: true,
            by_user: by_user || last.by_user,
            host_tsc: now,
            value: now.wrapping_add(offset),
            offset,
        };
        offset
    }

    /// Tells the guest that it was stopped (KVM_KVMCLOCK_CTRL), so that its watchdogs keep still.
    /// `false`: it has no clock.
    pub fn set_guest_stopped(&mut self, cpu: &CpuState) -> bool {
        if self.msrs.system_time & 1 == 0 {
            return false;
        }
        self.msrs.guest_stopped = true;
        self.write_time_info(cpu);
        true
    }

    /// Writes the vCPU's kvmclock page: an odd version while it changes, an even one after.
    pub fn write_time_info(&mut self, cpu: &CpuState) {
        let address = self.msrs.system_time;
        if address & 1 == 0 {
            return;
        }
        let gpa = address & !1;
        let mut flags = 0;
        if !self.msrs.system_time_old {
            flags |= time_info::FLAG_TSC_STABLE;
        }
        if core::mem::take(&mut self.msrs.guest_stopped) {
            flags |= time_info::FLAG_GUEST_STOPPED;
        }
        let page = self.vm.kvmclock().time_info(cpu.tsc_offset, flags);
        let version = self.msrs.time_version.wrapping_add(2) & !1;
        self.msrs.time_version = version;
        let vm = self.vm.clone();
        let memory = &vm.memory;
        let odd = (version | 1).to_le_bytes();
        let ok = self.memory.write(memory, gpa, &odd)
            && self.memory.write(
                memory,
                gpa + time_info::TSC_TIMESTAMP as u64,
                &page[time_info::TSC_TIMESTAMP..],
            )
            && self
                .memory
                .write(memory, gpa, &version.wrapping_add(2).to_le_bytes());
        self.msrs.time_version = version.wrapping_add(2);
        if !ok {
            log::debug!("vcpu {}: no RAM at the kvmclock page", self.shared.id());
        }
    }

    /// Writes `pvclock_wall_clock`: the time of day when kvmclock was 0.
    fn write_wall_clock(&mut self, gpa: u64) {
        if gpa == 0 {
            return;
        }
        let vm = self.vm.clone();
        let mut version = [0; 4];
        if !self.memory.read(&vm.memory, gpa, &mut version) {
            return;
        }
        let version = u32::from_le_bytes(version) | 1;
        let boot = vm
            .host
            .realtime_ns()
            .saturating_sub(vm.kvmclock().ns(vm.host.tsc()));
        let mut time = [0; 8];
        time[..4].copy_from_slice(&((boot / 1_000_000_000) as u32).to_le_bytes());
        time[4..].copy_from_slice(&((boot % 1_000_000_000) as u32).to_le_bytes());
        let next = version.wrapping_add(1);
        let _ = self.memory.write(&vm.memory, gpa, &version.to_le_bytes())
            && self.memory.write(&vm.memory, gpa.wrapping_add(4), &time)
            && self.memory.write(&vm.memory, gpa, &next.to_le_bytes());
    }

    /// Puts what INIT and RESET change among these MSRs to its start value.
    pub fn reset_msrs(&mut self, init: bool) {
        self.msrs.smi_count = 0;
        // The memory behind these may become something else.
        self.msrs.system_time = 0;
        self.msrs.steal_time = 0;
        self.msrs.pv_eoi = 0;
        self.msrs.async_pf = 0;
        self.reset_paravirt();
        if !init {
            self.msrs.misc_features = 0;
            self.msrs.smbase = SMBASE_RESET;
            self.msrs.pat = PAT_RESET;
        }
    }
}
