//! Finding the code for where a vCPU is, and making it.

use super::*;
use crate::block::{Block, Translation};
use crate::far::Entered;
use crate::translate::{Ask, translate};
use crate::window::Windows;
use crate::world::PAGE_WRITTEN;
use crate::{frontend, perf};

/// How often a block's bytes are read until they hold still.
const MAX_READS: usize = 100;

/// Why there is no block.
pub(super) enum NoBlock {
    /// The vCPU must leave translated code; `exit` may say why.
    Leave,
    /// The instruction reaches into the next page.
    NeedsSecond,
}

impl Runner<'_> {
    /// As [`Self::dispatch`], for an address that the jump cache does not have, or has no living block
    /// for.
    pub(super) fn find(&mut self) -> u64 {
        loop {
            if self.exit.is_some() || self.interrupted().is_some() || self.single_step() {
                return 0;
            }
            self.vm.cpu.rflags &= !RF;
            let ctx = self.context();
            let pc = self.linear_pc();
            self.vm.ctx = ctx.0;
            self.vm.caches.enter_context(ctx);
            let found = if ctx.segmented() && !self.page_in_segment(pc) {
                Ok(None)
            } else {
                self.code_page(ctx, pc)
            };
            let phys = match found {
                Ok(Some(phys)) => phys,
                Ok(None) => {
                    // Not RAM, not canonical, or a page fault: the interpreter sorts it out.
                    self.step_noted();
                    continue;
                }
                Err(()) => return 0,
            };
            let clears = self.world.clears.load(Ordering::Acquire);
            if ctx.windows() {
                if pc < 4096 || pc >> 47 != 0 {
                    // 0 says that a page was not entered; the vsyscall page is in no window.
                    self.step_noted();
                    continue;
                }
                match self.enter_page(phys, pc) {
                    Some(true) => {}
                    Some(false) => continue,
                    None => return 0,
                }
            }
            let entry = match self.block(phys, None, ctx, |b| b.indirect) {
                Ok(entry) => entry,
                Err(NoBlock::Leave) => return 0,
                Err(NoBlock::NeedsSecond) => match self.crossing_block(phys, ctx, pc) {
                    Ok(Some(entry)) => entry,
                    Ok(None) => {
                        self.step_noted();
                        continue;
                    }
                    Err(()) => return 0,
                },
            };
            if clears != self.world.clears.load(Ordering::Acquire) {
                // Pages may have other numbers.
                continue;
            }
            self.vm.caches.fill_jump(ctx, pc, entry);
            self.vm.t = pc;
            return self.go(entry);
        }
    }

    /// Code with windows at `pc` is about to be entered, in the page of `phys`: emitted code has to know where that page
    /// lies. `Some(false)`: the jump caches were flushed, as it lies elsewhere too, or in no window. `None`: guest code must be
    /// left.
    fn enter_page(&mut self, phys: u64, pc: u64) -> Option<bool> {
        let world = self.world;
        let Some(mut cache) = world.cache(self.me) else {
            self.exit = Some(Exit::Interrupted);
            return None;
        };
        let number = match cache.number(phys >> 12) {
            Some(n) => n,
            None => {
                self.clear(&mut cache);
                cache.number(phys >> 12)?
            }
        };
        drop(cache);
        let linear = pc & !0xfff;
        if self.vm.caches.far.entered(number, linear) {
            return Some(true);
        }
        let Some(host) = self.with_windows(|w, memory| w.code_page(memory, linear)) else {
            let caches = &mut self.vm.caches;
            caches.flush_code();
            caches.heat.refuse(self.vm.cpu.cr3);
            caches.windows.release();
            return Some(false);
        };
        let caches = &mut self.vm.caches;
        let entered = caches.far.enter_page(number, linear, host);
        if entered == Entered::Known {
            return Some(true);
        }
        caches.flush_code();
        if entered == Entered::TooOften && !Windows::always() {
            caches.heat.refuse(self.vm.cpu.cr3);
            caches.windows.release();
        }
        Some(false)
    }

    /// The whole page of `pc` lies within CS, so that jumps within it need no check.
    fn page_in_segment(&self, pc: u64) -> bool {
        let cpu = &self.vm.cpu;
        let cs = &cpu.seg[sreg::CS];
        let limit = match cpu.code_size() {
            CodeSize::Bits16 => cs.limit.min(0xffff),
            _ => cs.limit,
        };
        let first = (pc as u32 & !0xfff).wrapping_sub(cs.base as u32);
        first.checked_add(0xfff).is_some_and(|last| last <= limit)
    }

    /// The block of the one instruction at `pc`, which reaches into the next page. `None`: it must be
    /// interpreted.
    fn crossing_block(&mut self, phys: u64, ctx: Context, pc: u64) -> Result<Option<u64>, ()> {
        let next = (pc | 0xfff).wrapping_add(1);
        let Some(second) = self.code_page(ctx, next)? else {
            return Ok(None);
        };
        // A flush of either page must drop the jump.
        self.vm.caches.note_jump_page(next);
        match self.block(phys, Some(second), ctx, |b| b.indirect) {
            Ok(entry) => Ok(Some(entry)),
            Err(NoBlock::NeedsSecond) => Ok(None),
            Err(NoBlock::Leave) => Err(()),
        }
    }

    /// Guest-physical address of the code at linear address `pc`. `Err`: leave guest code.
    pub(super) fn code_page(&mut self, ctx: Context, pc: u64) -> Result<Option<u64>, ()> {
        if let Some(gpa) = self.vm.caches.code_page(ctx.user(), pc) {
            return Ok(Some(gpa | pc & 0xfff));
        }
        let VcpuMem { cpu, caches, .. } = &mut *self.vm;
        if !paging::canonical(cpu, pc) {
            return Ok(None);
        }
        let mut env = JitEnv {
            inner: &mut *self.env,
            world: self.world,
            caches,
            written: &mut self.written,
        };
        let features = *env.features();
        let Ok(m) = paging::walk(cpu, &features, &mut env, pc, Access::fetch(cpu)) else {
            return Ok(None);
        };
        let gfn = m.gpa >> 12;
        let Some(flags) = self.world.code_map.page(m.gpa) else {
            return Ok(None);
        };
        let Some(page) = self.env.host_ptr(gfn << 12, 4096, false) else {
            return Ok(None);
        };
        // A device or user space may have replaced the code without a write that was seen.
        if flags.load(Ordering::Acquire) & PAGE_CODE != 0 {
            let Some(cache) = self.world.cache(self.me) else {
                return self.leave();
            };
            let holds = cache.holds(gfn, |offset, known| {
                // SAFETY: `host_ptr` vouches for the page, which `offset` and the length lie in. Other
                // vCPUs may write it: what is torn is different.
                unsafe {
                    libc::memcmp(page.add(offset).cast(), known.as_ptr().cast(), known.len()) == 0
                }
            });
            drop(cache);
            if !holds && !self.kill(gfn, u64::MAX) {
                return self.leave();
            }
        }
        self.vm.caches.fill_code(ctx.user(), pc, &m);
        Ok(Some(m.gpa))
    }

    pub(super) fn leave<T>(&mut self) -> Result<T, ()> {
        self.exit = Some(Exit::Interrupted);
        Err(())
    }

    /// Copies `to.len()` bytes of a page from `offset` on.
    fn read_page(&mut self, gfn: u64, offset: usize, to: &mut [u8]) -> Option<()> {
        let p = self.env.host_ptr(gfn << 12, 4096, false)?;
        if offset + to.len() > 4096 {
            return None;
        }
        // SAFETY: `host_ptr` vouches for 4096 bytes of guest RAM. Other vCPUs may write them; what is
        // torn is found when the lines are read again.
        unsafe {
            std::ptr::copy_nonoverlapping(p.add(offset), to.as_mut_ptr(), to.len());
        }
        Some(())
    }

    /// The bytes of `lines` are still those in `page`.
    fn unchanged(&mut self, gfn: u64, lines: u64, page: &[u8]) -> bool {
        let mut now = [0; 64];
        (0..64).filter(|line| lines & (1 << line) != 0).all(|line| {
            self.read_page(gfn, line * 64, &mut now).is_some()
                && page.get(line * 64..line * 64 + 64) == Some(&now[..])
        })
    }

    /// The block at a guest-physical address, translated if need be. `second`: the page that follows
    /// in linear memory, for an instruction that reaches into it.
    pub(super) fn block<R>(
        &mut self,
        phys: u64,
        second: Option<u64>,
        ctx: Context,
        f: impl Fn(&Block) -> R,
    ) -> Result<R, NoBlock> {
        let world = self.world;
        let Some(mut cache) = world.cache(self.me) else {
            self.exit = Some(Exit::Interrupted);
            return Err(NoBlock::Leave);
        };
        self.block_in(&mut cache, phys, second, ctx, f)
    }

    pub(super) fn block_in<R>(
        &mut self,
        cache: &mut cache::Cache,
        phys: u64,
        second: Option<u64>,
        ctx: Context,
        f: impl Fn(&Block) -> R,
    ) -> Result<R, NoBlock> {
        if let Some(b) = cache.find(phys, ctx.0) {
            match (cache.second(b), second) {
                (None, _) => return Ok(f(b)),
                (Some(_), None) => return Err(NoBlock::NeedsSecond),
                (Some((gfn, _)), Some(page)) if gfn == page >> 12 => return Ok(f(b)),
                _ => {}
            }
        }
        if cache.arena.left() < 1 << 20 || ctx.windows() && cache.number(phys >> 12).is_none() {
            self.clear(cache);
        }
        let number = if ctx.windows() {
            cache.number(phys >> 12).unwrap_or(0)
        } else {
            0
        };
        let mut pages = std::mem::take(&mut cache.pages_read);
        pages.resize(4096 + 64, 0);
        let made = self.translate_at(cache, phys, second, ctx, number, &mut pages);
        let made = made.map(|new| f(cache.insert(&new, &pages[..4096], &pages[4096..])));
        cache.pages_read = pages;
        made
    }

    /// Translates a block; `pages` has the bytes it was made from afterwards.
    fn translate_at(
        &mut self,
        cache: &mut cache::Cache,
        phys: u64,
        second: Option<u64>,
        ctx: Context,
        number: u16,
        pages: &mut [u8],
    ) -> Result<Translation, NoBlock> {
        let (gfn, start) = (phys >> 12, (phys & 0xfff) as usize);
        let key = ctx.0;
        let (ctx, apart) = ctx.split_apart();
        self.claim(cache, phys).ok_or(NoBlock::Leave)?;
        for _ in 0..MAX_READS {
            let (page, next) = pages.split_at_mut(4096);
            self.read_page(gfn, 0, page).ok_or(NoBlock::Leave)?;
            let (decoded, second) = match frontend::decode(page, start, ctx) {
                Some(decoded) => (decoded, None),
                None => {
                    let gpa = second.ok_or(NoBlock::NeedsSecond)?;
                    self.claim(cache, gpa).ok_or(NoBlock::Leave)?;
                    self.read_page(gpa >> 12, 0, next).ok_or(NoBlock::Leave)?;
                    let both = &pages[..4096 + frontend::BEYOND];
                    let decoded = frontend::decode(both, start, ctx).ok_or(NoBlock::Leave)?;
                    let beyond = usize::from(decoded.end).saturating_sub(4096);
                    (decoded, Some((gpa >> 12, cache::lines_of(0, beyond))))
                }
            };
            // Writes are noticed from here on, and earlier ones are found.
            cache.watch(gfn, decoded.lines);
            let mut same = self.unchanged(gfn, decoded.lines, &pages[..4096]);
            if let Some((gfn, lines)) = second {
                cache.watch(gfn, lines);
                same &= self.unchanged(gfn, lines, &pages[4096..]);
            }
            if !same {
                continue;
            }
            let mut decoded = decoded;
            if apart != 0 {
                decoded.keep_apart(apart);
            }
            // Nothing can be linked to one that crosses a page.
            decoded.apart |= second.is_some();
            decoded.copies |= second.is_some() || cache.needs_copies(phys);
            let base = cache.arena.next();
            let site = |op: &frontend::Op| self.site(cache, phys, ctx, op);
            let ask = Ask {
                site: &site,
                far: cache.fars.len() as u32,
                page: number,
            };
            let (stubs, bmi2) = (&self.world.stubs, self.world.bmi2);
            let code = translate(&decoded, ctx, stubs, base, bmi2, &ask);
            self.stats.translated += decoded.ops.len() as u64;
            let Some(at) = cache.arena.push(&code.bytes) else {
                self.exit = Some(Exit::InternalError);
                return Err(NoBlock::Leave);
            };
            cache.fars.resize(cache.fars.len() + code.fars.len(), 0);
            let exits = code.fars.iter();
            let exits = exits.map(|&(slot, exit)| (slot as usize, at + exit as u64));
            let exits: Vec<(usize, u64)> = exits.collect();
            for &(slot, exit) in &exits {
                if let Some(known) = cache.fars.get_mut(slot) {
                    *known = exit;
                }
                self.vm.caches.far.add(slot, exit);
            }
            self.world.tell_slots(cache, self.me, &exits);
            let block = Translation {
                phys,
                stop: decoded.end.min(4096),
                ctx: key,
                indirect: at,
                direct: code.direct as u16,
                direct_fpu: code.direct_fpu as u16,
                len: code.bytes.len() as u32,
                live_in: decoded.live_in != 0,
                fpu: decoded.fpu,
                lines: decoded.lines,
                second,
                map: code.map,
                imms: code.imms,
                peeked: decoded.peeked,
            };
            if let Some(log) = &mut cache.perf {
                let source = perf::Source {
                    linear: self.linear_pc() & !0xfff | phys & 0xfff,
                    user: ctx.user(),
                    bits: frontend::bits(ctx),
                    bytes: pages.get(start..decoded.end.into()).unwrap_or_default(),
                };
                log.block(&block, &source, &code.bytes);
            }
            return Ok(block);
        }
        // Another vCPU writes there all the time: its turn.
        self.exit = Some(Exit::Interrupted);
        Err(NoBlock::Leave)
    }

    /// Marks a page as holding code: from here on writes to it are noticed. First the mark, then
    /// everyone's TLB; the caller reads the bytes last. `None` beyond the memory that is tracked.
    pub(super) fn claim(&mut self, cache: &mut cache::Cache, gpa: u64) -> Option<()> {
        let flags = self.world.code_map.page(gpa)?;
        let before = flags.fetch_or(PAGE_CODE, Ordering::AcqRel);
        if before & PAGE_WRITTEN != 0 {
            flags.fetch_and(!PAGE_WRITTEN, Ordering::AcqRel);
            self.vm.caches.unwrite(gpa);
            self.world.stopped(cache, Some(self.me), |c| c.unwrite(gpa));
        }
        Some(())
    }

    /// Empties the code cache.
    pub(super) fn clear(&mut self, cache: &mut cache::Cache) {
        self.world.stopped(cache, Some(self.me), |c| c.flush_code());
        self.vm.caches.flush_code();
        let gfns: Vec<u64> = cache.gfns().collect();
        cache.clear();
        self.world.clears.fetch_add(1, Ordering::AcqRel);
        for gfn in gfns {
            if let Some(flags) = self.world.code_map.page(gfn << 12) {
                flags.fetch_and(!PAGE_CODE, Ordering::AcqRel);
            }
        }
    }
}
