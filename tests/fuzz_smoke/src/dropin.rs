//! The drop-in's calls: any ioctl with any argument on any descriptor, from several threads at once, while
//! descriptors come and go, vCPUs run and signals arrive.
//!
//! Only what would destroy the fuzzer itself is held back: addresses that the library writes to, or gives to a guest
//! as memory, are of memory that is there for it, or are bad.
#![expect(
    unsafe_code,
    reason = "descriptors, signals and mappings as a program has them"
)]

use crate::input::Input;
use crate::machine::Memory;
use crate::programs::programs;
use home_user::process;
use kvm_abi::ioctl::*;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, Once, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

/// Bytes of memory for guests.
const MEMORY: u64 = 1 << 20;
/// Bytes of a thread's argument, and where a second structure starts in it.
const ARGUMENT: usize = 64 << 10;
const SECOND: usize = 32 << 10;
/// Most descriptors at a time.
const MOST: usize = 24;
/// Most calls of a thread.
const CALLS: usize = 250;

const SYSTEM: &[u32] = &[
    KVM_GET_API_VERSION,
    KVM_CREATE_VM,
    KVM_GET_MSR_INDEX_LIST,
    KVM_CHECK_EXTENSION,
    KVM_GET_VCPU_MMAP_SIZE,
    KVM_GET_SUPPORTED_CPUID,
    KVM_GET_EMULATED_CPUID,
    KVM_GET_MSR_FEATURE_INDEX_LIST,
    KVM_X86_GET_MCE_CAP_SUPPORTED,
    KVM_GET_MSRS,
    KVM_HAS_DEVICE_ATTR,
    KVM_GET_DEVICE_ATTR,
];

const VM: &[u32] = &[
    KVM_CREATE_VCPU,
    KVM_CREATE_VCPU,
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_USER_MEMORY_REGION,
    KVM_SET_USER_MEMORY_REGION2,
    KVM_GET_DIRTY_LOG,
    KVM_CLEAR_DIRTY_LOG,
    KVM_SET_NR_MMU_PAGES,
    KVM_GET_NR_MMU_PAGES,
    KVM_SET_TSS_ADDR,
    KVM_SET_IDENTITY_MAP_ADDR,
    KVM_CREATE_IRQCHIP,
    KVM_IRQ_LINE,
    KVM_IRQ_LINE_STATUS,
    KVM_GET_IRQCHIP,
    KVM_SET_IRQCHIP,
    KVM_CREATE_PIT,
    KVM_CREATE_PIT2,
    KVM_GET_PIT,
    KVM_SET_PIT,
    KVM_GET_PIT2,
    KVM_SET_PIT2,
    KVM_REINJECT_CONTROL,
    KVM_SET_GSI_ROUTING,
    KVM_SET_BOOT_CPU_ID,
    KVM_IRQFD,
    KVM_IOEVENTFD,
    KVM_SIGNAL_MSI,
    KVM_SET_CLOCK,
    KVM_GET_CLOCK,
    KVM_CREATE_DEVICE,
    KVM_X86_SET_MSR_FILTER,
    KVM_RESET_DIRTY_RINGS,
    KVM_SET_PMU_EVENT_FILTER,
    KVM_REGISTER_COALESCED_MMIO,
    KVM_UNREGISTER_COALESCED_MMIO,
    KVM_CHECK_EXTENSION,
    KVM_ENABLE_CAP,
    KVM_GET_TSC_KHZ,
    KVM_SET_TSC_KHZ,
    KVM_GET_STATS_FD,
    KVM_HAS_DEVICE_ATTR,
];

const VCPU: &[u32] = &[
    KVM_RUN,
    KVM_RUN,
    KVM_RUN,
    KVM_GET_REGS,
    KVM_SET_REGS,
    KVM_GET_SREGS,
    KVM_SET_SREGS,
    KVM_GET_SREGS2,
    KVM_SET_SREGS2,
    KVM_TRANSLATE,
    KVM_INTERRUPT,
    KVM_GET_MSRS,
    KVM_SET_MSRS,
    KVM_SET_CPUID,
    KVM_SET_SIGNAL_MASK,
    KVM_GET_FPU,
    KVM_SET_FPU,
    KVM_GET_LAPIC,
    KVM_SET_LAPIC,
    KVM_SET_CPUID2,
    KVM_GET_CPUID2,
    KVM_TPR_ACCESS_REPORTING,
    KVM_SET_VAPIC_ADDR,
    KVM_GET_MP_STATE,
    KVM_SET_MP_STATE,
    KVM_NMI,
    KVM_SET_GUEST_DEBUG,
    KVM_X86_SETUP_MCE,
    KVM_X86_SET_MCE,
    KVM_GET_VCPU_EVENTS,
    KVM_SET_VCPU_EVENTS,
    KVM_GET_DEBUGREGS,
    KVM_SET_DEBUGREGS,
    KVM_GET_XSAVE,
    KVM_SET_XSAVE,
    KVM_GET_XSAVE2,
    KVM_GET_XCRS,
    KVM_SET_XCRS,
    KVM_KVMCLOCK_CTRL,
    KVM_PRE_FAULT_MEMORY,
    KVM_SMI,
    KVM_GET_NESTED_STATE,
    KVM_SET_NESTED_STATE,
    KVM_GET_TSC_KHZ,
    KVM_SET_TSC_KHZ,
    KVM_ENABLE_CAP,
    KVM_GET_STATS_FD,
    KVM_SET_DEVICE_ATTR,
    KVM_GET_DEVICE_ATTR,
    KVM_HAS_DEVICE_ATTR,
];

/// What a descriptor was made as.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    System,
    Vm,
    Vcpu,
    Other,
}

/// What the threads of one input share.
struct Shared {
    descriptors: RwLock<Vec<(RawFd, Kind)>>,
    events: Vec<RawFd>,
    memory: Memory,
}

/// The signal that ends runs. Its handler does nothing; that it comes is enough.
const SIGNAL: i32 = libc::SIGUSR1;

extern "C" fn nothing(_: i32) {}

/// Installs the handler, before `/dev/kvm` is opened for the first time: from then on the library stands before it.
fn prepare() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: the structure is whole, the handler of the right type.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = nothing as *const () as usize;
            libc::sigaction(SIGNAL, &action, std::ptr::null_mut());
        }
    });
}

/// One input, in a process that does other things, too.
pub fn run(data: &[u8]) {
    // One at a time, so that what is left can be counted.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    prepare();
    let mut input = Input::new(data);
    let options = input.u8();
    process::set_engine(if options & 7 == 0 {
        home_user::EngineKind::Interp
    } else {
        home_user::EngineKind::Jit
    });
    let memory = Memory::new(MEMORY as usize);
    let all: Vec<_> = programs().collect();
    let program = &all[input.below(all.len())];
    memory.write(0x1000, program);
    let own = input.bytes(usize::from(options >> 3));
    memory.write(0x1000, own);
    for (at, entry) in [(0x2000u64, 0x3007u64), (0x3000, 0x87)] {
        memory.write(at, &entry.to_le_bytes());
    }
    for _ in 0..input.below(4) {
        let page = u64::from(input.u8()) << 12;
        let protection = input.pick(&[libc::PROT_NONE, libc::PROT_READ]);
        // SAFETY: a page of this input's own memory.
        unsafe { libc::mprotect(memory.start().add(page as usize).cast(), 4096, protection) };
    }
    let shared = Shared {
        descriptors: RwLock::default(),
        // SAFETY: makes new descriptors.
        events: (0..3)
            .map(|_| unsafe { libc::eventfd(0, libc::EFD_NONBLOCK | libc::EFD_CLOEXEC) })
            .collect(),
        memory,
    };
    shared.begin();
    let threads = 1 + input.below(3);
    let part = input.rest();
    let parts: Vec<&[u8]> = part.chunks(part.len().div_ceil(threads).max(1)).collect();
    std::thread::scope(|scope| {
        let workers: Vec<_> = parts
            .iter()
            .map(|part| {
                let shared = &shared;
                let id = std::sync::Arc::new(AtomicU64::new(0));
                let over = std::sync::Arc::new(AtomicBool::new(false));
                let (known, done) = (id.clone(), over.clone());
                scope.spawn(move || {
                    // SAFETY: has no preconditions.
                    known.store(unsafe { libc::gettid() } as u64, Ordering::Release);
                    Worker::new(shared).work(part);
                    done.store(true, Ordering::Release);
                });
                (id, over)
            })
            .collect();
        // Signals for everyone until all are done.
        while workers
            .iter()
            .any(|(_, over)| !over.load(Ordering::Acquire))
        {
            std::thread::sleep(Duration::from_micros(500));
            for (id, over) in &workers {
                let id = id.load(Ordering::Acquire);
                if id != 0 && !over.load(Ordering::Acquire) {
                    // SAFETY: sends a signal to a thread of this process, or to none.
                    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), id, SIGNAL) };
                }
            }
        }
    });
    shared.end();
    // Whatever the calls were, nothing is left of them.
    let start = Instant::now();
    loop {
        let left = ours();
        if left.is_empty() {
            break;
        }
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "left behind: {left:?}"
        );
        std::thread::sleep(Duration::from_micros(200));
    }
}

/// Descriptors and mappings of this process that are KVM's.
fn ours() -> Vec<String> {
    const NAMES: [&str; 5] = [
        "anykvm",
        "anykvm-vm",
        "anykvm-vcpu",
        "anykvm-stats",
        "anykvm-coalesced",
    ];
    let is_ours = |target: &str| {
        let name = target.strip_prefix("/memfd:").unwrap_or_default();
        NAMES.contains(&name.strip_suffix(" (deleted)").unwrap_or(name))
    };
    let links = std::fs::read_dir("/proc/self/fd").into_iter().flatten();
    let files = links
        .filter_map(|link| std::fs::read_link(link.ok()?.path()).ok())
        .map(|target| target.to_string_lossy().into_owned());
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap_or_default();
    let maps = maps.lines().filter_map(|line| line.splitn(6, ' ').nth(5));
    files
        .chain(maps.map(|name| name.trim_start().to_owned()))
        .filter(|target| is_ours(target))
        .collect()
}

impl Shared {
    fn read(&self) -> RwLockReadGuard<'_, Vec<(RawFd, Kind)>> {
        self.descriptors
            .read()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Vec<(RawFd, Kind)>> {
        self.descriptors
            .write()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// A VM with a vCPU, to begin with.
    fn begin(&self) {
        let Ok(system) = process::open(true) else {
            return;
        };
        self.write().push((system, Kind::System));
        let Some(Ok(vm)) = process::ioctl(system, KVM_CREATE_VM, 0) else {
            return;
        };
        self.write().push((vm as RawFd, Kind::Vm));
        let region = [0u64, 0, MEMORY, self.memory.start() as u64];
        let arg = region.as_ptr() as u64;
        let _ = process::ioctl(vm as RawFd, KVM_SET_USER_MEMORY_REGION, arg);
    }

    /// Closes everything.
    fn end(&self) {
        for (fd, _) in std::mem::take(&mut *self.write()) {
            close(fd);
        }
        for &fd in &self.events {
            // SAFETY: made by `run`, closed once.
            unsafe { libc::close(fd) };
        }
    }

    fn add(&self, fd: RawFd, kind: Kind) {
        let mut all = self.write();
        if all.len() < MOST {
            all.push((fd, kind));
        } else {
            close(fd);
        }
    }
}

/// Closes a descriptor as a stand-in for close does.
fn close(fd: RawFd) {
    let ours = process::closing(fd, fd);
    // SAFETY: the caller owns the descriptor.
    unsafe { libc::close(fd) };
    process::closed(fd, fd, ours);
}

struct Worker<'a> {
    shared: &'a Shared,
    argument: Memory,
    maps: Vec<*mut u8>,
}

/// Bytes of a vCPU that are mapped.
const MAPPED: usize = 3 * 4096;

impl<'a> Worker<'a> {
    fn new(shared: &'a Shared) -> Self {
        let argument = Memory::new(ARGUMENT + 4096);
        // SAFETY: the last page of this thread's own memory.
        unsafe {
            let end = argument.start().add(ARGUMENT);
            libc::mprotect(end.cast(), 4096, libc::PROT_NONE);
        }
        Worker {
            shared,
            argument,
            maps: Vec::new(),
        }
    }

    fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: this thread's own memory, which nobody else refers to.
        unsafe { std::slice::from_raw_parts_mut(self.argument.start(), ARGUMENT) }
    }

    fn work(mut self, data: &[u8]) {
        let mut input = Input::new(data);
        for _ in 0..CALLS {
            if input.is_empty() {
                break;
            }
            match input.below(16) {
                0 => self.close_one(&mut input),
                1 => self.duplicate(&mut input),
                2 => self.map(&mut input),
                3 => self.scribble(&mut input),
                4 => self.set_up(&mut input),
                5 => {
                    if let Ok(fd) = process::open(input.flag()) {
                        self.shared.add(fd, Kind::System);
                    }
                }
                _ => self.call(&mut input),
            }
        }
        for map in self.maps.drain(..) {
            // SAFETY: mapped by `map`.
            unsafe { libc::munmap(map.cast(), MAPPED) };
        }
    }

    fn pick(&self, input: &mut Input<'_>) -> Option<(RawFd, Kind)> {
        let all = self.shared.read();
        let n = input.below(all.len());
        all.get(n).copied()
    }

    fn pick_kind(&self, kind: Kind, input: &mut Input<'_>) -> Option<RawFd> {
        let all = self.shared.read();
        let of_kind: Vec<_> = all.iter().filter(|(_, k)| *k == kind).collect();
        let n = input.below(of_kind.len());
        of_kind.get(n).map(|(fd, _)| *fd)
    }

    fn close_one(&self, input: &mut Input<'_>) {
        let mut all = self.shared.write();
        let n = input.below(all.len());
        if n < all.len() {
            let (fd, _) = all.swap_remove(n);
            close(fd);
        }
    }

    fn duplicate(&self, input: &mut Input<'_>) {
        // As long as the list is locked, nobody closes what is duplicated.
        let copy = {
            let all = self.shared.read();
            let n = input.below(all.len());
            let Some(&(fd, kind)) = all.get(n) else {
                return;
            };
            // SAFETY: duplicates a descriptor of ours.
            (unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 0) }, kind)
        };
        if copy.0 >= 0 {
            self.shared.add(copy.0, copy.1);
        }
    }

    fn map(&mut self, input: &mut Input<'_>) {
        let all = self.shared.read();
        let vcpus: Vec<_> = all.iter().filter(|(_, k)| *k == Kind::Vcpu).collect();
        let n = input.below(vcpus.len());
        let Some(&&(fd, _)) = vcpus.get(n) else {
            return;
        };
        if self.maps.len() >= 4 || !process::may_map(fd, MAPPED, 3, libc::MAP_SHARED, 0) {
            return;
        }
        // SAFETY: a new mapping.
        let p = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(
                std::ptr::null_mut(),
                MAPPED,
                protection,
                libc::MAP_SHARED,
                fd,
                0,
            )
        };
        if p != libc::MAP_FAILED {
            process::mapped(fd, p as usize, MAPPED, 0);
            self.maps.push(p.cast());
        }
    }

    /// Writes into a vCPU's mapping, also while it runs.
    fn scribble(&self, input: &mut Input<'_>) {
        let n = input.below(self.maps.len());
        let Some(&map) = self.maps.get(n) else { return };
        let at = match input.below(3) {
            0 => input.below(32),
            1 => usize::from(input.u16()) % 1024,
            _ => usize::from(input.u16()) % MAPPED,
        };
        // SAFETY: inside of the mapping, which is as long as the file at least.
        unsafe { map.add(at).write_volatile(input.u8()) };
    }

    /// Makes a vCPU one that has something to run.
    fn set_up(&mut self, input: &mut Input<'_>) {
        let Some(fd) = self.pick_kind(Kind::Vcpu, input) else {
            return;
        };
        let arg = self.argument.start() as u64;
        if !matches!(process::ioctl(fd, KVM_GET_SREGS, arg), Some(Ok(_))) {
            return;
        }
        // SAFETY: KVM_GET_SREGS has filled it; any bytes are a value.
        let mut s: kvm_bindings::kvm_sregs = unsafe {
            self.argument
                .start()
                .cast::<kvm_bindings::kvm_sregs>()
                .read()
        };
        (s.cs.base, s.cs.selector) = (0, 0);
        if input.flag() {
            (s.cr0, s.cr3, s.cr4, s.efer) = (0x8005_0033, 0x2000, 0x620, 0xd01);
            for segment in [&mut s.cs, &mut s.ss, &mut s.ds, &mut s.es] {
                (segment.base, segment.limit, segment.g) = (0, u32::MAX, 1);
                (segment.type_, segment.s, segment.present, segment.db) = (3, 1, 1, 1);
                segment.selector = 0x10;
            }
            (s.cs.type_, s.cs.l, s.cs.db, s.cs.selector) = (11, 1, 0, 8);
        }
        // SAFETY: this thread's own memory.
        unsafe {
            self.argument
                .start()
                .cast::<kvm_bindings::kvm_sregs>()
                .write(s)
        };
        let _ = process::ioctl(fd, KVM_SET_SREGS, arg);
        let regs = kvm_bindings::kvm_regs {
            rip: 0x1000,
            rsp: 0x8000,
            rflags: 2,
            rcx: input.value(),
            rdx: input.value(),
            ..Default::default()
        };
        let _ = process::ioctl(fd, KVM_SET_REGS, (&raw const regs) as u64);
    }

    fn call(&mut self, input: &mut Input<'_>) {
        let Some((fd, kind)) = self.pick(input) else {
            return;
        };
        let all = match (input.below(12), kind) {
            (0, _) | (_, Kind::Other) => [SYSTEM, VM, VCPU][input.below(3)],
            (_, Kind::System) => SYSTEM,
            (_, Kind::Vm) => VM,
            (_, Kind::Vcpu) => VCPU,
        };
        let mut cmd = input.pick(all);
        if input.u8() == 0xff {
            cmd ^= 1 << (input.u8() & 31);
        }
        let arg = self.argument(cmd, input);
        let Some(Ok(value)) = process::ioctl(fd, cmd, arg) else {
            return;
        };
        match cmd {
            KVM_CREATE_VM => self.shared.add(value as RawFd, Kind::Vm),
            KVM_CREATE_VCPU => self.shared.add(value as RawFd, Kind::Vcpu),
            KVM_GET_STATS_FD => self.shared.add(value as RawFd, Kind::Other),
            KVM_CREATE_DEVICE if arg == self.argument.start() as u64 => {
                let words = self.words();
                // Type, descriptor, flags: KVM_CREATE_DEVICE_TEST makes none.
                if words[2] & 1 == 0 {
                    self.shared.add(words[1] as RawFd, Kind::Other);
                }
            }
            _ => {}
        }
    }

    fn words(&mut self) -> [u32; 8] {
        let mut words = [0; 8];
        for (word, bytes) in words.iter_mut().zip(self.bytes().chunks_exact(4)) {
            *word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        words
    }

    fn put<const N: usize>(&mut self, at: usize, bytes: [u8; N]) {
        self.bytes()[at..at + N].copy_from_slice(&bytes);
    }

    fn get_u64(&mut self, at: usize) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.bytes()[at..at + 8]);
        u64::from_le_bytes(word)
    }

    /// The argument of a call; its structure, if it has one, is in this thread's memory.
    fn argument(&mut self, cmd: u32, input: &mut Input<'_>) -> u64 {
        let size = (cmd >> 16 & 0x3fff) as usize;
        let start = self.argument.start() as u64;
        if size == 0 {
            return match cmd {
                KVM_RUN | KVM_CREATE_VM | KVM_GET_STATS_FD if input.u8() < 0xf0 => 0,
                KVM_CREATE_VCPU => input.below(6) as u64,
                _ => input.value(),
            };
        }
        if input.u8() < 0x10 {
            return self.bad_pointer(input);
        }
        match input.below(6) {
            // What the last call has left, changed or not: its GET, most likely.
            0..3 => {}
            3 => self.bytes()[..size.min(ARGUMENT)].fill(0),
            _ => {
                let new = input.bytes(size.min(64));
                self.bytes()[..size.min(ARGUMENT)].fill(0);
                self.bytes()[..new.len()].copy_from_slice(new);
            }
        }
        let mut bytes = vec![0; size.min(ARGUMENT)];
        bytes.copy_from_slice(&self.bytes()[..size.min(ARGUMENT)]);
        input.disturb(&mut bytes);
        self.bytes()[..bytes.len()].copy_from_slice(&bytes);
        if input.flag() {
            self.plausible(cmd, input);
        }
        self.hold_back(cmd, input);
        start
    }

    fn bad_pointer(&self, input: &mut Input<'_>) -> u64 {
        let end = self.argument.start() as u64 + ARGUMENT as u64;
        match input.below(6) {
            0 => u64::from(input.u16() & 0xfff),
            1 => end - input.below(8) as u64,
            2 => u64::MAX - input.value() % 4096,
            3 => 1 << 63 | input.value(),
            4 => 0x7fff_ffff_f000,
            _ => 0,
        }
    }

    /// Fills what random bytes never get right.
    fn plausible(&mut self, cmd: u32, input: &mut Input<'_>) {
        match cmd {
            KVM_SET_USER_MEMORY_REGION | KVM_SET_USER_MEMORY_REGION2 => {
                let flags = input.pick(&[0u32, 0, 1, 2, 3, 4]);
                self.put(0, u32::from(input.u8() & 3).to_le_bytes());
                self.put(4, flags.to_le_bytes());
                self.put(8, (u64::from(input.u8()) << 12).to_le_bytes());
                self.put(16, (u64::from(input.u8()) << 12).to_le_bytes());
                self.put(24, (u64::from(input.u8()) << 12).to_le_bytes());
            }
            KVM_GET_MSRS | KVM_SET_MSRS => {
                self.put(0, (input.below(8) as u32).to_le_bytes());
                for n in 0..8 {
                    let index = match input.below(3) {
                        0 => 0x174 + input.u32() % 0x300,
                        1 => 0xc000_0080 + u32::from(input.u8()),
                        _ => 0x4b56_4d00 + u32::from(input.u8() & 15),
                    };
                    self.put(8 + 16 * n, index.to_le_bytes());
                    self.put(16 + 16 * n, input.value().to_le_bytes());
                }
            }
            KVM_GET_CPUID2 | KVM_GET_SUPPORTED_CPUID | KVM_GET_EMULATED_CPUID => {
                self.put(0, input.pick(&[256u32, 80, 40, 1]).to_le_bytes());
            }
            KVM_SET_CPUID | KVM_SET_CPUID2 => {
                self.put(0, input.pick(&[0u32, 1, 10, 40]).to_le_bytes());
            }
            KVM_ENABLE_CAP => {
                self.put(0, u32::from(input.u8()).to_le_bytes());
                self.put(4, [0; 4]);
                self.put(8, input.value().to_le_bytes());
            }
            KVM_SET_GSI_ROUTING => {
                self.put(0, (input.below(12) as u32).to_le_bytes());
                self.put(4, [0; 4]);
                for n in 0..12 {
                    let at = 8 + 48 * n;
                    self.put(at, u32::from(input.u8() & 31).to_le_bytes());
                    self.put(at + 4, (1 + input.below(2) as u32).to_le_bytes());
                    self.put(at + 8, [0; 8]);
                    self.put(at + 16, input.value().to_le_bytes());
                }
            }
            KVM_IRQ_LINE | KVM_IRQ_LINE_STATUS => {
                self.put(0, u32::from(input.u8() & 31).to_le_bytes());
                self.put(4, u32::from(input.u8() & 1).to_le_bytes());
            }
            KVM_SIGNAL_MSI => {
                self.put(
                    0,
                    (0xfee0_0000u32 | u32::from(input.u8()) << 12).to_le_bytes(),
                );
                self.put(4, [0; 4]);
                self.put(8, u32::from(input.u16()).to_le_bytes());
                self.put(12, [0; 20]);
            }
            KVM_IOEVENTFD => {
                self.put(0, input.value().to_le_bytes());
                self.put(8, input.value().to_le_bytes());
                self.put(16, input.pick(&[0u32, 1, 2, 4, 8]).to_le_bytes());
                self.put(24, u32::from(input.u8() & 7).to_le_bytes());
            }
            KVM_IRQFD => {
                self.put(4, u32::from(input.u8() & 31).to_le_bytes());
                self.put(8, u32::from(input.u8() & 3).to_le_bytes());
            }
            KVM_GET_DIRTY_LOG => self.put(0, u32::from(input.u8() & 3).to_le_bytes()),
            KVM_CLEAR_DIRTY_LOG => {
                self.put(0, u32::from(input.u8() & 3).to_le_bytes());
                self.put(4, (u32::from(input.u8() & 7) * 64).to_le_bytes());
                self.put(8, (u64::from(input.u8() & 3) * 64).to_le_bytes());
            }
            KVM_SET_SIGNAL_MASK => self.put(0, 8u32.to_le_bytes()),
            KVM_SET_MP_STATE => self.put(0, (input.below(10) as u32).to_le_bytes()),
            KVM_CREATE_DEVICE => self.put(0, (4 + input.below(2) as u32).to_le_bytes()),
            KVM_INTERRUPT => self.put(0, u32::from(input.u8()).to_le_bytes()),
            _ => {}
        }
    }

    /// Where a structure says what memory or what descriptor to use, it says one that the fuzzer can spare.
    fn hold_back(&mut self, cmd: u32, input: &mut Input<'_>) {
        let second = match input.below(8) {
            0 => self.bad_pointer(input),
            _ => self.argument.start() as u64 + SECOND as u64,
        };
        match cmd {
            KVM_SET_USER_MEMORY_REGION | KVM_SET_USER_MEMORY_REGION2 => {
                let at = self.get_u64(24) % MEMORY;
                let size = self.get_u64(16).min(MEMORY - at);
                let start = self.shared.memory.start() as u64;
                self.put(16, size.to_le_bytes());
                self.put(24, (start + at).to_le_bytes());
            }
            KVM_GET_DIRTY_LOG => self.put(8, second.to_le_bytes()),
            KVM_CLEAR_DIRTY_LOG => self.put(16, second.to_le_bytes()),
            KVM_GET_DEVICE_ATTR | KVM_SET_DEVICE_ATTR | KVM_HAS_DEVICE_ATTR => {
                self.put(16, second.to_le_bytes());
            }
            KVM_SET_SIGNAL_MASK => {
                // What ends runs must come through.
                let mask = self.get_u64(4) & !(1 << (SIGNAL - 1));
                self.put(4, mask.to_le_bytes());
            }
            KVM_IRQFD => {
                for at in [0, 12] {
                    let fd = self.descriptor(input);
                    self.put(at, fd.to_le_bytes());
                }
            }
            KVM_IOEVENTFD => {
                let fd = self.descriptor(input);
                self.put(20, fd.to_le_bytes());
            }
            _ => {}
        }
    }

    /// An eventfd, or something that is none.
    fn descriptor(&self, input: &mut Input<'_>) -> RawFd {
        match input.below(8) {
            0 => -1,
            1 => self.pick(input).map_or(i32::MAX, |(fd, _)| fd),
            n => self.shared.events[n % self.shared.events.len()],
        }
    }
}

/// Random calls.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut random = crate::input::Random(23);
    (0..64)
        .map(|n| {
            let mut seed = vec![n as u8];
            seed.extend(random.bytes(100 + 20 * n));
            // A vCPU, made ready and run.
            for step in [
                [12, 1, 1, 0, 0, 0].as_slice(),
                &[4, 0, 1, 3, 3],
                &[12, 2, 1, 0, 0, 0],
            ] {
                seed.splice(40..40, step.iter().copied());
            }
            seed
        })
        .collect()
}
