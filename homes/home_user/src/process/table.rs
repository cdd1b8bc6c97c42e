//! Which descriptor is which object, and when objects go.
#![expect(unsafe_code, reason = "inotify has no safe wrapper in std")]

use super::files::{self, FileId, KvmFile, id_of};
use super::objects::Object;
use super::signals;
use crate::events::{last_errno, owned};
use kvm_abi::Errno;
use std::cell::RefCell;
use std::collections::HashMap;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

#[derive(Default)]
struct Table {
    by_file: HashMap<FileId, Arc<Object>>,
    /// What has been looked up already.
    by_fd: HashMap<RawFd, Arc<Object>>,
    by_watch: HashMap<i32, FileId>,
    inotify: Option<Arc<OwnedFd>>,
}

static TABLE: RwLock<Option<Table>> = RwLock::new(None);
static IN_USE: AtomicBool = AtomicBool::new(false);

thread_local! {
    /// Held over a fork, so that the child finds the table whole.
    static FORKING: RefCell<Option<RwLockWriteGuard<'static, Option<Table>>>> =
        const { RefCell::new(None) };
}

/// What a descriptor is.
pub enum Found {
    /// An object of this process.
    Ours(Arc<Object>),
    /// A VM or vCPU of another process, the parent perhaps.
    Foreign,
    /// Not a KVM descriptor.
    Nothing,
}

fn read() -> RwLockReadGuard<'static, Option<Table>> {
    TABLE.read().unwrap_or_else(PoisonError::into_inner)
}

fn write() -> RwLockWriteGuard<'static, Option<Table>> {
    TABLE.write().unwrap_or_else(PoisonError::into_inner)
}

/// Whether there ever was a descriptor.
pub fn in_use() -> bool {
    IN_USE.load(Ordering::Acquire)
}

/// The object behind a descriptor, if this process has made it.
pub fn known(fd: RawFd) -> Option<Arc<Object>> {
    if let Some(object) = read().as_ref().and_then(|t| t.by_fd.get(&fd)) {
        return Some(object.clone());
    }
    let id = id_of(fd)?;
    if !read().as_ref()?.by_file.contains_key(&id) {
        return None;
    }
    let mut guard = write();
    let table = guard.as_mut()?;
    let object = table.by_file.get(&id)?.clone();
    // Who closes a descriptor takes the lock afterwards; so what is remembered here is forgotten then.
    if id_of(fd) == Some(id) {
        table.by_fd.insert(fd, object.clone());
    }
    Some(object)
}

/// Looks a descriptor up.
pub fn find(fd: RawFd) -> Found {
    if let Some(object) = known(fd) {
        return Found::Ours(object);
    }
    let Some(id) = id_of(fd) else {
        return Found::Nothing;
    };
    match files::named(fd) {
        // /dev/kvm itself has no state: one that was inherited or received is as good as any.
        Some(name) if name == files::SYSTEM => {
            signals::activate();
            super::watch_forks();
            IN_USE.store(true, Ordering::Release);
            let object = write()
                .get_or_insert_default()
                .by_file
                .entry(id)
                .or_insert_with(|| Arc::new(Object::System))
                .clone();
            Found::Ours(object)
        }
        Some(_) => Found::Foreign,
        None => Found::Nothing,
    }
}

/// Makes an object known by its file; the program's descriptor.
///
/// # Errors
/// ENOMEM.
pub fn publish(file: KvmFile, object: Object) -> Result<OwnedFd, Errno> {
    super::watch_forks();
    IN_USE.store(true, Ordering::Release);
    let KvmFile {
        own,
        given,
        watchable,
        id,
    } = file;
    // From here on the program's opening is the only one, but for mappings.
    drop(own);
    let object = Arc::new(object);
    // What these numbers meant before; dropped after the lock is released.
    let _before;
    let mut guard = write();
    let table = guard.get_or_insert_default();
    if watchable && let Err(e) = table.watch(given.as_raw_fd(), id) {
        log::warn!("no inotify ({e}): a KVM object will live until the process ends");
    }
    _before = (
        table.by_file.insert(id, object.clone()),
        table.by_fd.insert(given.as_raw_fd(), object),
    );
    Ok(given)
}

impl Table {
    fn watch(&mut self, fd: RawFd, id: FileId) -> Result<(), Errno> {
        let inotify = match &self.inotify {
            Some(inotify) => inotify,
            None => {
                let flags = libc::IN_CLOEXEC | libc::IN_NONBLOCK;
                // SAFETY: makes a new descriptor.
                let fd = owned(unsafe { libc::inotify_init1(flags) })?;
                self.inotify.insert(Arc::new(fd))
            }
        };
        let path = format!("/proc/self/fd/{fd}\0");
        // SAFETY: the path ends with a zero byte.
        let watch = unsafe {
            libc::inotify_add_watch(
                inotify.as_raw_fd(),
                path.as_ptr().cast(),
                libc::IN_CLOSE_WRITE | libc::IN_CLOSE_NOWRITE,
            )
        };
        if watch < 0 {
            return Err(last_errno());
        }
        self.by_watch.insert(watch, id);
        Ok(())
    }

    /// Takes the objects whose last descriptor is gone.
    fn take_closed(&mut self) -> Vec<Arc<Object>> {
        let mut gone = Vec::new();
        let Some(inotify) = self.inotify.clone() else {
            return gone;
        };
        let mut buffer = [0u8; 4096];
        loop {
            // SAFETY: the buffer is as long as stated.
            let n = unsafe {
                libc::read(
                    inotify.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                )
            };
            let Ok(n) = usize::try_from(n) else {
                return gone;
            };
            let mut rest = &buffer[..n];
            // An event: watch, mask, cookie, length of the name that follows.
            while let Some((head, tail)) = rest.split_at_checked(16) {
                let word =
                    |i: usize| i32::from_ne_bytes([head[i], head[i + 1], head[i + 2], head[i + 3]]);
                let (watch, name) = (word(0), word(12) as usize);
                rest = tail.get(name..).unwrap_or(&[]);
                if let Some(id) = self.by_watch.remove(&watch)
                    && let Some(object) = self.by_file.remove(&id)
                {
                    // SAFETY: a watch of this inotify; that it may be gone already is no harm.
                    unsafe { libc::inotify_rm_watch(inotify.as_raw_fd(), watch) };
                    self.by_fd.retain(|_, o| !Arc::ptr_eq(o, &object));
                    gone.push(object);
                }
            }
            if n == 0 {
                return gone;
            }
        }
    }
}

/// Forgets what descriptors mean; what they meant.
pub fn forget(first: RawFd, last: RawFd) -> Vec<Arc<Object>> {
    let range = first..=last;
    let hit = |fd: &RawFd| range.contains(fd);
    // Most descriptors are none of ours.
    if !read().as_ref().is_some_and(|t| t.by_fd.keys().any(hit)) {
        return Vec::new();
    }
    match write().as_mut() {
        Some(table) => table
            .by_fd
            .extract_if(|fd, _| hit(fd))
            .map(|(_, object)| object)
            .collect(),
        None => Vec::new(),
    }
}

/// Forgets descriptors that have been closed, and if one was `ours` drops objects that have none left.
pub fn closed(first: RawFd, last: RawFd, ours: bool) {
    let forgotten = forget(first, last);
    if ours || !forgotten.is_empty() {
        drop(forgotten);
        collect();
    }
}

/// Drops objects whose last descriptor or mapping is gone.
pub fn collect() {
    if read().as_ref().is_none_or(|t| t.by_watch.is_empty()) {
        return;
    }
    let gone = write().as_mut().map(Table::take_closed);
    // Outside of the lock: a VM's end takes a while, and may close descriptors.
    drop(gone);
}

/// The descriptor that becomes readable when there is something to [`collect`].
pub fn watcher() -> Option<OwnedFd> {
    let inotify = read().as_ref()?.inotify.clone()?;
    inotify.try_clone().ok()
}

/// Takes the table's lock for the time of a fork.
pub fn before_fork() {
    let guard = write();
    FORKING.set(Some(guard));
}

/// Releases it; the child starts with an empty table.
pub fn after_fork(child: bool) {
    let guard = FORKING.take();
    if let Some(mut guard) = guard
        && child
    {
        // The objects are the parent's: their threads do not exist here, and dropping them would wait for
        // those. Their memory stays, as it does in a child that never looks at them.
        std::mem::forget(guard.take());
    }
}
