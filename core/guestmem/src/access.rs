//! Copies in and out of guest memory.
#![expect(
    unsafe_code,
    reason = "guest memory is reached through raw host pointers"
)]

use core::sync::atomic::{AtomicU8, Ordering};

/// Copies `out.len()` bytes out of guest memory. Aligned 2, 4 and 8 byte copies are single accesses.
///
/// # Safety
/// `from..from + out.len()` must be mapped and readable for the duration of the call.
pub unsafe fn copy_from_guest(from: *const u8, out: &mut [u8]) {
    // SAFETY: the caller vouches for the range; the casts are aligned where they are used, and
    // volatile reads tolerate concurrent writers.
    unsafe {
        match out.len() {
            8 if from.addr().is_multiple_of(8) => {
                out.copy_from_slice(&from.cast::<u64>().read_volatile().to_ne_bytes());
            }
            4 if from.addr().is_multiple_of(4) => {
                out.copy_from_slice(&from.cast::<u32>().read_volatile().to_ne_bytes());
            }
            2 if from.addr().is_multiple_of(2) => {
                out.copy_from_slice(&from.cast::<u16>().read_volatile().to_ne_bytes());
            }
            _ => {
                for (i, byte) in out.iter_mut().enumerate() {
                    *byte = from.add(i).read_volatile();
                }
            }
        }
    }
}

/// Copies `data` into guest memory. Aligned 2, 4 and 8 byte copies are single accesses.
///
/// # Safety
/// `to..to + data.len()` must be mapped and writable for the duration of the call.
pub unsafe fn copy_to_guest(to: *mut u8, data: &[u8]) {
    // SAFETY: as in `copy_from_guest`.
    unsafe {
        match *data {
            [a, b, c, d, e, f, g, h] if to.addr().is_multiple_of(8) => {
                to.cast::<u64>()
                    .write_volatile(u64::from_ne_bytes([a, b, c, d, e, f, g, h]));
            }
            [a, b, c, d] if to.addr().is_multiple_of(4) => {
                to.cast::<u32>()
                    .write_volatile(u32::from_ne_bytes([a, b, c, d]));
            }
            [a, b] if to.addr().is_multiple_of(2) => {
                to.cast::<u16>().write_volatile(u16::from_ne_bytes([a, b]));
            }
            _ => {
                for (i, byte) in data.iter().enumerate() {
                    to.add(i).write_volatile(*byte);
                }
            }
        }
    }
}

/// Replaces a byte of guest memory atomically; the byte that was there.
///
/// # Safety
/// `at` must be mapped and writable for the duration of the call.
pub unsafe fn exchange_guest(at: *mut u8, value: u8) -> u8 {
    // SAFETY: the caller vouches for the byte; a byte is always aligned.
    unsafe { AtomicU8::from_ptr(at) }.swap(value, Ordering::AcqRel)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_at_every_length_and_alignment() {
        #[repr(align(8))]
        struct Buf([u8; 64]);
        for offset in 0..9 {
            for len in 0..20usize {
                let mut buf = Buf([0; 64]);
                let data: std::vec::Vec<u8> = (1..=len as u8).collect();
                let p = buf.0.as_mut_ptr().wrapping_add(offset);
                let mut out = std::vec![0; len];
                // SAFETY: offset + len < 64.
                unsafe {
                    copy_to_guest(p, &data);
                    copy_from_guest(p, &mut out);
                }
                assert_eq!(out, data);
                assert!(buf.0[..offset].iter().all(|&b| b == 0));
                assert!(buf.0[offset + len..].iter().all(|&b| b == 0));
            }
        }
    }
}
