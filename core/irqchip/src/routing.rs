//! The GSI routing table (`KVM_SET_GSI_ROUTING`).

use crate::message::Msi;
use alloc::vec::Vec;

/// `KVM_MAX_IRQ_ROUTES`: the most routes in a table, and the bound of a GSI.
pub const MAX_ROUTES: usize = 4096;

const PIC_LINES: usize = 16;
const IOAPIC_PINS: usize = crate::ioapic::PINS;

/// Where a GSI leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteTarget {
    /// Line 0-15 of the 8259 pair (8 and above: the slave).
    Pic(u8),
    /// Pin 0-23 of the IOAPIC.
    Ioapic(u8),
    /// A message.
    Msi(Msi),
    /// A Hyper-V synthetic interrupt source.
    HypervSint {
        /// Virtual processor index.
        vcpu: u32,
        /// Source number.
        sint: u32,
    },
}

impl RouteTarget {
    /// KVM's irqchip number (`KVM_IRQCHIP_*`), for the targets that have one.
    fn chip(&self) -> Option<u8> {
        match self {
            Self::Pic(line) if *line < 8 => Some(0),
            Self::Pic(_) => Some(1),
            Self::Ioapic(_) => Some(2),
            Self::Msi(_) | Self::HypervSint { .. } => None,
        }
    }
}

/// One entry of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The GSI, below [`MAX_ROUTES`].
    pub gsi: u32,
    /// Where it leads.
    pub target: RouteTarget,
}

/// Why a table is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteError {
    /// More than [`MAX_ROUTES`] entries (`EINVAL`).
    TooMany,
    /// A GSI not below [`MAX_ROUTES`] (`EINVAL`).
    BadGsi,
    /// A PIC line or IOAPIC pin that does not exist (`EINVAL`).
    BadPin,
    /// A GSI leads twice to the same chip, or to an MSI and something else (`EINVAL`).
    Conflict,
    /// No memory (`ENOMEM`).
    NoMemory,
}

impl core::fmt::Display for RouteError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            Self::TooMany => "more interrupt routes than the limit of 4096",
            Self::BadGsi => "a GSI is out of range; it must be below 4096",
            Self::BadPin => "an interrupt route names a pin that does not exist",
            Self::Conflict => "a GSI leads twice to the same chip, or to an MSI and another target",
            Self::NoMemory => "no memory for the interrupt routing table",
        })
    }
}

impl core::error::Error for RouteError {}

/// An immutable routing table; `KVM_SET_GSI_ROUTING` builds a new one.
#[derive(Clone, Debug)]
pub struct RoutingTable {
    /// Sorted by GSI.
    routes: Vec<Route>,
    pic: [Option<u32>; PIC_LINES],
    ioapic: [Option<u32>; IOAPIC_PINS],
}

impl RoutingTable {
    /// A table without routes.
    pub fn empty() -> Self {
        Self {
            routes: Vec::new(),
            pic: [None; PIC_LINES],
            ioapic: [None; IOAPIC_PINS],
        }
    }

    /// Checks and indexes `routes` with KVM's rules.
    pub fn new(routes: &[Route]) -> Result<Self, RouteError> {
        if routes.len() > MAX_ROUTES {
            return Err(RouteError::TooMany);
        }
        let mut table = Self::empty();
        table
            .routes
            .try_reserve_exact(routes.len())
            .map_err(|_| RouteError::NoMemory)?;
        for route in routes {
            if route.gsi as usize >= MAX_ROUTES {
                return Err(RouteError::BadGsi);
            }
            let slot = match route.target {
                RouteTarget::Pic(line) => table.pic.get_mut(usize::from(line)),
                RouteTarget::Ioapic(pin) => table.ioapic.get_mut(usize::from(pin)),
                RouteTarget::Msi(_) | RouteTarget::HypervSint { .. } => {
                    table.routes.push(*route);
                    continue;
                }
            };
            *slot.ok_or(RouteError::BadPin)? = Some(route.gsi);
            table.routes.push(*route);
        }
        table
            .routes
            .sort_unstable_by_key(|r| (r.gsi, r.target.chip()));
        let conflict = table.routes.windows(2).any(|pair| {
            pair[0].gsi == pair[1].gsi
                && (pair[0].target.chip().is_none()
                    || pair[0].target.chip() == pair[1].target.chip())
        });
        if conflict {
            Err(RouteError::Conflict)
        } else {
            Ok(table)
        }
    }

    /// The table a VM gets from `KVM_CREATE_IRQCHIP`: GSI n leads to IOAPIC pin n and, below 16,
    /// to PIC line n too. (The IRQ 0 to pin 2 override is firmware's and the VMM's affair.)
    pub fn x86_default() -> Result<Self, RouteError> {
        let mut routes = Vec::new();
        routes
            .try_reserve_exact(PIC_LINES + IOAPIC_PINS)
            .map_err(|_| RouteError::NoMemory)?;
        for gsi in 0..IOAPIC_PINS as u8 {
            routes.push(Route {
                gsi: gsi.into(),
                target: RouteTarget::Ioapic(gsi),
            });
            if usize::from(gsi) < PIC_LINES {
                routes.push(Route {
                    gsi: gsi.into(),
                    target: RouteTarget::Pic(gsi),
                });
            }
        }
        Self::new(&routes)
    }

    /// The routes of one GSI, at most three; empty if it leads nowhere.
    pub fn lookup(&self, gsi: u32) -> &[Route] {
        let start = self.routes.partition_point(|r| r.gsi < gsi);
        let len = self.routes[start..].partition_point(|r| r.gsi == gsi);
        &self.routes[start..start + len]
    }

    /// The GSI that leads to a PIC line or IOAPIC pin, for acknowledge notifications.
    pub fn gsi_of(&self, target: RouteTarget) -> Option<u32> {
        match target {
            RouteTarget::Pic(line) => *self.pic.get(usize::from(line))?,
            RouteTarget::Ioapic(pin) => *self.ioapic.get(usize::from(pin))?,
            RouteTarget::Msi(_) | RouteTarget::HypervSint { .. } => None,
        }
    }

    /// All routes, sorted by GSI.
    pub fn routes(&self) -> &[Route] {
        &self.routes
    }
}
