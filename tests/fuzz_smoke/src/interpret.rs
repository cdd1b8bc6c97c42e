//! The interpreter: arbitrary code in arbitrary state.

use crate::input::Input;
use crate::machine::machine;
use crate::programs::guests;
use x86emu::env::Stop;
use x86emu::event::{self, Event};
use x86emu::interp;

/// Steps through the input's code, delivering what it raises.
pub fn run(data: &[u8]) {
    let (mut cpu, mut machine) = machine(&mut Input::new(data));
    for _ in 0..64 {
        match interp::step(&mut cpu, &mut machine) {
            Ok(()) => {}
            Err(Stop::Exception(exception)) => {
                assert!(exception.vector < 32, "{exception:?}");
                if event::deliver(&mut cpu, &mut machine, Event::from(exception)).is_err() {
                    return;
                }
            }
            Err(Stop::Exit(_)) if machine.exhausted() => return,
            Err(Stop::Exit(_)) => {
                let vector = 32 + (cpu.gpr[0] as u8 & 31);
                if event::deliver(&mut cpu, &mut machine, Event::external(vector)).is_err() {
                    return;
                }
            }
        }
        assert_eq!(cpu.rflags & 2, 2, "bit 1 of RFLAGS is always set");
        assert!(cpu.cpl < 4);
    }
}

/// Programs in each mode.
pub fn seeds() -> Vec<Vec<u8>> {
    guests()
}
