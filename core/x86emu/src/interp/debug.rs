//! Breakpoints of the debug registers (Intel SDM, "Debug Registers").

use crate::state::CpuState;

/// DR6.BS: single step.
pub(crate) const DR6_BS: u64 = 1 << 14;

/// Enabled breakpoints: index, DR7's R/W field, length in bytes.
fn enabled(cpu: &CpuState) -> impl Iterator<Item = (usize, u64, u64)> + '_ {
    (0..4).filter_map(|n| {
        if cpu.dr7 >> (2 * n) & 3 == 0 {
            return None;
        }
        let control = cpu.dr7 >> (16 + 4 * n);
        let len = match control >> 2 & 3 {
            0 => 1,
            1 => 2,
            2 => 8,
            _ => 4,
        };
        Some((n, control & 3, len))
    })
}

/// DR6 bits of the instruction breakpoints at a linear address.
#[cold]
pub(crate) fn fetch_hits(cpu: &CpuState, address: u64) -> u64 {
    enabled(cpu)
        .filter(|&(n, kind, _)| kind == 0 && cpu.dr[n] == address)
        .fold(0, |hits, (n, ..)| hits | 1 << n)
}

/// DR6 bits of the data breakpoints that an access touches.
#[cold]
pub(crate) fn data_hits(cpu: &CpuState, address: u64, len: usize, write: bool) -> u64 {
    enabled(cpu)
        .filter(|&(n, kind, size)| {
            let start = cpu.dr[n] & !(size - 1);
            let wanted = kind == 3 || kind == 1 && write;
            wanted
                && (address.wrapping_sub(start) < size || start.wrapping_sub(address) < len as u64)
        })
        .fold(0, |hits, (n, ..)| hits | 1 << n)
}

/// DR6 bits of the I/O breakpoints on a port (CR4.DE must be set).
#[cold]
pub(crate) fn io_hits(cpu: &CpuState, port: u16, len: usize) -> u64 {
    if cpu.cr4 & crate::bits::CR4_DE == 0 {
        return 0;
    }
    enabled(cpu)
        .filter(|&(n, kind, size)| {
            let start = cpu.dr[n] & !(size - 1);
            let port = u64::from(port);
            kind == 2 && (port.wrapping_sub(start) < size || start.wrapping_sub(port) < len as u64)
        })
        .fold(0, |hits, (n, ..)| hits | 1 << n)
}
