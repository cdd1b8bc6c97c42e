//! Running: the dispatch loop, and what the helpers that translated code calls are made of.
#![expect(unsafe_code, reason = "enters emitted code, and is entered by it")]

mod code;
mod helpers;
mod windows;

use crate::context::Context;
use crate::env::{JitEnv, Written};
use crate::layout::VcpuMem;
use crate::recent::Recent;
use crate::stats::Stats;
use crate::translate::meta;
use crate::world::{PAGE_CODE, VcpuBox, World};
use crate::{cache, signal};
use std::sync::atomic::Ordering;
use x86defs::rflags::{IF, RF, TF};
use x86emu::env::{Env, Exit, Stop};
use x86emu::event::{self, Event};
use x86emu::paging::{self, Access};
use x86emu::state::{CodeSize, sreg};

use code::NoBlock;
pub use helpers::HELPERS;

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
