//! Register access: the xAPIC page and the x2APIC MSRs.

use super::registers::*;
use super::{Effect, GeneralProtection, Lapic, MMIO_SIZE, Now, X2APIC_MSR_FIRST, X2APIC_MSR_LAST};
use crate::message::{ApicMessage, DeliveryMode, DestMode, Shorthand, Trigger};

impl Lapic {
    /// Whether `offset`, a multiple of 16, can be read in the current mode.
    fn is_readable(&self, offset: u32) -> bool {
        match offset {
            ID | VERSION | TPR | PPR | LDR | SVR | ESR | ICR => true,
            ISR..0x280 => true,
            LVT_TIMER..=TIMER_CURRENT | TIMER_DIVIDE => true,
            LVT_CMCI => self.config.cmci,
            ARB | DFR | ICR2 => !self.is_x2apic(),
            _ => false,
        }
    }

    fn read_register(&self, offset: u32, now: Now) -> Option<u32> {
        if !self.is_readable(offset) {
            return None;
        }
        let index = (offset as usize >> 4) & 7;
        Some(match offset {
            ARB => 0,
            PPR => self.ppr().into(),
            ISR..TMR => self.isr.0[index],
            TMR..IRR => self.tmr.0[index],
            IRR..ESR => self.irr.0[index],
            TIMER_CURRENT => self.current_count(now),
            _ => self.reg(offset),
        })
    }

    /// Reads the register page; `data` is the access. All ones outside xAPIC mode (KVM's
    /// `LAPIC_MMIO_HOLE` quirk), zeros from reserved registers.
    pub fn mmio_read(&self, offset: u64, data: &mut [u8], now: Now) {
        if !self.is_xapic() {
            data.fill(0xff);
            return;
        }
        data.fill(0);
        let offset = (offset & (MMIO_SIZE - 1)) as u32;
        let start = offset as usize & 0xf;
        let value = self
            .read_register(offset & !0xf, now)
            .unwrap_or(0)
            .to_le_bytes();
        if let Some(bytes) = value.get(start..start + data.len()) {
            data.copy_from_slice(bytes);
        }
    }

    /// Writes the register page. Only aligned 32-bit accesses count; `value` is that access, or
    /// ignored for any other `size` in bytes.
    pub fn mmio_write(&mut self, offset: u64, size: usize, value: u32, now: Now) -> Effect {
        if !self.is_xapic() || size != 4 || offset & 0xf != 0 {
            return Effect::None;
        }
        let offset = (offset & (MMIO_SIZE - 1)) as u32;
        match offset {
            ID => {
                self.set_reg(ID, value & 0xff00_0000);
                Effect::DestinationChanged
            }
            LDR => {
                self.set_reg(LDR, value & 0xff00_0000);
                Effect::DestinationChanged
            }
            DFR => {
                self.set_reg(DFR, value | 0x0fff_ffff);
                Effect::DestinationChanged
            }
            ICR2 => {
                self.set_reg(ICR2, value & 0xff00_0000);
                Effect::None
            }
            ICR => {
                let value = value & !ICR_BUSY;
                self.set_reg(ICR, value);
                self.send_ipi(value, self.reg(ICR2) >> 24)
            }
            SELF_IPI => Effect::None,
            _ => self
                .write_register(offset, value, now)
                .unwrap_or(Effect::None),
        }
    }

    /// Reads an x2APIC MSR, 0x800 to 0x8ff.
    pub fn msr_read(&self, msr: u32, now: Now) -> Result<u64, GeneralProtection> {
        let offset = self.x2apic_offset(msr)?;
        let low = self.read_register(offset, now).ok_or(GeneralProtection)?;
        let high = if offset == ICR { self.reg(ICR2) } else { 0 };
        Ok(u64::from(high) << 32 | u64::from(low))
    }

    /// Writes an x2APIC MSR, 0x800 to 0x8ff.
    pub fn msr_write(
        &mut self,
        msr: u32,
        value: u64,
        now: Now,
    ) -> Result<Effect, GeneralProtection> {
        let offset = self.x2apic_offset(msr)?;
        if offset == ICR {
            if value & X2APIC_ICR_RESERVED != 0 {
                return Err(GeneralProtection);
            }
            let low = value as u32 & !ICR_BUSY;
            let dest = (value >> 32) as u32;
            self.set_reg(ICR, low);
            self.set_reg(ICR2, dest);
            return Ok(self.send_ipi(low, dest));
        }
        let value = u32::try_from(value).map_err(|_| GeneralProtection)?;
        let reserved = match offset {
            TPR | SELF_IPI => !0xff,
            EOI | ESR => !0,
            SVR => !(0x3ff | SVR_DIRECTED_EOI),
            TIMER_DIVIDE => !0xb,
            ID | LDR => return Err(GeneralProtection),
            _ => 0,
        };
        if value & reserved != 0 {
            return Err(GeneralProtection);
        }
        if offset == SELF_IPI {
            return Ok(self.send_ipi(1 << 18 | value, 0));
        }
        self.write_register(offset, value, now)
            .ok_or(GeneralProtection)
    }

    fn x2apic_offset(&self, msr: u32) -> Result<u32, GeneralProtection> {
        if self.is_x2apic() && (X2APIC_MSR_FIRST..=X2APIC_MSR_LAST).contains(&msr) {
            Ok((msr - X2APIC_MSR_FIRST) << 4)
        } else {
            Err(GeneralProtection)
        }
    }

    /// The registers that both modes write alike; `None` for those that cannot be written.
    fn write_register(&mut self, offset: u32, value: u32, now: Now) -> Option<Effect> {
        Some(match offset {
            TPR => {
                self.set_reg(TPR, value & 0xff);
                Effect::PriorityChanged
            }
            EOI => self.eoi().map_or(Effect::None, Effect::Eoi),
            SVR => {
                self.write_svr(value);
                Effect::DestinationChanged
            }
            ESR => {
                let errors = core::mem::take(&mut self.esr_pending);
                self.set_reg(ESR, errors);
                Effect::None
            }
            TIMER_INITIAL => {
                self.write_initial_count(value, now);
                Effect::TimerChanged
            }
            TIMER_DIVIDE => {
                self.write_divide(value, now);
                Effect::TimerChanged
            }
            LVT_CMCI if !self.config.cmci => return None,
            _ => {
                self.write_lvt(offset, value)?;
                if offset == LVT_TIMER {
                    Effect::TimerChanged
                } else {
                    Effect::LvtChanged
                }
            }
        })
    }

    fn write_lvt(&mut self, offset: u32, value: u32) -> Option<()> {
        let mut mask = lvt_mask(offset)?;
        if offset == LVT_TIMER {
            mask |= if self.config.tsc_deadline {
                3 << 17
            } else {
                1 << 17
            };
        }
        let masked = if self.is_software_enabled() {
            0
        } else {
            LVT_MASKED
        };
        self.set_reg(offset, (value | masked) & mask);
        if offset == LVT_TIMER {
            self.update_timer_mode();
        }
        Some(())
    }

    fn write_svr(&mut self, value: u32) {
        let directed = if self.config.directed_eoi {
            SVR_DIRECTED_EOI
        } else {
            0
        };
        self.set_reg(SVR, value & (0x3ff | directed));
        if value & SVR_ENABLED == 0 {
            self.mask_lvts();
        }
    }

    fn send_ipi(&mut self, low: u32, dest: u32) -> Effect {
        let message = ApicMessage {
            dest,
            dest_mode: if low & 1 << 11 != 0 {
                DestMode::Logical
            } else {
                DestMode::Physical
            },
            delivery_mode: DeliveryMode::from_bits((low >> 8) as u8),
            vector: low as u8,
            trigger: if low & 1 << 15 != 0 {
                Trigger::Level
            } else {
                Trigger::Edge
            },
            level: low & 1 << 14 != 0,
            shorthand: match low >> 18 & 3 {
                0 => Shorthand::None,
                1 => Shorthand::ToSelf,
                2 => Shorthand::All,
                _ => Shorthand::AllButSelf,
            },
            redirect_hint: false,
        };
        let has_vector = matches!(
            message.delivery_mode,
            DeliveryMode::Fixed | DeliveryMode::LowestPriority
        );
        if has_vector && message.vector < 16 {
            self.raise_error(ESR_SEND_ILLEGAL_VECTOR);
            return Effect::None;
        }
        Effect::SendIpi(message)
    }
}
