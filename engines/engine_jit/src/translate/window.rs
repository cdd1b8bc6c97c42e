//! Accesses through windows: see [`crate::window`].
//!
//! T holds what PDEP made of a base register, for as long as that register changes by constants only, and I
//! the place of the window. Neither touches EFLAGS, and there is no code for a miss: the host faults.

use super::group::Change;
use super::memory::Operands;
use super::*;
use crate::window::REACH;

/// The window that stacks are expected in.
pub(super) const STACK: usize = crate::window::HIGH;

/// What addresses are relative to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Base {
    /// A general register.
    Gpr(u8),
    /// The base of a segment.
    Segment(usize),
    /// The page of the code.
    Code,
}

/// What T holds.
#[derive(Clone, Copy, Debug)]
struct Spread {
    base: Base,
    kind: usize,
    /// What the base has moved by since.
    moved: i64,
    /// It is a host address: the window's place was added.
    resolved: bool,
}

/// What the scratch registers hold between instructions.
#[derive(Default)]
pub(super) struct Scratch {
    spread: Option<Spread>,
    /// I holds the place of this window.
    place: Option<usize>,
    /// The instruction that is emitted has not used them for anything else.
    pub(super) kept: bool,
}

impl Scratch {
    pub(super) fn forget(&mut self) {
        (self.spread, self.place) = (None, None);
    }
}

fn mask(kind: usize) -> i32 {
    off::WINDOW_MASKS + 8 * kind as i32
}

fn place(kind: usize) -> Mem {
    Mem::Gs(off::WINDOW_PLACES + 8 * kind as i32)
}

/// A displacement that may be added behind PDEP.
fn near(disp: i64) -> bool {
    (-REACH / 2..REACH / 2).contains(&disp)
}

impl Tx<'_> {
    /// Notes where the code of an instruction starts, and where the flags are.
    pub(super) fn mark(&mut self, op: &Op) {
        let host = if self.ctx.windows() && self.flags == Flags::Host {
            HOST_FLAGS
        } else {
            0
        };
        self.map.push((self.a.here() as u32, op.off | host));
    }

    /// The window that the operand of an instruction is expected in; `None`: no window.
    pub(super) fn window(&self, op: &Op) -> Option<usize> {
        if !self.ctx.windows() {
            return None;
        }
        match (self.ask.site)(op) {
            Site::Probe => None,
            Site::Window(kind) => Some(kind),
        }
    }

    /// Follows what an instruction has done to the base of what T holds.
    pub(super) fn after_window(&mut self, op: &Op) {
        if !self.scratch.kept {
            self.scratch.forget();
        }
        let Some(Spread {
            base: Base::Gpr(base),
            ..
        }) = self.scratch.spread
        else {
            return;
        };
        let change = self.change(op, base);
        if let Some(s) = &mut self.scratch.spread {
            match change {
                Change::Moves(by) if near(s.moved + by) => s.moved += by,
                _ => self.scratch.spread = None,
            }
        }
    }

    /// Makes T hold what PDEP makes of a base; what the base has moved by since, and whether T is a host address.
    fn spread(&mut self, base: Base, kind: usize) -> (i64, bool) {
        if let Some(s) = self.scratch.spread
            && s.base == base
            && s.kind == kind
        {
            return (s.moved, s.resolved);
        }
        let from = match base {
            Base::Gpr(n) => host(n).unwrap_or_else(|| {
                self.a.load(Size::Q, T, Mem::Gs(gpr_slot(n)));
                T
            }),
            Base::Segment(n) => {
                self.a.load(Size::Q, T, Mem::Gs(seg_base(n)));
                T
            }
            Base::Code => {
                self.a.load(Size::Q, T, Mem::Gs(off::PC_BASE));
                T
            }
        };
        self.a.pdep(T, from, mask(kind));
        self.scratch.spread = Some(Spread {
            base,
            kind,
            moved: 0,
            resolved: false,
        });
        (0, false)
    }

    /// Makes I hold the place of a window.
    fn placed(&mut self, kind: usize) {
        if self.scratch.place != Some(kind) {
            self.a.load(Size::Q, I, place(kind));
            self.scratch.place = Some(kind);
        }
    }

    /// The memory `disp` bytes from a base.
    pub(super) fn through(&mut self, base: Base, disp: i32, kind: usize) -> Mem {
        let (moved, resolved) = self.spread(base, kind);
        let disp = disp + moved as i32;
        if resolved {
            return at(T, disp);
        }
        self.placed(kind);
        Mem::Sib(Some(I), Some((T, 0)), disp)
    }

    /// The same with I free to be used.
    pub(super) fn resolved(&mut self, base: Base, disp: i32, kind: usize) -> Mem {
        let (moved, resolved) = self.spread(base, kind);
        if !resolved {
            self.placed(kind);
            self.a.lea(T, Mem::Sib(Some(I), Some((T, 0)), 0));
            if let Some(s) = &mut self.scratch.spread {
                s.resolved = true;
            }
        }
        self.scratch.place = None;
        at(T, disp + moved as i32)
    }

    /// The base of an operand that has one, and the displacement.
    fn base_of(&self, insn: &Instruction) -> Option<(Base, i32)> {
        let segment = (insn.memory_segment() as usize).wrapping_sub(Register::ES as usize);
        let (b, x) = (insn.memory_base(), insn.memory_index());
        let disp = insn.memory_displacement64() as i64;
        if x != Register::None || !near(disp) {
            return None;
        }
        let disp = disp as i32;
        match (b, segment >= 4) {
            (Register::RIP, false) => Some((Base::Code, disp)),
            (Register::None, true) => Some((Base::Segment(segment), disp)),
            (b, false) if b.is_gpr64() => Some((Base::Gpr(number(b)), disp)),
            _ => None,
        }
    }

    /// The memory operand of an instruction. Keeps flags.
    pub(super) fn window_operand(&mut self, insn: &Instruction, kind: usize) -> Mem {
        if let Some((base, disp)) = self.base_of(insn) {
            return self.through(base, disp, kind);
        }
        self.scratch.forget();
        self.address_parts(insn, T);
        let n = (insn.memory_segment() as usize).wrapping_sub(Register::ES as usize);
        if n >= 4 {
            self.a.load(Size::Q, I, Mem::Gs(seg_base(n)));
            self.a.lea(T, Mem::Sib(Some(T), Some((I, 0)), 0));
        }
        self.a.pdep(T, T, mask(kind));
        self.placed(kind);
        Mem::Sib(Some(I), Some((T, 0)), 0)
    }

    /// A copied instruction with its memory operand in a window.
    pub(super) fn native_in_window(&mut self, op: &Op, o: &Operands, kind: usize) {
        let mut enc = o.enc;
        let flags = self.flags;
        if o.needs != 0 {
            self.restore_flags(op.live_before, false);
        }
        let mut operand = self.window_operand(&op.insn, kind);
        let mut kept = true;
        if let Some(s) = o.slots.first() {
            if let Mem::Sib(Some(I), Some((T, 0)), disp) = operand {
                self.a.lea(T, Mem::Sib(Some(I), Some((T, 0)), 0));
                match &mut self.scratch.spread {
                    Some(s) => s.resolved = true,
                    None => kept = false,
                }
                operand = at(T, disp);
            }
            self.scratch.place = None;
            if s.read {
                self.a.load(Size::Q, I, Mem::Gs(gpr_slot(s.guest)));
            }
            for &f in &s.fields {
                enc.set_register(f, I);
            }
        }
        enc.set_memory(match operand {
            Mem::Sib(Some(base), Some((index, _)), disp) => {
                if disp == 0 {
                    HostMem::BaseIndex(base, index)
                } else {
                    HostMem::BaseIndexDisp(base, index, disp)
                }
            }
            Mem::Sib(Some(base), None, disp) => HostMem::BaseDisp(base, disp),
            // No other form is made.
            Mem::Sib(..) | Mem::Gs(_) | Mem::GsBase(..) | Mem::GsIndex(..) => {
                HostMem::BaseDisp(T, 0)
            }
        });
        if flags != self.flags {
            self.mark(op);
        }
        self.emit(op, &enc);
        if let Some(s) = o.slots.first()
            && s.write
        {
            self.a.store(Size::Q, Mem::Gs(gpr_slot(s.guest)), I);
        }
        if op.modifies != 0 {
            self.flags = Flags::Host;
        }
        self.scratch.kept = kept;
    }

    pub(super) fn push_in_window(&mut self, op: &Op) {
        let (size, n) = Self::stack_size(&op.insn);
        let stack = Base::Gpr(4);
        if op.insn.op0_kind() == OpKind::Register {
            let guest = number(op.insn.op0_register());
            match host(guest) {
                Some(h) => {
                    let to = self.through(stack, -n, STACK);
                    self.a.store(size, to, h);
                }
                None => {
                    let to = self.resolved(stack, -n, STACK);
                    self.a.load(Size::Q, I, Mem::Gs(gpr_slot(guest)));
                    self.a.store(size, to, I);
                }
            }
        } else {
            let to = self.through(stack, -n, STACK);
            self.a.store_imm(size, to, op.insn.immediate(0) as i32);
        }
        self.move_stack(-n);
        self.scratch.kept = size == Size::Q;
    }

    pub(super) fn pop_in_window(&mut self, op: &Op) {
        let (size, n) = Self::stack_size(&op.insn);
        let guest = number(op.insn.op0_register());
        let from = self.through(Base::Gpr(4), 0, STACK);
        match host(guest) {
            Some(h) if size == Size::W => {
                self.a.op_mem(Size::W, &[0x8b], h, from);
                self.move_stack(n);
            }
            Some(GUEST_RSP) => self.a.load(size, GUEST_RSP, from),
            Some(h) => {
                self.a.load(size, h, from);
                self.move_stack(n);
            }
            None => {
                self.a.load(size, I, from);
                self.scratch.place = None;
                self.a.store(Size::Q, Mem::Gs(gpr_slot(guest)), I);
                self.move_stack(n);
            }
        }
        self.scratch.kept = size == Size::Q && guest != 4;
    }
}
