//! Every fuzz target, fed by a seeded generator: seeds as they are, seeds with damage, and noise.
//! The same inputs each time, about a second per target.

use fuzz_smoke::TARGETS;
use fuzz_smoke::input::Random;
use std::time::{Duration, Instant};

/// No target is given more time than this, however slow the machine.
const LIMIT: Duration = Duration::from_secs(5);

fn feed(name: &str, inputs: usize) {
    let target = TARGETS
        .iter()
        .find(|target| target.name == name)
        .expect("a target of that name");
    // Also panics of devices' threads end the test.
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        default(info);
        std::process::abort();
    }));
    let start = Instant::now();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    let seeds = (target.seeds)();
    let mut done = 0;
    for n in 0..inputs {
        if start.elapsed() > LIMIT {
            break;
        }
        let seed = &seeds[random.below(seeds.len())];
        let data = match n % 8 {
            0 => seed.clone(),
            1 => {
                let len = random.below(300);
                random.bytes(len)
            }
            _ => random.mutated(seed),
        };
        (target.run)(&data);
        done += 1;
    }
    println!("{name}: {done} inputs in {:?}", start.elapsed());
}

macro_rules! smoke {
    ($($name:ident $inputs:literal),* $(,)?) => {$(
        #[test]
        fn $name() {
            feed(stringify!($name), $inputs);
        }
    )*};
}

smoke!(
    encoding 60_000, interpret 20_000, translate 10_000, guest 1_500, irqchip 10_000,
    kvm_calls 400, dropin 200, devices 400, loaders 4_000, frames 1_500,
);
