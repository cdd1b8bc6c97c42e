//! Windows: parts of the guest's user address space that the host's MMU maps, so that an access needs no
//! lookup.
//!
//! A guest's linear address and the place of its window make a host address by addition. Before an address is used so,
//! it is *checked*: its upper bits (SHRX) index a page that can be read if they are right, among reserved
//! address space that faults if they are not ([`CHECKS`]). Or PDEP *spreads* it ([`MASKS`]), so that a wrong one
//! makes a sum that is no user address of the host. Neither touches EFLAGS. So whatever a guest comes up with, the host
//! address lies in a window, in memory around it that is reserved and not accessible, or the host faults; then
//! the guest's page tables say what comes of it. How an address was checked holds for what lies up to [`REACH`] from it.
//!
//! There are two kinds. [`HIGH`] is for 0x4000_0000_0000 and above: libraries, stacks, what is mapped, and
//! position-independent programs. Its window is the lower half of the host's user address space; the upper half has all that
//! Linux maps without being told where. [`LOW`] is for the first 16 TiB: other programs and their heaps.
//!
//! One guest address space at a time has windows in a process. What is mapped is what a processor's TLB may hold:
//! entries of the guest's page tables that were accessed (dirty, if they can be written). A flush compares the
//! page tables with copies of what was mapped from, and unmaps what has changed.
#![expect(
    unsafe_code,
    reason = "maps guest RAM where emitted code looks for it, and reads page tables"
)]

use crate::layout::VcpuMem;
use crate::ram_files::Files;
use crate::signal;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use x86emu::env::RamRange;
use x86emu::paging::entry::{A, ADDR, D, P, RW, US};

/// The window for linear addresses from 0x4000_0000_0000 on.
pub const HIGH: usize = 0;
/// The window for linear addresses below 16 TiB.
pub const LOW: usize = 1;

/// First linear address, and end, of the high window.
const HIGH_START: u64 = 1 << 46;
const HIGH_END: u64 = 1 << 47;
/// End of the low window.
const LOW_END: u64 = 1 << 44;
/// Where the low window lies on the host: behind the high one.
const LOW_AT: u64 = (1 << 46) + (1 << 30);

/// By how much the check of an address shifts it. The low bits of [`PLACES`], as SHRX takes its count from a register.
pub const SHIFTS: [u64; 2] = [34, 32];
/// The host address of linear address 0, plus the shift.
pub const PLACES: [u64; 2] = [SHIFTS[HIGH].wrapping_sub(HIGH_START), SHIFTS[LOW] + LOW_AT];
/// The masks of PDEP.
pub const MASKS: [u64; 2] = [!HIGH_END, (LOW_END - 1) | (u64::MAX << 47)];
/// Offset in [`VcpuMem`]'s mapping of what the shifted addresses index.
pub const CHECKS: [i32; 2] = [48 << 20, (48 << 20) + (1 << 30)];
/// Offsets of the pages there that can be read.
pub const CHECK_PAGES: [usize; 2] = [
    CHECKS[HIGH] as usize + (HIGH_START >> SHIFTS[HIGH]) as usize,
    CHECKS[LOW] as usize,
];
/// The size of [`VcpuMem`] with all of that.
pub const WITH_CHECKS: usize = CHECKS[LOW] as usize + (1 << 32);
const _: () = assert!(size_of::<VcpuMem>() <= CHECKS[HIGH] as usize);
const _: () = assert!(CHECKS[HIGH] as u64 + (1 << (64 - SHIFTS[HIGH])) <= CHECKS[LOW] as u64);

/// The most that may be added to or taken from an address behind PDEP.
pub const REACH: i64 = 1 << 20;

/// Page tables that are mapped from at most, of 2 MiB each.
const MAX_TABLES: usize = 1024;
/// Mappings made since all were dropped after which all are: Linux allows a process 65,530.
const MAX_RUNS: usize = 24_000;
/// Runs of pages that one fault maps at most.
const RUNS_PER_FAULT: usize = 16;
const REGION: u64 = 1 << 21;

/// The host address of a linear address that lies in a window.
pub fn host_of(gva: u64) -> Option<u64> {
    match gva {
        HIGH_START..HIGH_END => Some(gva - HIGH_START),
        0..LOW_END => Some(LOW_AT + gva),
        _ => None,
    }
}

/// The linear address of a host address in a window.
pub fn guest_of(host: u64) -> Option<u64> {
    let low = host.wrapping_sub(LOW_AT);
    match host {
        0..HIGH_START => Some(host + HIGH_START),
        _ => (low < LOW_END).then_some(low),
    }
}

/// What is left of an address that a check has found wrong, `at` bytes into the vCPU's mapping, for which
/// window; and whether it lies in the other one.
pub fn failed_check(at: u64) -> Option<(usize, bool)> {
    let of = |kind: usize| at.wrapping_sub(CHECKS[kind] as u64);
    if of(LOW) < 1 << 32 {
        let high = HIGH_START >> SHIFTS[LOW]..HIGH_END >> SHIFTS[LOW];
        return Some((LOW, high.contains(&of(LOW))));
    }
    (of(HIGH) < 1 << 30).then(|| (HIGH, of(HIGH) < LOW_END >> SHIFTS[HIGH]))
}

/// Reserves the windows and the surroundings that a displacement can reach, for good. False if something lies
/// there.
fn reserved() -> bool {
    static RESERVED: OnceLock<bool> = OnceLock::new();
    *RESERVED.get_or_init(|| {
        let margin = REACH as u64 + 4096;
        let all = [
            (lowest(), HIGH_START + margin),
            (LOW_AT - margin, LOW_AT + LOW_END + margin),
        ];
        for (i, &(start, end)) in all.iter().enumerate() {
            if !reserve(start, end) {
                for &(start, end) in &all[..i] {
                    // SAFETY: reserved just now, and used by nobody.
                    unsafe { libc::munmap(start as *mut _, (end - start) as usize) };
                }
                log::debug!("engine_jit: no windows: {start:#x}-{end:#x} cannot be reserved");
                return false;
            }
        }
        true
    })
}

/// Unmaps everything in all windows, which needs no room for more mappings.
fn empty() {
    for (start, end) in [(lowest(), HIGH_START), (LOW_AT, LOW_AT + LOW_END)] {
        let len = end - start;
        let flags = NOTHING | libc::MAP_FIXED;
        // SAFETY: all of it is reserved for windows, which only emitted code accesses.
        let done =
            unsafe { libc::mmap(start as *mut _, len as usize, libc::PROT_NONE, flags, -1, 0) };
        if done == libc::MAP_FAILED {
            log::error!("engine_jit: the host cannot unmap guest memory: out of memory");
            // What stays mapped may belong to another guest process by now.
            std::process::abort();
        }
    }
}

/// The lowest address that a program may map.
fn lowest() -> u64 {
    static LOWEST: OnceLock<u64> = OnceLock::new();
    *LOWEST.get_or_init(|| {
        std::fs::read_to_string("/proc/sys/vm/mmap_min_addr")
            .ok()
            .and_then(|s| s.trim().parse::<u64>().ok())
            .unwrap_or(0)
            .clamp(1 << 16, 1 << 30)
            .next_multiple_of(4096)
    })
}

const NOTHING: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

fn reserve(start: u64, end: u64) -> bool {
    let flags = NOTHING | libc::MAP_FIXED_NOREPLACE;
    let len = (end - start) as usize;
    // SAFETY: takes no address that is in use; a kernel that does not know the flag may choose
    // another, which is given back.
    unsafe {
        let at = libc::mmap(start as *mut _, len, libc::PROT_NONE, flags, -1, 0);
        if at == libc::MAP_FAILED {
            return false;
        }
        if at as u64 != start {
            libc::munmap(at, len);
            return false;
        }
    }
    true
}

/// Whether PDEP is one fast instruction on this host: it is microcode on AMD's before Zen 3.
fn pdep_is_fast() -> bool {
    use std::arch::x86_64::__cpuid;
    if !std::arch::is_x86_feature_detected!("bmi2") {
        return false;
    }
    let (vendor, version) = (__cpuid(0), __cpuid(1).eax);
    let intel = vendor.ebx == u32::from_le_bytes(*b"Genu");
    let base = version >> 8 & 15;
    let family = if base == 15 {
        base + (version >> 20 & 255)
    } else {
        base
    };
    intel || family >= 0x19
}

fn variable() -> Option<std::ffi::OsString> {
    std::env::var_os("ANYKVM_WINDOWS")
}

/// Some window is in use in this process.
static LEASED: AtomicBool = AtomicBool::new(false);

/// What is mapped of 2 MiB of linear addresses.
struct Table {
    /// First linear address.
    base: u64,
    /// The entries above, from CR3 on: where each lies on the host, and what it was.
    path: [(*const AtomicU64, u64); 3],
    /// The page table on the host; null if the last entry of the path maps a large page.
    entries: *const AtomicU64,
    /// The table as it was when it was last looked at.
    seen: Box<[u64; 512]>,
    /// Pages that are mapped.
    mapped: [u64; 8],
    /// Those among them that may be written.
    written: [u64; 8],
}

/// Why an access cannot be mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// It lies in no window.
    Outside,
    /// The page tables forbid it, or have nothing there.
    Guest,
    /// It is not memory that can be mapped so.
    Memory,
}

/// What the windows need of the vCPU that they belong to.
pub trait Memory {
    /// Walks the page tables for an access, as a processor does; the guest-physical address.
    fn walk(&mut self, gva: u64, write: bool) -> Option<u64>;
    /// Host address of a page of guest RAM.
    fn page(&mut self, gpa: u64) -> Option<*const u8>;
    /// The RAM around a guest-physical address.
    fn ram(&mut self, gpa: u64) -> Option<RamRange>;
    /// Notes that a page may be written from now on; false if it holds code.
    fn let_write(&self, gpa: u64) -> bool;
}

/// The windows of a vCPU, or none.
#[derive(Default)]
pub struct Windows {
    /// CR3 of the address space that has them, bit 0 set; 0: none has.
    owner: u64,
    /// Page tables must be compared before they are used again.
    stale: bool,
    /// Something is mapped below 512 GiB.
    pub low: bool,
    /// RSP was seen outside the high window.
    odd_stack: bool,
    forbidden: bool,
    unusable: bool,
    tables: Vec<Table>,
    runs: usize,
    files: Files,
    /// Faults that mapped something, since start.
    pub faults: u64,
    /// Mappings made and undone, since start.
    pub mappings: u64,
}

// SAFETY: the pointers are into guest RAM, which stays mapped until `drop_all`; they are read atomically.
unsafe impl Send for Windows {}

fn read(p: *const AtomicU64) -> u64 {
    // SAFETY: `p` is the address of an entry in guest RAM; see `Table`.
    unsafe { (*p).load(Ordering::Relaxed) }
}

fn bit(set: &[u64; 8], i: usize) -> bool {
    set[i / 64] & 1 << (i % 64) != 0
}

fn put(set: &mut [u64; 8], i: usize, value: bool) {
    let mask = 1 << (i % 64);
    if value {
        set[i / 64] |= mask;
    } else {
        set[i / 64] &= !mask;
    }
}

impl Table {
    fn path_holds(&self) -> bool {
        // Accessed and dirty bits of upper levels say nothing.
        self.path
            .iter()
            .all(|&(p, was)| (read(p) ^ was) & !(A | D) == 0)
    }

    fn entry(&self, i: usize) -> u64 {
        if self.entries.is_null() {
            // A page of 2 MiB, as if a table had its parts.
            let large = read(self.path[2].0);
            return large & !(REGION - 1) & ADDR | large & (P | RW | US | A | D) | (i as u64) << 12;
        }
        // SAFETY: `i` is below 512, and the page holds as many entries.
        read(unsafe { self.entries.add(i) })
    }

    /// What of an entry allows: to be mapped, to be written.
    fn rights(&self, entry: u64) -> (bool, bool) {
        let writable = self.path.iter().all(|e| e.1 & RW != 0);
        let need = P | US | A;
        let ok = entry & need == need;
        (ok, ok && writable && entry & (RW | D) == RW | D)
    }

    /// The entry of a mapped page still allows what is mapped; else the page is taken for unmapped.
    fn holds(&mut self, i: usize) -> bool {
        let (now, was) = (self.entry(i), self.seen[i]);
        if now == was {
            return true;
        }
        self.seen[i] = now;
        let (readable, writable) = self.rights(now);
        let same = was & ADDR == now & ADDR;
        let holds = readable && same && (writable || !bit(&self.written, i));
        if !holds {
            put(&mut self.mapped, i, false);
            put(&mut self.written, i, false);
        }
        holds
    }

    fn host(&self, i: usize) -> u64 {
        // Only what lies in a window has a table.
        host_of(self.base).unwrap_or(LOW_AT) + (i as u64) * 4096
    }
}

impl Windows {
    /// The host can have windows at all.
    pub fn possible() -> bool {
        static POSSIBLE: OnceLock<bool> = OnceLock::new();
        *POSSIBLE.get_or_init(|| variable() != Some("0".into()) && pdep_is_fast())
    }

    /// Every address space is to have them at once, whatever they cost: for tests.
    pub fn always() -> bool {
        static ALWAYS: OnceLock<bool> = OnceLock::new();
        *ALWAYS.get_or_init(|| variable() == Some("always".into()))
    }

    /// Lets this vCPU never have windows.
    pub fn forbid(&mut self, forbid: bool) {
        self.forbidden = forbid;
    }

    /// This vCPU cannot have windows now.
    pub fn hopeless(&self) -> bool {
        let elsewhere = self.owner == 0 && LEASED.load(Ordering::Relaxed);
        self.forbidden || self.unusable || elsewhere
    }

    /// The guest's RAM, of which the page at `gpa` is part, can be mapped a second time. If not, that is remembered
    /// until memslots change.
    pub fn usable(&mut self, memory: &mut dyn Memory, gpa: u64) -> bool {
        if !self.unusable {
            if !signal::unfiltered() {
                self.unusable = true;
                return false;
            }
            let ram = memory.ram(gpa & ADDR);
            self.unusable = ram.is_none_or(|ram| self.files.of(&ram).is_none());
        }
        !self.unusable
    }

    /// Takes the windows for an address space. False if they are in use, or cannot be had.
    pub fn take(&mut self, cr3: u64) -> bool {
        if self.forbidden || !signal::faults_arrive() {
            return false;
        }
        if self.owner == 0 {
            if LEASED.swap(true, Ordering::AcqRel) {
                return false;
            }
            if !reserved() {
                // For good: nobody has to try again.
                return false;
            }
        } else {
            self.drop_all();
        }
        self.owner = key(cr3);
        self.stale = true;
        self.odd_stack = false;
        true
    }

    /// The address space of `cr3` has them.
    pub fn belong_to(&self, cr3: u64) -> bool {
        self.owner == key(cr3)
    }

    /// Their owner is about to run with this stack pointer. True if RSP cannot be relied on to lie in the high window.
    pub fn odd_stack(&mut self, rsp: u64) -> bool {
        self.odd_stack |= !(HIGH_START..HIGH_END).contains(&rsp);
        self.odd_stack
    }

    /// Some address space has them.
    pub fn taken(&self) -> bool {
        self.owner != 0
    }

    /// Gives the windows back.
    pub fn release(&mut self) {
        if self.owner != 0 {
            self.forget_memory();
            self.owner = 0;
            LEASED.store(false, Ordering::Release);
        }
    }

    /// A flush of all that is not global, or of everything: page tables are compared before the next use.
    pub fn flush(&mut self) {
        self.stale = true;
    }

    /// The page tables must be compared before the next use.
    pub fn stale(&self) -> bool {
        self.stale
    }

    /// Must be called before guest code runs with windows.
    pub fn renew(&mut self, memory: &mut dyn Memory) {
        if !std::mem::take(&mut self.stale) {
            return;
        }
        let root = memory.page(self.owner & ADDR);
        self.low = root.is_some_and(|p| read(p.cast()) & (P | US) == P | US);
        let mut gone = Vec::new();
        self.tables.retain_mut(|t| {
            if !t.path_holds() {
                gone.push((t.host(0), 512));
                return false;
            }
            let mut changed = Vec::new();
            for word in 0..8 {
                let mut left = t.mapped[word];
                while left != 0 {
                    let i = word * 64 + left.trailing_zeros() as usize;
                    left &= left - 1;
                    if !t.holds(i) {
                        changed.push(i);
                    }
                }
            }
            for run in changed.chunk_by(|a, b| a + 1 == *b) {
                gone.push((t.host(run[0]), run.len()));
            }
            true
        });
        for (at, pages) in gone {
            self.unmap(at, pages);
        }
    }

    /// INVLPG.
    pub fn flush_page(&mut self, gva: u64) {
        let base = gva & !(REGION - 1);
        let Some(n) = self.tables.iter().position(|t| t.base == base) else {
            return;
        };
        let t = &mut self.tables[n];
        if t.entries.is_null() || !t.path_holds() {
            let at = t.host(0);
            self.tables.swap_remove(n);
            self.unmap(at, 512);
            return;
        }
        let i = (gva >> 12) as usize & 511;
        if bit(&t.mapped, i) && !t.holds(i) {
            let at = t.host(i);
            self.unmap(at, 1);
        }
    }

    /// Guest-physical addresses may mean other memory.
    pub fn forget_memory(&mut self) {
        self.drop_all();
        self.unusable = false;
        self.files = Files::default();
    }

    /// Unmaps everything.
    fn drop_all(&mut self) {
        for (at, pages) in std::mem::take(&mut self.tables)
            .iter()
            .map(|t| (t.host(0), 512))
        {
            self.unmap(at, pages);
        }
        self.runs = 0;
        self.stale = true;
    }

    /// Takes the right to write guest-physical memory back.
    pub fn unwrite(&mut self, gpa: u64, len: u64) {
        let mut done = true;
        for t in &mut self.tables {
            if t.written == [0; 8] {
                continue;
            }
            let mut i = 0;
            while i < 512 {
                let first = i;
                while i < 512 && bit(&t.written, i) && (t.seen[i] & ADDR).wrapping_sub(gpa) < len {
                    put(&mut t.written, i, false);
                    i += 1;
                }
                if i == first {
                    i += 1;
                    continue;
                }
                self.runs += 1;
                let len = (i - first) * 4096;
                // SAFETY: pages of a window, which only emitted code accesses.
                done &=
                    unsafe { libc::mprotect(t.host(first) as *mut _, len, libc::PROT_READ) } == 0;
            }
        }
        if !done {
            // There are too many mappings to split one.
            self.tables.clear();
            empty();
        }
    }

    fn unmap(&mut self, at: u64, pages: usize) {
        self.mappings += 1;
        if pages < 512 {
            // What is left on both sides is two mappings now.
            self.runs += 1;
        }
        let flags = NOTHING | libc::MAP_FIXED;
        // SAFETY: part of a window: only emitted code accesses it, and expects faults.
        let done = unsafe { libc::mmap(at as *mut _, pages * 4096, libc::PROT_NONE, flags, -1, 0) };
        if done == libc::MAP_FAILED {
            // There are too many mappings to split one.
            self.tables.clear();
            empty();
        }
    }

    /// Maps what an access faulted on, and what lies around it.
    pub fn map(&mut self, memory: &mut dyn Memory, gva: u64, write: bool) -> Result<(), Refusal> {
        let host = host_of(gva).ok_or(Refusal::Outside)?;
        if host & !(REGION - 1) < lowest() {
            // A privileged process may map these pages, but null pointers of its own must not lead to the guest.
            return Err(Refusal::Memory);
        }
        if self.runs > MAX_RUNS || self.tables.len() >= MAX_TABLES {
            self.drop_all();
            self.stale = false;
        }
        let gpa = memory.walk(gva, write).ok_or(Refusal::Guest)? & !0xfff;
        let n = self.table(memory, gva).ok_or(Refusal::Memory)?;
        let i = (gva >> 12) as usize & 511;
        let t = &mut self.tables[n];
        if bit(&t.mapped, i) && (!write || bit(&t.written, i)) {
            // The host has nothing there (a truncated file, broken memory): mapping it again would not help.
            return Err(Refusal::Memory);
        }
        let entry = t.entry(i);
        let (readable, writable) = t.rights(entry);
        if entry & ADDR != gpa || !readable || write && !writable {
            return Err(Refusal::Memory);
        }
        if write && !memory.let_write(gpa) {
            return Err(Refusal::Memory);
        }
        let mut left = RUNS_PER_FAULT;
        let end = self.run(memory, n, i).ok_or(Refusal::Memory)?;
        if write && !bit(&self.tables[n].written, i) {
            return Err(Refusal::Memory);
        }
        self.faults += 1;
        // What was accessed before is likely to be again.
        for range in [end..512, 0..i] {
            let mut next = range.start;
            while next < range.end && left > 0 {
                let Some(t) = self.tables.get(n) else {
                    return Ok(());
                };
                let (readable, writable) = t.rights(t.entry(next));
                let done = bit(&t.mapped, next) && (!writable || bit(&t.written, next));
                if !readable || done {
                    next += 1;
                    continue;
                }
                left -= 1;
                next = self.run(memory, n, next).unwrap_or(next + 1);
            }
        }
        Ok(())
    }

    /// Maps the run of pages from `first` on that lie side by side in guest RAM too; its end.
    fn run(&mut self, memory: &mut dyn Memory, n: usize, first: usize) -> Option<usize> {
        let t = &mut self.tables[n];
        let entry = t.entry(first);
        let gpa = entry & ADDR;
        let ram = memory.ram(gpa)?;
        let may = |t: &Table, i: usize, entry: u64| {
            let same = t.seen[i] & ADDR == entry & ADDR;
            let noted = same && bit(&t.written, i);
            t.rights(entry).1 && (noted || ram.quiet && memory.let_write(entry & ADDR))
        };
        let writable = may(t, first, entry);
        let file = self.files.of(&ram)?;
        // Other vCPUs may change entries at any time: what is mapped is what was read once.
        let mut read = [0; 512];
        let mut end = first;
        while end < 512 {
            let now = if end == first { entry } else { t.entry(end) };
            let at = gpa + (end - first) as u64 * 4096;
            let fits = at.wrapping_sub(ram.gpa) < ram.size && at.wrapping_sub(file.gpa) < file.size;
            if now & ADDR != at
                || !t.rights(now).0
                || !fits
                || end != first && may(t, end, now) != writable
            {
                break;
            }
            read[end] = now;
            end += 1;
        }
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        let flags = libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE;
        let len = (end - first) * 4096;
        if len == 0 {
            return None;
        }
        let offset = (file.offset + (gpa - file.gpa)) as libc::off_t;
        // SAFETY: in a window, which only emitted code accesses; the file is guest RAM.
        let at = unsafe {
            libc::mmap(
                t.host(first) as *mut _,
                len,
                protection,
                flags,
                file.fd(),
                offset,
            )
        };
        let done = at != libc::MAP_FAILED;
        t.seen[first..end].copy_from_slice(&read[first..end]);
        for i in first..end {
            put(&mut t.mapped, i, done);
            put(&mut t.written, i, done && writable);
        }
        if !done {
            // The host may have unmapped what was there.
            let at = t.host(first);
            self.unmap(at, end - first);
            return None;
        }
        self.runs += 1;
        self.mappings += 1;
        Some(end)
    }

    /// The table for a linear address, which must be mapped.
    fn table(&mut self, memory: &mut dyn Memory, gva: u64) -> Option<usize> {
        let base = gva & !(REGION - 1);
        if let Some(n) = self.tables.iter().position(|t| t.base == base) {
            if self.tables[n].path_holds() {
                return Some(n);
            }
            // It was replaced without a flush, where nothing was before.
            let at = self.tables.swap_remove(n).host(0);
            self.unmap(at, 512);
        }
        let mut path = [(std::ptr::null(), 0); 3];
        let mut next = self.owner & ADDR;
        for (level, step) in path.iter_mut().enumerate() {
            let index = (gva >> (39 - 9 * level)) as usize & 511;
            // SAFETY: within the page.
            let at = unsafe { memory.page(next)?.cast::<AtomicU64>().add(index) };
            let entry = read(at);
            let large = entry & 1 << 7 != 0;
            if entry & (P | US) != P | US || large && level < 2 {
                return None;
            }
            *step = (at, entry);
            next = entry & ADDR;
        }
        let entries = if path[2].1 & 1 << 7 != 0 {
            std::ptr::null()
        } else {
            memory.page(next)?.cast()
        };
        let mut table = Table {
            base,
            path,
            entries,
            seen: Box::new([0; 512]),
            mapped: [0; 8],
            written: [0; 8],
        };
        for i in 0..512 {
            table.seen[i] = table.entry(i);
        }
        self.tables.push(table);
        Some(self.tables.len() - 1)
    }
}

/// An address space, as a number that is not 0.
pub fn key(cr3: u64) -> u64 {
    cr3 & ADDR | 1
}

impl Drop for Windows {
    fn drop(&mut self) {
        self.release();
    }
}
