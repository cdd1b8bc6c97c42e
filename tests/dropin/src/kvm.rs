//! KVM's ioctls as the kernel's header gives them, and a small VM over them.

use kvm_bindings::{kvm_regs, kvm_run, kvm_sregs, kvm_userspace_memory_region};
use libc::{c_int, c_ulong, c_void};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

const fn nr(direction: u64, number: u64, size: usize) -> u64 {
    direction << 30 | (size as u64) << 16 | 0xae << 8 | number
}
pub const fn io(number: u64) -> u64 {
    nr(0, number, 0)
}
pub const fn iow<T>(number: u64) -> u64 {
    nr(1, number, size_of::<T>())
}
pub const fn ior<T>(number: u64) -> u64 {
    nr(2, number, size_of::<T>())
}
pub const fn iowr<T>(number: u64) -> u64 {
    nr(3, number, size_of::<T>())
}

pub const GET_API_VERSION: u64 = io(0x00);
pub const CREATE_VM: u64 = io(0x01);
pub const CHECK_EXTENSION: u64 = io(0x03);
pub const GET_VCPU_MMAP_SIZE: u64 = io(0x04);
pub const CREATE_VCPU: u64 = io(0x41);
pub const SET_USER_MEMORY_REGION: u64 = iow::<kvm_userspace_memory_region>(0x46);
pub const CREATE_IRQCHIP: u64 = io(0x60);
pub const RUN: u64 = io(0x80);
pub const GET_REGS: u64 = ior::<kvm_regs>(0x81);
pub const SET_REGS: u64 = iow::<kvm_regs>(0x82);
pub const GET_SREGS: u64 = ior::<kvm_sregs>(0x83);
pub const SET_SREGS: u64 = iow::<kvm_sregs>(0x84);
pub const SET_SIGNAL_MASK: u64 = iow::<u32>(0x8b);

pub const EXIT_IO: u32 = 2;
pub const EXIT_HLT: u32 = 5;
pub const EXIT_INTR: u32 = 10;

/// Bytes of guest memory, from guest address 0 on.
pub const MEMORY: usize = 64 << 10;
/// Where the guest's code is.
pub const ENTRY: usize = 0x1000;
/// A word that [`COUNT`] counts in.
pub const COUNTER: usize = 0x2000;

/// Spins for ever.
pub const SPIN: &[u8] = &[0xeb, 0xfe];
/// Counts for ever: inc dword [0x2000]; jmp.
pub const COUNT: &[u8] = &[0x66, 0xff, 0x06, 0x00, 0x20, 0xeb, 0xf9];
/// out 0x10, al; hlt; and again.
pub const OUT_HLT: &[u8] = &[0xe6, 0x10, 0xf4, 0xeb, 0xfb];
/// Counts [0x2000] down to 0, then out 0x10, al: dec dword [0x2000]; jnz; out; hlt.
pub const DOWN_OUT: &[u8] = &[0x66, 0xff, 0x0e, 0x00, 0x20, 0x75, 0xf9, 0xe6, 0x10, 0xf4];

/// ioctl(2): its result, or the error number negated.
pub fn ioctl(fd: c_int, request: u64, arg: u64) -> c_int {
    // SAFETY: the cases give arguments that outlive the call, or bad ones on purpose.
    let result = unsafe { libc::ioctl(fd, request as c_ulong, arg as *mut c_void) };
    if result < 0 { -errno() } else { result }
}

/// The thread's error number.
pub fn errno() -> c_int {
    // SAFETY: the location is the thread's own.
    unsafe { *libc::__errno_location() }
}

/// ioctl(2) with a structure, which must succeed.
pub fn call<T>(fd: c_int, request: u64, value: &mut T) -> c_int {
    let result = ioctl(fd, request, std::ptr::from_mut(value) as u64);
    assert!(result >= 0, "ioctl {request:#x}: error {}", -result);
    result
}

/// Opens `/dev/kvm`.
pub fn open() -> c_int {
    // SAFETY: the path ends with a zero byte.
    let fd = unsafe { libc::open(c"/dev/kvm".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC) };
    assert!(fd >= 0, "open /dev/kvm: error {}", errno());
    fd
}

/// close(2), which must succeed.
pub fn close(fd: c_int) {
    // SAFETY: closes a descriptor of the case's own.
    assert_eq!(unsafe { libc::close(fd) }, 0, "close: error {}", errno());
}

/// Where the counter of the last VM is that counts, 0 if it is gone.
static COUNTING: AtomicUsize = AtomicUsize::new(0);

/// What the guest has counted to that was made last of those that count.
pub fn progress() -> Option<u32> {
    let at = COUNTING.load(Ordering::SeqCst) as *const u32;
    // SAFETY: in the memory of a VM that is there.
    (!at.is_null()).then(|| unsafe { at.read_volatile() })
}

/// A VM with its memory.
pub struct Vm {
    pub fd: c_int,
    memory: *mut u8,
}

// SAFETY: plain memory that is accessed with volatile reads and writes.
unsafe impl Send for Vm {}
// SAFETY: as above.
unsafe impl Sync for Vm {}

impl Vm {
    /// A VM that has `code` at [`ENTRY`].
    pub fn new(code: &[u8]) -> Self {
        let kvm = open();
        let fd = loop {
            match ioctl(kvm, CREATE_VM, 0) {
                // The kernel gives up when a signal comes.
                result if result == -libc::EINTR => {}
                fd => break fd,
            }
        };
        assert!(fd >= 0, "KVM_CREATE_VM: error {}", -fd);
        close(kvm);
        let memory = map_anonymous(MEMORY);
        // SAFETY: just mapped, and large enough.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), memory.add(ENTRY), code.len()) };
        let vm = Vm { fd, memory };
        let mut region = kvm_userspace_memory_region {
            memory_size: MEMORY as u64,
            userspace_addr: memory as u64,
            ..Default::default()
        };
        call(fd, SET_USER_MEMORY_REGION, &mut region);
        if [COUNT, DOWN_OUT].contains(&code) {
            COUNTING.store(memory as usize + COUNTER, Ordering::SeqCst);
        }
        vm
    }

    /// A vCPU that starts at [`ENTRY`] in real mode.
    pub fn vcpu(&self, id: u64) -> Vcpu {
        let fd = ioctl(self.fd, CREATE_VCPU, id);
        assert!(fd >= 0, "KVM_CREATE_VCPU: error {}", -fd);
        let vcpu = Vcpu {
            fd,
            run: map_run(fd),
        };
        vcpu.reset();
        vcpu
    }

    /// A counter of the guest's.
    pub fn counter(&self) -> u32 {
        // SAFETY: inside of the memory, and aligned.
        unsafe { self.memory.add(COUNTER).cast::<u32>().read_volatile() }
    }

    /// Sets it.
    pub fn set_counter(&self, value: u32) {
        // SAFETY: inside of the memory, and aligned.
        unsafe { self.memory.add(COUNTER).cast::<u32>().write_volatile(value) };
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        close(self.fd);
        let at = self.memory as usize + COUNTER;
        let _ = COUNTING.compare_exchange(at, 0, Ordering::SeqCst, Ordering::SeqCst);
        // SAFETY: mapped by `new`. vCPUs that are still there do not run any more.
        unsafe { libc::munmap(self.memory.cast(), MEMORY) };
    }
}

/// A vCPU; closed and unmapped by the case.
#[derive(Clone, Copy)]
pub struct Vcpu {
    pub fd: c_int,
    pub run: *mut kvm_run,
}

// SAFETY: a descriptor and a shared mapping, neither of which is bound to a thread.
unsafe impl Send for Vcpu {}

impl Vcpu {
    /// To [`ENTRY`], in real mode.
    pub fn reset(&self) {
        let mut sregs = kvm_sregs::default();
        call(self.fd, GET_SREGS, &mut sregs);
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        call(self.fd, SET_SREGS, &mut sregs);
        let mut regs = kvm_regs {
            rip: ENTRY as u64,
            rsp: 0x8000,
            rflags: 2,
            ..Default::default()
        };
        call(self.fd, SET_REGS, &mut regs);
    }

    /// KVM_RUN: 0, or the error number negated.
    pub fn run(&self) -> c_int {
        ioctl(self.fd, RUN, 0)
    }

    /// `kvm_run::exit_reason`.
    pub fn reason(&self) -> u32 {
        // SAFETY: the mapping is alive.
        unsafe { (&raw const (*self.run).exit_reason).read_volatile() }
    }

    /// Sets `kvm_run::immediate_exit`.
    pub fn set_immediate_exit(&self, value: u8) {
        // SAFETY: the mapping is alive.
        unsafe { (&raw mut (*self.run).immediate_exit).write_volatile(value) };
    }

    /// KVM_GET_REGS.
    pub fn regs(&self) -> kvm_regs {
        let mut regs = kvm_regs::default();
        call(self.fd, GET_REGS, &mut regs);
        regs
    }

    /// The end.
    pub fn close(self) {
        close(self.fd);
        unmap_run(self.run);
    }
}

/// What one page of [`Vcpu::run`] and what follows is called.
pub fn run_size() -> usize {
    static SIZE: AtomicU64 = AtomicU64::new(0);
    if SIZE.load(Ordering::Relaxed) == 0 {
        let kvm = open();
        let size = ioctl(kvm, GET_VCPU_MMAP_SIZE, 0);
        assert!(size >= 4096, "KVM_GET_VCPU_MMAP_SIZE: {size}");
        SIZE.store(size as u64, Ordering::Relaxed);
        close(kvm);
    }
    SIZE.load(Ordering::Relaxed) as usize
}

/// Maps a vCPU's `kvm_run`.
pub fn map_run(fd: c_int) -> *mut kvm_run {
    let size = run_size();
    // SAFETY: a new mapping.
    let p = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            fd,
            0,
        )
    };
    assert!(p != libc::MAP_FAILED, "mmap of a vCPU: error {}", errno());
    p.cast()
}

/// Unmaps it.
pub fn unmap_run(run: *mut kvm_run) {
    // SAFETY: mapped by `map_run`, and not used any more.
    assert_eq!(unsafe { libc::munmap(run.cast(), run_size()) }, 0);
}

/// New memory.
pub fn map_anonymous(size: usize) -> *mut u8 {
    // SAFETY: a new mapping.
    let p = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            size,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    assert!(p != libc::MAP_FAILED, "mmap: error {}", errno());
    p.cast()
}
