use super::*;
use crate::memory;

const SIZE: u64 = 256 << 20;

fn bzimage(flags64: bool) -> Vec<u8> {
    let mut image = vec![0u8; 5 * 512 + 0x1000];
    image[0x1f1] = 4;
    image[0x1f4..0x1f8].copy_from_slice(&0x100u32.to_le_bytes());
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x201] = 0x6a;
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&0x20fu16.to_le_bytes());
    image[0x211] = 1;
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    image[0x230..0x234].copy_from_slice(&0x20_0000u32.to_le_bytes());
    image[0x234] = 1;
    image[0x236] = u8::from(flags64);
    image[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    image[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
    image[0x260..0x264].copy_from_slice(&0x20_0000u32.to_le_bytes());
    image[5 * 512] = 0xf4;
    image
}

fn payload(kernel: Vec<u8>) -> Payload {
    Payload {
        kernel: Blob::Bytes {
            name: "test kernel".into(),
            bytes: kernel.into(),
        },
        initrd: vec![
            Blob::Bytes {
                name: "a".into(),
                bytes: Arc::from(*b"12345"),
            },
            Blob::Bytes {
                name: "b".into(),
                bytes: Arc::from(*b"678"),
            },
        ],
        cmdline: "console=ttyS0".into(),
    }
}

fn elf64(note: bool) -> Vec<u8> {
    let mut image = vec![0u8; 0x200];
    image[..6].copy_from_slice(b"\x7fELF\x02\x01");
    image[16] = 2;
    image[18] = 62;
    image[24..32].copy_from_slice(&0x100_0010u64.to_le_bytes());
    image[32] = 64;
    image[54] = 56;
    image[56] = if note { 2 } else { 1 };
    let mut phdr = |at: usize, kind: u8, offset: u64, paddr: u64, filesz: u64, memsz: u64| {
        image[at] = kind;
        for (field, value) in [(8, offset), (24, paddr), (32, filesz), (40, memsz)] {
            image[at + field..at + field + 8].copy_from_slice(&value.to_le_bytes());
        }
    };
    phdr(64, 1, 0x180, 0x100_0000, 0x80, 0x1000);
    phdr(120, 4, 0xc0, 0, 40, 40);
    // A foreign note, then the PVH one.
    image[0xc0..0xcc].copy_from_slice(&[4, 0, 0, 0, 4, 0, 0, 0, 1, 0, 0, 0]);
    image[0xcc..0xd4].copy_from_slice(b"GNU\0....");
    image[0xd4..0xe0].copy_from_slice(&[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    image[0xe0..0xe4].copy_from_slice(b"Xen\0");
    image[0xe4..0xe8].copy_from_slice(&0x100_0020u32.to_le_bytes());
    image
}

#[test]
fn a_bzimage_gets_a_complete_zero_page() {
    let mem = memory::create(SIZE).unwrap();
    let entry = load(&mem, SIZE, &payload(bzimage(true))).unwrap();
    assert_eq!(entry, Entry::Linux64(0x100_0200));
    let byte = |addr| mem.read_obj::<u8>(GuestAddress(addr)).unwrap();
    let word = |addr| mem.read_obj::<u32>(GuestAddress(addr)).unwrap();
    assert_eq!(byte(0x100_0000), 0xf4);
    let zp = crate::layout::ZERO_PAGE;
    assert_eq!(word(zp + 0x202), u32::from_le_bytes(*b"HdrS"));
    assert_eq!(byte(zp + 0x210), 0xff);
    assert_eq!(word(zp + 0x214), 0x100_0000);
    assert_eq!(u64::from(word(zp + 0x228)), CMDLINE);
    assert_eq!(
        mem.read_obj::<u64>(GuestAddress(zp + 0x70)).unwrap(),
        ACPI_TABLES
    );
    let initrd = u64::from(word(zp + 0x218));
    assert_eq!((initrd % 4096, word(zp + 0x21c)), (0, 11));
    let mut bytes = [0u8; 11];
    mem.read_slice(&mut bytes, GuestAddress(initrd)).unwrap();
    assert_eq!(&bytes, b"12345\0\0\x00678");
    // E820: the first entry is RAM from 0, and all entries are in order and apart.
    let count = u64::from(byte(zp + 0x1e8));
    let entry = |n: u64| {
        let at = zp + 0x2d0 + n * 20;
        let q = |a| mem.read_obj::<u64>(GuestAddress(a)).unwrap();
        (q(at), q(at + 8), word(at + 16))
    };
    assert_eq!(entry(0), (0, crate::layout::LOW_RAM_END, 1));
    for n in 1..count {
        let (start, len, _) = entry(n - 1);
        assert!(entry(n).0 >= start + len);
    }
}

#[test]
fn a_32_bit_bzimage_enters_by_the_32_bit_protocol() {
    let mem = memory::create(SIZE).unwrap();
    assert_eq!(
        load(&mem, SIZE, &payload(bzimage(false))).unwrap(),
        Entry::Linux32(0x100_0000)
    );
}

#[test]
fn every_cut_of_a_bzimage_is_an_error() {
    let mem = memory::create(SIZE).unwrap();
    let image = bzimage(true);
    for len in (0..image.len()).step_by(61) {
        let error = load(&mem, SIZE, &payload(image[..len].to_vec()))
            .unwrap_err()
            .to_string();
        assert!(!error.contains('\n'), "{error}");
    }
}

#[test]
fn elf_enters_by_pvh_if_it_can() {
    let mem = memory::create(SIZE).unwrap();
    assert_eq!(
        load(&mem, SIZE, &payload(elf64(true))).unwrap(),
        Entry::Pvh(0x100_0020)
    );
    assert_eq!(
        mem.read_obj::<u32>(GuestAddress(crate::layout::PVH_START_INFO))
            .unwrap(),
        0x336e_c578
    );
    assert_eq!(
        load(&mem, SIZE, &payload(elf64(false))).unwrap(),
        Entry::Linux64(0x100_0010)
    );
}

#[test]
fn random_damage_to_an_elf_never_panics() {
    let mem = memory::create(SIZE).unwrap();
    let mut state = 0x1234_5678_9abc_def0u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..20_000 {
        let mut image = if round % 2 == 0 {
            elf64(true)
        } else {
            bzimage(true)
        };
        for _ in 0..1 + next() % 4 {
            let at = (next() % 0x270u64.min(image.len() as u64)) as usize;
            image[at] = next() as u8;
        }
        let _ = load(&mem, SIZE, &payload(image));
    }
}

#[test]
fn errors_name_the_file_and_the_cause() {
    let mem = memory::create(SIZE).unwrap();
    let message = |bytes: Vec<u8>| load(&mem, SIZE, &payload(bytes)).unwrap_err().to_string();
    assert_eq!(message(vec![]), "test kernel is empty");
    assert!(message(b"hello".to_vec()).contains("neither a bzImage nor an ELF"));
    assert!(message([&[0x1f, 0x8b][..], &[0; 0x1000]].concat()).contains("gzip"));
    let mut long = payload(bzimage(true));
    long.cmdline = "x".repeat(4000);
    assert!(matches!(
        load(&mem, SIZE, &long),
        Err(Error::CmdlineTooLong { max: 2047, .. })
    ));
    let mut missing = payload(bzimage(true));
    missing.initrd = vec![Blob::Path("/nonexistent/initrd".into())];
    let error = load(&mem, SIZE, &missing).unwrap_err().to_string();
    assert!(
        error.starts_with("cannot read /nonexistent/initrd: No such file"),
        "{error}"
    );
}
