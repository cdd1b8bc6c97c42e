use super::*;
use crate::memory;
use imago::{FormatCreateBuilder, Storage, StorageCreateOptions};
use vm_memory::{GuestAddress, GuestMemoryBackend};

/// A file that goes away with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        Self(std::env::temp_dir().join(format!("anykvm-disk-{}-{name}", std::process::id())))
    }

    fn raw(name: &str, len: u64) -> Self {
        let scratch = Self::new(name);
        File::create(&scratch.0).unwrap().set_len(len).unwrap();
        scratch
    }

    fn qcow2(name: &str, len: u64) -> Self {
        let scratch = Self::new(name);
        let options = StorageCreateOptions::new().filename(&scratch.0);
        let storage = <imago::file::File as Storage>::create_open(options).unwrap();
        Qcow2::<imago::file::File>::create_builder(storage)
            .size(len)
            .create()
            .unwrap();
        scratch
    }

    fn config(&self) -> DiskConfig {
        DiskConfig::new(&self.0)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Writes, reads back over split buffers, discards, zeroes.
fn exercise(config: &DiskConfig) {
    let mem = memory::create(16 << 20).unwrap();
    let slice = |addr, len| GuestMemoryBackend::get_slice(&*mem, GuestAddress(addr), len).unwrap();
    let mut image = DiskImage::open(config).unwrap();
    mem.write_slice(&[0xa5; 1024], GuestAddress(0x1000))
        .unwrap();
    image
        .write_at(&[slice(0x1000, 100), slice(0x1064, 924)], 4096)
        .unwrap();
    image.flush().unwrap();
    drop(image);

    let mut image = DiskImage::open(config).unwrap();
    image
        .read_at(&[slice(0x8000, 512), slice(0x9000, 1024)], 3584)
        .unwrap();
    let byte = |addr| mem.read_obj::<u8>(GuestAddress(addr)).unwrap();
    assert_eq!((byte(0x8000), byte(0x81ff)), (0, 0));
    assert_eq!((byte(0x9000), byte(0x93ff)), (0xa5, 0xa5));
    image.write_zeroes(4096, 512).unwrap();
    image.discard(0, 65536).unwrap();
    image.write_zeroes(512, 0).unwrap();
    image.read_at(&[slice(0x8000, 512)], 4096).unwrap();
    assert_eq!(byte(0x8000), 0);
    let end = image.size();
    assert!(image.read_at(&[slice(0x8000, 512)], end).is_err());
    assert!(
        image
            .write_at(&[slice(0x8000, 512)], u64::MAX - 511)
            .is_err()
    );
    assert!(image.discard(end - 512, 1024).is_err());
}

#[test]
fn raw_images_keep_what_is_written() {
    let scratch = Scratch::raw("raw", (1 << 20) + 100);
    exercise(&scratch.config());
    assert_eq!(DiskImage::open(&scratch.config()).unwrap().size(), 1 << 20);
}

#[test]
fn qcow2_images_keep_what_is_written() {
    let scratch = Scratch::qcow2("image.qcow2", 1 << 20);
    exercise(&scratch.config());
}

#[test]
fn a_disk_in_use_is_refused() {
    let scratch = Scratch::raw("locked", 4096);
    let first = DiskImage::open(&scratch.config()).unwrap();
    let error = DiskImage::open(&scratch.config()).err().unwrap();
    assert!(
        error.to_string().contains("is in use by another process"),
        "{error}"
    );
    drop(first);
    let reader = DiskConfig {
        read_only: true,
        ..scratch.config()
    };
    let mut one = DiskImage::open(&reader).unwrap();
    let _two = DiskImage::open(&reader).unwrap();
    assert!(matches!(
        DiskImage::open(&scratch.config()),
        Err(Error::InUse { .. })
    ));
    assert!(one.write_at(&[], 0).is_err());
    assert!(one.write_zeroes(0, 512).is_err());
}

#[test]
fn a_header_that_names_another_file_needs_the_users_word() {
    let scratch = Scratch::new("overlay.img");
    let options = StorageCreateOptions::new().filename(&scratch.0);
    let storage = <imago::file::File as Storage>::create_open(options).unwrap();
    Qcow2::<imago::file::File>::create_builder(storage)
        .size(1 << 20)
        .backing("/etc/passwd".into(), "raw".into())
        .create()
        .unwrap();
    assert!(matches!(
        DiskImage::open(&scratch.config()),
        Err(Error::Refers { .. })
    ));
    let trusted = DiskConfig {
        format: DiskFormat::Qcow2,
        ..scratch.config()
    };
    DiskImage::open(&trusted).unwrap();
}

#[test]
fn what_is_no_disk_is_refused_in_one_line() {
    let message = |config: &DiskConfig| DiskImage::open(config).err().unwrap().to_string();
    assert!(message(&DiskConfig::new("/nonexistent")).starts_with("cannot open the disk"));
    assert!(
        message(&DiskConfig {
            read_only: true,
            ..DiskConfig::new("/tmp")
        })
        .contains("neither")
    );
    let empty = Scratch::raw("empty", 100);
    assert!(message(&empty.config()).ends_with("is empty"));
    let bogus = DiskConfig {
        format: DiskFormat::Qcow2,
        ..empty.config()
    };
    assert!(message(&bogus).contains("not a good qcow2 image"));
}

#[test]
fn a_qcow2_image_that_counts_no_header_is_refused() {
    let scratch = Scratch::qcow2("uncounted.img", 4 << 20);
    let mut image = std::fs::read(&scratch.0).unwrap();
    let table = u64::from_be_bytes(image[48..56].try_into().unwrap()) as usize;
    image[table..table + 8].fill(0);
    std::fs::write(&scratch.0, &image).unwrap();
    let error = DiskImage::open(&scratch.config()).err().unwrap();
    assert!(error.to_string().contains("refcount table"), "{error}");
}

#[test]
fn damage_to_a_qcow2_image_is_an_error_at_most() {
    let scratch = Scratch::qcow2("damaged.img", 4 << 20);
    let good = std::fs::read(&scratch.0).unwrap();
    let mem = memory::create(16 << 20).unwrap();
    let buffer = GuestMemoryBackend::get_slice(&*mem, GuestAddress(0), 65536).unwrap();
    let mut state = 0x5eed_5eed_5eed_5eedu64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for _ in 0..1500 {
        let mut image = good.clone();
        for _ in 0..1 + next() % 3 {
            let at = match next() % 3 {
                0 => next() as usize % image.len(),
                _ => next() as usize % 112,
            };
            image[at] = next() as u8;
        }
        std::fs::write(&scratch.0, &image).unwrap();
        if let Ok(mut disk) = DiskImage::open(&scratch.config()) {
            let _ = disk.read_at(&[buffer], 0);
            let _ = disk.write_at(&[buffer], disk.size().saturating_sub(65536));
            let _ = disk.flush();
        }
    }
}
