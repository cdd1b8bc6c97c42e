//! Gathers and scatters: one element after the other, lowest first. A fault leaves the elements
//! before it done and their mask bits clear, so that the instruction goes on where it stopped.

use super::address::{address_size, effective_address, gpr_name, size_mask};
use super::vector;
use super::{Flow, Step};
use crate::env::{Env, Stop};
use crate::state::XsaveArea;
use iced_x86::{Mnemonic, Register};

/// Where the mask comes from.
#[derive(Clone, Copy)]
enum Mask {
    /// Sign bits of the elements of a vector register (AVX2).
    Vector(usize),
    /// An opmask register.
    Opmask(usize),
}

/// The geometry of a gather or scatter.
struct Plan {
    /// Register of the data.
    data: usize,
    index: usize,
    mask: Mask,
    data_size: usize,
    index_size: usize,
    count: usize,
}

/// The mask after elements `0..done` are finished; all of it when the instruction is.
fn clear_mask(area: &mut XsaveArea, plan: &Plan, done: usize, finished: bool) {
    match plan.mask {
        Mask::Opmask(k) => {
            let left = if finished {
                0
            } else {
                let below = 1u64.checked_shl(done as u32).map_or(!0, |b| b - 1);
                vector::opmask(area, k) & !below
            };
            vector::set_opmask(area, k, left);
        }
        Mask::Vector(n) => {
            let mut value = if finished {
                [0; 64]
            } else {
                vector::zmm(area, n)
            };
            value[..done * plan.data_size].fill(0);
            vector::set_zmm(area, n, &value);
        }
    }
}

impl<E: Env + ?Sized> Step<'_, E> {
    fn plan(&self, data: Register) -> Result<Plan, Stop> {
        use Mnemonic as M;
        let insn = self.insn;
        let index = insn.memory_index();
        let index_size = if matches!(
            insn.mnemonic(),
            M::Vgatherdps
                | M::Vgatherdpd
                | M::Vpgatherdd
                | M::Vpgatherdq
                | M::Vscatterdps
                | M::Vscatterdpd
                | M::Vpscatterdd
                | M::Vpscatterdq
        ) {
            4
        } else {
            8
        };
        let data_size = insn.memory_size().element_size();
        if !matches!(data_size, 4 | 8) || !index.is_vector_register() {
            return Err(Stop::ud());
        }
        let mask = if insn.op_mask() != Register::None {
            Mask::Opmask(insn.op_mask().number())
        } else {
            Mask::Vector(insn.op2_register().number())
        };
        Ok(Plan {
            data: data.number(),
            index: index.number(),
            mask,
            data_size,
            index_size,
            count: (data.size() / data_size).min(index.size() / index_size),
        })
    }

    fn wanted(&self, plan: &Plan, n: usize) -> bool {
        match plan.mask {
            Mask::Opmask(k) => vector::opmask(&self.cpu.xsave, k) & (1 << n) != 0,
            Mask::Vector(v) => {
                vector::zmm(&self.cpu.xsave, v)[(n + 1) * plan.data_size - 1] & 0x80 != 0
            }
        }
    }

    fn element_offset(&self, plan: &Plan, indices: &[u8; 64], n: usize) -> u64 {
        let insn = self.insn;
        let at = n * plan.index_size;
        let index = if plan.index_size == 4 {
            let mut bytes = [0; 4];
            bytes.copy_from_slice(&indices[at..at + 4]);
            i64::from(i32::from_le_bytes(bytes)) as u64
        } else {
            let mut bytes = [0; 8];
            bytes.copy_from_slice(&indices[at..at + 8]);
            u64::from_le_bytes(bytes)
        };
        let base = insn.memory_base();
        let width = if gpr_name(base).is_some() {
            address_size(insn)
        } else if insn.memory_displ_size() == 4 || self.mode as u8 != 64 {
            4
        } else {
            8
        };
        let start = gpr_name(base).map_or(0, |name| self.cpu.gpr[name.number & 15]);
        start
            .wrapping_add(insn.memory_displacement64())
            .wrapping_add(index.wrapping_mul(u64::from(insn.memory_index_scale())))
            & size_mask(width)
    }

    /// VGATHER and VPGATHER.
    pub(super) fn gather(&mut self) -> Result<Flow, Stop> {
        let plan = self.plan(self.insn.op0_register())?;
        let (seg, _) = effective_address(self.cpu, self.insn);
        let indices = vector::zmm(&self.cpu.xsave, plan.index);
        let mut value = vector::zmm(&self.cpu.xsave, plan.data);
        for n in 0..plan.count {
            if !self.wanted(&plan, n) {
                continue;
            }
            let offset = self.element_offset(&plan, &indices, n);
            match self.load(seg, offset, plan.data_size) {
                Ok(element) => {
                    let at = n * plan.data_size;
                    value[at..at + plan.data_size]
                        .copy_from_slice(&element.to_le_bytes()[..plan.data_size]);
                }
                Err(stop) => {
                    // An exit starts over: its device reads are answered again in order.
                    if matches!(stop, Stop::Exception(_)) {
                        // Once an element is in, the rest of the register is cleared.
                        if (0..n).any(|n| self.wanted(&plan, n)) {
                            value[plan.count * plan.data_size..].fill(0);
                        }
                        vector::set_zmm(&mut self.cpu.xsave, plan.data, &value);
                        clear_mask(&mut self.cpu.xsave, &plan, n, false);
                    }
                    return Err(stop);
                }
            }
        }
        value[plan.count * plan.data_size..].fill(0);
        vector::set_zmm(&mut self.cpu.xsave, plan.data, &value);
        clear_mask(&mut self.cpu.xsave, &plan, plan.count, true);
        Ok(Flow::Next)
    }

    /// VSCATTER and VPSCATTER.
    pub(super) fn scatter(&mut self) -> Result<Flow, Stop> {
        let plan = self.plan(self.insn.op1_register())?;
        let (seg, _) = effective_address(self.cpu, self.insn);
        let indices = vector::zmm(&self.cpu.xsave, plan.index);
        let value = vector::zmm(&self.cpu.xsave, plan.data);
        for n in 0..plan.count {
            if !self.wanted(&plan, n) {
                continue;
            }
            let offset = self.element_offset(&plan, &indices, n);
            let mut bytes = [0; 8];
            let at = n * plan.data_size;
            bytes[..plan.data_size].copy_from_slice(&value[at..at + plan.data_size]);
            if let Err(stop) = self.store(seg, offset, plan.data_size, u64::from_le_bytes(bytes)) {
                if matches!(stop, Stop::Exception(_)) {
                    clear_mask(&mut self.cpu.xsave, &plan, n, false);
                }
                return Err(stop);
            }
        }
        clear_mask(&mut self.cpu.xsave, &plan, plan.count, true);
        Ok(Flow::Next)
    }
}
