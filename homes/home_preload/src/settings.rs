//! What `anykvm exec` has put into the environment.

use home_user::{EngineKind, process};
use std::sync::Once;

/// Reads the environment, once, when `/dev/kvm` is first opened.
pub fn apply() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let level = std::env::var("ANYKVM_LOG")
            .ok()
            .and_then(|level| level.parse().ok())
            .unwrap_or(log::LevelFilter::Error);
        if log::set_logger(&StandardError).is_ok() {
            log::set_max_level(level);
        }
        match std::env::var("ANYKVM_ENGINE").as_deref() {
            Ok("interp") => process::set_engine(EngineKind::Interp),
            Ok("jit" | "auto") | Err(_) => {}
            Ok(other) => log::error!("ANYKVM_ENGINE={other}: there is jit and interp; this is jit"),
        }
    });
}

/// Reads it before a call on a descriptor: one of `/dev/kvm` may have been inherited or received.
pub fn applied() -> bool {
    if !process::in_use() {
        apply();
    }
    true
}

struct StandardError;

impl log::Log for StandardError {
    fn enabled(&self, _: &log::Metadata) -> bool {
        true
    }
    fn log(&self, record: &log::Record) {
        let level = record.level().as_str().to_lowercase();
        eprintln!("anykvm: {level}: {}", record.args());
    }
    fn flush(&self) {}
}
