//! Memory accesses at linear addresses: page crossing, RAM, MMIO.
#![expect(unsafe_code, reason = "guest RAM is reached through host pointers")]

use core::ptr;
use core::sync::atomic::{AtomicU8, Ordering};

use crate::env::{Env, Exit, Stop};
use crate::paging::Access;
use crate::state::CpuState;

/// The most pages one access touches: the largest operand is an XSAVE area of less than a page.
const MAX_PAGES: usize = 3;
/// The most bytes one MMIO access carries.
const MMIO_CHUNK: usize = 64;

#[repr(C, packed)]
struct Unaligned<T>(T);

/// One volatile load of `T` at any alignment; x86 makes it a single access.
///
/// # Safety
/// `src` must be valid for reads of `size_of::<T>()` bytes.
#[inline(always)]
unsafe fn load<T: Copy>(src: *const u8) -> T {
    // SAFETY: the caller's promise; `Unaligned` has alignment 1.
    unsafe { ptr::read_volatile(src.cast::<Unaligned<T>>()) }.0
}

/// One volatile store of `T` at any alignment.
///
/// # Safety
/// `dst` must be valid for writes of `size_of::<T>()` bytes.
#[inline(always)]
unsafe fn store<T: Copy>(dst: *mut u8, value: T) {
    // SAFETY: the caller's promise; `Unaligned` has alignment 1.
    unsafe { ptr::write_volatile(dst.cast::<Unaligned<T>>(), Unaligned(value)) }
}

/// Copies out of guest RAM; operands of 1, 2, 4 and 8 bytes by one access.
#[inline]
fn copy_in(src: *const u8, data: &mut [u8]) {
    let mut at = 0;
    // SAFETY (all blocks below): `host_ptr` vouched for `data.len()` bytes at `src`, and every
    // access lies within them.
    while data.len() - at >= 8 {
        // SAFETY: see above.
        let value: u64 = unsafe { load(src.add(at)) };
        data[at..at + 8].copy_from_slice(&value.to_le_bytes());
        at += 8;
    }
    if data.len() - at >= 4 {
        // SAFETY: see above.
        let value: u32 = unsafe { load(src.add(at)) };
        data[at..at + 4].copy_from_slice(&value.to_le_bytes());
        at += 4;
    }
    if data.len() - at >= 2 {
        // SAFETY: see above.
        let value: u16 = unsafe { load(src.add(at)) };
        data[at..at + 2].copy_from_slice(&value.to_le_bytes());
        at += 2;
    }
    if data.len() > at {
        // SAFETY: see above.
        data[at] = unsafe { load(src.add(at)) };
    }
}

/// Copies into guest RAM; operands of 1, 2, 4 and 8 bytes by one access.
#[inline]
fn copy_out(dst: *mut u8, data: &[u8]) {
    let mut rest = data;
    let mut at = 0;
    // SAFETY (all blocks below): `host_ptr` vouched for `data.len()` writable bytes at `dst`, and
    // every access lies within them.
    while let Some((head, tail)) = rest.split_first_chunk::<8>() {
        // SAFETY: see above.
        unsafe { store(dst.add(at), u64::from_le_bytes(*head)) };
        (rest, at) = (tail, at + 8);
    }
    if let Some((head, tail)) = rest.split_first_chunk::<4>() {
        // SAFETY: see above.
        unsafe { store(dst.add(at), u32::from_le_bytes(*head)) };
        (rest, at) = (tail, at + 4);
    }
    if let Some((head, tail)) = rest.split_first_chunk::<2>() {
        // SAFETY: see above.
        unsafe { store(dst.add(at), u16::from_le_bytes(*head)) };
        (rest, at) = (tail, at + 2);
    }
    if let Some(&byte) = rest.first() {
        // SAFETY: see above.
        unsafe { store(dst.add(at), byte) };
    }
}

/// Reads guest-physical bytes of one page: RAM, or MMIO through the environment.
#[inline]
pub fn read_physical<E: Env + ?Sized>(env: &mut E, gpa: u64, data: &mut [u8]) -> Result<(), Stop> {
    if let Some(src) = env.host_ptr(gpa, data.len(), false) {
        copy_in(src, data);
        return Ok(());
    }
    let mut at = gpa;
    for chunk in data.chunks_mut(MMIO_CHUNK) {
        env.mmio_read(at, chunk)?;
        at += MMIO_CHUNK as u64;
    }
    Ok(())
}

/// Writes guest-physical bytes of one page: RAM, or MMIO through the environment.
#[inline]
pub fn write_physical<E: Env + ?Sized>(env: &mut E, gpa: u64, data: &[u8]) -> Result<(), Stop> {
    if let Some(dst) = env.host_ptr(gpa, data.len(), true) {
        copy_out(dst, data);
        return Ok(());
    }
    let mut at = gpa;
    for chunk in data.chunks(MMIO_CHUNK) {
        env.mmio_write(at, chunk)?;
        at += MMIO_CHUNK as u64;
    }
    Ok(())
}

/// Bytes of an access at `gva` that lie in its first page.
#[inline]
fn in_first_page(gva: u64, len: usize) -> usize {
    len.min(4096 - (gva as usize & 0xfff))
}

/// Outside long mode linear addresses wrap at 4 GiB.
#[inline]
fn wrap(cpu: &CpuState, gva: u64) -> u64 {
    if cpu.long_mode() {
        gva
    } else {
        gva & 0xffff_ffff
    }
}

/// Translates every page of an access before any is touched.
fn translate_pages<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    gva: u64,
    len: usize,
    access: Access,
) -> Result<[u64; MAX_PAGES], Stop> {
    let mut pages = [0; MAX_PAGES];
    let mut at = gva;
    let mut left = len;
    for page in &mut pages {
        if left == 0 {
            break;
        }
        *page = env.translate(cpu, wrap(cpu, at), access)?.gpa;
        let part = in_first_page(at, left);
        at = at.wrapping_add(part as u64);
        left -= part;
    }
    if left > 0 {
        return Err(Stop::Exit(Exit::InternalError));
    }
    Ok(pages)
}

/// Reads `data.len()` bytes (at most two pages' worth) at a linear address.
#[inline]
pub fn read_linear<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    gva: u64,
    data: &mut [u8],
    access: Access,
) -> Result<(), Stop> {
    let first = in_first_page(gva, data.len());
    if first == data.len() {
        let gpa = env.translate(cpu, gva, access)?.gpa;
        return read_physical(env, gpa, data);
    }
    let pages = translate_pages(cpu, env, gva, data.len(), access)?;
    let mut rest = data;
    let mut part = first;
    for gpa in pages {
        let (head, tail) = rest.split_at_mut(part);
        if head.is_empty() {
            break;
        }
        read_physical(env, gpa, head)?;
        part = tail.len().min(4096);
        rest = tail;
    }
    Ok(())
}

/// Writes `data` (at most two pages' worth) at a linear address; no byte is written when any page
/// faults.
#[inline]
pub fn write_linear<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    gva: u64,
    data: &[u8],
    access: Access,
) -> Result<(), Stop> {
    let first = in_first_page(gva, data.len());
    if first == data.len() {
        let gpa = env.translate(cpu, gva, access)?.gpa;
        return write_physical(env, gpa, data);
    }
    let pages = translate_pages(cpu, env, gva, data.len(), access)?;
    let mut rest = data;
    let mut part = first;
    for gpa in pages {
        let (head, tail) = rest.split_at(part);
        if head.is_empty() {
            break;
        }
        write_physical(env, gpa, head)?;
        part = tail.len().min(4096);
        rest = tail;
    }
    Ok(())
}

/// Reads a little-endian integer of `size` (1-8) bytes, zero-extended.
#[inline]
pub fn read_int<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    gva: u64,
    size: usize,
    access: Access,
) -> Result<u64, Stop> {
    let mut bytes = [0; 8];
    read_linear(cpu, env, gva, &mut bytes[..size.min(8)], access)?;
    Ok(u64::from_le_bytes(bytes))
}

/// Writes the low `size` (1-8) bytes of `value`.
#[inline]
pub fn write_int<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    gva: u64,
    value: u64,
    size: usize,
    access: Access,
) -> Result<(), Stop> {
    write_linear(cpu, env, gva, &value.to_le_bytes()[..size.min(8)], access)
}

/// Sets and clears bits of one byte of a system structure with a locked access. A structure outside
/// writable RAM stays as it is.
pub fn update_byte<E: Env + ?Sized>(
    cpu: &CpuState,
    env: &mut E,
    gva: u64,
    set: u8,
    clear: u8,
) -> Result<(), Stop> {
    let gpa = env
        .translate(cpu, wrap(cpu, gva), Access::SYSTEM_WRITE)?
        .gpa;
    if let Some(ptr) = env.host_ptr(gpa, 1, true) {
        // SAFETY: host_ptr vouches for this byte, which others access only atomically or by
        // volatile accesses.
        let byte = unsafe { AtomicU8::from_ptr(ptr) };
        if clear != 0 {
            byte.fetch_and(!clear, Ordering::AcqRel);
        }
        if set != 0 {
            byte.fetch_or(set, Ordering::AcqRel);
        }
    }
    Ok(())
}
