//! Which arithmetic flags are live where: only those must survive a TLB probe.

use crate::context::Context;
use crate::frontend::{ARITH, Kind, Op, bits, immediate, op_of};
use iced_x86::{Decoder, DecoderError, DecoderOptions, FlowControl};

/// Computes liveness backwards; returns what is live on entry.
pub fn backwards(
    ops: &mut [Op],
    page: &[u8],
    ctx: Context,
    end: usize,
    closed: bool,
    seen: &mut Seen,
) -> u32 {
    let mut live = if closed || end >= 4096 {
        ARITH
    } else {
        peek(page, end as i64, ctx, seen)
    };
    for o in ops.iter_mut().rev() {
        match o.kind {
            Kind::Jcc(_, target) => {
                o.live_target = peek(page, target, ctx, seen);
                o.live_after = live;
                live |= o.live_target | o.reads;
            }
            Kind::SetAc(_) => {
                o.live_target = peek(page, i64::from(o.off) + o.insn.len() as i64, ctx, seen);
                o.live_after = o.live_target;
                live = o.live_target;
            }
            Kind::Jmp(target) | Kind::Call(target) => {
                o.live_target = peek(page, target, ctx, seen);
                o.live_after = o.live_target;
                live = o.live_target;
            }
            _ => {
                o.live_after = live;
                live = live & !o.kills | o.reads;
            }
        }
        o.live_before = live;
    }
    live
}

/// Flags live at offset `at` of the page, by a short look ahead; all of them outside the page. Notes `at`
/// as crossing if the instruction there reaches into the next page.
fn peek(page: &[u8], at: i64, ctx: Context, seen: &mut Seen) -> u32 {
    let Ok(mut at) = usize::try_from(at) else {
        return ARITH;
    };
    if at >= 4096 {
        return ARITH;
    }
    let mut undecided = ARITH;
    let mut live = 0;
    let start = at;
    let mut from = at;
    let mut decoder = Decoder::with_ip(bits(ctx), &page[at..], at as u64, DecoderOptions::NONE);
    for _ in 0..8 {
        let insn = decoder.decode();
        if insn.is_invalid() {
            if at == start && decoder.last_error() == DecoderError::NoMoreBytes {
                seen.crossing.push(at as u16);
            }
            break;
        }
        let o = op_of(&insn, &page[at..at + insn.len()], at as u16, ctx);
        live |= o.reads & undecided;
        let stop = insn.flow_control() != FlowControl::Next;
        if !stop {
            undecided &= !o.kills;
        }
        seen.lines |= crate::cache::lines_of(at, insn.len());
        at += insn.len();
        if let Some((_, len)) = immediate(&o) {
            seen.add(from, at - usize::from(len));
            from = at;
        }
        if stop || undecided == 0 || at >= 4096 {
            break;
        }
    }
    seen.add(from, at);
    live | undecided
}

/// What looking ahead has looked at.
pub struct Seen {
    /// Lines of the page.
    pub lines: u64,
    /// Starts and ends of what the result depends on.
    pub ranges: Vec<(u16, u16)>,
    /// Targets whose instruction reaches into the next page.
    pub crossing: Vec<u16>,
}

impl Seen {
    fn add(&mut self, start: usize, end: usize) {
        if start < end {
            self.ranges.push((start as u16, end.min(4096) as u16));
        }
    }
}
