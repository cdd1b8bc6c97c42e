//! Stacks on which emitted code pairs the guest's calls and returns with the host's.
//!
//! A call of the guest pushes the linear address of its return and calls, on the host: the address
//! behind that call is where the guest's return lands. There the address that the guest returned to is compared
//! with the one that was pushed, so what lies on these stacks decides about speed, never about where the
//! guest goes. But a landing place is code of the context that made the call, at the privilege that it
//! had, for a page that lay where it lay then. So user and supervisor have a stack each, and whatever
//! empties a jump cache empties the stack of that privilege.
//!
//! The stacks are memory of their own, as the stack of a VMM's thread may be small. Signal handlers run on
//! them, in the room below the entries.
#![expect(unsafe_code, reason = "maps the stacks and writes their first entries")]

use kvm_core::engine::EngineError;

/// Bytes of entries of one stack, 16 each.
const ENTRIES: usize = 256 << 10;
/// Room for signal handlers below.
const ROOM: usize = 256 << 10;
/// What lies above the first entry: slots that the search for a return looks at.
const ABOVE: usize = 4096;
const STACK: usize = ROOM + ENTRIES + ABOVE;
const GUARD: usize = 4096;
/// How far below the stack pointer emitted code probes for room.
pub const PROBE: i32 = ROOM as i32;

/// The stacks of one vCPU. Emitted code reads the first three fields.
#[derive(Debug)]
#[repr(C)]
pub struct Shadow {
    /// Where the current stack is; in the host's RSP while translated code runs.
    pub rsp: u64,
    /// The current stack, empty.
    pub base: u64,
    /// Below this there is no room for an entry.
    pub limit: u64,
    /// Where a return on an empty stack goes on.
    pub empty_to: u64,
    /// Its values: for code without windows, and with them.
    empties: [u64; 2],
    /// The current stack is the supervisor's.
    current: usize,
    /// Where the other one is; by index, user first.
    saved: [u64; 2],
    bases: [u64; 2],
    mapping: u64,
}

impl Shadow {
    /// Maps the stacks.
    ///
    /// # Errors
    /// When there is no memory.
    pub fn new() -> Result<Self, EngineError> {
        let size = 2 * (GUARD + STACK);
        // SAFETY: a fresh mapping; the guards are parts of it, and results are checked.
        let at = unsafe {
            let at = libc::mmap(
                std::ptr::null_mut(),
                size,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_STACK,
                -1,
                0,
            );
            if at == libc::MAP_FAILED {
                return Err(EngineError::OutOfMemory);
            }
            // Without huge pages: a few entries should cost a page.
            libc::madvise(at, size, libc::MADV_NOHUGEPAGE);
            for n in 0..2 {
                libc::mprotect(at.byte_add(n * (GUARD + STACK)), GUARD, libc::PROT_NONE);
            }
            at as u64
        };
        let base = |n: usize| at + ((n + 1) * (GUARD + STACK) - ABOVE) as u64;
        let bases = [base(0), base(1)];
        Ok(Shadow {
            rsp: bases[0],
            base: bases[0],
            limit: bases[0] - ENTRIES as u64,
            empty_to: 0,
            empties: [0; 2],
            current: 0,
            saved: bases,
            bases,
            mapping: at,
        })
    }

    /// Says where a return on an empty stack goes, and what that stub goes on to without and with windows. Only
    /// before the vCPU runs.
    pub fn set_empty(&mut self, stub: u64, on: [u64; 2]) {
        self.empties = on;
        self.empty_to = on[0];
        for base in self.bases {
            for i in 0..ABOVE as u64 / 16 {
                // SAFETY: within the mapping; [`ABOVE`] is left above each base.
                unsafe {
                    let p = (base + 16 * i) as *mut u64;
                    p.write(stub);
                    p.add(1).write(u64::MAX);
                }
            }
        }
    }

    /// A host fault at `address` is the probe for room of a full stack, which is empty again then.
    pub fn overflown(&mut self, address: u64) -> bool {
        let guard = self.base + ABOVE as u64 - (GUARD + STACK) as u64;
        let full = address.wrapping_sub(guard) < GUARD as u64;
        if full {
            self.rsp = self.base;
        }
        full
    }

    /// Empties the stack of one privilege.
    pub fn reset(&mut self, user: bool) {
        let n = usize::from(!user);
        self.saved[n] = self.bases[n];
        if n == self.current {
            self.rsp = self.base;
        }
    }

    /// Goes to the stack of a privilege.
    pub fn select(&mut self, user: bool, windows: bool) {
        self.empty_to = self.empties[usize::from(windows)];
        let n = usize::from(!user);
        if n != self.current {
            self.saved[self.current] = self.rsp;
            self.current = n;
            self.rsp = self.saved[n];
            self.base = self.bases[n];
            self.limit = self.base - ENTRIES as u64;
        }
    }
}

impl Drop for Shadow {
    fn drop(&mut self) {
        // SAFETY: made by `new` with this size; the vCPU runs no more.
        unsafe {
            libc::munmap(self.mapping as *mut libc::c_void, 2 * (GUARD + STACK));
        }
    }
}
