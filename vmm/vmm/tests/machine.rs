//! Small guests, written byte by byte, on every engine that this machine has.

use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use vmm::boot::{Blob, Payload};
use vmm::channel::ByteChannel;
use vmm::hypervisor::{Engine, Hypervisor};
use vmm::machine::{CrashReason, Error, Machine, MachineConfig, Outcome};

const LOAD: u32 = 0x10_0000;

/// An ELF file with a PVH entry whose code is `code`.
fn pvh_kernel(code: &[u8]) -> Vec<u8> {
    let mut image = vec![0u8; 0x100];
    let mut put = |at: usize, bytes: &[u8]| image[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x01\x01\x01");
    put(16, &[2, 0, 3, 0, 1, 0, 0, 0]);
    put(24, &LOAD.to_le_bytes());
    put(28, &52u32.to_le_bytes());
    put(42, &[32, 0, 2, 0]);
    let mut segment = |at: usize, kind: u32, offset: u32, paddr: u32, size: u32| {
        for (field, value) in [(0, kind), (4, offset), (12, paddr), (16, size), (20, size)] {
            put(at + field, &value.to_le_bytes());
        }
    };
    segment(52, 1, 0x100, LOAD, code.len() as u32);
    segment(84, 4, 0xc0, 0, 20);
    put(0xc0, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(0xcc, b"Xen\0");
    put(0xd0, &LOAD.to_le_bytes());
    image.extend_from_slice(code);
    image
}

fn config(engine: Engine, code: &[u8]) -> MachineConfig {
    let kernel = Blob::Bytes {
        name: "guest".into(),
        bytes: pvh_kernel(code).into(),
    };
    let payload = Payload {
        kernel,
        initrd: Vec::new(),
        cmdline: String::new(),
    };
    MachineConfig {
        memory: 32 << 20,
        ..MachineConfig::new(engine, payload)
    }
}

/// Runs `test` on each engine of this machine.
fn on_each_engine(test: impl Fn(Engine)) {
    for engine in [Engine::Kvm, Engine::Jit] {
        match Hypervisor::open(engine) {
            Ok(_) => test(engine),
            Err(e) => eprintln!("skipped on {engine}: {e}"),
        }
    }
}

/// Runs `code` to its end, or stops it after a while; returns what it wrote to COM1, too.
fn run(mut config: MachineConfig, limit: Duration) -> (Outcome, Vec<u8>) {
    let (host, guest) = UnixStream::pair().unwrap();
    config.serial = ByteChannel::output_only(OwnedFd::from(guest));
    let machine = Machine::build(&config).unwrap();
    drop(config);
    let handle = machine.handle();
    let reader = thread::spawn(move || {
        let (mut host, mut output) = (host, Vec::new());
        let _ = host.read_to_end(&mut output);
        output
    });
    let (done, wait) = std::sync::mpsc::channel::<()>();
    let watchdog = thread::spawn(move || {
        if wait.recv_timeout(limit) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            handle.stop();
        }
    });
    let outcome = machine.run().unwrap();
    drop(done);
    watchdog.join().unwrap();
    (outcome, reader.join().unwrap())
}

const LONG: Duration = Duration::from_secs(20);

/// `mov dx, 0x604; mov ax, 0x3400; out dx, ax; hlt`: S5 by PM1a.
const POWER_OFF: &[u8] = &[
    0x66, 0xba, 0x04, 0x06, 0x66, 0xb8, 0x00, 0x34, 0x66, 0xef, 0xf4,
];

#[test]
fn a_guest_prints_and_powers_off() {
    on_each_engine(|engine| {
        // mov dx, 0x3f8; mov esi, text; mov ecx, 3; rep outsb
        let text = LOAD + 16;
        let mut code = vec![0x66, 0xba, 0xf8, 0x03, 0xbe];
        code.extend_from_slice(&text.to_le_bytes());
        code.extend_from_slice(&[0xb9, 5, 0, 0, 0]);
        code.extend_from_slice(&[0xeb, 5]); // over the text
        code.extend_from_slice(b"hello");
        code.extend_from_slice(&[0xfc, 0xf3, 0x6e]);
        code.extend_from_slice(POWER_OFF);
        let (outcome, output) = run(config(engine, &code), LONG);
        assert!(
            matches!(outcome, Outcome::PowerOff),
            "{engine}: {outcome:?}"
        );
        assert_eq!(output, b"hello", "{engine}");
    });
}

#[test]
fn every_way_to_reset_resets() {
    on_each_engine(|engine| {
        let ways: [&[u8]; 2] = [
            &[0x66, 0xba, 0xf9, 0x0c, 0xb0, 0x06, 0xee, 0xf4], // out 0xcf9, 6
            &[0xb0, 0xfe, 0xe6, 0x64, 0xf4],                   // out 0x64, 0xfe
        ];
        for code in ways {
            let (outcome, _) = run(config(engine, code), LONG);
            assert!(matches!(outcome, Outcome::Reset), "{engine}: {outcome:?}");
        }
    });
}

#[test]
fn a_triple_fault_is_reported_with_registers() {
    on_each_engine(|engine| {
        // mov eax, 0x1234; ud2, without an IDT
        let code = [0xb8, 0x34, 0x12, 0, 0, 0x0f, 0x0b];
        let (outcome, _) = run(config(engine, &code), LONG);
        let Outcome::Crashed(crash) = outcome else {
            panic!("{engine}: {outcome:?}")
        };
        assert_eq!(crash.reason, CrashReason::TripleFault, "{engine}");
        assert_eq!(crash.to_string().lines().count(), 1);
        assert!(!crash.registers.is_empty());
    });
}

#[test]
fn a_guest_that_never_ends_can_be_stopped() {
    on_each_engine(|engine| {
        let loops: [&[u8]; 2] = [&[0xeb, 0xfe], &[0xf4, 0xeb, 0xfd]]; // jmp $; hlt
        for code in loops {
            for cpus in [1, 2] {
                let config = MachineConfig {
                    cpus,
                    ..config(engine, code)
                };
                let (outcome, _) = run(config, Duration::from_millis(100));
                assert!(matches!(outcome, Outcome::Stopped), "{engine}: {outcome:?}");
            }
        }
    });
}

#[test]
fn garbage_leaves_the_process_whole() {
    on_each_engine(|engine| {
        let mut state = 0xdead_beef_cafe_f00du64;
        for _ in 0..12 {
            let garbage: Vec<u8> = (0..256)
                .map(|_| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    state as u8
                })
                .collect();
            let (outcome, _) = run(config(engine, &garbage), Duration::from_millis(300));
            if let Outcome::Crashed(crash) = outcome {
                assert_ne!(crash.reason, CrashReason::Panicked, "{engine}: {crash}");
            }
        }
    });
}

#[test]
fn pci_answers_the_guest_by_ports_and_by_memory() {
    on_each_engine(|engine| {
        // Vendor and device of 00:01.0, which is the entropy device; four bytes each way.
        let mut code = vec![
            0x66, 0xba, 0xf8, 0x0c, // mov dx, 0xcf8
            0xb8, 0x00, 0x08, 0x00, 0x80, // mov eax, 0x80000800
            0xef, // out dx, eax
            0x66, 0xba, 0xfc, 0x0c, // mov dx, 0xcfc
            0xed, // in eax, dx
            0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
        ];
        let print = [0xee, 0xc1, 0xe8, 0x08]; // out dx, al; shr eax, 8
        code.extend(print.repeat(4));
        code.extend_from_slice(&[0xa1, 0x00, 0x80, 0x00, 0xe0]); // mov eax, [0xe0008000]
        code.extend(print.repeat(4));
        code.extend_from_slice(POWER_OFF);
        let (outcome, output) = run(config(engine, &code), LONG);
        assert!(
            matches!(outcome, Outcome::PowerOff),
            "{engine}: {outcome:?}"
        );
        assert_eq!(
            output,
            [0xf4, 0x1a, 0x44, 0x10, 0xf4, 0x1a, 0x44, 0x10],
            "{engine}"
        );
    });
}

#[test]
fn nonsense_configurations_are_one_line() {
    on_each_engine(|engine| {
        let message = |config: MachineConfig| match Machine::build(&config) {
            Err(error) => error,
            Ok(_) => panic!("{engine}: built"),
        };
        for cpus in [0, 10_000] {
            let error = message(MachineConfig {
                cpus,
                ..config(engine, &[0xf4])
            });
            assert!(matches!(error, Error::Cpus { .. }));
            assert!(
                error.to_string().starts_with("a machine has 1 to "),
                "{error}"
            );
        }
        let error = message(MachineConfig {
            memory: 1 << 60,
            ..config(engine, &[0xf4])
        });
        assert!(error.to_string().contains("ask for less"), "{error}");
    });
}
