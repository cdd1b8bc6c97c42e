//! KVM's descriptors in other processes.

use crate::kvm::{self, EXIT_IO, OUT_HLT, Vm, close, errno, ioctl};
use crate::process::in_child;
use libc::c_int;
use std::mem::zeroed;

fn runs_a_guest() {
    let vm = Vm::new(OUT_HLT);
    let vcpu = vm.vcpu(0);
    assert_eq!(vcpu.run(), 0);
    assert_eq!(vcpu.reason(), EXIT_IO);
    vcpu.close();
}

/// A child has the descriptors, but the VM is its parent's.
pub fn fork_makes_foreign() {
    let system = kvm::open();
    let vm = Vm::new(OUT_HLT);
    let vcpu = vm.vcpu(0);
    in_child(|| {
        assert_eq!(ioctl(vm.fd, kvm::CHECK_EXTENSION, 3), -libc::EIO);
        assert_eq!(ioctl(vm.fd, kvm::CREATE_VCPU, 1), -libc::EIO);
        assert_eq!(ioctl(vcpu.fd, kvm::RUN, 0), -libc::EIO);
        assert_eq!(ioctl(system, kvm::GET_API_VERSION, 0), 12);
        let own = ioctl(system, kvm::CREATE_VM, 0);
        assert!(own >= 0);
        close(own);
        runs_a_guest();
        in_child(runs_a_guest);
    });
    // The child's ends have been closed by its end.
    assert_eq!(vcpu.run(), 0);
    assert_eq!(vcpu.reason(), EXIT_IO);
    in_child(|| {
        close(vm.fd);
        close(vcpu.fd);
        close(system);
    });
    assert_eq!(ioctl(vm.fd, kvm::CHECK_EXTENSION, 3), 1);
    assert_eq!(vcpu.run(), 0);
    vcpu.close();
    // A child from a process with threads that are in KVM at that moment.
    let busy = Vm::new(kvm::COUNT);
    let spinning = busy.vcpu(0);
    let thread = std::thread::spawn(move || spinning.run());
    for _ in 0..5 {
        in_child(runs_a_guest);
    }
    spinning.set_immediate_exit(1);
    drop(thread);
}

/// A descriptor of `/dev/kvm` without close-on-exec works in the program that exec starts.
pub fn exec_inherits() {
    // SAFETY: strings end with a zero byte, arrays with a null pointer.
    unsafe {
        let fd = libc::open(c"/dev/kvm".as_ptr(), libc::O_RDWR);
        assert!(fd >= 0);
        assert_eq!(libc::dup2(fd, 77), 77);
        let program = c"/proc/self/exe".as_ptr();
        let arguments = [program, c"exec_inherited".as_ptr(), std::ptr::null()];
        libc::execv(program, arguments.as_ptr());
    }
    panic!("execv: error {}", errno());
}

/// The other side of [`exec_inherits`]; by itself it does nothing.
pub fn exec_inherited() {
    // SAFETY: asks for a flag.
    if unsafe { libc::fcntl(77, libc::F_GETFD) } < 0 {
        return;
    }
    assert_eq!(ioctl(77, kvm::GET_API_VERSION, 0), 12);
    // A bad pointer is an error in the first call of all, too.
    assert_eq!(ioctl(77, kvm::ior::<u32>(0x02) | 3 << 30, 8), -libc::EFAULT);
    let vm = ioctl(77, kvm::CREATE_VM, 0);
    assert!(vm >= 0);
    close(vm);
    runs_a_guest();
    // The name is the caller's, so that it sees one end.
    println!("exec_inherits: ok");
}

fn send(socket: c_int, fd: c_int) {
    // SAFETY: the message and all it points at outlive the call.
    unsafe {
        let mut byte = 0u8;
        let mut part = libc::iovec {
            iov_base: (&raw mut byte).cast(),
            iov_len: 1,
        };
        let mut control = [0u64; 8];
        let mut message: libc::msghdr = zeroed();
        (message.msg_iov, message.msg_iovlen) = (&mut part, 1);
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as usize;
        let head = libc::CMSG_FIRSTHDR(&message);
        (*head).cmsg_level = libc::SOL_SOCKET;
        (*head).cmsg_type = libc::SCM_RIGHTS;
        (*head).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(head).cast::<c_int>().write_unaligned(fd);
        assert_eq!(
            libc::sendmsg(socket, &message, 0),
            1,
            "sendmsg: {}",
            errno()
        );
    }
}

fn receive(socket: c_int) -> c_int {
    // SAFETY: as in `send`.
    unsafe {
        let mut byte = 0u8;
        let mut part = libc::iovec {
            iov_base: (&raw mut byte).cast(),
            iov_len: 1,
        };
        let mut control = [0u64; 8];
        let mut message: libc::msghdr = zeroed();
        (message.msg_iov, message.msg_iovlen) = (&mut part, 1);
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        assert_eq!(
            libc::recvmsg(socket, &mut message, 0),
            1,
            "recvmsg: {}",
            errno()
        );
        let head = libc::CMSG_FIRSTHDR(&message);
        assert!(!head.is_null());
        libc::CMSG_DATA(head).cast::<c_int>().read_unaligned()
    }
}

/// Descriptors go over sockets: in the process they mean the same, elsewhere `/dev/kvm` works and VMs do not.
pub fn sockets_carry() {
    let mut pair = [0; 2];
    // SAFETY: room for two descriptors.
    let result =
        unsafe { libc::socketpair(libc::AF_UNIX, libc::SOCK_STREAM, 0, pair.as_mut_ptr()) };
    assert_eq!(result, 0);
    // SAFETY: the child does what the case tests.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // This process has never opened /dev/kvm itself.
        let [system, vm, vcpu] = [(); 3].map(|()| receive(pair[1]));
        assert_eq!(ioctl(vm, kvm::CHECK_EXTENSION, 3), -libc::EIO);
        assert_eq!(ioctl(vcpu, kvm::RUN, 0), -libc::EIO);
        assert_eq!(ioctl(system, kvm::GET_API_VERSION, 0), 12);
        let own = ioctl(system, kvm::CREATE_VM, 0);
        assert!(own >= 0);
        runs_a_guest();
        std::process::exit(0);
    }
    let system = kvm::open();
    let vm = Vm::new(OUT_HLT);
    let vcpu = vm.vcpu(0);
    for fd in [system, vm.fd, vcpu.fd] {
        send(pair[0], fd);
    }
    assert_eq!(crate::process::status_of(child), 0);
    // Closed while it is under way.
    send(pair[0], vcpu.fd);
    close(vcpu.fd);
    std::thread::sleep(std::time::Duration::from_millis(20));
    let again = receive(pair[1]);
    assert_eq!(ioctl(again, kvm::RUN, 0), 0);
    assert_eq!(vcpu.reason(), EXIT_IO);
    close(again);
    close(system);
}
