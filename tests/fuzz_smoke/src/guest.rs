//! The translator at work: arbitrary code as a guest. Whatever it does, this process stays whole.

use crate::input::{Input, within};
use crate::machine::machine;
use crate::programs::guests;
use engine_jit::JitEngine;
use kvm_core::engine::Engine;
use std::time::Duration;
use x86emu::env::Exit;

/// Runs the input's code for a moment, also after it has left.
pub fn run(data: &[u8]) {
    let (cpu, mut machine) = machine(&mut Input::new(data));
    let engine = JitEngine::new().expect("this host cannot run translated code");
    let mut vcpu = engine.create_vcpu(0).expect("no memory for a vCPU");
    *vcpu.cpu() = cpu;
    vcpu.state_changed();
    let kicker = vcpu.kicker();
    within(
        Duration::from_millis(3),
        || kicker.kick(),
        || {
            for round in 0..4 {
                let exit = vcpu.run(&mut machine, round & 1 != 0);
                if matches!(exit, Exit::Shutdown | Exit::Interrupted) || machine.exhausted() {
                    return;
                }
                if round == 2 {
                    engine.write_protect(0, 0x3000);
                    let _ = vcpu.step(&mut machine);
                    engine.memory_changed();
                }
            }
        },
    );
    let cpu = vcpu.cpu_ref();
    assert_eq!(cpu.rflags & 2, 2, "bit 1 of RFLAGS is always set");
    assert!(cpu.cpl < 4);
}

/// Programs in each mode.
pub fn seeds() -> Vec<Vec<u8>> {
    guests()
}
