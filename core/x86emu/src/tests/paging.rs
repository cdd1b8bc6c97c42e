//! Page walks: every mode, rights, reserved bits, accessed and dirty bits.

use super::fake::Fake;
use super::machine::long_mode;
use crate::bits::*;
use crate::env::Exception;
use crate::mem;
use crate::paging::{Access, Mapping, peek, walk};
use crate::state::CpuState;

const READ: Access = Access {
    write: false,
    fetch: false,
    user: false,
    implicit: false,
};
const WRITE: Access = Access {
    write: true,
    ..READ
};
const FETCH: Access = Access {
    fetch: true,
    ..READ
};

fn user(access: Access) -> Access {
    Access {
        user: true,
        ..access
    }
}

fn go(cpu: &CpuState, env: &mut Fake, gva: u64, access: Access) -> Result<Mapping, u32> {
    let features = env.features;
    walk(cpu, &features, env, gva, access).map_err(
        |Exception {
             vector,
             error,
             payload,
         }| {
            assert_eq!((vector, payload), (14, gva));
            error.unwrap()
        },
    )
}

/// 4-level tables with one 4 KiB page at 0x40_0000 (leaf given) and a 2 MiB page at 0x60_0000.
fn four_level(leaf: u64) -> (CpuState, Fake) {
    let (mut cpu, mut env) = long_mode();
    cpu.cr3 = 0x20000;
    env.w64(0x20000, 0x21007);
    env.w64(0x21000, 0x22007);
    env.w64(0x22010, 0x23007);
    env.w64(0x22018, 0x20_0000 | 0x87);
    env.w64(0x23000, leaf);
    (cpu, env)
}

#[test]
fn four_levels_translate_and_mark() {
    let (cpu, mut env) = four_level(0x5007);
    let mapping = go(&cpu, &mut env, 0x40_0123, READ).unwrap();
    assert_eq!((mapping.gpa, mapping.page_bits), (0x5123, 12));
    assert!(mapping.writable && mapping.user && !mapping.nx && !mapping.dirty && !mapping.global);
    for slot in [0x20000, 0x21000, 0x22010, 0x23000] {
        assert_eq!(env.r64(slot) & 0x60, 0x20, "accessed bit at {slot:#x}");
    }
    let mapping = go(&cpu, &mut env, 0x40_0123, WRITE).unwrap();
    assert!(mapping.dirty);
    assert_eq!(env.r64(0x23000) & 0x60, 0x60);
    assert_eq!(env.r64(0x22010) & 0x40, 0, "only the leaf gets dirty");
    let big = go(&cpu, &mut env, 0x61_2345, READ).unwrap();
    assert_eq!((big.gpa, big.page_bits), (0x21_2345, 21));
    assert_eq!(go(&cpu, &mut env, 0x1234_5678_9000, user(WRITE)), Err(6));
}

#[test]
fn a_fault_marks_nothing() {
    let (cpu, mut env) = four_level(0x5005);
    assert_eq!(go(&cpu, &mut env, 0x40_0000, user(WRITE)), Err(7));
    for slot in [0x20000, 0x21000, 0x22010, 0x23000] {
        assert_eq!(env.r64(slot) & 0x60, 0);
    }
}

#[test]
fn permission_matrix() {
    // Leaf rights, then what each access gives; u = user, s = supervisor.
    let nx = 1 << 63;
    for (leaf, ur, uw, ux, sr, sw, sx) in [
        (0x5007, true, true, true, true, true, true),
        (0x5005, true, false, true, true, false, true),
        (0x5003, false, false, false, true, true, true),
        (0x5001, false, false, false, true, false, true),
        (0x5007 | nx, true, true, false, true, true, false),
        (0x5003 | nx, false, false, false, true, true, false),
    ] {
        let (mut cpu, mut env) = four_level(leaf);
        let mut ok = |cpu: &CpuState, access| go(cpu, &mut env, 0x40_0000, access).is_ok();
        assert_eq!(ok(&cpu, user(READ)), ur, "{leaf:#x} user read");
        assert_eq!(ok(&cpu, user(WRITE)), uw, "{leaf:#x} user write");
        assert_eq!(ok(&cpu, user(FETCH)), ux, "{leaf:#x} user fetch");
        assert_eq!(ok(&cpu, READ), sr, "{leaf:#x} read");
        assert_eq!(ok(&cpu, WRITE), sw, "{leaf:#x} write");
        assert_eq!(ok(&cpu, FETCH), sx, "{leaf:#x} fetch");
        cpu.cr0 &= !CR0_WP;
        assert!(ok(&cpu, WRITE), "without WP the supervisor writes anything");
        assert_eq!(ok(&cpu, user(WRITE)), uw);
        cpu.cr4 |= CR4_SMEP | CR4_SMAP;
        let is_user = leaf & 4 != 0;
        assert_eq!(ok(&cpu, FETCH), sx && !is_user, "{leaf:#x} SMEP");
        assert_eq!(ok(&cpu, READ), !is_user, "{leaf:#x} SMAP");
        cpu.rflags |= AC;
        assert!(ok(&cpu, READ), "AC overrides SMAP");
        assert_eq!(
            ok(&cpu, Access::SYSTEM_READ),
            !is_user,
            "but not implicitly"
        );
        assert_eq!(ok(&cpu, user(READ)), ur);
    }
}

#[test]
fn rights_are_anded_over_levels() {
    let (cpu, mut env) = four_level(0x5007);
    env.w64(0x22010, 0x23003);
    assert_eq!(go(&cpu, &mut env, 0x40_0000, user(READ)), Err(5));
    env.w64(0x22010, 0x23005);
    assert_eq!(go(&cpu, &mut env, 0x40_0000, WRITE), Err(3));
    env.w64(0x22010, 0x23007 | 1 << 63);
    assert_eq!(go(&cpu, &mut env, 0x40_0000, FETCH), Err(0x11));
}

#[test]
fn reserved_bits() {
    let (mut cpu, mut env) = four_level(0x5007 | 1 << 46);
    assert_eq!(go(&cpu, &mut env, 0x40_0000, READ), Err(9));
    env.w64(0x23000, 0x5007 | 1 << 63);
    cpu.efer &= !EFER_NXE;
    assert_eq!(
        go(&cpu, &mut env, 0x40_0000, FETCH),
        Err(9),
        "no I/D bit without NXE"
    );
    env.w64(0x23000, 0x5007 | 1 << 58);
    assert!(go(&cpu, &mut env, 0x40_0000, READ).is_ok(), "ignored bit");
    env.w64(0x22018, 0x20_2000 | 0x87);
    assert_eq!(go(&cpu, &mut env, 0x60_0000, READ), Err(9));
    env.w64(0x20000, 0x21087);
    assert_eq!(go(&cpu, &mut env, 0x40_0000, READ), Err(9), "PS in a PML4E");
    env.w64(0x20000, 0x21107);
    assert!(go(&cpu, &mut env, 0x40_0000, READ).is_ok());
    env.features.amd = true;
    assert_eq!(
        go(&cpu, &mut env, 0x40_0000, READ),
        Err(9),
        "G in a PML4E on AMD"
    );
    env.w64(0x20000, 0x21007);
    env.w64(0x21000, 0x87);
    assert_eq!(go(&cpu, &mut env, 0x40_0000, READ).unwrap().page_bits, 30);
    env.features.ext1_edx = 0;
    assert_eq!(
        go(&cpu, &mut env, 0x40_0000, READ),
        Err(9),
        "no 1 GiB pages"
    );
}

#[test]
fn global_needs_pge() {
    let (mut cpu, mut env) = four_level(0x5107);
    assert!(!go(&cpu, &mut env, 0x40_0000, READ).unwrap().global);
    cpu.cr4 |= CR4_PGE;
    assert!(go(&cpu, &mut env, 0x40_0000, READ).unwrap().global);
}

#[test]
fn five_levels() {
    let (mut cpu, mut env) = four_level(0x5007);
    cpu.cr4 |= CR4_LA57;
    cpu.cr3 = 0x30000;
    env.w64(0x30000 + 8, 0x20007);
    assert_eq!(go(&cpu, &mut env, 0x40_0000, READ), Err(0));
    let gva = (1u64 << 48) + 0x40_0000;
    assert_eq!(go(&cpu, &mut env, gva, READ).unwrap().gpa, 0x5000);
}

#[test]
fn legacy_32_bit() {
    let (mut cpu, mut env) = four_level(0);
    cpu.efer = 0;
    cpu.cr4 = 0;
    cpu.cr3 = 0x30000;
    env.w32(0x30000 + 4, 0x31007);
    env.w32(0x31000 + 8, 0x7005);
    env.w32(0x30000 + 8, 0x0080_00e7);
    let mapping = go(&cpu, &mut env, 0x40_2abc, READ).unwrap();
    assert_eq!(
        (mapping.gpa, mapping.page_bits, mapping.writable),
        (0x7abc, 12, false)
    );
    assert_eq!(env.r32(0x31008) & 0x60, 0x20);
    assert_eq!(env.r32(0x30004) & 0x60, 0x20);
    assert_eq!(go(&cpu, &mut env, 0x40_2abc, user(WRITE)), Err(7));
    cpu.cr4 = CR4_PSE;
    let mapping = go(&cpu, &mut env, 0x81_2345, WRITE).unwrap();
    assert_eq!((mapping.gpa, mapping.page_bits), (0x81_2345, 22));
    env.w32(0x30000 + 8, 0x0080_20e7);
    assert_eq!(
        go(&cpu, &mut env, 0x80_0000, READ).unwrap().gpa,
        0x1_0080_0000
    );
    env.w32(0x30000 + 8, 0x00a0_00e7);
    assert_eq!(go(&cpu, &mut env, 0x80_0000, READ), Err(9), "bit 21");
    env.features.leaf1_edx = 0;
    env.w32(0x30000 + 8, 0x0080_20e7);
    assert_eq!(go(&cpu, &mut env, 0x80_0000, READ), Err(9), "no PSE-36");
}

#[test]
fn pae() {
    let (mut cpu, mut env) = four_level(0x5007);
    cpu.efer = EFER_NXE;
    cpu.pdptrs = [0x22001, 0, 0, 0];
    assert_eq!(go(&cpu, &mut env, 0x40_0123, WRITE).unwrap().gpa, 0x5123);
    assert_eq!(go(&cpu, &mut env, 0x61_2345, READ).unwrap().page_bits, 21);
    assert_eq!(go(&cpu, &mut env, 0x4000_0000, READ), Err(0));
    env.w64(0x23000, 0x5007 | 1 << 52);
    assert_eq!(go(&cpu, &mut env, 0x40_0000, READ), Err(9));
}

#[test]
fn no_paging_is_identity() {
    let (mut cpu, mut env) = four_level(0);
    cpu.cr0 &= !CR0_PG;
    assert_eq!(
        go(&cpu, &mut env, 0xffff_f123, WRITE).unwrap().gpa,
        0xffff_f123
    );
}

#[test]
fn tables_outside_ram_and_in_rom() {
    let (mut cpu, mut env) = four_level(0x5007);
    env.rom = 0x20000..0x24000;
    assert!(go(&cpu, &mut env, 0x40_0000, WRITE).is_ok());
    assert_eq!(env.r64(0x23000), 0x5007, "read-only tables keep their bits");
    cpu.cr3 = 1 << 40;
    assert_eq!(go(&cpu, &mut env, 0x40_0000, READ), Err(0));
    assert_eq!(peek(&cpu, &mut env, 0x40_0000), None);
}

#[test]
fn peek_leaves_no_trace() {
    let (cpu, mut env) = four_level(0x5000 | 1);
    assert_eq!(peek(&cpu, &mut env, 0x40_0007).unwrap().gpa, 0x5007);
    assert_eq!(env.r64(0x23000), 0x5001);
}

#[test]
fn linear_accesses_cross_pages() {
    let (cpu, mut env) = four_level(0x5007);
    env.w64(0x23008, 0x7007);
    let data: [u8; 8] = [1, 2, 3, 4, 5, 6, 7, 8];
    mem::write_linear(&cpu, &mut env, 0x40_0ffd, &data, WRITE).unwrap();
    assert_eq!(env.read(0x5ffd, 3), [1, 2, 3]);
    assert_eq!(env.read(0x7000, 5), [4, 5, 6, 7, 8]);
    let mut back = [0; 8];
    mem::read_linear(&cpu, &mut env, 0x40_0ffd, &mut back, READ).unwrap();
    assert_eq!(back, data);
    let value = mem::read_int(&cpu, &mut env, 0x40_0ffd, 4, READ).unwrap();
    assert_eq!(value, 0x0403_0201);
    // The second page is missing: the first stays as it is.
    env.w64(0x23008, 0);
    assert!(mem::write_linear(&cpu, &mut env, 0x40_0ffd, &[9; 8], WRITE).is_err());
    assert_eq!(env.read(0x5ffd, 3), [1, 2, 3]);
    // RAM on one page, a device on the other.
    env.w64(0x23008, 0x1000_0000 | 7);
    env.device_byte = 0xee;
    mem::read_linear(&cpu, &mut env, 0x40_0ffd, &mut back, READ).unwrap();
    assert_eq!(back, [1, 2, 3, 0xee, 0xee, 0xee, 0xee, 0xee]);
    assert_eq!(env.mmio[0].address, 0x1000_0000);
    mem::write_linear(&cpu, &mut env, 0x40_1000, &[7; 4], WRITE).unwrap();
    assert_eq!((env.mmio[1].write, env.mmio[1].data.len()), (true, 4));
}

#[test]
fn large_operands_span_three_pages_at_most() {
    let (mut cpu, mut env) = four_level(0);
    cpu.cr0 &= !CR0_PG;
    cpu.efer = 0;
    let data = [0x5a; 8000];
    mem::write_linear(&cpu, &mut env, 0x4f80, &data, WRITE).unwrap();
    assert_eq!(env.read(0x4f80, 8000), data);
    let mut back = [0; 8000];
    mem::read_linear(&cpu, &mut env, 0x4f80, &mut back, READ).unwrap();
    assert_eq!(back, data);
    assert!(mem::read_linear(&cpu, &mut env, 0x10, &mut [0; 0x4000], READ).is_err());
}
