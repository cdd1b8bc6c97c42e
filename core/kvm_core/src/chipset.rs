//! The in-kernel irqchip wired together: GSIs, PIC, IOAPIC, PIT, MSIs and who gets what.
//!
//! Everything here runs under the chipset lock, which is taken before a vCPU's LAPIC lock and never
//! after it.

use crate::host::{Event, Timer};
use crate::vcpu::VcpuShared;
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use core::sync::atomic::{AtomicU64, Ordering};
use irqchip::{
    Accepted, ApicMessage, DeliveryMode, DeliveryPolicy, EndOfInterrupt, Ioapic, IrqSource, Lvt,
    Msi, Pic, PinOutcome, Pit, RouteTarget, RoutingTable, for_each_target,
};
use kvm_abi::Errno;

/// The PIT's GSI.
const PIT_GSI: u32 = 0;
/// How long an IOAPIC pin waits that the guest keeps acknowledging with its line high.
const DEFERRED_NS: u64 = 10_000_000;
/// Most resampling irqfds.
const MAX_RESAMPLERS: usize = 4096;

/// The vCPUs of a VM, in the order of their creation.
pub type Vcpus = Vec<Arc<VcpuShared>>;

/// The vectors that the IOAPIC's pins are programmed with, readable without the chipset lock: the end
/// of any other interrupt concerns nobody but the local APIC.
#[derive(Debug, Default)]
pub struct IoapicVectors([AtomicU64; 4]);

impl IoapicVectors {
    /// Whether some pin, masked or not, has the vector.
    pub fn contains(&self, vector: u8) -> bool {
        self.0[usize::from(vector / 64)].load(Ordering::Acquire) >> (vector % 64) & 1 != 0
    }

    /// Adds the vectors of a redirection table.
    fn add(&self, redirection: &[u64]) {
        for (word, bits) in self.0.iter().zip(Self::bits(redirection)) {
            word.fetch_or(bits, Ordering::AcqRel);
        }
    }

    /// Takes other vectors instead; one that stays is never missing.
    fn replace(&self, vectors: impl Iterator<Item = u8>) {
        let mut bits = [0; 4];
        for vector in vectors {
            bits[usize::from(vector / 64)] |= 1 << (vector % 64);
        }
        for (word, bits) in self.0.iter().zip(bits) {
            word.store(bits, Ordering::Release);
        }
    }

    fn set(&self, redirection: &[u64]) {
        for (word, bits) in self.0.iter().zip(Self::bits(redirection)) {
            word.store(bits, Ordering::Release);
        }
    }

    fn bits(redirection: &[u64]) -> [u64; 4] {
        let mut bits = [0; 4];
        for entry in redirection {
            let vector = *entry as u8;
            bits[usize::from(vector / 64)] |= 1 << (vector % 64);
        }
        bits
    }
}

/// How messages that no vCPU sends are read and delivered (KVM_CAP_X2APIC_API).
#[derive(Clone, Copy, Debug, Default)]
pub struct Addressing {
    /// Destinations have 32 bits.
    pub wide: bool,
    /// What else.
    pub policy: DeliveryPolicy,
}

/// Everything that KVM_CREATE_IRQCHIP and KVM_CREATE_PIT2 make.
pub struct Chipset {
    /// The 8259 pair.
    pub pic: Pic,
    /// The I/O APIC.
    pub ioapic: Ioapic,
    /// Both are user space's instead (KVM_CAP_SPLIT_IRQCHIP), and so many GSIs from 0 on are pins of its I/O
    /// APIC. Nothing leads to those here then.
    split: Option<u32>,
    /// For messages that no vCPU sends.
    pub addressing: Addressing,
    vectors: Arc<IoapicVectors>,
    /// The 8254, and whether it owns port 0x61.
    pub pit: Option<(Pit, bool)>,
    /// GSI routing.
    pub routing: RoutingTable,
    resamplers: Vec<(u32, Arc<dyn Event>)>,
    timer: Box<dyn Timer>,
    armed_ns: Option<u64>,
    deferred_ns: Option<u64>,
}

impl Chipset {
    /// The chips after power-on. `timer` calls [`crate::vm::Vm::chipset_tick`].
    /// `vectors` follows the IOAPIC.
    pub fn new(timer: Box<dyn Timer>, vectors: Arc<IoapicVectors>) -> Result<Self, Errno> {
        Ok(Chipset {
            pic: Pic::new(),
            ioapic: Ioapic::new(),
            split: None,
            addressing: Addressing::default(),
            vectors,
            pit: None,
            routing: RoutingTable::x86_default().map_err(|_| Errno::ENOMEM)?,
            resamplers: Vec::new(),
            timer,
            armed_ns: None,
            deferred_ns: None,
        })
    }

    /// Only what is left with the local APICs alone in the kernel: routes to MSIs. `pins`: how many GSIs are
    /// pins of user space's I/O APIC.
    pub fn split(timer: Box<dyn Timer>, vectors: Arc<IoapicVectors>, pins: u32) -> Self {
        vectors.set(&[]);
        Chipset {
            pic: Pic::new(),
            ioapic: Ioapic::new(),
            split: Some(pins),
            addressing: Addressing::default(),
            vectors,
            pit: None,
            routing: RoutingTable::empty(),
            resamplers: Vec::new(),
            timer,
            armed_ns: None,
            deferred_ns: None,
        }
    }

    /// Whether 8259 and I/O APIC are user space's.
    pub fn is_split(&self) -> bool {
        self.split.is_some()
    }

    /// The level-triggered messages of user space's I/O APIC.
    fn user_ioapic_messages(&self) -> impl Iterator<Item = ApicMessage> {
        let pins = self.split.unwrap_or(0);
        let wide = self.addressing.wide;
        self.routing
            .routes()
            .iter()
            .take_while(move |route| route.gsi < pins)
            .filter_map(move |route| match route.target {
                RouteTarget::Msi(msi) => Some(msi.message(wide)),
                _ => None,
            })
            .filter(|message| message.trigger == irqchip::Trigger::Level)
    }

    /// Replaces the routes.
    pub fn set_routing(&mut self, table: RoutingTable) {
        self.routing = table;
        self.user_vectors();
    }

    /// Says which vectors user space's I/O APIC has, for those who end an interrupt.
    fn user_vectors(&self) {
        if self.is_split() {
            self.vectors
                .replace(self.user_ioapic_messages().map(|message| message.vector));
        }
    }

    /// Whether user space's I/O APIC is to hear that the vCPU `index` has ended `vector`.
    pub fn user_ioapic_hears(&self, vcpus: &Vcpus, index: usize, vector: u8) -> bool {
        let Some(lapic) = vcpus.get(index).and_then(|v| v.lapic()) else {
            return false;
        };
        let vcpu = lapic.lock().destination();
        self.user_ioapic_messages()
            .filter(|message| message.vector == vector)
            .any(|message| {
                let mut reached = false;
                // As a fixed message: one of lowest priority may have gone to any of those it names.
                let message = ApicMessage {
                    delivery_mode: DeliveryMode::Fixed,
                    redirect_hint: false,
                    ..message
                };
                let apics = core::iter::once((index, vcpu));
                for_each_target(&message, None, self.addressing.policy, apics, |_| {
                    reached = true;
                });
                reached
            })
    }

    /// Sets one source's level of a GSI. The result is that of KVM_IRQ_LINE_STATUS: negative when
    /// ignored, 0 when merged with a pending one, else how many CPUs it reached.
    pub fn set_gsi(&mut self, vcpus: &Vcpus, source: IrqSource, gsi: u32, level: bool) -> i32 {
        let mut status = -1;
        let mut targets = [None; 3];
        for (slot, route) in targets.iter_mut().zip(self.routing.lookup(gsi)) {
            *slot = Some(route.target);
        }
        for target in targets.into_iter().flatten() {
            let one = match target {
                RouteTarget::Pic(line) => {
                    let outcome = self.pic.set_irq(line, source, level);
                    if level {
                        self.pic_changed(vcpus);
                    }
                    match outcome {
                        irqchip::LineOutcome::Delivered => 1,
                        irqchip::LineOutcome::Coalesced => 0,
                        irqchip::LineOutcome::Masked => -1,
                    }
                }
                RouteTarget::Ioapic(pin) => match self.ioapic.set_irq(pin, source, level) {
                    PinOutcome::Lowered => 1,
                    PinOutcome::Coalesced => 0,
                    PinOutcome::Held => -1,
                    PinOutcome::Send(message) => self.send_pin(vcpus, pin, &message),
                },
                RouteTarget::Msi(msi) if level => deliver_msi(vcpus, msi, self.addressing) as i32,
                RouteTarget::Msi(_) | RouteTarget::HypervSint { .. } => continue,
            };
            if one >= 0 {
                status = one + status.max(0);
            }
        }
        status
    }

    fn send_pin(&mut self, vcpus: &Vcpus, pin: u8, message: &ApicMessage) -> i32 {
        let reached = deliver(vcpus, message, None, self.addressing.policy);
        if reached == 0 {
            self.ioapic.not_accepted(pin);
        }
        reached as i32
    }

    /// Wakes the vCPUs that listen to the PIC, if its output is high.
    pub fn pic_changed(&self, vcpus: &Vcpus) {
        if !self.pic.output() {
            return;
        }
        for vcpu in vcpus {
            if vcpu.accepts_pic() {
                vcpu.notify();
            }
        }
    }

    /// Tells the listeners of the PIC lines that the guest has just acknowledged.
    pub fn pic_acked(&mut self, vcpus: &Vcpus, now_ns: u64) {
        let mut lines = self.pic.take_acked();
        while lines != 0 {
            let line = lines.trailing_zeros() as u8;
            lines &= lines - 1;
            if let Some(gsi) = self.routing.gsi_of(RouteTarget::Pic(line)) {
                self.acked(vcpus, gsi, now_ns);
            }
        }
    }

    /// A local APIC completed an interrupt.
    pub fn eoi(&mut self, vcpus: &Vcpus, eoi: EndOfInterrupt, now_ns: u64) {
        let mut pins = self.ioapic.pins_with_vector(eoi.vector);
        while pins != 0 {
            let pin = pins.trailing_zeros() as u8;
            pins &= pins - 1;
            if let Some(gsi) = self.routing.gsi_of(RouteTarget::Ioapic(pin)) {
                self.acked(vcpus, gsi, now_ns);
            }
            if eoi.broadcast
                && let Some(message) = self.ioapic.eoi_pin(pin)
            {
                self.send_pin(vcpus, pin, &message);
            }
        }
        if self.ioapic.deferred() != 0 && self.deferred_ns.is_none() {
            self.deferred_ns = Some(now_ns.saturating_add(DEFERRED_NS));
            self.arm(now_ns);
        }
    }

    /// The guest acknowledged `gsi`.
    fn acked(&mut self, vcpus: &Vcpus, gsi: u32, now_ns: u64) {
        if gsi == PIT_GSI
            && let Some((pit, _)) = &mut self.pit
            && pit.ack()
        {
            self.pulse_pit(vcpus);
            self.arm(now_ns);
        }
        let mut lowered = false;
        for i in 0..self.resamplers.len() {
            if self.resamplers[i].0 != gsi {
                continue;
            }
            if !lowered {
                lowered = true;
                self.set_gsi(vcpus, IrqSource::IrqfdResample, gsi, false);
            }
            self.resamplers[i].1.signal();
        }
    }

    fn pulse_pit(&mut self, vcpus: &Vcpus) {
        self.set_gsi(vcpus, IrqSource::Pit, PIT_GSI, true);
        self.set_gsi(vcpus, IrqSource::Pit, PIT_GSI, false);
        // Virtual-wire NMI watchdog: LINT0 set to NMI sees the PIT too.
        for vcpu in vcpus {
            vcpu.pulse_lint0_nmi();
        }
    }

    /// The timer's deadline has come: PIT ticks, deferred IOAPIC pins.
    pub fn tick(&mut self, vcpus: &Vcpus, now_ns: u64) {
        self.armed_ns = None;
        if let Some((pit, _)) = &mut self.pit {
            for _ in 0..pit.expire(now_ns) {
                self.pulse_pit(vcpus);
            }
        }
        if self.deferred_ns.is_some_and(|at| at <= now_ns) {
            self.deferred_ns = None;
            let mut sent = Vec::new();
            if sent.try_reserve(irqchip::ioapic::PINS).is_ok() {
                self.ioapic
                    .retry_deferred(|pin, message| sent.push((pin, message)));
            }
            for (pin, message) in sent {
                self.send_pin(vcpus, pin, &message);
            }
        }
        self.arm(now_ns);
    }

    /// Arms the timer for what comes next. A timer that would fire too early is left alone; it
    /// finds nothing to do then.
    pub fn arm(&mut self, now_ns: u64) {
        let pit = self
            .pit
            .as_ref()
            .and_then(|(p, _)| p.next_irq_deadline_ns());
        let Some(next) = pit.into_iter().chain(self.deferred_ns).min() else {
            return;
        };
        if self.armed_ns.is_none_or(|at| at > next || at < now_ns) {
            self.armed_ns = Some(next);
            self.timer.set(Some(next));
        }
    }

    /// Writes an IOAPIC register.
    pub fn ioapic_write(&mut self, vcpus: &Vcpus, offset: u64, value: u32) {
        let mut sent = Vec::new();
        let mut lost = false;
        self.ioapic.mmio_write(offset, value, |pin, message| {
            if sent.try_reserve(1).is_ok() {
                sent.push((pin, message));
            } else {
                lost = true;
            }
        });
        // Before the messages: whoever takes one may be done with it at once.
        self.vectors.set(&self.ioapic.state().redirtbl);
        for (pin, message) in sent {
            self.send_pin(vcpus, pin, &message);
        }
        if lost {
            log::error!("out of memory: an interrupt was lost");
        }
    }

    /// Replaces the IOAPIC's state.
    pub fn set_ioapic(&mut self, vcpus: &Vcpus, state: &irqchip::IoapicState) {
        self.vectors.add(&state.redirtbl);
        let policy = self.addressing.policy;
        self.ioapic.set_state(state, |_, message| {
            deliver(vcpus, &message, None, policy);
        });
        self.vectors.set(&self.ioapic.state().redirtbl);
    }

    /// Adds a listener for acknowledgements of `gsi` (KVM_IRQFD_FLAG_RESAMPLE).
    ///
    /// # Errors
    /// ENOMEM, ENOSPC.
    pub fn add_resampler(&mut self, gsi: u32, event: Arc<dyn Event>) -> Result<(), Errno> {
        if self.resamplers.len() >= MAX_RESAMPLERS {
            return Err(Errno::ENOSPC);
        }
        self.resamplers.try_reserve(1).map_err(|_| Errno::ENOMEM)?;
        self.resamplers.push((gsi, event));
        Ok(())
    }

    /// Removes a listener and lowers its line.
    pub fn remove_resampler(&mut self, vcpus: &Vcpus, gsi: u32, event_id: u64) {
        let before = self.resamplers.len();
        self.resamplers
            .retain(|(g, e)| *g != gsi || e.id() != event_id);
        if self.resamplers.len() != before && !self.resamplers.iter().any(|(g, _)| *g == gsi) {
            self.set_gsi(vcpus, IrqSource::IrqfdResample, gsi, false);
        }
    }
}

/// Delivers a message to the vCPUs it addresses. `source`: the index of the sending vCPU. Returns how
/// many took it.
pub fn deliver(
    vcpus: &Vcpus,
    message: &ApicMessage,
    source: Option<usize>,
    policy: DeliveryPolicy,
) -> usize {
    let mut reached = 0;
    let apics = vcpus
        .iter()
        .enumerate()
        .filter_map(|(i, v)| Some((i, v.lapic()?.lock().destination())));
    for_each_target(message, source, policy, apics, |i| {
        if let Some(vcpu) = vcpus.get(i)
            && let Some(lapic) = vcpu.lapic()
        {
            let accepted = lapic.lock().accept_message(message);
            vcpu.accepted(accepted);
            if accepted.is_accepted() {
                reached += 1;
            }
        }
    });
    reached
}

/// Delivers an MSI.
pub fn deliver_msi(vcpus: &Vcpus, msi: Msi, addressing: Addressing) -> usize {
    let message = msi.message(addressing.wide);
    deliver(vcpus, &message, None, addressing.policy)
}

impl VcpuShared {
    fn accepts_pic(&self) -> bool {
        self.lapic().is_some_and(|l| l.lock().accepts_pic())
    }

    fn pulse_lint0_nmi(&self) {
        if let Some(lapic) = self.lapic() {
            let mut lapic = lapic.lock();
            if lapic.lint0_is_nmi() {
                let accepted = lapic.deliver_lvt(Lvt::Lint0);
                drop(lapic);
                self.accepted(accepted);
            }
        }
    }

    /// Acts on what a local APIC did with a message.
    pub(crate) fn accepted(&self, accepted: Accepted) {
        match accepted {
            Accepted::No | Accepted::Coalesced => {}
            Accepted::Pending => self.notify(),
            Accepted::Nmi => self.queue_nmi(),
            Accepted::Smi => self.queue_smi(),
            Accepted::Init => self.queue_init(),
            Accepted::Startup(vector) => self.queue_sipi(vector),
            Accepted::RemoteRead => self.unhalt(),
        }
    }
}

/// The message of KVM_HC_SEND_IPI's ICR, or `None` for a delivery mode it does not allow.
pub fn pv_ipi(icr: u64) -> Option<ApicMessage> {
    let mode = DeliveryMode::from_bits((icr >> 8) as u8);
    if !matches!(mode, DeliveryMode::Fixed | DeliveryMode::Nmi) || icr & !0x7ff != 0 {
        return None;
    }
    Some(ApicMessage {
        dest: 0,
        dest_mode: irqchip::DestMode::Physical,
        delivery_mode: mode,
        vector: icr as u8,
        trigger: irqchip::Trigger::Edge,
        level: true,
        shorthand: irqchip::Shorthand::None,
        redirect_hint: false,
    })
}
