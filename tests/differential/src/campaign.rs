//! Going through all forms, or through sequences, and keeping count.

use crate::case::Case;
use crate::forms;
use crate::minimize::minimize;
use crate::random::Random;
use crate::suite::{Difference, Rules, Run, Suite};
use crate::{sequence, text};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction};
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

/// A case that differs.
pub struct Failure {
    /// The form's name, or `sequence`.
    pub name: String,
    /// The case.
    pub case: Case,
    /// How it differs.
    pub difference: Difference,
    /// The line for `regressions`.
    pub line: String,
}

/// What is known of a form.
#[derive(Clone, Copy, Debug, Default)]
pub struct Form {
    /// Cases run.
    pub runs: u32,
    /// Cases compared with the host CPU.
    pub native: u32,
    /// Cases that ended in #UD.
    pub undefined: u32,
    /// Cases that ran to the end.
    pub complete: u32,
}

/// All forms of a mode.
pub struct Forms {
    bits: u32,
    codes: Vec<Code>,
    /// What is known, by form.
    pub seen: BTreeMap<Code, Form>,
    /// The first failing case of each form and executor.
    pub failures: BTreeMap<String, Failure>,
    /// Cases run.
    pub cases: u64,
}

/// Runs a recorded case under the rules of its first instruction.
pub fn replay(suite: &mut Suite, case: &Case) -> Run {
    let mut insn = Instruction::default();
    Decoder::with_ip(case.bits, &case.code, case.at, DecoderOptions::NONE).decode_out(&mut insn);
    let rules = forms::rules(&insn);
    suite.run(
        case,
        Rules {
            native: rules.native && case.bits == 64,
            ..rules
        },
    )
}

fn line(suite: &mut Suite, case: &Case, rules: Rules) -> String {
    let run = suite.run(case, rules);
    format!("{} => {}", text::write(case), text::outcome(&run.reference))
}

impl Forms {
    /// The forms of 64-bit mode, or with `bits` 32 of compatibility mode.
    pub fn new(bits: u32) -> Self {
        Forms {
            bits,
            codes: forms::all(bits),
            seen: BTreeMap::new(),
            failures: BTreeMap::new(),
            cases: 0,
        }
    }

    /// Number of forms that the decoder's tables know.
    pub fn known(&self) -> usize {
        self.codes.len()
    }

    /// One case of each form whose name contains `only`.
    pub fn round(&mut self, suite: &mut Suite, r: &mut Random, only: Option<&str>) {
        for code in self.codes.clone() {
            if only.is_none_or(|o| format!("{code:?}").contains(o)) {
                self.case(suite, r, code);
            }
        }
    }

    fn case(&mut self, suite: &mut Suite, r: &mut Random, code: Code) {
        let Some((case, insn)) = forms::make(r, code, self.bits) else {
            return;
        };
        let mut plain = Instruction::default();
        plain.set_code(code);
        if insn.is_invalid() && !forms::rules(&plain).native {
            return;
        }
        let rules = forms::rules(&insn);
        let rules = Rules {
            native: rules.native && self.bits == 64 && !forms::odd_offset(&insn, &case),
            ..rules
        };
        self.cases += 1;
        let run = suite.run(&case, rules);
        if insn.code() == code {
            let form = self.seen.entry(code).or_default();
            form.runs += 1;
            form.native += u32::from(rules.native && suite.host.is_some());
            form.undefined += u32::from(run.reference.vector == 6);
            form.complete += u32::from(run.reference.vector == 3);
        }
        if let Some(difference) = run.difference {
            let key = format!("{code:?} {}", difference.who);
            if let Entry::Vacant(entry) = self.failures.entry(key) {
                let line = line(suite, &case, rules);
                entry.insert(Failure {
                    name: insn.to_string(),
                    case,
                    difference,
                    line,
                });
            }
        }
    }

    /// Forms that ran somewhere other than into #UD.
    pub fn covered(&self) -> usize {
        self.seen.values().filter(|f| f.runs > f.undefined).count()
    }

    /// Forms among [`Forms::covered`] that were compared with the host CPU.
    pub fn covered_natively(&self) -> usize {
        self.seen
            .values()
            .filter(|f| f.runs > f.undefined && f.native > 0)
            .count()
    }

    /// The other forms, with the reason.
    pub fn uncovered(&self) -> Vec<(Code, &'static str)> {
        self.codes
            .iter()
            .filter_map(|&code| match self.seen.get(&code) {
                Some(f) if f.runs > f.undefined => None,
                Some(f) if f.native > 0 => Some((code, "#UD: the host does not have it")),
                Some(_) => Some((code, "#UD in the guest; not run on the host")),
                None => Some((
                    code,
                    "not produced by the generator, or decoded as another form",
                )),
            })
            .collect()
    }
}

/// Runs one random sequence; the failure, minimized, if it differs.
pub fn sequence(
    suite: &mut Suite,
    r: &mut Random,
    pool: &sequence::Pool,
    bits: u32,
) -> (u32, Option<Failure>) {
    let case = sequence::make(r, pool);
    let rules = Rules {
        native: bits == 64,
        ..Rules::default()
    };
    let run = suite.run(&case, rules);
    let failure = run.difference.map(|d| {
        let (case, difference) = minimize(suite, &case, rules, d);
        let line = line(suite, &case, rules);
        Failure {
            name: "sequence".into(),
            case,
            difference,
            line,
        }
    });
    (run.reference.vector, failure)
}
