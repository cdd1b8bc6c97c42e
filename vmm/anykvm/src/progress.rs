//! Tells on standard error what takes a while: a bar on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Where progress is told.
pub struct Progress {
    bar: Option<ProgressBar>,
}

impl Progress {
    /// On standard error.
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::hidden();
            if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {wide_bar} {pos:>3}%")
            {
                bar.set_style(style);
            }
            bar
        });
        Self { bar }
    }

    /// A step of unknown length begins.
    pub fn step(&self, what: &str) {
        match &self.bar {
            Some(bar) => {
                self.show(bar, "{spinner} {msg}...");
                bar.set_message(what.to_owned());
            }
            None => eprintln!("anykvm: {what}..."),
        }
    }

    /// Does a step that reports per cent.
    pub fn percent<T>(&self, what: &str, step: impl FnOnce(&mut dyn FnMut(f64)) -> T) -> T {
        let Some(bar) = &self.bar else {
            eprintln!("anykvm: {what}...");
            return step(&mut |_| {});
        };
        self.show(bar, "{spinner} {msg} {wide_bar} {pos:>3}%");
        bar.set_message(what.to_owned());
        bar.set_length(100);
        bar.set_position(0);
        step(&mut |percent| bar.set_position(percent.clamp(0.0, 100.0) as u64))
    }

    /// Takes the bar off the terminal.
    pub fn done(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn show(&self, bar: &ProgressBar, template: &str) {
        if bar.is_hidden() {
            bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
            bar.enable_steady_tick(Duration::from_millis(100));
        }
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
    }
}

impl Default for Progress {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.done();
    }
}
