//! Stack frames of far transfers and event delivery: read and written as a whole, before anything
//! is committed.

use crate::env::{Env, Stop};
use crate::mem;
use crate::paging::{self, Access};
use crate::segment;
use crate::state::{CodeSize, CpuState, Segment, gpr, sreg};

/// The most items of a frame: an inner call with 31 parameters, and V86 interrupts.
pub(crate) const MAX_ITEMS: usize = 36;

/// A stack that frames are pushed on or popped from.
#[derive(Clone, Copy)]
pub(crate) struct Stack {
    pub segment: Segment,
    pub pointer: u64,
    /// 64-bit stack: no segmentation.
    pub flat: bool,
    /// Privilege level of the accesses.
    pub cpl: u8,
    /// Error code of #SS.
    pub error: u32,
}

impl Stack {
    /// The stack in use.
    pub fn current(cpu: &CpuState) -> Self {
        Stack {
            segment: cpu.seg[sreg::SS],
            pointer: cpu.gpr[gpr::RSP],
            flat: cpu.code_size() == CodeSize::Bits64,
            cpl: cpu.cpl,
            error: 0,
        }
    }

    fn mask(&self) -> u64 {
        if self.flat {
            u64::MAX
        } else if self.segment.db() {
            0xffff_ffff
        } else {
            0xffff
        }
    }

    fn linear(
        &self,
        cpu: &CpuState,
        offset: u64,
        size: usize,
        access: Access,
    ) -> Result<u64, Stop> {
        if self.flat {
            let last = offset.wrapping_add(size as u64).wrapping_sub(1);
            if paging::canonical(cpu, offset) && paging::canonical(cpu, last) {
                return Ok(offset);
            }
        } else if let Some(linear) = segment::linear_in(cpu, &self.segment, offset, size, access) {
            return Ok(linear);
        }
        Err(Stop::ss(self.error))
    }

    fn access(&self, write: bool) -> Access {
        Access {
            write,
            user: self.cpl == 3,
            ..Access::default()
        }
    }

    /// Writes `items`, the first one pushed first, each `size` bytes, and moves the pointer.
    pub fn push<E: Env + ?Sized>(
        &mut self,
        cpu: &CpuState,
        env: &mut E,
        items: &[u64],
        size: usize,
    ) -> Result<(), Stop> {
        let items = &items[..items.len().min(MAX_ITEMS)];
        let total = items.len() * size;
        let mask = self.mask();
        let access = self.access(true);
        let top = self.pointer & mask;
        let bottom = top.wrapping_sub(total as u64) & mask;
        // SP = 0 pushes to the end of the segment: the frame is still contiguous.
        if bottom < top || top == 0 {
            let linear = self.linear(cpu, bottom, total, access)?;
            let mut frame = [0u8; MAX_ITEMS * 8];
            for (slot, item) in frame.chunks_exact_mut(size).zip(items.iter().rev()) {
                slot.copy_from_slice(&item.to_le_bytes()[..size]);
            }
            mem::write_linear(cpu, env, linear, &frame[..total], access)?;
        } else {
            self.push_wrapping(cpu, env, items, size)?;
        }
        self.set(bottom);
        Ok(())
    }

    #[cold]
    fn push_wrapping<E: Env + ?Sized>(
        &self,
        cpu: &CpuState,
        env: &mut E,
        items: &[u64],
        size: usize,
    ) -> Result<(), Stop> {
        let access = self.access(true);
        for write in [false, true] {
            let mut at = self.pointer;
            for &item in items {
                at = at.wrapping_sub(size as u64) & self.mask();
                let linear = self.linear(cpu, at, size, access)?;
                if write {
                    mem::write_int(cpu, env, linear, item, size, access)?;
                } else {
                    env.translate(cpu, linear, access)?;
                }
            }
        }
        Ok(())
    }

    /// Reads items of `size` bytes that lie `skip` bytes above the top, the top-most first, without
    /// moving the pointer.
    pub fn peek<E: Env + ?Sized>(
        &self,
        cpu: &CpuState,
        env: &mut E,
        skip: u64,
        items: &mut [u64],
        size: usize,
    ) -> Result<(), Stop> {
        if items.is_empty() {
            return Ok(());
        }
        let total = items.len() * size;
        let mask = self.mask();
        let access = self.access(false);
        let bottom = self.pointer.wrapping_add(skip) & mask;
        let end = bottom.wrapping_add(total as u64 - 1) & mask;
        if bottom <= end && items.len() <= MAX_ITEMS {
            let linear = self.linear(cpu, bottom, total, access)?;
            let mut frame = [0u8; MAX_ITEMS * 8];
            mem::read_linear(cpu, env, linear, &mut frame[..total], access)?;
            for (slot, item) in frame.chunks_exact(size).zip(items) {
                let mut bytes = [0; 8];
                bytes[..size].copy_from_slice(slot);
                *item = u64::from_le_bytes(bytes);
            }
            return Ok(());
        }
        let mut at = bottom;
        for item in items {
            let linear = self.linear(cpu, at, size, access)?;
            *item = mem::read_int(cpu, env, linear, size, access)?;
            at = at.wrapping_add(size as u64) & mask;
        }
        Ok(())
    }

    /// Moves the pointer up by `bytes`.
    pub fn release(&mut self, bytes: u64) {
        let to = self.pointer.wrapping_add(bytes) & self.mask();
        self.set(to);
    }

    /// Sets the pointer, keeping the bits that the stack's size does not reach.
    pub fn set(&mut self, pointer: u64) {
        let mask = self.mask();
        self.pointer = if mask == 0xffff {
            (self.pointer & !mask) | (pointer & mask)
        } else {
            pointer & mask
        };
    }
}
