//! Windows: parts of the guest's user address space that the host's MMU maps, so that an access needs no
//! lookup.
//!
//! A guest's linear address and the place of its window make a host address by addition. Before an address is used so,
//! it is *checked*: its upper bits (SHRX) index a page that can be read if they are right, among reserved
//! address space that faults if they are not ([`CHECKS`]). Nothing that does so touches EFLAGS, and nothing waits for what is
//! read. So whatever a guest comes up with, the host
//! address lies in a window, in memory around it that nobody else has, or the host faults; then
//! the guest's page tables say what comes of it. How an address was checked holds for what lies up to [`REACH`] from it.
//!
//! There are two kinds. [`HIGH`] is for the upper half of the user's addresses: libraries, stacks, what is mapped, and
//! position-independent programs. [`LOW`] is for the first 16 TiB: other programs and their heaps. A window consists of the units
//! that the guest uses, at a place of the vCPU's own; [`places`] has where they lie on the host.
//!
//! One guest address space at a time has windows of a vCPU. What is mapped is what a processor's TLB may hold:
//! entries of the guest's page tables that were accessed (dirty, if they can be written). A flush compares the
//! page tables with copies of what was mapped from, and unmaps what has changed.
#![expect(unsafe_code, reason = "maps guest RAM where emitted code looks for it")]

use crate::layout::VcpuMem;
use crate::ram_files::Files;
use crate::signal;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use x86emu::env::RamRange;
use x86emu::paging::entry::{ADDR, P, US};

mod places;
mod table;

pub use places::REACH;
use places::{NOTHING, Places, UNIT, Units, bit as unit_bit, each, kind_of, start_of, unit_of};
use table::{REGION, Table, bit, put, read};

/// The window for linear addresses from 0x3f80_0000_0000 on.
pub const HIGH: usize = 0;
/// The window for linear addresses below 0x1080_0000_0000.
pub const LOW: usize = 1;
/// Whichever of the two an address lies in: its check gives the place.
pub const EITHER: usize = 2;

/// By how much the check of an address shifts it. The low bits of a window's place too, as SHRX takes its count from a
/// register.
pub const SHIFT: u64 = 31;
/// Bytes that the checks of one unit index, 8 for each address.
const PAGE: usize = 4096;
const RW: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
/// Offset in [`VcpuMem`]'s mapping of the page for unit 0, by kind. What one kind has there beyond the user's addresses
/// overlaps the next one's: non-canonical addresses, which pass, but lead to such on the host. The words of [`EITHER`] are
/// places, the others nobody looks at.
const CHECK_PAGES: [usize; 3] = [48 << 20, (48 << 20) + (1 << 29), (48 << 20) + (1 << 30)];
/// Offset of what shifted addresses index, 8 bytes each: units start in the middle of a TiB.
pub const CHECKS: [i32; 3] = [
    (CHECK_PAGES[HIGH] + PAGE / 2) as i32,
    (CHECK_PAGES[LOW] + PAGE / 2) as i32,
    (CHECK_PAGES[EITHER] + PAGE / 2) as i32,
];
/// The size of [`VcpuMem`] with all of that.
pub const WITH_CHECKS: usize = CHECK_PAGES[EITHER] + PAGE + (8 << (64 - SHIFT));
const _: () = assert!(size_of::<VcpuMem>() <= CHECK_PAGES[HIGH]);
const _: () = assert!(8 << (40 - SHIFT) == PAGE);

/// Page tables that are mapped from at most, of 2 MiB each.
const MAX_TABLES: usize = 1024;
/// Mappings made in all windows since they were dropped after which they are: Linux allows a process 65,530.
const MAX_RUNS: usize = 24_000;
/// Runs of pages that one fault maps at most.
const RUNS_PER_FAULT: usize = 16;

/// Those mappings, and how many vCPUs have windows.
static RUNS: AtomicUsize = AtomicUsize::new(0);
static OWNERS: AtomicUsize = AtomicUsize::new(0);

/// An address that a check has found wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FailedCheck {
    /// The window that it was checked for.
    pub kind: usize,
    /// An address near, within 2 GiB, as far as it is known.
    pub near: u64,
}

impl FailedCheck {
    /// What a read `at` bytes into the vCPU's mapping, which faulted, has checked.
    pub fn at(at: u64) -> Option<FailedCheck> {
        let of = |kind: usize| {
            let index = at.wrapping_sub(CHECKS[kind] as u64) >> 3;
            (index < 1 << (64 - SHIFT)).then_some(FailedCheck {
                kind,
                near: index << SHIFT,
            })
        };
        // Only non-canonical addresses of one kind look like the next one's.
        [EITHER, LOW, HIGH].into_iter().find_map(of)
    }

    /// The window that the address may be in.
    pub fn belongs(self) -> Option<usize> {
        kind_of(unit_of(self.near))
    }

    /// It may be in the window that it was checked for.
    pub fn as_expected(self) -> bool {
        self.belongs()
            .is_some_and(|kind| [kind, EITHER].contains(&self.kind))
    }
}

/// Whether PEXT, with which [`crate::far`] looks for targets, is one fast instruction on this host: it is microcode on AMD's before Zen 3.
fn pext_is_fast() -> bool {
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

/// Why an access cannot be mapped.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Refusal {
    /// It lies in no window.
    Outside,
    /// The page tables forbid it, or have nothing there.
    Guest,
    /// It is not memory that can be mapped so.
    Memory,
    /// Its place on the host is another vCPU's: windows have to move.
    Crowded,
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
    /// The vCPU's memory, with the pages of checks; 0: it has none.
    vcpu: u64,
    places: Places,
    /// Units whose check passes.
    open: Units,
    /// CR3 of the address space that has them, bit 0 set; 0: none has.
    owner: u64,
    /// Page tables must be compared before they are used again.
    stale: bool,
    /// Something is mapped below 512 GiB.
    pub low: bool,
    /// RSP was seen outside the high window.
    odd_stack: bool,
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

impl Windows {
    /// The host can have windows at all.
    pub fn possible() -> bool {
        static POSSIBLE: OnceLock<bool> = OnceLock::new();
        *POSSIBLE.get_or_init(|| variable() != Some("0".into()) && pext_is_fast())
    }

    /// Every address space is to have them at once, whatever they cost: for tests.
    pub fn always() -> bool {
        static ALWAYS: OnceLock<bool> = OnceLock::new();
        *ALWAYS.get_or_init(|| variable() == Some("always".into()))
    }

    /// Windows of a vCPU whose memory, with pages for checks, is at `vcpu`.
    pub fn new(vcpu: u64) -> Windows {
        let mut windows = Windows::default();
        windows.vcpu = vcpu;
        windows
    }

    /// This vCPU cannot have windows now.
    pub fn hopeless(&self) -> bool {
        self.vcpu == 0 || self.unusable
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

    /// Takes the windows for an address space; what emitted code adds to linear addresses, by kind. `None` if there is no room, or
    /// they cannot be had. Whatever was derived from where they were must be forgotten.
    pub fn take(&mut self, memory: &mut dyn Memory, cr3: u64) -> Option<[u64; 2]> {
        if self.vcpu == 0 || !signal::faults_arrive() || !places::reserved() {
            return None;
        }
        if self.owner == 0 {
            OWNERS.fetch_add(1, Ordering::Relaxed);
        }
        self.drop_all();
        self.owner = key(cr3);
        self.places.release();
        self.open();
        if !self.places.take(used_units(memory, cr3)) || !self.open() {
            self.release();
            return None;
        }
        self.odd_stack = false;
        Some([HIGH, LOW].map(|kind| self.place(kind)))
    }

    /// Lets the checks of all units pass that it has, and no others. False if the host is out of memory.
    fn open(&mut self) -> bool {
        for kind in [HIGH, LOW] {
            let want = self.places.units()[kind];
            for unit in each(kind, want ^ self.open[kind]) {
                let opens = want & unit_bit(unit) != 0;
                let done = self.protect(kind, unit, if opens { libc::PROT_READ } else { 0 })
                    && self.protect(EITHER, unit, if opens { RW } else { 0 });
                if !done && opens {
                    return false;
                }
                if !done {
                    out_of_memory();
                }
                self.open[kind] ^= unit_bit(unit);
                if opens {
                    let words = self.check_page(EITHER, unit) as *mut u64;
                    // SAFETY: a page that was made writable just now, which only emitted code of this vCPU reads.
                    let words = unsafe { std::slice::from_raw_parts_mut(words, PAGE / 8) };
                    words.fill(self.place(kind));
                }
            }
        }
        true
    }

    fn check_page(&self, kind: usize, unit: i32) -> usize {
        self.vcpu as usize + CHECK_PAGES[kind] + unit as usize * PAGE
    }

    fn protect(&self, kind: usize, unit: i32, protection: libc::c_int) -> bool {
        let page = self.check_page(kind, unit) as *mut libc::c_void;
        // SAFETY: a page of the vCPU's mapping that nothing but checks of emitted code reads.
        unsafe { libc::mprotect(page, PAGE, protection) == 0 }
    }

    /// What emitted code adds to a linear address, together with the shift.
    fn place(&self, kind: usize) -> u64 {
        self.places.offset(kind).wrapping_add(SHIFT)
    }

    /// Lets checks of addresses near `near` pass, which lie in a unit that was not used before.
    pub fn extend(&mut self, memory: &mut dyn Memory, near: u64) -> Result<(), Refusal> {
        let unit = unit_of(near);
        let kind = kind_of(unit).ok_or(Refusal::Outside)?;
        if self.open[kind] & unit_bit(unit) != 0 {
            return Err(Refusal::Memory);
        }
        if used_units(memory, self.owner)[kind] & unit_bit(unit) == 0 {
            return Err(Refusal::Guest);
        }
        if !self.places.add(unit) || !self.open() {
            return Err(Refusal::Crowded);
        }
        Ok(())
    }

    /// The linear address of a host address.
    pub fn guest_of(&self, host: u64) -> Option<u64> {
        self.places.guest_of(host)
    }

    /// The host address of a page of code, from which what lies near can be accessed. `None`: it is in no window.
    pub fn code_page(&mut self, memory: &mut dyn Memory, gva: u64) -> Option<u64> {
        if !self.places.has(unit_of(gva)) {
            self.extend(memory, gva).ok()?;
        }
        self.places.host_of(gva)
    }

    /// The address space of `cr3` has them.
    pub fn belong_to(&self, cr3: u64) -> bool {
        self.owner == key(cr3)
    }

    /// Their owner is about to run with this stack pointer. True if RSP cannot be relied on to lie in the high window.
    pub fn odd_stack(&mut self, rsp: u64) -> bool {
        let unit = unit_of(rsp);
        self.odd_stack |= kind_of(unit) != Some(HIGH) || !self.places.has(unit);
        self.odd_stack
    }

    /// Gives the windows back.
    pub fn release(&mut self) {
        if self.owner != 0 {
            self.drop_all();
            self.owner = 0;
            self.places.release();
            self.open();
            OWNERS.fetch_sub(1, Ordering::Relaxed);
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
        RUNS.fetch_sub(std::mem::take(&mut self.runs), Ordering::Relaxed);
        self.stale = true;
    }

    /// Takes the right to write guest-physical memory back.
    pub fn unwrite(&mut self, gpa: u64, len: u64) {
        let (mut done, mut runs) = (true, 0);
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
                runs += 1;
                let len = (i - first) * 4096;
                // SAFETY: pages of a window, which only emitted code accesses.
                done &=
                    unsafe { libc::mprotect(t.host(first) as *mut _, len, libc::PROT_READ) } == 0;
            }
        }
        self.count_runs(runs);
        if !done {
            // There are too many mappings to split one.
            self.empty();
        }
    }

    fn count_runs(&mut self, n: usize) {
        self.runs += n;
        RUNS.fetch_add(n, Ordering::Relaxed);
    }

    /// Near the end of a unit only what nobody else can reach may be mapped: takes the neighbour.
    fn extend_near(&mut self, gva: u64) -> Result<(), Refusal> {
        let unit = unit_of(gva);
        let neighbour = match gva.wrapping_sub(start_of(unit)) {
            at if at < REACH as u64 => unit - 1,
            at if at >= UNIT - REACH as u64 => unit + 1,
            _ => return Ok(()),
        };
        if self.places.has(neighbour) && kind_of(neighbour) == kind_of(unit) {
            return Ok(());
        }
        if kind_of(neighbour) != kind_of(unit) || !self.places.add(neighbour) || !self.open() {
            return Err(Refusal::Memory);
        }
        Ok(())
    }

    /// Unmaps everything in all units, which needs no room for more mappings.
    fn empty(&mut self) {
        self.tables.clear();
        RUNS.fetch_sub(std::mem::take(&mut self.runs), Ordering::Relaxed);
        for kind in [HIGH, LOW] {
            for unit in each(kind, self.places.units()[kind]) {
                let at = start_of(unit).wrapping_add(self.places.offset(kind));
                let flags = NOTHING | libc::MAP_FIXED;
                // SAFETY: a unit of a window, which only emitted code accesses.
                let done = unsafe {
                    libc::mmap(at as *mut _, UNIT as usize, libc::PROT_NONE, flags, -1, 0)
                };
                if done == libc::MAP_FAILED {
                    out_of_memory();
                }
            }
        }
    }

    fn unmap(&mut self, at: u64, pages: usize) {
        self.mappings += 1;
        if pages < 512 {
            // What is left on both sides is two mappings now.
            self.count_runs(1);
        }
        let flags = NOTHING | libc::MAP_FIXED;
        // SAFETY: part of a window: only emitted code accesses it, and expects faults.
        let done = unsafe { libc::mmap(at as *mut _, pages * 4096, libc::PROT_NONE, flags, -1, 0) };
        if done == libc::MAP_FAILED {
            // There are too many mappings to split one.
            self.empty();
        }
    }

    /// Maps what an access faulted on, and what lies around it.
    pub fn map(&mut self, memory: &mut dyn Memory, gva: u64, write: bool) -> Result<(), Refusal> {
        if !self.places.has(unit_of(gva)) {
            return Err(Refusal::Outside);
        }
        self.extend_near(gva)?;
        let all = RUNS.load(Ordering::Relaxed);
        let too_many = all > MAX_RUNS && self.runs >= all / OWNERS.load(Ordering::Relaxed).max(1);
        if too_many || self.tables.len() >= MAX_TABLES {
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
        self.count_runs(1);
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
        let host = self.places.host_of(base)?;
        let table = Table::new(memory, self.owner & ADDR, gva, host)?;
        self.tables.push(table);
        Some(self.tables.len() - 1)
    }
}

/// What stays mapped, or passes a check, may belong to another guest process by now.
fn out_of_memory() -> ! {
    log::error!("engine_jit: the host cannot unmap guest memory: out of memory");
    std::process::abort();
}

/// Units that an address space may have something in, as far as page-map level 4 tells.
fn used_units(memory: &mut dyn Memory, cr3: u64) -> Units {
    let mut units = [0; 2];
    let Some(root) = memory.page(cr3 & ADDR) else {
        return units;
    };
    for i in 0..256 {
        // SAFETY: within the page.
        let entry = read(unsafe { root.cast::<AtomicU64>().add(i) });
        let unit = unit_of((i as u64) << 39);
        if entry & (P | US) == P | US
            && let Some(kind) = kind_of(unit)
        {
            units[kind] |= unit_bit(unit);
        }
    }
    units
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
