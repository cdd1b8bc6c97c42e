//! The machine: builds a PC from a configuration and runs it.

mod bus;
mod outcome;
mod stop;
mod vcpu;

use std::sync::Arc;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::acpi;
use crate::boot::{self, Payload};
use crate::channel::ByteChannel;
use crate::chipset::Chipset;
use crate::cpuid;
use crate::hypervisor::{self, Engine, Hypervisor, Vcpu, Vm};
use crate::layout::{IDENTITY_MAP, KVM_TSS};
use crate::memory::{self, GuestMem};
use crate::pci::intx::Lines;
use crate::pci::{self, PciBus};
use crate::virtio::VirtioDevice;
use crate::virtio::block::Block;
use crate::virtio::console::{Console, ConsolePort};
use crate::virtio::disk::{self, DiskConfig, DiskImage};
use crate::virtio::net::{Net, NetConfig};
use crate::virtio::rng::Rng;
use crate::virtio::transport::{self, VirtioPci};
use bus::Bus;
pub use outcome::{Crash, CrashReason, Outcome};
pub use stop::Stop;

/// Most vCPUs: APIC ids of 8 bits, without the broadcast one and the I/O APIC's.
pub const MAX_CPUS: u32 = 254;

/// Name of the control channel's port: `/sys/class/virtio-ports/vportNpM/name` in the guest.
pub const CONTROL_PORT: &str = "org.anykvm.control";

/// What machine to build. Cheap to clone; build it again after a reset.
#[derive(Clone)]
pub struct MachineConfig {
    /// What runs the guest.
    pub engine: Engine,
    /// What to boot.
    pub payload: Payload,
    /// Number of vCPUs, 1 to [`MAX_CPUS`].
    pub cpus: u32,
    /// Bytes of RAM.
    pub memory: u64,
    /// Host's end of COM1 (`ttyS0`).
    pub serial: ByteChannel,
    /// Host's end of a virtio console (`hvc0`), if there shall be one.
    pub console: Option<ByteChannel>,
    /// Host's end of the control channel, if there shall be one: a virtio port with the name
    /// [`CONTROL_PORT`], over which a program in the guest and the host exchange bytes of
    /// their own making. The machine does not look at them.
    pub control: Option<ByteChannel>,
    /// Further named virtio ports, on the control channel's device: a command's streams.
    pub ports: Vec<ConsolePort>,
    /// Disks, `vda` first.
    pub disks: Vec<DiskConfig>,
    /// Network cards.
    pub nets: Vec<NetConfig>,
}

impl MachineConfig {
    /// A machine with one CPU, 512 MiB of RAM and nothing plugged in.
    #[must_use]
    pub fn new(engine: Engine, payload: Payload) -> Self {
        Self {
            engine,
            payload,
            cpus: 1,
            memory: 512 << 20,
            serial: ByteChannel::default(),
            console: None,
            control: None,
            ports: Vec::new(),
            disks: Vec::new(),
            nets: Vec::new(),
        }
    }
}

/// A machine cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Number of vCPUs out of range.
    #[error("a machine has 1 to {max} CPUs, not {asked}")]
    Cpus {
        /// Number asked for.
        asked: u32,
        /// Most that this engine runs.
        max: u32,
    },
    /// The engine failed.
    #[error(transparent)]
    Hypervisor(#[from] hypervisor::Error),
    /// RAM cannot be made.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// Kernel or initrd cannot be loaded.
    #[error(transparent)]
    Boot(#[from] boot::Error),
    /// A disk cannot be used.
    #[error(transparent)]
    Disk(#[from] disk::Error),
    /// Too many devices.
    #[error(transparent)]
    Pci(#[from] pci::Error),
    /// The tables do not fit.
    #[error(transparent)]
    Acpi(#[from] acpi::Error),
    /// The host is out of descriptors or threads.
    #[error("cannot {what}: {source}")]
    Host {
        /// What was being done.
        what: &'static str,
        /// What the host answered.
        source: std::io::Error,
    },
}

/// A machine, ready to run.
pub struct Machine {
    stop: Arc<Stop>,
    vcpus: Vec<Vcpu>,
    // Fields drop in order: the devices' threads end before the VM and its RAM go.
    bus: Arc<Bus>,
    _vm: Arc<Vm>,
    _memory: Arc<GuestMem>,
}

/// Controls a running machine from another thread.
#[derive(Clone)]
pub struct MachineHandle {
    stop: Arc<Stop>,
    bus: std::sync::Weak<Bus>,
}

impl MachineHandle {
    /// Ends the run at once, as if the power were cut; `run` returns [`Outcome::Stopped`].
    pub fn stop(&self) {
        self.stop.finish(Outcome::Stopped);
    }

    /// Presses the power button: a guest with ACPI shuts down in its own time.
    pub fn press_power_button(&self) {
        if let Some(bus) = self.bus.upgrade() {
            bus.chipset.press_power_button();
        }
    }
}

impl Machine {
    /// Builds the machine and loads the payload.
    ///
    /// # Errors
    /// When the configuration makes no sense or the host lacks something; one line that says
    /// what to do.
    pub fn build(config: &MachineConfig) -> Result<Self, Error> {
        let hypervisor = Hypervisor::open(config.engine)?;
        let max = u32::try_from(hypervisor.check_extension(hypervisor::Cap::MaxVcpus))
            .unwrap_or(0)
            .clamp(1, MAX_CPUS);
        if !(1..=max).contains(&config.cpus) {
            return Err(Error::Cpus {
                asked: config.cpus,
                max,
            });
        }
        // What can be wrong with the user's files comes first.
        let images = config
            .disks
            .iter()
            .map(DiskImage::open)
            .collect::<Result<Vec<_>, _>>()?;
        let memory = memory::create(config.memory)?;
        let entry = boot::load(&memory, config.memory, &config.payload)?;
        acpi::write(&memory, config.cpus)?;

        let vm = Arc::new(hypervisor.create_vm()?);
        vm.set_tss_address(KVM_TSS)?;
        vm.set_identity_map_address(IDENTITY_MAP)?;
        register_memory(&vm, &memory)?;
        vm.create_irq_chip()?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        vm.create_pit2(pit)?;

        let stop = Arc::new(Stop::default());
        let chipset =
            Chipset::new(Some(&vm), &stop, &config.serial).map_err(|source| Error::Host {
                what: "set up the serial port",
                source,
            })?;
        let pci = PciBus::default();
        let lines = Arc::new(Lines::new(Some(Arc::clone(&vm))));
        for device in devices(config, images) {
            let placement = pci.place(transport::BAR_SIZE)?;
            let device = VirtioPci::new(
                device,
                placement,
                Arc::clone(&memory),
                Some(Arc::clone(&vm)),
                &lines,
            )
            .map_err(|source| Error::Host {
                what: "set up a device",
                source,
            })?;
            pci.plug(Box::new(device));
        }
        let bus = Arc::new(Bus { chipset, pci });

        let cpuid = cpuid::Template::new(&hypervisor, config.cpus)?;
        let vcpus = (0..config.cpus)
            .map(|id| vcpu::create(&vm, id, &cpuid))
            .collect::<hypervisor::Result<Vec<_>>>()?;
        if let Some(first) = vcpus.first() {
            boot::set_registers(first, entry)?;
        }
        for vcpu in &vcpus {
            stop.add_kicker(vcpu.kicker());
        }
        Ok(Self {
            stop,
            vcpus,
            bus,
            _vm: vm,
            _memory: memory,
        })
    }

    /// A handle that controls the machine while it runs.
    #[must_use]
    pub fn handle(&self) -> MachineHandle {
        MachineHandle {
            stop: Arc::clone(&self.stop),
            bus: Arc::downgrade(&self.bus),
        }
    }

    /// Runs the guest, a thread per vCPU, until it ends.
    ///
    /// # Errors
    /// When the host has no threads.
    pub fn run(self) -> Result<Outcome, Error> {
        let mut threads = Vec::new();
        let mut failure = None;
        for (vcpu, id) in self.vcpus.into_iter().zip(0u32..) {
            let (bus, stop) = (Arc::clone(&self.bus), Arc::clone(&self.stop));
            let run = move || vcpu::run(id, vcpu, &bus, &stop);
            match std::thread::Builder::new()
                .name(format!("vcpu{id}"))
                .spawn(run)
            {
                Ok(thread) => threads.push(thread),
                Err(source) => {
                    failure = Some(Error::Host {
                        what: "start a thread per CPU",
                        source,
                    });
                    self.stop.finish(Outcome::Stopped);
                    break;
                }
            }
        }
        let outcome = self.stop.wait();
        for thread in threads {
            // One kick is enough where it is remembered, as both engines do; more do no harm.
            while !thread.is_finished() {
                self.stop.kick_all();
                std::thread::sleep(std::time::Duration::from_micros(100));
            }
            let _ = thread.join();
        }
        self.bus.pci.shutdown();
        match failure {
            Some(error) => Err(error),
            None => Ok(outcome),
        }
    }
}

/// The devices on the PCI bus, in the order of their slots.
fn devices(config: &MachineConfig, images: Vec<DiskImage>) -> Vec<Box<dyn VirtioDevice>> {
    let mut devices: Vec<Box<dyn VirtioDevice>> = Vec::new();
    for (image, disk) in images.into_iter().zip(&config.disks) {
        devices.push(Box::new(Block::new(image, &disk.serial)));
    }
    for net in &config.nets {
        devices.push(Box::new(Net::new(net)));
    }
    devices.push(Box::new(Rng::default()));
    let port = |name: Option<&str>, channel: &ByteChannel| ConsolePort {
        name: name.map(str::to_owned),
        channel: channel.clone(),
    };
    if let Some(channel) = &config.console {
        devices.push(Box::new(Console::new(vec![port(None, channel)])));
    }
    let control = config
        .control
        .iter()
        .map(|channel| port(Some(CONTROL_PORT), channel));
    let ports: Vec<_> = control.chain(config.ports.iter().cloned()).collect();
    if !ports.is_empty() {
        devices.push(Box::new(Console::new(ports)));
    }
    devices
}

fn register_memory(vm: &Vm, memory: &GuestMem) -> Result<(), Error> {
    for (slot, region) in (0u32..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the mapping is guest memory, which is only accessed by volatile means, and
        // `Machine` drops it after the VM.
        #[expect(unsafe_code, reason = "hands guest memory to the VM")]
        unsafe {
            vm.set_user_memory_region(region)?;
        }
    }
    Ok(())
}
