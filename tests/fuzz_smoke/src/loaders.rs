//! What files and the command line say: kernels, disk images, options.

use crate::input::{Input, Random};
use anykvm::cli::Cli;
use anykvm::guest::{deb, modules};
use anykvm::options::{DiskSpec, MemorySize};
use clap::Parser;
use netstack::Forward;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd};
use std::sync::{Arc, OnceLock};
use vm_memory::VolatileSlice;
use vmm::boot::{self, Blob, Payload};
use vmm::memory::{self, GuestMem};
use vmm::virtio::disk::{DiskConfig, DiskFormat, DiskImage};

const RAM: u64 = 64 << 20;

/// The first byte says what the rest is.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.below(6) {
        0 | 1 => kernel(&mut input),
        2 => disk(&mut input),
        3 => options(&mut input),
        4 => package(&mut input),
        _ => module(&mut input),
    }
}

fn blob(name: &str, bytes: Vec<u8>) -> Blob {
    Blob::Bytes {
        name: name.to_owned(),
        bytes: Arc::from(bytes),
    }
}

fn kernel(input: &mut Input<'_>) {
    static MEMORY: OnceLock<Arc<GuestMem>> = OnceLock::new();
    let memory = MEMORY.get_or_init(|| memory::create(RAM).expect("no memory for a guest"));
    let options = input.u8();
    let initrd = usize::from(input.u16());
    let cmdline = usize::from(input.u8());
    let initrd = match options & 3 {
        0 => Vec::new(),
        _ => vec![blob("initrd", vec![0; initrd << (options >> 2 & 7)])],
    };
    let cmdline = String::from_utf8_lossy(input.bytes(cmdline)).into_owned();
    let payload = Payload {
        kernel: blob("kernel", input.rest().to_vec()),
        initrd,
        cmdline,
    };
    if let Err(error) = boot::load(memory, RAM, &payload) {
        let text = error.to_string();
        assert!(!text.is_empty() && !text.contains('\n'), "{text:?}");
    }
}

#[expect(unsafe_code, reason = "an anonymous file has no safe constructor")]
fn file(content: &[u8]) -> File {
    // SAFETY: the name is a C string; a descriptor that comes back is new and ours.
    let mut file = unsafe {
        let fd = libc::memfd_create(c"file".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0, "no memory for a file");
        File::from_raw_fd(fd)
    };
    file.write_all(content).expect("memory for a file");
    file
}

fn disk(input: &mut Input<'_>) {
    let options = input.u8();
    let file = file(input.rest());
    // Images may be sparse.
    if options & 1 != 0
        && let Ok(metadata) = file.metadata()
    {
        let _ = file.set_len(metadata.len().max(1 << 20));
    }
    let config = DiskConfig {
        format: [DiskFormat::Auto, DiskFormat::Qcow2, DiskFormat::Raw]
            [usize::from(options >> 1) % 3],
        read_only: options & 0x10 != 0,
        file: Some(Arc::new(file)),
        ..DiskConfig::new("/nonexistent/disk")
    };
    let Ok(mut image) = DiskImage::open(&config) else {
        return;
    };
    assert!(image.size() > 0 && image.size() % 512 == 0);
    let mut buffer = vec![0u8; 4096];
    let last = image.size() - 512;
    for offset in [0, 512, last, (last / 2) & !511, u64::MAX - 100] {
        for len in [512, 4096] {
            let slices = [VolatileSlice::from(&mut buffer[..len])];
            let _ = image.read_at(&slices, offset);
            let _ = image.write_at(&slices, offset);
        }
        let _ = image.discard(offset, 512);
        let _ = image.write_zeroes(offset, 4096);
    }
    let _ = image.flush();
}

fn options(input: &mut Input<'_>) {
    let text = String::from_utf8_lossy(input.rest()).into_owned();
    if let Ok(size) = text.parse::<MemorySize>() {
        assert_eq!(size.to_string().parse(), Ok(size));
    }
    let _ = text.parse::<DiskSpec>();
    if let Ok(forward) = text.parse::<Forward>() {
        assert!(forward.guest_port != 0);
    }
    let arguments = std::iter::once("anykvm").chain(text.split('\n'));
    if let Err(error) = Cli::try_parse_from(arguments) {
        let _ = error.to_string();
    }
}

fn package(input: &mut Input<'_>) {
    let content = input.rest();
    let file = file(content);
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let _ = deb::files(path.as_ref(), |_| true);
    for name in ["x.ko", "x.ko.xz", "x.ko.gz", "x.ko.zst"] {
        let _ = deb::decompress_module(name, content.to_vec());
    }
}

fn module(input: &mut Input<'_>) {
    let content = input.rest();
    let _ = modules::dependencies("module", content);
    let _ = modules::name_of(&String::from_utf8_lossy(content));
}

/// A small bzImage, ELF kernels with and without a PVH note, qcow2 headers, arguments.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut all = vec![
        [&[0, 0, 0, 0, 0][..], &bzimage()].concat(),
        [&[0, 1, 9, 0, 4, b'q', b' ', b'x', b'='][..], &bzimage()].concat(),
        [&[1, 0, 0, 0, 0][..], &elf(true)].concat(),
        [&[1, 1, 9, 0, 0][..], &elf(false)].concat(),
        [&[5][..], &elf(true)].concat(),
    ];
    for version in [2, 3] {
        for options in [0, 1, 3, 0x11] {
            all.push([&[2, options][..], &qcow2(version)].concat());
        }
    }
    let texts = [
        "512M",
        "a,,b.img,ro,format=raw",
        "127.0.0.1:8080:80/tcp",
        "[::1]:2222:22",
        "run\n--kernel\nx\n--append\nquiet\n--memory\n1G\n--disk\nd,ro\n--\nls",
        "check\n--json",
        "--log\ndebug\nrun\n--publish\n8080:80",
    ];
    all.extend(texts.map(|text| [&[3], text.as_bytes()].concat()));
    let mut archive = b"\x04!<arch>\n".to_vec();
    archive.extend_from_slice(b"data.tar        0           0     0     100644  1024      `\n");
    archive.extend_from_slice(&[0; 1024]);
    all.push(archive);
    let mut random = Random(17);
    all.push([&[4, 0xfd, b'7', b'z', b'X', b'Z', 0][..], &random.bytes(60)].concat());
    all.push([&[4, 0x28, 0xb5, 0x2f, 0xfd][..], &random.bytes(60)].concat());
    all.push([&[4, 0x1f, 0x8b, 8, 0][..], &random.bytes(60)].concat());
    all
}

fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 0x800];
    image[0x1f1] = 1;
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x200..0x202].copy_from_slice(&[0xeb, 0x66]);
    image[0x202..0x206].copy_from_slice(b"HdrS");
    image[0x206..0x208].copy_from_slice(&[0x0f, 2]);
    image[0x211] = 1;
    image[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    image[0x230..0x234].copy_from_slice(&0x20_0000u32.to_le_bytes());
    image[0x234] = 1;
    image[0x236] = 1;
    image[0x238] = 0xff;
    image[0x239] = 7;
    image[0x258..0x260].copy_from_slice(&0x100_0000u64.to_le_bytes());
    image[0x260..0x264].copy_from_slice(&0x10_0000u32.to_le_bytes());
    image
}

fn elf(pvh: bool) -> Vec<u8> {
    let mut image = vec![0; 0x200];
    image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
    image[16] = 2;
    image[18] = 62;
    image[20] = 1;
    image[24..32].copy_from_slice(&0x100_0000u64.to_le_bytes());
    image[32] = 64;
    image[52] = 64;
    image[54] = 56;
    image[56] = 2;
    let mut header = |at: usize, kind: u8, offset: u64, len: u64| {
        image[at] = kind;
        image[at + 4] = 5;
        image[at + 8..at + 16].copy_from_slice(&offset.to_le_bytes());
        image[at + 16..at + 24].copy_from_slice(&0x100_0000u64.to_le_bytes());
        image[at + 24..at + 32].copy_from_slice(&0x100_0000u64.to_le_bytes());
        image[at + 32..at + 40].copy_from_slice(&len.to_le_bytes());
        image[at + 40..at + 48].copy_from_slice(&(len * 2).to_le_bytes());
    };
    header(64, 1, 0, 0x200);
    header(120, if pvh { 4 } else { 0 }, 0x100, 20);
    image[0x100] = 4;
    image[0x104] = 8;
    image[0x108] = 18;
    image[0x10c..0x110].copy_from_slice(b"Xen\0");
    image[0x110..0x118].copy_from_slice(&0x100_0040u64.to_le_bytes());
    image
}

fn qcow2(version: u32) -> Vec<u8> {
    let mut image = vec![0; 0x800];
    image[..4].copy_from_slice(b"QFI\xfb");
    image[4..8].copy_from_slice(&version.to_be_bytes());
    image[20..24].copy_from_slice(&9u32.to_be_bytes());
    image[24..32].copy_from_slice(&0x1_0000u64.to_be_bytes());
    image[36..40].copy_from_slice(&2u32.to_be_bytes());
    image[40..48].copy_from_slice(&0x400u64.to_be_bytes());
    image[48..56].copy_from_slice(&0x200u64.to_be_bytes());
    image[56..60].copy_from_slice(&1u32.to_be_bytes());
    image[96..100].copy_from_slice(&4u32.to_be_bytes());
    image[100..104].copy_from_slice(&104u32.to_be_bytes());
    image[0x200..0x208].copy_from_slice(&0x600u64.to_be_bytes());
    image[0x600..0x608].fill(0x01);
    image[0x400..0x408].copy_from_slice(&0x8000_0000_0000_0600u64.to_be_bytes());
    image
}
