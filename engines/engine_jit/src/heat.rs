//! Which guest address spaces are worth windows: those that run long, as mapping costs microseconds a page.
//!
//! Times are in cycles of the host's TSC.

use crate::window::key;

/// Address spaces that are watched.
const SPACES: usize = 16;
/// How long an address space runs before it gets windows: about four milliseconds.
const HOT: i64 = 10_000_000;
/// The longest time between two looks that counts.
const LONGEST: u64 = 30_000_000;
/// The most that counts of one cost.
const LONGEST_COST: u64 = 2_000_000;
/// What mappings may cost in the beginning.
const CREDIT: u64 = 10_000_000;
/// User time with windows after which half of it is forgotten, and of its costs: what a process did long ago, or another one
/// with the same page table, says nothing about now.
const FORGET: u64 = 100_000_000;
/// How long an address space whose windows did not pay has to run before it gets new ones; doubled each time.
const PAUSE: i64 = 100_000_000;

#[derive(Clone, Copy, Default)]
struct Space {
    cr3: u64,
    /// How long it has run, less how long others with windows have; negative after its windows did not pay.
    heat: i64,
    /// How often its windows did not pay.
    strikes: u8,
}

/// See the module's description.
#[derive(Default)]
pub struct Heat {
    spaces: [Space; SPACES],
    next: usize,
    /// When it was last looked at.
    last: u64,
    /// The address space that runs user code since; 0: none.
    running: u64,
    /// User time with the present windows, and the cost of their mappings.
    used: u64,
    cost: u64,
    /// How often windows were given to an address space.
    pub taken: u64,
    /// How often they did not pay.
    pub refused: u64,
    /// User time with and without windows, and the cost of mappings, since start.
    pub total: [u64; 3],
}

impl Heat {
    /// The vCPU is about to run code of `cr3`; `user`: at CPL 3. `windows`: whether what ran until now had windows.
    pub fn tick(&mut self, now: u64, cr3: u64, user: bool, windows: bool) {
        let spent = now.wrapping_sub(self.last).min(LONGEST);
        self.last = now;
        let was = std::mem::replace(&mut self.running, if user { key(cr3) } else { 0 });
        if was == 0 {
            return;
        }
        self.total[usize::from(!windows)] += spent;
        if windows {
            self.used += spent;
            if self.used > FORGET {
                (self.used, self.cost) = (self.used / 2, self.cost / 2);
            }
        }
        for s in &mut self.spaces {
            if s.cr3 == was {
                s.heat = s.heat.saturating_add(spent as i64).min(4 * HOT);
            } else if windows && s.heat > 0 {
                s.heat = (s.heat - spent as i64).max(0);
            }
        }
    }

    /// This address space should have windows.
    pub fn hot(&mut self, cr3: u64) -> bool {
        let cr3 = key(cr3);
        if let Some(s) = self.spaces.iter().find(|s| s.cr3 == cr3) {
            return s.heat > HOT;
        }
        self.spaces[self.next % SPACES] = Space {
            cr3,
            ..Space::default()
        };
        self.next = self.next.wrapping_add(1);
        false
    }

    /// It has got them.
    pub fn took(&mut self) {
        (self.used, self.cost) = (0, 0);
        self.taken += 1;
    }

    /// Mapping took `cycles`. False if the windows do not pay.
    pub fn charge(&mut self, cr3: u64, cycles: u64) -> bool {
        // What takes longer is done once: looking for the file of guest RAM.
        self.cost += cycles.min(LONGEST_COST);
        self.total[2] += cycles;
        if self.cost <= CREDIT + self.used / 4 {
            return true;
        }
        self.refuse(cr3);
        false
    }

    /// This address space goes without windows for a while.
    pub fn refuse(&mut self, cr3: u64) {
        self.refused += 1;
        let cr3 = key(cr3);
        if let Some(s) = self.spaces.iter_mut().find(|s| s.cr3 == cr3) {
            s.heat = -(PAUSE << s.strikes.min(6));
            s.strikes = s.strikes.saturating_add(1);
        }
    }
}
