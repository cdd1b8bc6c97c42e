//! How a run ends: the first reason wins, and every vCPU is told to come out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use super::Outcome;
use crate::hypervisor::Kicker;

/// Shared by vCPUs, devices and whoever controls the machine.
#[derive(Default)]
pub struct Stop {
    requested: AtomicBool,
    outcome: Mutex<Option<Outcome>>,
    changed: Condvar,
    kickers: Mutex<Vec<Kicker>>,
}

impl Stop {
    /// Ends the run with `outcome`, unless it is ending already.
    pub fn finish(&self, outcome: Outcome) {
        lock(&self.outcome).get_or_insert(outcome);
        self.requested.store(true, Ordering::SeqCst);
        self.kick_all();
        self.changed.notify_all();
    }

    /// Whether the run is ending. Anything that may block for long asks now and then.
    #[must_use]
    pub fn requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }

    pub(super) fn add_kicker(&self, kicker: Kicker) {
        lock(&self.kickers).push(kicker);
    }

    pub(super) fn kick_all(&self) {
        for kicker in lock(&self.kickers).iter() {
            kicker.kick();
        }
    }

    /// Waits for the end of the run.
    pub(super) fn wait(&self) -> Outcome {
        let mut outcome = lock(&self.outcome);
        loop {
            if let Some(outcome) = outcome.clone() {
                return outcome;
            }
            outcome = self
                .changed
                .wait(outcome)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
