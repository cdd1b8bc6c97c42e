//! Accesses through windows: see [`crate::window`].
//!
//! I holds the place of the window. A base register is checked once, for as long as it changes by
//! constants only; if the host holds it, it is the base of the host's operand too. Everything else is loaded or computed in T, which is
//! kept likewise, and checked; what is relative to the code needs no check, as its page was looked at when it was entered. Nothing touches
//! EFLAGS, and there is no code for a miss: the host faults.

use super::group::Change;
use super::memory::Operands;
use super::*;
use crate::window::{EITHER, HIGH, REACH};

/// How far RSP may be from the high window where a block starts and ends.
const STACK_SLACK: i64 = 1 << 16;

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

/// What T holds: a base that was checked.
#[derive(Clone, Copy, Debug)]
struct Loaded {
    base: Base,
    kind: usize,
    /// What the base has moved by since.
    moved: i64,
    /// It is a host address: the window's place was added.
    resolved: bool,
}

/// What is known between instructions.
#[derive(Default)]
pub(super) struct Scratch {
    loaded: Option<Loaded>,
    /// I holds the place of this window.
    place: Option<usize>,
    /// The instruction that is emitted has not used the scratch registers for anything else.
    pub(super) kept: bool,
    /// What was checked, by window: guest registers and, from bit 16 on, bases of segments.
    checked: [u32; 2],
    /// What they have moved by since.
    moved: [i32; 16],
    /// How far what RSP was checked as may have been from the high window.
    slack: i64,
}

impl Scratch {
    /// T is used for something else.
    pub(super) fn lose_base(&mut self) {
        self.loaded = None;
    }

    /// I is used for something else.
    pub(super) fn lose_place(&mut self) {
        self.place = None;
    }

    /// At the taken target of a branch, behind the block.
    pub(super) fn at_branch(&mut self) {
        (self.loaded, self.place) = (None, Some(HIGH));
    }

    /// T and I are used for something else.
    pub(super) fn forget(&mut self) {
        (self.loaded, self.place) = (None, None);
    }
}

/// What a place has too much.
const BIAS: i32 = crate::window::SHIFT as i32;

fn place(kind: usize) -> Mem {
    Mem::Gs(off::WINDOW_PLACES + 8 * kind as i32)
}

/// What may be added to an address that was checked.
fn near(disp: i64) -> bool {
    (-REACH / 2..REACH / 2).contains(&disp)
}

impl Tx<'_> {
    /// What is known where a block starts.
    pub(super) fn start_scratch(&mut self) {
        if self.ctx.stack_in_window() {
            self.scratch.checked[HIGH] |= 1 << 4;
            self.scratch.slack = STACK_SLACK;
        }
    }

    /// The window that the stack is expected in, for an instruction that uses it.
    pub(super) fn stack_window(&self, op: &Op) -> usize {
        match self.window(op) {
            Some(kind) if !self.ctx.stack_in_window() => kind,
            _ => HIGH,
        }
    }

    /// RSP is as near to the high window as other blocks count on.
    fn stack_settled(&self) -> bool {
        let s = &self.scratch;
        !self.ctx.stack_in_window()
            || s.checked[HIGH] & 1 << 4 != 0 && s.slack + i64::from(s.moved[4]).abs() <= STACK_SLACK
    }

    /// Before the block is left, for which nothing but page offset `offset` remains to be done: makes sure that RSP is
    /// near the high window. Keeps flags; clobbers T. What faults here goes on at that offset with the interpreter.
    pub(super) fn settle_stack(&mut self, offset: u16) {
        if self.stack_settled() {
            return;
        }
        let host = if self.flags == Flags::Host {
            HOST_FLAGS
        } else {
            0
        };
        self.map.push((self.a.here() as u32, offset | host));
        self.scratch.checked[HIGH] &= !(1 << 4);
        self.checked(4, GUEST_RSP, 0, HIGH);
    }

    /// The same before a call or return that does not go through a window, of which nothing was done yet: it moves RSP a
    /// bit further.
    pub(super) fn settle_probed(&mut self, op: &Op) {
        if self.ctx.stack_in_window() && self.window(op).is_none() {
            self.scratch.checked[HIGH] &= !(1 << 4);
            self.settle_stack(op.off);
        }
    }

    /// What an instruction that accesses the stack through a window, whatever its operands, tells about RSP: the
    /// displacement of what it has accessed from RSP as it is now.
    fn touched_stack(&self, op: &Op) -> Option<i64> {
        use iced_x86::Mnemonic as M;
        let insn = &op.insn;
        if self.window(op) != Some(HIGH) {
            return None;
        }
        match op.kind {
            Kind::Push if insn.op0_kind() != OpKind::Memory => Some(0),
            Kind::Pop => Some(-i64::from(Self::stack_size(insn).1)),
            Kind::Native => {
                let always = matches!(
                    insn.mnemonic(),
                    M::Mov
                        | M::Movzx
                        | M::Movsx
                        | M::Movsxd
                        | M::Add
                        | M::Sub
                        | M::And
                        | M::Or
                        | M::Xor
                        | M::Cmp
                        | M::Test
                        | M::Movups
                        | M::Movaps
                        | M::Movdqu
                        | M::Movdqa
                        | M::Movsd
                        | M::Movss
                        | M::Movq
                );
                let has = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory);
                let own = insn.op0_kind() == OpKind::Register
                    && number(insn.op0_register()) == 4
                    && insn.op0_register().is_gpr();
                (always && has && !own && insn.memory_base() == Register::RSP)
                    .then(|| self.base_of(insn))
                    .flatten()
                    .map(|(_, disp)| i64::from(disp))
            }
            _ => None,
        }
    }

    /// Notes where the code of an instruction starts, and where the flags are.
    pub(super) fn mark(&mut self, op: &Op) {
        self.mark_with(op, 0);
    }

    /// The same with another bit.
    pub(super) fn mark_with(&mut self, op: &Op, bit: u16) {
        let host = if self.ctx.windows() && self.flags == Flags::Host {
            HOST_FLAGS
        } else {
            0
        };
        self.map.push((self.a.here() as u32, op.off | host | bit));
    }

    /// The window that the operand of an instruction is expected in; `None`: no window.
    pub(super) fn window(&self, op: &Op) -> Option<usize> {
        if !self.ctx.windows() {
            return None;
        }
        match (self.ask.site)(op) {
            Site::Probe => None,
            Site::Window(EITHER) => {
                let far = op.insn.op0_kind() == OpKind::Memory && self.ctx.stack_in_window();
                let branch = matches!(op.kind, Kind::JmpIndirect | Kind::CallIndirect) && far;
                (op.kind == Kind::Native || branch).then_some(EITHER)
            }
            Site::Window(kind) => Some(kind),
        }
    }

    /// Follows what an instruction has done to what is known.
    pub(super) fn after_window(&mut self, op: &Op) {
        if !self.scratch.kept {
            self.scratch.forget();
        }
        if self.scratch.checked != [0; 2] {
            self.follow_checked(op);
        }
        let Some(Loaded {
            base: Base::Gpr(base),
            ..
        }) = self.scratch.loaded
        else {
            return;
        };
        let change = self.change(op, base);
        if let Some(s) = &mut self.scratch.loaded {
            match change {
                Change::Moves(by) if near(s.moved + by) => s.moved += by,
                _ => self.scratch.loaded = None,
            }
        }
    }

    /// Follows what an instruction has done to registers that were checked.
    fn follow_checked(&mut self, op: &Op) {
        self.follow_registers(op);
        // What the interpreter has done instead tells nothing about windows, and keeps nothing.
        if self.scratch.kept
            && self.scratch.checked[HIGH] & 1 << 4 != 0
            && let Some(disp) = self.touched_stack(op)
        {
            self.scratch.moved[4] = -disp as i32;
            self.scratch.slack = 0;
        }
    }

    fn follow_registers(&mut self, op: &Op) {
        let insn = &op.insn;
        let forget = |s: &mut Scratch, mask: u32| s.checked = s.checked.map(|c| c & !mask);
        let shift = |s: &mut Scratch, n: u8, by: i64| {
            let to = i64::from(s.moved[usize::from(n)]) + by;
            let margin = if n == 4 { STACK_SLACK } else { 0 };
            if near(to - margin) && near(to + margin) {
                s.moved[usize::from(n)] = to as i32;
            } else {
                s.checked = s.checked.map(|c| c & !(1 << n));
            }
        };
        match op.kind {
            Kind::Nop | Kind::Jcc(..) => return,
            Kind::Push => return shift(&mut self.scratch, 4, -i64::from(Self::stack_size(insn).1)),
            Kind::Pop => {
                shift(&mut self.scratch, 4, i64::from(Self::stack_size(insn).1));
                let to = number(insn.op0_register());
                return forget(&mut self.scratch, 1 << to);
            }
            Kind::Leave if self.stack_window(op) == HIGH => {
                forget(&mut self.scratch, u32::MAX);
                if self.window(op).is_some() {
                    // RSP is behind what was loaded.
                    self.scratch.checked[HIGH] |= 1 << 4;
                    (self.scratch.moved[4], self.scratch.slack) = (8, 0);
                }
                return;
            }
            Kind::Native | Kind::Lea => {}
            _ => return forget(&mut self.scratch, u32::MAX),
        }
        use iced_x86::Mnemonic as M;
        let wide = |i: u32| insn.op_kind(i) == OpKind::Register && insn.op_register(i).is_gpr64();
        let to = if insn.op_count() > 0 && wide(0) {
            number(insn.op0_register()) & 15
        } else {
            16
        };
        if to < 16 {
            let constant = matches!(
                insn.op1_kind(),
                OpKind::Immediate8to64 | OpKind::Immediate32to64
            );
            let from = match (op.kind, insn.mnemonic()) {
                (_, M::Cmp | M::Test) => return,
                (Kind::Lea, _) if insn.memory_index() == Register::None => {
                    let base = insn.memory_base();
                    let by = insn.memory_displacement64() as i64;
                    base.is_gpr64().then(|| (number(base) & 15, by))
                }
                (_, M::Add) if constant => Some((to, insn.immediate(1) as i64)),
                (_, M::Sub) if constant => Some((to, (insn.immediate(1) as i64).wrapping_neg())),
                (_, M::Mov) if wide(1) => Some((number(insn.op1_register()) & 15, 0)),
                _ => None,
            };
            if let Some((from, by)) = from {
                let s = &mut self.scratch;
                if from == 4 && to != 4 && s.slack != 0 {
                    return forget(s, 1 << to);
                }
                for c in &mut s.checked {
                    *c = *c & !(1 << to) | (*c >> from & 1) << to;
                }
                s.moved[usize::from(to)] = s.moved[usize::from(from)];
                if to == 4 && from != 4 {
                    s.slack = 0;
                }
                if near(by) {
                    shift(s, to, by);
                } else {
                    forget(s, 1 << to);
                }
                return;
            }
        }
        let info = self.info.info(insn);
        for u in info.used_registers() {
            let r = u.register();
            if r.is_gpr() && !matches!(u.access(), OpAccess::Read | OpAccess::CondRead) {
                forget(&mut self.scratch, 1 << (number(r) & 15));
            }
        }
    }

    /// The memory `disp` bytes from a register that the host holds, checked. Clobbers T if it has to be.
    fn checked(&mut self, guest: u8, reg: u8, disp: i32, kind: usize) -> Mem {
        self.placed(kind);
        let bit = 1u32 << guest;
        if self.scratch.checked[kind] & bit == 0 {
            self.held[0] = None;
            self.a.shrx(T, reg, I);
            let check = Mem::GsIndex(T, crate::window::CHECKS[kind]);
            self.a.load(Size::D, T, check);
            self.scratch.loaded = None;
            // What it has moved by counts from here: it holds for one window only.
            self.scratch.checked[1 - kind] &= !bit;
            self.scratch.checked[kind] |= bit;
            self.scratch.moved[usize::from(guest)] = 0;
            if guest == 4 {
                self.scratch.slack = 0;
            }
        }
        Mem::Sib(Some(reg), Some((I, 0)), disp - BIAS)
    }

    /// Makes T hold a base, checked; what the base has moved by since, and whether T is a host address.
    fn load_base(&mut self, base: Base, kind: usize) -> (i64, bool) {
        if let Some(l) = self.scratch.loaded
            && l.base == base
            && l.kind == kind
        {
            return (l.moved, l.resolved);
        }
        self.held[0] = None;
        let resolved = base == Base::Code;
        if resolved {
            let page = crate::far::page_host(self.ask.page);
            self.a.load(Size::Q, T, page);
        } else {
            self.load_checked(base, kind);
        }
        self.scratch.loaded = Some(Loaded {
            base,
            kind,
            moved: 0,
            resolved,
        });
        (0, resolved)
    }

    /// Makes T hold a base that is in memory, checked.
    fn load_checked(&mut self, base: Base, kind: usize) {
        let (from, bit) = match base {
            Base::Gpr(n) => (Mem::Gs(gpr_slot(n)), 1 << n),
            Base::Segment(n) => (Mem::Gs(seg_base(n)), 1 << (16 + n)),
            Base::Code => return,
        };
        if self.scratch.checked[kind] & bit == 0 {
            self.placed(kind);
            self.a.load(Size::Q, T, from);
            self.check(kind);
            self.scratch.checked[1 - kind] &= !bit;
            self.scratch.checked[kind] |= bit;
            if let Base::Gpr(n) = base {
                self.scratch.moved[usize::from(n)] = 0;
            }
        }
        self.a.load(Size::Q, T, from);
    }

    /// Checks the address in T, which is lost. I holds a window's place.
    fn check(&mut self, kind: usize) {
        self.a.shrx(T, T, I);
        let check = Mem::GsIndex(T, crate::window::CHECKS[kind]);
        self.a.load(Size::D, T, check);
    }

    /// Makes I hold the place of a window.
    pub(super) fn placed(&mut self, kind: usize) {
        if self.scratch.place != Some(kind) {
            self.a.load(Size::Q, I, place(kind));
            self.held[1] = None;
            self.scratch.place = Some(kind);
        }
    }

    /// The memory `disp` bytes from a base.
    pub(super) fn through(&mut self, base: Base, disp: i32, kind: usize) -> Mem {
        if kind == EITHER {
            return self.through_either(base, disp);
        }
        if let Base::Gpr(n) = base
            && let Some(reg) = host(n)
        {
            return self.checked(n, reg, disp, kind);
        }
        let (moved, resolved) = self.load_base(base, kind);
        let disp = disp + moved as i32;
        if resolved {
            return at(T, disp);
        }
        self.placed(kind);
        Mem::Sib(Some(I), Some((T, 0)), disp - BIAS)
    }

    /// The same, in whichever window it lies: its check gives the place.
    fn through_either(&mut self, base: Base, disp: i32) -> Mem {
        let in_host = match base {
            Base::Gpr(n) => host(n).map(|reg| (n, reg)),
            Base::Code => return self.through(base, disp, HIGH),
            Base::Segment(_) => None,
        };
        if let Some((n, reg)) = in_host
            && self.scratch.checked[HIGH] & 1 << n != 0
        {
            return self.checked(n, reg, disp, HIGH);
        }
        let known = self
            .scratch
            .loaded
            .filter(|l| l.base == base && l.kind == EITHER);
        let moved = known.map_or(0, |l| l.moved as i32);
        if known.is_none() {
            self.held[0] = None;
            self.some_place();
            match (in_host, base) {
                (Some((_, reg)), _) => {
                    self.a.shrx(T, reg, I);
                    let word = Mem::GsIndex(T, crate::window::CHECKS[EITHER]);
                    self.a.load(Size::Q, T, word);
                }
                (None, Base::Gpr(n)) => {
                    self.a.load(Size::Q, T, Mem::Gs(gpr_slot(n)));
                    self.place_of_t();
                }
                (None, Base::Segment(n)) => {
                    self.a.load(Size::Q, T, Mem::Gs(seg_base(n)));
                    self.place_of_t();
                }
                // Dealt with above.
                (None, Base::Code) => {}
            }
            if in_host.is_none() {
                self.a.lea(T, Mem::Sib(Some(I), Some((T, 0)), -BIAS));
            }
            self.scratch.loaded = Some(Loaded {
                base,
                kind: EITHER,
                moved: 0,
                resolved: in_host.is_none(),
            });
        }
        match in_host {
            Some((_, reg)) => Mem::Sib(Some(reg), Some((T, 0)), disp - BIAS),
            None => at(T, disp + moved),
        }
    }

    /// Makes I hold the place of some window: any has the shift.
    fn some_place(&mut self) {
        if self.scratch.place.is_none() {
            self.placed(HIGH);
        }
    }

    /// Checks the address in T and makes I hold the place of its window, which is not known.
    fn place_of_t(&mut self) {
        self.a.shrx(I, T, I);
        let word = Mem::GsIndex(I, crate::window::CHECKS[EITHER]);
        self.a.load(Size::Q, I, word);
        self.scratch.lose_place();
        self.held[1] = None;
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
        // The address is computed a second time behind its check: an access that waits for no check is worth it.
        let n = (insn.memory_segment() as usize).wrapping_sub(Register::ES as usize);
        let in_host = |r: Register| r.is_gpr() && host(number(r)).is_some();
        let simple = n < 4
            && [insn.memory_base(), insn.memory_index()]
                .into_iter()
                .all(|r| r == Register::None || in_host(r));
        self.scratch.lose_base();
        self.held = [None; 2];
        if kind != EITHER && simple {
            self.placed(kind);
            self.address_parts(insn, T);
            self.check(kind);
            self.address_parts(insn, T);
            return Mem::Sib(Some(I), Some((T, 0)), -BIAS);
        }
        if simple {
            self.some_place();
        }
        self.address_parts(insn, T);
        if n >= 4 {
            self.a.load(Size::Q, I, Mem::Gs(seg_base(n)));
            self.a.lea(T, Mem::Sib(Some(T), Some((I, 0)), 0));
        }
        if !simple {
            self.scratch.lose_place();
            self.some_place();
        }
        if kind == EITHER {
            self.place_of_t();
        } else {
            self.a.shrx(I, T, I);
            let check = Mem::GsIndex(I, crate::window::CHECKS[kind]);
            self.a.load(Size::D, I, check);
            self.a.load(Size::Q, I, place(kind));
            self.scratch.place = Some(kind);
        }
        Mem::Sib(Some(I), Some((T, 0)), -BIAS)
    }

    /// A copied instruction with its memory operand in a window.
    pub(super) fn native_in_window(&mut self, op: &Op, o: &Operands, kind: usize) {
        self.held = self.held_before;
        let mut enc = o.enc;
        let flags = self.flags;
        if o.needs != 0 {
            self.restore_flags(op.live_before, false);
        }
        if flags != self.flags {
            self.mark(op);
        }
        let mut operand = self.window_operand(&op.insn, kind);
        if o.borrows {
            self.borrowing(op, enc, operand);
            if op.modifies != 0 {
                self.flags = Flags::Host;
            }
            self.scratch.kept = true;
            return;
        }
        let mut kept = true;
        // The scratch register that the address does not need.
        let mut free = T;
        if let Some(s) = o.slots.first() {
            if let Mem::Sib(Some(I), Some((T, 0)), disp) = operand {
                self.a.lea(T, Mem::Sib(Some(I), Some((T, 0)), -BIAS));
                self.held[0] = None;
                match &mut self.scratch.loaded {
                    Some(s) => s.resolved = true,
                    None => kept = false,
                }
                operand = at(T, disp + BIAS);
            }
            if matches!(
                operand,
                Mem::Sib(Some(T), None, _) | Mem::Sib(_, Some((T, _)), _)
            ) {
                free = I;
                self.scratch.place = None;
            } else {
                self.scratch.loaded = None;
            }
            if s.read && self.held[usize::from(free == I)] != Some(s.guest) {
                self.a.load(Size::Q, free, Mem::Gs(gpr_slot(s.guest)));
            }
            self.held = [None; 2];
            for &f in &s.fields {
                enc.set_register(f, free);
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
        self.emit(op, &enc);
        if let Some(s) = o.slots.first()
            && s.write
        {
            self.a.store(Size::Q, Mem::Gs(gpr_slot(s.guest)), free);
        }
        if let Some(s) = o.slots.first() {
            self.held[usize::from(free == I)] = Some(s.guest);
        }
        if op.modifies != 0 {
            self.flags = Flags::Host;
        }
        self.scratch.kept = kept;
    }

    /// The end of a run of pushes, or pops, through a window that starts with instruction `first`, if there is more
    /// than one.
    pub(super) fn stack_run(&self, first: usize) -> Option<usize> {
        let block = self.block;
        if !self.ctx.windows() || block.apart {
            return None;
        }
        let start = block.ops.get(first)?;
        let belongs = |op: &&Op| {
            let insn = &op.insn;
            let of_stack = match op.kind {
                Kind::Push => insn.op0_kind() != OpKind::Memory,
                Kind::Pop => true,
                _ => false,
            };
            of_stack
                && op.kind == start.kind
                && insn.stack_pointer_increment().abs() == 8
                && (insn.op0_kind() != OpKind::Register || number(insn.op0_register()) != 4)
                && self.window(op).is_some()
                && self.stack_window(op) == self.stack_window(start)
        };
        let rest = block.ops.get(first..)?;
        let count = rest.iter().take_while(belongs).count();
        (count > 1).then_some(first + count)
    }

    /// Emits such a run with one change of RSP behind it. What faults in it is executed again from its start, by the
    /// interpreter: that stores or loads the same once more, and comes to the exception with all before it done.
    pub(super) fn emit_stack_run(&mut self, run: std::ops::Range<usize>) {
        let block = self.block;
        let Some(ops) = block.ops.get(run) else {
            return;
        };
        let Some(first) = ops.first() else {
            return;
        };
        self.held = [None; 2];
        self.mark(first);
        let kind = self.stack_window(first);
        let pushes = first.kind == Kind::Push;
        let mut moved = 0;
        for op in ops {
            let guest = number(op.insn.op0_register());
            if pushes {
                moved -= 8;
                let to = self.through(Base::Gpr(4), moved, kind);
                self.store_pushed(op, Size::Q, to);
            } else {
                let from = self.through(Base::Gpr(4), moved, kind);
                moved += 8;
                match host(guest) {
                    Some(h) => self.a.load(Size::Q, h, from),
                    None => {
                        self.scratch.lose_base();
                        self.a.load(Size::Q, T, from);
                        self.a.store(Size::Q, Mem::Gs(gpr_slot(guest)), T);
                    }
                }
            }
        }
        self.move_stack(moved);
        self.held = [None; 2];
        for op in ops {
            self.scratch.kept = true;
            self.after_window(op);
        }
    }

    /// Stores the register or immediate that PUSH pushes to its place on the host. May clobber T.
    fn store_pushed(&mut self, op: &Op, size: Size, to: Mem) {
        if op.insn.op0_kind() != OpKind::Register {
            return self.a.store_imm(size, to, op.insn.immediate(0) as i32);
        }
        let guest = number(op.insn.op0_register());
        let from = host(guest).unwrap_or(T);
        if from == T {
            self.scratch.lose_base();
            self.a.load(Size::Q, T, Mem::Gs(gpr_slot(guest)));
        }
        self.a.store(size, to, from);
    }

    pub(super) fn push_in_window(&mut self, op: &Op) {
        let (size, n) = Self::stack_size(&op.insn);
        let kind = self.stack_window(op);
        let to = self.through(Base::Gpr(4), -n, kind);
        self.store_pushed(op, size, to);
        self.move_stack(-n);
        self.scratch.kept = size == Size::Q;
    }

    pub(super) fn pop_in_window(&mut self, op: &Op) {
        let kind = self.stack_window(op);
        let from = self.through(Base::Gpr(4), 0, kind);
        self.pop_from(op, from);
        let size = Self::stack_size(&op.insn).0;
        let guest = number(op.insn.op0_register());
        self.scratch.kept = size == Size::Q && guest != 4;
    }
}
