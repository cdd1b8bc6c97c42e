//! `/dev/kvm` for a whole process: descriptors and ioctls, for programs that know nothing of AnyKVM.
//!
//! Every KVM object is behind a real descriptor, of a memfd, so that dup, fork, exec, poll, passing over
//! sockets and the `mmap` of a vCPU are the kernel's business. A descriptor is recognised by its inode.
//! When the last one is closed, or the last mapping of it is gone, inotify says so, and the object goes.
//!
//! Someone has to bring the program's calls here: [`open`] for `/dev/kvm`, [`ioctl`], [`closing`] and [`closed`]
//! around whatever ends a descriptor, [`signals::program_sigaction`].
#![expect(unsafe_code, reason = "descriptors as system calls know them")]

mod files;
mod memory;
mod objects;
pub mod parameters;
mod shared;
pub mod signals;
mod stats;
mod table;

use crate::system::EngineKind;
use kvm_abi::Errno;
use objects::Object;
use std::os::fd::{IntoRawFd, RawFd};
use std::sync::atomic::{AtomicU8, Ordering};

/// The engine of new VMs: 0 the translator, 1 the interpreter.
static ENGINE: AtomicU8 = AtomicU8::new(0);

/// Chooses the engine of VMs made from now on.
pub fn set_engine(engine: EngineKind) {
    ENGINE.store(u8::from(engine == EngineKind::Interp), Ordering::Relaxed);
}

fn engine() -> EngineKind {
    match ENGINE.load(Ordering::Relaxed) {
        0 => EngineKind::Jit,
        _ => EngineKind::Interp,
    }
}

/// Opens `/dev/kvm`.
///
/// # Errors
/// EMFILE, ENFILE, ENOMEM.
pub fn open(close_on_exec: bool) -> Result<RawFd, Errno> {
    signals::activate();
    signals::serve(|| new_system(close_on_exec))
}

fn new_system(close_on_exec: bool) -> Result<RawFd, Errno> {
    let file = files::KvmFile::new(files::SYSTEM, 0)?;
    let fd = table::publish(file, Object::System)?;
    if !close_on_exec {
        files::keep_on_exec(&fd);
    }
    Ok(fd.into_raw_fd())
}

/// An ioctl on `fd`; `None` when it is not a descriptor of ours.
pub fn ioctl(fd: RawFd, cmd: u32, arg: u64) -> Option<Result<u64, Errno>> {
    signals::serve(|| answer(fd, cmd, arg))
}

fn answer(fd: RawFd, cmd: u32, arg: u64) -> Option<Result<u64, Errno>> {
    let object = match table::find(fd) {
        table::Found::Ours(object) => object,
        table::Found::Foreign => return Some(Err(Errno::EIO)),
        table::Found::Nothing => return None,
    };
    let answer = object.ioctl(cmd, arg);
    // KVM_RUN fails in the normal course of things, whenever a signal comes.
    if cmd != kvm_abi::ioctl::KVM_RUN {
        match &answer {
            Ok(value) => log::trace!("ioctl {cmd:#010x} of descriptor {fd}: {value}"),
            Err(e) if log::log_enabled!(log::Level::Debug) => {
                // Of a struct, its first words say most: the capability, the slot, the MSR.
                let mut words = [[0; 4]; 4];
                let _ = memory::read(arg, words.as_flattened_mut());
                let words = words.map(u32::from_ne_bytes);
                log::debug!("ioctl {cmd:#010x} ({arg:#x}: {words:x?}) of descriptor {fd}: {e}");
            }
            Err(_) => {}
        }
    }
    Some(answer)
}

/// What a descriptor is, for fstat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `/dev/kvm`.
    System,
    /// A VM, a vCPU, statistics.
    Other,
}

/// Whether `fd` is one of ours.
pub fn kind(fd: RawFd) -> Option<Kind> {
    let known = || {
        table::known(fd).map(|object| match *object {
            Object::System => Kind::System,
            _ => Kind::Other,
        })
    };
    signals::serve(known)
}

/// Whether this process has or had any descriptor of ours: without one there is nothing to look for.
pub fn in_use() -> bool {
    table::in_use()
}

/// Descriptors `first` to `last` are about to be closed or replaced: what is known of them is forgotten, because
/// their numbers may mean something else before [`closed`] is called. Whether any was ours.
pub fn closing(first: RawFd, last: RawFd) -> bool {
    signals::serve(|| !table::forget(first, last).is_empty())
}

/// Descriptors `first` to `last` have been closed or replaced; if any was `ours`, objects without descriptors go.
pub fn closed(first: RawFd, last: RawFd, ours: bool) {
    signals::serve(|| table::closed(first, last, ours));
}

/// Whether the program may map `len` bytes of `fd` from byte `offset` on, if that is a descriptor of ours.
pub fn may_map(fd: RawFd, len: usize, prot: i32, flags: i32, offset: usize) -> bool {
    signals::serve(|| {
        table::known(fd).is_none_or(|object| object.allows_mapping(len, prot, flags, offset))
    })
}

/// The program has mapped `len` bytes of `fd` at `addr`, from byte `offset` on: a vCPU's mapping shows pages
/// of its VM's, too.
pub fn mapped(fd: RawFd, addr: usize, len: usize, offset: usize) {
    signals::serve(|| {
        if let Some(object) = table::known(fd) {
            object.mapped(addr, len, offset);
        }
    });
}

extern "C" fn before_fork() {
    signals::enter();
    signals::before_fork();
    table::before_fork();
}
extern "C" fn after_fork_parent() {
    table::after_fork(false);
    signals::after_fork();
    signals::leave();
}
extern "C" fn after_fork_child() {
    table::after_fork(true);
    signals::after_fork();
    signals::leave();
}

/// Makes a child of fork know that the VMs are its parent's.
fn watch_forks() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    ONCE.call_once(|| {
        // SAFETY: the functions have the right type. They take locks that are held for short times only, and
        // never by the thread that forks: no handler of the program's runs while a thread holds one.
        unsafe {
            libc::pthread_atfork(
                Some(before_fork),
                Some(after_fork_parent),
                Some(after_fork_child),
            );
        }
    });
}
