//! What goes wrong in a case, as one text.

/// Why a case failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The guest or QEMU does something else than it should.
    #[error("{0}")]
    Wrong(String),
    /// The guest's console says nothing or something wrong.
    #[error(transparent)]
    Session(#[from] e2e::session::Error),
    /// Packages are not to be had.
    #[error("{0}")]
    Fetch(anykvm::Error),
    /// The host does not do something.
    #[error("{0}")]
    Host(#[from] std::io::Error),
}

impl From<anykvm::Error> for Error {
    fn from(error: anykvm::Error) -> Self {
        Self::Fetch(error)
    }
}

/// The usual result.
pub type Result<T = ()> = std::result::Result<T, Error>;

/// An [`Error::Wrong`] of these words.
pub fn wrong<T>(text: impl Into<String>) -> Result<T> {
    Err(Error::Wrong(text.into()))
}

/// Fails with `why` unless `right`.
///
/// # Errors
/// If not `right`.
pub fn ensure(right: bool, why: impl FnOnce() -> String) -> Result {
    match right {
        true => Ok(()),
        false => Err(Error::Wrong(why())),
    }
}
