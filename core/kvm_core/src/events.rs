//! KVM_GET_VCPU_EVENTS and KVM_SET_VCPU_EVENTS: what is on its way to the guest.

use crate::vcpu::Vcpu;
use kvm_abi::{
    Errno, kvm_exception_event, kvm_interrupt_event, kvm_nmi_event, kvm_smi_event,
    kvm_triple_fault_event, kvm_vcpu_events, mp_state, vcpuevent,
};
use x86defs::vector;
use x86emu::env::Exception;
use x86emu::state::shadow;

impl Vcpu {
    /// KVM_GET_VCPU_EVENTS.
    pub fn vcpu_events(&mut self) -> kvm_vcpu_events {
        self.process_requests();
        let settings = &self.env.vm.settings;
        let payload = settings.exception_payload();
        let triple_fault = settings.triple_fault_event();
        let cpu = self.engine.cpu_ref();
        let e = &self.env.events;
        let mut out = kvm_vcpu_events {
            interrupt: kvm_interrupt_event {
                injected: u8::from(e.interrupt.is_some()),
                nr: e.interrupt.unwrap_or(0),
                soft: 0,
                shadow: shadow_to_abi(cpu.shadow),
            },
            nmi: kvm_nmi_event {
                injected: 0,
                pending: e.nmis,
                masked: u8::from(cpu.nmi_blocked),
                pad: 0,
            },
            sipi_vector: u32::from(self.env.shared.sipi_vector()),
            flags: vcpuevent::VALID_NMI_PENDING | vcpuevent::VALID_SHADOW | vcpuevent::VALID_SMM,
            smi: kvm_smi_event {
                smm: u8::from(cpu.smm),
                pending: u8::from(e.smi),
                smm_inside_nmi: u8::from(self.env.smm_inside_nmi),
                latched_init: u8::from(e.latched_init),
            },
            ..Default::default()
        };
        if let Some(exception) = e.exception {
            out.exception = kvm_exception_event {
                // Who does not know payloads does not know the difference either.
                injected: u8::from(!e.exception_pending || !payload),
                nr: exception.vector,
                has_error_code: u8::from(exception.error.is_some()),
                pending: u8::from(e.exception_pending),
                error_code: exception.error.unwrap_or(0),
            };
            if payload && e.exception_pending && has_payload(exception.vector) {
                out.exception_has_payload = 1;
                out.exception_payload = exception.payload;
            }
        }
        if payload {
            out.flags |= vcpuevent::VALID_PAYLOAD;
        }
        if triple_fault {
            out.flags |= vcpuevent::VALID_TRIPLE_FAULT;
            out.triple_fault = kvm_triple_fault_event {
                pending: u8::from(e.triple_fault),
            };
        }
        out
    }

    /// KVM_SET_VCPU_EVENTS.
    ///
    /// # Errors
    /// EINVAL for unknown flags, for flags whose capability is not enabled, and for events that cannot be.
    pub fn set_vcpu_events(&mut self, ev: &kvm_vcpu_events) -> Result<(), Errno> {
        let settings = &self.env.vm.settings;
        let mut known = vcpuevent::VALID_NMI_PENDING
            | vcpuevent::VALID_SIPI_VECTOR
            | vcpuevent::VALID_SHADOW
            | vcpuevent::VALID_SMM;
        if settings.exception_payload() {
            known |= vcpuevent::VALID_PAYLOAD;
        }
        if settings.triple_fault_event() {
            known |= vcpuevent::VALID_TRIPLE_FAULT;
        }
        let x = &ev.exception;
        let pending = ev.flags & vcpuevent::VALID_PAYLOAD != 0 && x.pending != 0;
        let there = pending || x.injected != 0;
        let smm = ev.flags & vcpuevent::VALID_SMM != 0;
        if ev.flags & !known != 0 || (there && (x.nr > 31 || x.nr == vector::NMI)) {
            return Err(Errno::EINVAL);
        }
        self.process_requests();
        // INIT does not come through in SMM.
        let init = self.env.mp_state == mp_state::INIT_RECEIVED;
        if smm && (ev.smi.smm != 0 || ev.smi.pending != 0) && init {
            return Err(Errno::EINVAL);
        }
        let cpu = self.engine.cpu_ref();
        let payload = match x.nr {
            _ if pending && ev.exception_has_payload != 0 => ev.exception_payload,
            // Without a payload the registers that hold it are user space's to set.
            vector::PF => cpu.cr2,
            vector::DB => cpu.dr6 & 0xf,
            _ => 0,
        };
        self.env.events.exception = there.then(|| Exception {
            vector: x.nr,
            error: (x.has_error_code != 0).then_some(x.error_code),
            payload,
        });
        self.env.events.exception_pending = pending;
        self.env.events.interrupt = (ev.interrupt.injected != 0).then_some(ev.interrupt.nr);
        self.env.events.interrupt_acked = ev.interrupt.injected != 0;
        let cpu = self.engine.cpu();
        if ev.flags & vcpuevent::VALID_SHADOW != 0 {
            cpu.shadow = shadow_from_abi(ev.interrupt.shadow);
        }
        cpu.nmi_blocked = ev.nmi.masked != 0;
        if ev.flags & vcpuevent::VALID_NMI_PENDING != 0 {
            self.env.events.nmis = ev.nmi.pending.min(2);
        }
        if ev.nmi.injected != 0 {
            self.env.events.nmis = self.env.events.nmis.saturating_add(1).min(2);
        }
        if ev.flags & vcpuevent::VALID_SIPI_VECTOR != 0 {
            self.env.shared.set_sipi_vector(ev.sipi_vector as u8);
        }
        if smm {
            self.set_smi_event(&ev.smi);
        }
        if ev.flags & vcpuevent::VALID_TRIPLE_FAULT != 0 {
            self.env.events.triple_fault = ev.triple_fault.pending != 0;
        }
        Ok(())
    }

    fn set_smi_event(&mut self, smi: &kvm_smi_event) {
        let inside = smi.smm != 0;
        if self.engine.cpu_ref().smm != inside {
            self.set_smm(inside);
        }
        self.env.events.smi = smi.pending != 0;
        if inside {
            self.env.smm_inside_nmi = smi.smm_inside_nmi != 0;
        }
        if self.env.shared.lapic().is_some() {
            self.env.events.latched_init = smi.latched_init != 0;
        }
    }
}

/// The exceptions that come with CR2 or bits of DR6.
fn has_payload(vector: u8) -> bool {
    matches!(vector, vector::DB | vector::PF)
}

fn shadow_to_abi(bits: u8) -> u8 {
    let mut out = 0;
    if bits & shadow::MOV_SS != 0 {
        out |= vcpuevent::SHADOW_MOV_SS;
    }
    if bits & shadow::STI != 0 {
        out |= vcpuevent::SHADOW_STI;
    }
    out
}

fn shadow_from_abi(bits: u8) -> u8 {
    let mut out = 0;
    if bits & vcpuevent::SHADOW_MOV_SS != 0 {
        out |= shadow::MOV_SS;
    }
    if bits & vcpuevent::SHADOW_STI != 0 {
        out |= shadow::STI;
    }
    out
}
