//! The numbers of KVM's ioctls (`linux/kvm.h`): type 0xAE; the size of the argument is part of each number.

/// The type byte of every KVM ioctl (KVMIO).
pub const KVMIO: u32 = 0xae;

/// Whether a command is one of KVM's at all.
pub const fn is_kvm(cmd: u32) -> bool {
    (cmd >> 8) & 0xff == KVMIO
}

/// The size of the argument, as the number says it.
pub const fn size(cmd: u32) -> usize {
    ((cmd >> 16) & 0x3fff) as usize
}

// On `/dev/kvm`; some of them on VMs as well.

pub const KVM_GET_API_VERSION: u32 = 0x0000_ae00;
pub const KVM_CREATE_VM: u32 = 0x0000_ae01;
pub const KVM_GET_MSR_INDEX_LIST: u32 = 0xc004_ae02;
pub const KVM_CHECK_EXTENSION: u32 = 0x0000_ae03;
pub const KVM_GET_VCPU_MMAP_SIZE: u32 = 0x0000_ae04;
pub const KVM_GET_SUPPORTED_CPUID: u32 = 0xc008_ae05;
pub const KVM_GET_EMULATED_CPUID: u32 = 0xc008_ae09;
pub const KVM_GET_MSR_FEATURE_INDEX_LIST: u32 = 0xc004_ae0a;
pub const KVM_X86_GET_MCE_CAP_SUPPORTED: u32 = 0x8008_ae9d;

// On a VM.

pub const KVM_CREATE_VCPU: u32 = 0x0000_ae41;
pub const KVM_GET_DIRTY_LOG: u32 = 0x4010_ae42;
pub const KVM_CLEAR_DIRTY_LOG: u32 = 0xc018_aec0;
pub const KVM_SET_NR_MMU_PAGES: u32 = 0x0000_ae44;
pub const KVM_GET_NR_MMU_PAGES: u32 = 0x0000_ae45;
pub const KVM_SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
pub const KVM_SET_USER_MEMORY_REGION2: u32 = 0x40a0_ae49;
pub const KVM_SET_TSS_ADDR: u32 = 0x0000_ae47;
pub const KVM_SET_IDENTITY_MAP_ADDR: u32 = 0x4008_ae48;
pub const KVM_CREATE_IRQCHIP: u32 = 0x0000_ae60;
pub const KVM_IRQ_LINE: u32 = 0x4008_ae61;
pub const KVM_IRQ_LINE_STATUS: u32 = 0xc008_ae67;
pub const KVM_GET_IRQCHIP: u32 = 0xc208_ae62;
pub const KVM_SET_IRQCHIP: u32 = 0x8208_ae63;
pub const KVM_CREATE_PIT: u32 = 0x0000_ae64;
pub const KVM_CREATE_PIT2: u32 = 0x4040_ae77;
pub const KVM_GET_PIT: u32 = 0xc048_ae65;
pub const KVM_SET_PIT: u32 = 0x8048_ae66;
pub const KVM_GET_PIT2: u32 = 0x8070_ae9f;
pub const KVM_SET_PIT2: u32 = 0x4070_aea0;
pub const KVM_REINJECT_CONTROL: u32 = 0x0000_ae71;
pub const KVM_SET_GSI_ROUTING: u32 = 0x4008_ae6a;
pub const KVM_SET_BOOT_CPU_ID: u32 = 0x0000_ae78;
pub const KVM_IRQFD: u32 = 0x4020_ae76;
pub const KVM_IOEVENTFD: u32 = 0x4040_ae79;
pub const KVM_SIGNAL_MSI: u32 = 0x4020_aea5;
pub const KVM_SET_CLOCK: u32 = 0x4030_ae7b;
pub const KVM_GET_CLOCK: u32 = 0x8030_ae7c;
pub const KVM_CREATE_DEVICE: u32 = 0xc00c_aee0;
pub const KVM_X86_SET_MSR_FILTER: u32 = 0x4188_aec6;
pub const KVM_RESET_DIRTY_RINGS: u32 = 0x0000_aec7;
pub const KVM_SET_PMU_EVENT_FILTER: u32 = 0x4020_aeb2;
pub const KVM_REGISTER_COALESCED_MMIO: u32 = 0x4010_ae67;
pub const KVM_UNREGISTER_COALESCED_MMIO: u32 = 0x4010_ae68;

// On a vCPU; KVM_ENABLE_CAP and the TSC frequency on VMs as well.

pub const KVM_RUN: u32 = 0x0000_ae80;
pub const KVM_GET_REGS: u32 = 0x8090_ae81;
pub const KVM_SET_REGS: u32 = 0x4090_ae82;
pub const KVM_GET_SREGS: u32 = 0x8138_ae83;
pub const KVM_SET_SREGS: u32 = 0x4138_ae84;
pub const KVM_GET_SREGS2: u32 = 0x8140_aecc;
pub const KVM_SET_SREGS2: u32 = 0x4140_aecd;
pub const KVM_TRANSLATE: u32 = 0xc018_ae85;
pub const KVM_INTERRUPT: u32 = 0x4004_ae86;
pub const KVM_GET_MSRS: u32 = 0xc008_ae88;
pub const KVM_SET_MSRS: u32 = 0x4008_ae89;
pub const KVM_SET_CPUID: u32 = 0x4008_ae8a;
pub const KVM_SET_SIGNAL_MASK: u32 = 0x4004_ae8b;
pub const KVM_GET_FPU: u32 = 0x81a0_ae8c;
pub const KVM_SET_FPU: u32 = 0x41a0_ae8d;
pub const KVM_GET_LAPIC: u32 = 0x8400_ae8e;
pub const KVM_SET_LAPIC: u32 = 0x4400_ae8f;
pub const KVM_SET_CPUID2: u32 = 0x4008_ae90;
pub const KVM_GET_CPUID2: u32 = 0xc008_ae91;
pub const KVM_TPR_ACCESS_REPORTING: u32 = 0xc028_ae92;
pub const KVM_SET_VAPIC_ADDR: u32 = 0x4008_ae93;
pub const KVM_GET_MP_STATE: u32 = 0x8004_ae98;
pub const KVM_SET_MP_STATE: u32 = 0x4004_ae99;
pub const KVM_NMI: u32 = 0x0000_ae9a;
pub const KVM_SET_GUEST_DEBUG: u32 = 0x4048_ae9b;
pub const KVM_X86_SETUP_MCE: u32 = 0x4008_ae9c;
pub const KVM_X86_SET_MCE: u32 = 0x4040_ae9e;
pub const KVM_GET_VCPU_EVENTS: u32 = 0x8040_ae9f;
pub const KVM_SET_VCPU_EVENTS: u32 = 0x4040_aea0;
pub const KVM_GET_DEBUGREGS: u32 = 0x8080_aea1;
pub const KVM_SET_DEBUGREGS: u32 = 0x4080_aea2;
pub const KVM_GET_XSAVE: u32 = 0x9000_aea4;
pub const KVM_SET_XSAVE: u32 = 0x5000_aea5;
pub const KVM_GET_XSAVE2: u32 = 0x9000_aecf;
pub const KVM_GET_XCRS: u32 = 0x8188_aea6;
pub const KVM_SET_XCRS: u32 = 0x4188_aea7;
pub const KVM_KVMCLOCK_CTRL: u32 = 0x0000_aead;
pub const KVM_PRE_FAULT_MEMORY: u32 = 0xc040_aed5;
pub const KVM_SMI: u32 = 0x0000_aeb7;
pub const KVM_GET_NESTED_STATE: u32 = 0xc080_aebe;
pub const KVM_SET_NESTED_STATE: u32 = 0x4080_aebf;
pub const KVM_GET_TSC_KHZ: u32 = 0x0000_aea3;
pub const KVM_SET_TSC_KHZ: u32 = 0x0000_aea2;
pub const KVM_ENABLE_CAP: u32 = 0x4068_aea3;

// On several kinds.

pub const KVM_GET_STATS_FD: u32 = 0x0000_aece;
pub const KVM_SET_DEVICE_ATTR: u32 = 0x4018_aee1;
pub const KVM_GET_DEVICE_ATTR: u32 = 0x4018_aee2;
pub const KVM_HAS_DEVICE_ATTR: u32 = 0x4018_aee3;

#[cfg(test)]
mod tests {
    use super::*;
    use core::mem::size_of;

    #[test]
    fn sizes_are_the_structs() {
        macro_rules! sizes {
            ($($cmd:ident $ty:ident)*) => {
                $(assert_eq!(size($cmd), size_of::<crate::$ty>(), stringify!($cmd)); assert!(is_kvm($cmd));)*
            };
        }
        sizes! {
            KVM_GET_REGS kvm_regs KVM_SET_REGS kvm_regs KVM_GET_SREGS kvm_sregs KVM_SET_SREGS kvm_sregs
            KVM_GET_SREGS2 kvm_sregs2 KVM_SET_SREGS2 kvm_sregs2 KVM_TRANSLATE kvm_translation
            KVM_GET_FPU kvm_fpu KVM_SET_FPU kvm_fpu KVM_GET_LAPIC kvm_lapic_state
            KVM_SET_LAPIC kvm_lapic_state KVM_GET_MP_STATE kvm_mp_state KVM_SET_MP_STATE kvm_mp_state
            KVM_SET_GUEST_DEBUG kvm_guest_debug KVM_GET_VCPU_EVENTS kvm_vcpu_events
            KVM_SET_VCPU_EVENTS kvm_vcpu_events KVM_GET_DEBUGREGS kvm_debugregs
            KVM_SET_DEBUGREGS kvm_debugregs KVM_GET_XSAVE kvm_xsave KVM_SET_XSAVE kvm_xsave
            KVM_GET_XSAVE2 kvm_xsave KVM_GET_XCRS kvm_xcrs KVM_SET_XCRS kvm_xcrs
            KVM_SET_USER_MEMORY_REGION kvm_userspace_memory_region KVM_GET_DIRTY_LOG kvm_dirty_log
            KVM_CLEAR_DIRTY_LOG kvm_clear_dirty_log KVM_IRQ_LINE kvm_irq_level
            KVM_IRQ_LINE_STATUS kvm_irq_level KVM_GET_IRQCHIP kvm_irqchip KVM_CREATE_PIT2 kvm_pit_config
            KVM_GET_PIT2 kvm_pit_state2 KVM_SET_PIT2 kvm_pit_state2 KVM_IRQFD kvm_irqfd
            KVM_IOEVENTFD kvm_ioeventfd KVM_SIGNAL_MSI kvm_msi KVM_SET_CLOCK kvm_clock_data
            KVM_GET_CLOCK kvm_clock_data KVM_CREATE_DEVICE kvm_create_device
            KVM_GET_DEVICE_ATTR kvm_device_attr KVM_ENABLE_CAP kvm_enable_cap KVM_GET_MSRS list_head
            KVM_SET_MSRS list_head KVM_GET_CPUID2 list_head KVM_SET_CPUID2 list_head
            KVM_SET_GSI_ROUTING list_head KVM_PRE_FAULT_MEMORY kvm_pre_fault_memory KVM_SET_USER_MEMORY_REGION2 kvm_userspace_memory_region2
            KVM_GET_NESTED_STATE kvm_nested_state KVM_SET_NESTED_STATE kvm_nested_state
            KVM_GET_PIT kvm_pit_state KVM_REGISTER_COALESCED_MMIO kvm_coalesced_mmio_zone
        }
    }
}
