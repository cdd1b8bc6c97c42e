//! Inputs of the programs, the same on every machine.

use std::fmt::Write as _;

use crate::random::Random;

const SYLLABLES: [&str; 24] = [
    "th", "an", "er", "on", "re", "st", "in", "al", "ti", "es", "or", "en", "ve", "co", "de", "ra",
    "ro", "li", "ing", "io", "le", "sa", "ur", "ma",
];

/// A word; small numbers are frequent in a text, and their words short.
fn word(number: u64) -> String {
    let mut text = String::new();
    let mut rest = number + 1;
    while rest > 0 {
        text.push_str(SYLLABLES[(rest % 24) as usize]);
        rest /= 24;
    }
    text
}

/// Lines of words and numbers that a compressor finds as much in as in prose.
pub fn text(bytes: usize) -> String {
    let mut random = Random::new(0x7e57);
    let mut text = String::with_capacity(bytes + 100);
    while text.len() < bytes {
        for n in 0..6 + random.below(6) {
            if n > 0 {
                text.push(' ');
            }
            if random.below(12) == 0 {
                let _ = write!(text, "{}", random.below(100_000));
            } else {
                // The product of three is small far more often than large.
                let rank = random.below(30) * random.below(30) * random.below(30);
                text.push_str(&word(rank));
            }
        }
        text.push('\n');
    }
    text
}

/// Bytes as programs have them: records of small numbers, some text, some noise.
pub fn binary(bytes: usize) -> Vec<u8> {
    let mut random = Random::new(0xb1a5);
    let mut out = Vec::with_capacity(bytes + 64);
    let mut id = 0u32;
    while out.len() < bytes {
        id += 1 + random.below(3) as u32;
        out.extend_from_slice(&id.to_le_bytes());
        out.extend_from_slice(&(random.below(50) as u16).to_le_bytes());
        out.extend_from_slice(word(random.below(300)).as_bytes());
        out.push(0);
        if random.below(4) == 0 {
            out.extend_from_slice(&random.next().to_le_bytes());
        }
    }
    out.truncate(bytes);
    out
}

/// An expression over a function's variables.
fn expression(random: &mut Random, depth: u32) -> String {
    const LEAVES: [&str; 10] = [
        "a",
        "b",
        "c",
        "t->key",
        "t->size",
        "i",
        "v[i & 15]",
        "limit",
        "17",
        "t->bits",
    ];
    const OPERATORS: [&str; 9] = ["+", "-", "*", "&", "|", "^", "<", ">>", "=="];
    if depth == 0 || random.below(5) == 0 {
        return LEAVES[random.below(10) as usize].to_owned();
    }
    let left = expression(random, depth - 1);
    let right = expression(random, depth - 1);
    match OPERATORS[random.below(9) as usize] {
        ">>" => format!("((unsigned)({left}) >> (({right}) & 15))"),
        operator => format!("(int)((unsigned)({left}) {operator} (unsigned)({right}))"),
    }
}

/// Statements, `depth` deep.
fn statements(out: &mut String, random: &mut Random, depth: u32, function: u32) {
    const TARGETS: [&str; 5] = ["a", "b", "c", "t->size", "v[a & 15]"];
    for _ in 0..2 + random.below(3) {
        let value = expression(random, 2);
        let target = TARGETS[random.below(5) as usize];
        let pad = "  ".repeat(4 - depth as usize);
        let _ = match random.below(if depth == 0 { 3 } else { 7 }) {
            0 | 1 => writeln!(out, "{pad}{target} = {value};"),
            2 if function > 0 => {
                let callee = random.below(u64::from(function));
                writeln!(out, "{pad}{target} += f{callee}(t, {value}, b);")
            }
            2 => writeln!(out, "{pad}{target} ^= {value};"),
            3 => {
                let _ = writeln!(out, "{pad}if ({value}) {{");
                statements(out, random, depth - 1, function);
                let _ = writeln!(out, "{pad}}} else {{");
                statements(out, random, depth - 1, function);
                writeln!(out, "{pad}}}")
            }
            4 => {
                let _ = writeln!(out, "{pad}for (i = 0; i < (limit & 31); i++) {{");
                statements(out, random, depth - 1, function);
                writeln!(out, "{pad}}}")
            }
            5 => {
                let _ = writeln!(out, "{pad}switch (({value}) & 7) {{");
                for case in 0..5 {
                    let value = expression(random, 2);
                    let _ = writeln!(out, "{pad}case {case}: {target} -= {value}; break;");
                }
                writeln!(out, "{pad}default: c++;\n{pad}}}")
            }
            _ => {
                let _ = writeln!(out, "{pad}while (t->next && t->key > {target}) {{");
                let _ = writeln!(out, "{pad}  t = t->next; d = d * 1.5 + t->weight;");
                writeln!(out, "{pad}}}")
            }
        };
    }
}

/// A translation unit in C as the preprocessor leaves it, with so many functions.
pub fn c_source(functions: u32) -> String {
    let mut random = Random::new(0xc0de);
    let mut out = String::from(
        "# 1 \"generated.c\"\n\
         struct node { struct node *next; int key, size; unsigned bits; double weight; char name[16]; };\n\
         extern int limit; int v[16];\n",
    );
    for function in 0..functions {
        let linkage = ["", "static "][random.below(2) as usize];
        let _ = writeln!(
            out,
            "{linkage}int f{function}(struct node *t, int a, int b) {{\n  int c = {function}, i = 0; double d = t->weight;"
        );
        statements(&mut out, &mut random, 3, function);
        let _ = writeln!(out, "  t->weight = d;\n  return a + b * c + i;\n}}");
    }
    let _ = writeln!(out, "int (*const table[])(struct node *, int, int) = {{");
    for function in 0..functions {
        let _ = writeln!(out, "  f{function},");
    }
    out.push_str("};\n");
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inputs_are_as_long_as_asked_and_always_the_same() {
        assert_eq!(text(10_000), text(10_000));
        assert!(text(10_000).len() >= 10_000);
        assert_eq!(binary(9_999).len(), 9_999);
        assert_eq!(c_source(20), c_source(20));
        assert!(c_source(20).contains("f19"));
    }
}
