//! Descriptors of KVM objects are descriptors.

use crate::kvm::{self, COUNT, EXIT_HLT, EXIT_IO, OUT_HLT, Vm, close, errno, ioctl};
use crate::process::{descriptors, mappings, resident, threads, wait_for};

/// dup, dup2, fcntl: each is the object, until the last is closed.
pub fn duplicates() {
    let vm = Vm::new(OUT_HLT);
    let vcpu = vm.vcpu(0);
    // SAFETY: plain calls on descriptors of this case.
    let copies = unsafe {
        let target = libc::dup(1);
        [
            libc::dup(vcpu.fd),
            libc::dup2(vcpu.fd, target),
            libc::dup3(vcpu.fd, libc::dup(1), libc::O_CLOEXEC),
            libc::fcntl(vcpu.fd, libc::F_DUPFD, 100),
            libc::fcntl(vcpu.fd, libc::F_DUPFD_CLOEXEC, 50),
        ]
    };
    assert!(copies[3] >= 100);
    close(vcpu.fd);
    assert_eq!(ioctl(vcpu.fd, kvm::RUN, 0), -libc::EBADF);
    // The number means something else now.
    // SAFETY: as above.
    assert_eq!(unsafe { libc::dup(1) }, vcpu.fd);
    assert_eq!(ioctl(vcpu.fd, kvm::RUN, 0), -libc::ENOTTY);
    for fd in copies {
        assert!(fd >= 0, "dup: error {}", errno());
        vcpu.reset_through(fd);
        assert_eq!(ioctl(fd, kvm::RUN, 0), 0);
        // HLT, where the OUT before counts as finished.
        assert!([EXIT_IO, EXIT_HLT].contains(&vcpu.reason()));
        close(fd);
        assert_eq!(ioctl(fd, kvm::RUN, 0), -libc::EBADF);
    }
    // A VM's number that becomes a vCPU's.
    let other = Vm::new(COUNT);
    let vcpu = vm.vcpu(1);
    // SAFETY: as above.
    unsafe {
        let copy = libc::dup(other.fd);
        assert_eq!(libc::dup2(vcpu.fd, copy), copy);
        assert_eq!(ioctl(copy, kvm::RUN, 0), 0);
        close(copy);
    }
    vcpu.close();
    assert_eq!(ioctl(other.fd, kvm::CHECK_EXTENSION, 3), 1);
}

impl kvm::Vcpu {
    fn reset_through(self, fd: i32) {
        kvm::Vcpu { fd, ..self }.reset();
    }
}

/// close_range closes.
pub fn close_ranges() {
    let vm = Vm::new(OUT_HLT);
    let vcpu = vm.vcpu(0);
    // SAFETY: the numbers above 200 are this case's.
    unsafe {
        let high = libc::fcntl(vcpu.fd, libc::F_DUPFD, 200);
        assert_eq!(ioctl(high, kvm::RUN, 0), 0);
        assert_eq!(libc::syscall(libc::SYS_close_range, 300, 400, 0), 0);
        assert_eq!(ioctl(high, kvm::RUN, 0), 0);
        unsafe extern "C" {
            fn close_range(first: u32, last: u32, flags: i32) -> i32;
        }
        assert_eq!(close_range(high as u32, high as u32 + 9, 0), 0);
        assert_eq!(ioctl(high, kvm::RUN, 0), -libc::EBADF);
    }
    assert_eq!(vcpu.reason(), EXIT_HLT);
    vcpu.close();
}

/// A vCPU's mapping stays when its descriptor is closed; one that is made later shows the same.
pub fn mapping_outlives() {
    let vm = Vm::new(OUT_HLT);
    let vcpu = vm.vcpu(0);
    assert_eq!(vcpu.run(), 0);
    let second = kvm::map_run(vcpu.fd);
    // SAFETY: mapped.
    assert_eq!(unsafe { (*second).exit_reason }, EXIT_IO);
    let fd = vm.fd;
    close(vcpu.fd);
    kvm::unmap_run(second);
    assert_eq!(vcpu.reason(), EXIT_IO);
    vcpu.set_immediate_exit(1);
    // The VM still has its vCPU.
    assert_eq!(ioctl(fd, kvm::CREATE_VCPU, 0), -libc::EEXIST);
    drop(vm);
    assert_eq!(vcpu.reason(), EXIT_IO);
    kvm::unmap_run(vcpu.run);
}

/// poll and epoll say what they say of KVM's descriptors.
pub fn polls() {
    let vm = Vm::new(OUT_HLT);
    let vcpu = vm.vcpu(0);
    let system = kvm::open();
    for fd in [system, vm.fd, vcpu.fd] {
        let mut poll = libc::pollfd {
            fd,
            events: libc::POLLIN | libc::POLLOUT,
            revents: 0,
        };
        let mut event = libc::epoll_event { events: 1, u64: 0 };
        // SAFETY: structures outlive the calls.
        unsafe {
            assert_eq!(libc::poll(&mut poll, 1, 0), 1);
            assert_eq!(poll.revents, libc::POLLIN | libc::POLLOUT);
            let epoll = libc::epoll_create1(libc::EPOLL_CLOEXEC);
            let result = libc::epoll_ctl(epoll, libc::EPOLL_CTL_ADD, fd, &mut event);
            assert_eq!((result, errno()), (-1, libc::EPERM));
            close(epoll);
        }
    }
    close(system);
    vcpu.close();
}

/// A VM with a vCPU, closed in one of several orders.
fn live_and_die(order: usize) {
    let vm = Vm::new(OUT_HLT);
    if order & 8 != 0 {
        assert_eq!(ioctl(vm.fd, kvm::CREATE_IRQCHIP, 0), 0);
    }
    let vcpu = vm.vcpu(0);
    if order & 4 != 0 {
        assert_eq!(vcpu.run(), 0);
    }
    match order & 3 {
        0 => {
            vcpu.close();
            drop(vm);
        }
        1 => {
            drop(vm);
            vcpu.close();
        }
        2 => {
            close(vcpu.fd);
            drop(vm);
            kvm::unmap_run(vcpu.run);
        }
        _ => {
            kvm::unmap_run(vcpu.run);
            // SAFETY: descriptors of this case, closed behind everyone's back.
            unsafe {
                libc::syscall(libc::SYS_close, vcpu.fd);
                drop(vm);
            }
        }
    }
}

/// When all is closed and unmapped, in whatever order, nothing is left.
pub fn destroys_everything() {
    kvm::run_size();
    live_and_die(4);
    std::thread::sleep(std::time::Duration::from_millis(50));
    let now = (descriptors(), threads());
    for order in 0..16 {
        live_and_die(order);
        wait_for(&format!("order {order}"), || {
            (descriptors(), threads()) == now
        });
    }
    let vm = Vm::new(OUT_HLT);
    let vcpu = vm.vcpu(0);
    drop(vm);
    close(vcpu.fd);
    assert_eq!(vcpu.run(), -libc::EBADF);
    // The mapping alone keeps it.
    std::thread::sleep(std::time::Duration::from_millis(50));
    vcpu.set_immediate_exit(1);
    kvm::unmap_run(vcpu.run);
    wait_for("the last mapping's end", || {
        (descriptors(), threads()) == now
    });
}

/// A thousand VMs, one after the other, leave nothing behind.
pub fn created_and_destroyed() {
    kvm::run_size();
    let mut before = (0, 0, 0, 0);
    for n in 0..1000 {
        live_and_die(n);
        if n == 200 {
            std::thread::sleep(std::time::Duration::from_millis(100));
            before = (descriptors(), threads(), mappings(), resident());
        }
    }
    let (fds, count, maps, memory) = before;
    wait_for("descriptors and threads as before", || {
        descriptors() <= fds && threads() <= count
    });
    println!("mappings: {maps}, then {}", mappings());
    println!("KiB resident: {memory}, then {}", resident());
    assert!(
        mappings() <= maps + 10,
        "{maps} mappings, then {}",
        mappings()
    );
    assert!(
        resident() <= memory + (16 << 10),
        "{memory} KiB, then {}",
        resident()
    );
}
