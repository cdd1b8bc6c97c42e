//! A bounded table whose keys go stale when their entry is removed.

/// Names an entry; never matches a later entry in the same place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    index: u32,
    generation: u32,
}

const GENERATION_BITS: u32 = 24;

impl Key {
    /// Packs the key in the low 56 bits.
    pub(crate) fn to_bits(self) -> u64 {
        (u64::from(self.generation) << 32) | u64::from(self.index)
    }

    /// The inverse of [`Key::to_bits`]; ignores the top 8 bits.
    pub(crate) fn from_bits(bits: u64) -> Self {
        Self {
            index: bits as u32,
            generation: (bits >> 32) as u32 & ((1 << GENERATION_BITS) - 1),
        }
    }
}

struct Slot<T> {
    generation: u32,
    value: Option<T>,
}

pub(crate) struct Slab<T> {
    slots: Vec<Slot<T>>,
    free: Vec<u32>,
    limit: usize,
}

impl<T> Slab<T> {
    pub(crate) fn new(limit: usize) -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            limit: limit.min(1 << 24),
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.len() >= self.limit
    }

    /// Adds an entry made with knowledge of its key; `None` if the table is full or `make` declines.
    pub(crate) fn insert_with(&mut self, make: impl FnOnce(Key) -> Option<T>) -> Option<Key> {
        if self.is_full() {
            return None;
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                self.slots.push(Slot {
                    generation: 0,
                    value: None,
                });
                (self.slots.len() - 1) as u32
            }
        };
        let slot = &mut self.slots[index as usize];
        let key = Key {
            index,
            generation: slot.generation,
        };
        slot.value = make(key);
        if slot.value.is_none() {
            self.free.push(index);
            return None;
        }
        Some(key)
    }

    pub(crate) fn get_mut(&mut self, key: Key) -> Option<&mut T> {
        let slot = self.slots.get_mut(key.index as usize)?;
        if slot.generation != key.generation {
            return None;
        }
        slot.value.as_mut()
    }

    pub(crate) fn remove(&mut self, key: Key) -> Option<T> {
        let slot = self.slots.get_mut(key.index as usize)?;
        if slot.generation != key.generation {
            return None;
        }
        let value = slot.value.take()?;
        slot.generation = (slot.generation + 1) & ((1 << GENERATION_BITS) - 1);
        self.free.push(key.index);
        Some(value)
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (Key, &T)> {
        self.slots.iter().enumerate().filter_map(|(index, slot)| {
            let key = Key {
                index: index as u32,
                generation: slot.generation,
            };
            slot.value.as_ref().map(|value| (key, value))
        })
    }

    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (Key, &mut T)> {
        self.slots
            .iter_mut()
            .enumerate()
            .filter_map(|(index, slot)| {
                let key = Key {
                    index: index as u32,
                    generation: slot.generation,
                };
                slot.value.as_mut().map(|value| (key, value))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stale_keys_miss_and_the_limit_holds() {
        let mut slab = Slab::new(2);
        let a = slab.insert_with(|_| Some(1)).unwrap();
        let b = slab.insert_with(|_| Some(2)).unwrap();
        assert!(slab.insert_with(|_| Some(3)).is_none());
        assert_eq!(slab.remove(a), Some(1));
        assert_eq!(slab.remove(a), None);
        let c = slab.insert_with(|_| Some(4)).unwrap();
        assert_ne!(a, c);
        assert!(slab.get_mut(a).is_none());
        assert_eq!(Key::from_bits(c.to_bits() | (7 << 56)), c);
        assert_eq!(slab.iter().count(), 2);
        assert_eq!(slab.get_mut(b), Some(&mut 2));
    }

    #[test]
    fn a_declined_entry_leaves_no_trace() {
        let mut slab: Slab<u8> = Slab::new(1);
        assert!(slab.insert_with(|_| None).is_none());
        assert_eq!(slab.len(), 0);
        assert!(slab.insert_with(|_| Some(1)).is_some());
    }
}
