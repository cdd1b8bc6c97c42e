//! QEMU's gdb stub and its monitor's views of the guest.

use std::time::Duration;

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl};

use super::Case;
use crate::error::{Error, Result, ensure};
use crate::rsp::{Debugger, Point};
use crate::vm::{Machine, Run, Vm};

pub(super) fn cases() -> Vec<Case> {
    vec![
        Case::of("debug/software-breakpoint", |run| {
            breakpoint(run, Point::Software, 1)
        }),
        Case::of("debug/hardware-breakpoint", |run| {
            breakpoint(run, Point::Hardware, 1)
        }),
        Case::of("debug/breakpoint-smp", |run| {
            breakpoint(run, Point::Software, 2)?;
            breakpoint(run, Point::Hardware, 2)
        }),
        Case::of("debug/watchpoint", watchpoint),
        Case::of("debug/single-step", single_step),
        Case::of("debug/memory", memory),
        Case::of("debug/monitor", monitor),
    ]
}

fn with_stub(run: &Run, cpus: u32) -> Result<Vm> {
    let machine = Machine::new("q35")
        .smp(cpus.to_string())
        .append("nokaslr")
        .with("-gdb unix:{dir}/gdb,server=on,wait=off");
    Vm::boot(run, &machine)
}

fn symbol(vm: &mut Vm, name: &str) -> Result<u64> {
    let line = vm.command(&format!("grep -E ' {name}$' /proc/kallsyms | head -n 1"))?;
    line.split_whitespace()
        .next()
        .and_then(|digits| u64::from_str_radix(digits, 16).ok())
        .filter(|&address| address != 0)
        .ok_or_else(|| Error::Wrong(format!("the kernel has no {name}: '{line}'")))
}

fn say_when_done(vm: &mut Vm, command: &str) -> Result {
    Ok(vm
        .session
        .type_in(&format!("{command}; echo 'it is' 'done'\n"))?)
}

fn done(vm: &mut Vm) -> Result {
    vm.session
        .expect("it is done", Duration::from_secs(30))
        .map(|_| ())?;
    Ok(())
}

/// Stops three times at a system call, and no more once the breakpoint is gone.
fn breakpoint(run: &Run, kind: Point, cpus: u32) -> Result {
    let mut vm = with_stub(run, cpus)?;
    let address = symbol(&mut vm, "__x64_sys_sync")?;
    let mut debugger = Debugger::connect(&vm.file("gdb"))?;
    debugger.set(kind, address, 1)?;
    debugger.go_on()?;
    for _ in 0..3 {
        say_when_done(&mut vm, "sync")?;
        debugger.stopped()?;
        let rip = debugger.rip()?;
        ensure(rip == address, || {
            format!("stopped at {rip:#x}, the breakpoint is at {address:#x}")
        })?;
        // As debuggers do: over the instruction with the breakpoint taken out.
        debugger.clear(kind, address, 1)?;
        debugger.step()?;
        let next = debugger.rip()?;
        ensure(next != address, || "a step does not move".to_owned())?;
        debugger.set(kind, address, 1)?;
        debugger.go_on()?;
        done(&mut vm)?;
    }
    say_when_done(&mut vm, "sync")?;
    debugger.stopped()?;
    debugger.clear(kind, address, 1)?;
    debugger.go_on()?;
    done(&mut vm)?;
    vm.command("sync; sync")?;
    vm.works(cpus)?;
    vm.power_off()
}

/// Stops when the kernel writes the console's log level.
fn watchpoint(run: &Run) -> Result {
    let mut vm = with_stub(run, 1)?;
    let address = symbol(&mut vm, "console_printk")?;
    let mut debugger = Debugger::connect(&vm.file("gdb"))?;
    debugger.set(Point::Write, address, 4)?;
    debugger.go_on()?;
    vm.command("cat /proc/sys/kernel/printk")?;
    say_when_done(&mut vm, "echo 3 >/proc/sys/kernel/printk")?;
    let reply = debugger.stopped()?;
    ensure(
        reply.contains(&format!("watch:{address:x};"))
            || reply.contains(&format!("watch:{address:016x};")),
        || format!("the stop does not name the watchpoint: {reply}"),
    )?;
    let value = debugger.read(address, 4)?;
    ensure(value == [3, 0, 0, 0], || {
        format!("the variable holds {value:?}")
    })?;
    debugger.clear(Point::Write, address, 4)?;
    debugger.go_on()?;
    done(&mut vm)?;
    vm.works(1)?;
    vm.power_off()
}

/// Two hundred steps, each of which goes where the instruction leads.
fn single_step(run: &Run) -> Result {
    let mut vm = with_stub(run, 1)?;
    let address = symbol(&mut vm, "__x64_sys_newuname")?;
    let mut debugger = Debugger::connect(&vm.file("gdb"))?;
    debugger.set(Point::Software, address, 1)?;
    debugger.go_on()?;
    say_when_done(&mut vm, "uname -a")?;
    debugger.stopped()?;
    debugger.clear(Point::Software, address, 1)?;
    let mut linear = 0;
    for step in 0..200 {
        let at = debugger.rip()?;
        let bytes = debugger.read(at, 15)?;
        let instruction = Decoder::with_ip(64, &bytes, at, DecoderOptions::NONE).decode();
        debugger.step()?;
        let now = debugger.rip()?;
        let expected: &[u64] = match instruction.flow_control() {
            FlowControl::Next if repeats(&instruction) => &[instruction.next_ip(), at],
            FlowControl::Next => &[instruction.next_ip()],
            FlowControl::ConditionalBranch => {
                &[instruction.next_ip(), instruction.near_branch_target()]
            }
            FlowControl::UnconditionalBranch | FlowControl::Call
                if instruction.near_branch_target() != 0 =>
            {
                &[instruction.near_branch_target()]
            }
            _ => &[],
        };
        linear += u32::from(!expected.is_empty());
        // SYSRET, IRET and page faults lead elsewhere; what is named here must not.
        let fault = !is_kernel(now) || !is_kernel(at) || instruction.code() == Code::INVALID;
        ensure(
            expected.is_empty() || fault || expected.contains(&now),
            || {
                format!(
                    "step {step} goes from {at:#x} to {now:#x}, not {expected:x?}: {bytes:02x?}"
                )
            },
        )?;
    }
    ensure(linear > 50, || format!("only {linear} steps were checked"))?;
    debugger.go_on()?;
    done(&mut vm)?;
    vm.works(1)?;
    vm.power_off()
}

fn repeats(instruction: &iced_x86::Instruction) -> bool {
    instruction.has_rep_prefix() || instruction.has_repne_prefix()
}

fn is_kernel(address: u64) -> bool {
    address >> 63 == 1
}

/// Writes into the kernel's constants; the guest sees it.
fn memory(run: &Run) -> Result {
    let mut vm = with_stub(run, 1)?;
    let address = symbol(&mut vm, "linux_proc_banner")?;
    let mut debugger = Debugger::connect(&vm.file("gdb"))?;
    let text = debugger.read(address, 10)?;
    ensure(text == b"%s version", || {
        format!(
            "the kernel's banner is {:?}",
            String::from_utf8_lossy(&text)
        )
    })?;
    debugger.write(address + 3, b"VERSION")?;
    let registers = debugger.registers()?;
    ensure(registers.iter().any(|&value| value != 0), || {
        "all registers are zero".into()
    })?;
    debugger.detach()?;
    let version = vm.command("cat /proc/version")?;
    ensure(version.starts_with("Linux VERSION 6."), || version.clone())?;
    vm.works(1)?;
    vm.power_off()
}

/// EFER with SCE, LME, LMA and NX; processors may have more bits in it.
fn long_mode(line: &str) -> bool {
    line.starts_with("EFER=") && line.ends_with("d01")
}

fn monitor(run: &Run) -> Result {
    let mut vm = with_stub(run, 2)?;
    let text = vm.qmp.human("info registers -a")?;
    ensure(
        text.matches("RIP=ffffffff").count() == 2
            && text.lines().filter(|line| long_mode(line)).count() == 2,
        || format!("info registers: {text}"),
    )?;
    // An idle guest waits in HLT or the instruction after it, so the code there is plain.
    let text = vm.qmp.human("x/10i $pc")?;
    ensure(
        text.lines().count() == 10 && text.lines().all(|line| line.starts_with("0xffffffff")),
        || format!("x/10i $pc: {text}"),
    )?;
    let address = symbol(&mut vm, "linux_proc_banner")?;
    let text = vm.qmp.human(&format!("x/s {address:#x}"))?;
    let text = text + &vm.qmp.human(&format!("x/10cb {address:#x}"))?;
    ensure(text.contains("'%' 's' ' ' 'v' 'e' 'r'"), || {
        format!("x/10cb: {text}")
    })?;
    let physical = vm.qmp.human(&format!("gva2gpa {address:#x}"))?;
    ensure(physical.contains("gpa: 0x"), || physical.clone())?;
    for command in [
        "info lapic",
        "info pic",
        "info irq",
        "info mem",
        "info tlb",
        "info kvm",
    ] {
        let text = vm.qmp.human(command)?;
        ensure(!text.trim().is_empty(), || {
            format!("{command} says nothing")
        })?;
    }
    vm.works(2)?;
    vm.power_off()
}
