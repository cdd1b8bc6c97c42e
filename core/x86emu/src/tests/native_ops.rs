//! Data processing against the host CPU: the instruction is executed by the interpreter on guest
//! memory and directly on host memory, and everything must agree.

use super::setup::*;
use crate::interp;

#[test]
fn placeholder() {
    let mut env = machine();
    let mut cpu = long_mode(&mut env, 0);
    env.write(0x1000, &[0x48, 0x01, 0x18]); // add [rax], rbx
    cpu.gpr[0] = 0x2000;
    cpu.gpr[3] = 5;
    env.w64(0x2000, 37);
    interp::step(&mut cpu, &mut env).unwrap();
    assert_eq!(env.r64(0x2000), 42);
    assert_eq!(cpu.rip, 0x1003);
}
