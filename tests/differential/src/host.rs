//! The executor that runs a case on the host CPU, in a child process.
//!
//! The child maps the guest's RAM at the guest's linear addresses. It lives in its signal handler: a
//! case starts by returning from it with the case's registers in the signal frame, and ends with the
//! signal that the case's exception raises.
#![expect(
    unsafe_code,
    reason = "signal frames, shared memory and a forked child"
)]

use crate::case::{FAILED, Outcome, Regs, Start, TIMEOUT, host_components, normalize};
use crate::layout::*;
use crate::machine::Machine;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use x86emu::state::{XSAVE_SIZE, XsaveArea};

/// What parent and child share.
#[repr(C, align(64))]
struct Shared {
    xsave: [u8; XSAVE_SIZE],
    /// 1: a case is ready; 2: it has ended.
    turn: AtomicU32,
    bits: u32,
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    fs_base: u64,
    gs_base: u64,
    trap: u64,
    error: u64,
    cr2: u64,
    cs: u64,
    signal: u32,
}

const SIGNALS: [i32; 7] = [
    libc::SIGSEGV,
    libc::SIGBUS,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGTRAP,
    libc::SIGUSR1,
    libc::SIGSYS,
];

static SHARED: AtomicU64 = AtomicU64::new(0);
static HOST_FS: AtomicU64 = AtomicU64::new(0);
static GUEST_FS: AtomicU64 = AtomicU64::new(0);

/// The child process.
pub struct Host {
    shared: *mut Shared,
    child: libc::pid_t,
    fd: i32,
}

// SAFETY: the child is driven by whoever holds the value.
unsafe impl Send for Host {}

fn futex(word: &AtomicU32, op: i32, value: u32, timeout_ms: u64) {
    let t = libc::timespec {
        tv_sec: (timeout_ms / 1000) as i64,
        tv_nsec: (timeout_ms % 1000 * 1_000_000) as i64,
    };
    // SAFETY: a futex call on a word that outlives it.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            word.as_ptr(),
            op,
            value,
            &raw const t,
            0,
            0,
        );
    }
}

/// Order of general registers in a signal frame, by our number.
const FRAME: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// Entry of the signal handler: the guest's FS base and AC flag must be gone before Rust runs.
#[unsafe(naked)]
extern "C" fn entry(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    core::arch::naked_asm!(
        "rdfsbase rax",
        "mov [rip + {guest}], rax",
        "mov rax, [rip + {host}]",
        "wrfsbase rax",
        "pushfq",
        // AC, NT and ID would stay for the next case.
        "and dword ptr [rsp], 0xffdbbfff",
        "popfq",
        "cld",
        "sub rsp, 8",
        "call {handler}",
        "add rsp, 8",
        // The guest's again; data segments as the case's mode wants them are loaded by now.
        "mov rax, [rip + {guest}]",
        "wrfsbase rax",
        "ret",
        guest = sym GUEST_FS,
        host = sym HOST_FS,
        handler = sym handler,
    );
}

extern "C" fn handler(sig: i32, _info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let shared = SHARED.load(Ordering::Relaxed) as *mut Shared;
    // SAFETY: the kernel passes a valid context, and `shared` is mapped for the child's life. The
    // parent touches it only when it is its turn.
    unsafe {
        let context = &mut *context.cast::<libc::ucontext_t>();
        let regs = &mut context.uc_mcontext.gregs;
        let frame = context.uc_mcontext.fpregs.cast::<u8>();
        let extended = frame.add(464 + 4).cast::<u32>().read_unaligned() as usize;
        let size = frame.add(464 + 16).cast::<u32>().read_unaligned() as usize;
        let size = if extended == 0 {
            512
        } else {
            size.min(XSAVE_SIZE)
        };
        for (n, &at) in FRAME.iter().enumerate() {
            (*shared).gpr[n] = regs[at as usize] as u64;
        }
        (*shared).rip = regs[libc::REG_RIP as usize] as u64;
        (*shared).rflags = regs[libc::REG_EFL as usize] as u64;
        (*shared).trap = regs[libc::REG_TRAPNO as usize] as u64;
        (*shared).error = regs[libc::REG_ERR as usize] as u64;
        (*shared).cr2 = regs[libc::REG_CR2 as usize] as u64;
        (*shared).cs = regs[libc::REG_CSGSFS as usize] as u64 & 0xffff;
        (*shared).signal = sig as u32;
        (*shared).fs_base = GUEST_FS.load(Ordering::Relaxed);
        let gs: u64;
        core::arch::asm!("rdgsbase {}", out(reg) gs);
        (*shared).gs_base = gs;
        (*shared).xsave = [0; XSAVE_SIZE];
        std::ptr::copy_nonoverlapping(frame, (&raw mut (*shared).xsave).cast(), size);
        (*shared).turn.store(2, Ordering::SeqCst);
        futex(&(*shared).turn, libc::FUTEX_WAKE, 1, 0);
        while (*shared).turn.load(Ordering::SeqCst) != 1 {
            futex(&(*shared).turn, libc::FUTEX_WAIT, 2, 1000);
            if libc::getppid() == 1 {
                libc::_exit(0);
            }
        }
        for (n, &at) in FRAME.iter().enumerate() {
            regs[at as usize] = (*shared).gpr[n] as i64;
        }
        regs[libc::REG_RIP as usize] = (*shared).rip as i64;
        regs[libc::REG_EFL as usize] = (*shared).rflags as i64;
        let long = (*shared).bits == 64;
        let cs = u64::from(if long { CS64 } else { CS32 });
        regs[libc::REG_CSGSFS as usize] = (cs | u64::from(DS) << 48) as i64;
        std::ptr::copy_nonoverlapping((&raw const (*shared).xsave).cast(), frame, 416);
        if size > 576 {
            let from: *const u8 = (&raw const (*shared).xsave).cast();
            std::ptr::copy_nonoverlapping(from.add(512), frame.add(512), size - 512);
        }
        GUEST_FS.store((*shared).fs_base, Ordering::Relaxed);
        let (host_fs, selector) = (
            HOST_FS.load(Ordering::Relaxed),
            u32::from(if long { 0 } else { DS }),
        );
        // Loading a selector replaces the base.
        core::arch::asm!(
            "mov ds, {s:e}", "mov es, {s:e}", "mov fs, {s:e}", "mov gs, {s:e}",
            "wrfsbase {f}", "wrgsbase {g}",
            s = in(reg) selector, f = in(reg) host_fs, g = in(reg) (*shared).gs_base,
        );
    }
}

fn protection(access: Access) -> i32 {
    match access {
        Access::All => libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC,
        Access::Data => libc::PROT_READ | libc::PROT_WRITE,
        Access::ReadOnly => libc::PROT_READ,
        Access::Absent | Access::Supervisor => libc::PROT_NONE,
    }
}

/// What the child does: map, install handlers, enter the first one and never come back.
///
/// # Safety
/// Only in a freshly forked child.
unsafe fn child_main(fd: i32) -> ! {
    // SAFETY: the fixed addresses are free in the child: far below its own mappings.
    unsafe {
        libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
        for region in REGIONS {
            for (n, &access) in region.pages.iter().enumerate() {
                let at = (region.linear + n as u64 * PAGE) as *mut libc::c_void;
                let p = libc::mmap(
                    at,
                    PAGE as usize,
                    protection(access),
                    libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE,
                    fd,
                    (region.gpa + n as u64 * PAGE) as i64,
                );
                if p != at {
                    libc::_exit(2);
                }
                match access {
                    Access::All | Access::Data => {
                        let b = p.cast::<u8>();
                        b.write_volatile(b.read_volatile());
                    }
                    Access::ReadOnly => {
                        p.cast::<u8>().read_volatile();
                    }
                    _ => {}
                }
            }
        }
        let size = 1 << 17;
        let stack = libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        );
        let alt = libc::stack_t {
            ss_sp: stack,
            ss_flags: 0,
            ss_size: size,
        };
        libc::sigaltstack(&alt, std::ptr::null_mut());
        let fs: u64;
        core::arch::asm!("rdfsbase {}", out(reg) fs);
        HOST_FS.store(fs, Ordering::Relaxed);
        for sig in SIGNALS {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = entry as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigfillset(&mut action.sa_mask);
            libc::sigaction(sig, &action, std::ptr::null_mut());
        }
        libc::kill(libc::getpid(), libc::SIGUSR1);
        libc::_exit(3)
    }
}

impl Host {
    /// Starts the child. `None` if the host lets user mode not set FS and GS bases.
    pub fn new(machine: &Machine) -> Option<Self> {
        // SAFETY: reads the auxiliary vector.
        let fsgsbase = unsafe { libc::getauxval(libc::AT_HWCAP2) } & 2 != 0;
        if !fsgsbase {
            return None;
        }
        // SAFETY: a fresh shared mapping, checked.
        let shared = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                size_of::<Shared>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert!(shared != libc::MAP_FAILED);
        let mut host = Host {
            shared: shared.cast(),
            child: 0,
            fd: machine.ram.fd,
        };
        host.spawn();
        Some(host)
    }

    fn spawn(&mut self) {
        // The child finds its shared memory through a static.
        static FORKING: Mutex<()> = Mutex::new(());
        let _guard = FORKING.lock().unwrap_or_else(PoisonError::into_inner);
        SHARED.store(self.shared as u64, Ordering::Relaxed);
        // SAFETY: the child calls only async-signal-safe functions.
        unsafe {
            (*self.shared).turn.store(0, Ordering::SeqCst);
            let pid = libc::fork();
            assert!(pid >= 0, "fork");
            if pid == 0 {
                child_main(self.fd);
            }
            self.child = pid;
        }
        assert!(self.wait(0, 5000), "the native child does not start");
    }

    fn turn(&self) -> &AtomicU32 {
        // SAFETY: the mapping lives as long as `self`.
        unsafe { &(*self.shared).turn }
    }

    /// Waits for the child's turn to end. False: it takes too long, or it has died.
    fn wait(&self, from: u32, ms: u64) -> bool {
        let start = std::time::Instant::now();
        for _ in 0..2000 {
            if self.turn().load(Ordering::SeqCst) == 2 {
                return true;
            }
            std::hint::spin_loop();
        }
        while self.turn().load(Ordering::SeqCst) != 2 {
            futex(self.turn(), libc::FUTEX_WAIT, from, 50);
            // SAFETY: asks for the state of our own child.
            let gone =
                unsafe { libc::waitpid(self.child, std::ptr::null_mut(), libc::WNOHANG) } != 0;
            if gone || start.elapsed().as_millis() as u64 > ms {
                return false;
            }
        }
        true
    }

    fn kill(&mut self) {
        // SAFETY: our own child, which may be gone already.
        unsafe {
            libc::kill(self.child, libc::SIGKILL);
            libc::waitpid(self.child, std::ptr::null_mut(), 0);
        }
    }

    /// Runs a case.
    pub fn run(&mut self, machine: &mut Machine, case: &Start) -> Outcome {
        let regs = &case.regs;
        machine
            .ram
            .bytes(USER, USER_SIZE)
            .copy_from_slice(&case.memory);
        // SAFETY: it is the parent's turn.
        let s = unsafe { &mut *self.shared };
        s.bits = case.bits;
        s.gpr = regs.gpr;
        s.rip = regs.rip;
        s.rflags = regs.rflags;
        s.fs_base = regs.fs_base;
        s.gs_base = regs.gs_base;
        s.xsave = regs.xsave.0;
        s.turn.store(1, Ordering::SeqCst);
        futex(&s.turn, libc::FUTEX_WAKE, 1, 0);
        let mut vector = FAILED;
        if !self.wait(1, 2000) {
            // SAFETY: our own child.
            unsafe { libc::kill(self.child, libc::SIGUSR1) };
            if !self.wait(1, 500) {
                self.kill();
                self.spawn();
            } else {
                vector = TIMEOUT;
            }
        } else if s.signal != libc::SIGUSR1 as u32 {
            vector = s.trap as u32;
        }
        let mut xsave = Box::new(XsaveArea(s.xsave));
        normalize(&mut xsave);
        debug_assert!(host_components() != 0);
        Outcome {
            regs: Regs {
                gpr: s.gpr,
                rip: s.rip,
                rflags: s.rflags,
                fs_base: s.fs_base,
                gs_base: s.gs_base,
                xsave,
            },
            vector,
            error: s.error,
            cr2: if vector == 14 { s.cr2 } else { 0 },
            cs: s.cs as u16,
            memory: machine.ram.bytes(USER, USER_SIZE).to_vec(),
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.kill();
        // SAFETY: mapped by `new`.
        unsafe {
            libc::munmap(self.shared.cast(), size_of::<Shared>());
        }
    }
}
