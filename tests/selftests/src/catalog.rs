//! What is expected of each test, by the name of its file; of those not named here, that it passes.

use std::time::Duration;

/// What is expected of a test.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// It passes.
    Pass,
    /// It says that it does not apply, for this reason. It is run nevertheless: what it asks for must be
    /// reported absent, not fail halfway.
    Skip(&'static str),
    /// It passes or says that it does not apply, depending on the host, for this reason.
    PassOrSkip(&'static str),
    /// It fails, for this reason: it does not ask whether it applies.
    Fail(&'static str),
    /// It is not run, for this reason.
    NotRun(&'static str),
}

const VMX: &str = "needs VMX (nested virtualization)";
const SVM: &str = "needs SVM (nested virtualization)";
const NESTED: &str = "needs VMX or SVM (nested virtualization)";
const SEV: &str = "needs SEV";
const HYPERV: &str = "needs Hyper-V enlightenments";
const XEN: &str = "needs Xen emulation";
const PMU: &str = "needs a PMU";
const FEP: &str =
    "needs the debugging parameter kvm.force_emulation_prefix, which is off in KVM too";
const TSC_SCALING: &str = "needs TSC scaling: the guest's TSC runs as the host's does";
const FLDS: &str = "wants KVM's emulator to fail at FLDS from MMIO; AnyKVM executes it";
const SW_PROTECTED: &str =
    "needs KVM_X86_SW_PROTECTED_VM, a debugging aid of KVM for confidential VMs";

/// Tests of which something else than passing is expected.
const EXPECTED: &[(&str, Expected)] = &[
    (
        "access_tracking_perf_test",
        Expected::PassOrSkip("needs idle-page tracking in the host's kernel, and root"),
    ),
    ("amx_test", Expected::Skip("needs AMX")),
    (
        "aperfmperf_test",
        Expected::Skip(
            "compares with the host's APERF and MPERF in /dev/cpu/*/msr, which root may read",
        ),
    ),
    (
        "dirty_log_page_splitting_test",
        Expected::Skip("counts the huge pages that KVM maps for the hardware (tdp_mmu)"),
    ),
    ("emulator_error_test", Expected::Skip(FLDS)),
    ("evmcs_smm_controls_test", Expected::Skip(VMX)),
    ("evmcs_test", Expected::Skip(VMX)),
    ("exit_on_emulation_failure_test", Expected::Fail(FLDS)),
    ("fastops_test", Expected::Skip(FEP)),
    (
        "guest_memfd_test",
        Expected::Skip("needs guest_memfd, memory that the VMM cannot map"),
    ),
    ("hyperv_clock", Expected::Skip(HYPERV)),
    ("hyperv_cpuid", Expected::Skip(HYPERV)),
    ("hyperv_evmcs", Expected::Skip(HYPERV)),
    ("hyperv_extended_hypercalls", Expected::Skip(HYPERV)),
    ("hyperv_features", Expected::Skip(HYPERV)),
    ("hyperv_ipi", Expected::Skip(HYPERV)),
    ("hyperv_svm_test", Expected::Skip(HYPERV)),
    ("hyperv_tlb_flush", Expected::Skip(HYPERV)),
    (
        "kvm_buslock_test",
        Expected::Skip("needs KVM_CAP_X86_BUS_LOCK_EXIT, a feature of the processor"),
    ),
    ("mmio_warning_test", Expected::Skip(VMX)),
    (
        "monitor_mwait_test",
        Expected::PassOrSkip("needs MWAIT on the host, as it asks the host's CPUID"),
    ),
    ("nested_close_kvm_test", Expected::Skip(NESTED)),
    ("nested_dirty_log_test", Expected::Skip(NESTED)),
    ("nested_emulation_test", Expected::Skip(NESTED)),
    ("nested_exceptions_test", Expected::Skip(NESTED)),
    ("nested_invalid_cr3_test", Expected::Skip(NESTED)),
    ("nested_set_state_test", Expected::Skip(NESTED)),
    ("nested_tdp_fault_test", Expected::Skip(NESTED)),
    ("nested_tsc_adjust_test", Expected::Skip(NESTED)),
    ("nested_tsc_scaling_test", Expected::Skip(NESTED)),
    ("nested_vmsave_vmload_test", Expected::Skip(SVM)),
    (
        "nx_huge_pages_test.sh",
        Expected::NotRun("sets parameters of the host's kvm module as root"),
    ),
    ("pmu_counters_test", Expected::Skip(PMU)),
    ("pmu_event_filter_test", Expected::Skip(PMU)),
    ("private_mem_conversions_test", Expected::Skip(SW_PROTECTED)),
    ("private_mem_kvm_exits_test", Expected::Skip(SW_PROTECTED)),
    (
        "set_sregs_test",
        Expected::Fail(
            "before KVM_SET_CPUID2, wants CR4 bits refused which the same test of 6.1 wants accepted",
        ),
    ),
    ("sev_dbg_test", Expected::Skip(SEV)),
    ("sev_init2_tests", Expected::Skip(SEV)),
    ("sev_migrate_tests", Expected::Skip(SEV)),
    ("sev_smoke_test", Expected::Skip(SEV)),
    ("smaller_maxphyaddr_emulation_test", Expected::Skip(FLDS)),
    ("svm_int_ctl_test", Expected::Skip(SVM)),
    ("svm_lbr_nested_state", Expected::Skip(SVM)),
    ("svm_nested_clear_efer_svme", Expected::Skip(SVM)),
    ("svm_nested_pat_test", Expected::Skip(SVM)),
    ("svm_nested_shutdown_test", Expected::Skip(SVM)),
    ("svm_nested_soft_inject_test", Expected::Skip(SVM)),
    ("svm_nested_vmcb12_gpa", Expected::Skip(SVM)),
    ("svm_vmcall_test", Expected::Skip(SVM)),
    ("triple_fault_event_test", Expected::Skip(NESTED)),
    ("tsc_scaling_sync", Expected::Skip(TSC_SCALING)),
    (
        "ucna_injection_test",
        Expected::PassOrSkip(
            "needs corrected machine checks by interrupt (CMCI), as Intel's processors have",
        ),
    ),
    ("vmx_apic_access_test", Expected::Skip(VMX)),
    ("vmx_apicv_updates_test", Expected::Skip(VMX)),
    ("vmx_close_while_nested_test", Expected::Skip(VMX)),
    ("vmx_dirty_log_test", Expected::Skip(VMX)),
    (
        "vmx_exception_with_invalid_guest_state",
        Expected::Skip(VMX),
    ),
    ("vmx_invalid_nested_guest_state", Expected::Skip(VMX)),
    ("vmx_msrs_test", Expected::Skip(VMX)),
    ("vmx_nested_la57_state_test", Expected::Skip(VMX)),
    ("vmx_nested_tsc_scaling_test", Expected::Skip(VMX)),
    ("vmx_pmu_caps_test", Expected::Skip(PMU)),
    ("vmx_preemption_timer_test", Expected::Skip(VMX)),
    ("vmx_set_nested_state_test", Expected::Skip(VMX)),
    ("vmx_tsc_adjust_test", Expected::Skip(VMX)),
    ("xen_shinfo_test", Expected::Skip(XEN)),
    ("xen_vmcall_test", Expected::Skip(XEN)),
    (
        "xss_msr_test",
        Expected::Skip("needs XSAVES, which is not offered"),
    ),
];

/// Where that differs in Linux 6.1.
const EXPECTED_6_1: &[(&str, Expected)] = &[
    ("hyperv_clock", Expected::Fail(HYPERV)),
    ("hyperv_features", Expected::Fail(HYPERV)),
    ("monitor_mwait_test", Expected::Pass),
    ("set_sregs_test", Expected::Pass),
];

/// Tests of a few seconds in all: what `cargo test` runs.
pub const QUICK: &[&str] = &[
    "cpuid_test",
    "cr4_cpuid_sync_test",
    "get_msr_index_features",
    "fix_hypercall_test",
    "kvm_pv_test",
    "platform_info_test",
    "set_boot_cpu_id",
    "set_sregs_test",
    "set_memory_region_test",
    "state_test",
    "smm_test",
    "sync_regs_test",
    "userspace_io_test",
    "userspace_msr_exit_test",
    "debug_regs",
    "xapic_ipi_test",
    "dirty_log_test",
];

/// What is expected of the test called `name` in this `version` of Linux.
#[must_use]
pub fn expected(version: &str, name: &str) -> Expected {
    let older = match version.starts_with("6.1.") {
        true => EXPECTED_6_1,
        false => &[],
    };
    older
        .iter()
        .chain(EXPECTED)
        .find(|(known, _)| *known == name)
        .map_or(Expected::Pass, |(_, expected)| *expected)
}

/// Arguments that a test is given, where what it does by default is for large machines.
#[must_use]
pub fn arguments(name: &str) -> &'static [&'static str] {
    match name {
        // Milliseconds between iterations: a vCPU thread that is preempted for two of them between reading
        // the iteration's number and writing it fails the test, and on a busy host that happens at 10.
        "dirty_log_test" => &["-I", "100", "-i", "12"],
        // GiB of guest memory; every page of it faults in the process.
        "mmu_stress_test" => &["-m", "4"],
        _ => &[],
    }
}

/// How long a test may take if the command line does not say.
#[must_use]
pub fn limit(name: &str) -> Duration {
    Duration::from_secs(match name {
        // Each makes 512 processes of 68 busy threads; 32,764 memslots, one by one, several times.
        "hardware_disable_test" | "memslot_perf_test" => 900,
        "max_guest_memory_test" | "mmu_stress_test" | "set_memory_region_test" => 300,
        _ => 120,
    })
}

/// The test's name without the folder of its architecture.
#[must_use]
pub fn base_name(test: &str) -> &str {
    test.rsplit('/').next().unwrap_or(test)
}
