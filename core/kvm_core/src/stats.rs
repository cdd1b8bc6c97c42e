//! Binary statistics (KVM_GET_STATS_FD): what the descriptor reads, as an image of header, name,
//! descriptors and live counters. A home can read it ([`StatsImage::read`]) whenever its descriptor is
//! read, or give memory that its descriptor shows ([`StatsImage::share`]): the counters live there then.
//!
//! Only what is really counted is in it. Counters are counted at exits, by the thread that they belong
//! to; so counting is a load and a store.

use crate::shared_memory::{Counters, SharedMemory, Window};
use crate::vcpu::VcpuShared;
use crate::vm::Vm;
use alloc::sync::Arc;
use core::fmt::Write as _;
use core::sync::atomic::Ordering;
use kvm_abi::{Errno, kvm_stats_desc, kvm_stats_header};
use zerocopy::IntoBytes;

/// Bytes of a name (KVM_STATS_NAME_SIZE).
const NAME_SIZE: usize = 48;
const HEADER_SIZE: usize = size_of::<kvm_stats_header>();
const DESC_OFFSET: usize = HEADER_SIZE + NAME_SIZE;
const DESC_SIZE: usize = size_of::<kvm_stats_desc>();
/// Buckets of the histogram: bucket n counts values of n significant bits.
const BUCKETS: usize = 32;

/// `kvm_stats_desc::flags`.
mod kind {
    pub const CUMULATIVE: u32 = 0;
    pub const INSTANT: u32 = 1;
    pub const LOG_HIST: u32 = 4;
    pub const UNIT_SECONDS: u32 = 2 << 4;
    pub const UNIT_BOOLEAN: u32 = 4 << 4;
}

/// What is known of a value.
struct Desc {
    name: &'static str,
    flags: u32,
    exponent: i16,
    size: u16,
}

const fn counter(name: &'static str) -> Desc {
    Desc {
        name,
        flags: kind::CUMULATIVE,
        exponent: 0,
        size: 1,
    }
}

macro_rules! counters {
    ($(#[$meta:meta])* $name:ident: $descs:ident { $($(#[$vmeta:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(usize)]
        pub(crate) enum $name { $($(#[$vmeta])* $variant,)* }
        const $descs: &[Desc] = &[$(counter($text),)*];
    };
}

counters! {
    /// A vCPU's counters, named as KVM names them.
    Counter: COUNTERS {
        /// Returns from guest code to the core.
        Exits = "exits",
        /// Accesses to ports that user space answers.
        IoExits = "io_exits",
        /// Accesses to guest-physical addresses that user space answers.
        MmioExits = "mmio_exits",
        /// KVM_RUN ended with EINTR.
        SignalExits = "signal_exits",
        /// A pending interrupt could be delivered at last.
        IrqWindowExits = "irq_window_exits",
        /// A pending NMI waited for the end of a handler or a shadow.
        NmiWindowExits = "nmi_window_exits",
        /// HLT.
        HaltExits = "halt_exits",
        /// KVM_EXIT_IRQ_WINDOW_OPEN.
        RequestIrqExits = "request_irq_exits",
        /// Another thread or a timer wanted the vCPU's attention.
        IrqExits = "irq_exits",
        /// Instructions finished by the interpreter after user space answered.
        InsnEmulation = "insn_emulation",
        /// Instructions that nobody could execute.
        InsnEmulationFail = "insn_emulation_fail",
        /// Hypercalls.
        Hypercalls = "hypercalls",
        /// Interrupts delivered.
        IrqInjections = "irq_injections",
        /// NMIs delivered.
        NmiInjections = "nmi_injections",
        /// A halted vCPU was woken.
        HaltWakeup = "halt_wakeup",
    }
}

counters! {
    /// A VM's counters.
    VmCounter: VM_COUNTERS {
        /// The vCPUs were made to drop host pointers.
        RemoteTlbFlush = "remote_tlb_flush",
        /// As often as that was asked for; here always done.
        RemoteTlbFlushRequests = "remote_tlb_flush_requests",
    }
}

/// What a vCPU has besides counters, in the order of the data.
const VCPU_EXTRA: &[Desc] = &[
    Desc {
        name: "halt_wait_ns",
        flags: kind::CUMULATIVE | kind::UNIT_SECONDS,
        exponent: -9,
        size: 1,
    },
    Desc {
        name: "halt_wait_hist",
        flags: kind::LOG_HIST | kind::UNIT_SECONDS,
        exponent: -9,
        size: BUCKETS as u16,
    },
    Desc {
        name: "blocking",
        flags: kind::INSTANT | kind::UNIT_BOOLEAN,
        exponent: 0,
        size: 1,
    },
];

const WAIT_NS: usize = COUNTERS.len();
const WAIT_HIST: usize = WAIT_NS + 1;
const BLOCKING: usize = WAIT_HIST + BUCKETS;
const VCPU_VALUES: usize = BLOCKING + 1;

/// A vCPU's values. Only its thread writes them.
#[derive(Default)]
pub(crate) struct VcpuStats(Counters<VCPU_VALUES>);

impl VcpuStats {
    fn add(&self, index: usize, n: u64) {
        // Nobody else writes: no need for an atomic addition.
        let counter = self.0.get(index);
        let value = counter.load(Ordering::Relaxed);
        counter.store(value.wrapping_add(n), Ordering::Relaxed);
    }

    /// Counts.
    pub fn count(&self, what: Counter) {
        self.add(what as usize, 1);
    }

    /// The vCPU's thread sleeps from now on, or does no longer.
    pub fn set_blocking(&self, blocking: bool) {
        let value = u64::from(blocking);
        self.0.get(BLOCKING).store(value, Ordering::Relaxed);
    }

    /// It slept for so long.
    pub fn slept(&self, ns: u64) {
        self.add(WAIT_NS, ns);
        let bucket = (64 - ns.leading_zeros()) as usize;
        self.add(WAIT_HIST + bucket.min(BUCKETS - 1), 1);
    }
}

/// A VM's values.
#[derive(Default)]
pub(crate) struct VmStats(Counters<{ VM_COUNTERS.len() }>);

impl VmStats {
    /// Counts.
    pub fn count(&self, what: VmCounter) {
        self.0.get(what as usize).fetch_add(1, Ordering::Relaxed);
    }
}

enum Source {
    Vm(Arc<Vm>),
    Vcpu(Arc<VcpuShared>),
}

/// What a descriptor made by KVM_GET_STATS_FD reads.
pub struct StatsImage {
    name: [u8; NAME_SIZE],
    source: Source,
}

impl StatsImage {
    /// A VM's. `process`: the id of the process that asks, part of the name.
    pub fn of_vm(vm: &Arc<Vm>, process: u32) -> Self {
        StatsImage {
            name: name(format_args!("kvm-{process}")),
            source: Source::Vm(vm.clone()),
        }
    }

    /// A vCPU's.
    pub fn of_vcpu(vcpu: &Arc<VcpuShared>, process: u32) -> Self {
        StatsImage {
            name: name(format_args!("kvm-{process}/vcpu-{}", vcpu.id())),
            source: Source::Vcpu(vcpu.clone()),
        }
    }

    fn descs(&self) -> impl Iterator<Item = &'static Desc> + use<> {
        let (counters, extra): (&[Desc], &[Desc]) = match self.source {
            Source::Vm(_) => (VM_COUNTERS, &[]),
            Source::Vcpu(_) => (COUNTERS, VCPU_EXTRA),
        };
        counters.iter().chain(extra)
    }

    fn values(&self) -> usize {
        match &self.source {
            Source::Vm(_) => VM_COUNTERS.len(),
            Source::Vcpu(_) => VCPU_VALUES,
        }
    }

    fn value(&self, index: usize) -> u64 {
        let counter = match &self.source {
            Source::Vm(vm) => vm.stats.0.get(index),
            Source::Vcpu(vcpu) => vcpu.stats.0.get(index),
        };
        counter.load(Ordering::Relaxed)
    }

    /// Writes the image to `memory`, and moves the counters there for good, so that it is always up to
    /// date. The vCPU is not running.
    ///
    /// # Errors
    /// EINVAL when it does not fit; EEXIST when the counters are in such memory already.
    pub fn share(&self, memory: Arc<dyn SharedMemory>) -> Result<(), Errno> {
        let window = Window::new(memory.clone(), self.size())?;
        let mut part = [0; 64];
        let mut at = 0;
        while at < self.data_offset() {
            let n = part.len().min(self.data_offset() - at);
            self.read(at as u64, &mut part[..n]);
            window.write(at, &part[..n]);
            at += n;
        }
        match &self.source {
            Source::Vm(vm) => vm.stats.0.share(memory, at),
            Source::Vcpu(vcpu) => vcpu.stats.0.share(memory, at),
        }
    }

    /// Bytes.
    pub fn size(&self) -> usize {
        self.data_offset() + self.values() * 8
    }

    fn data_offset(&self) -> usize {
        DESC_OFFSET + self.descs().count() * DESC_SIZE
    }

    /// Reads from byte `offset` on; how many bytes, 0 at the end.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> usize {
        let mut sink = Sink {
            skip: usize::try_from(offset).unwrap_or(usize::MAX),
            out,
            done: 0,
        };
        let descs = self.descs().count() as u32;
        let header = kvm_stats_header {
            flags: 0,
            name_size: NAME_SIZE as u32,
            num_desc: descs,
            id_offset: HEADER_SIZE as u32,
            desc_offset: DESC_OFFSET as u32,
            data_offset: self.data_offset() as u32,
        };
        sink.put(header.as_bytes());
        sink.put(&self.name);
        let mut at = 0;
        for desc in self.descs() {
            let record = kvm_stats_desc {
                flags: desc.flags,
                exponent: desc.exponent,
                size: desc.size,
                offset: at,
                bucket_size: 0,
                name: name(format_args!("{}", desc.name)),
            };
            sink.put(record.as_bytes());
            at += u32::from(desc.size) * 8;
        }
        for index in 0..self.values() {
            sink.put(&self.value(index).to_ne_bytes());
        }
        sink.done
    }
}

/// A name padded with zeros; one is always left.
fn name(text: core::fmt::Arguments) -> [u8; NAME_SIZE] {
    let mut bytes = [0; NAME_SIZE];
    let mut sink = Sink {
        skip: 0,
        out: &mut bytes[..NAME_SIZE - 1],
        done: 0,
    };
    // A name that is too long ends where the room does.
    let _ = sink.write_fmt(text);
    bytes
}

/// Takes bytes that come one part after the other, and keeps those that were asked for.
struct Sink<'a> {
    skip: usize,
    out: &'a mut [u8],
    done: usize,
}

impl Sink<'_> {
    fn put(&mut self, bytes: &[u8]) {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        let bytes = &bytes[skipped..];
        let n = bytes.len().min(self.out.len() - self.done);
        self.out[self.done..self.done + n].copy_from_slice(&bytes[..n]);
        self.done += n;
    }
}

impl core::fmt::Write for Sink<'_> {
    fn write_str(&mut self, s: &str) -> core::fmt::Result {
        self.put(s.as_bytes());
        Ok(())
    }
}
