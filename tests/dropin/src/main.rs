//! A program that uses `/dev/kvm` through the C library's calls and knows nothing of AnyKVM: one case, named by
//! its first argument. `tests/dropin.rs` runs all of them under `anykvm exec`; they pass on a real
//! `/dev/kvm` too.
#![expect(
    unsafe_code,
    reason = "makes the C library's calls as a C program does"
)]

mod cases;
mod kvm;
mod process;
mod signal;

fn main() {
    let name = std::env::args().nth(1).unwrap_or_default();
    if name == "--list" {
        for (name, _) in cases::CASES {
            println!("{name}");
        }
        return;
    }
    let Some((_, case)) = cases::CASES.iter().find(|(n, _)| *n == name) else {
        eprintln!("dropin: no case is called '{name}'; 'dropin --list' names them");
        std::process::exit(2);
    };
    // A failed check in any thread is the end.
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        default(info);
        std::process::exit(101);
    }));
    case();
    println!("{name}: ok");
}
