//! Port I/O, CPUID, flag bits, cache control, and the instructions that do nothing visible.

use super::address::{effective_address, gpr_name, segment_index, size_mask, write_number};
use super::traits::Traits;
use super::{Flow, Step, debug};
use crate::bits::*;
use crate::control;
use crate::env::{Env, Stop};
use crate::paging::Access;
use crate::state::{gpr, sreg};
use core::sync::atomic::{Ordering, fence};
use iced_x86::{Code, Instruction, Mnemonic, OpKind};

fn prefetch_register(insn: &Instruction) -> bool {
    let code = matches!(
        insn.code(),
        Code::Reservednop_rm16_r16_0F0D
            | Code::Reservednop_rm32_r32_0F0D
            | Code::Reservednop_rm64_r64_0F0D
    );
    code && insn.op0_kind() == OpKind::Register
}

impl<E: Env + ?Sized> Step<'_, E> {
    pub(super) fn hint(&mut self, traits: Traits) -> Result<Flow, Stop> {
        use Mnemonic as M;
        match self.insn.mnemonic() {
            // 0F 0D is PREFETCH, which has no register form on AMD processors.
            M::Reservednop if self.env.features().amd && prefetch_register(self.insn) => {
                return Err(Stop::ud());
            }
            M::Cld => self.cpu.rflags &= !DF,
            M::Std => self.cpu.rflags |= DF,
            M::Cpuid => self.cpuid(),
            M::Mfence | M::Serialize => fence(Ordering::SeqCst),
            M::Lfence => fence(Ordering::Acquire),
            M::Sfence => fence(Ordering::Release),
            M::Clflush | M::Clflushopt | M::Clwb => self.touch_line()?,
            M::Clzero => self.clzero()?,
            M::Movdir64b => self.movdir64b()?,
            M::Nop
            | M::Reservednop
            | M::Pause
            | M::Endbr32
            | M::Endbr64
            | M::Rdsspd
            | M::Rdsspq
            | M::Prefetch
            | M::Prefetchw
            | M::Prefetchwt1
            | M::Prefetchnta
            | M::Prefetcht0
            | M::Prefetcht1
            | M::Prefetcht2
            | M::Prefetchit0
            | M::Prefetchit1
            | M::Cldemote => {}
            _ => return self.legacy(traits),
        }
        Ok(Flow::Next)
    }

    fn cpuid(&mut self) {
        let leaf = self.cpu.gpr[gpr::RAX] as u32;
        let subleaf = self.cpu.gpr[gpr::RCX] as u32;
        let [a, b, c, d] = self.env.cpuid(self.cpu, leaf, subleaf);
        self.cpu.gpr[gpr::RAX] = u64::from(a);
        self.cpu.gpr[gpr::RBX] = u64::from(b);
        self.cpu.gpr[gpr::RCX] = u64::from(c);
        self.cpu.gpr[gpr::RDX] = u64::from(d);
    }

    /// Cache-line instructions fault as a load of one byte does; there is no cache to act on.
    fn touch_line(&mut self) -> Result<(), Stop> {
        let address = self.operand_address(1, false)?;
        let access = Access::read(self.cpu);
        self.env.translate(self.cpu, address, access)?;
        Ok(())
    }

    /// CLZERO: the cache line that rAX points into.
    fn clzero(&mut self) -> Result<(), Stop> {
        let width = match self.insn.code() {
            Code::Clzerow => 2,
            Code::Clzerod => 4,
            _ => 8,
        };
        let seg = segment_index(self.insn.segment_prefix());
        let offset = self.sized(gpr::RAX, width) & !63;
        let address = self.address(seg, offset, 64, true)?;
        self.write_at(address, &[0; 64])
    }

    /// MOVDIR64B: 64 bytes from memory to ES:reg, which must be aligned.
    fn movdir64b(&mut self) -> Result<(), Stop> {
        let Some(name) = gpr_name(self.insn.op0_register()) else {
            return Err(Stop::ud());
        };
        let to = self.cpu.gpr[name.number & 15] & size_mask(name.size);
        let (seg, offset) = effective_address(self.cpu, self.insn);
        let from = self.address(seg, offset, 64, false)?;
        let to = self.address(sreg::ES, to, 64, true)?;
        if to & 63 != 0 {
            return Err(Stop::gp(0));
        }
        let mut data = [0; 64];
        self.read_at(from, &mut data)?;
        self.write_at(to, &data)
    }

    /// #GP(0) unless the port may be used here; I/O breakpoints.
    pub(super) fn check_port(&mut self, port: u16, size: usize) -> Result<(), Stop> {
        control::io_allowed(self.cpu, self.env, port, size)?;
        if self.cpu.dr7 & 0xff != 0 {
            self.hits |= debug::io_hits(self.cpu, port, size);
        }
        Ok(())
    }

    pub(super) fn port_read(&mut self, port: u16, size: usize) -> Result<u64, Stop> {
        let mut data = [0; 4];
        self.env.io_in(port, &mut data[..size.clamp(1, 4)])?;
        Ok(u64::from(u32::from_le_bytes(data)))
    }

    pub(super) fn port_write(&mut self, port: u16, size: usize, value: u64) -> Result<(), Stop> {
        let data = (value as u32).to_le_bytes();
        self.env.io_out(port, &data[..size.clamp(1, 4)])
    }

    fn port_operand(&self, n: u32) -> u16 {
        if self.insn.op_kind(n) == OpKind::Immediate8 {
            u16::from(self.insn.immediate8())
        } else {
            self.cpu.gpr[gpr::RDX] as u16
        }
    }

    /// IN.
    pub(super) fn input(&mut self) -> Result<Flow, Stop> {
        let size = self.insn.op0_register().size();
        let port = self.port_operand(1);
        self.check_port(port, size)?;
        let value = self.port_read(port, size)?;
        write_number(self.cpu, gpr::RAX, size, value);
        Ok(Flow::Next)
    }

    /// OUT.
    pub(super) fn output(&mut self) -> Result<Flow, Stop> {
        let size = self.insn.op1_register().size();
        let port = self.port_operand(0);
        self.check_port(port, size)?;
        self.port_write(port, size, self.cpu.gpr[gpr::RAX])?;
        Ok(Flow::Next)
    }
}
