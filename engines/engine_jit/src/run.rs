//! Running: the dispatch loop, and what the helpers that translated code calls are made of.
#![expect(unsafe_code, reason = "enters emitted code, and is entered by it")]

mod helpers;
mod windows;

use crate::block::{Block, Translation};
use crate::context::Context;
use crate::env::{JitEnv, Written};
use crate::far::Entered;
use crate::frontend;
use crate::layout::VcpuMem;
use crate::recent::Recent;
use crate::stats::Stats;
use crate::translate::{Ask, meta, translate};
use crate::window::Windows;
use crate::world::{PAGE_CODE, PAGE_WRITTEN, VcpuBox, World};
use crate::{cache, perf, signal};
use std::sync::atomic::Ordering;
use x86defs::rflags::{IF, RF, TF};
use x86emu::env::{Env, Exit, Stop};
use x86emu::event::{self, Event};
use x86emu::paging::{self, Access};
use x86emu::state::{CodeSize, sreg};

pub use helpers::HELPERS;

/// How often a block's bytes are read until they hold still.
const MAX_READS: usize = 100;

/// One [`kvm_core::engine::EngineVcpu::run`] in progress.
pub struct Runner<'a> {
    vm: &'a mut VcpuMem,
    env: &'a mut dyn Env,
    world: &'a World,
    me: &'a VcpuBox,
    exit: Option<Exit>,
    written: Written,
    stats: &'a mut Stats,
    recent: &'a mut Recent,
    /// The last access that [`Self::fill`] refused was a write to a page of code.
    holds_code: bool,
}

/// Why there is no block.
enum NoBlock {
    /// The vCPU must leave translated code; `exit` may say why.
    Leave,
    /// The instruction reaches into the next page.
    NeedsSecond,
}

/// What became of one interpreted instruction.
enum Stepped {
    /// It retired.
    Retired,
    /// An exception was delivered, or the world was stopped.
    Redirected,
    /// Guest mode must be left.
    Exit(Exit),
}

impl<'a> Runner<'a> {
    /// A runner for `me`, whose memory is `vm`.
    pub fn new(
        vm: &'a mut VcpuMem,
        env: &'a mut dyn Env,
        world: &'a World,
        me: &'a VcpuBox,
        stats: &'a mut Stats,
        recent: &'a mut Recent,
    ) -> Self {
        Runner {
            vm,
            env,
            world,
            me,
            exit: None,
            written: Written::default(),
            stats,
            recent,
            holds_code: false,
        }
    }

    /// Runs guest code until an exit.
    pub fn run(mut self) -> Exit {
        let vm: *mut VcpuMem = self.vm;
        let runner: *mut Runner<'_> = &mut self;
        // SAFETY: `vm` and `runner` are valid for the whole function. Emitted code and helpers use
        // them only within `enter`, during which this frame makes no use of `self`.
        unsafe {
            (*vm).runner = runner as u64;
            (*vm).xsave_mask = (*runner).world.xsave_mask;
            (*vm).code_map = (*runner).world.code_map.address();
            signal::set_gs(vm as u64);
            let world = (*runner).world;
            let enter: extern "sysv64" fn(u64) = std::mem::transmute(world.stubs.enter);
            let guard = signal::Translated::new(world.code.clone(), vm, world.stubs.fault);
            let exit = loop {
                if let Some(exit) = (*runner).exit.take() {
                    break exit;
                }
                if let Some(exit) = (*runner).interrupted() {
                    break exit;
                }
                if (*runner).single_step() {
                    match (*runner).step() {
                        Stepped::Retired | Stepped::Redirected => continue,
                        Stepped::Exit(exit) => break exit,
                    }
                }
                let entry = (*runner).dispatch();
                if entry != 0 {
                    enter(entry);
                }
            };
            drop(guard);
            (*vm).runner = 0;
            exit
        }
    }

    /// Interprets one instruction.
    pub fn step_once(mut self) -> Option<Exit> {
        match self.step() {
            Stepped::Retired => None,
            Stepped::Redirected => self.exit.take(),
            Stepped::Exit(exit) => Some(exit),
        }
    }

    fn interrupted(&self) -> Option<Exit> {
        let cpu = &self.vm.cpu;
        let window = self.vm.irq_window != 0 && cpu.rflags & IF != 0 && cpu.shadow == 0;
        (self.vm.attention() || window).then_some(Exit::Interrupted)
    }

    /// The next instruction must be interpreted by itself.
    fn single_step(&self) -> bool {
        self.single_step_in(Context::of(&self.vm.cpu))
    }

    fn single_step_in(&self, ctx: Context) -> bool {
        let cpu = &self.vm.cpu;
        cpu.shadow != 0 || cpu.rflags & TF != 0 || cpu.dr7 & 0xff != 0 || ctx.interpret_only()
    }

    /// Counts the next instruction by mnemonic.
    #[cold]
    fn profile(&mut self) {
        let VcpuMem { cpu, caches, .. } = &mut *self.vm;
        let mut env = JitEnv {
            inner: &mut *self.env,
            world: self.world,
            caches,
            written: &mut self.written,
        };
        let mut bytes = [0; 15];
        let pc = cpu.rip.wrapping_add(cpu.seg[sreg::CS].base);
        let len = (4096 - (pc & 0xfff)).min(15) as usize;
        let access = Access {
            fetch: true,
            ..Access::read(cpu)
        };
        let read = x86emu::mem::read_linear(cpu, &mut env, pc, &mut bytes[..len], access);
        if read.is_ok()
            && let Ok(insn) = x86emu::interp::decode(cpu.code_size(), &bytes[..len], cpu.rip, false)
            && let Some(m) = &mut self.stats.mnemonics
        {
            m[insn.mnemonic() as usize & 4095] += 1;
            *self
                .stats
                .places
                .entry((pc, insn.mnemonic() as u16))
                .or_default() += 1;
        }
    }

    /// Interprets one instruction and delivers the exception it may raise.
    fn step(&mut self) -> Stepped {
        self.step_at(&[])
    }

    /// The same, for an instruction whose bytes are known to be `bytes` if there are any.
    fn step_at(&mut self, bytes: &[u8]) -> Stepped {
        self.stats.interpreted += 1;
        if self.stats.mnemonics.is_some() {
            self.profile();
        }
        let cr3 = self.vm.cpu.cr3;
        let VcpuMem { cpu, caches, .. } = &mut *self.vm;
        let mut env = JitEnv {
            inner: &mut *self.env,
            world: self.world,
            caches,
            written: &mut self.written,
        };
        let known = match bytes {
            [] => None,
            _ => {
                let amd = env.features().amd;
                self.recent.get(cpu.code_size(), cpu.rip, bytes, amd)
            }
        };
        let stepped = match &known {
            Some(insn) => x86emu::interp::step_decoded(cpu, &mut env, bytes, insn),
            None => x86emu::interp::step(cpu, &mut env),
        };
        let result = match stepped {
            Ok(()) => Stepped::Retired,
            Err(Stop::Exit(exit)) => Stepped::Exit(exit),
            Err(Stop::Exception(e)) => {
                self.stats.exceptions += 1;
                match event::deliver(cpu, &mut env, Event::from(e)) {
                    Ok(()) => Stepped::Redirected,
                    Err(exit) => Stepped::Exit(exit),
                }
            }
        };
        if cpu.cr3 != cr3 {
            // With CR3 bit 63 set no flush was asked for, but only one PCID is cached.
            caches.flush_non_global();
        }
        if !self.written.is_empty() && !self.kill_written() {
            return match result {
                Stepped::Retired => Stepped::Redirected,
                other => other,
            };
        }
        result
    }

    /// Interprets one instruction; an exit is left in `exit`.
    fn step_noted(&mut self) {
        if let Stepped::Exit(exit) = self.step() {
            self.exit = Some(exit);
        }
    }

    /// Invalidates translations of what the last instruction wrote. False if the vCPU must leave.
    fn kill_written(&mut self) -> bool {
        let list: Vec<(u64, u64)> = self.written.take().collect();
        list.into_iter().all(|(gfn, lines)| {
            let stays = self.kill(gfn, lines);
            self.lose_patience(gfn);
            stays
        })
    }

    /// The interpreter has written to a page of code, as it does for what uses the stack: after many times the page
    /// is data again.
    fn lose_patience(&mut self, gfn: u64) {
        if let Some(mut cache) = self.world.cache(self.me)
            && cache.interpreted_write(gfn)
            && let Some(flags) = self.world.code_map.page(gfn << 12)
        {
            flags.fetch_and(!PAGE_CODE, Ordering::AcqRel);
        }
    }

    /// Invalidates translations of what has changed in `lines` of a page. False if the vCPU must leave.
    fn kill(&mut self, gfn: u64, lines: u64) -> bool {
        let page = self.env.host_ptr(gfn << 12, 4096, false);
        let read = |line: usize, now: &mut [u8; 64]| {
            let Some(page) = page else {
                // Not readable now: none of it holds.
                now.iter_mut().for_each(|b| *b = !*b);
                return;
            };
            // SAFETY: `host_ptr` vouches for the page, of which this is one of 64 lines. Other vCPUs may
            // write it; whoever does comes here afterwards.
            unsafe {
                now.as_mut_ptr()
                    .copy_from_nonoverlapping(page.add(line * 64), now.len());
            }
        };
        if let Some(mut cache) = self.world.cache(self.me) {
            cache.changed(gfn, lines, read);
            return true;
        }
        // The world was stopped while waiting; the write stands, so its translations must go before
        // this vCPU leaves.
        self.vm.raise_attention();
        self.world.leave(self.me);
        self.world.cache_outside().changed(gfn, lines, read);
        self.world.enter(self.me);
        false
    }

    /// Linear address of the next instruction.
    fn linear_pc(&self) -> u64 {
        let cpu = &self.vm.cpu;
        if cpu.code_size() == CodeSize::Bits64 {
            cpu.rip
        } else {
            (cpu.rip as u32)
                .wrapping_add(cpu.seg[sreg::CS].base as u32)
                .into()
        }
    }

    /// Finds or makes the translation for the current state; its indirect entry, prepared to be
    /// jumped to. 0 if the dispatch loop must look first.
    fn dispatch(&mut self) -> u64 {
        let ctx = self.context();
        if self.exit.is_some() || self.interrupted().is_some() || self.single_step_in(ctx) {
            return 0;
        }
        self.vm.cpu.rflags &= !RF;
        if ctx.segmented() {
            return self.find();
        }
        let pc = self.linear_pc();
        self.vm.ctx = ctx.0;
        self.vm.caches.enter_context(ctx);
        // If that block is dead, its entry leads to `find`.
        match self.vm.caches.jump(ctx, pc) {
            Some(entry) => {
                self.vm.t = pc;
                self.go(entry)
            }
            None => self.find(),
        }
    }

    /// How an indirect entry is gone to, with T set, and the flags in RFLAGS.
    fn go(&mut self, entry: u64) -> u64 {
        self.vm.fpu_reload = 0;
        self.vm.split_flags();
        if Context(self.vm.ctx).windows() {
            self.vm.ret_addr = entry;
            return self.world.stubs.far.enter;
        }
        entry
    }

    /// As [`Self::dispatch`], for an address that the jump cache does not have, or has no living block
    /// for.
    fn find(&mut self) -> u64 {
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
                if pc < 4096 {
                    // 0 says that a page was not entered.
                    self.step_noted();
                    continue;
                }
                match self.enter_page(phys, pc) {
                    Some(true) => {}
                    // It lies elsewhere too: all else about code was forgotten.
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
    /// lies. `Some(false)`: the jump caches were flushed, as it lies elsewhere too. `None`: guest code must be left.
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
        let caches = &mut self.vm.caches;
        let entered = caches.far.enter_page(number, pc & !0xfff);
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
    fn code_page(&mut self, ctx: Context, pc: u64) -> Result<Option<u64>, ()> {
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

    fn leave<T>(&mut self) -> Result<T, ()> {
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
    fn block<R>(
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

    fn block_in<R>(
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
            for &(slot, exit) in &code.fars {
                let exit = at + exit as u64;
                if let Some(known) = cache.fars.get_mut(slot as usize) {
                    *known = exit;
                }
                self.vm.caches.far.add(slot as usize, exit);
            }
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
    fn claim(&mut self, cache: &mut cache::Cache, gpa: u64) -> Option<()> {
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
    fn clear(&mut self, cache: &mut cache::Cache) {
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

    /// Sets RIP to a page offset of the running block and puts the flags together.
    fn sync(&mut self, offset: u32) {
        let pc = self.vm.pc_base.wrapping_add(u64::from(offset));
        self.sync_linear(pc);
    }

    fn sync_linear(&mut self, pc: u64) {
        self.vm.compose_flags();
        self.vm.cpu.rip = if Context(self.vm.ctx).code_size() == CodeSize::Bits64 {
            pc
        } else {
            let base = self.vm.cpu.seg[sreg::CS].base as u32;
            (pc as u32).wrapping_sub(base).into()
        };
    }

    /// Interprets the instruction that a stub's inline data describes, and continues behind it at
    /// `resume` if the block still holds.
    ///
    /// `bytes`: the instruction's, or none if they must be fetched.
    fn interpret(&mut self, word: u32, bytes: &[u8], resume: u64) -> u64 {
        self.sync(word & 0xfff);
        let (rip, ctx) = (self.vm.cpu.rip, self.vm.ctx);
        let next = rip.wrapping_add(u64::from(word >> meta::LEN_SHIFT & 15));
        let epoch = self.epoch();
        let flushes = (self.vm.caches.jump_flushes, self.vm.caches.far.flushes);
        match self.step_at(bytes) {
            Stepped::Retired => {}
            Stepped::Redirected => return self.dispatch(),
            Stepped::Exit(exit) => {
                self.exit = Some(exit);
                return 0;
            }
        }
        let stay = word & meta::LEAVES == 0
            && self.vm.cpu.rip == next
            && Context::of(&self.vm.cpu) == Context(ctx).without_windows()
            && self.vm.cpu.shadow == 0
            && self.vm.cpu.rflags & TF == 0
            && self.vm.cpu.dr7 & 0xff == 0
            && self.interrupted().is_none()
            && epoch == self.epoch()
            // The page that the block lies in must be noted again, or a flush of it would be missed.
            && flushes == (self.vm.caches.jump_flushes, self.vm.caches.far.flushes);
        if !stay {
            return self.dispatch();
        }
        if word & meta::FPU == 0 {
            self.vm.fpu_reload = 0;
        }
        self.vm.split_flags();
        resume
    }

    fn epoch(&self) -> u64 {
        self.world.epoch()
    }

    /// Enters what an access needs into the TLB. False if the access needs the interpreter.
    fn fill_access(&mut self, gva: u64, word: u32) -> bool {
        let size = u64::from(word >> meta::SIZE_SHIFT);
        let write = word & meta::WRITE != 0;
        let crosses = (gva & 0xfff) + size > 4096;
        if !crosses {
            return self.fill(gva, write, word & meta::BOUNCE != 0);
        }
        // Both pages at once: the bounce stub, which comes next, needs both.
        word & meta::BOUNCE != 0
            && self.fill(gva, write, false)
            && self.fill((gva | 0xfff).wrapping_add(1), write, false)
    }

    /// Enters the translation of `gva` into the TLB. False if it has none that may be cached. `beside`: the
    /// access can use the code-write TLB.
    fn fill(&mut self, gva: u64, write: bool, beside: bool) -> bool {
        let which = Context(self.vm.ctx).tlb();
        let VcpuMem { cpu, caches, .. } = &mut *self.vm;
        if !paging::canonical(cpu, gva) {
            return false;
        }
        let features = *self.env.features();
        let access = if write {
            Access::write(cpu)
        } else {
            Access::read(cpu)
        };
        let mut env = JitEnv {
            inner: &mut *self.env,
            world: self.world,
            caches,
            written: &mut self.written,
        };
        let m = match paging::walk(cpu, &features, &mut env, gva, access) {
            Ok(m) => m,
            Err(_) => return false,
        };
        if !self.written.is_empty() && !self.kill_written() {
            return false;
        }
        let page = m.gpa & !0xfff;
        let Some(flags) = self.world.code_map.page(page) else {
            return false;
        };
        if write && self.world.note_write(flags) {
            if !beside {
                self.holds_code = true;
                return false;
            }
            if !self.forgive(which, gva, page) {
                return self.fill_code_write(which, gva, page);
            }
            if self.world.note_write(flags) {
                return false;
            }
        }
        let Some(host) = self.env.host_ptr(page, 4096, write) else {
            return false;
        };
        self.stats.fills += 1;
        self.vm.caches.fill(which, gva, &m, host as u64, write);
        self.note_structures(which, gva, &m, features.phys_bits);
        true
    }

    /// Lets emitted code fill the TLB for the rest of the region of `gva`.
    fn note_structures(&mut self, which: usize, gva: u64, m: &paging::Mapping, phys_bits: u8) {
        let Some(leaf) = m.from else { return };
        let table = (leaf.gpa >> 12) << 12;
        let table = self.env.host_ptr(table, 4096, false).map(|p| p as u64);
        let VcpuMem { cpu, caches, .. } = &mut *self.vm;
        if !caches.structures.knows_ram(m.gpa)
            && let Some(ram) = self.env.ram_around(m.gpa)
        {
            caches.structures.add_ram(ram);
        }
        let s = &mut caches.structures;
        s.add(which, cpu, phys_bits, gva, m, table);
    }

    /// Lets emitted code write to a page that holds code.
    fn fill_code_write(&mut self, which: usize, gva: u64, gpa: u64) -> bool {
        let Some(host) = self.env.host_ptr(gpa, 4096, true) else {
            return false;
        };
        let Some(mut cache) = self.world.cache(self.me) else {
            self.vm.raise_attention();
            return false;
        };
        let lines = cache.lines_address(gpa >> 12) as u64;
        let code = cache.page_lines(gpa >> 12) != 0;
        let writes = &mut self.vm.caches.code_writes;
        writes.fill(which, gva, gpa, host as u64, lines, code);
        true
    }

    /// Takes a page for data again that has held no code for a while. False if it stays a page of code.
    fn forgive(&mut self, which: usize, gva: u64, gpa: u64) -> bool {
        if !self.vm.caches.code_writes.exhausted(which, gva) {
            return false;
        }
        let Some(cache) = self.world.cache(self.me) else {
            return false;
        };
        let Some(flags) = self.world.code_map.page(gpa) else {
            return false;
        };
        let data = cache.page_lines(gpa >> 12) == 0;
        if data {
            flags.fetch_and(!PAGE_CODE, Ordering::AcqRel);
            self.vm.caches.code_writes.flush_page(gva);
        }
        data
    }

    /// Emitted code has written what translations were made from; `ret` is where it goes on.
    fn wrote(&mut self, ret: u64) -> u64 {
        let word = self.vm.store_meta;
        let epoch = self.epoch();
        let gpa = self.vm.caches.code_writes.gpa(self.vm.store_entry);
        let offset = self.vm.cross_offset as usize & 0xfff;
        let lines = cache::lines_of(offset, (word >> meta::SIZE_SHIFT) as usize);
        let stay = self.kill(gpa >> 12, lines)
            && (epoch == self.epoch()
                || self
                    .world
                    .cache(self.me)
                    .is_some_and(|cache| cache.block_at(ret).is_some_and(|b| !b.dead())));
        if !stay {
            self.sync((word & 0xfff) + (word >> meta::LEN_SHIFT & 15));
            return self.dispatch();
        }
        if word & meta::FPU == 0 {
            self.vm.fpu_reload = 0;
        }
        if word & meta::HOST_FLAGS != 0 {
            self.world.stubs.wrote_back
        } else {
            ret
        }
    }
}
