//! The board of `anykvm run`: ports, PCI configuration space, BARs, and virtqueues with arbitrary
//! rings in a small RAM.

use crate::input::{Input, Random};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use vm_memory::{Bytes, GuestAddress};
use vmm::channel::ByteChannel;
use vmm::chipset::Chipset;
use vmm::machine::Stop;
use vmm::memory::{self, GuestMem};
use vmm::pci::PciBus;
use vmm::pci::intx::Lines;
use vmm::virtio::VirtioDevice;
use vmm::virtio::block::Block;
use vmm::virtio::console::{Console, ConsolePort};
use vmm::virtio::disk::{DiskConfig, DiskImage};
use vmm::virtio::net::{Net, NetBackend, NetConfig};
use vmm::virtio::rng::Rng;
use vmm::virtio::transport::{BAR_SIZE, VirtioPci};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const RAM: u64 = 16 << 20;
const DISK: usize = 64 << 10;
/// Descriptors of a ring.
const RING: u16 = 16;
/// Where the rings are.
const RINGS: u64 = 0x1_0000;
/// Where requests and buffers are.
const BUFFERS: u64 = 0x8_0000;
const COMMON_STATUS: u64 = 0x14;
const NOTIFY: u64 = 0x3000;

struct Board {
    chipset: Chipset,
    pci: PciBus,
    memory: Arc<GuestMem>,
    /// Addresses of the devices' registers.
    bars: Vec<u64>,
}

/// A cable that gives back what it is given.
struct Loop {
    frame: Option<Vec<u8>>,
    event: EventFd,
}

impl NetBackend for Loop {
    fn send(&mut self, frame: &[u8]) {
        assert!(!frame.is_empty());
        self.frame = Some(frame.to_vec());
        let _ = self.event.write(1);
    }
    fn recv(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let Some(frame) = self.frame.take() else {
            let _ = self.event.read();
            return None;
        };
        buffer[..frame.len()].copy_from_slice(&frame);
        Some(frame.len())
    }
    fn event_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

/// Each few bytes are an access of the guest, a change of its memory, or a step of a driver.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    ignore_broken_pipes();
    let board = Board::new();
    while !input.is_empty() {
        board.act(&mut input);
    }
    // What is on its way to a worker still gets there.
    std::thread::sleep(Duration::from_micros(200));
    board.pci.shutdown();
}

/// As Rust's runtime does in a program of its own, but not under libFuzzer's `main`.
#[expect(
    unsafe_code,
    reason = "the standard library has no safe way to ignore a signal"
)]
fn ignore_broken_pipes() {
    // SAFETY: ignoring a signal installs no handler.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

fn channel() -> ByteChannel {
    let (guest, mut host) =
        std::os::unix::net::UnixStream::pair().expect("no socket for a console");
    // The guest reads this and then the end.
    let _ = host.write_all(b"input from the host");
    ByteChannel::duplex(OwnedFd::from(guest))
}

fn disk() -> DiskConfig {
    let file = memfd();
    let _ = file.set_len(DISK as u64);
    DiskConfig {
        file: Some(Arc::new(file)),
        format: vmm::virtio::disk::DiskFormat::Raw,
        ..DiskConfig::new("disk")
    }
}

#[expect(unsafe_code, reason = "an anonymous file has no safe constructor")]
fn memfd() -> File {
    // SAFETY: the name is a C string; a descriptor that comes back is new and ours.
    unsafe {
        let fd = libc::memfd_create(c"disk".as_ptr(), libc::MFD_CLOEXEC);
        assert!(fd >= 0, "no memory for a disk");
        File::from_raw_fd(fd)
    }
}

impl Board {
    fn new() -> Self {
        let memory = memory::create(RAM).expect("no memory for a guest");
        let lines = Arc::new(Lines::new(None));
        let pci = PciBus::default();
        let event = EventFd::new(EFD_NONBLOCK).expect("no event descriptor");
        let port = |name: Option<&str>| ConsolePort {
            name: name.map(str::to_owned),
            channel: channel(),
        };
        let image = DiskImage::open(&disk()).expect("an empty disk");
        let backend = Arc::new(Mutex::new(Loop { frame: None, event }));
        let devices: [Box<dyn VirtioDevice>; 5] = [
            Box::new(Block::new(image, "fuzz")),
            Box::new(Net::new(&NetConfig::new(backend))),
            Box::new(Rng::default()),
            Box::new(Console::new(vec![port(None)])),
            Box::new(Console::new(vec![port(Some("one")), port(Some("two"))])),
        ];
        let mut bars = Vec::new();
        for device in devices {
            let placement = pci.place(BAR_SIZE).expect("room on the bus");
            bars.push(placement.bar);
            let device = VirtioPci::new(device, placement, Arc::clone(&memory), None, &lines);
            pci.plug(Box::new(device.expect("descriptors for a device")));
        }
        let stop = Arc::new(Stop::default());
        let chipset = Chipset::new(None, &stop, &channel()).expect("a serial port");
        Self {
            chipset,
            pci,
            memory,
            bars,
        }
    }

    fn act(&self, input: &mut Input<'_>) {
        let mut buffer = [0; 16];
        let len = [1, 2, 4, 8][input.below(4)];
        match input.below(24) {
            0 => {
                let port = port(input);
                self.port(port, &mut buffer[..len.min(4)], false);
            }
            1 | 2 => {
                let port = port(input);
                buffer[..8].copy_from_slice(&input.value().to_le_bytes());
                self.port(port, &mut buffer[..len.min(4)], true);
            }
            3 => {
                // Configuration space of a device.
                let slot = 1 + input.below(self.bars.len());
                self.config(slot, input.u8(), input.u32());
            }
            4 => {
                let _ = self.pci.mmio_read(self.address(input), &mut buffer[..len]);
            }
            5..9 => {
                let address = self.address(input);
                buffer[..8].copy_from_slice(&input.value().to_le_bytes());
                let _ = self.pci.mmio_write(address, &buffer[..len]);
            }
            9..12 => {
                let at = match input.below(3) {
                    0 => RINGS + u64::from(input.u16()),
                    1 => BUFFERS + u64::from(input.u16()),
                    _ => input.value(),
                };
                let len = input.below(48);
                let _ = self.memory.write_slice(input.bytes(len), GuestAddress(at));
            }
            12 | 13 => self.bring_up(input),
            14..20 => self.offer(input),
            20 | 21 => self.notify(input),
            22 => {
                let bar = input.pick(&self.bars);
                self.write(bar + COMMON_STATUS, &[input.u8() & input.u8()]);
            }
            _ => {
                self.chipset.press_power_button();
                std::thread::sleep(Duration::from_micros(100));
            }
        }
    }

    fn port(&self, port: u16, data: &mut [u8], write: bool) {
        let pci = (0xcf8..0xd00).contains(&port) && !(port == 0xcf9 && data.len() == 1);
        match (pci, write) {
            (true, false) => self.pci.port_read(port, data),
            (true, true) => self.pci.port_write(port, data),
            (false, false) => self.chipset.read(port, data),
            (false, true) => self.chipset.write(port, data),
        }
    }

    fn config(&self, slot: usize, register: u8, value: u32) {
        let address = 1u32 << 31 | (slot as u32) << 11 | u32::from(register & !3);
        self.pci.port_write(0xcf8, &address.to_le_bytes());
        self.pci.port_write(0xcfc, &value.to_le_bytes());
        let mut data = [0; 4];
        self.pci.port_read(0xcfc, &mut data);
    }

    fn address(&self, input: &mut Input<'_>) -> u64 {
        match input.below(8) {
            0 => input.value(),
            1 => 0xe000_0000 + u64::from(input.u32() & 0xf_ffff),
            2 => input.pick(&self.bars) + u64::from(input.u16() & 0x7fff),
            n => {
                let page = [0, 0, 0x2000, NOTIFY, 0x4000, 0x1000][n - 2];
                input.pick(&self.bars) + page + u64::from(input.u8() & 0x7f)
            }
        }
    }

    fn write(&self, address: u64, data: &[u8]) {
        let _ = self.pci.mmio_write(address, data);
    }

    fn ring(device: usize, queue: u16) -> u64 {
        RINGS + (device as u64 * 8 + u64::from(queue)) * 0x1000
    }

    /// Does what a driver does before it uses a device.
    fn bring_up(&self, input: &mut Input<'_>) {
        let device = input.below(self.bars.len());
        let (bar, options) = (self.bars[device], input.u8());
        self.config(device + 1, 4, 6);
        self.write(bar + COMMON_STATUS, &[0]);
        self.write(bar + COMMON_STATUS, &[3]);
        for select in 0..2u32 {
            self.write(bar, &select.to_le_bytes());
            let mut features = [0; 4];
            let _ = self.pci.mmio_read(bar + 4, &mut features);
            if select == 0 && options & 1 != 0 {
                // No event index.
                features[3] &= !0x20;
            }
            self.write(bar + 8, &select.to_le_bytes());
            self.write(bar + 12, &features);
        }
        self.write(bar + COMMON_STATUS, &[11]);
        for queue in 0..6u16 {
            if options >> 2 & 1 << queue != 0 {
                continue;
            }
            let ring = Self::ring(device, queue);
            self.write(bar + 0x16, &queue.to_le_bytes());
            self.write(bar + 0x18, &RING.to_le_bytes());
            for (at, part) in [(0x20, ring), (0x28, ring + 0x400), (0x30, ring + 0x800)] {
                self.write(bar + at, &part.to_le_bytes());
            }
            self.write(bar + 0x1c, &[1, 0]);
        }
        self.write(bar + COMMON_STATUS, &[15]);
    }

    /// Puts descriptors, an available entry and an index into a ring.
    fn offer(&self, input: &mut Input<'_>) {
        let device = input.below(self.bars.len());
        let queue = u16::from(input.u8() % 6);
        let ring = Self::ring(device, queue);
        let put = |at: u64, bytes: &[u8]| {
            let _ = self.memory.write_slice(bytes, GuestAddress(at));
        };
        let first = u16::from(input.u8() % 16);
        for n in 0..input.below(5) as u16 {
            let index = first.wrapping_add(n) % RING;
            let at = match input.below(6) {
                0 => input.value(),
                1 => RAM - u64::from(input.u8()),
                _ => BUFFERS + u64::from(input.u16()),
            };
            let len = match input.below(4) {
                0 => input.value() as u32,
                1 => 16,
                2 => u32::from(input.u16()),
                _ => 512,
            };
            let flags = match input.below(8) {
                0 => input.u16(),
                n => [1, 1, 3, 3, 2, 0, 4][n - 1],
            };
            let next = match input.below(8) {
                0 => input.u16(),
                _ => (index + 1) % RING,
            };
            let entry = ring + u64::from(index) * 16;
            put(entry, &at.to_le_bytes());
            put(entry + 8, &len.to_le_bytes());
            put(entry + 12, &flags.to_le_bytes());
            put(entry + 14, &next.to_le_bytes());
        }
        let index = input.u16();
        put(
            ring + 0x404 + u64::from(index.wrapping_sub(1) % RING) * 2,
            &first.to_le_bytes(),
        );
        put(ring + 0x402, &index.to_le_bytes());
        let bar = self.bars[device];
        self.write(bar + NOTIFY + u64::from(queue) * 4, &queue.to_le_bytes());
    }

    fn notify(&self, input: &mut Input<'_>) {
        let bar = input.pick(&self.bars);
        let queue = u16::from(input.u8() % 8);
        self.write(bar + NOTIFY + u64::from(queue) * 4, &queue.to_le_bytes());
        std::thread::sleep(Duration::from_micros(u64::from(input.u8())));
    }
}

fn port(input: &mut Input<'_>) -> u16 {
    match input.below(9) {
        0 => input.u16(),
        n => {
            let base = [0x3f8, 0x60, 0x70, 0x600, 0x620, 0xcf8, 0xcfc, 0xfff8][n - 1];
            base + u16::from(input.u8() & 7)
        }
    }
}

/// Each device brought up and given a few buffers, then anything.
pub fn seeds() -> Vec<Vec<u8>> {
    let mut random = Random(13);
    let mut all = Vec::new();
    for device in 0..5u8 {
        for queue in 0..6u8 {
            // A block request (and what other devices make of it) at the start of the buffers.
            let mut seed = vec![0, 9, 1, 0, 0, 16];
            seed.extend_from_slice(&[queue, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
            seed.extend_from_slice(&[0, 12, device, 1]);
            // Three descriptors: 16 bytes to read, 512 and 16 to write.
            seed.extend_from_slice(&[0, 14, device, queue, 0, 3]);
            seed.extend_from_slice(&[2, 0, 0, 1, 1, 1]);
            seed.extend_from_slice(&[2, 0, 1, 3, 3, 1]);
            seed.extend_from_slice(&[2, 0, 4, 1, 5, 1]);
            seed.extend_from_slice(&[1, 0]);
            seed.extend_from_slice(&[0, 20, device, queue, 200]);
            seed.extend(random.bytes(150));
            all.push(seed);
        }
    }
    all
}
