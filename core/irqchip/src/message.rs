//! The interrupt message that travels between the IOAPIC, MSIs, IPIs and the local APICs.

/// Delivery mode, the three-bit field of the ICR, an LVT entry, a redirection entry or MSI data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum DeliveryMode {
    /// The vector, at every destination.
    Fixed = 0,
    /// The vector, at one of the destinations.
    LowestPriority = 1,
    /// System management interrupt.
    Smi = 2,
    /// Reserved by the SDM; KVM calls it remote read and uses it to wake a halted vCPU.
    RemoteRead = 3,
    /// Non-maskable interrupt.
    Nmi = 4,
    /// INIT; with trigger level and level 0 it is the INIT level de-assert, a no-op.
    Init = 5,
    /// Start-up IPI; the vector is the page number to start at.
    Startup = 6,
    /// The vector comes from the 8259 pair.
    ExtInt = 7,
}

impl DeliveryMode {
    /// Decodes the low three bits of `bits`.
    pub const fn from_bits(bits: u8) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            3 => Self::RemoteRead,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::Startup,
            _ => Self::ExtInt,
        }
    }
}

/// How [`ApicMessage::dest`] names its targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DestMode {
    /// An APIC ID, or broadcast.
    Physical,
    /// A message destination address matched against each LDR.
    Logical,
}

/// Trigger mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Trigger {
    /// Edge.
    Edge,
    /// Level: the EOI is broadcast to the IOAPIC.
    Level,
}

/// Destination shorthand of the ICR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Shorthand {
    /// None: [`ApicMessage::dest`] counts.
    None,
    /// The sender itself.
    ToSelf,
    /// All, the sender included.
    All,
    /// All but the sender.
    AllButSelf,
}

/// One interrupt message on the (virtual) APIC bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ApicMessage {
    /// Destination: 8 bits from xAPIC senders, 32 bits from x2APIC ones and extended MSIs.
    pub dest: u32,
    /// What `dest` means.
    pub dest_mode: DestMode,
    /// What arrives.
    pub delivery_mode: DeliveryMode,
    /// The vector, for the modes that have one.
    pub vector: u8,
    /// Trigger mode.
    pub trigger: Trigger,
    /// Assert (true) or de-assert; matters with trigger level only.
    pub level: bool,
    /// ICR shorthand; `None` from every sender but an ICR.
    pub shorthand: Shorthand,
    /// The MSI redirection hint: one target is to be chosen as if by lowest priority.
    pub redirect_hint: bool,
}

impl ApicMessage {
    /// Whether one target is chosen among those that match.
    pub fn is_lowest_priority(&self) -> bool {
        self.delivery_mode == DeliveryMode::LowestPriority || self.redirect_hint
    }
}

/// A message-signalled interrupt as a device writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Msi {
    /// Address; bits 63:40 hold destination bits 31:8 when the extended format is in use.
    pub address: u64,
    /// Data.
    pub data: u32,
}

impl Msi {
    /// Whether the address is one KVM refuses: in the extended format (`KVM_X2APIC_API_USE_32BIT_IDS`)
    /// bits 39:32 must be zero.
    pub fn is_valid(&self, extended_dest: bool) -> bool {
        !extended_dest || (self.address >> 32) & 0xff == 0
    }

    /// Decodes per the SDM's message address and data register formats. `extended_dest`: take
    /// destination bits 31:8 from the upper address half.
    pub fn message(&self, extended_dest: bool) -> ApicMessage {
        let low = self.address as u32;
        let mut dest = (low >> 12) & 0xff;
        if extended_dest {
            dest |= (self.address >> 32) as u32 & 0xffff_ff00;
        }
        ApicMessage {
            dest,
            dest_mode: if low & 4 != 0 {
                DestMode::Logical
            } else {
                DestMode::Physical
            },
            delivery_mode: DeliveryMode::from_bits((self.data >> 8) as u8),
            vector: self.data as u8,
            trigger: if self.data & (1 << 15) != 0 {
                Trigger::Level
            } else {
                Trigger::Edge
            },
            level: true,
            shorthand: Shorthand::None,
            redirect_hint: low & 8 != 0,
        }
    }
}

/// Who drives an interrupt line. A line is high while any of its sources holds it high.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum IrqSource {
    /// `KVM_IRQ_LINE` and plain irqfds.
    Userspace = 0,
    /// Resampling irqfds.
    IrqfdResample = 1,
    /// The in-kernel PIT.
    Pit = 2,
}

/// Levels of one line by source.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct LineLevel(u8);

impl LineLevel {
    /// Records `level` for `source` and returns the level of the line.
    pub(crate) fn set(&mut self, source: IrqSource, level: bool) -> bool {
        let bit = 1 << source as u8;
        if level {
            self.0 |= bit;
        } else {
            self.0 &= !bit;
        }
        self.0 != 0
    }
}
