//! The local APIC (SDM, "Advanced Programmable Interrupt Controller"), as KVM models it.

mod access;
mod registers;
mod state;
mod timer;

#[cfg(test)]
mod tests;

pub use state::{LAPIC_STATE_SIZE, WrongApicId};
pub use timer::Deadline;

use crate::delivery::Destination;
use crate::message::{ApicMessage, DeliveryMode, Trigger};
use registers::*;

/// Default physical address of the register page.
pub const DEFAULT_BASE: u64 = 0xfee0_0000;
/// Size in bytes of the register page.
pub const MMIO_SIZE: u64 = 0x1000;
/// IA32_APIC_BASE: the bootstrap processor.
pub const BASE_BSP: u64 = 1 << 8;
/// IA32_APIC_BASE: x2APIC mode.
pub const BASE_X2APIC: u64 = 1 << 10;
/// IA32_APIC_BASE: enabled.
pub const BASE_ENABLED: u64 = 1 << 11;
/// First x2APIC MSR.
pub const X2APIC_MSR_FIRST: u32 = 0x800;
/// Last x2APIC MSR.
pub const X2APIC_MSR_LAST: u32 = 0x8ff;

const BASE_RESERVED: u64 = 0x2ff;
const BASE_ADDRESS: u64 = !0xfff;

/// The two clocks, read together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Now {
    /// Monotonic nanoseconds.
    pub ns: u64,
    /// The guest's TSC.
    pub tsc: u64,
}

/// What distinguishes one vCPU's local APIC from another's, mostly from its CPUID.
#[derive(Clone, Copy, Debug)]
pub struct LapicConfig {
    /// The vCPU's APIC ID.
    pub apic_id: u32,
    /// Bootstrap processor.
    pub bsp: bool,
    /// CPUID offers x2APIC.
    pub x2apic: bool,
    /// CPUID offers the TSC-deadline timer.
    pub tsc_deadline: bool,
    /// Physical address width; IA32_APIC_BASE bits from here on are reserved.
    pub max_phys_addr: u8,
    /// The IOAPIC is in user space and has an EOI register: offer suppression of EOI broadcasts.
    pub directed_eoi: bool,
    /// IA32_MCG_CAP offers corrected machine-check interrupts: a seventh LVT entry.
    pub cmci: bool,
    /// The BSP comes out of reset with LINT0 as ExtINT (`KVM_X86_QUIRK_LINT0_REENABLED`).
    pub lint0_reenabled: bool,
    /// Length of a bus cycle, 1 unless `KVM_CAP_X86_APIC_BUS_CYCLES_NS` set it.
    pub bus_cycle_ns: u32,
}

impl LapicConfig {
    /// KVM's defaults for a vCPU with this APIC ID.
    pub fn new(apic_id: u32, bsp: bool) -> Self {
        Self {
            apic_id,
            bsp,
            x2apic: true,
            tsc_deadline: true,
            max_phys_addr: 46,
            directed_eoi: false,
            cmci: false,
            lint0_reenabled: true,
            bus_cycle_ns: 1,
        }
    }
}

/// #GP(0): an MSR access that the mode or the reserved bits forbid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GeneralProtection;

/// What [`Lapic::accept`] did, and what is left to the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// Not accepted: disabled, masked, or without effect.
    No,
    /// In IRR; see [`Lapic::highest_pending`].
    Pending,
    /// The vector was in IRR already; nothing new will be seen.
    Coalesced,
    /// Inject an NMI.
    Nmi,
    /// Inject an SMI.
    Smi,
    /// Record INIT.
    Init,
    /// Record a SIPI with this vector.
    Startup(u8),
    /// Wake the vCPU from HLT (KVM's `pv_unhalted`).
    RemoteRead,
}

impl Accepted {
    /// Whether it counts as a delivery (`KVM_IRQ_LINE_STATUS`, [`Ioapic::not_accepted`](crate::Ioapic::not_accepted)).
    pub fn is_accepted(self) -> bool {
        self != Self::No
    }
}

/// A completed interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndOfInterrupt {
    /// Its vector.
    pub vector: u8,
    /// It was level-triggered.
    pub level: bool,
    /// An EOI message goes to the IOAPICs: level-triggered and not suppressed by the guest. When
    /// false, acknowledge listeners of the pins with this vector are still to be told.
    pub broadcast: bool,
}

/// What a register write asks of the caller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Nothing.
    None,
    /// Deliver an IPI; this APIC is the source.
    SendIpi(ApicMessage),
    /// Complete an interrupt at the IOAPIC; look for pending interrupts again.
    Eoi(EndOfInterrupt),
    /// Look for pending interrupts again.
    PriorityChanged,
    /// [`Lapic::destination`] changed.
    DestinationChanged,
    /// [`Lapic::next_deadline`] changed.
    TimerChanged,
    /// LVT entries changed (LINT0: [`Lapic::accepts_pic`], [`Lapic::lint0_is_nmi`]).
    LvtChanged,
}

/// The local interrupt sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Lvt {
    /// Corrected machine checks.
    Cmci = LVT_CMCI,
    /// Timer.
    Timer = LVT_TIMER,
    /// Thermal sensor.
    Thermal = LVT_THERMAL,
    /// Performance counters. The entry masks itself on delivery.
    Performance = LVT_PMC,
    /// LINT0 pin.
    Lint0 = LVT_LINT0,
    /// LINT1 pin.
    Lint1 = LVT_LINT1,
    /// APIC errors.
    Error = LVT_ERROR,
}

/// One vCPU's local APIC.
#[derive(Clone, Debug)]
pub struct Lapic {
    config: LapicConfig,
    base: u64,
    /// Registers by offset / 16, but for the vector sets and those that are computed.
    regs: [u32; 64],
    irr: VectorSet,
    isr: VectorSet,
    tmr: VectorSet,
    /// Errors since the guest last wrote ESR.
    esr_pending: u32,
    arbitration_count: u32,
    timer: timer::Timer,
}

impl Lapic {
    /// A local APIC after power-on.
    pub fn new(config: LapicConfig) -> Self {
        let mut apic = Self {
            config,
            base: 0,
            regs: [0; 64],
            irr: VectorSet::default(),
            isr: VectorSet::default(),
            tmr: VectorSet::default(),
            esr_pending: 0,
            arbitration_count: 0,
            timer: timer::Timer::default(),
        };
        apic.reset(false);
        apic
    }

    /// RESET, or INIT if `init`, which keeps IA32_APIC_BASE and the ID.
    pub fn reset(&mut self, init: bool) {
        if !init {
            let bsp = if self.config.bsp { BASE_BSP } else { 0 };
            self.set_base_unchecked(DEFAULT_BASE | BASE_ENABLED | bsp);
        }
        let (id, ldr) = (self.reg(ID), self.reg(LDR));
        self.regs = [0; 64];
        self.set_reg(ID, if init { id } else { self.config.apic_id << 24 });
        if self.is_x2apic() {
            self.set_reg(LDR, ldr);
        }
        self.set_reg(VERSION, self.version());
        self.mask_lvts();
        if self.config.bsp && self.config.lint0_reenabled {
            self.set_reg(LVT_LINT0, (DeliveryMode::ExtInt as u32) << 8);
        }
        self.set_reg(DFR, u32::MAX);
        self.set_reg(SVR, 0xff);
        self.irr = VectorSet::default();
        self.isr = VectorSet::default();
        self.tmr = VectorSet::default();
        self.esr_pending = 0;
        self.arbitration_count = 0;
        self.timer = timer::Timer::default();
    }

    /// The configuration.
    pub fn config(&self) -> &LapicConfig {
        &self.config
    }

    /// Replaces the configuration, after `KVM_SET_CPUID2` say. The ID takes effect at the next
    /// reset or mode change.
    pub fn set_config(&mut self, config: LapicConfig) {
        self.config = config;
        self.set_reg(VERSION, self.version());
    }

    fn reg(&self, offset: u32) -> u32 {
        self.regs.get(offset as usize >> 4).copied().unwrap_or(0)
    }

    fn set_reg(&mut self, offset: u32, value: u32) {
        if let Some(reg) = self.regs.get_mut(offset as usize >> 4) {
            *reg = value;
        }
    }

    fn lvts(&self) -> impl Iterator<Item = u32> + use<> {
        let cmci = self.config.cmci.then_some(LVT_CMCI);
        (LVT_TIMER..=LVT_ERROR).step_by(0x10).chain(cmci)
    }

    fn version(&self) -> u32 {
        let max_lvt = if self.config.cmci { 6 } else { 5 };
        let directed = if self.config.directed_eoi {
            VERSION_DIRECTED_EOI
        } else {
            0
        };
        0x14 | max_lvt << 16 | directed
    }

    fn mask_lvts(&mut self) {
        for offset in self.lvts() {
            self.set_reg(offset, self.reg(offset) | LVT_MASKED);
        }
        self.update_timer_mode();
    }

    // IA32_APIC_BASE and modes.

    /// IA32_APIC_BASE.
    pub fn base(&self) -> u64 {
        self.base
    }

    /// Physical address of the register page.
    pub fn base_address(&self) -> u64 {
        self.base & BASE_ADDRESS
    }

    /// Enabled in IA32_APIC_BASE.
    pub fn is_enabled(&self) -> bool {
        self.base & BASE_ENABLED != 0
    }

    /// In x2APIC mode.
    pub fn is_x2apic(&self) -> bool {
        self.base & (BASE_ENABLED | BASE_X2APIC) == BASE_ENABLED | BASE_X2APIC
    }

    /// In xAPIC mode: the register page is there.
    pub fn is_xapic(&self) -> bool {
        self.base & (BASE_ENABLED | BASE_X2APIC) == BASE_ENABLED
    }

    /// Enabled in the spurious-interrupt vector register.
    pub fn is_software_enabled(&self) -> bool {
        self.reg(SVR) & SVR_ENABLED != 0
    }

    /// Writes IA32_APIC_BASE (SDM, "x2APIC State Transitions"). The guest (not `host_initiated`)
    /// may not go from x2APIC to xAPIC mode, nor from disabled to x2APIC mode.
    pub fn set_base(&mut self, value: u64, host_initiated: bool) -> Result<(), GeneralProtection> {
        let width = u32::from(self.config.max_phys_addr.min(63));
        let mut reserved = BASE_RESERVED | !0 << width;
        if !self.config.x2apic {
            reserved |= BASE_X2APIC;
        }
        let mode = value & (BASE_ENABLED | BASE_X2APIC);
        let from_x2apic = self.is_x2apic() && mode == BASE_ENABLED;
        let to_x2apic = !self.is_enabled() && mode == BASE_ENABLED | BASE_X2APIC;
        if value & reserved != 0
            || mode == BASE_X2APIC
            || !host_initiated && (from_x2apic || to_x2apic)
        {
            return Err(GeneralProtection);
        }
        self.set_base_unchecked(value);
        Ok(())
    }

    fn set_base_unchecked(&mut self, value: u64) {
        let changed = self.base ^ value;
        self.base = value;
        if changed & (BASE_ENABLED | BASE_X2APIC) == 0 {
            return;
        }
        if self.is_x2apic() {
            self.set_x2apic_id();
        } else if self.is_enabled() {
            self.set_reg(ID, self.config.apic_id << 24);
        }
    }

    fn set_x2apic_id(&mut self) {
        let id = self.config.apic_id;
        self.set_reg(ID, id);
        self.set_reg(LDR, id >> 4 << 16 | 1 << (id & 0xf));
    }

    /// A snapshot for [`for_each_target`](crate::for_each_target).
    pub fn destination(&self) -> Destination {
        let x2apic = self.is_x2apic();
        let shift = if x2apic { 0 } else { 24 };
        Destination {
            enabled: self.is_enabled(),
            software_enabled: self.is_software_enabled(),
            x2apic,
            id: self.reg(ID) >> shift,
            vcpu_id: self.config.apic_id,
            logical_id: self.reg(LDR) >> shift,
            model: (self.reg(DFR) >> 28) as u8,
            arbitration_count: self.arbitration_count,
        }
    }

    // Priorities.

    /// The task priority register.
    pub fn tpr(&self) -> u8 {
        self.reg(TPR) as u8
    }

    /// Writes the task priority register.
    pub fn set_tpr(&mut self, tpr: u8) {
        self.set_reg(TPR, tpr.into());
    }

    /// CR8: the task priority class.
    pub fn cr8(&self) -> u64 {
        u64::from(self.tpr() >> 4)
    }

    /// Writes CR8; the caller has checked the reserved bits.
    pub fn set_cr8(&mut self, cr8: u64) {
        self.set_reg(TPR, (cr8 as u32 & 0xf) << 4);
    }

    /// The processor priority register.
    pub fn ppr(&self) -> u8 {
        let class = self.isr.highest().unwrap_or(0) & 0xf0;
        let tpr = self.tpr();
        if tpr & 0xf0 >= class { tpr } else { class }
    }

    /// The highest vector in IRR, deliverable or not.
    pub fn highest_requested(&self) -> Option<u8> {
        self.irr.highest()
    }

    /// The highest vector in service.
    pub fn highest_in_service(&self) -> Option<u8> {
        self.isr.highest()
    }

    /// Whether the EOI of `vector` goes to the IOAPIC (its TMR bit).
    pub fn is_level_triggered(&self, vector: u8) -> bool {
        self.tmr.contains(vector)
    }

    /// The vector to deliver now: the highest requested one, if its class is above PPR's.
    pub fn highest_pending(&self) -> Option<u8> {
        if !self.is_enabled() {
            return None;
        }
        self.irr
            .highest()
            .filter(|vector| vector & 0xf0 > self.ppr() & 0xf0)
    }

    /// Puts the highest pending vector in service and returns it; the spurious vector if none is.
    pub fn ack(&mut self) -> u8 {
        let Some(vector) = self.highest_pending() else {
            return self.reg(SVR) as u8;
        };
        self.irr.clear(vector);
        self.isr.set(vector);
        vector
    }

    /// Ends the highest interrupt in service; `None` if none is. For a PV EOI too.
    pub fn eoi(&mut self) -> Option<EndOfInterrupt> {
        let vector = self.isr.highest()?;
        self.isr.clear(vector);
        let level = self.tmr.contains(vector);
        let broadcast = level && self.reg(SVR) & SVR_DIRECTED_EOI == 0;
        Some(EndOfInterrupt {
            vector,
            level,
            broadcast,
        })
    }

    // Arrival of interrupts.

    /// Takes a message addressed to this APIC.
    pub fn accept_message(&mut self, message: &ApicMessage) -> Accepted {
        self.accept(
            message.delivery_mode,
            message.vector,
            message.trigger,
            message.level,
        )
    }

    /// Takes an interrupt. `level` is the assert bit, which matters for level trigger only.
    pub fn accept(
        &mut self,
        mode: DeliveryMode,
        vector: u8,
        trigger: Trigger,
        level: bool,
    ) -> Accepted {
        let deassert = trigger == Trigger::Level && !level;
        match mode {
            DeliveryMode::Fixed | DeliveryMode::LowestPriority => {
                if mode == DeliveryMode::LowestPriority {
                    self.arbitration_count = self.arbitration_count.saturating_add(1);
                }
                if deassert || !self.is_enabled() || !self.is_software_enabled() {
                    return Accepted::No;
                }
                self.accept_vector(vector, trigger)
            }
            DeliveryMode::RemoteRead => Accepted::RemoteRead,
            DeliveryMode::Smi => Accepted::Smi,
            DeliveryMode::Nmi => Accepted::Nmi,
            DeliveryMode::Init if deassert => Accepted::No,
            DeliveryMode::Init => Accepted::Init,
            DeliveryMode::Startup => Accepted::Startup(vector),
            // Only LINT0 has it, and the PIC is asked directly.
            DeliveryMode::ExtInt => Accepted::No,
        }
    }

    fn accept_vector(&mut self, vector: u8, trigger: Trigger) -> Accepted {
        if vector < 16 {
            self.raise_error(ESR_RECEIVE_ILLEGAL_VECTOR);
            return Accepted::No;
        }
        if self.irr.contains(vector) {
            // The trigger mode of the last arrival counts, as in KVM.
            self.set_trigger(vector, trigger);
            return Accepted::Coalesced;
        }
        self.set_trigger(vector, trigger);
        self.irr.set(vector);
        Accepted::Pending
    }

    fn set_trigger(&mut self, vector: u8, trigger: Trigger) {
        match trigger {
            Trigger::Level => self.tmr.set(vector),
            Trigger::Edge => self.tmr.clear(vector),
        }
    }

    /// Records errors; a new one raises the error interrupt.
    fn raise_error(&mut self, errors: u32) {
        let new = errors & !self.esr_pending;
        self.esr_pending |= errors;
        let vector = self.reg(LVT_ERROR) as u8;
        // An illegal vector of the error entry itself must not raise the error again.
        if new != 0 && vector >= 16 {
            self.deliver_lvt(Lvt::Error);
        }
    }

    /// Delivers a local interrupt through its LVT entry.
    pub fn deliver_lvt(&mut self, lvt: Lvt) -> Accepted {
        let entry = self.reg(lvt as u32);
        if !self.is_enabled() || entry & LVT_MASKED != 0 || lvt == Lvt::Cmci && !self.config.cmci {
            return Accepted::No;
        }
        let trigger = if entry & LVT_LEVEL != 0 {
            Trigger::Level
        } else {
            Trigger::Edge
        };
        let mode = DeliveryMode::from_bits((entry >> 8) as u8);
        let accepted = self.accept(mode, entry as u8, trigger, true);
        if lvt == Lvt::Performance && accepted.is_accepted() {
            self.set_reg(LVT_PMC, entry | LVT_MASKED);
        }
        accepted
    }

    /// Whether this vCPU takes the PIC's interrupts: through LINT0 as ExtINT, or past the APIC
    /// when that is disabled.
    pub fn accepts_pic(&self) -> bool {
        !self.is_enabled() || self.lint0_unmasked_as(DeliveryMode::ExtInt)
    }

    /// Whether LINT0 gives NMIs: KVM's virtual-wire NMI watchdog, pulsed by the PIT.
    pub fn lint0_is_nmi(&self) -> bool {
        self.is_enabled() && self.lint0_unmasked_as(DeliveryMode::Nmi)
    }

    fn lint0_unmasked_as(&self, mode: DeliveryMode) -> bool {
        let entry = self.reg(LVT_LINT0);
        entry & LVT_MASKED == 0 && DeliveryMode::from_bits((entry >> 8) as u8) == mode
    }
}
