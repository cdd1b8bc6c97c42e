//! Code behind the block: misses, links, polls.

use super::*;

/// Code that is emitted behind the block, where it does not get in the way.
pub(super) enum Cold {
    /// A TLB miss: of which probe and instruction, where to go on, whether EFLAGS must be loaded
    /// there.
    Miss {
        miss: PendingMiss,
        op: usize,
        resume: usize,
        reload: bool,
    },
    /// The probe of a group of accesses failed.
    Group(GroupMiss),
    /// A direct jump that is not linked: the jump's displacement, page offset of the target,
    /// whether EFLAGS must be saved; of how many instructions alone, or 0.
    Link {
        site: usize,
        target: u16,
        save: bool,
        fpu: bool,
        apart: usize,
    },
    /// The attention flag is up: jump to bind, page offset where execution stops.
    Poll {
        jump: usize,
        target: u16,
        save: bool,
        restore_rcx: bool,
    },
    /// A branch whose target is not in the jump cache: jumps to bind, its branch word or 0 if it is
    /// direct; of a call, where its return lands.
    Lost {
        jumps: [usize; 2],
        branch: u32,
        lands: Option<usize>,
    },
    /// A repeated string instruction that does not fit a page at each side: jumps to bind, its page offset,
    /// where the flags are, where to go on.
    Pages {
        jumps: Vec<usize>,
        offset: u16,
        strings: Strings,
        flags: Flags,
        resume: usize,
    },
    /// A jump through a slot: its number, page offset of the target.
    Far { slot: u32, target: i64 },
    /// An indirect branch whose target is not in the jump cache: jump to bind, its branch word, where the
    /// return of a call lands.
    LostFar {
        jump: usize,
        branch: u32,
        lands: Option<usize>,
    },
    /// The attention flag is up at a direct call: jump to bind, page offset of the target, where its
    /// return lands.
    CallPoll {
        jump: usize,
        target: u16,
        lands: usize,
    },
    /// The stack of return addresses is full: jump to bind, where to go on.
    Full { jump: usize, resume: usize },
    /// A return has landed where no code is linked yet: the jump's displacement, page offset.
    Land { site: usize, target: u16 },
    /// A taken conditional jump backwards or out of the page: jump to bind.
    Taken { jump: usize, target: i64, live: u32 },
    /// Loads the FPU: jump to bind, where to go on.
    Interpret {
        jump: usize,
        meta: u32,
        resume: usize,
        reload: bool,
        save: bool,
    },
}

/// What becomes of an access that crosses a page.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Bounce {
    /// The interpreter has it.
    Never,
    /// It reads from the bounce buffer.
    Read,
    /// A copy of the instruction works on the bounce buffer, which is written back, or on a page that holds
    /// code, which is looked after. A block has such copies once one was needed.
    Write,
}

/// A probe whose miss is not emitted yet.
#[derive(Clone, Copy)]
pub(super) struct PendingMiss {
    pub(super) jump: usize,
    pub(super) meta: u32,
    pub(super) retry: usize,
    pub(super) write: bool,
    /// Where the code behind the probe starts.
    pub(super) access: usize,
    pub(super) size: usize,
    pub(super) bounce: Bounce,
    /// Where the flags are behind the probe.
    pub(super) flags: Flags,
}

/// A group whose miss is not emitted yet.
pub(super) struct GroupMiss {
    pub(super) jump: usize,
    pub(super) retry: usize,
    /// Bytes that the probe covers.
    pub(super) span: usize,
    pub(super) write: bool,
    pub(super) ops: std::ops::Range<usize>,
    /// Where the flags are before the group.
    pub(super) before: Flags,
}

impl Tx<'_> {
    pub(super) fn emit_cold(&mut self) {
        // Cold code may add more cold code (a taken branch needs a poll and a link).
        while !self.cold.is_empty() {
            for c in std::mem::take(&mut self.cold) {
                self.emit_one(c);
            }
        }
    }

    /// The call of a stub of [`crate::miss`], with its words before it.
    fn call_miss(&mut self, jump: usize, words: [u32; 2], stub: u64) {
        self.page_word();
        for word in words {
            self.a.d32(word);
        }
        self.a.bind(jump);
        self.a.call_to(stub);
    }

    /// Behind the block: an access that crosses a page takes the bounce buffer if both pages are in the
    /// TLB, a write to a page with code goes on if that page is in the code-write TLB, and otherwise the stub tries
    /// to fill the TLB; everything else goes to the helper.
    fn emit_miss(&mut self, m: PendingMiss, op: usize, resume: usize, reload: bool) {
        let stubs = self.stubs.miss[self.ctx.tlb()];
        let class = m.size.next_power_of_two().max(8).trailing_zeros() as usize - 3;
        let mut meta = m.meta | if reload { meta::HOST_FLAGS } else { 0 };
        let stub = match m.bounce {
            Bounce::Read => stubs.read[class],
            Bounce::Write if self.block.copies => stubs.write[class],
            Bounce::Write | Bounce::Never => stubs.fill[usize::from(m.write)],
        };
        meta |= match m.bounce {
            Bounce::Never => 0,
            Bounce::Write if !self.block.copies => meta::AGAIN,
            Bounce::Read | Bounce::Write => meta::BOUNCE,
        };
        let before = if self.ctx.windows() { 8 } else { 4 };
        let distance = resume as i64 - (self.a.here() as i64 + before);
        self.call_miss(m.jump, [meta, distance as i32 as u32], stub);
        let block = self.block;
        match m.bounce {
            Bounce::Read => {
                let bounced = self.a.jcc(cc::B);
                self.a.bind_to(bounced, m.access);
            }
            Bounce::Write if block.copies => {
                let again = self.a.jcc(cc::AE);
                self.a.bind_to(again, m.retry);
                if let Some(op) = block.ops.get(op) {
                    self.flags = m.flags;
                    self.copy_write(op, m.meta, resume);
                }
                return;
            }
            Bounce::Write | Bounce::Never => {}
        }
        let again = self.a.jmp();
        self.a.bind_to(again, m.retry);
    }

    /// The copy of an instruction that writes to the operand at I + T, which the `commit` stub looks after.
    fn copy_write(&mut self, op: &Op, meta: u32, resume: usize) {
        if let Some(o) = self.operands(op) {
            self.map.push((self.a.here() as u32, op.off));
            self.with_memory(op, &o);
            let host = if self.flags == Flags::Host {
                meta::HOST_FLAGS
            } else {
                0
            };
            self.note_page();
            self.a.mov_imm(I, (meta | host).into());
            self.a.call_to(self.stubs.commit);
        }
        let pos = self.a.jmp();
        self.a.bind_to(pos, resume);
    }

    /// Behind the block: what becomes of a group that its probe does not let through.
    fn emit_group_miss(&mut self, m: GroupMiss) {
        let block = self.block;
        let Some(first) = block.ops.get(m.ops.start) else {
            return;
        };
        let write = if m.write { meta::WRITE } else { 0 };
        let meta = self.meta(first) | write | meta::GROUP | 1 << meta::SIZE_SHIFT;
        let stub = self.stubs.miss[self.ctx.tlb()].group[usize::from(m.write)];
        self.call_miss(m.jump, [meta, m.span as u32], stub);
        let again = self.a.jcc(cc::AE);
        self.a.bind_to(again, m.retry);
        self.flags = m.before;
        self.restore_flags(first.live_before, false);
        self.a.align_link(1);
        let site = self.a.jmp();
        self.cold.push(Cold::Link {
            site,
            target: first.off,
            save: first.live_before != 0,
            fpu: block.fpu,
            apart: m.ops.len(),
        });
    }

    /// The call of a `link` stub at offset `exit`, for the jump whose displacement is at `site`.
    fn call_link(&mut self, stub: u64, site: usize, word: u32) {
        self.a.call_to(stub);
        let distance = (self.a.here() - site) as u32;
        self.a.d32(word | distance >> 16 << link::DISTANCE_SHIFT);
        self.a.bytes(&(distance as u16).to_le_bytes());
        self.page_word();
    }

    pub(super) fn emit_one(&mut self, c: Cold) {
        match c {
            Cold::Group(m) => self.emit_group_miss(m),
            Cold::Miss {
                miss,
                op,
                resume,
                reload,
            } => self.emit_miss(miss, op, resume, reload),
            Cold::Interpret {
                jump,
                meta,
                resume,
                reload,
                save,
            } => {
                self.a.bind(jump);
                if save {
                    flags::save(&mut self.a);
                }
                self.call_interpreter(meta);
                if reload {
                    flags::restore(&mut self.a);
                }
                let pos = self.a.jmp();
                self.a.bind_to(pos, resume);
            }
            Cold::Link {
                site,
                target,
                save,
                fpu,
                apart,
            } => {
                self.a.bind(site);
                let stub = if save {
                    self.stubs.link_flags
                } else {
                    self.stubs.link
                };
                let fpu = if fpu { link::FPU } else { 0 };
                let apart = (apart as u32) << link::APART_SHIFT;
                self.call_link(stub, site, u32::from(target & 0xfff) | fpu | apart);
            }
            Cold::Poll {
                jump,
                target,
                save,
                restore_rcx,
            } => {
                self.a.bind(jump);
                self.a.call_to(match (save, restore_rcx) {
                    (false, _) => self.stubs.poll,
                    (true, false) => self.stubs.poll_flags,
                    (true, true) => self.stubs.poll_flags_rcx,
                });
                self.a.d32(u32::from(target));
                self.page_word();
            }
            Cold::Lost {
                jumps,
                branch,
                lands,
            } => {
                let direct = self.stubs.level2_direct[self.ctx.tlb()];
                if branch == 0 && lands.is_none() {
                    for j in jumps {
                        self.a.bind_abs(j, direct);
                    }
                    return;
                }
                for j in jumps {
                    self.a.bind(j);
                }
                if let Some(lands) = lands {
                    self.push_landing(lands);
                }
                if branch == 0 {
                    self.a.jmp_to(direct);
                } else {
                    self.a.mov_imm(I, branch.into());
                    self.a.jmp_to(self.stubs.level2_branch[self.ctx.tlb()]);
                }
            }
            Cold::Far { slot, target } => {
                self.fars.push((slot, self.a.here()));
                self.load_linear(T, target);
                self.a.mov_imm(I, u64::from(slot) * 8);
                self.a.jmp_to(self.stubs.far.unfilled);
            }
            Cold::LostFar {
                jump,
                branch,
                lands,
            } => {
                self.a.bind(jump);
                self.a.load(Size::Q, reg::RCX, crate::far::RCX);
                if let Some(lands) = lands {
                    self.push_landing(lands);
                }
                self.a.mov_imm(I, branch.into());
                self.a.jmp_to(self.stubs.far.lost);
            }
            Cold::CallPoll {
                jump,
                target,
                lands,
            } => {
                self.a.bind(jump);
                self.push_t();
                self.push_landing(lands);
                self.a.call_to(self.stubs.poll);
                self.a.d32(u32::from(target));
            }
            Cold::Pages {
                jumps,
                offset,
                strings,
                flags,
                resume,
            } => {
                for j in jumps {
                    self.a.bind(j);
                }
                self.flags = flags;
                self.pages(offset, strings, resume);
            }
            Cold::Full { jump, resume } => {
                self.a.bind(jump);
                self.a.load(Size::Q, reg::RSP, Mem::Gs(off::SHADOW_BASE));
                let pos = self.a.jmp();
                self.a.bind_to(pos, resume);
            }
            Cold::Land { site, target } => {
                self.a.bind(site);
                let stub = if self.ctx.windows() {
                    self.stubs.far.land
                } else {
                    self.stubs.land
                };
                self.call_link(stub, site, u32::from(target) | link::LANDS);
            }
            Cold::Taken { jump, target, live } => {
                self.a.bind(jump);
                self.flags = Flags::Host;
                // As it was at the branch.
                self.scratch.at_branch();
                self.jump_direct(target, live, true);
            }
        }
    }
}
