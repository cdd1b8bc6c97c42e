//! Guest memory that the host no longer has: KVM_RUN ends with EFAULT, and the process lives on.
#![expect(unsafe_code, reason = "takes memory away from a guest")]

mod machine;

use home_user::Errno;
use iced_x86::code_asm::*;
use machine::{ENTRY, Machine, each, expect_out};

fn protect(m: &Machine, gpa: usize, protection: i32) {
    // SAFETY: a page of the machine's own mapping; only the guest accesses it.
    let result = unsafe { libc::mprotect(m.memory.0.add(gpa).cast(), 4096, protection) };
    assert_eq!(result, 0);
}

const ALL: i32 = libc::PROT_READ | libc::PROT_WRITE;

#[test]
fn an_access_to_lost_memory_is_efault_and_can_be_repeated() {
    each(|engine| {
        for lost in [libc::PROT_NONE, libc::PROT_READ] {
            let m = Machine::new(engine, false);
            m.load(ENTRY, 64, |a| {
                a.mov(rbx, 0x5000u64).unwrap();
                a.mov(dword_ptr(rbx), 1).unwrap();
                a.out(0x10, al).unwrap();
                a.add(dword_ptr(rbx), 7).unwrap();
                a.out(0x11, al).unwrap();
            });
            let mut v = m.vcpu(0);
            m.long_mode(&v);
            expect_out(&mut v, 0x10);
            protect(&m, 0x5000, lost);
            for _ in 0..3 {
                assert_eq!(v.run().unwrap_err(), Errno::EFAULT);
            }
            protect(&m, 0x5000, ALL);
            expect_out(&mut v, 0x11);
            assert_eq!(m.memory.u32(0x5000), 8);
        }
    });
}

#[test]
fn vector_and_string_accesses_too() {
    each(|engine| {
        let m = Machine::new(engine, false);
        m.load(ENTRY, 64, |a| {
            a.mov(rsi, 0x5000u64).unwrap();
            a.mov(rdi, 0x6ff8u64).unwrap();
            a.out(0x10, al).unwrap();
            a.movups(xmm0, xmmword_ptr(rsi)).unwrap();
            a.out(0x11, al).unwrap();
            a.mov(ecx, 2).unwrap();
            a.rep().movsq().unwrap();
            a.out(0x12, al).unwrap();
        });
        let mut v = m.vcpu(0);
        m.long_mode(&v);
        expect_out(&mut v, 0x10);
        protect(&m, 0x5000, libc::PROT_NONE);
        assert_eq!(v.run().unwrap_err(), Errno::EFAULT);
        protect(&m, 0x5000, ALL);
        expect_out(&mut v, 0x11);
        protect(&m, 0x7000, libc::PROT_NONE);
        assert_eq!(v.run().unwrap_err(), Errno::EFAULT);
        assert_eq!(v.get_regs().unwrap().rcx, 1);
        protect(&m, 0x7000, ALL);
        expect_out(&mut v, 0x12);
        assert_eq!(v.get_regs().unwrap().rcx, 0);
    });
}

#[test]
fn lost_code_and_page_tables() {
    each(|engine| {
        let m = Machine::new(engine, false);
        m.load(ENTRY, 64, |a| {
            a.out(0x10, al).unwrap();
            a.mov(rax, 0x5000u64).unwrap();
            a.jmp(rax).unwrap();
        });
        m.load(0x5000, 64, |a| {
            a.out(0x11, al).unwrap();
            a.mov(rax, cr3).unwrap();
            a.mov(cr3, rax).unwrap();
            a.mov(eax, dword_ptr(0x8000)).unwrap();
        });
        let mut v = m.vcpu(0);
        m.long_mode(&v);
        expect_out(&mut v, 0x10);
        protect(&m, 0x5000, libc::PROT_NONE);
        assert_eq!(v.run().unwrap_err(), Errno::EFAULT);
        protect(&m, 0x5000, ALL);
        expect_out(&mut v, 0x11);
        protect(&m, 0x10_2000, libc::PROT_NONE);
        assert_eq!(v.run().unwrap_err(), Errno::EFAULT);
        protect(&m, 0x10_2000, ALL);
    });
}

#[test]
fn a_file_cut_short_under_the_guest() {
    each(|engine| {
        let m = Machine::new(engine, false);
        // SAFETY: a new file, mapped over one page of the machine's memory.
        let fd = unsafe {
            let fd = libc::memfd_create(c"short".as_ptr(), libc::MFD_CLOEXEC);
            assert_eq!(libc::ftruncate(fd, 4096), 0);
            let flags = libc::MAP_SHARED | libc::MAP_FIXED;
            let at = m.memory.0.add(0x5000).cast();
            assert_ne!(libc::mmap(at, 4096, ALL, flags, fd, 0), libc::MAP_FAILED);
            fd
        };
        m.load(ENTRY, 64, |a| {
            a.mov(eax, dword_ptr(0x5000)).unwrap();
            a.out(0x10, al).unwrap();
            a.mov(eax, dword_ptr(0x5000)).unwrap();
        });
        let mut v = m.vcpu(0);
        m.long_mode(&v);
        expect_out(&mut v, 0x10);
        // SAFETY: shrinks a file of the test's own.
        assert_eq!(unsafe { libc::ftruncate(fd, 0) }, 0);
        assert_eq!(v.run().unwrap_err(), Errno::EFAULT);
        // SAFETY: closes the test's own descriptor.
        unsafe { libc::close(fd) };
    });
}
