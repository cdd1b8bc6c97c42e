//! What came of the tests: as a table that grows, as JSON, as Markdown.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde::Serialize;

use crate::catalog::Expected;
use crate::run::{Outcome, Ran};

/// A test and what came of it.
#[derive(Debug, Clone, Serialize)]
pub struct Record {
    /// The version of Linux.
    pub source: String,
    /// The test, as the kernel's makefile calls it.
    pub test: String,
    /// How it ended; nothing if it was not run.
    pub outcome: Option<Outcome>,
    /// Whether that was expected.
    pub expected: bool,
    /// How long it took.
    pub seconds: f64,
    /// The reason for which it is not expected to pass, or else what it says.
    pub note: String,
    /// What it wrote, if the result was not expected.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub output: String,
}

impl Record {
    /// Compares what came of a test (nothing: it was not run) with what was expected.
    #[must_use]
    pub fn new(source: &str, test: &str, expected: Expected, ran: Option<Ran>) -> Self {
        let outcome = ran.as_ref().map(|ran| ran.outcome);
        let is_expected = match (expected, outcome) {
            (_, None) => true,
            (Expected::Pass | Expected::PassOrSkip(_), Some(Outcome::Pass))
            | (Expected::Skip(_) | Expected::PassOrSkip(_), Some(Outcome::Skip))
            | (Expected::Fail(_), Some(Outcome::Fail)) => true,
            (_, Some(_)) => false,
        };
        let says = ran.as_ref().map_or("", |ran| ran.says.as_str());
        let note = match (expected, outcome) {
            (Expected::NotRun(reason), None) | (Expected::Fail(reason), Some(Outcome::Fail)) => {
                reason.to_owned()
            }
            (Expected::Skip(reason) | Expected::PassOrSkip(reason), Some(Outcome::Skip)) => {
                reason.to_owned()
            }
            (Expected::Skip(_), Some(Outcome::Pass)) => {
                "it passes, but was expected to skip".to_owned()
            }
            _ => says.to_owned(),
        };
        Self {
            source: source.to_owned(),
            test: test.to_owned(),
            outcome,
            expected: is_expected,
            seconds: ran.as_ref().map_or(0.0, |ran| ran.time.as_secs_f64()),
            note,
            output: match is_expected {
                true => String::new(),
                false => ran.map_or_else(String::new, |ran| ran.output),
            },
        }
    }

    fn word(&self) -> &'static str {
        self.outcome.map_or("not run", Outcome::word)
    }

    /// The line of the live table.
    #[must_use]
    pub fn line(&self) -> String {
        let mark = if self.expected { ' ' } else { '!' };
        format!(
            "{mark} {:<42} {:<8} {:>7.2}  {}",
            self.test,
            self.word(),
            self.seconds,
            self.note
        )
        .trim_end()
        .to_owned()
    }
}

/// How many of each kind there are.
#[must_use]
pub fn summary(records: &[Record]) -> String {
    let count = |what: fn(&Record) -> bool| records.iter().filter(|record| what(record)).count();
    let pass = count(|record| record.outcome == Some(Outcome::Pass));
    let skip = count(|record| record.expected && record.outcome != Some(Outcome::Pass));
    let unexpected = count(|record| !record.expected);
    format!(
        "{} tests: {pass} passed, {skip} do not apply, {unexpected} unexpected",
        records.len()
    )
}

/// The table of docs/conformance.md: a line for each test, a column for each source.
#[must_use]
pub fn markdown(records: &[Record]) -> String {
    let mut sources: Vec<&str> = Vec::new();
    let mut tests: BTreeMap<&str, Vec<&Record>> = BTreeMap::new();
    for record in records {
        if !sources.contains(&record.source.as_str()) {
            sources.push(&record.source);
        }
        // The folder's name changed from x86_64 to x86.
        let name = match record.test.split_once('/') {
            Some((_, name)) => name,
            None => &record.test,
        };
        tests.entry(name).or_default().push(record);
    }
    let mut text = String::from("| test |");
    for source in &sources {
        let _ = write!(text, " Linux {source} |");
    }
    text += " reason |\n|---|";
    text += &"---|".repeat(sources.len() + 1);
    text.push('\n');
    for (name, of_test) in tests {
        let _ = write!(text, "| `{name}` |");
        let mut notes: Vec<String> = Vec::new();
        for source in &sources {
            let found = of_test.iter().find(|record| record.source == *source);
            let _ = write!(text, " {} |", found.map_or("", |record| record.word()));
            if let Some(record) = found {
                let note = record.note.replace('|', "\\|");
                if !note.is_empty() && !notes.contains(&note) {
                    notes.push(note);
                }
            }
        }
        let _ = writeln!(text, " {} |", notes.join("; "));
    }
    for source in sources {
        let of_source: Vec<Record> = records
            .iter()
            .filter(|record| record.source == source)
            .cloned()
            .collect();
        let _ = write!(text, "\nLinux {source}: {}.\n", summary(&of_source));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn ran(outcome: Outcome) -> Option<Ran> {
        Some(Ran {
            outcome,
            time: Duration::from_secs(1),
            says: "says".to_owned(),
            output: "all".to_owned(),
        })
    }

    #[test]
    fn compares_with_what_is_expected() {
        let record = |expected, outcome| Record::new("1", "x86/t", expected, ran(outcome));
        assert!(record(Expected::Pass, Outcome::Pass).expected);
        assert!(!record(Expected::Pass, Outcome::Skip).expected);
        assert!(!record(Expected::Skip("why"), Outcome::Fail).expected);
        assert!(!record(Expected::Skip("why"), Outcome::Pass).expected);
        assert_eq!(record(Expected::Skip("why"), Outcome::Skip).note, "why");
        assert_eq!(record(Expected::Pass, Outcome::Fail).output, "all");
    }

    #[test]
    fn one_line_for_a_test_of_both_sources() {
        let records = [
            Record::new("1", "x86_64/t", Expected::Pass, ran(Outcome::Pass)),
            Record::new("2", "x86/t", Expected::Skip("why"), ran(Outcome::Skip)),
            Record::new("2", "u", Expected::NotRun("root"), None),
        ];
        let text = markdown(&records);
        assert!(text.contains("| `t` | pass | skip | says; why |"), "{text}");
        assert!(text.contains("| `u` |  | not run | root |"), "{text}");
        assert!(text.contains("Linux 2: 2 tests: 0 passed, 2 do not apply, 0 unexpected"));
    }
}
