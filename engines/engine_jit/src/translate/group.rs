//! Groups of accesses through one base register: one probe for all of them.
//!
//! Functions save registers, fill frames and walk structures: consecutive instructions access memory at constant
//! distances from one register. The first one's probe covers the whole span; while it holds, I points at the
//! span's host address, and the accesses need no code but themselves. Where the span does not lie in
//! one page that may be accessed as the group does, a block of its own takes its place, in which each access has
//! its probe.

use super::cold::GroupMiss;
use super::memory::Operands;
use super::*;

/// The widest span of a group, in bytes.
const MAX_SPAN: i64 = 1024;

/// Instructions that a group covers, found before any is emitted.
pub(super) struct Plan {
    /// Index of the first instruction behind the group.
    end: usize,
    /// The guest register that all addresses are relative to.
    base: u8,
    /// First byte accessed, relative to the base at the start.
    low: i64,
    /// End of the last byte accessed.
    high: i64,
    write: bool,
}

/// The group that is being emitted.
#[derive(Clone, Copy)]
pub(super) struct Group {
    /// First byte accessed, relative to the base at the start.
    low: i64,
    /// What the base has moved by since the start.
    moved: i64,
}

/// What an instruction does to the base register.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Moves(i64),
    Lost,
}

/// An access of an instruction: base register, displacement, size, whether it writes.
struct Touch {
    base: u8,
    at: i64,
    size: i64,
    write: bool,
}

impl Tx<'_> {
    /// The group that starts with instruction `first`, if there is one worth it.
    pub(super) fn plan(&mut self, first: usize) -> Option<Plan> {
        if !self.long() || self.block.apart || self.ctx.windows() {
            return None;
        }
        let block = self.block;
        let start = self.touch(block.ops.get(first)?)??;
        let base = start.base;
        let mut plan = Plan {
            end: first,
            base,
            low: i64::MAX,
            high: i64::MIN,
            write: false,
        };
        let (mut moved, mut touches) = (0i64, 0);
        let mut fixed = Vec::new();
        for (i, op) in block.ops.iter().enumerate().skip(first) {
            let Some(touch) = self.touch(op) else { break };
            let change = self.change(op, base);
            if let Some(t) = &touch {
                if t.base != base {
                    break;
                }
                let (low, high) = (
                    plan.low.min(moved + t.at),
                    plan.high.max(moved + t.at + t.size),
                );
                if high - low > MAX_SPAN || i32::try_from(low).is_err() {
                    break;
                }
                (plan.low, plan.high) = (low, high);
                plan.write |= t.write;
                plan.end = i + 1;
                touches += 1;
                // What the group counts on must not be patched.
                self.fixed.append(&mut fixed);
            }
            match change {
                Change::Moves(0) => {}
                Change::Moves(by) => {
                    moved += by;
                    fixed.push(op.off);
                }
                Change::Lost => break,
            }
        }
        (touches > 1).then_some(plan)
    }

    /// The access of an instruction that may be part of a group; `Some(None)` if it has none. `None`: it cannot be
    /// part of one.
    fn touch(&mut self, op: &Op) -> Option<Option<Touch>> {
        let insn = &op.insn;
        match op.kind {
            Kind::Nop => Some(None),
            Kind::Lea => {
                let index = insn.memory_index();
                let keeps = index == Register::None || host(number(index)).is_some();
                (keeps && insn.memory_base() != Register::RIP).then_some(None)
            }
            Kind::Jcc(..) => Some(None),
            Kind::Push if insn.op0_kind() != OpKind::Memory => Some(Some(Touch {
                base: 4,
                at: -8,
                size: 8,
                write: true,
            })),
            Kind::Pop if number(insn.op0_register()) != 4 => Some(Some(Touch {
                base: 4,
                at: 0,
                size: 8,
                write: false,
            })),
            Kind::Ret(_) => Some(Some(Touch {
                base: 4,
                at: 0,
                size: 8,
                write: false,
            })),
            Kind::Native => {
                let o = self.operands(op)?;
                if o.slots.len() > 1 || o.borrows {
                    return None;
                }
                if !o.memory {
                    return Some(None);
                }
                let segment = insn.memory_segment();
                let base = insn.memory_base();
                let size = access_size(insn);
                let plain = base.is_gpr64()
                    && insn.memory_index() == Register::None
                    && segment != Register::FS
                    && segment != Register::GS
                    && (1..=64).contains(&size);
                let at = i64::from(insn.memory_displacement64() as i64 as i32);
                plain.then(|| {
                    Some(Touch {
                        base: number(base),
                        at,
                        size: size as i64,
                        write: o.write,
                    })
                })
            }
            _ => None,
        }
    }

    /// What an instruction that may be part of a group does to guest register `base`.
    pub(super) fn change(&mut self, op: &Op, base: u8) -> Change {
        let insn = &op.insn;
        match op.kind {
            Kind::Nop | Kind::Jcc(..) => return Change::Moves(0),
            Kind::Push if base == 4 => return Change::Moves(-8),
            Kind::Pop if base == 4 => return Change::Moves(8),
            Kind::Ret(_) => return Change::Lost,
            _ => {}
        }
        let to_base = insn.op0_kind() == OpKind::Register
            && insn.op0_register().is_gpr64()
            && number(insn.op0_register()) == base;
        if to_base && op.kind == Kind::Lea {
            let from = insn.memory_base();
            let moves =
                from.is_gpr64() && number(from) == base && insn.memory_index() == Register::None;
            let by = i64::from(insn.memory_displacement64() as i64 as i32);
            return if moves {
                Change::Moves(by)
            } else {
                Change::Lost
            };
        }
        if to_base
            && matches!(
                insn.op1_kind(),
                OpKind::Immediate8to64 | OpKind::Immediate32to64
            )
        {
            use iced_x86::Mnemonic as M;
            let by = i64::from(insn.immediate(1) as i64 as i32);
            match insn.mnemonic() {
                M::Add => return Change::Moves(by),
                M::Sub => return Change::Moves(-by),
                M::Cmp | M::Test => return Change::Moves(0),
                _ => {}
            }
        }
        let info = self.info.info(insn);
        let writes = info.used_registers().iter().any(|u| {
            let r = u.register();
            r.is_gpr()
                && number(r) == base
                && !matches!(u.access(), OpAccess::Read | OpAccess::CondRead)
        });
        if writes {
            Change::Lost
        } else {
            Change::Moves(0)
        }
    }

    /// Emits instructions `first..` of a plan; the index of the next one.
    pub(super) fn emit_group(&mut self, first: usize, plan: &Plan) -> usize {
        let block = self.block;
        let Some(ops) = block.ops.get(first..plan.end) else {
            return first;
        };
        self.save_flags(ops.first().map_or(0, |op| op.live_before));
        let flags = self.flags;
        let retry = self.a.here();
        let low = plan.low as i32;
        match host(plan.base) {
            Some(h) => self.a.lea(T, at(h, low)),
            None => {
                self.a.load(Size::Q, T, Mem::Gs(gpr_slot(plan.base)));
                self.a.lea(T, at(T, low));
            }
        }
        let span = (plan.high - plan.low) as usize;
        let probe = self.probe(span, plan.write, retry, &ops[0]);
        self.a.lea(I, Mem::Sib(Some(I), Some((T, 0)), 0));
        self.held = [None; 2];
        self.group = Some(Group {
            low: plan.low,
            moved: 0,
        });
        for op in ops {
            self.map.push((self.a.here() as u32, op.off));
            self.op(op);
            if let Change::Moves(by) = self.change(op, plan.base)
                && let Some(group) = &mut self.group
            {
                group.moved += by;
            }
        }
        self.group = None;
        self.cold.push(Cold::Group(GroupMiss {
            jump: probe.jump,
            retry,
            span,
            write: plan.write,
            ops: first..plan.end,
            before: flags,
        }));
        plan.end
    }

    /// Where `at` bytes from the base of the current group lie, relative to I.
    pub(super) fn in_group(&self, at: i64) -> Option<i32> {
        self.group.map(|g| (g.moved + at - g.low) as i32)
    }

    /// Emits a copied instruction whose memory operand belongs to the current group, `place` bytes from I.
    pub(super) fn grouped(&mut self, op: &Op, o: &Operands, place: i32) {
        let mut enc = o.enc;
        if o.needs != 0 {
            self.restore_flags(op.live_before, false);
        }
        let slot = o.slots.first();
        if let Some(s) = slot {
            if s.read {
                self.a.load(Size::Q, T, Mem::Gs(gpr_slot(s.guest)));
            }
            for &f in &s.fields {
                enc.set_register(f, T);
            }
        }
        enc.set_memory(HostMem::BaseDisp(I, place));
        self.emit(op, &enc);
        if let Some(s) = slot
            && s.write
        {
            self.a.store(Size::Q, Mem::Gs(gpr_slot(s.guest)), T);
        }
        if op.modifies != 0 {
            self.flags = Flags::Host;
        }
    }
}
