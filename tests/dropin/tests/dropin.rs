//! Every case of the program `dropin`, each in a process of its own under `anykvm exec`.
//!
//! `ANYKVM_ENGINE=jit|interp` chooses the engine, the translator without it; `ANYKVM_ENGINE=kvm` runs the cases on the
//! machine's own `/dev/kvm`, with nothing in front of it.

use e2e::program;
use std::process::Command;
use std::time::Duration;

/// No case takes longer, however busy the machine.
const LIMIT: Duration = Duration::from_secs(120);

fn run(case: &str) {
    let dropin = env!("CARGO_BIN_EXE_dropin");
    let engine = std::env::var("ANYKVM_ENGINE").unwrap_or_else(|_| "jit".into());
    let mut command;
    if engine == "kvm" {
        command = Command::new(dropin);
    } else {
        command = Command::new(program::anykvm());
        command.args(["exec", "--engine", &engine, "--", dropin]);
    }
    let ended = program::end(command.arg(case), LIMIT);
    let stdout = String::from_utf8_lossy(&ended.stdout);
    let good = ended.code == 0 && !ended.stopped && stdout.contains(&format!("{case}: ok\n"));
    assert!(
        good,
        "{case}: code {}{}\n{stdout}{}",
        ended.code,
        if ended.stopped { ", too late" } else { "" },
        ended.stderr
    );
    print!("{stdout}");
}

macro_rules! cases {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            run(stringify!($name));
        })*

        #[test]
        fn all_are_here() {
            let listed = Command::new(env!("CARGO_BIN_EXE_dropin")).arg("--list").output();
            let listed = String::from_utf8(listed.expect("dropin runs").stdout).expect("text");
            let here = [$(stringify!($name)),*];
            assert_eq!(listed.lines().collect::<Vec<_>>(), here);
        }
    };
}

cases! {
    device_exists device_opens
    duplicates close_ranges mapping_outlives polls destroys_everything created_and_destroyed
    fork_makes_foreign exec_inherits exec_inherited sockets_carry
    two_vms vcpu_changes_threads closed_while_running many_callers
    signal_ends_run handler_uses_vcpu handler_jumps_out restart_is_no_restart reset_hand no_defer
    mask_in_handler realtime_queues timers storm handler_calls_back bsd_signal faults unhandled_fault
    blocked_and_ignored signal_mask signal_mask_default signal_mask_blocks immediate_exit signalfd
    cancel_elsewhere
    bad_pointers bad_numbers
    state_of_modes state_of_everything state_of_two
    nothing_opened cost
}
