//! Making a failing case small: instructions become NOPs, registers 0, as long as it still fails.

use crate::case::Case;
use crate::suite::{Difference, Rules, Suite};
use iced_x86::{Code, Decoder, DecoderOptions, Instruction};

/// The instructions of a case's code, with their offsets; stops at what does not decode.
pub fn instructions(case: &Case) -> Vec<(usize, Instruction)> {
    let mut d = Decoder::with_ip(case.bits, &case.code, case.at, DecoderOptions::NONE);
    let mut list = Vec::new();
    while d.can_decode() {
        let at = d.position();
        let i = d.decode();
        list.push((at, i));
    }
    list
}

fn fails(suite: &mut Suite, case: &Case, rules: Rules, who: &str) -> Option<Difference> {
    suite.run(case, rules).difference.filter(|d| d.who == who)
}

/// The smallest failing case found, and how it fails.
pub fn minimize(
    suite: &mut Suite,
    case: &Case,
    rules: Rules,
    first: Difference,
) -> (Case, Difference) {
    let (mut best, mut how) = (case.clone(), first);
    // Shorter code first: everything from some instruction on becomes INT3.
    for (at, _) in instructions(&best).into_iter().rev() {
        let mut c = best.clone();
        c.code.truncate(at);
        if at == 0 || best.code.len() <= at {
            continue;
        }
        if let Some(d) = fails(suite, &c, rules, how.who) {
            (best, how) = (c, d);
        }
    }
    for _ in 0..2 {
        for (at, insn) in instructions(&best) {
            let range = at..(at + insn.len()).min(best.code.len());
            // The comparison behind an instruction with undefined flags stays.
            let guard = insn.code() == Code::Cmp_AL_imm8;
            if guard || best.code[range.clone()].iter().all(|&b| b == 0x90) {
                continue;
            }
            let mut c = best.clone();
            c.code[range].fill(0x90);
            if let Some(d) = fails(suite, &c, rules, how.who) {
                (best, how) = (c, d);
            }
        }
    }
    let mut simpler = |edit: &dyn Fn(&mut Case)| {
        let mut c = best.clone();
        edit(&mut c);
        if let Some(d) = fails(suite, &c, rules, how.who) {
            (best, how) = (c, d);
        }
    };
    for n in 0..16 {
        if n != 4 {
            simpler(&|c| c.gpr[n] = 0);
        }
    }
    simpler(&|c| c.rflags = 0);
    simpler(&|c| c.vector = 0);
    simpler(&|c| c.memory = 0);
    simpler(&|c| c.fs_base = 0);
    simpler(&|c| c.gs_base = 0);
    simpler(&|c| c.vectors.clear());
    simpler(&|c| c.patches.clear());
    (best, how)
}
