//! Jumps, calls and returns of code with windows: see [`crate::far`]. EFLAGS holds what is live wherever such code
//! goes, so they touch none.

use super::*;
use crate::far;
use crate::layout::far_branch_word;
use crate::shadow;

impl Tx<'_> {
    /// The entry of a block at a page offset. I becomes the place of the high window, where it is not already. Then there is
    /// a NOP, of which the first half can be overwritten by a call in one store.
    /// The other half says where this is ([`place_word`]).
    pub(super) fn enter_far(&mut self, offset: u16) {
        self.placed(crate::window::HIGH);
        debug_assert_eq!(self.a.here(), far::ENTRY);
        self.a.bytes(&[0x66, 0x0f, 0x1f, 0x84, 0x00]);
        self.a.d32(place_word(self.ask.page, offset));
    }

    /// Notes which page this is for the stub that is called, in code with windows. Clobbers I; keeps flags.
    pub(super) fn note_page(&mut self) {
        if self.ctx.windows() {
            self.a.load(Size::Q, I, far::page(self.ask.page));
            self.a.store(Size::Q, Mem::Gs(off::PC_BASE), I);
        }
    }

    /// Inline data that tells the same.
    pub(super) fn page_word(&mut self) {
        if self.ctx.windows() {
            self.a.d32(self.ask.page.into());
        }
    }

    /// The branch word of an indirect branch that moves RSP by -8, 0 or 8.
    fn far_word(&self, op: &Op, moved: i32) -> u32 {
        far_branch_word(op.off, moved, self.ask.page)
    }

    /// Brings live flags to EFLAGS, whatever T and I hold.
    pub(super) fn settle_flags(&mut self, live: u32) {
        self.restore_flags(live, true);
    }

    /// Goes to page offset `target` of this page through a slot: jumps (`4`) or calls (`2`). Where that leads has to
    /// look it up if there are no slots left.
    fn through_slot(&mut self, how: u8, target: i64, backwards: bool) {
        let slot = self.ask.far + self.fars_used;
        if slot as usize >= far::SLOTS {
            self.load_linear(T, target);
            self.look_up(how, 0);
            self.scratch.lose_place();
            return;
        }
        self.fars_used += 1;
        if backwards {
            self.a.load(Size::D, T, Mem::Gs(off::ATTENTION));
        }
        self.a
            .op_mem(Size::D, &[0xff], how, far::slot(slot, backwards));
        self.cold.push(Cold::Far { slot, target });
    }

    /// Looks T up in the jump cache and jumps (`4`) or calls (`2`); where a call's return lands.
    fn look_up(&mut self, how: u8, branch: u32) -> usize {
        let jump = far::jump(&mut self.a, how);
        let lands = self.a.here();
        self.cold.push(Cold::LostFar {
            jump,
            branch,
            lands: (how == 2).then_some(lands),
        });
        lands
    }

    /// Jumps out of the page.
    pub(super) fn jump_far(&mut self, target: i64, live: u32, backwards: bool) {
        self.settle_flags(live);
        self.placed(crate::window::HIGH);
        self.through_slot(4, target, backwards);
    }

    pub(super) fn jump_indirect_far(&mut self, op: &Op) {
        self.settle_stack(op.off);
        let mut misses = Vec::new();
        if self.window(op).is_none() && op.insn.op0_kind() == OpKind::Memory {
            self.save_flags(op.live_before);
        }
        self.load_target(op, &mut misses);
        self.settle_flags(op.live_before);
        self.scratch.forget();
        self.look_up(4, self.far_word(op, 0));
        self.resume_miss(misses, op);
    }

    /// Pushes the return address of a call, and its complement on the stack of return addresses.
    /// `poll`: page offset of the target, and the flags that it reads, if it lies before the call in this page.
    fn push_return_far(
        &mut self,
        op: &Op,
        poll: Option<(u16, u32)>,
        misses: &mut Vec<PendingMiss>,
    ) {
        let next = i64::from(op.off) + op.insn.len() as i64;
        // Faults if there is no room.
        self.a.load(Size::D, T, at(reg::RSP, -shadow::PROBE));
        self.scratch.lose_base();
        if self.window(op).is_some() {
            let kind = self.stack_window(op);
            let to = self.through(window::Base::Gpr(4), -8, kind);
            self.load_linear(T, next);
            self.a.store(Size::Q, to, T);
            if poll.is_some() {
                self.a.mov(I, T);
                self.scratch.lose_place();
            }
        } else {
            self.save_flags(op.live_before);
            let retry = self.a.here();
            self.stack_address(-8, 8);
            misses.push(self.probe(8, true, retry, op));
            self.a.lea(T, Mem::Sib(Some(I), Some((T, 0)), 0));
            self.load_linear(I, next);
            self.a.store(Size::Q, at(T, 0), I);
            self.a.mov(T, I);
            self.scratch.lose_place();
        }
        self.settle_flags(op.live_before);
        self.scratch.lose_base();
        self.move_stack(-8);
        if let Some((target, live)) = poll {
            self.poll(target, live);
            self.a.mov(T, I);
        }
        self.a.op_reg(Size::Q, &[0xf7], 2, T); // not
        self.push_t();
    }

    pub(super) fn call_far(&mut self, op: &Op, target: i64) {
        self.settle_probed(op);
        let mut misses = Vec::new();
        let backwards = target <= i64::from(op.off);
        let near = self.linkable(target);
        let poll = (near && backwards).then_some((target as u16, op.live_target));
        self.push_return_far(op, poll, &mut misses);
        self.placed(crate::window::HIGH);
        if near {
            self.a.align_link(1);
            self.a.bytes(&[0xe8, 0, 0, 0, 0]);
            let site = self.a.here() - 4;
            self.cold.push(Cold::Link {
                site,
                target: target as u16,
                save: true,
                fpu: self.block.fpu,
                apart: 0,
            });
        } else {
            self.through_slot(2, target, backwards);
        }
        self.landing_far(op);
        self.resume_miss(misses, op);
    }

    pub(super) fn call_indirect_far(&mut self, op: &Op) {
        self.settle_probed(op);
        let mut misses = Vec::new();
        if self.window(op).is_none() && op.insn.op0_kind() == OpKind::Memory {
            self.save_flags(op.live_before);
        }
        self.load_target(op, &mut misses);
        self.a.store(Size::Q, Mem::Gs(off::SPILL + 16), T);
        self.scratch.forget();
        self.push_return_far(op, None, &mut misses);
        self.a.load(Size::Q, T, Mem::Gs(off::SPILL + 16));
        self.look_up(2, self.far_word(op, -8));
        self.landing_far(op);
        self.resume_miss(misses, op);
    }

    /// Behind a host call: where the guest's return from this call lands, with its target in T and its
    /// branch word in I.
    fn landing_far(&mut self, op: &Op) {
        let next = usize::from(op.off) + op.insn.len();
        if next > 4096 - MAX_LEN {
            self.a.lea(reg::RSP, at(reg::RSP, 8));
            self.a.jmp_to(self.stubs.far.lost);
            return;
        }
        self.a.store(Size::Q, far::RCX, reg::RCX);
        self.a.bytes(&[0x59]); // pop rcx
        self.a
            .lea(reg::RCX, Mem::Sib(Some(reg::RCX), Some((T, 0)), 1));
        let same = self.a.jrcxz();
        self.a.jmp_to(self.stubs.far.astray);
        self.a.bind8(same);
        self.a.load(Size::Q, reg::RCX, far::RCX_POPPED);
        self.a.align_link(1);
        let site = self.a.jmp();
        self.cold.push(Cold::Land {
            site,
            target: next as u16,
        });
    }
}

/// Page offset and number of the page in a word.
fn place_word(page: u16, offset: u16) -> u32 {
    u32::from(page) << 12 | u32::from(offset & 0xfff)
}
