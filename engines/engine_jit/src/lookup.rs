//! A hash table of numbers whose keys are kept elsewhere: four bytes a slot.

/// See the module's description. Numbers are below `u32::MAX - 1`.
#[derive(Debug, Default)]
pub struct Lookup {
    /// A number plus two; open addressing, a power of two of slots.
    slots: Vec<u32>,
    /// Slots that are not [`EMPTY`].
    used: usize,
    /// Numbers.
    len: usize,
}

const EMPTY: u32 = 0;
const GONE: u32 = 1;

impl Lookup {
    fn places(&self, hash: u64) -> impl Iterator<Item = usize> + use<> {
        let mask = self.slots.len().wrapping_sub(1);
        (0..self.slots.len()).map(move |i| (hash as usize).wrapping_add(i) & mask)
    }

    fn place(&self, hash: u64, is: impl Fn(u32) -> bool) -> Option<usize> {
        self.places(hash)
            .take_while(|&at| self.slots[at] != EMPTY)
            .find(|&at| self.slots[at] != GONE && is(self.slots[at] - 2))
    }

    /// The number with this hash that `is` the one.
    pub fn get(&self, hash: u64, is: impl Fn(u32) -> bool) -> Option<u32> {
        self.place(hash, is).map(|at| self.slots[at] - 2)
    }

    /// Enters a number that is not there. `hash_of`: any number's hash.
    pub fn insert(&mut self, number: u32, hash_of: impl Fn(u32) -> u64) {
        if (self.used + 1) * 4 > self.slots.len() * 3 {
            let slots = ((self.len + 1) * 2).next_power_of_two().max(64);
            let old = std::mem::replace(&mut self.slots, vec![EMPTY; slots]);
            (self.used, self.len) = (0, 0);
            for word in old.into_iter().filter(|&w| w > GONE) {
                self.enter(word, hash_of(word - 2));
            }
        }
        self.enter(number + 2, hash_of(number));
    }

    fn enter(&mut self, word: u32, hash: u64) {
        // The same key comes and goes where code is generated: what it left must not pile up.
        let free = self.places(hash).find(|&at| self.slots[at] <= GONE);
        if let Some(at) = free {
            self.used += usize::from(self.slots[at] == EMPTY);
            self.slots[at] = word;
            self.len += 1;
        }
    }

    /// Removes a number.
    pub fn remove(&mut self, hash: u64, number: u32) {
        if let Some(at) = self.place(hash, |n| n == number) {
            self.slots[at] = GONE;
            self.len -= 1;
        }
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_come_and_go() {
        // Many share a hash.
        let hash = |n: u32| u64::from(n % 97);
        let mut table = Lookup::default();
        for n in 0..1000 {
            table.insert(n, hash);
        }
        for n in (0..1000).filter(|n| n % 3 == 0) {
            table.remove(hash(n), n);
        }
        for round in 0..3 {
            for n in 0..1000 {
                let found = table.get(hash(n), |m| m == n);
                assert_eq!(found, (n % 3 != 0).then_some(n), "round {round}");
            }
            for n in 2000..4000 {
                table.insert(n, hash);
                table.remove(hash(n), n);
            }
        }
        assert!(table.slots.len() <= 2048);
        let used = table.used;
        for n in 5000..6000 {
            table.insert(n, |_| 7);
            table.remove(7, n);
        }
        assert!(table.used <= used + 1);
        table.clear();
        assert_eq!(table.get(1, |_| true), None);
    }
}
