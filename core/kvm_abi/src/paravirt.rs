//! Structures shared between a KVM guest and its host, in guest memory ("KVM-specific MSRs"), and the
//! numbers of the hypercalls ("Linux KVM Hypercall").

/// Offsets in `pvclock_vcpu_time_info` (32 bytes).
pub mod time_info {
    pub const SIZE: usize = 32;
    pub const VERSION: usize = 0;
    pub const TSC_TIMESTAMP: usize = 8;
    pub const SYSTEM_TIME: usize = 16;
    pub const TSC_TO_SYSTEM_MUL: usize = 24;
    pub const TSC_SHIFT: usize = 28;
    pub const FLAGS: usize = 29;
    /// `flags`: time is monotonic across vCPUs.
    pub const FLAG_TSC_STABLE: u8 = 1;
    /// `flags`: the guest was stopped.
    pub const FLAG_GUEST_STOPPED: u8 = 2;
}

/// `kvm_steal_time` (64 bytes): steal u64, version u32, flags u32, preempted u8.
pub mod steal_time {
    pub const SIZE: usize = 64;
    pub const STEAL: u64 = 0;
    pub const VERSION: u64 = 8;
    pub const PREEMPTED: u64 = 16;
    /// `preempted`: the vCPU is not running.
    pub const VCPU_PREEMPTED: u8 = 1;
    /// `preempted`: flush the TLB before the vCPU runs again.
    pub const VCPU_FLUSH_TLB: u8 = 2;
}

/// Hypercall numbers.
pub mod hypercall {
    pub const VAPIC_POLL_IRQ: u64 = 1;
    pub const KICK_CPU: u64 = 5;
    pub const CLOCK_PAIRING: u64 = 9;
    pub const SEND_IPI: u64 = 10;
    pub const SCHED_YIELD: u64 = 11;
    pub const MAP_GPA_RANGE: u64 = 12;

    /// What hypercalls return, negated.
    pub const ENOSYS: u64 = 1000;
    pub const EFAULT: u64 = 14;
    pub const EINVAL: u64 = 22;
    pub const EPERM: u64 = 1;
    pub const EOPNOTSUPP: u64 = 95;
}
