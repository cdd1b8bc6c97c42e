//! Capabilities: what KVM_CHECK_EXTENSION answers.

/// KVM_CAP_* numbers, as far as they are answered with anything but 0.
pub mod nr {
    pub const IRQCHIP: u32 = 0;
    pub const HLT: u32 = 1;
    pub const MMU_SHADOW_CACHE_CONTROL: u32 = 2;
    pub const USER_MEMORY: u32 = 3;
    pub const SET_TSS_ADDR: u32 = 4;
    pub const EXT_CPUID: u32 = 7;
    pub const CLOCKSOURCE: u32 = 8;
    pub const NR_VCPUS: u32 = 9;
    pub const NR_MEMSLOTS: u32 = 10;
    pub const PIT: u32 = 11;
    pub const NOP_IO_DELAY: u32 = 12;
    pub const MP_STATE: u32 = 14;
    pub const COALESCED_MMIO: u32 = 15;
    pub const SYNC_MMU: u32 = 16;
    pub const DESTROY_MEMORY_REGION_WORKS: u32 = 21;
    pub const USER_NMI: u32 = 22;
    pub const SET_GUEST_DEBUG: u32 = 23;
    pub const REINJECT_CONTROL: u32 = 24;
    pub const IRQ_ROUTING: u32 = 25;
    pub const IRQ_INJECT_STATUS: u32 = 26;
    pub const JOIN_MEMORY_REGIONS_WORKS: u32 = 30;
    pub const MCE: u32 = 31;
    pub const IRQFD: u32 = 32;
    pub const PIT2: u32 = 33;
    pub const SET_BOOT_CPU_ID: u32 = 34;
    pub const PIT_STATE2: u32 = 35;
    pub const IOEVENTFD: u32 = 36;
    pub const SET_IDENTITY_MAP_ADDR: u32 = 37;
    pub const ADJUST_CLOCK: u32 = 39;
    pub const INTERNAL_ERROR_DATA: u32 = 40;
    pub const VCPU_EVENTS: u32 = 41;
    pub const PCI_SEGMENT: u32 = 47;
    pub const INTR_SHADOW: u32 = 49;
    pub const DEBUGREGS: u32 = 50;
    pub const X86_ROBUST_SINGLESTEP: u32 = 51;
    pub const XSAVE: u32 = 55;
    pub const XCRS: u32 = 56;
    pub const ASYNC_PF: u32 = 59;
    pub const TSC_CONTROL: u32 = 60;
    pub const GET_TSC_KHZ: u32 = 61;
    pub const MAX_VCPUS: u32 = 66;
    pub const TSC_DEADLINE_TIMER: u32 = 72;
    pub const SYNC_REGS: u32 = 74;
    pub const KVMCLOCK_CTRL: u32 = 76;
    pub const SIGNAL_MSI: u32 = 77;
    pub const READONLY_MEM: u32 = 81;
    pub const IRQFD_RESAMPLE: u32 = 82;
    pub const DEVICE_CTRL: u32 = 89;
    pub const EXT_EMUL_CPUID: u32 = 95;
    pub const IOAPIC_POLARITY_IGNORED: u32 = 97;
    pub const ENABLE_CAP_VM: u32 = 98;
    pub const CHECK_EXTENSION_VM: u32 = 105;
    pub const IOEVENTFD_NO_LENGTH: u32 = 111;
    pub const DISABLE_QUIRKS: u32 = 116;
    pub const X86_SMM: u32 = 117;
    pub const MULTI_ADDRESS_SPACE: u32 = 118;
    pub const SPLIT_IRQCHIP: u32 = 121;
    pub const IOEVENTFD_ANY_LENGTH: u32 = 122;
    pub const VCPU_ATTRIBUTES: u32 = 127;
    pub const MAX_VCPU_ID: u32 = 128;
    pub const X2APIC_API: u32 = 129;
    pub const IMMEDIATE_EXIT: u32 = 136;
    pub const X86_DISABLE_EXITS: u32 = 143;
    pub const GET_MSR_FEATURES: u32 = 153;
    pub const MSR_PLATFORM_INFO: u32 = 159;
    pub const COALESCED_PIO: u32 = 162;
    pub const EXCEPTION_PAYLOAD: u32 = 164;
    pub const MANUAL_DIRTY_LOG_PROTECT2: u32 = 168;
    pub const HALT_POLL: u32 = 182;
    pub const STEAL_TIME: u32 = 187;
    pub const X86_USER_SPACE_MSR: u32 = 188;
    pub const X86_MSR_FILTER: u32 = 189;
    pub const ENFORCE_PV_FEATURE_CPUID: u32 = 190;
    pub const DIRTY_LOG_RING: u32 = 192;
    pub const SET_GUEST_DEBUG2: u32 = 195;
    pub const SREGS2: u32 = 200;
    pub const BINARY_STATS_FD: u32 = 203;
    pub const EXIT_ON_EMULATION_FAILURE: u32 = 204;
    pub const XSAVE2: u32 = 208;
    pub const SYS_ATTRIBUTES: u32 = 209;
    pub const DISABLE_QUIRKS2: u32 = 213;
    pub const VM_TSC_CONTROL: u32 = 214;
    pub const X86_TRIPLE_FAULT_EVENT: u32 = 218;
    pub const DIRTY_LOG_RING_ACQ_REL: u32 = 223;
    pub const USER_MEMORY2: u32 = 231;
    pub const VM_TYPES: u32 = 235;
    pub const PRE_FAULT_MEMORY: u32 = 236;
    pub const X86_APIC_BUS_CYCLES_NS: u32 = 237;
}

/// Most vCPUs of a VM.
pub const MAX_VCPUS: u32 = 1024;
/// Highest vCPU id plus one; those above 254 need x2APIC.
pub const MAX_VCPU_ID: u32 = 4096;

/// The value of capability `cap`; 0 for what is not served.
pub const fn value(cap: u32) -> i32 {
    match cap {
        nr::NR_VCPUS => 16,
        nr::MAX_VCPUS => MAX_VCPUS as i32,
        nr::MAX_VCPU_ID => MAX_VCPU_ID as i32,
        nr::NR_MEMSLOTS => 32764,
        // KVM_MAX_IRQ_ROUTES
        nr::IRQ_ROUTING => 4096,
        nr::XSAVE2 => 4096,
        // Banks.
        nr::MCE => 32,
        nr::SYNC_REGS => super::run::sync::ALL as i32,
        // Ordinary memory, and SMM's.
        nr::MULTI_ADDRESS_SPACE => 2,
        nr::X86_DISABLE_EXITS => super::disable_exits::SERVED as i32,
        nr::DISABLE_QUIRKS2 => super::quirk::VALID as i32,
        nr::SET_GUEST_DEBUG2 => super::guestdbg::VALID as i32,
        nr::ADJUST_CLOCK => {
            (super::clock::TSC_STABLE | super::clock::REALTIME | super::clock::HOST_TSC) as i32
        }
        // Where the ring is in a vCPU's mapping, in pages.
        nr::COALESCED_MMIO => (super::run::COALESCED_OFFSET / 4096) as i32,
        // The largest ring, in bytes.
        nr::DIRTY_LOG_RING | nr::DIRTY_LOG_RING_ACQ_REL => 65536 * 16,
        nr::X2APIC_API => super::x2apic_api::VALID as i32,
        nr::MANUAL_DIRTY_LOG_PROTECT2 => 3,
        nr::IRQCHIP
        | nr::DEVICE_CTRL
        | nr::MMU_SHADOW_CACHE_CONTROL
        | nr::USER_MEMORY2
        | nr::COALESCED_PIO
        | nr::SET_BOOT_CPU_ID
        | nr::SPLIT_IRQCHIP
        | nr::BINARY_STATS_FD
        | nr::HLT
        | nr::USER_MEMORY
        | nr::SET_TSS_ADDR
        | nr::EXT_CPUID
        | nr::CLOCKSOURCE
        | nr::NOP_IO_DELAY
        | nr::MP_STATE
        | nr::SYNC_MMU
        | nr::DESTROY_MEMORY_REGION_WORKS
        | nr::USER_NMI
        | nr::REINJECT_CONTROL
        | nr::IRQ_INJECT_STATUS
        | nr::IRQFD
        | nr::PIT2
        | nr::PIT_STATE2
        | nr::IOEVENTFD
        | nr::SET_IDENTITY_MAP_ADDR
        | nr::INTERNAL_ERROR_DATA
        | nr::JOIN_MEMORY_REGIONS_WORKS
        | nr::VCPU_EVENTS
        | nr::DEBUGREGS
        | nr::SET_GUEST_DEBUG
        | nr::X86_ROBUST_SINGLESTEP
        | nr::XSAVE
        | nr::XCRS
        | nr::GET_TSC_KHZ
        | nr::TSC_DEADLINE_TIMER
        | nr::SIGNAL_MSI
        | nr::READONLY_MEM
        | nr::IRQFD_RESAMPLE
        | nr::IOAPIC_POLARITY_IGNORED
        | nr::CHECK_EXTENSION_VM
        | nr::IOEVENTFD_NO_LENGTH
        | nr::IOEVENTFD_ANY_LENGTH
        | nr::KVMCLOCK_CTRL
        | nr::DISABLE_QUIRKS
        | nr::X86_SMM
        | nr::VCPU_ATTRIBUTES
        | nr::GET_MSR_FEATURES
        | nr::MSR_PLATFORM_INFO
        | nr::EXCEPTION_PAYLOAD
        | nr::X86_USER_SPACE_MSR
        | nr::X86_MSR_FILTER
        | nr::ENFORCE_PV_FEATURE_CPUID
        | nr::SREGS2
        | nr::EXIT_ON_EMULATION_FAILURE
        | nr::SYS_ATTRIBUTES
        | nr::X86_TRIPLE_FAULT_EVENT
        | nr::PIT
        | nr::PCI_SEGMENT
        | nr::INTR_SHADOW
        | nr::ASYNC_PF
        | nr::EXT_EMUL_CPUID
        | nr::ENABLE_CAP_VM
        | nr::HALT_POLL
        | nr::STEAL_TIME
        | nr::PRE_FAULT_MEMORY
        // A bit per type of VM: the default one.
        | nr::VM_TYPES
        // The default length of a bus cycle.
        | nr::X86_APIC_BUS_CYCLES_NS
        | nr::IMMEDIATE_EXIT => 1,
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::nr;

    /// Every capability that is served is in the table of `docs/kvm-api.md` as served, and no other.
    #[test]
    fn the_documentation_says_what_is_served() {
        use std::collections::BTreeSet;
        use std::string::String;
        let source = include_str!("cap.rs");
        let number = |name: &str| -> Option<u32> {
            let start = std::format!("pub const {name}: u32 = ");
            let rest = source.split_once(start.as_str())?.1;
            rest.split_once(';')?.0.parse().ok()
        };
        let mut told = BTreeSet::new();
        for line in include_str!("../../../docs/kvm-api.md").lines() {
            let mut cells = line.split('|').map(str::trim).skip(1);
            let Some(name) = cells.next().and_then(|c| c.strip_prefix("KVM_CAP_")) else {
                continue;
            };
            let served = cells.next() == Some("yes");
            let value = number(name).map_or(0, super::value);
            assert_eq!(served, value != 0, "KVM_CAP_{name}");
            if served {
                told.insert(String::from(name));
            }
        }
        let served = (0..1000).filter(|&n| super::value(n) != 0).count();
        assert_eq!(
            served,
            told.len(),
            "a capability is served but not in the table"
        );
    }

    #[test]
    fn numbers_are_the_kernels() {
        assert_eq!(nr::MP_STATE, kvm_bindings::KVM_CAP_MP_STATE);
        assert_eq!(nr::USER_NMI, kvm_bindings::KVM_CAP_USER_NMI);
        assert_eq!(nr::IRQFD, kvm_bindings::KVM_CAP_IRQFD);
        assert_eq!(nr::PIT2, kvm_bindings::KVM_CAP_PIT2);
        assert_eq!(nr::IOEVENTFD, kvm_bindings::KVM_CAP_IOEVENTFD);
        assert_eq!(nr::VCPU_EVENTS, kvm_bindings::KVM_CAP_VCPU_EVENTS);
        assert_eq!(nr::SET_BOOT_CPU_ID, kvm_bindings::KVM_CAP_SET_BOOT_CPU_ID);
        assert_eq!(nr::SPLIT_IRQCHIP, kvm_bindings::KVM_CAP_SPLIT_IRQCHIP);
        assert_eq!(nr::DIRTY_LOG_RING, kvm_bindings::KVM_CAP_DIRTY_LOG_RING);
        assert_eq!(
            nr::DIRTY_LOG_RING_ACQ_REL,
            kvm_bindings::KVM_CAP_DIRTY_LOG_RING_ACQ_REL
        );
        assert_eq!(nr::BINARY_STATS_FD, kvm_bindings::KVM_CAP_BINARY_STATS_FD);
        assert_eq!(nr::COALESCED_PIO, kvm_bindings::KVM_CAP_COALESCED_PIO);
        assert_eq!(nr::X2APIC_API, kvm_bindings::KVM_CAP_X2APIC_API);
        assert_eq!(nr::USER_MEMORY2, kvm_bindings::KVM_CAP_USER_MEMORY2);
        assert_eq!(
            nr::MMU_SHADOW_CACHE_CONTROL,
            kvm_bindings::KVM_CAP_MMU_SHADOW_CACHE_CONTROL
        );
        assert_eq!(nr::XCRS, kvm_bindings::KVM_CAP_XCRS);
        assert_eq!(
            nr::TSC_DEADLINE_TIMER,
            kvm_bindings::KVM_CAP_TSC_DEADLINE_TIMER
        );
        assert_eq!(nr::SIGNAL_MSI, kvm_bindings::KVM_CAP_SIGNAL_MSI);
        assert_eq!(nr::IRQFD_RESAMPLE, kvm_bindings::KVM_CAP_IRQFD_RESAMPLE);
        assert_eq!(
            nr::IOEVENTFD_ANY_LENGTH,
            kvm_bindings::KVM_CAP_IOEVENTFD_ANY_LENGTH
        );
        assert_eq!(nr::IMMEDIATE_EXIT, kvm_bindings::KVM_CAP_IMMEDIATE_EXIT);
        assert_eq!(nr::MAX_VCPU_ID, kvm_bindings::KVM_CAP_MAX_VCPU_ID);
        assert_eq!(nr::XSAVE2, kvm_bindings::KVM_CAP_XSAVE2);
        assert_eq!(nr::SREGS2, kvm_bindings::KVM_CAP_SREGS2);
        assert_eq!(
            nr::MANUAL_DIRTY_LOG_PROTECT2,
            kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2
        );
        assert_eq!(nr::READONLY_MEM, kvm_bindings::KVM_CAP_READONLY_MEM);
        macro_rules! same {
            ($($name:ident $theirs:ident)*) => {
                $(assert_eq!(nr::$name, kvm_bindings::$theirs, stringify!($name));)*
            };
        }
        same! {
            MCE KVM_CAP_MCE SYNC_REGS KVM_CAP_SYNC_REGS KVMCLOCK_CTRL KVM_CAP_KVMCLOCK_CTRL
            DISABLE_QUIRKS KVM_CAP_DISABLE_QUIRKS X86_SMM KVM_CAP_X86_SMM
            MULTI_ADDRESS_SPACE KVM_CAP_MULTI_ADDRESS_SPACE VCPU_ATTRIBUTES KVM_CAP_VCPU_ATTRIBUTES
            X86_DISABLE_EXITS KVM_CAP_X86_DISABLE_EXITS GET_MSR_FEATURES KVM_CAP_GET_MSR_FEATURES
            MSR_PLATFORM_INFO KVM_CAP_MSR_PLATFORM_INFO EXCEPTION_PAYLOAD KVM_CAP_EXCEPTION_PAYLOAD
            X86_USER_SPACE_MSR KVM_CAP_X86_USER_SPACE_MSR X86_MSR_FILTER KVM_CAP_X86_MSR_FILTER
            ENFORCE_PV_FEATURE_CPUID KVM_CAP_ENFORCE_PV_FEATURE_CPUID
            EXIT_ON_EMULATION_FAILURE KVM_CAP_EXIT_ON_EMULATION_FAILURE
            SYS_ATTRIBUTES KVM_CAP_SYS_ATTRIBUTES DISABLE_QUIRKS2 KVM_CAP_DISABLE_QUIRKS2
            VM_TSC_CONTROL KVM_CAP_VM_TSC_CONTROL
            X86_TRIPLE_FAULT_EVENT KVM_CAP_X86_TRIPLE_FAULT_EVENT
        }
    }
}
