//! The caller's memory: our own process's, at addresses that may be anything.
#![expect(
    unsafe_code,
    reason = "reads and writes where the arguments of ioctls point"
)]

use guestmem::probe;
use kvm_abi::Errno;

/// The end of user space: what lies above is never the caller's.
const LIMIT: u64 = 0x7fff_ffff_f000;

fn check(addr: u64, len: usize) -> Result<(), Errno> {
    match addr.checked_add(len as u64) {
        Some(end) if end <= LIMIT => Ok(()),
        _ => Err(Errno::EFAULT),
    }
}

/// Copies from the caller.
pub(super) fn read(addr: u64, out: &mut [u8]) -> Result<(), Errno> {
    check(addr, out.len())?;
    // SAFETY: `out` is exclusively ours; the other end may fault, and only costs the caller its answer.
    let done = unsafe { probe::try_copy(out.as_mut_ptr(), addr as *const u8, out.len()) };
    if done { Ok(()) } else { Err(Errno::EFAULT) }
}

/// Copies to the caller.
pub(super) fn write(addr: u64, data: &[u8]) -> Result<(), Errno> {
    check(addr, data.len())?;
    // SAFETY: the address is an ioctl's argument: the caller gives the kernel, here us, leave to
    // write there, as it would with /dev/kvm.
    let done = unsafe { probe::try_copy(addr as *mut u8, data.as_ptr(), data.len()) };
    if done { Ok(()) } else { Err(Errno::EFAULT) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bad_addresses_are_efault() {
        crate::native::install();
        let mut b = [0; 8];
        assert_eq!(read(0, &mut b), Err(Errno::EFAULT));
        assert_eq!(read(0x8000_0000_0000_0000, &mut b), Err(Errno::EFAULT));
        assert_eq!(read(u64::MAX - 3, &mut b), Err(Errno::EFAULT));
        assert_eq!(write(0x10, &b), Err(Errno::EFAULT));
        let constant: &'static [u8; 8] = b"readonly";
        assert_eq!(write(constant.as_ptr() as u64, &b), Err(Errno::EFAULT));
        assert_eq!(read(constant.as_ptr() as u64, &mut b), Ok(()));
        assert_eq!(&b, constant);
    }
}
