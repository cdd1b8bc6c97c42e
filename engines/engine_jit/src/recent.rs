//! Instructions that were interpreted lately, decoded.
//!
//! Translated code leaves the same few instructions to the interpreter again and again: SYSCALL, IRET, moves to
//! control registers. Their bytes are known, so neither fetching nor decoding them need be repeated.

use iced_x86::Instruction;
use x86emu::interp::decode;
use x86emu::state::CodeSize;

const ENTRIES: usize = 256;
const MAX_LEN: usize = 15;

#[derive(Clone, Copy)]
struct Entry {
    rip: u64,
    mode: CodeSize,
    len: u8,
    bytes: [u8; MAX_LEN],
    insn: Instruction,
}

/// See the module's description.
pub struct Recent(Vec<Option<Entry>>);

impl Default for Recent {
    fn default() -> Self {
        Recent(vec![None; ENTRIES])
    }
}

impl Recent {
    /// The instruction that `bytes` are at `rip`; `None` if they are none. `amd`: see [`decode`].
    pub fn get(
        &mut self,
        mode: CodeSize,
        rip: u64,
        bytes: &[u8],
        amd: bool,
    ) -> Option<Instruction> {
        let entry = self.0.get_mut((rip ^ rip >> 8) as usize % ENTRIES)?;
        if let Some(e) = entry
            && e.rip == rip
            && e.mode == mode
            && e.bytes.get(..e.len.into()) == Some(bytes)
        {
            return Some(e.insn);
        }
        let mut e = Entry {
            rip,
            mode,
            len: bytes.len() as u8,
            bytes: [0; MAX_LEN],
            insn: decode(mode, bytes, rip, amd).ok()?,
        };
        e.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        *entry = Some(e);
        (e.insn.len() == bytes.len()).then_some(e.insn)
    }
}
