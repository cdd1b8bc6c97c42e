//! The helpers that translated code calls.
//!
//! A helper is called with the guest's registers saved in [`VcpuMem`]. It returns the host address
//! where translated code goes on, or 0 to come back to [`Runner::run`].

use super::*;
use crate::block::Block;
use crate::layout::{branch_of, far_branch_of, jump_index};
use crate::miss;
use crate::stubs::Helpers;
use crate::translate::link;

/// The helpers' addresses.
pub const HELPERS: Helpers = Helpers {
    link: helper_link,
    jump: helper_jump,
    memory: helper_memory,
    interpret: helper_interpret,
    poll: helper_poll,
    dead: helper_dead,
    fault: helper_fault,
    wrote: helper_wrote,
};

/// The runner that emitted code belongs to.
///
/// # Safety
/// Called from a helper, that is within `enter`, where `Runner::run` has stored it.
unsafe fn runner<'a>(vm: *mut VcpuMem) -> &'a mut Runner<'a> {
    // SAFETY: see above; `run` makes no use of its own reference while `enter` is on the stack.
    unsafe { &mut *((*vm).runner as *mut Runner<'a>) }
}

/// The word at `p`.
///
/// # Safety
/// `p` points at inline data behind a stub call.
unsafe fn word(p: *const u8) -> u32 {
    // SAFETY: emitted there by `translate`.
    unsafe { p.cast::<u32>().read_unaligned() }
}

/// An address relative to the word at `p` that holds the distance.
///
/// # Safety
/// As for [`word`].
unsafe fn relative(p: *const u8) -> u64 {
    // SAFETY: the caller's promise.
    let d = unsafe { word(p) } as i32;
    (p as u64).wrapping_add(i64::from(d) as u64)
}

impl Runner<'_> {
    /// The code that called a helper is in code with windows: its page is the one whose number is at `p`. False
    /// if it is not, and there is no such word.
    ///
    /// # Safety
    /// Called from a helper; in code with windows `p` points at inline data.
    unsafe fn in_page(&mut self, p: *const u8) -> bool {
        let windows = Context(self.vm.ctx).windows();
        if windows {
            // SAFETY: the caller's promise.
            let n = unsafe { word(p) };
            self.vm.pc_base = self.vm.caches.far.page(n as u16);
        }
        windows
    }
}

extern "sysv64" fn helper_interpret(vm: *mut VcpuMem, ret: *const u8) -> u64 {
    // SAFETY: called by the stub with its contract.
    unsafe {
        let bytes = std::slice::from_raw_parts(ret.add(4), usize::from(*ret.add(19)).min(15));
        let data = if runner(vm).in_page(ret.add(20)) {
            24
        } else {
            20
        };
        runner(vm).interpret(word(ret), bytes, ret as u64 + data)
    }
}

extern "sysv64" fn helper_memory(vm: *mut VcpuMem, ret: *const u8) -> u64 {
    // SAFETY: called by the stub with its contract.
    let (r, w) = unsafe { (runner(vm), word(ret.sub(miss::META))) };
    // SAFETY: as above.
    unsafe { r.in_page(ret.sub(miss::META + 4)) };
    // SAFETY: as above. A group has its span there, and never gets that far.
    let resume = unsafe { relative(ret.sub(miss::SECOND)) };
    let epoch = r.epoch();
    let gva = r.vm.t;
    if r.fill_access(gva, w) && r.epoch() == epoch {
        if w & meta::FPU == 0 {
            r.vm.fpu_reload = 0;
        }
        // Carry is clear when translated code goes on: try again.
        return ret as u64;
    }
    let holds_code = std::mem::take(&mut r.holds_code);
    let size = u64::from(w >> meta::SIZE_SHIFT);
    if w & meta::AGAIN != 0 && (holds_code || (gva & 0xfff) + size > 4096) {
        r.sync(w & 0xfff);
        if let Some(mut cache) = r.world.cache(r.me) {
            cache.make_again(ret as u64, w as u16 & 0xfff);
            drop(cache);
            return r.dispatch();
        }
        r.exit = Some(Exit::Interrupted);
        return 0;
    }
    if w & meta::GROUP != 0 {
        if w & meta::FPU == 0 {
            r.vm.fpu_reload = 0;
        }
        // Over the jump back: what leads to the block apart.
        return ret as u64 + 6;
    }
    let to = r.interpret(w, &[], resume);
    if to == resume && w & meta::HOST_FLAGS != 0 {
        r.vm.ret_addr = resume;
        return r.world.stubs.wrote_back;
    }
    to
}

extern "sysv64" fn helper_link(vm: *mut VcpuMem, ret: *const u8) -> u64 {
    // SAFETY: called by the stub with its contract.
    let (r, w) = unsafe { (runner(vm), word(ret)) };
    // SAFETY: as above.
    let low = unsafe { ret.add(4).cast::<u16>().read_unaligned() };
    let distance = u64::from(w >> link::DISTANCE_SHIFT << 16 | u32::from(low));
    // SAFETY: as above.
    unsafe { r.in_page(ret.add(6)) };
    // Where the displacement is, and where it leads now: to the call.
    let (site, exit) = (ret as u64 - distance, ret as u64 - 5);
    r.stats.links += 1;
    let ctx = Context(r.vm.ctx).with_apart(w >> link::APART_SHIFT & 0x7f);
    let offset = w & 0xfff;
    r.sync(offset);
    let world = r.world;
    let Some(mut cache) = world.cache(r.me) else {
        r.exit = Some(Exit::Interrupted);
        return 0;
    };
    let source = cache.index_at(ret as u64);
    let live = |b: &&Block| !b.dead();
    if let Some(source) = source
        && let Some(page) = cache.get(source).filter(live).map(|b| b.phys & !0xfff)
    {
        let epoch = world.epoch();
        let fpu = w & link::FPU != 0;
        let found = r.block_in(&mut cache, page | u64::from(offset), None, ctx, |b| {
            let entry = match (w & link::LANDS != 0, fpu && b.fpu()) {
                (true, _) => b.indirect,
                (false, true) => b.direct_fpu(),
                (false, false) => b.direct(),
            };
            (entry, b.indirect)
        });
        let (target, indirect) = match found {
            Ok(found) => found,
            Err(NoBlock::Leave) => return 0,
            Err(NoBlock::NeedsSecond) => {
                drop(cache);
                return r.dispatch();
            }
        };
        if world.epoch() == epoch {
            let to = (page | u64::from(offset), ctx.0);
            cache.link(source, site, exit, target, to);
            drop(cache);
            if r.interrupted().is_none() {
                r.vm.t = r.linear_pc();
                return r.go(indirect);
            }
            return r.dispatch();
        }
    }
    drop(cache);
    r.dispatch()
}

extern "sysv64" fn helper_jump(vm: *mut VcpuMem, _: *const u8) -> u64 {
    // SAFETY: called by the stub with its contract.
    let r = unsafe { runner(vm) };
    r.stats.jumps += 1;
    if Context(r.vm.ctx).windows() {
        let epoch = r.epoch();
        r.vm.caches.far.stray(epoch);
        r.vm.settle();
    }
    let branch = std::mem::take(&mut r.vm.branch);
    if branch != 0
        && Context(r.vm.ctx).code_size() == CodeSize::Bits64
        && !paging::canonical(&r.vm.cpu, r.vm.t)
    {
        // The branch itself is #GP: undone and left to the interpreter.
        let (offset, moved) = match far_branch_of(branch) {
            Some((offset, moved, page)) => {
                r.vm.pc_base = r.vm.caches.far.page(page);
                (offset, moved)
            }
            None => branch_of(branch),
        };
        let rsp = &mut r.vm.cpu.gpr[x86emu::state::gpr::RSP];
        *rsp = rsp.wrapping_sub(i64::from(moved) as u64);
        r.sync(offset);
        return match r.step() {
            Stepped::Retired | Stepped::Redirected => r.dispatch(),
            Stepped::Exit(exit) => {
                r.exit = Some(exit);
                0
            }
        };
    }
    r.sync_linear(r.vm.t);
    debug_assert!(jump_index(r.vm.t) < crate::layout::JUMP_ENTRIES);
    r.find()
}

extern "sysv64" fn helper_poll(vm: *mut VcpuMem, ret: *const u8) -> u64 {
    // SAFETY: called by the stub with its contract.
    let (r, w) = unsafe { (runner(vm), word(ret)) };
    // SAFETY: as above.
    unsafe { r.in_page(ret.add(4)) };
    r.sync(w & 0xfff);
    r.dispatch()
}

extern "sysv64" fn helper_dead(vm: *mut VcpuMem, ret: *const u8) -> u64 {
    // SAFETY: called by the stub with its contract. The entry was an instruction of eight bytes, of which
    // the call took five; with windows of nine.
    unsafe {
        let r = runner(vm);
        let mut offset = u32::from(ret.cast::<u16>().read_unaligned());
        if Context(r.vm.ctx).windows() {
            let place = word(ret);
            offset = place & 0xfff;
            r.vm.pc_base = r.vm.caches.far.page((place >> 12) as u16);
            r.sync(offset);
            // What led here, a slot or a jump cache, leads here still.
            let epoch = r.epoch();
            r.vm.caches.far.stray(epoch);
            r.vm.settle();
            return r.find();
        }
        r.sync(offset);
        r.dispatch()
    }
}

extern "sysv64" fn helper_wrote(vm: *mut VcpuMem, ret: *const u8) -> u64 {
    // SAFETY: called by the stub with its contract.
    unsafe { runner(vm).wrote(ret as u64) }
}

extern "sysv64" fn helper_fault(vm: *mut VcpuMem, _: *const u8) -> u64 {
    // SAFETY: called by the stub with its contract.
    unsafe { runner(vm) }.fault()
}
