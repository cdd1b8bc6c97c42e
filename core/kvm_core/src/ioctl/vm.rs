//! The ioctls of a VM.

use super::{Answer, VmFile, behind, caps, get, get_list, put};
use crate::ioeventfd::Match;
use crate::msr_filter::MsrFilter;
use crate::vm::ChipState;
use guestmem::Region;
use kvm_abi::ioctl::*;
use kvm_abi::kvm_userspace_memory_region2;
use kvm_abi::{
    Errno, device, ioeventfd_flag, irqchip, irqfd_flag, kvm_clear_dirty_log, kvm_clock_data,
    kvm_coalesced_mmio_zone, kvm_create_device, kvm_dirty_log, kvm_enable_cap, kvm_ioapic_state,
    kvm_ioeventfd, kvm_irq_level, kvm_irq_routing_entry, kvm_irqchip, kvm_irqfd, kvm_msi,
    kvm_msr_filter, kvm_pic_state, kvm_pit_config, kvm_pit_state, kvm_pit_state2,
    kvm_reinject_control, kvm_userspace_memory_region, list_head,
};
use zerocopy::{FromBytes, IntoBytes};

/// Answers an ioctl on a VM's descriptor.
///
/// # Errors
/// KVM's, for each call; ENOTTY for what is none.
pub fn call(file: &dyn VmFile, cmd: u32, arg: u64) -> Answer {
    let vm = file.vm();
    match cmd {
        KVM_CHECK_EXTENSION => Ok(caps::check(Some(vm), arg)),
        KVM_ENABLE_CAP => {
            let c: kvm_enable_cap = get(file, arg)?;
            caps::enable_on_vm(vm, &c)
        }
        KVM_CREATE_VCPU => file.create_vcpu(u32::try_from(arg).map_err(|_| Errno::EINVAL)?),

        // Memory.
        KVM_SET_USER_MEMORY_REGION => {
            let r: kvm_userspace_memory_region = get(file, arg)?;
            vm.set_memory_region(&Region {
                slot: r.slot,
                flags: r.flags,
                gpa: r.guest_phys_addr,
                size: r.memory_size,
                hva: r.userspace_addr,
            })?;
            Ok(0)
        }
        KVM_SET_USER_MEMORY_REGION2 => {
            // KVM_MEM_GUEST_MEMFD, the one reason for the rest of the struct, is not among the known flags.
            let r: kvm_userspace_memory_region2 = get(file, arg)?;
            vm.set_memory_region(&Region {
                slot: r.slot,
                flags: r.flags,
                gpa: r.guest_phys_addr,
                size: r.memory_size,
                hva: r.userspace_addr,
            })?;
            Ok(0)
        }
        KVM_SET_NR_MMU_PAGES => vm.set_mmu_pages(arg).map(|()| 0),
        KVM_GET_NR_MMU_PAGES => Ok(vm.mmu_pages().into()),
        KVM_GET_DIRTY_LOG => {
            let log: kvm_dirty_log = get(file, arg)?;
            let bitmap = vm.get_dirty_log(log.slot)?;
            file.write(log.dirty_bitmap, bitmap.as_bytes())?;
            Ok(0)
        }
        KVM_CLEAR_DIRTY_LOG => clear_dirty_log(file, arg),
        KVM_RESET_DIRTY_RINGS => vm.reset_dirty_rings().map(u64::from),
        KVM_REGISTER_COALESCED_MMIO => {
            let zone: kvm_coalesced_mmio_zone = get(file, arg)?;
            vm.register_coalesced(&zone)?;
            Ok(0)
        }
        KVM_UNREGISTER_COALESCED_MMIO => {
            let zone: kvm_coalesced_mmio_zone = get(file, arg)?;
            vm.unregister_coalesced(&zone)?;
            Ok(0)
        }
        KVM_SET_TSS_ADDR => {
            // Nothing here needs guest memory for a task state segment.
            if arg > (1 << 32) - 3 * guestmem::PAGE_SIZE {
                return Err(Errno::EINVAL);
            }
            Ok(0)
        }
        KVM_SET_IDENTITY_MAP_ADDR => {
            // Nothing here needs an identity map, but the time to ask for one is before the first vCPU.
            if !vm.vcpus().is_empty() {
                return Err(Errno::EINVAL);
            }
            let _: u64 = get(file, arg)?;
            Ok(0)
        }

        // Interrupts.
        KVM_SET_BOOT_CPU_ID => vm.set_boot_vcpu(arg).map(|()| 0),
        KVM_CREATE_IRQCHIP => vm.create_irqchip().map(|()| 0),
        KVM_GET_IRQCHIP => {
            let mut chip: kvm_irqchip = get(file, arg)?;
            let state = vm.get_irqchip(chip.chip_id)?;
            chip_out(&mut chip, &state);
            put(file, arg, &chip)
        }
        KVM_SET_IRQCHIP => {
            let chip: kvm_irqchip = get(file, arg)?;
            vm.set_irqchip(chip.chip_id, &chip_in(&chip))?;
            Ok(0)
        }
        KVM_IRQ_LINE | KVM_IRQ_LINE_STATUS => {
            let mut line: kvm_irq_level = get(file, arg)?;
            let status = vm.set_irq_line(line.irq, line.level != 0)?;
            if cmd == KVM_IRQ_LINE_STATUS {
                line.irq = status as u32;
                put(file, arg, &line)?;
            }
            Ok(0)
        }
        KVM_SIGNAL_MSI => {
            let msi: kvm_msi = get(file, arg)?;
            let delivered = vm.signal_msi(&msi)?;
            Ok(u64::try_from(delivered).unwrap_or(0))
        }
        KVM_SET_GSI_ROUTING => {
            let head: list_head = get(file, arg)?;
            if !vm.irqchip_in_kernel() {
                return Err(Errno::EINVAL);
            }
            if head.n as usize > ::irqchip::MAX_ROUTES || head.pad != 0 {
                return Err(Errno::EINVAL);
            }
            let entries: alloc::vec::Vec<kvm_irq_routing_entry> =
                get_list(file, behind(arg, 8)?, head.n as usize)?;
            vm.set_gsi_routing(&entries)?;
            Ok(0)
        }
        KVM_IRQFD => {
            let irqfd: kvm_irqfd = get(file, arg)?;
            if irqfd.flags & !(irqfd_flag::DEASSIGN | irqfd_flag::RESAMPLE) != 0 {
                return Err(Errno::EINVAL);
            }
            let resample = irqfd.flags & irqfd_flag::RESAMPLE != 0;
            if irqfd.flags & irqfd_flag::DEASSIGN != 0 {
                file.deassign_irqfd(&irqfd)?;
            } else if !vm.irqfd_allowed(resample) {
                return Err(Errno::EINVAL);
            } else {
                file.assign_irqfd(&irqfd)?;
            }
            Ok(0)
        }
        KVM_IOEVENTFD => ioeventfd(file, &get(file, arg)?),

        // The timer.
        KVM_CREATE_PIT2 => {
            let config: kvm_pit_config = get(file, arg)?;
            vm.create_pit(config.flags)?;
            Ok(0)
        }
        KVM_CREATE_PIT => {
            vm.create_pit(1)?;
            Ok(0)
        }
        KVM_GET_PIT2 => put(file, arg, &vm.get_pit()?),
        KVM_SET_PIT2 => {
            let state: kvm_pit_state2 = get(file, arg)?;
            vm.set_pit(&state)?;
            Ok(0)
        }
        KVM_GET_PIT => put(file, arg, &vm.get_pit_channels()?),
        KVM_SET_PIT => {
            let state: kvm_pit_state = get(file, arg)?;
            vm.set_pit_channels(&state)?;
            Ok(0)
        }
        KVM_REINJECT_CONTROL => {
            let control: kvm_reinject_control = get(file, arg)?;
            vm.set_pit_reinject(control.pit_reinject != 0)?;
            Ok(0)
        }
        KVM_GET_CLOCK => put(file, arg, &vm.get_clock()),
        KVM_SET_CLOCK => {
            let clock: kvm_clock_data = get(file, arg)?;
            vm.set_clock(&clock)?;
            Ok(0)
        }

        KVM_GET_TSC_KHZ => Ok(vm.default_tsc_khz().into()),
        KVM_SET_TSC_KHZ => {
            vm.set_default_tsc_khz(u32::try_from(arg).map_err(|_| Errno::EINVAL)?)?;
            Ok(0)
        }
        KVM_X86_SET_MSR_FILTER => {
            let filter: kvm_msr_filter = get(file, arg)?;
            vm.set_msr_filter(MsrFilter::new(&filter, |addr, out| file.read(addr, out))?);
            Ok(0)
        }

        KVM_GET_STATS_FD => file.stats_fd(),
        KVM_CREATE_DEVICE => {
            let mut asked: kvm_create_device = get(file, arg)?;
            if asked.type_ != device::TYPE_VFIO {
                return Err(Errno::ENODEV);
            }
            if asked.flags & device::CREATE_TEST == 0 {
                asked.fd = file.create_vfio()? as u32;
                put(file, arg, &asked)?;
            }
            Ok(0)
        }
        _ => Err(Errno::ENOTTY),
    }
}

fn clear_dirty_log(file: &dyn VmFile, arg: u64) -> Answer {
    let log: kvm_clear_dirty_log = get(file, arg)?;
    // No bitmap is larger than the slot's; so no caller makes us read more.
    let view = file.vm().memory_view_of(log.slot)?;
    let slot = view.slot(log.slot).ok_or(Errno::ENOENT)?;
    let pages = slot.size / guestmem::PAGE_SIZE;
    if u64::from(log.num_pages) > pages.next_multiple_of(64) {
        return Err(Errno::EINVAL);
    }
    let words = (log.num_pages as usize).div_ceil(64);
    let bitmap: alloc::vec::Vec<u64> = get_list(file, log.dirty_bitmap, words)?;
    file.vm()
        .clear_dirty_log(log.slot, log.first_page, log.num_pages.into(), &bitmap)?;
    Ok(0)
}

fn ioeventfd(file: &dyn VmFile, io: &kvm_ioeventfd) -> Answer {
    let what = Match::from_abi(io)?;
    let event = file.event(io.fd)?;
    if io.flags & ioeventfd_flag::DEASSIGN != 0 {
        file.vm().unregister_ioevent(what, event.id())?;
    } else {
        file.vm().register_ioevent(what, event)?;
    }
    Ok(0)
}

fn chip_out(chip: &mut kvm_irqchip, state: &ChipState) {
    let bytes = chip.chip.as_mut_bytes();
    match state {
        ChipState::Pic(s) => bytes[..size_of::<kvm_pic_state>()].copy_from_slice(s.as_bytes()),
        ChipState::Ioapic(s) => {
            bytes[..size_of::<kvm_ioapic_state>()].copy_from_slice(s.as_bytes());
        }
    }
}

fn chip_in(chip: &kvm_irqchip) -> ChipState {
    let bytes = chip.chip.as_bytes();
    // The union is larger than either.
    if chip.chip_id == irqchip::IOAPIC {
        let state = kvm_ioapic_state::read_from_prefix(bytes);
        ChipState::Ioapic(state.map_or_else(|_| kvm_ioapic_state::default(), |(s, _)| s))
    } else {
        let state = kvm_pic_state::read_from_prefix(bytes);
        ChipState::Pic(state.map_or_else(|_| kvm_pic_state::default(), |(s, _)| s))
    }
}
