//! Windows: parts of the guest's user address space that the host's MMU maps, so that an access needs no
//! lookup.
//!
//! Emitted code makes a host address of a guest's linear address L with one instruction and an addition:
//! `pdep(L, MASKS[k]) + PLACES[k]`. PDEP spreads the bits of L so that some bits of the sum are always
//! zero; the host's own memory lies where they are not. So whatever L is, the sum lies in a window, in memory that is
//! reserved and not accessible, or is no user address of the host: then the host faults, and the guest's
//! page tables say what comes of it.
//!
//! There are two kinds. [`HIGH`] is for 0x4000_0000_0000 and above: libraries, stacks, what is mapped, and
//! position-independent programs. It clears bit 44, which is set in all that Linux maps without being told where.
//! [`LOW`] is for the first TiB: other programs and their heaps.
//!
//! One guest address space at a time has windows in a process. What is mapped is what a processor's TLB may hold:
//! entries of the guest's page tables that were accessed (dirty, if they can be written). A flush compares the
//! page tables with copies of what was mapped from, and unmaps what has changed.
#![expect(
    unsafe_code,
    reason = "maps guest RAM where emitted code looks for it, and reads page tables"
)]

use crate::ram_files::Files;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use x86emu::env::RamRange;
use x86emu::paging::entry::{A, ADDR, D, P, RW, US};

/// The window for linear addresses from 0x4000_0000_0000 on.
pub const HIGH: usize = 0;
/// The window for linear addresses below 1 TiB.
pub const LOW: usize = 1;

const TIB: u64 = 1 << 40;
/// Where the low window lies.
const LOW_AT: u64 = 0x1100_0000_0000;
/// The parts of the host's address space that bit 44 makes.
const PART: u64 = 1 << 44;
/// End of the host's user address space.
const HOST_END: u64 = (1 << 47) - 4096;

/// The masks of PDEP.
pub const MASKS: [u64; 2] = [!PART, (TIB - 1) | (u64::MAX << 47)];
/// What is added to PDEP's results.
pub const PLACES: [u64; 2] = [(1u64 << 47).wrapping_neg(), LOW_AT];
/// The most that may be added to or taken from an address behind PDEP.
pub const REACH: i64 = 1 << 20;

/// Page tables that are mapped from at most, of 2 MiB each.
const MAX_TABLES: usize = 1024;
/// Mappings made since all were dropped after which all are: Linux allows a process 65,530.
const MAX_RUNS: usize = 24_000;
/// Runs of pages that one fault maps at most.
const RUNS_PER_FAULT: usize = 16;
const REGION: u64 = 1 << 21;

/// The host address of a linear address, and the kind of its window.
pub fn host_of(gva: u64) -> Option<u64> {
    match gva >> 44 {
        n @ 4..=7 => Some((2 * n - 8) << 44 | gva & (PART - 1)),
        _ if gva < TIB => Some(LOW_AT + gva),
        _ => None,
    }
}

/// The linear address of a host address in a window.
pub fn guest_of(host: u64) -> Option<u64> {
    if (LOW_AT..LOW_AT + TIB).contains(&host) {
        return Some(host - LOW_AT);
    }
    (host < 1 << 47 && host & PART == 0).then(|| ((host >> 45) + 4) << 44 | host & (PART - 1))
}

/// Reserves the windows and the surroundings that a displacement can reach, for good. False if something lies
/// there.
fn reserved() -> bool {
    static RESERVED: OnceLock<bool> = OnceLock::new();
    *RESERVED.get_or_init(|| {
        let margin = REACH as u64 + 4096;
        let mut all = vec![(LOW_AT - margin, LOW_AT + TIB + margin)];
        for part in 0..8 {
            let (start, end) = (part * PART, (part + 1) * PART);
            if part % 2 == 0 {
                all.push((start.max(lowest()), end));
            } else {
                all.push((start, start + margin));
                all.push(((end - margin).min(HOST_END - margin), end.min(HOST_END)));
            }
        }
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
    let high = (0..4).map(|n| (2 * n * PART, PART));
    for (start, len) in high.chain([(LOW_AT, TIB)]) {
        let (start, end) = (start.max(lowest()), start + len);
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
    /// Something is mapped below 1 TiB.
    pub low: bool,
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

    /// Takes the windows for an address space. False if they are in use, or cannot be had.
    pub fn take(&mut self, cr3: u64) -> bool {
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
        true
    }

    /// The address space of `cr3` has them.
    pub fn belong_to(&self, cr3: u64) -> bool {
        self.owner == key(cr3)
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

fn key(cr3: u64) -> u64 {
    cr3 & ADDR | 1
}

impl Drop for Windows {
    fn drop(&mut self) {
        self.release();
    }
}
