//! What profilers are told about emitted code: the map that `perf` reads (`ANYKVM_PERF_MAP=1`) and the
//! table that `bench hot` reads (`ANYKVM_JIT_BLOCKS=FILE`). Nothing is written unless one is asked for.

use crate::block::Translation;
use crate::stubs::Stubs;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Whether `perf`'s map is asked for. Then code must lie in memory that `perf` takes for anonymous.
pub fn map_wanted() -> bool {
    std::env::var_os("ANYKVM_PERF_MAP").is_some_and(|value| value != "0")
}

/// The files that one virtual machine's code is written to.
pub struct Log {
    map: Option<File>,
    table: Option<File>,
}

/// The guest's side of a block.
pub struct Source<'a> {
    /// Linear address at its first translation; others may share the block.
    pub linear: u64,
    /// In user mode.
    pub user: bool,
    /// Code size in bits.
    pub bits: u32,
    /// Its instructions.
    pub bytes: &'a [u8],
}

impl Log {
    /// The log that the environment asks for, begun with the stubs, which end at `end`.
    pub fn from_environment(stubs: &Stubs, end: u64) -> Option<Box<Self>> {
        static CREATED: AtomicBool = AtomicBool::new(false);
        let map =
            map_wanted().then(|| PathBuf::from(format!("/tmp/perf-{}.map", std::process::id())));
        let table = std::env::var_os("ANYKVM_JIT_BLOCKS").map(PathBuf::from);
        if map.is_none() && table.is_none() {
            return None;
        }
        // The first virtual machine of the process makes the files, the next ones go on.
        let first = !CREATED.swap(true, Ordering::SeqCst);
        let open = |path: PathBuf| {
            open(&path, first)
                .inspect_err(|e| log::warn!("engine_jit: cannot write {}: {e}", path.display()))
                .ok()
        };
        let mut log = Box::new(Self {
            map: map.and_then(open),
            table: table.and_then(open),
        });
        log.stubs(stubs, end);
        Some(log)
    }

    fn stubs(&mut self, stubs: &Stubs, end: u64) {
        let mut all = vec![
            (stubs.enter, "enter"),
            (stubs.link, "link"),
            (stubs.jump, "jump"),
            (stubs.jump_from, "jump_from"),
            (stubs.astray[0], "returns astray"),
            (stubs.empty, "empty"),
            (stubs.memory, "memory"),
            (stubs.interpret, "interpret"),
            (stubs.poll, "poll"),
            (stubs.dead, "dead"),
            (stubs.fault, "fault"),
            (stubs.miss[0].fill[0], "miss"),
            (stubs.commit, "commit"),
            (stubs.load_fpu, "load_fpu"),
        ];
        all.extend(
            stubs
                .cross
                .iter()
                .flatten()
                .flatten()
                .map(|&at| (at, "cross")),
        );
        all.extend(stubs.refill.iter().flatten().map(|&at| (at, "refill")));
        all.sort_unstable();
        let ends = all.iter().skip(1).map(|next| next.0).chain([end]);
        let mut text = String::new();
        for (&(at, name), end) in all.iter().zip(ends) {
            let _ = writeln!(text, "{at:x} {:x} stub:{name}", end.saturating_sub(at));
        }
        append(&mut self.map, &text);
        append(&mut self.table, &text);
    }

    /// Writes a block down. `code` is what was emitted; links are patched into it later.
    pub fn block(&mut self, block: &Translation, source: &Source<'_>, code: &[u8]) {
        let mode = if source.user { "user" } else { "kernel" };
        let head = format!(
            "{:x} {:x} guest:{mode}:{:#x}:phys:{:#x}",
            block.indirect,
            code.len(),
            source.linear,
            block.phys
        );
        append(&mut self.map, &format!("{head}\n"));
        if self.table.is_some() {
            let mut line = format!("{head} {} ", source.bits);
            hex(&mut line, source.bytes);
            line.push(' ');
            let start = block.phys & 0xfff;
            for &(host, guest) in &block.map {
                let offset = u64::from(guest & crate::translate::OFFSET);
                let _ = write!(line, "{host:x}:{:x},", offset.wrapping_sub(start));
            }
            line.push(' ');
            hex(&mut line, code);
            line.push('\n');
            append(&mut self.table, &line);
        }
    }
}

fn hex(text: &mut String, bytes: &[u8]) {
    for byte in bytes {
        for digit in [byte >> 4, byte & 15] {
            text.push(char::from(b"0123456789abcdef"[usize::from(digit)]));
        }
    }
}

/// Gives a file up that can no longer be written.
fn append(file: &mut Option<File>, text: &str) {
    if let Some(open) = file
        && let Err(e) = open.write_all(text.as_bytes())
    {
        log::warn!("engine_jit: the profiler's map is cut short: {e}");
        *file = None;
    }
}

/// A `new` file takes the place of what was there: /tmp may hold somebody else's link by that name.
fn open(path: &Path, new: bool) -> std::io::Result<File> {
    let mut options = File::options();
    options.append(true);
    if new {
        match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e),
            _ => options.create_new(true),
        };
    }
    options.open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_one_line_of_the_table() {
        let path = std::env::temp_dir().join(format!("anykvm-blocks-{}", std::process::id()));
        let mut log = Log {
            map: None,
            table: Some(open(&path, true).unwrap()),
        };
        let block = Translation {
            phys: 0x1ff0,
            ctx: 0,
            indirect: 0x7000,
            direct: 0,
            direct_fpu: 0,
            len: 2,
            live_in: false,
            fpu: false,
            lines: 0,
            second: None,
            stop: 0x10,
            imms: Vec::new(),
            peeked: Vec::new(),
            map: vec![(0, 0xff0), (1, 0xff1)],
        };
        let source = Source {
            linear: 0x40_0ff0,
            user: true,
            bits: 64,
            bytes: &[0x90, 0xc3],
        };
        log.block(&block, &source, &[0x90, 0xcc]);
        let text = std::fs::read_to_string(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert_eq!(
            text,
            "7000 2 guest:user:0x400ff0:phys:0x1ff0 64 90c3 0:0,1:1, 90cc\n"
        );
    }
}
