//! The command's one error type: a sentence that says what is wrong and a hint what to do about it.

use std::fmt;

/// Why a command could not be carried out.
///
/// Shown to the user as one line, `anykvm: WHAT; HINT`, so neither part may hold a line break:
/// [`Error::new`] folds white space, because parts of the text come from files, other programs and
/// the operating system.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    what: String,
    hint: Option<String>,
    exit_code: u8,
}

/// The exit code of `anykvm` when the command line is wrong.
pub const EXIT_USAGE: u8 = 2;
/// The exit code of `anykvm run` when AnyKVM itself failed, so that it is not taken for the guest
/// command's own. Container tools use the same number.
pub const EXIT_FAILED: u8 = 125;

impl Error {
    /// An error with the exit code [`EXIT_FAILED`] and no hint.
    pub fn new(what: impl Into<String>) -> Self {
        Self {
            what: one_line(&what.into()),
            hint: None,
            exit_code: EXIT_FAILED,
        }
    }

    /// A wrong command line: exit code [`EXIT_USAGE`].
    pub fn usage(what: impl Into<String>) -> Self {
        Self {
            exit_code: EXIT_USAGE,
            ..Self::new(what)
        }
    }

    /// With another exit code.
    #[must_use]
    pub fn with_code(mut self, code: u8) -> Self {
        self.exit_code = code;
        self
    }

    /// Adds what the user can do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(one_line(&hint.into()));
        self
    }

    /// The process's exit code for this error.
    pub fn exit_code(&self) -> u8 {
        self.exit_code
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.hint {
            Some(hint) => write!(f, "{}; {hint}", self.what),
            None => f.write_str(&self.what),
        }
    }
}

impl std::error::Error for Error {}

/// Folds line breaks and runs of white space, and drops control characters: the text may hold what
/// a hostile file name or file put there.
fn one_line(text: &str) -> String {
    let cleaned: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    cleaned.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Says what was being done with which file when the operating system refused.
pub(crate) trait IoContext<T> {
    /// `doing` is a phrase such as "cannot read the kernel /boot/vmlinuz".
    fn doing(self, doing: impl fmt::Display) -> Result<T, Error>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn doing(self, doing: impl fmt::Display) -> Result<T, Error> {
        self.map_err(|e| Error::new(format!("{doing}: {}", reason(&e))))
    }
}

/// What a lower layer says, without the "(os error N)" that may be anywhere in it.
pub(crate) fn one_line_of(error: &dyn std::error::Error) -> String {
    let text = error.to_string();
    let mut parts = text.split(" (os error ");
    let first = parts.next().unwrap_or_default().to_owned();
    parts.fold(first, |text, part| {
        let rest = part.split_once(')').map_or("", |(_, rest)| rest);
        text + rest
    })
}

/// The operating system's reason without the "(os error N)" that means nothing to most readers.
pub(crate) fn reason(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(end) => text[..end].to_lowercase(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stays_on_one_line_whatever_the_parts_hold() {
        let error = Error::new("a\nb\x1b[31m\r\n  c").hint("do\nthis");
        assert_eq!(error.to_string(), "a b [31m c; do this");
    }

    #[test]
    fn os_errors_inside_a_text_lose_their_number() {
        let error = Error::new("cannot read k: Is a directory (os error 21) (try x)");
        assert_eq!(one_line_of(&error), "cannot read k: Is a directory (try x)");
    }

    #[test]
    fn os_errors_lose_their_number() {
        let missing = std::io::Error::from_raw_os_error(2);
        assert_eq!(reason(&missing), "no such file or directory");
    }
}
