//! The default guest's scratch disk: a sparse file without a name, so that it is gone however the
//! process ends, with an empty file system already in it. A sparse file reads as zeros, so only the
//! few blocks of an empty ext2 that are not zero are written; the guest need not format anything.
//!
//! The layout is the second extended file system's, revision 1 with sparse superblocks and 256-byte
//! inodes (Linux, "ext4 Data Structures and Algorithms"). It has no journal: the disk does not
//! outlive the machine.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::error::{Error, IoContext};

const BLOCK: u64 = 4096;
const BLOCKS_PER_GROUP: u64 = BLOCK * 8;
const INODES_PER_GROUP: u64 = 2048;
const INODE_SIZE: u64 = 256;
const INODE_TABLE_BLOCKS: u64 = INODES_PER_GROUP * INODE_SIZE / BLOCK;
const FIRST_INODE: u64 = 11;
const ROOT_INODE: u64 = 2;

/// The scratch disk's size in bytes; it takes from the host only what the guest writes.
pub const SIZE: u64 = 10 << 30;

/// Makes a formatted scratch disk of [`SIZE`] bytes.
///
/// # Errors
/// If no temporary file can be written.
pub fn create() -> Result<File, Error> {
    let directory = directory();
    let doing = || format!("cannot make the scratch disk in {}", directory.display());
    let file = tempfile::tempfile_in(&directory)
        .doing(doing())
        .map_err(|e| e.hint("set TMPDIR to a directory you can write"))?;
    format(&file, SIZE).doing(doing())?;
    Ok(file)
}

/// `$TMPDIR`, else `/var/tmp`, which is on a disk where `/tmp` may be memory.
fn directory() -> PathBuf {
    match std::env::var_os("TMPDIR") {
        Some(directory) if !directory.is_empty() => directory.into(),
        _ if Path::new("/var/tmp").is_dir() => "/var/tmp".into(),
        _ => "/tmp".into(),
    }
}

/// Blocks at the start of a group that hold its metadata, in the order in which they lie there.
struct Group {
    start: u64,
    blocks: u64,
    /// Blocks of the superblock and descriptor copies; 0 where there are none.
    copies: u64,
}

impl Group {
    fn block_bitmap(&self) -> u64 {
        self.start + self.copies
    }
    fn inode_bitmap(&self) -> u64 {
        self.block_bitmap() + 1
    }
    fn inode_table(&self) -> u64 {
        self.block_bitmap() + 2
    }
    fn data(&self) -> u64 {
        self.inode_table() + INODE_TABLE_BLOCKS
    }
}

/// Writes an empty file system into `file`, which must read as zeros, and gives it its size.
fn format(file: &File, size: u64) -> io::Result<()> {
    file.set_len(size)?;
    let blocks = size / BLOCK;
    let group_count = blocks.div_ceil(BLOCKS_PER_GROUP);
    let descriptor_blocks = (group_count * 32).div_ceil(BLOCK);
    let groups: Vec<Group> = (0..group_count)
        .map(|index| Group {
            start: index * BLOCKS_PER_GROUP,
            blocks: (blocks - index * BLOCKS_PER_GROUP).min(BLOCKS_PER_GROUP),
            copies: if has_copies(index) {
                1 + descriptor_blocks
            } else {
                0
            },
        })
        .collect();

    // The root directory and lost+found take the first data block of the first group each.
    let root_block = groups[0].data();
    let lost_block = root_block + 1;
    let mut descriptors = vec![0; (descriptor_blocks * BLOCK) as usize];
    let (mut free_blocks, mut free_inodes) = (0, 0);
    for (index, group) in groups.iter().enumerate() {
        let first = index == 0;
        let used = group.data() - group.start + if first { 2 } else { 0 };
        let used_inodes = if first { FIRST_INODE } else { 0 };
        free_blocks += group.blocks - used;
        free_inodes += INODES_PER_GROUP - used_inodes;

        let descriptor = &mut descriptors[index * 32..][..32];
        put(descriptor, 0, group.block_bitmap() as u32);
        put(descriptor, 4, group.inode_bitmap() as u32);
        put(descriptor, 8, group.inode_table() as u32);
        put16(descriptor, 12, (group.blocks - used) as u16);
        put16(descriptor, 14, (INODES_PER_GROUP - used_inodes) as u16);
        put16(descriptor, 16, if first { 2 } else { 0 });

        let mut bitmap = [0; BLOCK as usize];
        set_bits(&mut bitmap, 0, used);
        set_bits(&mut bitmap, group.blocks, BLOCKS_PER_GROUP);
        file.write_all_at(&bitmap, group.block_bitmap() * BLOCK)?;
        let mut bitmap = [0; BLOCK as usize];
        set_bits(&mut bitmap, 0, used_inodes);
        set_bits(&mut bitmap, INODES_PER_GROUP, BLOCKS_PER_GROUP);
        file.write_all_at(&bitmap, group.inode_bitmap() * BLOCK)?;
    }

    for (index, group) in groups.iter().enumerate().filter(|(_, g)| g.copies > 0) {
        let superblock = superblock(blocks, group_count, free_blocks, free_inodes, index as u16);
        // The first superblock lies behind 1024 bytes for a boot loader; copies start their block.
        let at = if index == 0 {
            1024
        } else {
            group.start * BLOCK
        };
        file.write_all_at(&superblock, at)?;
        file.write_all_at(&descriptors, (group.start + 1) * BLOCK)?;
    }

    let table = groups[0].inode_table() * BLOCK;
    for (number, permissions, links, block) in [
        (ROOT_INODE, 0o755, 3, root_block),
        (FIRST_INODE, 0o700, 2, lost_block),
    ] {
        let inode = directory_inode(permissions, links, block as u32);
        file.write_all_at(&inode, table + (number - 1) * INODE_SIZE)?;
    }
    let root = [
        (ROOT_INODE, "."),
        (ROOT_INODE, ".."),
        (FIRST_INODE, "lost+found"),
    ];
    file.write_all_at(&directory_block(&root), root_block * BLOCK)?;
    let lost = [(FIRST_INODE, "."), (ROOT_INODE, "..")];
    file.write_all_at(&directory_block(&lost), lost_block * BLOCK)
}

/// With sparse superblocks, copies are in the groups 0, 1 and the powers of 3, 5 and 7.
fn has_copies(group: u64) -> bool {
    group <= 1
        || [3, 5, 7].iter().any(|base| {
            let mut power = *base;
            while power < group {
                power *= base;
            }
            power == group
        })
}

fn superblock(blocks: u64, groups: u64, free_blocks: u64, free_inodes: u64, group: u16) -> Vec<u8> {
    let mut s = vec![0; 1024];
    put(&mut s, 0, (groups * INODES_PER_GROUP) as u32);
    put(&mut s, 4, blocks as u32);
    put(&mut s, 12, free_blocks as u32);
    put(&mut s, 16, free_inodes as u32);
    put(&mut s, 24, 2); // block size: 1024 << 2
    put(&mut s, 28, 2); // the same for fragments
    put(&mut s, 32, BLOCKS_PER_GROUP as u32);
    put(&mut s, 36, BLOCKS_PER_GROUP as u32);
    put(&mut s, 40, INODES_PER_GROUP as u32);
    put16(&mut s, 54, 0xffff); // no check after a number of mounts
    put16(&mut s, 56, 0xef53); // magic
    put16(&mut s, 58, 1); // clean
    put16(&mut s, 60, 1); // on errors: go on
    put(&mut s, 76, 1); // revision with the fields below
    put(&mut s, 84, FIRST_INODE as u32);
    put16(&mut s, 88, INODE_SIZE as u16);
    put16(&mut s, 90, group);
    put(&mut s, 96, 0x2); // incompatible: entries have a file type
    put(&mut s, 100, 0x1 | 0x2); // read-only compatible: sparse superblocks, large files
    s[104..120].copy_from_slice(b"AnyKVM scratch\0\0"); // identifier; any will do
    s[120..127].copy_from_slice(b"scratch"); // label
    s
}

fn directory_inode(permissions: u16, links: u16, block: u32) -> Vec<u8> {
    let mut inode = vec![0; INODE_SIZE as usize];
    put16(&mut inode, 0, 0x4000 | permissions);
    put(&mut inode, 4, BLOCK as u32);
    put16(&mut inode, 26, links);
    put(&mut inode, 28, (BLOCK / 512) as u32);
    put(&mut inode, 40, block);
    put16(&mut inode, 128, 32); // size of the fields beyond 128 bytes
    inode
}

fn directory_block(entries: &[(u64, &str)]) -> Vec<u8> {
    let mut block = vec![0; BLOCK as usize];
    let mut at = 0;
    for (index, &(inode, name)) in entries.iter().enumerate() {
        let last = index + 1 == entries.len();
        let length = if last {
            BLOCK as usize - at
        } else {
            (8 + name.len()).next_multiple_of(4)
        };
        put(&mut block, at, inode as u32);
        put16(&mut block, at + 4, length as u16);
        block[at + 6] = name.len() as u8;
        block[at + 7] = 2; // a directory
        block[at + 8..][..name.len()].copy_from_slice(name.as_bytes());
        at += length;
    }
    block
}

fn set_bits(bitmap: &mut [u8], from: u64, to: u64) {
    for bit in from..to {
        bitmap[(bit / 8) as usize] |= 1 << (bit % 8);
    }
}

fn put(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
}

fn put16(bytes: &mut [u8], at: usize, value: u16) {
    bytes[at..at + 2].copy_from_slice(&value.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;
    use std::process::Command;

    #[test]
    fn e2fsck_finds_nothing_to_complain_about() {
        // The last group: whole; one block of data; and the real size.
        for size in [
            BLOCKS_PER_GROUP * BLOCK,
            27 * BLOCKS_PER_GROUP * BLOCK + (64 << 20),
            SIZE,
        ] {
            let image = tempfile::NamedTempFile::new().unwrap();
            format(image.as_file(), size).unwrap();
            let check = Command::new("e2fsck")
                .args(["-f", "-n"])
                .arg(image.path())
                .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
                .output();
            let Ok(output) = check else {
                println!("skipped: e2fsck (package e2fsprogs) is not installed");
                return;
            };
            let text = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{size}: {text}");
        }
    }

    #[test]
    fn takes_little_room() {
        let file = create().unwrap();
        let status = file.metadata().unwrap();
        assert_eq!(status.len(), SIZE);
        assert!(status.blocks() * 512 < 4 << 20, "{}", status.blocks() * 512);
    }

    #[test]
    fn copies_of_the_superblock() {
        let with: Vec<u64> = (0..80).filter(|&group| has_copies(group)).collect();
        assert_eq!(with, [0, 1, 3, 5, 7, 9, 25, 27, 49]);
    }
}
