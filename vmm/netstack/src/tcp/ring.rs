//! A byte queue that grows on demand up to a fixed limit.

use std::io::{IoSlice, IoSliceMut};

const FIRST_ALLOCATION: usize = 16 * 1024;

/// Bytes in order, in at most two pieces of memory.
pub(super) struct Ring {
    buf: Vec<u8>,
    head: usize,
    len: usize,
    limit: usize,
}

impl Ring {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            buf: Vec::new(),
            head: 0,
            len: 0,
            limit,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Bytes that can still be added.
    pub(super) fn free(&self) -> usize {
        self.limit - self.len
    }

    /// Gives the memory back if nothing is queued.
    pub(super) fn shrink(&mut self) {
        if self.len == 0 {
            self.buf = Vec::new();
            self.head = 0;
        }
    }

    fn grow(&mut self, room: usize) {
        let want = self.len.saturating_add(room).min(self.limit);
        if want <= self.buf.len() {
            return;
        }
        let size = want
            .max(self.buf.len() * 2)
            .max(FIRST_ALLOCATION)
            .min(self.limit);
        let mut bigger = Vec::with_capacity(size);
        let (a, b) = self.pieces(0, self.len);
        bigger.extend_from_slice(a);
        bigger.extend_from_slice(b);
        bigger.resize(size, 0);
        self.buf = bigger;
        self.head = 0;
    }

    /// Appends as much of `data` as there is room for and returns how much that was.
    pub(super) fn push(&mut self, data: &[u8]) -> usize {
        let n = data.len().min(self.free());
        self.grow(n);
        let (a, b) = self.vacant();
        let first = n.min(a.len());
        a[..first].copy_from_slice(&data[..first]);
        b[..n - first].copy_from_slice(&data[first..n]);
        self.len += n;
        n
    }

    fn vacant(&mut self) -> (&mut [u8], &mut [u8]) {
        let size = self.buf.len();
        if size == 0 {
            return (&mut [], &mut []);
        }
        let tail = (self.head + self.len) % size;
        if self.len == size {
            (&mut [], &mut [])
        } else if tail < self.head {
            (&mut self.buf[tail..self.head], &mut [])
        } else {
            let (front, back) = self.buf.split_at_mut(tail);
            (back, &mut front[..self.head])
        }
    }

    /// Appends what `read` puts in the vacant memory, which is never empty while [`Ring::free`] is not 0.
    pub(super) fn fill<E>(
        &mut self,
        read: impl FnOnce(&mut [IoSliceMut<'_>]) -> Result<usize, E>,
    ) -> Result<usize, E> {
        // A full buffer means that the reader is slower than the writer: more memory then means fewer calls.
        if self.len * 2 >= self.buf.len() {
            self.grow(self.buf.len().max(FIRST_ALLOCATION));
        }
        let (a, b) = self.vacant();
        let room = a.len() + b.len();
        let n = read(&mut [IoSliceMut::new(a), IoSliceMut::new(b)])?.min(room);
        self.len += n;
        Ok(n)
    }

    /// The `len` bytes from `offset` on; the caller stays within [`Ring::len`].
    pub(super) fn pieces(&self, offset: usize, len: usize) -> (&[u8], &[u8]) {
        let size = self.buf.len();
        if size == 0 || len == 0 {
            return (&[], &[]);
        }
        let start = (self.head + offset) % size;
        let first = len.min(size - start);
        (&self.buf[start..start + first], &self.buf[..len - first])
    }

    /// Everything queued, for a vectored write.
    pub(super) fn io_slices(&self) -> [IoSlice<'_>; 2] {
        let (a, b) = self.pieces(0, self.len);
        [IoSlice::new(a), IoSlice::new(b)]
    }

    /// Drops `n` bytes at the front; the caller stays within [`Ring::len`].
    pub(super) fn consume(&mut self, n: usize) {
        let n = n.min(self.len);
        self.len -= n;
        self.head = if self.len == 0 {
            0
        } else {
            (self.head + n) % self.buf.len()
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keeps_order_across_wrap_and_growth() {
        let mut ring = Ring::new(100_000);
        let (mut next_in, mut next_out) = (0u32, 0u32);
        let mut step = 1usize;
        for round in 0..5000 {
            step = (step * 7 + 13) % 5000;
            let data: Vec<u8> = (0..step)
                .map(|i| (next_in.wrapping_add(i as u32) % 251) as u8)
                .collect();
            let n = if round % 2 == 0 {
                ring.push(&data)
            } else if ring.free() == 0 {
                0
            } else {
                ring.fill(|bufs| {
                    let mut done = 0;
                    for buf in bufs {
                        let n = buf.len().min(data.len() - done);
                        buf[..n].copy_from_slice(&data[done..done + n]);
                        done += n;
                    }
                    Ok::<_, ()>(done)
                })
                .unwrap()
            };
            next_in += n as u32;
            assert!(ring.len() <= 100_000);
            let take = ring.len().min((step * 3) % 4001);
            let (a, b) = ring.pieces(0, take);
            for &byte in a.iter().chain(b) {
                assert_eq!(byte, (next_out % 251) as u8);
                next_out += 1;
            }
            ring.consume(take);
        }
        assert!(next_out > 1_000_000);
    }

    #[test]
    fn stops_at_its_limit() {
        let mut ring = Ring::new(5000);
        assert_eq!(ring.push(&[1; 6000]), 5000);
        assert_eq!(ring.free(), 0);
        assert_eq!(ring.push(&[1]), 0);
        ring.consume(5000);
        ring.shrink();
        assert_eq!(ring.io_slices().iter().map(|s| s.len()).sum::<usize>(), 0);
    }
}
