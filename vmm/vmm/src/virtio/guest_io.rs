//! Bytes between descriptor chains and the host.

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::Chain;
use crate::memory::GuestMem;

/// A chain's buffers, checked to lie in guest memory.
pub(crate) struct Buffers<'a> {
    /// What the device reads.
    pub readable: Span<'a>,
    /// What the device writes.
    pub writable: Span<'a>,
}

/// Consecutive bytes over several pieces of guest memory.
#[derive(Default)]
pub(crate) struct Span<'a> {
    slices: Vec<VolatileSlice<'a>>,
    len: usize,
}

impl<'a> Buffers<'a> {
    /// Collects the buffers of `chain`; `None` if one is not guest memory or if a readable one
    /// comes after a writable one.
    pub fn new(memory: &'a GuestMem, chain: Chain<'_>) -> Option<Self> {
        let mut buffers = Self {
            readable: Span::default(),
            writable: Span::default(),
        };
        let chain: DescriptorChain<_> = chain;
        for descriptor in chain {
            let write_only = descriptor.is_write_only();
            if !write_only && buffers.writable.len > 0 {
                return None;
            }
            let span = if write_only {
                &mut buffers.writable
            } else {
                &mut buffers.readable
            };
            span.push(memory, descriptor.addr(), descriptor.len() as usize)?;
        }
        Some(buffers)
    }
}

impl<'a> Span<'a> {
    fn push(&mut self, memory: &'a GuestMem, addr: GuestAddress, len: usize) -> Option<()> {
        for slice in GuestMemoryBackend::get_slices(memory, addr, len) {
            let slice = slice.ok()?;
            self.len = self.len.checked_add(slice.len())?;
            self.slices.push(slice);
        }
        Some(())
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn slices(&self) -> &[VolatileSlice<'a>] {
        &self.slices
    }

    /// Splits off the first `at` bytes; `None` if there are fewer.
    pub fn split_front(&mut self, at: usize) -> Option<Span<'a>> {
        let rest_len = self.len.checked_sub(at)?;
        let mut front = Span {
            slices: Vec::new(),
            len: at,
        };
        let mut rest = Span {
            slices: Vec::new(),
            len: rest_len,
        };
        let mut left = at;
        for slice in self.slices.drain(..) {
            let take = left.min(slice.len());
            if take > 0 {
                front.slices.push(slice.subslice(0, take).ok()?);
            }
            if take < slice.len() {
                rest.slices.push(slice.offset(take).ok()?);
            }
            left -= take;
        }
        *self = rest;
        Some(front)
    }

    /// Copies the first bytes into `buffer`; returns how many there were.
    pub fn read(&self, buffer: &mut [u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            if done == buffer.len() {
                break;
            }
            done += slice.read(&mut buffer[done..], 0).unwrap_or(0);
        }
        done
    }

    /// Copies `bytes` to the start; returns how many fit.
    pub fn write(&self, bytes: &[u8]) -> usize {
        let mut done = 0;
        for slice in &self.slices {
            if done == bytes.len() {
                break;
            }
            done += slice.write(&bytes[done..], 0).unwrap_or(0);
        }
        done
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory;

    #[test]
    fn spans_split_and_copy_across_pieces() {
        let memory = memory::create(16 << 20).unwrap();
        let mut span = Span::default();
        for (addr, len) in [(0x1000, 3), (0x2000, 5), (0x3000, 4)] {
            span.push(&memory, GuestAddress(addr), len).unwrap();
        }
        assert_eq!(span.write(b"abcdefghijklmnop"), 12);
        let front = span.split_front(4).unwrap();
        let mut buffer = [0; 8];
        assert_eq!(front.read(&mut buffer), 4);
        assert_eq!(&buffer[..4], b"abcd");
        assert_eq!(span.read(&mut buffer), 8);
        assert_eq!(&buffer, b"efghijkl");
        assert!(span.split_front(9).is_none());
        assert!(
            Span::default()
                .push(&memory, GuestAddress((16 << 20) - 1), 2)
                .is_none()
        );
    }
}
