//! INTx lines: level-triggered, shared by the devices whose slots map to the same GSI.

use std::sync::{Arc, Mutex, PoisonError};

use crate::hypervisor::Vm;
use crate::layout::{INTX_GSI_BASE, INTX_GSIS};

/// The GSI of a slot's INTA#. The DSDT's `_PRT` says the same.
#[must_use]
pub fn gsi(slot: u8) -> u32 {
    INTX_GSI_BASE + u32::from(slot) % INTX_GSIS
}

/// All lines: for each GSI, a bit per slot that raises it.
pub struct Lines {
    vm: Option<Arc<Vm>>,
    raised: Mutex<[u32; INTX_GSIS as usize]>,
}

impl Lines {
    /// Lines into the I/O APIC of `vm`; none for tests without a VM.
    #[must_use]
    pub fn new(vm: Option<Arc<Vm>>) -> Self {
        Self {
            vm,
            raised: Mutex::new([0; INTX_GSIS as usize]),
        }
    }

    /// Raises or lowers the line of `slot`.
    pub fn set(&self, slot: u8, raise: bool) {
        let gsi = gsi(slot);
        let bit = 1u32 << (slot % 32);
        // Held over the call, so that two devices' changes arrive in order.
        let mut raised = self.raised.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(line) = raised.get_mut((gsi - INTX_GSI_BASE) as usize) else {
            return;
        };
        let before = *line != 0;
        *line = if raise { *line | bit } else { *line & !bit };
        let after = *line != 0;
        if before != after
            && let Some(vm) = &self.vm
            && let Err(e) = vm.set_irq_line(gsi, after)
        {
            log::warn!("PCI interrupt line: {e}");
        }
    }

    /// Whether `slot` raises its line.
    #[must_use]
    pub fn raised(&self, slot: u8) -> bool {
        let raised = self.raised.lock().unwrap_or_else(PoisonError::into_inner);
        raised
            .get((gsi(slot) - INTX_GSI_BASE) as usize)
            .is_some_and(|line| line & (1 << (slot % 32)) != 0)
    }
}
