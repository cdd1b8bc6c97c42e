//! Between the core's structs and those of `kvm_bindings`, which have the same layout.
#![expect(unsafe_code, reason = "copies values between types of one layout")]

use kvm_abi as core_abi;
use kvm_bindings as ext;

/// A type of the core's and its twin in `kvm_bindings`.
///
/// # Safety
/// Both have the same size and fields at the same offsets, all of them integers, so that the bytes of
/// one are a valid value of the other.
pub unsafe trait Twin: Copy {
    type Other;
    /// Checked wherever a conversion is used.
    const SAME_SIZE: () = assert!(size_of::<Self>() == size_of::<Self::Other>());
}

/// From the core's type.
pub fn out<T: Twin>(value: &T) -> T::Other {
    const { T::SAME_SIZE };
    // SAFETY: the trait promises one layout; the size is checked.
    unsafe { core::mem::transmute_copy(value) }
}

/// To the core's type.
pub fn into<T: Twin>(value: &T::Other) -> T {
    const { T::SAME_SIZE };
    // SAFETY: as in `out`.
    unsafe { core::mem::transmute_copy(value) }
}

macro_rules! twins {
    ($($name:ident),* $(,)?) => {
        $(
            // SAFETY: the tests of `kvm_abi` compare the layouts field by field.
            unsafe impl Twin for core_abi::$name {
                type Other = ext::$name;
            }
        )*
    };
}

twins!(
    kvm_regs,
    kvm_sregs,
    kvm_sregs2,
    kvm_fpu,
    kvm_xcrs,
    kvm_debugregs,
    kvm_mp_state,
    kvm_vcpu_events,
    kvm_clock_data,
    kvm_msi,
    kvm_lapic_state,
    kvm_xsave,
    kvm_pit_state2,
    kvm_guest_debug,
    kvm_translation,
    kvm_cpuid_entry2,
    kvm_msr_entry,
    kvm_pic_state,
);

/// `kvm_irqchip` of the core's chip state.
pub fn irqchip_out(chip_id: u32, state: &kvm_core::vm::ChipState) -> ext::kvm_irqchip {
    let mut chip = ext::kvm_irqchip {
        chip_id,
        ..Default::default()
    };
    match state {
        kvm_core::vm::ChipState::Pic(pic) => chip.chip.pic = out(pic),
        kvm_core::vm::ChipState::Ioapic(ioapic) => {
            let mut state = ext::kvm_ioapic_state {
                base_address: ioapic.base_address,
                ioregsel: ioapic.ioregsel,
                id: ioapic.id,
                irr: ioapic.irr,
                ..Default::default()
            };
            for (entry, bits) in state.redirtbl.iter_mut().zip(ioapic.redirtbl) {
                entry.bits = bits;
            }
            chip.chip.ioapic = state;
        }
    }
    chip
}

/// The core's chip state of `kvm_irqchip`.
pub fn irqchip_into(chip: &ext::kvm_irqchip) -> kvm_core::vm::ChipState {
    if chip.chip_id == core_abi::irqchip::IOAPIC {
        // SAFETY: every variant of the union is made of integers.
        let state = unsafe { chip.chip.ioapic };
        let mut ioapic = core_abi::kvm_ioapic_state {
            base_address: state.base_address,
            ioregsel: state.ioregsel,
            id: state.id,
            irr: state.irr,
            ..Default::default()
        };
        for (bits, entry) in ioapic.redirtbl.iter_mut().zip(state.redirtbl) {
            // SAFETY: as above.
            *bits = unsafe { entry.bits };
        }
        kvm_core::vm::ChipState::Ioapic(ioapic)
    } else {
        // SAFETY: as above.
        kvm_core::vm::ChipState::Pic(into(&unsafe { chip.chip.pic }))
    }
}

/// One GSI route.
pub fn route_into(entry: &ext::kvm_irq_routing_entry) -> core_abi::kvm_irq_routing_entry {
    let mut out = core_abi::kvm_irq_routing_entry {
        gsi: entry.gsi,
        type_: entry.type_,
        flags: entry.flags,
        ..Default::default()
    };
    match entry.type_ {
        ext::KVM_IRQ_ROUTING_IRQCHIP => {
            // SAFETY: the type says which variant the caller has filled.
            let chip = unsafe { entry.u.irqchip };
            out.u[0] = u64::from(chip.pin) << 32 | u64::from(chip.irqchip);
        }
        ext::KVM_IRQ_ROUTING_MSI => {
            // SAFETY: as above.
            let msi = unsafe { entry.u.msi };
            out.u[0] = u64::from(msi.address_hi) << 32 | u64::from(msi.address_lo);
            out.u[1] = u64::from(msi.data);
        }
        _ => {}
    }
    out
}
