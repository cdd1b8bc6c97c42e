//! kvmclock: the VM's paravirtual clock, in nanoseconds, as a linear function of the host's TSC.
//!
//! Host time-stamp counters of a usable host are constant and synchronized, so one pair of reference
//! values serves every vCPU ("master clock" in KVM), and the time page of a vCPU needs writing only
//! when the reference or the vCPU's TSC offset changes.

use kvm_abi::paravirt::time_info;

/// Multiplier and shift that turn TSC ticks into nanoseconds as `pvclock_vcpu_time_info` wants it:
/// `ns = ((ticks << shift) * mul) >> 32`, with a right shift where `shift` is negative.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Scale {
    /// 32.32 fixed-point multiplier.
    pub mul: u32,
    /// Left shift applied first.
    pub shift: i8,
}

impl Scale {
    /// The scale of a counter at `khz`.
    pub fn from_khz(khz: u32) -> Self {
        let hz = u128::from(khz.max(1)) * 1000;
        let mut shift = 0i8;
        // Normalize 1e9 / (hz << shift) into [1/2, 1), so that `mul` has 32 significant bits.
        let mut num: u128 = 1_000_000_000 << 32;
        let mut den = hz;
        while num / den >= 1 << 32 {
            den <<= 1;
            shift += 1;
        }
        while num / den < 1 << 31 {
            num <<= 1;
            shift -= 1;
        }
        Scale {
            mul: (num / den) as u32,
            shift,
        }
    }

    /// Nanoseconds of `ticks`.
    pub fn ns(self, ticks: u64) -> u64 {
        let ticks = u128::from(ticks);
        let shifted = if self.shift >= 0 {
            ticks << self.shift
        } else {
            ticks >> -self.shift
        };
        ((shifted * u128::from(self.mul)) >> 32) as u64
    }
}

/// The VM's clock.
#[derive(Clone, Copy, Debug)]
pub struct KvmClock {
    /// Ticks to nanoseconds.
    pub scale: Scale,
    /// Host TSC at the reference point.
    pub base_tsc: u64,
    /// kvmclock at the reference point, in nanoseconds.
    pub base_ns: u64,
}

impl KvmClock {
    /// A clock that shows 0 at host TSC `tsc`.
    pub fn new(tsc: u64, khz: u32) -> Self {
        KvmClock {
            scale: Scale::from_khz(khz),
            base_tsc: tsc,
            base_ns: 0,
        }
    }

    /// The clock at host TSC `tsc`.
    pub fn ns(&self, tsc: u64) -> u64 {
        self.base_ns
            .wrapping_add(self.scale.ns(tsc.saturating_sub(self.base_tsc)))
    }

    /// Makes the clock show `ns` at host TSC `tsc` (KVM_SET_CLOCK).
    pub fn set(&mut self, ns: u64, tsc: u64) {
        self.base_tsc = tsc;
        self.base_ns = ns;
    }

    /// The time page of a vCPU whose TSC is the host's plus `tsc_offset`, without its version.
    pub fn time_info(&self, tsc_offset: u64, flags: u8) -> [u8; time_info::SIZE] {
        let mut page = [0; time_info::SIZE];
        let guest_tsc = self.base_tsc.wrapping_add(tsc_offset);
        page[time_info::TSC_TIMESTAMP..][..8].copy_from_slice(&guest_tsc.to_le_bytes());
        page[time_info::SYSTEM_TIME..][..8].copy_from_slice(&self.base_ns.to_le_bytes());
        page[time_info::TSC_TO_SYSTEM_MUL..][..4].copy_from_slice(&self.scale.mul.to_le_bytes());
        page[time_info::TSC_SHIFT] = self.scale.shift as u8;
        page[time_info::FLAGS] = flags;
        page
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_are_normalized_and_exact_to_ppm() {
        for khz in [
            1,
            1000,
            999_999,
            1_000_000,
            1_000_001,
            2_599_998,
            5_000_000,
            u32::MAX,
        ] {
            let scale = Scale::from_khz(khz);
            assert!(scale.mul >= 1 << 31, "{khz}");
            let second = scale.ns(u64::from(khz) * 1000);
            assert!(second.abs_diff(1_000_000_000) < 1000, "{khz}: {second}");
        }
    }

    #[test]
    fn set_and_read() {
        let mut clock = KvmClock::new(1000, 1_000_000);
        assert_eq!(clock.ns(1000), 0);
        clock.set(5_000_000, 2000);
        assert_eq!(clock.ns(2000), 5_000_000);
        assert!(clock.ns(2100).abs_diff(5_000_100) <= 1);
        assert_eq!(clock.ns(1999), 5_000_000);
    }
}
