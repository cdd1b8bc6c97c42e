//! `/dev/kvm` as a file.

use crate::kvm::{self, errno, ioctl};
use std::mem::zeroed;

const PATH: *const libc::c_char = c"/dev/kvm".as_ptr();

fn check_stat(what: &str, result: i32, stat: &libc::stat) {
    assert_eq!(result, 0, "{what}: error {}", errno());
    assert_eq!(stat.st_mode & libc::S_IFMT, libc::S_IFCHR, "{what}");
    assert_eq!(stat.st_rdev, libc::makedev(10, 232), "{what}");
}

/// access, stat and their relatives see the device.
pub fn device_exists() {
    // SAFETY: paths end with a zero byte, structures outlive the calls.
    unsafe {
        assert_eq!(libc::access(PATH, libc::R_OK | libc::W_OK), 0);
        assert_eq!(libc::access(PATH, libc::F_OK), 0);
        assert_eq!(
            (libc::access(PATH, libc::X_OK), errno()),
            (-1, libc::EACCES)
        );
        assert_eq!(libc::faccessat(libc::AT_FDCWD, PATH, libc::R_OK, 0), 0);
        let mut stat: libc::stat = zeroed();
        check_stat("stat", libc::stat(PATH, &mut stat), &stat);
        let inode = stat.st_ino;
        check_stat("lstat", libc::lstat(PATH, &mut stat), &stat);
        assert_eq!(stat.st_ino, inode);
        let result = libc::fstatat(libc::AT_FDCWD, PATH, &mut stat, 0);
        check_stat("fstatat", result, &stat);
        let fd = kvm::open();
        stat = zeroed();
        check_stat("fstat", libc::fstat(fd, &mut stat), &stat);
        stat = zeroed();
        let result = libc::fstatat(fd, c"".as_ptr(), &mut stat, libc::AT_EMPTY_PATH);
        check_stat("fstatat of a descriptor", result, &stat);
        for (dir, path, flags) in [
            (libc::AT_FDCWD, PATH, 0),
            (fd, c"".as_ptr(), libc::AT_EMPTY_PATH),
        ] {
            let mut x: libc::statx = zeroed();
            let result = libc::statx(dir, path, flags, libc::STATX_BASIC_STATS, &mut x);
            assert_eq!(result, 0, "statx: error {}", errno());
            assert_eq!(u32::from(x.stx_mode) & libc::S_IFMT, libc::S_IFCHR);
            assert_eq!((x.stx_rdev_major, x.stx_rdev_minor), (10, 232));
        }
        kvm::close(fd);
        // What is no device stays as it was.
        assert_eq!(libc::stat(c"/dev/null".as_ptr(), &mut stat), 0);
        assert_eq!(stat.st_rdev, libc::makedev(1, 3));
        for missing in [c"/dev/kvm2", c"/dev/kv", c"dev/kvm", c""] {
            assert_eq!(
                libc::access(missing.as_ptr(), libc::F_OK),
                -1,
                "{missing:?}"
            );
            assert_eq!(
                libc::open(missing.as_ptr(), libc::O_RDWR),
                -1,
                "{missing:?}"
            );
        }
    }
}

/// open and its relatives open it.
pub fn device_opens() {
    // SAFETY: paths end with a zero byte.
    unsafe {
        for flags in [libc::O_RDWR, libc::O_RDONLY, libc::O_WRONLY] {
            let on_exec = flags | libc::O_CLOEXEC;
            for (fd, kept) in [
                (libc::open(PATH, flags), true),
                (libc::open(PATH, on_exec), false),
                (libc::open64(PATH, on_exec), false),
                (libc::openat(libc::AT_FDCWD, PATH, on_exec), false),
                (libc::openat64(-1, PATH, flags), true),
            ] {
                assert!(fd >= 0, "open: error {}", errno());
                assert_eq!(ioctl(fd, kvm::GET_API_VERSION, 0), 12);
                assert_eq!(ioctl(fd, kvm::CHECK_EXTENSION, 3), 1, "user memory");
                assert_eq!(libc::fcntl(fd, libc::F_GETFD) & libc::FD_CLOEXEC == 0, kept);
                kvm::close(fd);
                assert_eq!(ioctl(fd, kvm::GET_API_VERSION, 0), -libc::EBADF);
            }
        }
        let flags = libc::O_RDWR | libc::O_DIRECTORY;
        assert_eq!((libc::open(PATH, flags), errno()), (-1, libc::ENOTDIR));
        let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL;
        assert_eq!(
            (libc::open(PATH, flags, 0o600), errno()),
            (-1, libc::EEXIST)
        );
        let file = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/kvm");
        assert!(file.is_ok(), "std opens it");
    }
}
