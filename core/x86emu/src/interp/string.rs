//! String instructions.
//!
//! A batch is the part of a repetition that stays within one page of source and destination. In RAM
//! the host executes it as the very same instruction; otherwise one element is done by hand, so that
//! a device sees every access once and in order. Progress is committed after each batch.

use super::address::{segment_index, size_mask, write_number};
use super::{Flow, Step};
use crate::bits::*;
use crate::env::{Env, NativeRegs, Stop};
use crate::paging::Access;
use crate::state::{gpr, sreg};
use iced_x86::OpKind;

/// The most iterations of one batch.
const MAX_BATCH: u64 = 4096;
/// The most bytes that INS reads at once.
const MAX_INPUT: usize = 1024;

/// How a string instruction repeats and addresses.
#[derive(Clone, Copy)]
struct Shape {
    /// Element bytes.
    size: usize,
    /// Address bytes.
    width: usize,
    repeated: bool,
    /// Iterations left, at least 1.
    count: u64,
    /// DF is set.
    down: bool,
}

/// Which pointers an instruction uses, and how.
#[derive(Clone, Copy)]
struct Uses {
    source: bool,
    dest: bool,
    dest_write: bool,
    /// Opcode of the byte form.
    opcode: u8,
    /// Stops at a mismatch: SCAS and CMPS.
    compares: bool,
}

const MOVS: Uses = Uses {
    source: true,
    dest: true,
    dest_write: true,
    opcode: 0xa4,
    compares: false,
};
const CMPS: Uses = Uses {
    dest_write: false,
    opcode: 0xa6,
    compares: true,
    ..MOVS
};
const STOS: Uses = Uses {
    source: false,
    opcode: 0xaa,
    ..MOVS
};
const LODS: Uses = Uses {
    dest: false,
    dest_write: false,
    opcode: 0xac,
    ..MOVS
};
const SCAS: Uses = Uses {
    source: false,
    opcode: 0xae,
    ..CMPS
};

impl<E: Env + ?Sized> Step<'_, E> {
    /// `None`: nothing to do, the count is zero.
    fn shape(&self) -> Option<Shape> {
        let insn = self.insn;
        let width = (0..insn.op_count())
            .find_map(|n| match insn.op_kind(n) {
                OpKind::MemorySegSI | OpKind::MemoryESDI => Some(2),
                OpKind::MemorySegESI | OpKind::MemoryESEDI => Some(4),
                OpKind::MemorySegRSI | OpKind::MemoryESRDI => Some(8),
                _ => None,
            })
            .unwrap_or(8);
        let repeated = insn.has_rep_prefix() || insn.has_repne_prefix();
        let count = if repeated {
            self.sized(gpr::RCX, width)
        } else {
            1
        };
        (count != 0).then_some(Shape {
            size: insn.memory_size().size().clamp(1, 8),
            width,
            repeated,
            count,
            down: self.cpu.rflags & DF != 0,
        })
    }

    fn source_segment(&self) -> usize {
        segment_index(self.insn.memory_segment())
    }

    /// Moves the pointers past `n` elements and takes them off the count.
    fn advance(&mut self, shape: &Shape, uses: Uses, n: u64) {
        let bytes = n.wrapping_mul(shape.size as u64);
        let delta = if shape.down {
            bytes.wrapping_neg()
        } else {
            bytes
        };
        for (used, reg) in [(uses.source, gpr::RSI), (uses.dest, gpr::RDI)] {
            if used {
                let to = self.cpu.gpr[reg].wrapping_add(delta) & size_mask(shape.width);
                write_number(self.cpu, reg, shape.width, to);
            }
        }
        if shape.repeated {
            let left = shape.count.wrapping_sub(n) & size_mask(shape.width);
            write_number(self.cpu, gpr::RCX, shape.width, left);
        }
    }

    /// A host pointer to the first element and how many elements (at most `want`) lie in its page
    /// and in RAM. 0: use the slow way.
    fn window(
        &mut self,
        shape: &Shape,
        seg: usize,
        reg: usize,
        write: bool,
        want: u64,
    ) -> Result<(u64, u64), Stop> {
        let size = shape.size as u64;
        let offset = self.sized(reg, shape.width);
        let address = self.address(seg, offset, shape.size, write)?;
        let in_page = address & 0xfff;
        if in_page + size > 4096 {
            return Ok((0, 0));
        }
        let access = Access {
            write,
            ..Access::read(self.cpu)
        };
        let gpa = self.env.translate(self.cpu, address, access)?.gpa;
        let mut n = if shape.down {
            in_page / size + 1
        } else {
            (4096 - in_page) / size
        };
        // Neither the offset may wrap within the batch nor the segment end.
        let room = if shape.down {
            (offset / size).saturating_add(1)
        } else {
            (size_mask(shape.width) - offset) / size
        };
        n = n.min(want).min(room.max(1));
        if n > 1 {
            let back = if shape.down { (n - 1) * size } else { 0 };
            let bytes = (n * size) as usize;
            let access = Access {
                write,
                ..Access::read(self.cpu)
            };
            if crate::segment::linearize(self.cpu, seg, offset - back, bytes, access).is_err() {
                n = 1;
            }
        }
        let back = if shape.down { (n - 1) * size } else { 0 };
        match self.env.host_ptr(gpa - back, (n * size) as usize, write) {
            Some(ptr) => Ok((ptr.expose_provenance() as u64 + back, n)),
            None => Ok((0, 0)),
        }
    }

    /// Runs a batch on the host. `None`: some element is not in RAM or crosses a page.
    fn batch(&mut self, shape: &Shape, uses: Uses) -> Result<Option<Flow>, Stop> {
        let mut n = shape.count.min(MAX_BATCH);
        if self.traced || self.cpu.dr7 & 0xff != 0 {
            n = 1;
        }
        let (mut source, mut dest) = (0, 0);
        if uses.source {
            let seg = self.source_segment();
            (source, n) = self.window(shape, seg, gpr::RSI, false, n)?;
            if n == 0 {
                return Ok(None);
            }
        }
        if uses.dest {
            (dest, n) = self.window(shape, sreg::ES, gpr::RDI, uses.dest_write, n)?;
            if n == 0 {
                return Ok(None);
            }
        }
        if self.cpu.dr7 & 0xff != 0 {
            self.watch_element(shape, uses)?;
        }
        let rep = if self.insn.has_repne_prefix() && uses.compares {
            0xf2
        } else {
            0xf3
        };
        let code: &[u8] = match shape.size {
            1 => &[rep, uses.opcode],
            2 => &[0x66, rep, uses.opcode + 1],
            4 => &[rep, uses.opcode + 1],
            _ => &[rep, 0x48, uses.opcode + 1],
        };
        let mut regs = NativeRegs::default();
        regs.gpr[gpr::RAX] = self.cpu.gpr[gpr::RAX];
        regs.rflags = self.cpu.rflags & ARITH;
        let mut done = 0;
        let mut matched = true;
        // The host only counts upwards here: downwards it gets one element at a time.
        let per_call = if shape.down { 1 } else { n };
        while done < n && matched {
            let back = if shape.down {
                done * shape.size as u64
            } else {
                0
            };
            regs.gpr[gpr::RSI] = source.wrapping_sub(back);
            regs.gpr[gpr::RDI] = dest.wrapping_sub(back);
            regs.gpr[gpr::RCX] = per_call;
            self.run_native(code, &mut regs, false)?;
            done += per_call - regs.gpr[gpr::RCX];
            if uses.compares {
                let equal = regs.rflags & ZF != 0;
                matched = equal != self.insn.has_repne_prefix();
            }
        }
        if uses.compares {
            self.set_arith(regs.rflags);
        }
        self.advance(shape, uses, done);
        if uses.opcode == LODS.opcode {
            write_number(self.cpu, gpr::RAX, shape.size, regs.gpr[gpr::RAX]);
        }
        Ok(Some(self.after(shape, done, matched)))
    }

    fn watch_element(&mut self, shape: &Shape, uses: Uses) -> Result<(), Stop> {
        for (used, seg, reg, write) in [
            (uses.source, self.source_segment(), gpr::RSI, false),
            (uses.dest, sreg::ES, gpr::RDI, uses.dest_write),
        ] {
            if used {
                let offset = self.sized(reg, shape.width);
                let address = self.address(seg, offset, shape.size, write)?;
                self.watch(address, shape.size, write);
            }
        }
        Ok(())
    }

    fn after(&self, shape: &Shape, done: u64, matched: bool) -> Flow {
        if shape.repeated && matched && done < shape.count {
            Flow::Again
        } else {
            Flow::Next
        }
    }

    fn string(&mut self, uses: Uses) -> Result<Flow, Stop> {
        let Some(shape) = self.shape() else {
            return Ok(Flow::Next);
        };
        if let Some(flow) = self.batch(&shape, uses)? {
            return Ok(flow);
        }
        let size = shape.size;
        let mut matched = true;
        let source = if uses.source {
            let offset = self.sized(gpr::RSI, shape.width);
            self.load(self.source_segment(), offset, size)?
        } else {
            self.cpu.gpr[gpr::RAX]
        };
        let offset = self.sized(gpr::RDI, shape.width);
        if uses.dest_write {
            self.store(sreg::ES, offset, size, source)?;
        } else if uses.compares {
            let dest = self.load(sreg::ES, offset, size)?;
            let flags = self.compare(size, source, dest)?;
            self.set_arith(flags);
            matched = (flags & ZF != 0) != self.insn.has_repne_prefix();
        }
        self.advance(&shape, uses, 1);
        if uses.opcode == LODS.opcode {
            write_number(self.cpu, gpr::RAX, size, source);
        }
        Ok(self.after(&shape, 1, matched))
    }

    /// The flags of CMP.
    fn compare(&mut self, size: usize, left: u64, right: u64) -> Result<u64, Stop> {
        let mut regs = NativeRegs::default();
        regs.gpr[gpr::RAX] = left;
        regs.gpr[gpr::RCX] = right;
        let code: &[u8] = match size {
            1 => &[0x38, 0xc8],
            2 => &[0x66, 0x39, 0xc8],
            4 => &[0x39, 0xc8],
            _ => &[0x48, 0x39, 0xc8],
        };
        self.run_native(code, &mut regs, false)?;
        Ok(regs.rflags)
    }

    pub(super) fn movs(&mut self) -> Result<Flow, Stop> {
        self.string(MOVS)
    }
    pub(super) fn stos(&mut self) -> Result<Flow, Stop> {
        self.string(STOS)
    }
    pub(super) fn lods(&mut self) -> Result<Flow, Stop> {
        self.string(LODS)
    }
    pub(super) fn scas(&mut self) -> Result<Flow, Stop> {
        self.string(SCAS)
    }
    pub(super) fn cmps(&mut self) -> Result<Flow, Stop> {
        self.string(CMPS)
    }

    /// INS: as many elements as one read of the port gives, in one page of RAM; else one.
    pub(super) fn ins(&mut self) -> Result<Flow, Stop> {
        // The port is checked even if the count is zero.
        let port = self.cpu.gpr[gpr::RDX] as u16;
        self.check_port(port, self.insn.memory_size().size())?;
        let Some(shape) = self.shape() else {
            return Ok(Flow::Next);
        };
        let offset = self.sized(gpr::RDI, shape.width);
        // The device must not be read if the store would fault.
        let address = self.address(sreg::ES, offset, shape.size, true)?;
        self.probe_write(address, shape.size)?;
        let mut want = shape.count.min((MAX_INPUT / shape.size) as u64);
        if self.traced || self.cpu.dr7 & 0xff != 0 {
            want = 1;
        }
        if want > 1 {
            (_, want) = self.window(&shape, sreg::ES, gpr::RDI, true, want)?;
        }
        let mut data = [0; MAX_INPUT];
        let room = want.max(1) as usize * shape.size;
        let n = self.env.io_in_string(port, shape.size, &mut data[..room])?;
        for (i, element) in data[..room].chunks(shape.size).take(n).enumerate() {
            let bytes = (i * shape.size) as u64;
            let at = if shape.down {
                address.wrapping_sub(bytes)
            } else {
                address.wrapping_add(bytes)
            };
            self.write_at(at, element)?;
        }
        let n = n as u64;
        self.advance(&shape, STOS, n);
        Ok(self.after(&shape, n, true))
    }

    /// OUTS: one element.
    pub(super) fn outs(&mut self) -> Result<Flow, Stop> {
        let port = self.cpu.gpr[gpr::RDX] as u16;
        self.check_port(port, self.insn.memory_size().size())?;
        let Some(shape) = self.shape() else {
            return Ok(Flow::Next);
        };
        let offset = self.sized(gpr::RSI, shape.width);
        let value = self.load(self.source_segment(), offset, shape.size)?;
        self.port_write(port, shape.size, value)?;
        self.advance(&shape, LODS, 1);
        Ok(self.after(&shape, 1, true))
    }
}
