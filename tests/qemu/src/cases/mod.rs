//! What is tried out.

mod boot;
mod debug;
mod devices;
mod life;
mod memory;
mod migration;

use std::time::Duration;

use crate::error::Result;
use crate::vm::Run;

/// What a case has found besides success.
pub type Found = Option<Duration>;

/// What a case does.
type Body = dyn Fn(&Run) -> Result<Found>;

/// One thing to try out.
pub struct Case {
    /// Its name: words with `/` between.
    pub name: String,
    /// Only `-accel kvm` has what it is about.
    pub kvm_only: bool,
    run: Box<Body>,
}

impl Case {
    fn new(name: impl Into<String>, run: impl Fn(&Run) -> Result<Found> + 'static) -> Self {
        Self {
            name: name.into(),
            kvm_only: false,
            run: Box::new(run),
        }
    }

    /// A case whose time to the shell says nothing.
    fn of(name: &str, run: fn(&Run) -> Result) -> Self {
        Self::new(name, move |r| run(r).map(|()| None))
    }

    fn kvm_only(mut self) -> Self {
        self.kvm_only = true;
        self
    }

    /// Tries it out; gives the time from QEMU's start to the guest's shell where the case is about
    /// that.
    ///
    /// # Errors
    /// What is wrong.
    pub fn run(&self, run: &Run) -> Result<Found> {
        (self.run)(run)
    }
}

/// All cases.
pub fn all() -> Vec<Case> {
    let mut cases = boot::cases();
    cases.extend(devices::cases());
    cases.extend(life::cases());
    cases.extend(migration::cases());
    cases.extend(debug::cases());
    cases.extend(memory::cases());
    cases
}
