//! Windows at run time: who gets them, and what becomes of host faults in translated code.

use super::*;
use crate::frontend::Op;
use crate::translate::{BORROWED, HOST_FLAGS, OFFSET, Site};
use crate::window::{self, FailedCheck, Memory, Refusal, Windows};
use iced_x86::{OpKind, Register};
use x86emu::env::RamRange;
use x86emu::state::{CpuState, gpr};

/// The page tables and the RAM as a vCPU sees them.
struct Seen<'a, 'b> {
    cpu: &'a mut CpuState,
    env: &'a mut dyn Env,
    world: &'b World,
    caches: &'a mut crate::tlb::Caches,
    written: &'a mut Written,
}

impl Memory for Seen<'_, '_> {
    fn walk(&mut self, gva: u64, write: bool) -> Option<u64> {
        let features = *self.env.features();
        let access = if write {
            Access::write(self.cpu)
        } else {
            Access::read(self.cpu)
        };
        let mut env = JitEnv {
            inner: &mut *self.env,
            world: self.world,
            caches: &mut *self.caches,
            written: &mut *self.written,
        };
        paging::walk(self.cpu, &features, &mut env, gva, access)
            .ok()
            .map(|m| m.gpa)
    }
    fn page(&mut self, gpa: u64) -> Option<*const u8> {
        self.env
            .host_ptr(gpa, 4096, false)
            .map(<*mut u8>::cast_const)
    }
    fn ram(&mut self, gpa: u64) -> Option<RamRange> {
        self.env.ram_around(gpa)
    }
    fn let_write(&self, gpa: u64) -> bool {
        self.world
            .code_map
            .page(gpa)
            .is_some_and(|flags| !self.world.note_write(flags))
    }
}

fn cycles() -> u64 {
    // SAFETY: every x86-64 CPU has RDTSC, and Linux lets programs use it.
    unsafe { std::arch::x86_64::_rdtsc() }
}

impl Runner<'_> {
    /// Does something with the windows, which see the memory as this vCPU does.
    pub(super) fn with_windows<R>(
        &mut self,
        f: impl FnOnce(&mut Windows, &mut dyn Memory) -> R,
    ) -> R {
        let VcpuMem { cpu, caches, .. } = &mut *self.vm;
        let mut windows = std::mem::take(&mut caches.windows);
        let mut seen = Seen {
            cpu,
            env: &mut *self.env,
            world: self.world,
            caches,
            written: &mut self.written,
        };
        let r = f(&mut windows, &mut seen);
        self.vm.caches.windows = windows;
        r
    }

    /// The context that the next instruction runs in, with windows if its address space has them.
    pub(super) fn context(&mut self) -> Context {
        let ctx = Context::of(&self.vm.cpu);
        if !Windows::possible() {
            return ctx;
        }
        let had = Context(self.vm.ctx).windows();
        let VcpuMem { cpu, caches, .. } = &mut *self.vm;
        caches.heat.tick(cycles(), cpu.cr3, ctx.user(), had);
        if !ctx.windowable(cpu) {
            return ctx;
        }
        if !caches.windows.belong_to(cpu.cr3) {
            let hot = Windows::always() || caches.heat.hot(cpu.cr3);
            let cr3 = cpu.cr3;
            if !hot || caches.windows.hopeless() {
                return ctx;
            }
            if !self.with_windows(|w, memory| w.usable(memory, cr3)) {
                return ctx;
            }
            let places = self.with_windows(|w, memory| w.take(memory, cr3));
            // Code and returns have been entered with other places, and pages of code lie elsewhere now.
            self.vm.caches.flush_code();
            let Some(places) = places else {
                self.vm.caches.heat.refuse(cr3);
                return ctx;
            };
            self.vm.window_places = places;
            self.vm.caches.heat.took();
            if !self.learn_slots() {
                return ctx;
            }
        }
        if self.vm.caches.windows.stale() {
            let start = cycles();
            self.with_windows(|w, memory| w.renew(memory));
            if !self.charge(start) {
                return ctx;
            }
        }
        let windows = &mut self.vm.caches.windows;
        let odd_stack = windows.odd_stack(self.vm.cpu.gpr[gpr::RSP]);
        ctx.with_windows(windows.low, odd_stack)
    }

    /// Windows have cost the time since `start`. False if that was too much: they are given back, and nothing may run that counts
    /// on them.
    fn charge(&mut self, start: u64) -> bool {
        let VcpuMem { cpu, caches, .. } = &mut *self.vm;
        let pays = caches.heat.charge(cpu.cr3, cycles().wrapping_sub(start)) || Windows::always();
        if !pays {
            caches.windows.release();
        }
        pays
    }

    /// How the accesses of an instruction should go.
    pub(super) fn site(&self, cache: &cache::Cache, phys: u64, ctx: Context, op: &Op) -> Site {
        if !ctx.windows() {
            return Site::Probe;
        }
        let low = ctx.low_window();
        if let Some(learned) = cache.site(phys & !0xfff | u64::from(op.off), low) {
            return learned;
        }
        if low && self.looks_low(op) {
            return Site::Window(window::LOW);
        }
        Site::Window(window::HIGH)
    }

    /// The operand seems to lie in the low window: what registers hold now is a good guess. If that is no address, they will
    /// be loaded first, most likely with an address in the high one.
    fn looks_low(&self, op: &Op) -> bool {
        let insn = &op.insn;
        let cpu = &self.vm.cpu;
        let value = |r: Register| match r {
            Register::None => 0,
            r => cpu.gpr[r.full_register().number() & 15],
        };
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let displacement = insn.memory_displacement64();
        let segment = (insn.memory_segment() as usize).wrapping_sub(Register::ES as usize);
        let address = match base {
            Register::RIP => self.linear_pc(),
            _ if insn.is_stack_instruction() && insn.op0_kind() != OpKind::Memory => {
                cpu.gpr[gpr::RSP]
            }
            _ => {
                let scaled = value(index).wrapping_mul(insn.memory_index_scale().into());
                let of_segment = match segment {
                    sreg::FS | sreg::GS => cpu.seg[segment].base,
                    _ => 0,
                };
                let sum = value(base).wrapping_add(scaled);
                sum.wrapping_add(displacement).wrapping_add(of_segment)
            }
        };
        let first = 1 << 16;
        // An array in the program's data has an address that the index adds to.
        let array = base == Register::None && (first..1 << 31).contains(&displacement);
        (first..1 << 44).contains(&address) || array && segment < sreg::FS
    }

    /// A host fault in translated code. Returns where to go on.
    pub(super) fn fault(&mut self) -> u64 {
        let pc = std::mem::take(&mut self.vm.fault_pc);
        self.vm.undo_repeat();
        let address = self.vm.fault.address;
        if self.vm.fault.vector == 14 && self.vm.caches.shadow.overflown(address) {
            return self.mended(pc);
        }
        let clears = self.world.clears.load(Ordering::Acquire);
        let ctx = Context(self.vm.ctx);
        let mut refusal = None;
        if ctx.windows() {
            let start = cycles();
            match self.mend() {
                // Noting that page tables were written may have waited while the code went away.
                Ok(()) if self.world.clears.load(Ordering::Acquire) != clears => {}
                Ok(()) if self.charge(start) => return self.mended(pc),
                Ok(()) => {}
                Err(why) => refusal = Some(why),
            }
        }
        let found = loop {
            let cache = self.world.cache(self.me);
            if self.world.clears.load(Ordering::Acquire) != clears {
                // What the code was is not known any more.
                break None;
            }
            if let Some(cache) = cache {
                break cache.index_at(pc).and_then(|n| {
                    let b = cache.get(n)?;
                    if Context(b.ctx).windows() {
                        self.vm.pc_base = self.vm.caches.far.page(cache.number_of(b));
                    }
                    Some((n, b.phys & !0xfff, cache.instruction_at(pc)?))
                });
            }
        };
        let Some((block, page, word)) = found else {
            log::error!("engine_jit: host fault at {pc:#x}, which is no translated instruction");
            self.exit = Some(Exit::InternalError);
            return 0;
        };
        if word & HOST_FLAGS != 0 {
            let f = self.vm.fault.flags;
            self.vm.flags = ((f & 0xd5) << 8 | f >> 11 & 1) as u32;
        }
        if word & BORROWED != 0 {
            self.vm.cpu.gpr[gpr::RSI] = self.vm.spill[3];
        }
        let offset = u32::from(word & OFFSET);
        if refusal == Some(Refusal::Crowded) {
            // Before the next instruction they are taken anew, where there is room.
            self.vm.caches.flush_code();
            self.vm.caches.windows.release();
        } else if let Some(why) = refusal {
            self.learn(block, page + u64::from(offset), ctx, why);
        }
        self.sync(offset);
        match self.step() {
            Stepped::Retired | Stepped::Redirected => self.dispatch(),
            Stepped::Exit(exit) => {
                self.exit = Some(exit);
                0
            }
        }
    }

    /// Goes back to the instruction that faulted.
    fn mended(&mut self, pc: u64) -> u64 {
        self.vm.fault_at = pc;
        self.vm.fault.flags = self.vm.fault.flags & crate::layout::ARITH | 0x202;
        self.world.stubs.mended
    }

    /// Gets to know the jumps through slots that others have translated. False if that cannot be now.
    fn learn_slots(&mut self) -> bool {
        let clears = self.world.clears.load(Ordering::Acquire);
        let Some(cache) = self.world.cache(self.me) else {
            self.vm.caches.windows.release();
            return false;
        };
        let far = &mut self.vm.caches.far;
        far.learn(&cache.fars, clears);
        true
    }

    /// Maps what an access faulted on.
    fn mend(&mut self) -> Result<(), Refusal> {
        let fault = self.vm.fault;
        if fault.vector != 14 {
            return Err(Refusal::Outside);
        }
        let cr3 = self.vm.cpu.cr3;
        let check = FailedCheck::at(fault.address.wrapping_sub(self.vm.this));
        let mended = self.with_windows(|w, memory| {
            if !w.belong_to(cr3) {
                return Err(Refusal::Guest);
            }
            if let Some(check) = check {
                return match check.as_expected() {
                    true => w.extend(memory, check.near),
                    false => Err(Refusal::Outside),
                };
            }
            let gva = w.guest_of(fault.address).ok_or(Refusal::Outside)?;
            w.renew(memory);
            w.map(memory, gva, fault.code & 2 != 0)
        });
        if !self.written.is_empty() && !self.kill_written() {
            return Err(Refusal::Guest);
        }
        mended
    }

    /// Remembers that an instruction's accesses cannot go as they went, and takes its block out of use.
    fn learn(&mut self, block: usize, phys: u64, ctx: Context, why: Refusal) {
        let low = ctx.low_window();
        let fault = self.vm.fault;
        let Some(mut cache) = self.world.cache(self.me) else {
            return;
        };
        let site = match why {
            Refusal::Guest => return,
            Refusal::Memory | Refusal::Crowded => Site::Probe,
            Refusal::Outside if !low => return,
            Refusal::Outside => {
                let check = FailedCheck::at(fault.address.wrapping_sub(self.vm.this));
                match (check.map(FailedCheck::belongs), cache.site(phys, low)) {
                    // It lies in the other window.
                    (Some(Some(kind)), None) => Site::Window(kind),
                    (Some(Some(_)), Some(Site::Window(_))) => Site::Window(window::EITHER),
                    // In none.
                    (Some(None), _) => return,
                    _ => Site::Probe,
                }
            }
        };
        cache.learn(phys, low, site);
        let same = cache.get(block).is_some_and(|b| b.phys >> 12 == phys >> 12);
        if same {
            cache.kill(block as u32);
        }
    }
}
