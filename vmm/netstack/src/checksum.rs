//! The Internet checksum (RFC 1071), shaped so that the compiler vectorises it.

use std::net::Ipv4Addr;

/// Sums `data` as big-endian 16-bit words in ones-complement arithmetic, odd lengths padded with zero.
pub(crate) fn sum(data: &[u8]) -> u16 {
    // Summing in native order and swapping once at the end gives the same result (RFC 1071, byte order independence).
    let mut words = data.chunks_exact(4);
    let mut acc: u64 = 0;
    for word in &mut words {
        acc += u64::from(u32::from_ne_bytes([word[0], word[1], word[2], word[3]]));
    }
    let rest = words.remainder();
    let mut last = [0u8; 4];
    last[..rest.len()].copy_from_slice(rest);
    acc += u64::from(u32::from_ne_bytes(last));
    u16::from_be(fold(acc))
}

/// Adds ones-complement sums.
pub(crate) fn combine(sums: &[u16]) -> u16 {
    fold(sums.iter().map(|&s| u64::from(s)).sum())
}

/// Sum of the IPv4 pseudo header that TCP and UDP cover.
pub(crate) fn pseudo_header(src: Ipv4Addr, dst: Ipv4Addr, protocol: u8, len: usize) -> u16 {
    // An IPv4 payload is below 64 KiB, so its length fits in one word.
    combine(&[
        sum(&src.octets()),
        sum(&dst.octets()),
        u16::from(protocol),
        len as u16,
    ])
}

fn fold(mut acc: u64) -> u16 {
    while acc > 0xffff {
        acc = (acc & 0xffff) + (acc >> 16);
    }
    acc as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn matches_the_rfc_1071_example() {
        assert_eq!(
            sum(&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]),
            0xddf2
        );
    }

    #[test]
    fn odd_lengths_are_padded_with_zero() {
        assert_eq!(sum(&[0x12, 0x34, 0x56]), combine(&[0x1234, 0x5600]));
        assert_eq!(sum(&[]), 0);
    }
}
