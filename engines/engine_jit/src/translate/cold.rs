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
    /// whether EFLAGS must be saved.
    Link {
        site: usize,
        target: u16,
        save: bool,
        fpu: bool,
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
    /// code, which is looked after.
    Write,
}

/// A probe whose miss is not emitted yet.
#[derive(Clone, Copy)]
pub(super) struct PendingMiss {
    pub(super) jump: usize,
    pub(super) tag: i32,
    pub(super) meta: u32,
    pub(super) retry: usize,
    /// Where the code behind the probe starts.
    pub(super) access: usize,
    pub(super) size: usize,
    pub(super) bounce: Bounce,
    /// Where the flags are behind the probe.
    pub(super) flags: Flags,
}

/// A group whose copy is not emitted yet.
pub(super) struct GroupMiss {
    pub(super) jump: usize,
    pub(super) tag: i32,
    pub(super) retry: usize,
    /// Bytes that the probe covers.
    pub(super) span: usize,
    pub(super) write: bool,
    pub(super) ops: std::ops::Range<usize>,
    /// Where the flags are before the group, and behind it.
    pub(super) before: Flags,
    pub(super) after: Flags,
    pub(super) live_after: u32,
    pub(super) resume: usize,
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

    /// Behind the block: an access that crosses a page takes the bounce buffer if both pages are in the
    /// TLB, a write to a page with code goes on if that page is in the code-write TLB, and another stub tries
    /// to fill the TLB; everything else goes to the helper.
    pub(super) fn emit_miss(&mut self, m: PendingMiss, op: usize, resume: usize, reload: bool) {
        self.a.bind(m.jump);
        self.a.op_mem(Size::Q, &[0x03], T, Mem::GsBase(I, m.tag)); // add: T is the address again
        let mut meta = m.meta;
        let mut crosses = None;
        if m.bounce == Bounce::Write {
            self.a.lea(I, at(T, m.size as i32 - 1));
            self.a.op_reg(Size::Q, &[0x31], T, I); // xor
            self.a.shr(I, 12);
            self.emit_bounce(&m, op, resume);
            let filled = self.a.jcc(cc::E);
            self.a.bind_to(filled, m.retry);
            meta |= meta::BOUNCE;
        } else if m.size > 1 {
            self.a.lea(I, at(T, m.size as i32 - 1));
            self.a.op_reg(Size::Q, &[0x31], T, I); // xor
            self.a.shr(I, 12);
            if m.bounce == Bounce::Never {
                crosses = Some(self.a.jcc(cc::NE));
            } else {
                let inside = self.a.jcc(cc::E);
                self.emit_bounce(&m, op, resume);
                crosses = Some(self.a.jmp());
                self.a.bind(inside);
                meta |= meta::BOUNCE;
            }
        }
        if m.bounce != Bounce::Write {
            let write = usize::from(m.meta & meta::WRITE != 0);
            self.a.call_to(self.stubs.refill[self.ctx.tlb()][write]);
            let filled = self.a.jcc(cc::AE);
            self.a.bind_to(filled, m.retry);
        }
        if let Some(crosses) = crosses {
            self.a.bind(crosses);
        }
        self.a.call_to(self.stubs.memory);
        self.a.d32(meta);
        let here = self.a.here();
        self.a.d32((m.retry as i64 - here as i64) as i32 as u32);
        if reload {
            flags::restore(&mut self.a);
        }
        let pos = self.a.jmp();
        self.a.bind_to(pos, resume);
    }

    /// An access that crosses a page, by way of the bounce buffer, or a write to a page that may hold code;
    /// goes on behind if that cannot be, then with the zero flag set if the probe is to be tried again.
    fn emit_bounce(&mut self, m: &PendingMiss, op: usize, resume: usize) {
        let class = m.size.next_power_of_two().max(8).trailing_zeros() as usize - 3;
        let write = usize::from(m.bounce == Bounce::Write);
        self.a
            .call_to(self.stubs.cross[self.ctx.tlb()][write][class]);
        if m.bounce == Bounce::Read {
            let pos = self.a.jcc(cc::AE);
            self.a.bind_to(pos, m.access);
            return;
        }
        let fails = self.a.jcc(cc::B);
        let block = self.block;
        if let Some(op) = block.ops.get(op)
            && let Some(o) = self.operands(op)
        {
            self.map.push((self.a.here() as u32, op.off));
            self.flags = m.flags;
            self.with_memory(op, &o);
            let host = if self.flags == Flags::Host {
                meta::HOST_FLAGS
            } else {
                0
            };
            self.a.mov_imm(I, (m.meta | host).into());
            self.a.call_to(self.stubs.commit);
            let pos = self.a.jmp();
            self.a.bind_to(pos, resume);
        }
        self.a.bind(fails);
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
            } => {
                self.a.bind(site);
                let exit = self.a.here();
                if save {
                    flags::save(&mut self.a);
                }
                self.a.call_to(self.stubs.link);
                self.a
                    .d32(u32::from(target) | if fpu { meta::FPU } else { 0 });
                let here = self.a.here();
                self.a.d32((site as i64 - here as i64) as i32 as u32);
                self.a.d32((exit as i64 - here as i64 - 4) as i32 as u32);
            }
            Cold::Poll {
                jump,
                target,
                save,
                restore_rcx,
            } => {
                self.a.bind(jump);
                if restore_rcx {
                    self.a.mov(reg::RCX, T);
                }
                if save {
                    flags::save(&mut self.a);
                }
                self.a.call_to(self.stubs.poll);
                self.a.d32(u32::from(target));
            }
            Cold::Lost {
                jumps,
                branch,
                lands,
            } => {
                for j in jumps {
                    self.a.bind(j);
                }
                if let Some(lands) = lands {
                    self.push_landing(lands);
                }
                self.a
                    .store_imm(Size::D, Mem::Gs(off::BRANCH), branch as i32);
                self.a.jmp_to(self.stubs.level2[self.ctx.tlb()]);
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
                let exit = self.a.here();
                self.a.alu_imm(Size::Q, 4, T, -4096);
                self.a.store(Size::Q, Mem::Gs(off::PC_BASE), T);
                self.a.call_to(self.stubs.link);
                self.a.d32(u32::from(target) | meta::LANDS);
                let here = self.a.here();
                self.a.d32((site as i64 - here as i64) as i32 as u32);
                self.a.d32((exit as i64 - here as i64 - 4) as i32 as u32);
            }
            Cold::Taken { jump, target, live } => {
                self.a.bind(jump);
                self.flags = Flags::Host;
                self.jump_direct(target, live, true);
            }
        }
    }
}
