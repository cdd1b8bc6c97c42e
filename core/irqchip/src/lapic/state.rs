//! The local APIC's registers as `struct kvm_lapic_state` holds them.

use super::registers::*;
use super::{Lapic, Now};

/// Size of `struct kvm_lapic_state`.
pub const LAPIC_STATE_SIZE: usize = 0x400;

/// The ID register of a restored state is not the vCPU's (`EINVAL`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WrongApicId;

impl core::fmt::Display for WrongApicId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("the local APIC state holds another APIC ID than the vCPU's")
    }
}

impl core::error::Error for WrongApicId {}

fn put(page: &mut [u8; LAPIC_STATE_SIZE], offset: u32, value: u32) {
    if let Some(bytes) = page.get_mut(offset as usize..offset as usize + 4) {
        bytes.copy_from_slice(&value.to_le_bytes());
    }
}

fn get(page: &[u8; LAPIC_STATE_SIZE], offset: u32) -> u32 {
    let bytes = page.get(offset as usize..offset as usize + 4);
    bytes
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

impl Lapic {
    /// The registers for `KVM_GET_LAPIC`. `wide_id`: in x2APIC mode the ID register holds all 32
    /// bits (`KVM_X2APIC_API_USE_32BIT_IDS`); otherwise its low 8 bits are in 31:24, as in xAPIC
    /// mode.
    pub fn save(&self, wide_id: bool, now: Now) -> [u8; LAPIC_STATE_SIZE] {
        let mut page = [0; LAPIC_STATE_SIZE];
        for (offset, value) in (0..).step_by(0x10).zip(self.regs) {
            put(&mut page, offset, value);
        }
        for (base, set) in [(ISR, &self.isr), (TMR, &self.tmr), (IRR, &self.irr)] {
            for (offset, word) in (base..).step_by(0x10).zip(set.0) {
                put(&mut page, offset, word);
            }
        }
        put(&mut page, PPR, self.ppr().into());
        put(&mut page, TIMER_CURRENT, self.current_count(now));
        if self.is_x2apic() && !wide_id {
            put(&mut page, ID, self.reg(ID) << 24);
        }
        page
    }

    /// Restores registers (`KVM_SET_LAPIC`); IA32_APIC_BASE must have been restored before, since
    /// it tells the mode. The timer goes on from the current count. Call [`Lapic::next_deadline`]
    /// and take a new [`Lapic::destination`] afterwards.
    pub fn restore(
        &mut self,
        page: &[u8; LAPIC_STATE_SIZE],
        wide_id: bool,
        now: Now,
    ) -> Result<(), WrongApicId> {
        if self.is_x2apic() && wide_id && get(page, ID) != self.config.apic_id {
            return Err(WrongApicId);
        }
        for (offset, value) in (0..).step_by(0x10).zip(self.regs.iter_mut()) {
            *value = get(page, offset);
        }
        for (base, set) in [
            (ISR, &mut self.isr),
            (TMR, &mut self.tmr),
            (IRR, &mut self.irr),
        ] {
            for (offset, word) in (base..).step_by(0x10).zip(set.0.iter_mut()) {
                *word = get(page, offset);
            }
        }
        if self.is_x2apic() {
            self.set_x2apic_id();
        }
        self.set_reg(VERSION, self.version());
        self.set_reg(TIMER_CURRENT, 0);
        self.esr_pending = 0;
        self.arbitration_count = 0;
        self.stop_timer();
        self.timer.mode = Default::default();
        let initial = self.reg(TIMER_INITIAL);
        self.update_timer_mode();
        self.set_reg(TIMER_INITIAL, initial);
        self.start_counting(Some(get(page, TIMER_CURRENT)), now);
        Ok(())
    }
}
