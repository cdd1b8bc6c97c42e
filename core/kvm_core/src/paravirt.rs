//! What KVM and its guests share in guest memory besides the clock: PV EOI and steal time ("KVM-specific
//! MSRs" in the kernel documentation).
//!
//! **PV EOI.** With an interrupt in service that nobody but the local APIC needs to hear the end of, and no
//! other one requested, the core sets a bit in guest memory. A guest that finds it set clears it instead
//! of writing the EOI register. The core looks at the bit at the next turn, or before the vCPU
//! touches its local APIC, whichever comes first: cleared means that the interrupt is over; still
//! set, the offer is withdrawn.
//!
//! **Steal time.** How long the vCPU's thread waited for a host CPU, and whether the vCPU runs at all:
//! others spin no longer on a lock whose holder does not run, and instead of interrupting it for a TLB
//! flush leave a note that it finds before it runs again.

use crate::env::VcpuEnv;
use crate::host::RunDelay;
use irqchip::Effect;
use kvm_abi::paravirt::steal_time;

/// How often the thread's waiting time is looked up; it costs a system call.
const STEAL_PERIOD_NS: u64 = 10_000_000;
/// And how often at most when user space runs the vCPU again, which may be after a long wait.
const STEAL_ENTRY_NS: u64 = 200_000;

/// A vCPU's side of what is shared.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Paravirt {
    /// The bit in guest memory was set and not looked at since.
    eoi_offered: bool,
    /// `kvm_steal_time::preempted` says that the vCPU does not run.
    preempted: bool,
    /// What the last steal time was computed from.
    last_delay: Option<RunDelay>,
    /// When it was last looked up, and when to look again.
    last_steal_ns: u64,
    next_steal_ns: u64,
    /// The vCPU has been run anew; the guest is to see another version, as with KVM.
    entered: bool,
}

impl VcpuEnv {
    // PV EOI.

    /// Offers the guest to end the interrupt that was just delivered without an exit.
    pub fn offer_pv_eoi(&mut self) {
        let address = self.msrs.pv_eoi();
        if address & 1 == 0 {
            return;
        }
        let Some(lapic) = self.shared.lapic() else {
            return;
        };
        let vector = {
            let lapic = lapic.lock();
            if lapic.highest_requested().is_some() {
                return;
            }
            match lapic.highest_in_service() {
                Some(vector) if !lapic.is_level_triggered(vector) => vector,
                _ => return,
            }
        };
        if self.vm.ioapic_has(vector) {
            return;
        }
        let vm = &self.vm;
        self.paravirt.eoi_offered = self.memory.write(&vm.memory, address & !1, &[1]);
    }

    /// Sees whether the guest took the offer.
    pub fn sync_pv_eoi(&mut self) {
        if !self.paravirt.eoi_offered {
            return;
        }
        self.paravirt.eoi_offered = false;
        let gpa = self.msrs.pv_eoi() & !1;
        let mut bit = [0];
        let vm = &self.vm;
        if !self.memory.read(&vm.memory, gpa, &mut bit) {
            return;
        }
        if bit[0] & 1 != 0 {
            self.memory.write(&vm.memory, gpa, &[bit[0] & !1]);
            return;
        }
        let ended = self.shared.lapic().and_then(|l| l.lock().eoi());
        if let Some(eoi) = ended {
            self.lapic_effect(Effect::Eoi(eoi));
        }
    }

    // Steal time.

    /// Where `kvm_steal_time` is, if the guest wants it.
    fn steal_area(&self) -> Option<u64> {
        let value = self.msrs.steal_time();
        (value & 1 != 0).then_some(value & !0x3f)
    }

    /// The MSR was just written, by the guest or by user space (`host`), which has the vCPU then.
    pub fn start_steal_time(&mut self, host: bool) {
        self.paravirt.last_delay = None;
        self.paravirt.next_steal_ns = 0;
        self.paravirt.preempted = true;
        if !host {
            // A note from before the guest used the area is no note.
            let _ = self.mark_running();
        }
    }

    /// The vCPU stops running guest code: it sleeps, or user space has it.
    pub fn mark_preempted(&mut self) {
        let Some(gpa) = self.steal_area() else {
            return;
        };
        if self.paravirt.preempted {
            return;
        }
        self.paravirt.preempted = true;
        let at = gpa.wrapping_add(steal_time::PREEMPTED);
        self.memory
            .write(&self.vm.memory, at, &[steal_time::VCPU_PREEMPTED]);
    }

    /// It goes on. `true`: others have left a note that it must flush its TLB.
    #[must_use]
    pub fn mark_running(&mut self) -> bool {
        if !self.paravirt.preempted {
            return false;
        }
        self.paravirt.preempted = false;
        let Some(gpa) = self.steal_area() else {
            return false;
        };
        let at = gpa.wrapping_add(steal_time::PREEMPTED);
        self.memory
            .exchange(&self.vm.memory, at, 0)
            .is_some_and(|old| old & steal_time::VCPU_FLUSH_TLB != 0)
    }

    /// User space runs the vCPU again.
    pub fn enter_steal_time(&mut self) {
        let p = &mut self.paravirt;
        p.entered = true;
        let soon = p.last_steal_ns.saturating_add(STEAL_ENTRY_NS);
        p.next_steal_ns = p.next_steal_ns.min(soon);
    }

    /// What the thread has waited since the last look.
    fn stolen(&mut self, now_ns: u64) -> Option<u64> {
        self.paravirt.last_steal_ns = now_ns;
        self.paravirt.next_steal_ns = now_ns.saturating_add(STEAL_PERIOD_NS);
        let delay = self.vm.host.run_delay()?;
        let last = self.paravirt.last_delay.replace(delay);
        // Another thread than before has another count.
        match last {
            Some(last) if last.thread == delay.thread => Some(delay.ns.saturating_sub(last.ns)),
            _ => Some(0),
        }
    }

    /// Brings `kvm_steal_time` up to date, if that is due: an odd version while it changes.
    pub fn update_steal_time(&mut self, now_ns: u64) {
        let due = now_ns >= self.paravirt.next_steal_ns;
        if !due && !self.paravirt.entered {
            return;
        }
        let Some(gpa) = self.steal_area() else {
            return;
        };
        self.paravirt.entered = false;
        let stolen = if due { self.stolen(now_ns) } else { Some(0) };
        let Some(stolen) = stolen else {
            return;
        };
        let memory = &self.vm.memory;
        let (mut steal, mut version) = ([0; 8], [0; 4]);
        let version_at = gpa.wrapping_add(steal_time::VERSION);
        let steal_at = gpa.wrapping_add(steal_time::STEAL);
        if !self.memory.read(memory, steal_at, &mut steal)
            || !self.memory.read(memory, version_at, &mut version)
        {
            return;
        }
        let total = u64::from_le_bytes(steal).wrapping_add(stolen);
        let odd = u32::from_le_bytes(version).wrapping_add(1) | 1;
        let even = odd.wrapping_add(1);
        let _ = self.memory.write(memory, version_at, &odd.to_le_bytes())
            && self.memory.write(memory, steal_at, &total.to_le_bytes())
            && self.memory.write(memory, version_at, &even.to_le_bytes());
    }

    /// INIT and RESET.
    pub fn reset_paravirt(&mut self) {
        self.paravirt = Paravirt::default();
    }
}
