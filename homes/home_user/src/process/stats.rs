//! Descriptors that read counters (KVM_GET_STATS_FD).
//!
//! All of an object's are openings of one file, in which its counters live: reading it is reading them.

use super::files;
use super::shared::SharedPages;
use kvm_abi::Errno;
use kvm_core::ioctl::Answer;
use kvm_core::stats::StatsImage;
use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

/// The file of one object, made when it is first asked for.
#[derive(Default)]
pub struct StatsFile(Mutex<Option<OwnedFd>>);

impl StatsFile {
    /// A descriptor that reads `image`, which is always the object's. The object is not running.
    ///
    /// # Errors
    /// EMFILE, ENFILE, ENOMEM.
    pub fn open(&self, image: &StatsImage) -> Answer {
        let mut file = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let file = match &mut *file {
            Some(file) => file,
            place => {
                let file = files::sealed(files::STATS, image.size())?;
                let pages = SharedPages::map(&file, 0, image.size())?;
                image.share(Arc::new(pages))?;
                place.insert(file)
            }
        };
        match files::reopen(file, libc::O_RDONLY) {
            Ok(fd) => Ok(fd.into_raw_fd() as u64),
            // No /proc: then all descriptors share one position.
            Err(Errno::ENOENT) => {
                let fd = file.try_clone().map_err(|_| Errno(libc::EMFILE))?;
                Ok(fd.into_raw_fd() as u64)
            }
            Err(e) => Err(e),
        }
    }
}
