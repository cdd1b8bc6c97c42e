//! The cases that fit into a run of all tests: QEMU over AnyKVM.

use std::time::{Duration, Instant};

use qemu_e2e::cases::all;
use qemu_e2e::emulator::{Accel, Emulator};
use qemu_e2e::vm::Run;

fn pass(qemu: &str, names: &[&str]) {
    let emulator = match Emulator::find(qemu) {
        Ok(emulator) => emulator,
        Err(error) => {
            println!("SKIPPED: QEMU ({qemu}) is not to be had: {error}");
            return;
        }
    };
    let run = Run {
        emulator,
        accel: Accel::AnyKvm("jit".into()),
        boot_limit: Duration::from_secs(90),
        append: String::new(),
    };
    let cases = all();
    for name in names {
        let case = cases
            .iter()
            .find(|case| case.name == *name)
            .unwrap_or_else(|| panic!("no case is called {name}"));
        let start = Instant::now();
        match case.run(&run) {
            Ok(found) => println!(
                "QEMU {}, {name}: {:.1} s{}",
                run.emulator.version,
                start.elapsed().as_secs_f64(),
                found.map_or(String::new(), |time| format!(
                    ", {:.1} s to the shell",
                    time.as_secs_f64()
                ))
            ),
            Err(error) => panic!("QEMU {}, {name}: {error}", run.emulator.version),
        }
    }
}

#[test]
fn debian() {
    pass(
        "debian",
        &[
            "boot/microvm/seabios/host/1/kernel",
            "boot/q35/seabios/host/2/kernel",
            "boot/pc/seabios/max/1/disk",
            "boot/q35/ovmf/host/1/disk",
            "device/e1000",
            "life/reset/q35",
            "life/savevm",
            "migration/load/q35",
            "debug/single-step",
        ],
    );
}

#[test]
fn newest() {
    pass(
        "newest",
        &[
            "boot/q35/seabios/host/2/kernel",
            "device/vga",
            "life/s3/q35",
            "memory/balloon",
        ],
    );
}
