//! KVM's user-space ABI as the core needs it: structs, exit reasons, capabilities.
//!
//! `kvm-bindings` cannot be used here, because it needs `std` and the core must run in a kernel. The
//! structs are declared again under the same names and field names; tests compare every layout with
//! `kvm-bindings`, and homes with `std` speak `kvm-bindings` to their users.
#![no_std]
#![expect(
    missing_docs,
    reason = "the names are those of the kernel's uapi headers, which document them"
)]
#[cfg(test)]
extern crate std;

pub mod cap;
pub mod errno;
pub mod ioctl;
pub mod paravirt;
pub mod run;

pub use errno::Errno;
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

macro_rules! abi {
    ($($(#[$meta:meta])* struct $name:ident { $($field:ident : $ty:ty,)* })*) => {
        $(
            $(#[$meta])*
            #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
            #[repr(C)]
            pub struct $name { $(pub $field: $ty,)* }

            impl Default for $name {
                fn default() -> Self {
                    FromZeros::new_zeroed()
                }
            }
        )*
    };
}

abi! {
    struct kvm_regs {
        rax: u64, rbx: u64, rcx: u64, rdx: u64, rsi: u64, rdi: u64, rsp: u64, rbp: u64,
        r8: u64, r9: u64, r10: u64, r11: u64, r12: u64, r13: u64, r14: u64, r15: u64,
        rip: u64, rflags: u64,
    }
    struct kvm_segment {
        base: u64, limit: u32, selector: u16,
        type_: u8, present: u8, dpl: u8, db: u8, s: u8, l: u8, g: u8, avl: u8,
        unusable: u8, padding: u8,
    }
    struct kvm_dtable { base: u64, limit: u16, padding: [u16; 3], }
    struct kvm_sregs {
        cs: kvm_segment, ds: kvm_segment, es: kvm_segment, fs: kvm_segment, gs: kvm_segment,
        ss: kvm_segment, tr: kvm_segment, ldt: kvm_segment,
        gdt: kvm_dtable, idt: kvm_dtable,
        cr0: u64, cr2: u64, cr3: u64, cr4: u64, cr8: u64, efer: u64, apic_base: u64,
        interrupt_bitmap: [u64; 4],
    }
    struct kvm_sregs2 {
        cs: kvm_segment, ds: kvm_segment, es: kvm_segment, fs: kvm_segment, gs: kvm_segment,
        ss: kvm_segment, tr: kvm_segment, ldt: kvm_segment,
        gdt: kvm_dtable, idt: kvm_dtable,
        cr0: u64, cr2: u64, cr3: u64, cr4: u64, cr8: u64, efer: u64, apic_base: u64,
        flags: u64, pdptrs: [u64; 4],
    }
    struct kvm_fpu {
        fpr: [[u8; 16]; 8], fcw: u16, fsw: u16, ftwx: u8, pad1: u8, last_opcode: u16,
        last_ip: u64, last_dp: u64, xmm: [[u8; 16]; 16], mxcsr: u32, pad2: u32,
    }
    struct kvm_xcr { xcr: u32, reserved: u32, value: u64, }
    struct kvm_xcrs { nr_xcrs: u32, flags: u32, xcrs: [kvm_xcr; 16], padding: [u64; 16], }
    struct kvm_debugregs { db: [u64; 4], dr6: u64, dr7: u64, flags: u64, reserved: [u64; 9], }
    struct kvm_mp_state { mp_state: u32, }
    struct kvm_msr_entry { index: u32, reserved: u32, data: u64, }
    struct kvm_cpuid_entry2 {
        function: u32, index: u32, flags: u32, eax: u32, ebx: u32, ecx: u32, edx: u32,
        padding: [u32; 3],
    }
    struct kvm_exception_event { injected: u8, nr: u8, has_error_code: u8, pending: u8, error_code: u32, }
    struct kvm_interrupt_event { injected: u8, nr: u8, soft: u8, shadow: u8, }
    struct kvm_nmi_event { injected: u8, pending: u8, masked: u8, pad: u8, }
    struct kvm_smi_event { smm: u8, pending: u8, smm_inside_nmi: u8, latched_init: u8, }
    struct kvm_triple_fault_event { pending: u8, }
    struct kvm_vcpu_events {
        exception: kvm_exception_event, interrupt: kvm_interrupt_event, nmi: kvm_nmi_event,
        sipi_vector: u32, flags: u32, smi: kvm_smi_event, triple_fault: kvm_triple_fault_event,
        reserved: [u8; 26], exception_has_payload: u8, exception_payload: u64,
    }
    struct kvm_clock_data {
        clock: u64, flags: u32, pad0: u32, realtime: u64, host_tsc: u64, pad: [u32; 4],
    }
    struct kvm_userspace_memory_region {
        slot: u32, flags: u32, guest_phys_addr: u64, memory_size: u64, userspace_addr: u64,
    }
    struct kvm_userspace_memory_region2 {
        slot: u32, flags: u32, guest_phys_addr: u64, memory_size: u64, userspace_addr: u64,
        guest_memfd_offset: u64, guest_memfd: u32, pad1: u32, pad2: [u64; 14],
    }
    struct kvm_msi {
        address_lo: u32, address_hi: u32, data: u32, flags: u32, devid: u32, pad: [u8; 12],
    }
    struct kvm_translation {
        linear_address: u64, physical_address: u64, valid: u8, writeable: u8, usermode: u8,
        pad: [u8; 5],
    }
    /// `kvm_nested_state` without its data; its union as words. VMX: VMXON region, current VMCS.
    struct kvm_nested_state { flags: u16, format: u16, size: u32, hdr: [u64; 15], }
    struct kvm_guest_debug_arch { debugreg: [u64; 8], }
    struct kvm_guest_debug { control: u32, pad: u32, arch: kvm_guest_debug_arch, }
    /// `kvm_irq_routing_entry` with its union as words: irqchip and pin in the halves of the first, or
    /// MSI address (both halves), then data and device id.
    struct kvm_irq_routing_entry { gsi: u32, type_: u32, flags: u32, pad: u32, u: [u64; 4], }
    struct kvm_pit_channel_state {
        count: u32, latched_count: u16, count_latched: u8, status_latched: u8, status: u8,
        read_state: u8, write_state: u8, write_latch: u8, rw_mode: u8, mode: u8, bcd: u8, gate: u8,
        count_load_time: i64,
    }
    struct kvm_pit_state2 { channels: [kvm_pit_channel_state; 3], flags: u32, reserved: [u32; 9], }
    struct kvm_pic_state {
        last_irr: u8, irr: u8, imr: u8, isr: u8, priority_add: u8, irq_base: u8,
        read_reg_select: u8, poll: u8, special_mask: u8, init_state: u8, auto_eoi: u8,
        rotate_on_auto_eoi: u8, special_fully_nested_mode: u8, init4: u8, elcr: u8, elcr_mask: u8,
    }
    struct kvm_ioapic_state {
        base_address: u64, ioregsel: u32, id: u32, irr: u32, pad: u32, redirtbl: [u64; 24],
    }
    /// `kvm_irqchip` with its union as words.
    struct kvm_irqchip { chip_id: u32, pad: u32, chip: [u64; 64], }
    struct kvm_irq_level { irq: u32, level: u32, }
    struct kvm_irqfd { fd: u32, gsi: u32, flags: u32, resamplefd: u32, pad: [u8; 16], }
    struct kvm_ioeventfd {
        datamatch: u64, addr: u64, len: u32, fd: i32, flags: u32, pad: [u8; 36],
    }
    struct kvm_enable_cap { cap: u32, flags: u32, args: [u64; 4], pad: [u8; 64], }
    struct kvm_pre_fault_memory { gpa: u64, size: u64, flags: u64, padding: [u64; 5], }
    struct kvm_dirty_log { slot: u32, padding1: u32, dirty_bitmap: u64, }
    struct kvm_clear_dirty_log { slot: u32, num_pages: u32, first_page: u64, dirty_bitmap: u64, }
    struct kvm_pit_config { flags: u32, pad: [u32; 15], }
    struct kvm_reinject_control { pit_reinject: u8, reserved: [u8; 31], }
    struct kvm_create_device { type_: u32, fd: u32, flags: u32, }
    struct kvm_device_attr { flags: u32, group: u32, attr: u64, addr: u64, }
    struct kvm_coalesced_mmio_zone { addr: u64, size: u32, pio: u32, }
    struct kvm_coalesced_mmio { phys_addr: u64, len: u32, pio: u32, data: [u8; 8], }
    struct kvm_dirty_gfn { flags: u32, slot: u32, offset: u64, }
    struct kvm_pit_state { channels: [kvm_pit_channel_state; 3], }
    struct kvm_stats_header {
        flags: u32, name_size: u32, num_desc: u32, id_offset: u32, desc_offset: u32,
        data_offset: u32,
    }
    /// `kvm_stats_desc` with the name that follows it.
    struct kvm_stats_desc {
        flags: u32, exponent: i16, size: u16, offset: u32, bucket_size: u32, name: [u8; 48],
    }
    /// `kvm_cpuid_entry`: the entry of KVM_SET_CPUID.
    struct kvm_cpuid_entry { function: u32, eax: u32, ebx: u32, ecx: u32, edx: u32, padding: u32, }
    struct kvm_msr_filter_range { flags: u32, nmsrs: u32, base: u32, pad: u32, bitmap: u64, }
    struct kvm_msr_filter { flags: u32, pad: u32, ranges: [kvm_msr_filter_range; 16], }
    struct kvm_x86_mce {
        status: u64, addr: u64, misc: u64, mcg_status: u64, bank: u8, pad1: [u8; 7],
        pad2: [u64; 3],
    }
    struct kvm_sync_regs { regs: kvm_regs, sregs: kvm_sregs, events: kvm_vcpu_events, }
    /// The fixed part of the calls that end in an array (`kvm_msrs`, `kvm_cpuid2`).
    struct list_head { n: u32, pad: u32, }
}

/// KVM_X86_QUIRK_*: `args[0]` of KVM_CAP_DISABLE_QUIRKS and KVM_CAP_DISABLE_QUIRKS2.
pub mod nested_state {
    pub const FORMAT_VMX: u16 = 0;
    pub const FORMAT_SVM: u16 = 1;
    pub const GIF_SET: u16 = 1 << 8;
}

/// Kinds of devices, and what a VFIO device is told.
pub mod device {
    pub const TYPE_VFIO: u32 = 4;
    /// Only asks whether the kind is there.
    pub const CREATE_TEST: u32 = 1;
    pub const VFIO_FILE: u32 = 1;
    pub const VFIO_FILE_ADD: u64 = 1;
    pub const VFIO_FILE_DEL: u64 = 2;
}

pub mod quirk {
    pub const LINT0_REENABLED: u64 = 1;
    pub const CD_NW_CLEARED: u64 = 2;
    pub const LAPIC_MMIO_HOLE: u64 = 4;
    pub const OUT_7E_INC_RIP: u64 = 8;
    pub const MISC_ENABLE_NO_MWAIT: u64 = 16;
    pub const FIX_HYPERCALL_INSN: u64 = 32;
    pub const MWAIT_NEVER_UD_FAULTS: u64 = 64;
    /// KVM_X86_VALID_QUIRKS
    pub const VALID: u64 = 127;
}

/// KVM_X86_DISABLE_EXITS_*: `args[0]` of KVM_CAP_X86_DISABLE_EXITS.
pub mod disable_exits {
    pub const MWAIT: u64 = 1;
    pub const HLT: u64 = 2;
    pub const PAUSE: u64 = 4;
    pub const CSTATE: u64 = 8;
    /// KVM_X86_DISABLE_VALID_EXITS
    pub const VALID: u64 = 15;
    /// What guests can be spared: MWAIT never exits and is not offered.
    pub const SERVED: u64 = HLT | PAUSE;
}

/// `kvm_msr_filter` and its ranges.
pub mod msr_filter {
    pub const READ: u32 = 1;
    pub const WRITE: u32 = 2;
    /// `kvm_msr_filter::flags`
    pub const DEFAULT_DENY: u32 = 1;
    /// Bytes of the largest bitmap.
    pub const MAX_BITMAP: usize = 0x600;
}

/// `kvm_device_attr` on vCPUs and on `/dev/kvm`.
pub mod attr {
    pub const VCPU_TSC_CTRL: u32 = 0;
    pub const VCPU_TSC_OFFSET: u64 = 0;
    pub const X86_XCOMP_GUEST_SUPP: u64 = 0;
}

/// `kvm_irqfd::flags`.
pub mod irqfd_flag {
    pub const DEASSIGN: u32 = 1;
    pub const RESAMPLE: u32 = 2;
}

/// `kvm_dirty_gfn::flags`.
pub mod dirty_gfn {
    /// KVM_DIRTY_GFN_F_DIRTY
    pub const DIRTY: u32 = 1;
    /// KVM_DIRTY_GFN_F_RESET
    pub const RESET: u32 = 2;
}

/// KVM_X2APIC_API_*: `args[0]` of KVM_CAP_X2APIC_API.
pub mod x2apic_api {
    pub const USE_32BIT_IDS: u64 = 1;
    pub const DISABLE_BROADCAST_QUIRK: u64 = 2;
    pub const VALID: u64 = 3;
}

/// `kvm_irq_routing_entry::type_`.
pub mod irq_routing {
    pub const IRQCHIP: u32 = 1;
    pub const MSI: u32 = 2;
    pub const HV_SINT: u32 = 4;
}

/// `kvm_msi::flags` and the flags of an MSI route: the device id is valid. x86 has no use for it.
pub const KVM_MSI_VALID_DEVID: u32 = 1;

/// `kvm_ioeventfd::flags`.
pub mod ioeventfd_flag {
    pub const DATAMATCH: u32 = 1;
    pub const PIO: u32 = 2;
    pub const DEASSIGN: u32 = 4;
    pub const VIRTIO_CCW_NOTIFY: u32 = 8;
    pub const VALID: u32 = 15;
}

/// `kvm_lapic_state`: the APIC register page, 1 KiB of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct kvm_lapic_state {
    pub regs: [u8; 1024],
}

impl Default for kvm_lapic_state {
    fn default() -> Self {
        Self { regs: [0; 1024] }
    }
}

/// `kvm_xsave`: the standard-format XSAVE area, 4 KiB of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C, align(8))]
pub struct kvm_xsave {
    pub region: [u8; 4096],
}

impl Default for kvm_xsave {
    fn default() -> Self {
        Self { region: [0; 4096] }
    }
}

/// `kvm_irqchip::chip_id`.
pub mod irqchip {
    pub const PIC_MASTER: u32 = 0;
    pub const PIC_SLAVE: u32 = 1;
    pub const IOAPIC: u32 = 2;
}

/// `kvm_mp_state::mp_state`.
pub mod mp_state {
    pub const RUNNABLE: u32 = 0;
    pub const UNINITIALIZED: u32 = 1;
    pub const INIT_RECEIVED: u32 = 2;
    pub const HALTED: u32 = 3;
    pub const SIPI_RECEIVED: u32 = 4;
}

/// `kvm_vcpu_events::flags`.
pub mod vcpuevent {
    pub const VALID_NMI_PENDING: u32 = 1;
    pub const VALID_SIPI_VECTOR: u32 = 2;
    pub const VALID_SHADOW: u32 = 4;
    pub const VALID_SMM: u32 = 8;
    pub const VALID_PAYLOAD: u32 = 16;
    pub const VALID_TRIPLE_FAULT: u32 = 32;
    /// `kvm_interrupt_event::shadow`: KVM_X86_SHADOW_INT_MOV_SS and _STI.
    pub const SHADOW_MOV_SS: u8 = 1;
    pub const SHADOW_STI: u8 = 2;
}

/// `kvm_guest_debug::control`.
pub mod guestdbg {
    pub const ENABLE: u32 = 1;
    pub const SINGLESTEP: u32 = 2;
    pub const USE_SW_BP: u32 = 0x1_0000;
    pub const USE_HW_BP: u32 = 0x2_0000;
    pub const INJECT_DB: u32 = 0x4_0000;
    pub const INJECT_BP: u32 = 0x8_0000;
    pub const BLOCKIRQ: u32 = 0x10_0000;
    /// KVM_GUESTDBG_VALID_MASK
    pub const VALID: u32 =
        ENABLE | SINGLESTEP | USE_SW_BP | USE_HW_BP | INJECT_DB | INJECT_BP | BLOCKIRQ;
}

/// `kvm_clock_data::flags`.
pub mod clock {
    pub const TSC_STABLE: u32 = 2;
    pub const REALTIME: u32 = 4;
    pub const HOST_TSC: u32 = 8;
}

/// `kvm_cpuid_entry2::flags`: the index is significant.
pub const KVM_CPUID_FLAG_SIGNIFCANT_INDEX: u32 = 1;
/// Most CPUID entries that KVM_SET_CPUID2 takes.
pub const KVM_MAX_CPUID_ENTRIES: usize = 256;
/// Most entries of one KVM_GET_MSRS or KVM_SET_MSRS.
pub const KVM_MAX_MSR_ENTRIES: usize = 256;
/// KVM_API_VERSION
pub const KVM_API_VERSION: u32 = 12;

#[cfg(test)]
mod layout {
    use std::mem::{align_of, offset_of, size_of};

    macro_rules! same {
        ($name:ident: $($field:ident),*) => {
            assert_eq!(size_of::<super::$name>(), size_of::<kvm_bindings::$name>(), stringify!($name));
            assert_eq!(align_of::<super::$name>(), align_of::<kvm_bindings::$name>(), stringify!($name));
            $(assert_eq!(
                offset_of!(super::$name, $field),
                offset_of!(kvm_bindings::$name, $field),
                concat!(stringify!($name), ".", stringify!($field))
            );)*
        };
    }

    #[test]
    fn structs_have_the_kernels_layout() {
        same!(kvm_regs: rax, rsp, rbp, r8, r15, rip, rflags);
        same!(kvm_segment: base, limit, selector, type_, present, dpl, db, s, l, g, avl, unusable);
        same!(kvm_dtable: base, limit);
        same!(kvm_sregs: cs, ss, tr, ldt, gdt, idt, cr0, cr8, efer, apic_base, interrupt_bitmap);
        same!(kvm_sregs2: cs, ldt, idt, cr8, apic_base, flags, pdptrs);
        same!(kvm_fpu: fpr, fcw, fsw, ftwx, last_opcode, last_ip, last_dp, xmm, mxcsr);
        same!(kvm_xcrs: nr_xcrs, flags, xcrs);
        same!(kvm_debugregs: db, dr6, dr7, flags);
        same!(kvm_mp_state: mp_state);
        same!(kvm_msr_entry: index, data);
        same!(kvm_cpuid_entry2: function, index, flags, eax, ebx, ecx, edx);
        same!(kvm_vcpu_events: exception, interrupt, nmi, sipi_vector, flags, smi, triple_fault,
            exception_has_payload, exception_payload);
        same!(kvm_clock_data: clock, flags, realtime, host_tsc);
        same!(kvm_userspace_memory_region: slot, flags, guest_phys_addr, memory_size, userspace_addr);
        same!(kvm_userspace_memory_region2: slot, flags, userspace_addr, guest_memfd, pad2);
        same!(kvm_msi: address_lo, address_hi, data, flags, devid);
        same!(kvm_translation: linear_address, physical_address, valid, writeable, usermode);
        same!(kvm_guest_debug: control, arch);
        same!(kvm_irq_routing_entry: gsi, type_, flags, u);
        same!(kvm_pit_state2: channels, flags);
        same!(kvm_pit_channel_state: count, latched_count, mode, gate, count_load_time);
        same!(kvm_pic_state: irr, imr, elcr_mask);
        same!(kvm_ioapic_state: base_address, ioregsel, id, irr, redirtbl);
        same!(kvm_lapic_state: regs);
        same!(kvm_irqchip: chip_id, chip);
        same!(kvm_irqfd: fd, gsi, flags, resamplefd);
        same!(kvm_ioeventfd: datamatch, addr, len, fd, flags);
        same!(kvm_enable_cap: cap, flags, args);
        same!(kvm_dirty_log: slot);
        same!(kvm_clear_dirty_log: slot, num_pages, first_page);
        same!(kvm_pit_config: flags);
        same!(kvm_reinject_control: pit_reinject);
        same!(kvm_create_device: type_, fd, flags);
        same!(kvm_device_attr: flags, group, attr, addr);
        same!(kvm_coalesced_mmio_zone: addr, size);
        same!(kvm_msr_filter_range: flags, nmsrs, base, bitmap);
        same!(kvm_msr_filter: flags, ranges);
        same!(kvm_x86_mce: status, addr, misc, mcg_status, bank);
        same!(kvm_sync_regs: regs, sregs, events);
        same!(kvm_coalesced_mmio: phys_addr, len, data);
        same!(kvm_dirty_gfn: flags, slot, offset);
        same!(kvm_pit_state: channels);
        same!(kvm_stats_header: flags, name_size, num_desc, id_offset, desc_offset, data_offset);
        assert_eq!(
            offset_of!(super::kvm_stats_desc, name),
            size_of::<kvm_bindings::kvm_stats_desc>()
        );
        assert_eq!(
            offset_of!(super::kvm_stats_desc, offset),
            offset_of!(kvm_bindings::kvm_stats_desc, offset)
        );
        assert_eq!(
            size_of::<super::kvm_xsave>(),
            size_of::<kvm_bindings::kvm_xsave>()
        );
    }

    #[test]
    fn run_page_offsets() {
        use super::run;
        use kvm_bindings::kvm_run;
        assert_eq!(run::IMMEDIATE_EXIT, offset_of!(kvm_run, immediate_exit));
        assert_eq!(run::EXIT_REASON, offset_of!(kvm_run, exit_reason));
        assert_eq!(
            run::READY_FOR_INTERRUPT_INJECTION,
            offset_of!(kvm_run, ready_for_interrupt_injection)
        );
        assert_eq!(run::IF_FLAG, offset_of!(kvm_run, if_flag));
        assert_eq!(run::FLAGS, offset_of!(kvm_run, flags));
        assert_eq!(run::CR8, offset_of!(kvm_run, cr8));
        assert_eq!(run::APIC_BASE, offset_of!(kvm_run, apic_base));
        assert_eq!(run::EXIT, offset_of!(kvm_run, __bindgen_anon_1));
        assert_eq!(run::VALID_REGS, offset_of!(kvm_run, kvm_valid_regs));
        assert_eq!(run::DIRTY_REGS, offset_of!(kvm_run, kvm_dirty_regs));
        assert_eq!(run::SYNC_REGS, offset_of!(kvm_run, s));
    }

    #[test]
    fn exit_reasons() {
        use super::run::reason;
        assert_eq!(reason::IO, kvm_bindings::KVM_EXIT_IO);
        assert_eq!(reason::DEBUG, kvm_bindings::KVM_EXIT_DEBUG);
        assert_eq!(reason::HLT, kvm_bindings::KVM_EXIT_HLT);
        assert_eq!(reason::MMIO, kvm_bindings::KVM_EXIT_MMIO);
        assert_eq!(
            reason::IRQ_WINDOW_OPEN,
            kvm_bindings::KVM_EXIT_IRQ_WINDOW_OPEN
        );
        assert_eq!(reason::SHUTDOWN, kvm_bindings::KVM_EXIT_SHUTDOWN);
        assert_eq!(reason::FAIL_ENTRY, kvm_bindings::KVM_EXIT_FAIL_ENTRY);
        assert_eq!(reason::INTR, kvm_bindings::KVM_EXIT_INTR);
        assert_eq!(reason::SET_TPR, kvm_bindings::KVM_EXIT_SET_TPR);
        assert_eq!(
            reason::INTERNAL_ERROR,
            kvm_bindings::KVM_EXIT_INTERNAL_ERROR
        );
        assert_eq!(reason::SYSTEM_EVENT, kvm_bindings::KVM_EXIT_SYSTEM_EVENT);
        assert_eq!(reason::IOAPIC_EOI, kvm_bindings::KVM_EXIT_IOAPIC_EOI);
        assert_eq!(reason::X86_RDMSR, kvm_bindings::KVM_EXIT_X86_RDMSR);
        assert_eq!(reason::X86_WRMSR, kvm_bindings::KVM_EXIT_X86_WRMSR);
    }
}
