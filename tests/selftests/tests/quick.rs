//! A quick part of the selftests, on the translator: they pass.

use std::io::Write;

use selftests::catalog::{QUICK, arguments, base_name, limit};
use selftests::run::{Engine, Outcome, run};
use selftests::source::find;

/// Says it even where the test harness keeps what tests print.
fn loudly(text: &str) {
    let _ = writeln!(std::io::stderr(), "selftests: {text}");
}

#[test]
fn quick_tests_pass_on_the_translator() {
    let source = find("6.1").expect("a known source");
    let built = match source.built(false) {
        Ok(built) => built,
        Err(error) => {
            loudly(&format!("SKIPPED, no test has run: {error}"));
            return;
        }
    };
    let mut failed = Vec::new();
    for name in QUICK {
        let Some(test) = built.tests.iter().find(|test| base_name(test) == *name) else {
            failed.push(format!("{name}: Linux {} does not have it", built.version));
            continue;
        };
        let ran = run(
            &built.directory.join(test),
            arguments(name),
            Engine::Jit,
            limit(name),
        );
        if ran.outcome != Outcome::Pass {
            failed.push(format!("{name}: {}: {}", ran.outcome.word(), ran.says));
        }
    }
    assert!(failed.is_empty(), "{}", failed.join("\n"));
}
