use std::sync::Mutex;

use super::*;
use crate::memory;
use crate::pci::PciBus;

/// A device that records what the transport tells it.
struct Probe(Arc<Mutex<Record>>);

#[derive(Default)]
struct Record {
    activations: usize,
    resets: usize,
    features: u64,
    enabled: Vec<bool>,
    interrupt: Option<Arc<Interrupt>>,
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> u16 {
        4
    }
    fn pci_class(&self) -> u32 {
        0xff_0000
    }
    fn queue_sizes(&self) -> &[u16] {
        &[8, 16]
    }
    fn features(&self) -> u64 {
        super::super::RING_FEATURES | 1
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&[1, 2, 3], offset, data);
    }
    fn activate(&mut self, activation: Activation) -> std::io::Result<()> {
        let mut record = self.0.lock().unwrap();
        record.activations += 1;
        record.features = activation.features;
        record.enabled = activation.queues.iter().map(Option::is_some).collect();
        record.interrupt = Some(activation.interrupt);
        Ok(())
    }
    fn reset(&mut self) {
        self.0.lock().unwrap().resets += 1;
    }
}

struct Rig {
    pci: VirtioPci,
    record: Arc<Mutex<Record>>,
    lines: Arc<Lines>,
}

fn rig() -> Rig {
    let record = Arc::new(Mutex::new(Record::default()));
    let lines = Arc::new(Lines::new(None));
    let memory = memory::create(16 << 20).unwrap();
    let placement = Placement {
        slot: 1,
        bar: 0xc000_0000,
    };
    let device = Box::new(Probe(Arc::clone(&record)));
    let pci = VirtioPci::new(device, placement, memory, None, &lines).unwrap();
    Rig { pci, record, lines }
}

impl Rig {
    fn write<const N: usize>(&mut self, offset: u64, data: [u8; N]) {
        self.pci.bar_write(0, offset, &data);
    }

    fn read(&mut self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        self.pci.bar_read(0, offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    fn status(&mut self, status: u8) -> u8 {
        self.write(0x14, [status]);
        self.read(0x14, 1) as u8
    }

    fn accept(&mut self, features: u64) {
        for (select, half) in [(0u32, features as u32), (1, (features >> 32) as u32)] {
            self.write(0x08, select.to_le_bytes());
            self.write(0x0c, half.to_le_bytes());
        }
    }

    fn set_up_queue(&mut self, index: u16, base: u64) {
        self.write(0x16, index.to_le_bytes());
        self.write(0x18, 8u16.to_le_bytes());
        self.write(0x20, base.to_le_bytes());
        self.write(0x28, (base as u32 + 0x1000).to_le_bytes());
        self.write(0x2c, 0u32.to_le_bytes());
        self.write(0x30, (base + 0x2000).to_le_bytes());
        self.write(0x1c, 1u16.to_le_bytes());
    }
}

#[test]
fn a_driver_that_follows_the_rules_activates_the_device_once() {
    let mut rig = rig();
    assert_eq!(rig.read(0x12, 2), 2);
    rig.write(0x00, 1u32.to_le_bytes());
    assert_eq!(rig.read(0x04, 4), 1, "VERSION_1 is offered");
    assert_eq!(rig.status(ACKNOWLEDGE | DRIVER), ACKNOWLEDGE | DRIVER);
    rig.accept(F_VERSION_1 | 1);
    assert_eq!(rig.status(11) & FEATURES_OK, FEATURES_OK);
    rig.accept(0);
    rig.set_up_queue(0, 0x10_0000);
    rig.write(0x1a, 1u16.to_le_bytes());
    assert_eq!(
        (rig.read(0x1c, 2), rig.read(0x1a, 2), rig.read(0x18, 2)),
        (1, 1, 8)
    );
    assert_eq!(rig.status(15), 15);
    assert_eq!(rig.status(15), 15);
    {
        let record = rig.record.lock().unwrap();
        assert_eq!((record.activations, record.features), (1, F_VERSION_1 | 1));
        assert_eq!(record.enabled, [true, false]);
    }
    // Nothing can be set up while the driver runs; a reset forgets everything.
    rig.write(0x16, 1u16.to_le_bytes());
    rig.write(0x1c, 1u16.to_le_bytes());
    assert_eq!(rig.read(0x1c, 2), 0);
    assert_eq!(rig.status(0), 0);
    rig.write(0x16, 0u16.to_le_bytes());
    assert_eq!(
        (rig.read(0x1c, 2), rig.read(0x20, 8), rig.read(0x1a, 2)),
        (0, 0, 0xffff)
    );
    assert_eq!(rig.record.lock().unwrap().resets, 2);
}

#[test]
fn features_that_were_not_offered_are_not_ok() {
    let mut rig = rig();
    rig.accept(F_VERSION_1 | 2);
    assert_eq!(rig.status(11) & FEATURES_OK, 0);
    assert_eq!(rig.status(15) & DRIVER_OK, 0);
    let mut legacy = self::rig();
    legacy.accept(1);
    assert_eq!(legacy.status(11) & FEATURES_OK, 0, "a legacy driver");
}

#[test]
fn a_queue_outside_memory_needs_a_reset() {
    let mut rig = rig();
    rig.accept(F_VERSION_1);
    rig.status(11);
    rig.set_up_queue(0, 1 << 40);
    assert_eq!(rig.status(15) & NEEDS_RESET, NEEDS_RESET);
    assert_eq!(rig.record.lock().unwrap().activations, 0);
    assert_eq!(rig.status(0), 0);
}

#[test]
fn intx_follows_the_interrupt_status() {
    let mut rig = rig();
    rig.accept(F_VERSION_1);
    rig.status(11);
    rig.status(15);
    let interrupt = rig.record.lock().unwrap().interrupt.clone().unwrap();
    interrupt.queue(0);
    interrupt.config();
    assert!(rig.lines.raised(1));
    let mut status = [0; 2];
    rig.pci.config_read(6, &mut status);
    assert_eq!(status[0] & 8, 8);
    assert_eq!(rig.read(ISR, 1), u64::from(ISR_QUEUE | ISR_CONFIG));
    assert!(!rig.lines.raised(1));
    assert_eq!(rig.read(ISR, 1), 0);
}

#[test]
fn capabilities_lead_to_the_structures() {
    let mut rig = rig();
    let config = rig.pci.config().clone();
    let (mut at, mut kinds, mut msix) = (usize::from(config.byte(0x34)), Vec::new(), false);
    while at != 0 {
        match config.byte(at) {
            CAP_VENDOR => kinds.push((config.byte(at + 3), config.dword(at + 8))),
            CAP_MSIX => {
                msix = true;
                assert_eq!(config.dword(at) >> 16 & 0x7ff, 2, "three vectors");
            }
            other => panic!("capability {other}"),
        }
        at = usize::from(config.byte(at + 1));
    }
    assert!(msix);
    let expected = [(1, COMMON), (3, ISR), (4, DEVICE), (2, NOTIFY), (5, 0)];
    assert_eq!(kinds, expected.map(|(kind, at)| (kind, at as u32)));
    assert_eq!(rig.read(DEVICE, 4), 0x0003_0201);
    // The same through the window in configuration space.
    let window = rig.pci.window_capability;
    rig.pci
        .config_write(window + 8, &(DEVICE as u32 + 1).to_le_bytes());
    rig.pci.config_write(window + 12, &2u32.to_le_bytes());
    let mut data = [0; 4];
    rig.pci.config_read(window + 16, &mut data);
    assert_eq!(data, [2, 3, 0, 0]);
}

/// Pokes every register of every kind of device with random values: nothing may panic, hang
/// or reach outside.
#[test]
fn random_pokes_leave_all_devices_whole() {
    use crate::channel::ByteChannel;
    use crate::virtio::{block, console, disk, net, rng};

    struct Silence(vmm_sys_util::eventfd::EventFd);
    impl net::NetBackend for Silence {
        fn send(&mut self, _: &[u8]) {}
        fn recv(&mut self, _: &mut [u8]) -> Option<usize> {
            None
        }
        fn event_fd(&self) -> std::os::fd::RawFd {
            std::os::fd::AsRawFd::as_raw_fd(&self.0)
        }
    }

    let path = std::env::temp_dir().join(format!("anykvm-poke-{}", std::process::id()));
    std::fs::File::create(&path)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let image = disk::DiskImage::open(&disk::DiskConfig::new(&path)).unwrap();
    let backend: net::SharedBackend = Arc::new(Mutex::new(Silence(EventFd::new(0).unwrap())));
    let port = |name: Option<&str>| console::ConsolePort {
        name: name.map(str::to_owned),
        channel: ByteChannel::default(),
    };
    let devices: Vec<Box<dyn VirtioDevice>> = vec![
        Box::new(block::Block::new(image, "poke")),
        Box::new(net::Net::new(&net::NetConfig::new(backend))),
        Box::new(rng::Rng::default()),
        Box::new(console::Console::new(vec![port(None)])),
        Box::new(console::Console::new(vec![
            port(Some("a")),
            port(Some("b")),
        ])),
    ];
    let bus = PciBus::default();
    let memory = memory::create(16 << 20).unwrap();
    let lines = Arc::new(Lines::new(None));
    for device in devices {
        let placement = bus.place(BAR_SIZE).unwrap();
        let pci = VirtioPci::new(device, placement, Arc::clone(&memory), None, &lines).unwrap();
        bus.plug(Box::new(pci));
    }
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let ecam = crate::layout::ECAM_BASE;
    for slot in 1..6u64 {
        bus.mmio_write(ecam + (slot << 15) + 4, &[6]);
    }
    let bar = |slot: u64| crate::layout::PCI_HOLE_START + (slot - 1) * BAR_SIZE;
    for round in 0..60_000u64 {
        let slot = next() % 5 + 1;
        let len = [1, 2, 4, 8][next() as usize % 4];
        let bytes = next().to_le_bytes();
        let data = &bytes[..len];
        let mut buffer = [0; 8];
        match next() % 8 {
            0 => drop(bus.mmio_write(bar(slot) + next() % BAR_SIZE, data)),
            1 => drop(bus.mmio_read(bar(slot) + next() % BAR_SIZE, &mut buffer[..len])),
            2 => drop(bus.mmio_write(bar(slot) + next() % 0x40, data)),
            3 => drop(bus.mmio_read(ecam + (slot << 15) + next() % 4096, &mut buffer[..len])),
            // Keep the BAR where it is, or the pokes would end.
            4 => drop(bus.mmio_write(ecam + (slot << 15) + 0x40 + next() % 0xc0, data)),
            5 => bus.port_write(0xcf8 + (next() % 8) as u16, &data[..len.min(4)]),
            6 => bus.port_read(0xcf8 + (next() % 8) as u16, &mut buffer[..len.min(4)]),
            // A driver that sets things up properly, over queues full of noise.
            _ => {
                let common = bar(slot);
                let write = |at: u64, data: &[u8]| {
                    bus.mmio_write(common + at, data);
                };
                write(0x14, &[0]);
                for (select, half) in [(0u32, next() as u32), (1, 1)] {
                    write(0x00, &select.to_le_bytes());
                    let mut offered = [0; 4];
                    bus.mmio_read(common + 4, &mut offered);
                    write(0x08, &select.to_le_bytes());
                    write(0x0c, &(u32::from_le_bytes(offered) & half).to_le_bytes());
                }
                write(0x14, &[11]);
                for queue in 0..6u16 {
                    write(0x16, &queue.to_le_bytes());
                    for at in [0x20, 0x28, 0x30] {
                        write(at, &((next() % (15 << 20)) & !15).to_le_bytes());
                    }
                    write(0x1c, &[1, 0]);
                }
                let at = (next() % (15 << 20)) & !15;
                for word in 0..64 {
                    let noise = next() & next() & 0xf_00ff_ffff;
                    let at = vm_memory::GuestAddress(at + word * 8);
                    vm_memory::Bytes::write_obj(&*memory, noise, at).unwrap();
                }
                if round % 4 == 0 {
                    write(0x14, &[15]);
                    write(NOTIFY, &[0; 2]);
                }
            }
        }
    }
    bus.shutdown();
    std::fs::remove_file(&path).unwrap();
}
