//! Destination matching: which local APICs an [`ApicMessage`] reaches (SDM, "Determining IPI
//! Destination" and "Logical Destination Mode in x2APIC Mode").

use crate::message::{ApicMessage, DestMode, Shorthand};

/// Broadcast destination in xAPIC mode.
pub const XAPIC_BROADCAST: u32 = 0xff;
/// Broadcast destination in x2APIC mode.
pub const X2APIC_BROADCAST: u32 = 0xffff_ffff;

/// What destination matching needs to know of one local APIC; taken by
/// [`Lapic::destination`](crate::Lapic::destination), cheap to copy and to cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// Enabled in IA32_APIC_BASE. A disabled APIC matches nothing.
    pub enabled: bool,
    /// Enabled in the spurious-interrupt vector register.
    pub software_enabled: bool,
    /// In x2APIC mode.
    pub x2apic: bool,
    /// The ID register's value: 8 bits in xAPIC mode (the guest may change it), else 32.
    pub id: u32,
    /// The ID the vCPU was created with.
    pub vcpu_id: u32,
    /// Logical destination: the 8-bit logical ID in xAPIC mode, the whole LDR in x2APIC mode.
    pub logical_id: u32,
    /// Model, bits 31:28 of the DFR.
    pub model: u8,
    /// How many lowest-priority messages it has accepted so far.
    pub arbitration_count: u32,
}

impl Destination {
    fn is_broadcast(&self, dest: u32) -> bool {
        dest == if self.x2apic {
            X2APIC_BROADCAST
        } else {
            XAPIC_BROADCAST
        }
    }

    /// Whether `dest` in `mode` names this APIC; shorthands are not considered.
    pub fn matches(&self, dest: u32, mode: DestMode) -> bool {
        if self.is_broadcast(dest) {
            return true;
        }
        match mode {
            // An xAPIC-mode vCPU whose ID does not fit 8 bits still answers to the full ID, as in
            // KVM: it is how such a vCPU gets its INIT and SIPI.
            DestMode::Physical if self.x2apic || dest > 0xff => dest == self.full_id(),
            DestMode::Physical => dest == self.id,
            DestMode::Logical if self.x2apic => {
                self.logical_id >> 16 == dest >> 16 && self.logical_id & dest & 0xffff != 0
            }
            DestMode::Logical => match self.model {
                0xf => self.logical_id & dest != 0,
                0 => self.logical_id >> 4 == dest >> 4 && self.logical_id & dest & 0xf != 0,
                _ => false,
            },
        }
    }

    fn full_id(&self) -> u32 {
        if self.x2apic { self.id } else { self.vcpu_id }
    }
}

/// How one target of a lowest-priority message is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LowestPriority {
    /// The `vector mod n`-th of the n candidates: KVM's default (`vector_hashing`).
    #[default]
    VectorHash,
    /// The candidate that accepted the fewest such messages.
    RoundRobin,
}

/// What else delivery depends on.
#[derive(Clone, Copy, Debug, Default)]
pub struct DeliveryPolicy {
    /// Choice among the candidates of a lowest-priority message.
    pub lowest_priority: LowestPriority,
    /// `KVM_X2APIC_API_DISABLE_BROADCAST_QUIRK` is set. Without it a destination of 0xff in an
    /// MSI or IOAPIC message is a broadcast for APICs in x2APIC mode too.
    pub strict_x2apic_broadcast: bool,
}

/// Calls `deliver` with the key of every APIC that `message` addresses; returns how many.
///
/// `source` is the key of the sender of an IPI, `None` for the IOAPIC and for MSIs. `apics` gives
/// keys (vCPU indices, say) with their snapshots; it is walked twice for lowest-priority messages,
/// so an iterator that locks each APIC in turn works, too: a target that changes in between only
/// makes the choice stale, as on real hardware.
pub fn for_each_target<K, I>(
    message: &ApicMessage,
    source: Option<K>,
    policy: DeliveryPolicy,
    apics: I,
    mut deliver: impl FnMut(K),
) -> usize
where
    K: Copy + PartialEq,
    I: Iterator<Item = (K, Destination)> + Clone,
{
    let matches = |key: K, apic: &Destination| {
        apic.enabled
            && match message.shorthand {
                Shorthand::ToSelf => source == Some(key),
                Shorthand::All => true,
                Shorthand::AllButSelf => source != Some(key),
                Shorthand::None => {
                    let quirk = !policy.strict_x2apic_broadcast && source.is_none();
                    let dest = if quirk && message.dest == XAPIC_BROADCAST && apic.x2apic {
                        X2APIC_BROADCAST
                    } else {
                        message.dest
                    };
                    apic.matches(dest, message.dest_mode)
                }
            }
    };
    // The SDM leaves a physical broadcast with lowest priority undefined; KVM makes it fixed.
    let physical_broadcast =
        message.dest_mode == DestMode::Physical && message.dest == XAPIC_BROADCAST;
    if !message.is_lowest_priority() || physical_broadcast && !message.redirect_hint {
        let mut count = 0;
        for (key, apic) in apics {
            if matches(key, &apic) {
                deliver(key);
                count += 1;
            }
        }
        return count;
    }
    let candidates = apics.filter(|(key, apic)| apic.software_enabled && matches(*key, apic));
    let chosen = match policy.lowest_priority {
        LowestPriority::RoundRobin => candidates.min_by_key(|(_, apic)| apic.arbitration_count),
        LowestPriority::VectorHash => {
            let n = candidates.clone().count();
            let index = usize::from(message.vector).checked_rem(n).unwrap_or(0);
            candidates.clone().nth(index)
        }
    };
    match chosen {
        Some((key, _)) => {
            deliver(key);
            1
        }
        None => 0,
    }
}
