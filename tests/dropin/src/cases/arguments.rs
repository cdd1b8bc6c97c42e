//! Hostile arguments.

use crate::kvm::{self, OUT_HLT, Vm, close, io, ioctl, ior, iow, iowr};
use kvm_bindings::*;

/// Calls that read or write a structure, by the descriptor that they are for.
type Calls = &'static [(&'static str, u64)];

const SYSTEM: Calls = &[
    ("GET_MSR_INDEX_LIST", iowr::<kvm_msr_list>(0x02)),
    ("GET_SUPPORTED_CPUID", iowr::<kvm_cpuid2>(0x05)),
    ("GET_EMULATED_CPUID", iowr::<kvm_cpuid2>(0x09)),
    ("GET_MSR_FEATURE_INDEX_LIST", iowr::<kvm_msr_list>(0x0a)),
    ("GET_MSRS", iowr::<kvm_msrs>(0x88)),
];

const VM: Calls = &[
    ("SET_USER_MEMORY_REGION", kvm::SET_USER_MEMORY_REGION),
    ("GET_DIRTY_LOG", iow::<kvm_dirty_log>(0x42)),
    ("CLEAR_DIRTY_LOG", iowr::<kvm_clear_dirty_log>(0xc0)),
    ("SET_IDENTITY_MAP_ADDR", iow::<u64>(0x48)),
    ("GET_IRQCHIP", iowr::<kvm_irqchip>(0x62)),
    ("SET_IRQCHIP", ior::<kvm_irqchip>(0x63)),
    ("IRQ_LINE", iow::<kvm_irq_level>(0x61)),
    ("IRQ_LINE_STATUS", iowr::<kvm_irq_level>(0x67)),
    ("SIGNAL_MSI", iow::<kvm_msi>(0xa5)),
    ("SET_GSI_ROUTING", iow::<kvm_irq_routing>(0x6a)),
    ("IRQFD", iow::<kvm_irqfd>(0x76)),
    ("IOEVENTFD", iow::<kvm_ioeventfd>(0x79)),
    ("CREATE_PIT2", iow::<kvm_pit_config>(0x77)),
    ("GET_PIT2", ior::<kvm_pit_state2>(0x9f)),
    ("SET_PIT2", iow::<kvm_pit_state2>(0xa0)),
    ("GET_CLOCK", ior::<kvm_clock_data>(0x7c)),
    ("SET_CLOCK", iow::<kvm_clock_data>(0x7b)),
    ("ENABLE_CAP", iow::<kvm_enable_cap>(0xa3)),
    ("X86_SET_MSR_FILTER", iow::<kvm_msr_filter>(0xc6)),
];

const VCPU: Calls = &[
    ("GET_REGS", kvm::GET_REGS),
    ("SET_REGS", kvm::SET_REGS),
    ("GET_SREGS", kvm::GET_SREGS),
    ("SET_SREGS", kvm::SET_SREGS),
    ("GET_SREGS2", ior::<kvm_sregs2>(0xcc)),
    ("SET_SREGS2", iow::<kvm_sregs2>(0xcd)),
    ("GET_FPU", ior::<kvm_fpu>(0x8c)),
    ("SET_FPU", iow::<kvm_fpu>(0x8d)),
    ("GET_XSAVE", ior::<kvm_xsave>(0xa4)),
    ("SET_XSAVE", iow::<kvm_xsave>(0xa5)),
    ("GET_XCRS", ior::<kvm_xcrs>(0xa6)),
    ("SET_XCRS", iow::<kvm_xcrs>(0xa7)),
    ("GET_MSRS", iowr::<kvm_msrs>(0x88)),
    ("SET_MSRS", iow::<kvm_msrs>(0x89)),
    ("SET_CPUID2", iow::<kvm_cpuid2>(0x90)),
    ("GET_CPUID2", iowr::<kvm_cpuid2>(0x91)),
    ("GET_LAPIC", ior::<kvm_lapic_state>(0x8e)),
    ("SET_LAPIC", iow::<kvm_lapic_state>(0x8f)),
    ("GET_MP_STATE", ior::<kvm_mp_state>(0x98)),
    ("SET_MP_STATE", iow::<kvm_mp_state>(0x99)),
    ("GET_VCPU_EVENTS", ior::<kvm_vcpu_events>(0x9f)),
    ("SET_VCPU_EVENTS", iow::<kvm_vcpu_events>(0xa0)),
    ("GET_DEBUGREGS", ior::<kvm_debugregs>(0xa1)),
    ("SET_DEBUGREGS", iow::<kvm_debugregs>(0xa2)),
    ("SET_GUEST_DEBUG", iow::<kvm_guest_debug>(0x9b)),
    ("TRANSLATE", iowr::<kvm_translation>(0x85)),
    ("SET_SIGNAL_MASK", kvm::SET_SIGNAL_MASK),
    ("X86_SETUP_MCE", iow::<u64>(0x9c)),
    ("X86_SET_MCE", iow::<kvm_x86_mce>(0x9e)),
    ("ENABLE_CAP", iow::<kvm_enable_cap>(0xa3)),
];

/// A page that can be used, between pages that cannot.
fn lonely_page() -> u64 {
    let start = kvm::map_anonymous(3 * 4096);
    // SAFETY: the mapping is this case's.
    unsafe {
        libc::mprotect(start.cast(), 4096, libc::PROT_NONE);
        libc::munmap(start.add(8192).cast(), 4096);
    }
    start as u64 + 4096
}

/// EFAULT, whatever is wrong with a pointer, and nothing worse.
pub fn bad_pointers() {
    let vm = Vm::new(OUT_HLT);
    assert_eq!(ioctl(vm.fd, kvm::CREATE_IRQCHIP, 0), 0);
    let pit = &mut kvm_pit_config::default();
    kvm::call(vm.fd, iow::<kvm_pit_config>(0x77), pit);
    let vcpu = vm.vcpu(0);
    let system = kvm::open();
    let page = lonely_page();
    let bad = [
        1,
        0x10,
        page - 4096,
        page + 4096,
        page + 4096 - 1,
        0x7fff_ffff_f000,
        0x7fff_ffff_ffff,
        1 << 47,
        1 << 63,
        u64::MAX - 3,
        u64::MAX,
    ];
    let mut wrong = Vec::new();
    for (fd, calls) in [(system, SYSTEM), (vm.fd, VM), (vcpu.fd, VCPU)] {
        for &(name, request) in calls {
            let mut results = bad.map(|arg| ioctl(fd, request, arg));
            if name == "SET_IDENTITY_MAP_ADDR" {
                // With a vCPU there the pointer does not matter any more.
                assert_eq!(results[0], -libc::EINVAL);
                results.fill(-libc::EFAULT);
            }
            if results != [-libc::EFAULT; 11] {
                wrong.push((name, results));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:?}");
    // What is to be written cannot be.
    // SAFETY: the page is this case's.
    unsafe { libc::mprotect(page as *mut _, 4096, libc::PROT_READ) };
    for (fd, name, request) in [
        (vcpu.fd, "GET_REGS", kvm::GET_REGS),
        (vcpu.fd, "GET_SREGS", kvm::GET_SREGS),
        (vcpu.fd, "GET_LAPIC", ior::<kvm_lapic_state>(0x8e)),
        (vm.fd, "GET_CLOCK", ior::<kvm_clock_data>(0x7c)),
        (vm.fd, "GET_PIT2", ior::<kvm_pit_state2>(0x9f)),
        (vm.fd, "GET_IRQCHIP", iowr::<kvm_irqchip>(0x62)),
    ] {
        assert_eq!(ioctl(fd, request, page), -libc::EFAULT, "{name}");
    }
    assert_eq!(vcpu.run(), 0);
    close(system);
    vcpu.close();
}

/// Lengths, counts and numbers that are out of range.
pub fn bad_numbers() {
    let vm = Vm::new(OUT_HLT);
    let vcpu = vm.vcpu(0);
    let system = kvm::open();
    let page = lonely_page();
    // SAFETY: the page is this case's.
    let word = page as *mut u32;
    for (fd, name, request, expected) in [
        (
            system,
            "GET_SUPPORTED_CPUID",
            iowr::<kvm_cpuid2>(0x05),
            libc::EFAULT,
        ),
        (system, "GET_MSRS", iowr::<kvm_msrs>(0x88), libc::E2BIG),
        (vcpu.fd, "SET_MSRS", iow::<kvm_msrs>(0x89), libc::E2BIG),
        (vcpu.fd, "SET_CPUID2", iow::<kvm_cpuid2>(0x90), libc::E2BIG),
        (
            vm.fd,
            "SET_GSI_ROUTING",
            iow::<kvm_irq_routing>(0x6a),
            libc::EINVAL,
        ),
    ] {
        for n in [u32::MAX, 0x7fff_ffff, 1 << 20] {
            // SAFETY: the page is this case's.
            unsafe { word.write_volatile(n) };
            let result = ioctl(fd, request, page);
            assert!(
                [expected, libc::EFAULT, libc::ENOMEM, libc::E2BIG].contains(&-result)
                    || result == 0,
                "{name} of {n}: {result}"
            );
        }
    }
    for number in 0..=0xff {
        for (fd, size) in [
            (system, 0),
            (vm.fd, 0),
            (vcpu.fd, 0),
            (vm.fd, 8),
            (vcpu.fd, 0x3fff),
        ] {
            let request = io(number) | size << 16;
            if matches!(number, 0x01 | 0x41 | 0x80) {
                continue;
            }
            ioctl(fd, request, 0);
            ioctl(fd, request | 3 << 30, u64::MAX);
            ioctl(fd, request | 1 << 30, 0x10);
        }
    }
    for arg in [1, u64::MAX, 1 << 32] {
        assert_eq!(ioctl(vm.fd, kvm::CREATE_VCPU, arg | 1 << 20), -libc::EINVAL);
        assert!(ioctl(system, kvm::CREATE_VM, arg) < 0);
        assert_eq!(ioctl(vcpu.fd, kvm::RUN, arg), -libc::EINVAL);
        assert!(ioctl(vm.fd, kvm::CHECK_EXTENSION, arg) <= 1);
    }
    for region in [
        (0, 1, 4096, page),
        (1, 0, 4095, page),
        (1, 0, u64::MAX, page),
        (1, u64::MAX - 4095, 8192, page),
        (1, 1 << 62, 4096, page),
        (u32::MAX, 0, 4096, page),
        (1, 0, 4096, 1 << 63),
        (1, 0, 4096, u64::MAX - 4095),
        (1, 1 << 32, 1 << 62, page),
    ] {
        let mut region = kvm_userspace_memory_region {
            slot: region.0,
            flags: 0,
            guest_phys_addr: region.1,
            memory_size: region.2,
            userspace_addr: region.3,
        };
        let result = ioctl(vm.fd, kvm::SET_USER_MEMORY_REGION, &raw mut region as u64);
        assert!(result < 0, "{region:x?}");
    }
    vcpu.reset();
    assert_eq!(vcpu.run(), 0);
    close(system);
    vcpu.close();
}
