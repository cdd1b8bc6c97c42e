//! The vCPUs of a VM as the engine sees them: who is in translated code, and how to stop everyone.
//!
//! Lock order: [`World::cache`] before [`World::vcpus`]. The world is stopped only by the holder of
//! the cache lock; a vCPU that waits for that lock while the world is being stopped parks, and leaves
//! guest code afterwards.
#![expect(
    unsafe_code,
    reason = "vCPU memory is shared with emitted code and other threads"
)]

use crate::arena::Arena;
use crate::asm::Asm;
use crate::cache::Cache;
use crate::far::Far;
use crate::layout::VcpuMem;
use crate::shadow::Shadow;
use crate::stubs::{self, Helpers};
use crate::tlb::Caches;
use crate::window;
use kvm_core::engine::{EngineError, Kick};
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError, Weak};

/// Code memory per VM.
const ARENA_SIZE: usize = 256 << 20;

/// Guest page numbers with an entry in [`CodeMap`]: 1 TiB of guest-physical memory.
pub const CODE_MAP_PAGES: usize = 1 << 28;

/// The page holds translated code.
pub const PAGE_CODE: u8 = 1;
/// Some TLB may let writes to the page through, or the interpreter may be writing to it.
pub const PAGE_WRITTEN: u8 = 2;

/// One byte of flags per guest page, reserved and not committed.
pub struct CodeMap {
    base: *mut AtomicU8,
}

// SAFETY: the mapping is shared, and accessed by atomic operations only.
unsafe impl Send for CodeMap {}
// SAFETY: as above.
unsafe impl Sync for CodeMap {}

impl CodeMap {
    fn new() -> Result<Self, EngineError> {
        // SAFETY: a fresh anonymous mapping; the result is checked.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                CODE_MAP_PAGES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(EngineError::OutOfMemory);
        }
        Ok(CodeMap { base: base.cast() })
    }

    /// Address of the first page's flags.
    pub fn address(&self) -> u64 {
        self.base as u64
    }

    /// The flags of a guest page; `None` beyond the map, where nothing is cached.
    pub fn page(&self, gpa: u64) -> Option<&AtomicU8> {
        let gfn = usize::try_from(gpa >> 12)
            .ok()
            .filter(|&n| n < CODE_MAP_PAGES)?;
        // SAFETY: in bounds of the mapping, which lives as long as `self`.
        Some(unsafe { &*self.base.add(gfn) })
    }
}

impl Drop for CodeMap {
    fn drop(&mut self) {
        // SAFETY: made by `new` with this size; no reference outlives `self`.
        unsafe {
            libc::munmap(self.base.cast(), CODE_MAP_PAGES);
        }
    }
}

/// vCPUs of a process that can have windows: more would take too much of its address space for their checks.
const MAX_CHECKED: usize = 64;
static CHECKED: AtomicUsize = AtomicUsize::new(0);

/// One of them.
struct Checked;

impl Checked {
    fn new() -> Option<Checked> {
        let more = |n: usize| (n < MAX_CHECKED).then_some(n + 1);
        CHECKED
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, more)
            .ok()
            .map(|_| Checked)
    }
}

impl Drop for Checked {
    fn drop(&mut self) {
        CHECKED.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A vCPU's memory, page-aligned and zeroed, with its place in the world.
pub struct VcpuBox {
    mem: *mut VcpuMem,
    /// Bytes mapped there.
    mapped: usize,
    /// With the checks of windows.
    _checks: Option<Checked>,
    /// In [`crate::run`], so it may hold host pointers and be in translated code.
    pub running: AtomicBool,
}

// SAFETY: the memory is owned by the box. `cpu` and the caches are touched only by the thread that
// runs the vCPU, or while the world is stopped; `attention` is atomic.
unsafe impl Send for VcpuBox {}
// SAFETY: as above.
unsafe impl Sync for VcpuBox {}

impl VcpuBox {
    /// Allocates and initializes the memory of a vCPU.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn new(stubs: &stubs::Stubs) -> Result<Self, EngineError> {
        let mut shadow = Shadow::new()?;
        shadow.set_empty(stubs.empty, [stubs.empty_plain, stubs.far.empty]);
        // SAFETY: a fresh mapping, whose pages are zero and cost nothing before they are written; the result is
        // checked. Zeroed bytes are valid for the integer fields, and the fields that are not plain integers
        // (state, vectors) are written before any use.
        unsafe {
            let map = |size, protection| {
                let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
                libc::mmap(std::ptr::null_mut(), size, protection, flags, -1, 0)
            };
            let rw = libc::PROT_READ | libc::PROT_WRITE;
            // With what the checks of windows read behind it, if there is address space for it.
            let mut mapped = window::WITH_CHECKS;
            let checks = Checked::new();
            let mut mem = match checks {
                Some(_) => map(mapped, libc::PROT_NONE),
                None => libc::MAP_FAILED,
            };
            if mem != libc::MAP_FAILED {
                if libc::mprotect(mem, size_of::<VcpuMem>(), rw) != 0 {
                    libc::munmap(mem, mapped);
                    return Err(EngineError::OutOfMemory);
                }
            } else {
                mapped = size_of::<VcpuMem>();
                mem = map(mapped, rw);
            }
            if mem == libc::MAP_FAILED {
                return Err(EngineError::OutOfMemory);
            }
            let checks = checks.filter(|_| mapped == window::WITH_CHECKS);
            let mem = mem.cast::<VcpuMem>();
            (&raw mut (*mem).cpu).write(x86emu::state::CpuState::default());
            crate::tlb::Caches::init(&raw mut (*mem).caches, shadow, stubs.far.leave);
            (*mem).jump_mask = AtomicU64::new(crate::far::JUMP_MASK);
            (*mem).this = mem as u64;
            (*mem).host_mxcsr = 0x1f80;
            if checks.is_some() {
                (*mem).caches.windows = window::Windows::new(mem as u64);
            }
            Ok(VcpuBox {
                mem,
                _checks: checks,
                mapped,
                running: AtomicBool::new(false),
            })
        }
    }

    /// The memory. Who may touch what is said at the `Send` of this type.
    pub fn mem(&self) -> *mut VcpuMem {
        self.mem
    }

    /// The attention flag.
    pub fn attention(&self) -> &AtomicU32 {
        // SAFETY: the field is atomic and lives as long as the box.
        unsafe { &(*self.mem).attention }
    }
}

impl Drop for VcpuBox {
    fn drop(&mut self) {
        // SAFETY: mapped by `new` with this size; the last owner is gone.
        unsafe {
            std::ptr::drop_in_place(self.mem);
            libc::munmap(self.mem.cast(), self.mapped);
        }
    }
}

impl Kick for VcpuBox {
    fn kick(&self) {
        // SAFETY: the fields are atomic and live as long as the box.
        unsafe { &*self.mem }.raise_attention();
    }
}

/// Everything the vCPUs of a VM share.
pub struct World {
    cache: Mutex<Cache>,
    epoch: Arc<AtomicU64>,
    /// Flags per guest page.
    pub code_map: CodeMap,
    vcpus: Mutex<Vec<Weak<VcpuBox>>>,
    stop: AtomicBool,
    /// Counts clearings of the code cache.
    pub clears: AtomicU64,
    /// vCPUs that a stop keeps out.
    waiting: AtomicU32,
    /// The host has BMI2.
    pub bmi2: bool,
    /// XSAVE mask for the guest's state.
    pub xsave_mask: u32,
    /// Executable range of the arena.
    pub code: std::ops::Range<u64>,
    /// Addresses of the stubs.
    pub stubs: stubs::Stubs,
}

impl World {
    /// Reserves code memory and emits the stubs.
    pub fn new(helpers: &Helpers) -> Result<Self, EngineError> {
        let mut arena = Arena::new(ARENA_SIZE)?;
        let host = host_xcr0();
        let mut a = Asm::new(arena.next());
        let stubs = stubs::emit(&mut a, helpers, host & 4 != 0);
        arena.push(&a.buf).ok_or(EngineError::OutOfMemory)?;
        let code = arena.start()..arena.start() + ARENA_SIZE as u64;
        let epoch = Arc::new(AtomicU64::new(0));
        Ok(World {
            cache: Mutex::new(Cache::new(arena, stubs, epoch.clone())),
            epoch,
            code_map: CodeMap::new()?,
            vcpus: Mutex::new(Vec::new()),
            stop: AtomicBool::new(false),
            clears: AtomicU64::new(0),
            waiting: AtomicU32::new(0),
            bmi2: std::arch::is_x86_feature_detected!("bmi2"),
            xsave_mask: (host & 0xe7) as u32,
            code,
            stubs,
        })
    }

    /// Notes that a vCPU is about to write to a page, or to let emitted code do so. True if the page holds
    /// code; otherwise whoever translates from it stops the world first.
    pub fn note_write(&self, flags: &AtomicU8) -> bool {
        let before = flags.load(Ordering::Acquire);
        if before & PAGE_CODE != 0 {
            return true;
        }
        if before & PAGE_WRITTEN != 0 {
            return false;
        }
        // Marked before the check, so that a translation made meanwhile sees it.
        flags.fetch_or(PAGE_WRITTEN, Ordering::AcqRel) & PAGE_CODE != 0
    }

    /// Enters a vCPU.
    pub fn add(&self, vcpu: &Arc<VcpuBox>) {
        let mut v = lock(&self.vcpus);
        v.retain(|w| w.strong_count() > 0);
        v.push(Arc::downgrade(vcpu));
    }

    /// The world is being stopped: leave guest code.
    pub fn stopping(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Counts invalidations; see [`Cache::epoch`].
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Marks `me` as running, after waiting for the end of a stop.
    pub fn enter(&self, me: &VcpuBox) {
        loop {
            me.running.store(true, Ordering::SeqCst);
            if !self.stopping() {
                return;
            }
            me.running.store(false, Ordering::SeqCst);
            self.waiting.fetch_add(1, Ordering::SeqCst);
            while self.stopping() {
                std::thread::yield_now();
            }
            self.waiting.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Marks `me` as not running.
    pub fn leave(&self, me: &VcpuBox) {
        me.running.store(false, Ordering::SeqCst);
    }

    /// The cache, for a running vCPU. `None`: the world was stopped in the meantime, and the vCPU
    /// must leave guest code.
    pub fn cache(&self, me: &VcpuBox) -> Option<MutexGuard<'_, Cache>> {
        loop {
            match self.cache.try_lock() {
                Ok(g) => return Some(g),
                Err(TryLockError::Poisoned(p)) => return Some(p.into_inner()),
                Err(TryLockError::WouldBlock) => {}
            }
            if self.stopping() {
                self.leave(me);
                self.enter(me);
                return None;
            }
            std::thread::yield_now();
        }
    }

    /// The cache, for a thread that runs no vCPU.
    pub fn cache_outside(&self) -> MutexGuard<'_, Cache> {
        lock(&self.cache)
    }

    /// Runs `f` on every other vCPU's caches while none of them executes guest code. The caller
    /// holds the cache lock, whose guard it passes as proof.
    pub fn stopped(
        &self,
        _proof: &mut Cache,
        me: Option<&VcpuBox>,
        mut f: impl FnMut(&mut Caches),
    ) {
        let others: Vec<Arc<VcpuBox>> = lock(&self.vcpus)
            .iter()
            .filter_map(Weak::upgrade)
            .filter(|v| me.is_none_or(|m| !std::ptr::eq(m, &**v)))
            .collect();
        if others.is_empty() {
            return;
        }
        // Whoever the last stop kept out has its turn first, or one vCPU that stops the world again and
        // again would starve it. A bounded wait: its thread may not be scheduled.
        for _ in 0..1000 {
            if self.waiting.load(Ordering::SeqCst) == 0 {
                break;
            }
            std::thread::yield_now();
        }
        self.stop.store(true, Ordering::SeqCst);
        for v in &others {
            if v.running.load(Ordering::SeqCst) {
                v.kick();
            }
        }
        for v in &others {
            while v.running.load(Ordering::SeqCst) {
                std::thread::yield_now();
            }
            // SAFETY: the vCPU is not running and cannot start while `stop` is set; whoever touches its
            // caches takes `running` first.
            f(unsafe { &mut (*v.mem()).caches });
        }
        self.stop.store(false, Ordering::SeqCst);
    }

    /// Tells the others about slots of code that was just translated: code that they run may be linked to it.
    pub fn tell_slots(&self, _proof: &mut Cache, me: &VcpuBox, slots: &[(usize, u64)]) {
        if slots.is_empty() {
            return;
        }
        for v in lock(&self.vcpus).iter().filter_map(Weak::upgrade) {
            if std::ptr::eq(me, &*v) {
                continue;
            }
            for &(slot, exit) in slots {
                // SAFETY: the memory lives as long as `v`; its owner accesses these fields atomically.
                unsafe { Far::tell(&raw const (*v.mem()).caches.far, slot, exit) };
            }
        }
    }
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn host_xcr0() -> u64 {
    if !std::arch::is_x86_feature_detected!("xsave") {
        return 3;
    }
    // SAFETY: XSAVE is enabled by the OS, so XGETBV(0) is allowed.
    unsafe { std::arch::x86_64::_xgetbv(0) }
}
