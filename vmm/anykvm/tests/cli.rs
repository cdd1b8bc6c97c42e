//! The command as its users meet it: help, one-line errors, exit codes, and the default guest's
//! preparation against an archive that the test makes up.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use assert_cmd::Command;
use predicates::prelude::*;
use predicates::str::contains;

fn anykvm(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_anykvm"));
    command
        .args(arguments)
        .timeout(std::time::Duration::from_secs(60));
    command
}

/// One line on standard error, as `anykvm: ...`, and nothing that only a programmer understands.
fn one_clear_line() -> impl Predicate<str> {
    predicate::function(|text: &str| {
        text.starts_with("anykvm: ")
            && text.lines().count() == 1
            && !["os error", "panicked", "RUST_BACKTRACE", "Error {"]
                .iter()
                .any(|word| text.contains(word))
    })
}

#[test]
fn help_teaches_by_example() {
    for (arguments, part) in [
        (&["--help"][..], "anykvm run -- uname -a"),
        (&["run", "--help"], "Ctrl-A x"),
        (&["run", "--help"], "Exit codes:"),
        (&["check", "--help"], "Exit codes:"),
        (&["bench", "--help"], "Exit codes:"),
        (&["fetch", "--help"], "XDG_CACHE_HOME"),
    ] {
        anykvm(arguments)
            .assert()
            .success()
            .stdout(contains(part))
            .stderr("");
    }
    anykvm(&[]).assert().code(2).stderr(contains("Examples:"));
}

#[test]
fn the_workloads_of_bench_report_each_repetition() {
    anykvm(&["bench", "--guest"])
        .assert()
        .success()
        .stdout(contains("@bench start").and(contains("@bench syscalls ").count(5)))
        .stdout(predicates::str::ends_with("@bench end\n"));
}

#[test]
fn bad_input_is_one_clear_line() {
    let directory = tempfile::tempdir().unwrap();
    let file = |name: &str, content: &[u8]| {
        let path = directory.path().join(name);
        fs::write(&path, content).unwrap();
        path.to_str().unwrap().to_owned()
    };
    let empty = file("empty.img", b"");
    let odd = file("odd.img", &[0; 1000]);
    let not_qcow2 = format!("{},format=qcow2", file("disk.img", &[0; 1024]));
    let backed = file(
        "backed.img",
        &[b"QFI\xfb\0\0\0\x03".as_slice(), &[1; 504]].concat(),
    );
    let gone = directory.path().join("gone").to_str().unwrap().to_owned();
    let folder = directory.path().to_str().unwrap().to_owned();

    for (arguments, code, part) in [
        (&["run", "--cpus", "0"][..], 2, "1 to 254 CPUs, not 0"),
        (&["run", "--cpus", "10000"], 2, "not 10000"),
        (&["run", "--cpus", "99999999999"], 2, "CPUs"),
        (&["run", "--cpus", "two"], 2, "write a number"),
        (
            &["run", "--memory", "900T"],
            2,
            "cannot have 921600G of memory",
        ),
        (&["run", "--memory", "1M"], 2, "at least 16M"),
        (&["run", "--memory", "lots"], 2, "512M or 2G"),
        (&["run", "--kernel", &gone], 125, "no such file"),
        (&["run", "--kernel", &folder], 125, "it is a directory"),
        (
            &["run", "--kernel", &odd, "--initrd", &gone],
            125,
            "cannot read the initrd",
        ),
        (&["run", "--initrd", &gone], 2, "--kernel"),
        (
            &["run", "--kernel", &odd, "--", "ls"],
            2,
            "cannot be used with",
        ),
        (&["run", "--disk", &gone], 125, "does not exist"),
        (
            &["run", "--disk", &folder],
            125,
            "neither a file nor a block device",
        ),
        (&["run", "--disk", &empty], 125, "is empty"),
        (&["run", "--disk", &odd], 125, "1000 bytes"),
        (&["run", "--disk", &not_qcow2], 125, "not a qcow2 image"),
        (
            &["run", "--disk", &backed],
            125,
            "takes data from another file",
        ),
        (&["run", "--disk", "x,rw"], 2, "'rw' is not known"),
        (&["run", "--publish", "80"], 2, "for example 8080:80"),
        (
            &["run", "--publish", "0.0.0:1:2"],
            2,
            "must be an IPv4 address",
        ),
        (
            &["run", "--publish", "70000:80"],
            2,
            "host port must be 0 to 65535",
        ),
        (
            &["run", "--publish", "1:2", "--net", "none"],
            2,
            "--publish needs",
        ),
        (
            &["run", "--engine", "tcg"],
            2,
            "possible values: auto, jit, kvm",
        ),
        (&["exec"], 2, "PROGRAM"),
        (&["exec", "--", "no-such-program"], 127, "no such program"),
        (&["exec", "--engine", "jit", "--", &odd], 126, "cannot run"),
        (
            &["exec", "--engine", "fast", "--", "ls"],
            2,
            "possible values",
        ),
        (&["run", "uname"], 2, "'anykvm run -- uname -a'"),
        (&["rum"], 2, "a similar subcommand exists: 'run'"),
        (&["run", "--log", "loud"], 2, "possible values"),
    ] {
        anykvm(arguments)
            .assert()
            .code(code)
            .stdout("")
            .stderr(one_clear_line().and(contains(part)));
    }
}

#[test]
fn a_disk_in_use_is_left_alone() {
    use std::os::fd::AsRawFd;
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(1 << 20).unwrap();
    // What QEMU does to an image that it writes: it holds byte 101.
    let lock = nix::libc::flock {
        l_type: nix::libc::F_RDLCK as i16,
        l_whence: 0,
        l_start: 101,
        l_len: 1,
        l_pid: 0,
    };
    assert!(disk.as_file().as_raw_fd() > 2);
    nix::fcntl::fcntl(disk.as_file(), nix::fcntl::FcntlArg::F_OFD_SETLK(&lock)).unwrap();
    let path = disk.path().to_str().unwrap();
    for option in [path.to_owned(), format!("{path},ro")] {
        anykvm(&["run", "--disk", &option])
            .assert()
            .code(125)
            .stderr(one_clear_line().and(contains("is in use")));
    }
}

#[test]
fn check_tells_people_and_scripts() {
    anykvm(&["check"])
        .assert()
        .success()
        .stdout(contains("This machine can run"));
    let output = anykvm(&["check", "--json"]).output().unwrap();
    assert!(output.status.success());
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["can_run"], true);
    assert!(report["engine"]["reason"].is_string());
    let software = report["dev_kvm"]["served_by"] == "software";
    if software || report["cpu"]["virtualization"].is_null() {
        assert_eq!(
            report["engine"]["engine"], "jit",
            "never a software /dev/kvm by itself"
        );
    }
}

#[test]
fn no_place_for_the_cache_is_told() {
    for place in ["/dev/null/cache", "/proc/1/cache"] {
        anykvm(&["fetch"])
            .env("XDG_CACHE_HOME", place)
            .assert()
            .code(125)
            .stderr(one_clear_line().and(contains("set XDG_CACHE_HOME")));
    }
    anykvm(&["fetch"])
        .env_remove("XDG_CACHE_HOME")
        .env_remove("HOME")
        .assert()
        .code(125)
        .stderr(one_clear_line().and(contains("HOME is not set")));
}

/// A package with one file in it.
fn package(path: &Path, name: &str, content: &[u8]) {
    let mut tree = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_gnu();
    header.set_size(content.len() as u64);
    header.set_mode(0o755);
    tree.append_data(&mut header, name, content).unwrap();
    let tree = tree.into_inner().unwrap();
    let mut archive = ar::Builder::new(fs::File::create(path).unwrap());
    for (name, content) in [("debian-binary", b"2.0\n".as_slice()), ("data.tar", &tree)] {
        let header = ar::Header::new(name.into(), content.len() as u64);
        archive.append(&header, content).unwrap();
    }
}

fn script(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A directory with an apt that serves packages of its own: `apt-get` copies them, `apt-cache`
/// describes them.
fn made_up_archive(directory: &Path) {
    package(
        &directory.join("image.deb"),
        "./boot/vmlinuz-1",
        b"a kernel",
    );
    package(
        &directory.join("busybox.deb"),
        "./bin/busybox",
        b"a busybox\0[\0[[\0ls\0sh\0\0",
    );
    script(
        &directory.join("apt-get"),
        &format!(
            "#!/bin/sh\n\
             here={}\n\
             echo dlstatus:1:50:x\n\
             case \"$*\" in\n\
             *linux-image-1=2*) cp $here/image.deb linux-image-1_2_amd64.deb ;;\n\
             *busybox-static=3*) cp $here/busybox.deb busybox-static_3_amd64.deb ;;\n\
             esac\n",
            directory.display()
        ),
    );
    script(
        &directory.join("apt-cache"),
        &format!(
            "#!/bin/sh\n\
             here={}\n\
             sum() {{ sha256sum $here/$1 | cut -d' ' -f1; }}\n\
             show() {{ printf 'Package: %s\\nVersion: %s\\nSize: 9\\nDepends: %s\\nSHA256: %s\\n' \"$@\"; }}\n\
             case \"$*\" in\n\
             *linux-image-cloud-amd64) show linux-image-cloud-amd64 2 'linux-image-1 (= 2)' 0 ;;\n\
             *linux-image-1) show linux-image-1 2 kmod $(sum image.deb) ;;\n\
             *busybox-static) show busybox-static 3 '' $(sum busybox.deb) ;;\n\
             esac\n",
            directory.display()
        ),
    );
}

fn with_archive(arguments: &[&str], archive: &Path, cache: &Path) -> Command {
    let mut command = anykvm(arguments);
    command
        .env("PATH", format!("{}:/usr/bin:/bin", archive.display()))
        .env("XDG_CACHE_HOME", cache);
    command
}

#[test]
fn the_guest_is_fetched_once_and_then_there_offline() {
    let directory = tempfile::tempdir().unwrap();
    let (archive, cache) = (directory.path(), directory.path().join("cache"));
    made_up_archive(archive);
    with_archive(&["fetch"], archive, &cache)
        .assert()
        .success()
        .stdout(contains("linux-image-1 2 and busybox-static 3"))
        .stderr(contains("Downloading linux-image-1"));

    let export = directory.path().join("export");
    anykvm(&["fetch", "--export", export.to_str().unwrap()])
        .env("PATH", "/nonexistent")
        .env("XDG_CACHE_HOME", &cache)
        .assert()
        .success()
        .stderr("");
    assert_eq!(fs::read(export.join("vmlinuz")).unwrap(), b"a kernel");
    let initrd = fs::read(export.join("initrd")).unwrap();
    assert!(initrd.starts_with(b"070701"));

    // Damage: made anew, here from the packages that were kept.
    let store = cache.join("anykvm/store");
    let kernel = fs::read_dir(&store)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.to_string_lossy().ends_with("vmlinuz"))
        .unwrap();
    fs::write(&kernel, b"a kernen").unwrap();
    anykvm(&["fetch"])
        .env("PATH", "/nonexistent")
        .env("XDG_CACHE_HOME", &cache)
        .assert()
        .success();
    assert_eq!(fs::read(&kernel).unwrap(), b"a kernel");
}

#[test]
fn many_at_once_prepare_one_guest() {
    let directory = tempfile::tempdir().unwrap();
    let cache = directory.path().join("cache");
    made_up_archive(directory.path());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                with_archive(&["fetch"], directory.path(), &cache)
                    .assert()
                    .success();
            });
        }
    });
    let files = fs::read_dir(cache.join("anykvm/store")).unwrap().count();
    assert_eq!(files, 4);
    assert_eq!(fs::read_dir(cache.join("anykvm")).unwrap().count(), 3);
}

#[test]
fn an_archive_that_does_not_help_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let (archive, cache) = (directory.path(), directory.path().join("cache"));
    let failure = |part: &'static str| {
        predicate::function(move |text: &str| {
            let last = text.lines().last().unwrap_or_default();
            last.starts_with("anykvm: ") && last.contains(part) && last.contains("--kernel")
        })
    };

    anykvm(&["fetch"])
        .env("PATH", "/nonexistent")
        .env("XDG_CACHE_HOME", &cache)
        .assert()
        .code(125)
        .stderr(failure("there is no apt here"));

    script(&archive.join("apt-cache"), "#!/bin/sh\nexit 100\n");
    script(
        &archive.join("apt-get"),
        "#!/bin/sh\necho 'E: Temporary failure resolving the archive' >&2\nexit 100\n",
    );
    with_archive(&["fetch"], archive, &cache)
        .assert()
        .code(125)
        .stderr(failure("Temporary failure resolving"));

    // A download that breaks off, and one whose content is not the archive's.
    made_up_archive(archive);
    script(
        &archive.join("apt-get"),
        "#!/bin/sh\necho 'E: broken pipe' >&2\nexit 100\n",
    );
    with_archive(&["fetch"], archive, &cache)
        .assert()
        .code(125)
        .stderr(failure("broken pipe"));
    script(
        &archive.join("apt-get"),
        "#!/bin/sh\ncase \"$*\" in *download*) echo changed >linux-image-1_2_amd64.deb;; esac\n",
    );
    with_archive(&["fetch"], archive, &cache)
        .assert()
        .code(125)
        .stderr(contains("does not have the archive's checksum"));

    // Nothing of all this is in the way of the next try.
    made_up_archive(archive);
    with_archive(&["fetch"], archive, &cache).assert().success();
    assert_eq!(fs::read_dir(cache.join("anykvm")).unwrap().count(), 3);
}
