//! Several threads, several VMs.

use crate::kvm::{self, COUNT, DOWN_OUT, EXIT_IO, OUT_HLT, Vm, close, ioctl};
use crate::process::wait_for;
use crate::signal::{Target, set_action};

extern "C" fn nothing(_: i32) {}

/// Two VMs in one process do not see each other.
pub fn two_vms() {
    let vms = [Vm::new(COUNT), Vm::new(COUNT)];
    set_action(libc::SIGUSR1, nothing as *const () as usize, 0, &[]);
    let vcpus = [vms[0].vcpu(0), vms[1].vcpu(0)];
    let threads = vcpus.map(|vcpu| {
        let (sender, receiver) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            sender.send(Target::me()).expect("the case waits");
            assert_eq!(vcpu.run(), -libc::EINTR);
        });
        (thread, receiver.recv().expect("a thread"))
    });
    wait_for("both count", || vms.iter().all(|vm| vm.counter() > 1000));
    let [(first, one), (second, two)] = threads;
    one.send(libc::SIGUSR1);
    first.join().expect("the first");
    let (still, other) = (vms[0].counter(), vms[1].counter());
    wait_for("the second goes on", || vms[1].counter() > other + 1000);
    assert_eq!(vms[0].counter(), still);
    two.send(libc::SIGUSR1);
    second.join().expect("the second");
    for vcpu in vcpus {
        vcpu.close();
    }
}

/// Any thread may run a vCPU; threads come and go.
pub fn vcpu_changes_threads() {
    let vm = Vm::new(DOWN_OUT);
    let vcpu = vm.vcpu(0);
    for round in 0..100 {
        vm.set_counter(1000);
        let run = move || {
            let vcpu = vcpu;
            vcpu.reset();
            assert_eq!(vcpu.run(), 0);
            assert_eq!(vcpu.reason(), EXIT_IO);
        };
        if round % 3 == 0 {
            run();
        } else {
            std::thread::spawn(run).join().expect("a thread");
        }
        assert_eq!(vm.counter(), 0);
    }
    vcpu.close();
}

/// A vCPU whose descriptor is closed while it runs, runs on.
pub fn closed_while_running() {
    set_action(libc::SIGUSR1, nothing as *const () as usize, 0, &[]);
    for _ in 0..20 {
        let vm = Vm::new(COUNT);
        let vcpu = vm.vcpu(0);
        let (sender, receiver) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            sender.send(Target::me()).expect("the case waits");
            assert_eq!(vcpu.run(), -libc::EINTR);
            assert_eq!(vcpu.run(), -libc::EBADF);
        });
        let target = receiver.recv().expect("a thread");
        wait_for("it counts", || vm.counter() > 100);
        vcpu.close();
        let before = vm.counter();
        wait_for("it still counts", || vm.counter() > before + 100);
        target.send(libc::SIGUSR1);
        thread.join().expect("a thread");
    }
}

/// Many threads call one vCPU and one VM at once; calls wait for each other.
pub fn many_callers() {
    let vm = Vm::new(OUT_HLT);
    let vcpu = vm.vcpu(0);
    let threads: Vec<_> = (0..8)
        .map(|n| {
            let vm = vm.fd;
            std::thread::spawn(move || {
                let vcpu = vcpu;
                for _ in 0..300 {
                    match n {
                        0..3 => assert_eq!(vcpu.run(), 0),
                        3..5 => vcpu.reset(),
                        5 => assert_eq!(ioctl(vm, kvm::CHECK_EXTENSION, 3), 1),
                        6 => {
                            // SAFETY: a descriptor of this thread's own.
                            let copy = unsafe { libc::dup(vcpu.fd) };
                            vcpu.regs();
                            assert_eq!(ioctl(copy, kvm::RUN, 0), 0);
                            close(copy);
                        }
                        _ => {
                            let other = Vm::new(OUT_HLT);
                            let own = other.vcpu(0);
                            assert_eq!(own.run(), 0);
                            own.close();
                        }
                    }
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().expect("a thread");
    }
    vcpu.close();
}
