//! Counts of what a vCPU did, for the account in `docs/performance.md` and for debugging.

/// Event counts of one vCPU.
#[derive(Clone, Default)]
pub struct Stats {
    /// Instructions left to the interpreter.
    pub interpreted: u64,
    /// TLB fills.
    pub fills: u64,
    /// Jumps that missed the jump cache.
    pub jumps: u64,
    /// Blocks linked.
    pub links: u64,
    /// Exceptions delivered.
    pub exceptions: u64,
    /// Guest instructions translated.
    pub translated: u64,
    /// Interpreted instructions by iced mnemonic, when `ANYKVM_JIT_STATS=2`.
    pub mnemonics: Option<Box<[u64; 4096]>>,
    /// The same by address, with the mnemonic.
    pub places: std::collections::HashMap<(u64, u16), u64>,
}

impl Stats {
    /// The mnemonics interpreted most, with their counts.
    pub fn top(&self, n: usize) -> Vec<(iced_x86::Mnemonic, u64)> {
        let Some(m) = &self.mnemonics else {
            return Vec::new();
        };
        let mut all: Vec<_> = iced_x86::Mnemonic::values()
            .map(|k| (k, m[k as usize & 4095]))
            .filter(|e| e.1 > 0)
            .collect();
        all.sort_by_key(|e| std::cmp::Reverse(e.1));
        all.truncate(n);
        all
    }
}

impl std::fmt::Debug for Stats {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "interpreted {}, TLB fills {}, jump misses {}, links {}, exceptions {}, translated {}",
            self.interpreted, self.fills, self.jumps, self.links, self.exceptions, self.translated
        )?;
        for (m, n) in self.top(40) {
            write!(f, "\n  {n:>10} {m:?}")?;
        }
        let mut places: Vec<_> = self.places.iter().collect();
        places.sort_by_key(|e| std::cmp::Reverse(e.1));
        for (&(pc, m), n) in places.into_iter().take(40) {
            let m = iced_x86::Mnemonic::values().nth(usize::from(m));
            write!(f, "\n  {n:>10} {pc:#x} {:?}", m.unwrap_or_default())?;
        }
        Ok(())
    }
}
