//! Descriptors that read counters (KVM_GET_STATS_FD).
//!
//! With KVM each read collects the numbers. Here the kernel reads a memfd by itself, so the numbers are written
//! there when the descriptor is made, and every [`INTERVAL_NS`] as long as it is open.
#![expect(unsafe_code, reason = "writes a file by its descriptor")]

use super::files::{self, KvmFile};
use super::objects::Object;
use super::table;
use crate::host::{UserHost, monotonic_ns};
use kvm_abi::Errno;
use kvm_core::host::{Host, Timer};
use kvm_core::ioctl::Answer;
use kvm_core::stats::StatsImage;
use std::os::fd::{AsRawFd, IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// How old the numbers can be.
const INTERVAL_NS: u64 = 20_000_000;

/// The numbers and where they are written.
struct Sheet {
    image: StatsImage,
    file: OwnedFd,
    bytes: Mutex<Vec<u8>>,
}

impl Sheet {
    fn refresh(&self) {
        let mut bytes = self.bytes.lock().unwrap_or_else(PoisonError::into_inner);
        let n = self.image.read(0, &mut bytes);
        // SAFETY: a live buffer and a descriptor that is ours. What cannot be written stays as it was.
        unsafe { libc::pwrite(self.file.as_raw_fd(), bytes.as_ptr().cast(), n, 0) };
    }
}

/// An open descriptor.
pub struct StatsObject {
    _timer: Arc<OnceLock<Box<dyn Timer>>>,
}

/// Makes a descriptor for `image`.
///
/// # Errors
/// EMFILE, ENOMEM.
pub fn open(host: &UserHost, image: StatsImage) -> Answer {
    let size = image.size();
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(size).map_err(|_| Errno::ENOMEM)?;
    bytes.resize(size, 0);
    let file = KvmFile::new(files::STATS, size)?;
    let sheet = Sheet {
        image,
        file: file.own.try_clone().map_err(|_| Errno(libc::EMFILE))?,
        bytes: Mutex::new(bytes),
    };
    sheet.refresh();
    let timer: Arc<OnceLock<Box<dyn Timer>>> = Arc::default();
    let again = Arc::downgrade(&timer);
    let made = host
        .timer(Box::new(move || {
            sheet.refresh();
            if let Some(timer) = again.upgrade()
                && let Some(timer) = timer.get()
            {
                timer.set(Some(monotonic_ns() + INTERVAL_NS));
            }
        }))
        .ok_or(Errno::ENOMEM)?;
    made.set(Some(monotonic_ns() + INTERVAL_NS));
    // Just made: there is nothing in it.
    let _ = timer.set(made);
    let fd = table::publish(file, Object::Stats(StatsObject { _timer: timer }))?;
    Ok(fd.into_raw_fd() as u64)
}
