//! Where windows lie on the host: the process's address space from half a TiB on, in units, shared by the vCPUs.
//!
//! A *unit* is 1 TiB of linear addresses around a multiple of 1 TiB, so that neither a stack at the end of the user's half nor a program
//! at its start lies near the end of one. A window has as many units as its guest uses, each where the window's
//! *distance* puts it. Units of different vCPUs never overlap, and within [`REACH`] of the end of a unit nothing is mapped unless
//! its neighbour is the same vCPU's.
#![expect(unsafe_code, reason = "reserves address space")]

use super::{HIGH, LOW};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// The size of a unit.
pub const UNIT: u64 = 1 << 40;
/// The most that an access may lie from the address that was checked for it.
pub const REACH: i64 = 1 << 28;

/// Units of linear addresses that may be in a window, by kind.
const GUEST: [std::ops::RangeInclusive<i32>; 2] = [64..=128, 0..=16];
/// Host units for windows.
const HOST: std::ops::RangeInclusive<i32> = 1..=80;
/// Where the distances that are tried first begin: programs and stacks of vCPUs grow down from here side by side, with low
/// windows between them.
const FIRST: [i32; 2] = [-64, 26];

/// The unit of an address.
pub fn unit_of(address: u64) -> i32 {
    (address.saturating_add(UNIT / 2) >> 40) as i32
}

/// The first address of a unit.
pub fn start_of(unit: i32) -> u64 {
    (unit as u64).wrapping_mul(UNIT).wrapping_sub(UNIT / 2)
}

/// The kind of window that a unit of linear addresses may be part of.
pub fn kind_of(unit: i32) -> Option<usize> {
    [HIGH, LOW].into_iter().find(|&k| GUEST[k].contains(&unit))
}

/// Sets of units, by kind; bit 0 is the first one that may be in such a window.
pub type Units = [u128; 2];

/// A set of one unit; empty for what is in no window.
pub fn bit(unit: i32) -> u128 {
    kind_of(unit).map_or(0, |kind| 1 << (unit - GUEST[kind].start()))
}

/// The units of a set.
pub fn each(kind: usize, mut set: u128) -> impl Iterator<Item = i32> {
    std::iter::from_fn(move || {
        let first = (set != 0).then(|| set.trailing_zeros() as i32)?;
        set &= set - 1;
        Some(first + GUEST[kind].start())
    })
}

/// Which host units are somebody's.
static USED: Mutex<u128> = Mutex::new(0);

fn used() -> MutexGuard<'static, u128> {
    USED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The host units of a set at a distance, bit n for unit n; false behind it if some lie outside.
fn moved(kind: usize, units: u128, distance: i32) -> (u128, bool) {
    each(kind, units).fold((0, true), |(set, fits), unit| {
        let host = unit + distance;
        match HOST.contains(&host) {
            true => (set | 1 << host, fits),
            false => (set, false),
        }
    })
}

/// The host units that a vCPU has, and where its linear addresses are on them.
#[derive(Default)]
pub struct Places {
    units: Units,
    distance: [i32; 2],
}

impl Places {
    /// Takes host units for `units`, in place of those that it has. False if there is no room; then it has none.
    pub fn take(&mut self, units: Units) -> bool {
        let mut used = used();
        self.give_back(&mut used);
        for kind in [HIGH, LOW] {
            let Some(distance) = best(kind, units[kind], *used) else {
                self.give_back(&mut used);
                return false;
            };
            self.distance[kind] = distance;
            self.units[kind] = units[kind];
            *used |= moved(kind, units[kind], distance).0;
        }
        true
    }

    /// Takes the host unit for one more unit. False if it is another vCPU's, or there is none.
    pub fn add(&mut self, unit: i32) -> bool {
        let Some(kind) = kind_of(unit) else {
            return false;
        };
        if self.has(unit) {
            return true;
        }
        let mut used = used();
        let (set, fits) = moved(kind, bit(unit), self.distance[kind]);
        if !fits || *used & set != 0 {
            return false;
        }
        *used |= set;
        self.units[kind] |= bit(unit);
        true
    }

    /// Gives all host units back.
    pub fn release(&mut self) {
        self.give_back(&mut used());
    }

    fn give_back(&mut self, used: &mut u128) {
        *used &= !self.host_units();
        self.units = [0; 2];
    }

    fn host_units(&self) -> u128 {
        [HIGH, LOW]
            .into_iter()
            .fold(0, |s, k| s | moved(k, self.units[k], self.distance[k]).0)
    }

    /// It has the host unit for this unit.
    pub fn has(&self, unit: i32) -> bool {
        kind_of(unit).is_some_and(|k| self.units[k] & bit(unit) != 0)
    }

    /// Units that it has.
    pub fn units(&self) -> Units {
        self.units
    }

    /// What is added to linear addresses to get host addresses.
    pub fn offset(&self, kind: usize) -> u64 {
        (self.distance[kind] as u64).wrapping_mul(UNIT)
    }

    /// The host address of a linear address, whether it has the unit or not.
    pub fn host_of(&self, gva: u64) -> Option<u64> {
        Some(gva.wrapping_add(self.offset(kind_of(unit_of(gva))?)))
    }

    /// The linear address of a host address in one of its units, or near.
    pub fn guest_of(&self, host: u64) -> Option<u64> {
        let here = |near: u64| {
            let at = unit_of(near);
            let kind = [HIGH, LOW].into_iter().find(|&k| {
                let unit = at - self.distance[k];
                kind_of(unit) == Some(k) && self.units[k] & bit(unit) != 0
            })?;
            Some(host.wrapping_sub(self.offset(kind)))
        };
        [0, REACH, -REACH]
            .into_iter()
            .find_map(|by| here(host.wrapping_add_signed(by)))
    }
}

/// The distance at which there is room for `units`, and if possible around them.
fn best(kind: usize, units: u128, used: u128) -> Option<i32> {
    let around = each(kind, units).fold(units, |set, unit| {
        [unit - 1, unit + 1]
            .into_iter()
            .filter(|&u| kind_of(u) == Some(kind))
            .fold(set, |set, u| set | bit(u))
    });
    let cost = |distance: i32| {
        let (set, fits) = moved(kind, units, distance);
        let (more, all_fit) = moved(kind, around, distance);
        (fits && used & set == 0).then(|| (used & more).count_ones() + u32::from(!all_fit))
    };
    let first = FIRST[kind];
    let (down, up) = (-128..first, first + 1..=80);
    let order: Vec<i32> = match kind {
        HIGH => std::iter::once(first).chain(down.rev()).chain(up).collect(),
        _ => std::iter::once(first).chain(up).chain(down.rev()).collect(),
    };
    order
        .into_iter()
        .filter_map(|d| Some((cost(d)?, d)))
        .min_by_key(|&(cost, _)| cost)
        .map(|(_, d)| d)
}

pub(super) const NOTHING: libc::c_int =
    libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Reserves all host units and what can be reached from them, for good. False if something lies there.
pub fn reserved() -> bool {
    static RESERVED: OnceLock<bool> = OnceLock::new();
    *RESERVED.get_or_init(|| {
        let start = start_of(*HOST.start()).wrapping_sub(REACH as u64);
        let end = start_of(*HOST.end() + 1) + REACH as u64;
        let done = reserve(start, end);
        if !done {
            log::debug!("engine_jit: no windows: {start:#x}-{end:#x} cannot be reserved");
        }
        done
    })
}

fn reserve(start: u64, end: u64) -> bool {
    let flags = NOTHING | libc::MAP_FIXED_NOREPLACE;
    let len = (end - start) as usize;
    // SAFETY: takes no address that is in use; a kernel that does not know the flag may choose
    // another, which is given back.
    unsafe {
        let at = libc::mmap(start as *mut _, len, libc::PROT_NONE, flags, -1, 0);
        if at == libc::MAP_FAILED {
            return false;
        }
        if at as u64 != start {
            libc::munmap(at, len);
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A position-independent program, libraries and a stack, and a low program.
    fn linux() -> Units {
        [bit(85) | bit(127) | bit(128), bit(0)]
    }

    #[test]
    fn many_vcpus_side_by_side() {
        let mut all: Vec<Places> = Vec::new();
        while all.len() < 16 {
            let mut p = Places::default();
            if !p.take(linux()) {
                break;
            }
            all.push(p);
            if let [a, b] = &mut all[..] {
                assert!(a.add(86) && b.add(86));
                assert!(a.take(linux()) && b.take(linux()));
            }
        }
        assert!(all.len() >= 11, "{}", all.len());
        let mut seen = 0;
        for p in &all {
            assert_eq!(seen & p.host_units(), 0);
            assert_eq!(p.host_units().count_ones(), 4);
            seen |= p.host_units();
            for gva in [0x40_0000, 0x5555_5555_4000, 0x7fff_ffff_e000] {
                let host = p.host_of(gva).expect("in a unit");
                assert_eq!(p.guest_of(host), Some(gva));
                assert!(
                    !all.iter()
                        .any(|o| !std::ptr::eq(o, p) && o.guest_of(host).is_some())
                );
            }
        }
        assert!(!all[0].add(40) && !all[0].add(-1) && !all[0].add(129));
        for mut p in all {
            p.release();
        }
        let mut everything = Places::default();
        assert!(everything.take([(64..=128).fold(0, |set, u| set | bit(u)), 0]));
        assert!(!Places::default().take(linux()));
        everything.release();
    }

    #[test]
    fn units_and_addresses() {
        assert_eq!(unit_of(0), 0);
        assert_eq!(unit_of(0x7fff_ffff_ffff), 128);
        assert_eq!(unit_of(start_of(77)), 77);
        assert_eq!(unit_of(start_of(77) - 1), 76);
        assert_eq!(kind_of(unit_of(0x5555_5555_4000)), Some(HIGH));
        assert_eq!(kind_of(40), None);
        assert_eq!(kind_of(unit_of(u64::MAX)), None);
        assert_eq!(kind_of(unit_of(1 << 63)), None);
    }
}
