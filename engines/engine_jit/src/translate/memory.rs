//! Memory operands: addresses, TLB probes, and the instructions that are copied.

use super::*;

impl Tx<'_> {
    /// Linear address of the memory operand of `size` bytes into T. Clobbers I, and EFLAGS where a
    /// segment counts.
    pub(super) fn address(&mut self, insn: &Instruction, size: usize) {
        self.address_parts(insn, T);
        let n = (insn.memory_segment() as usize).wrapping_sub(Register::ES as usize);
        if self.ctx.segmented() {
            self.in_segment(n, size);
        } else if n >= 4 {
            let width = if self.long() { Size::Q } else { Size::D };
            self.a.op_mem(width, &[0x03], T, Mem::Gs(seg_base(n)));
        }
    }

    /// Checks the offset in T of `size` bytes against a segment's limit and makes it linear. Beyond the
    /// limit the interpreter raises the exception.
    pub(super) fn in_segment(&mut self, n: usize, size: usize) {
        self.a.mov32(I, T);
        if size > 1 {
            self.a.alu_imm(Size::D, 0, I, size as i32 - 1);
            let wraps = self.a.jcc(cc::B);
            self.beyond.push(wraps);
        }
        self.a.op_mem(Size::D, &[0x3b], I, Mem::Gs(seg_limit(n))); // cmp
        let beyond = self.a.jcc(cc::A);
        self.beyond.push(beyond);
        self.a.op_mem(Size::D, &[0x03], T, Mem::Gs(seg_base(n))); // add
    }

    /// Effective address of the memory operand into `dst` without touching flags. May use `dst` and
    /// I as intermediates. Returns whether it is a 64-bit address.
    pub(super) fn address_parts(&mut self, insn: &Instruction, dst: u8) -> bool {
        let (b, x) = (insn.memory_base(), insn.memory_index());
        if b == Register::RIP {
            // iced gives the target relative to the page, as it decoded with IP = page offset.
            let disp = insn.memory_displacement64() as i64 as i32;
            let base = self.page_base();
            self.a.load(Size::Q, dst, base);
            self.a.lea(dst, at(dst, disp));
            return true;
        }
        let wide = if b != Register::None || x != Register::None {
            b.is_gpr64() || x.is_gpr64()
        } else {
            self.long() && insn.memory_displ_size() != 4 || self.long()
        };
        let disp64 = insn.memory_displacement64();
        if b == Register::None && x == Register::None {
            let v = match (self.long(), insn.memory_displ_size()) {
                (true, _) => disp64,
                (false, 2) => disp64 & 0xffff,
                (false, _) => disp64 & 0xffff_ffff,
            };
            self.a.mov_imm(dst, v);
            return wide;
        }
        let disp = disp64 as i64 as i32;
        let mut part = |r: Register, tmp: u8| -> Option<u8> {
            if r == Register::None {
                return None;
            }
            let n = number(r);
            Some(host(n).unwrap_or_else(|| {
                self.a.load(Size::Q, tmp, Mem::Gs(gpr_slot(n)));
                tmp
            }))
        };
        // `dst` may be a guest register that is also the index: only T and I are free as temporaries.
        let base = part(b, T);
        let index = part(x, I);
        let scale = insn.memory_index_scale().trailing_zeros() as u8;
        let mem = Mem::Sib(base, index.map(|i| (i, scale)), disp);
        if wide {
            self.a.lea(dst, mem);
        } else {
            self.a.lea32(dst, mem);
        }
        if b.is_gpr16() || x.is_gpr16() {
            self.a.op_reg(Size::D, &[0x0f, 0xb7], dst, dst); // movzx
        }
        wide
    }

    /// Checks that the `size` bytes at linear address T lie in one page that may be accessed; leaves
    /// the offset in T and the host page in I. The miss is completed by [`Tx::resume_miss`].
    pub(super) fn probe(&mut self, size: usize, write: bool, retry: usize, op: &Op) -> PendingMiss {
        let base_meta = self.meta(op);
        let a = &mut self.a;
        let tlb = tlb_base(self.ctx.tlb());
        let tag = tlb + if write { 8 } else { 0 };
        if self.bmi2 {
            a.rorx(I, T, 7);
        } else {
            a.mov(I, T);
            a.shr(I, 7);
        }
        a.alu_imm(Size::D, 4, I, ((TLB_ENTRIES - 1) << 5) as i32);
        a.op_mem(Size::Q, &[0x2b], T, Mem::GsBase(I, tag)); // sub
        a.alu_imm(Size::Q, 7, T, 4096 - size as i32);
        let jump = a.jcc(cc::A);
        a.load(Size::Q, I, Mem::GsBase(I, tlb + 16));
        if self.ctx.windows() {
            // The probe has clobbered EFLAGS.
            let here = self.a.here() as u32;
            self.map.push((here, op.off));
        }
        let meta =
            base_meta | if write { meta::WRITE } else { 0 } | (size as u32) << meta::SIZE_SHIFT;
        let access = self.a.here();
        let bounce = if write || size == 1 {
            Bounce::Never
        } else {
            Bounce::Read
        };
        PendingMiss {
            jump,
            meta,
            retry,
            write,
            access,
            size,
            bounce,
            flags: self.flags,
        }
    }

    /// Completes probes of an instruction whose code ends here.
    pub(super) fn resume_miss(&mut self, misses: impl IntoIterator<Item = PendingMiss>, op: &Op) {
        let resume = self.a.here();
        let reload = self.flags == Flags::Host && op.live_after != 0;
        let meta = self.meta(op);
        for jump in std::mem::take(&mut self.beyond) {
            self.cold.push(Cold::Interpret {
                jump,
                meta,
                resume,
                reload,
                save: false,
            });
        }
        for m in misses {
            let block = self.block;
            let index = block.ops.iter().position(|o| o.off == op.off).unwrap_or(0);
            self.cold.push(Cold::Miss {
                miss: m,
                op: index,
                resume,
                reload,
            });
        }
    }

    /// Takes the operands of a copied instruction apart. `None` if it must be interpreted.
    pub(super) fn operands(&mut self, op: &Op) -> Option<Operands> {
        let insn = &op.insn;
        let mut o = Operands {
            enc: op.enc?,
            slots: Vec::new(),
            memory: false,
            write: false,
            borrows: false,
            needs: if op.modifies != 0 && op.live_after & !op.kills != 0 {
                op.live_before
            } else {
                op.reads
            },
        };
        // Most registers are where the guest has them, and how they are used does not matter then.
        let plain = |i| {
            insn.op_kind(i) != OpKind::Memory && {
                let r = insn.op_register(i);
                let n = number(r);
                !r.is_gpr() || host(n) == Some(n)
            }
        };
        if (0..insn.op_count()).all(plain) {
            return Some(o);
        }
        let options =
            InstructionInfoOptions::NO_MEMORY_USAGE | InstructionInfoOptions::NO_REGISTER_USAGE;
        let info = self.info.info_options(insn, options);
        for i in 0..insn.op_count() {
            let access = info.op_access(i);
            let writes = !matches!(
                access,
                OpAccess::Read | OpAccess::CondRead | OpAccess::None | OpAccess::NoMemAccess
            );
            if insn.op_kind(i) == OpKind::Memory {
                o.memory = true;
                o.write |= writes;
                continue;
            }
            let Some(field) = gpr_field(insn, i) else {
                continue;
            };
            let r = insn.op_register(i);
            if matches!(r, Register::AH | Register::CH | Register::DH | Register::BH) {
                continue;
            }
            let guest = number(r);
            match host(guest) {
                Some(h) if h == guest => {}
                Some(h) => o.enc.set_register(field, h),
                None => {
                    let reads = access != OpAccess::Write || matches!(r.size(), 1 | 2);
                    if let Some(s) = o.slots.iter_mut().find(|s| s.guest == guest) {
                        s.read |= reads;
                        s.write |= writes;
                        s.fields.push(field);
                    } else {
                        let fields = vec![field];
                        o.slots.push(Slot {
                            guest,
                            read: reads,
                            write: writes,
                            fields,
                        });
                    }
                }
            }
        }
        if o.write && !self.long() && insn.memory_segment() == Register::CS {
            return None;
        }
        let mut tried = o.enc;
        if o.memory {
            tried.set_memory(HostMem::BaseIndex(I, T));
        }
        if o.memory && o.slots.is_empty() && o.enc.names_high_byte() {
            // No REX prefix, which T and I need.
            o.borrows = true;
            tried.set_memory(HostMem::BaseDisp(reg::RSI, 0));
            return tried.emit(&mut [0; MAX_LEN]).map(|_| o);
        }
        let room = if o.memory { 1 } else { 2 };
        let fits = o.slots.len() <= room && !enc_fails(&tried, o.memory || !o.slots.is_empty());
        fits.then_some(o)
    }

    pub(super) fn native(&mut self, op: &Op) {
        let Some(o) = self.operands(op) else {
            return self.interpret(op);
        };
        if o.memory {
            let disp = i64::from(op.insn.memory_displacement64() as i64 as i32);
            if let Some(place) = self.in_group(disp) {
                return self.grouped(op, &o, place);
            }
            if let Some(kind) = self.window(op) {
                return self.native_in_window(op, &o, kind);
            }
            self.save_flags(op.live_before);
            let retry = self.a.here();
            let size = access_size(&op.insn);
            self.address(&op.insn, size);
            let mut miss = self.probe(size, o.write, retry, op);
            if o.write && !whole_bounce(&op.insn) {
                miss.bounce = Bounce::Never;
            } else if o.write {
                miss.bounce = Bounce::Write;
            }
            self.with_memory(op, &o);
            self.resume_miss([miss], op);
            return;
        }
        self.held = self.held_before;
        if o.needs != 0 {
            self.restore_flags(op.live_before, false);
        }
        self.scratch.kept = true;
        let mut enc = o.enc;
        let held = o.slots.iter().any(|s| self.held.contains(&Some(s.guest)));
        if !held && let Some(direct) = in_place(&op.insn, &enc, &o.slots) {
            self.emit(op, &direct);
        } else {
            let places = self.places(&o.slots);
            for (s, &tmp) in o.slots.iter().zip(&places) {
                if s.read && self.held[usize::from(tmp == I)] != Some(s.guest) {
                    self.a.load(Size::Q, tmp, Mem::Gs(gpr_slot(s.guest)));
                }
                for &f in &s.fields {
                    enc.set_register(f, tmp);
                }
            }
            self.emit(op, &enc);
            for (s, &tmp) in o.slots.iter().zip(&places) {
                if s.write {
                    self.a.store(Size::Q, Mem::Gs(gpr_slot(s.guest)), tmp);
                }
                self.hold(tmp, s.guest);
            }
        }
        if op.modifies != 0 {
            self.flags = Flags::Host;
        }
    }

    /// The scratch registers for an instruction's operands that live in memory: where they are already, or T first, as
    /// I may be in use.
    fn places(&self, slots: &[Slot]) -> [u8; 2] {
        let held = |s: &Slot| self.held.iter().position(|&h| h == Some(s.guest));
        match slots {
            [a, b] => match (held(a), held(b)) {
                (Some(1), _) | (None, Some(0)) => [I, T],
                _ => [T, I],
            },
            [a] if held(a) == Some(1) => [I, T],
            _ => [T, I],
        }
    }

    /// A scratch register holds the value of a guest register that lives in memory.
    pub(super) fn hold(&mut self, tmp: u8, guest: u8) {
        let n = usize::from(tmp == I);
        if self.held[1 - n] == Some(guest) {
            self.held[1 - n] = None;
        }
        self.held[n] = Some(guest);
        if tmp == I {
            self.scratch.lose_place();
        } else {
            self.scratch.lose_base();
        }
    }

    /// Emits the instruction with its memory operand at I + T.
    pub(super) fn with_memory(&mut self, op: &Op, o: &Operands) {
        let mut enc = o.enc;
        if o.needs != 0 {
            self.restore_flags(op.live_before, true);
        }
        if o.borrows {
            self.borrowing(op, enc, Mem::Sib(Some(I), Some((T, 0)), 0));
        } else if let Some(s) = o.slots.first() {
            self.a.lea(I, Mem::Sib(Some(I), Some((T, 0)), 0));
            if s.read {
                self.a.load(Size::Q, T, Mem::Gs(gpr_slot(s.guest)));
            }
            for &f in &s.fields {
                enc.set_register(f, T);
            }
            enc.set_memory(HostMem::BaseDisp(I, 0));
            self.emit(op, &enc);
            if s.write {
                self.a.store(Size::Q, Mem::Gs(gpr_slot(s.guest)), T);
            }
        } else {
            enc.set_memory(HostMem::BaseIndex(I, T));
            self.emit(op, &enc);
        }
        if op.modifies != 0 {
            self.flags = Flags::Host;
        }
    }

    /// Emits an instruction with its memory operand addressed by RSI.
    pub(super) fn borrowing(&mut self, op: &Op, mut enc: Encoding, operand: Mem) {
        let spill = Mem::Gs(off::SPILL + 24);
        self.a.store(Size::Q, spill, reg::RSI);
        self.a.lea(reg::RSI, operand);
        self.mark_with(op, BORROWED);
        enc.set_memory(HostMem::BaseDisp(reg::RSI, 0));
        self.emit(op, &enc);
        self.a.load(Size::Q, reg::RSI, spill);
    }

    pub(super) fn emit(&mut self, op: &Op, enc: &Encoding) {
        let mut out = [0; MAX_LEN];
        // `enc_fails` has tried it.
        let n = enc.emit(&mut out).unwrap_or(0);
        debug_assert!(n != 0);
        self.a.bytes(&out[..n]);
        if let Some((off, len)) = immediate(op)
            && !self.fixed.contains(&op.off)
        {
            let host = self.a.here() as u32 - u32::from(len);
            self.imms.push(Imm { off, len, host });
        }
    }

    /// The 64-bit address of an operand, if host registers hold all of it: nothing is loaded then.
    fn parts_at_hand(&self, insn: &Instruction) -> Option<Mem> {
        let (base, index) = (insn.memory_base(), insn.memory_index());
        let at_hand = |r: Register| {
            let guest = number(r);
            let held = || self.held_before.iter().position(|&h| h == Some(guest));
            host(guest).or_else(|| held().map(|n| [T, I][n]))
        };
        let part = |r: Register| match r {
            Register::None => Some(None),
            r if r.is_gpr64() => at_hand(r).map(Some),
            _ => None,
        };
        if base == Register::None && index == Register::None {
            return None;
        }
        let scale = insn.memory_index_scale().trailing_zeros() as u8;
        let index = part(index)?.map(|x| (x, scale));
        let disp = insn.memory_displacement64() as i64 as i32;
        Some(Mem::Sib(part(base)?, index, disp))
    }

    pub(super) fn lea(&mut self, op: &Op) {
        let insn = &op.insn;
        let r = insn.op0_register();
        let guest = number(r);
        let dst = host(guest);
        if r.is_gpr16() {
            self.address_parts(insn, T);
            match dst {
                Some(d) => self.a.op_reg(Size::W, &[0x89], T, d),
                None => self.a.store(Size::W, Mem::Gs(gpr_slot(guest)), T),
            }
            return;
        }
        if let Some(parts) = self.parts_at_hand(insn) {
            self.held = self.held_before;
            let d = dst.unwrap_or(T);
            self.a.lea(d, parts);
            if r.is_gpr32() {
                self.a.mov32(d, d);
            }
            if dst.is_none() {
                self.a.store(Size::Q, Mem::Gs(gpr_slot(guest)), T);
                self.hold(T, guest);
            }
            self.scratch.kept = true;
            return;
        }
        let d = dst.unwrap_or(T);
        let in_host =
            |r: Register| r == Register::None || r == Register::RIP || host(number(r)).is_some();
        self.scratch.kept =
            dst.is_some() && in_host(insn.memory_base()) && in_host(insn.memory_index());
        let wide = self.address_parts(insn, d);
        if wide && r.is_gpr32() {
            self.a.mov32(d, d);
        }
        if dst.is_none() {
            self.a.store(Size::Q, Mem::Gs(gpr_slot(guest)), T);
            self.held = [Some(guest), None];
        }
    }
}

/// A copied instruction's operands.
pub(super) struct Operands {
    /// The encoding with registers renamed.
    pub(super) enc: Encoding,
    /// Registers that live in memory.
    pub(super) slots: Vec<Slot>,
    pub(super) memory: bool,
    pub(super) write: bool,
    /// It names AH to DH: its memory operand must be addressed by RSI.
    pub(super) borrows: bool,
    /// Flags that must be in EFLAGS before it.
    pub(super) needs: u32,
}

/// A write through the bounce buffer is right: it is no LOCKed one, and writes all its bytes.
fn whole_bounce(insn: &Instruction) -> bool {
    use iced_x86::Mnemonic as M;
    !insn.has_lock_prefix()
        && !insn.has_op_mask()
        && !matches!(
            insn.mnemonic(),
            M::Xchg | M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq
        )
}

/// A guest register that lives in memory, as an operand.
pub(super) struct Slot {
    pub(super) guest: u8,
    pub(super) read: bool,
    pub(super) write: bool,
    pub(super) fields: Vec<Field>,
}

/// The instruction cannot be re-encoded: AH-DH beside an extended register.
fn enc_fails(enc: &Encoding, extended: bool) -> bool {
    enc.names_high_byte() && (extended || enc.emit(&mut [0; MAX_LEN]).is_none())
}

/// The instruction with its one register that lives in memory used there as a memory operand, where
/// the encoding allows it.
fn in_place(insn: &Instruction, enc: &Encoding, slots: &[Slot]) -> Option<Encoding> {
    use x86emu::encoding::Form;
    let [s] = slots else { return None };
    if s.fields.as_slice() != [Field::Rm] || enc.rm_in_opcode() || enc.form() != Form::Legacy {
        return None;
    }
    use iced_x86::Mnemonic as M;
    let other = match insn.mnemonic() {
        // With a memory operand, the bit may lie beyond it.
        M::Bt | M::Bts | M::Btr | M::Btc => insn.op1_kind() == OpKind::Register,
        // They store less than they put into a register.
        M::Pextrb | M::Pextrw | M::Extractps => true,
        _ => false,
    };
    if other {
        return None;
    }
    let i = (0..insn.op_count()).find(|&i| gpr_field(insn, i) == Some(Field::Rm))?;
    use iced_x86::OpCodeOperandKind as K;
    let size = match insn.op_code().try_op_kind(i).ok()? {
        K::r64_or_mem => 8,
        K::r32_or_mem => 4,
        K::r8_or_mem => 1,
        _ => return None,
    };
    // A 32-bit result clears the upper half of a register, but not of memory. And a byte that was stored
    // by itself makes the next load of the slot wait.
    if s.write && size != 8 {
        return None;
    }
    let mut e = *enc;
    e.set_memory(HostMem::Gs(gpr_slot(s.guest)));
    Some(e)
}
