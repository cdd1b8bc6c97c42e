//! The devices against a driver of the tests' own, over real rings in guest memory.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::block::Block;
use super::console::{Console, ConsolePort};
use super::disk::{DiskConfig, DiskImage};
use super::net::{Net, NetBackend, NetConfig};
use super::rng::Rng;
use super::transport::{BAR_SIZE, VirtioPci};
use super::*;
use crate::channel::ByteChannel;
use crate::memory;
use crate::pci::intx::Lines;
use crate::pci::{PciDevice, Placement};

const RING: u16 = 16;
const NOTIFY: u64 = 0x3000;

/// A driver that polls.
struct Driver {
    memory: Arc<GuestMem>,
    device: VirtioPci,
    rings: Vec<Ring>,
    next_data: u64,
}

#[derive(Clone, Copy, Default)]
struct Ring {
    base: u64,
    next_descriptor: u16,
    available: u16,
    used: u16,
}

impl Driver {
    fn new(device: Box<dyn VirtioDevice>, queues: u16) -> Self {
        let memory = memory::create(16 << 20).unwrap();
        let lines = Arc::new(Lines::new(None));
        let placement = Placement {
            slot: 1,
            bar: 0xc000_0000,
        };
        const { assert!(BAR_SIZE > NOTIFY) };
        let device = VirtioPci::new(device, placement, Arc::clone(&memory), None, &lines).unwrap();
        let mut driver = Self {
            memory,
            device,
            rings: Vec::new(),
            next_data: 0x80_0000,
        };
        driver.write(0x14, &[3]);
        let mut features = [0u8; 8];
        for select in 0..2usize {
            driver.write(0x00, &(select as u32).to_le_bytes());
            let half = &mut features[select * 4..select * 4 + 4];
            driver.device.bar_read(0, 4, half);
        }
        let features = u64::from_le_bytes(features) & !F_EVENT_IDX;
        for select in 0..2u32 {
            driver.write(0x08, &select.to_le_bytes());
            driver.write(0x0c, &((features >> (select * 32)) as u32).to_le_bytes());
        }
        driver.write(0x14, &[11]);
        for index in 0..queues {
            let base = 0x10_0000 + u64::from(index) * 0x1_0000;
            driver.write(0x16, &index.to_le_bytes());
            driver.write(0x18, &RING.to_le_bytes());
            driver.write(0x20, &base.to_le_bytes());
            driver.write(0x28, &(base + 0x4000).to_le_bytes());
            driver.write(0x30, &(base + 0x8000).to_le_bytes());
            driver.write(0x1c, &[1, 0]);
            driver.rings.push(Ring {
                base,
                ..Ring::default()
            });
        }
        driver.write(0x14, &[15]);
        let mut status = [0];
        driver.device.bar_read(0, 0x14, &mut status);
        assert_eq!(status, [15]);
        driver
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        self.device.bar_write(0, offset, data);
    }

    fn put<T: vm_memory::ByteValued>(&self, at: u64, value: T) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    /// Offers a chain: what the device reads, then room for what it writes. Returns where the
    /// room is.
    fn offer(&mut self, queue: u16, input: &[&[u8]], room: &[u32]) -> Vec<u64> {
        let mut ring = self.rings[usize::from(queue)];
        let head = ring.next_descriptor % RING;
        let count = input.len() + room.len();
        let mut rooms = Vec::new();
        let lens = input
            .iter()
            .map(|b| b.len() as u32)
            .chain(room.iter().copied());
        for (n, len) in lens.enumerate() {
            let at = self.next_data;
            self.next_data += u64::from(len).next_multiple_of(64);
            if self.next_data > 0xf0_0000 {
                self.next_data = 0x80_0000;
            }
            let index = ring.next_descriptor % RING;
            ring.next_descriptor += 1;
            let next = ring.next_descriptor % RING;
            let mut flags = u16::from(n + 1 < count);
            match input.get(n) {
                Some(bytes) => self.memory.write_slice(bytes, GuestAddress(at)).unwrap(),
                None => {
                    flags |= 2;
                    rooms.push(at);
                }
            }
            let descriptor = ring.base + u64::from(index) * 16;
            self.put(descriptor, at);
            self.put(descriptor + 8, len);
            self.put(descriptor + 12, flags);
            self.put(descriptor + 14, next);
        }
        let available = ring.base + 0x4000;
        self.put(available + 4 + u64::from(ring.available % RING) * 2, head);
        ring.available += 1;
        self.put(available + 2, ring.available);
        self.rings[usize::from(queue)] = ring;
        self.write(NOTIFY + u64::from(queue) * 4, &queue.to_le_bytes());
        rooms
    }

    /// Waits for the next used chain of `queue`; returns how many bytes the device wrote.
    fn wait(&mut self, queue: u16) -> u32 {
        let ring = &mut self.rings[usize::from(queue)];
        let used = ring.base + 0x8000;
        let start = Instant::now();
        while self.memory.read_obj::<u16>(GuestAddress(used + 2)).unwrap() == ring.used {
            assert!(
                start.elapsed() < Duration::from_secs(10),
                "queue {queue} is stuck"
            );
            std::thread::yield_now();
        }
        let entry = used + 4 + u64::from(ring.used % RING) * 8;
        ring.used += 1;
        self.memory.read_obj(GuestAddress(entry + 4)).unwrap()
    }

    fn read(&self, at: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.memory
            .read_slice(&mut bytes, GuestAddress(at))
            .unwrap();
        bytes
    }
}

fn block_header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

#[test]
fn a_disk_reads_writes_flushes_and_names_itself() {
    let path = std::env::temp_dir().join(format!("anykvm-blk-{}", std::process::id()));
    std::fs::File::create(&path)
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    let image = DiskImage::open(&DiskConfig::new(&path)).unwrap();
    let mut driver = Driver::new(Box::new(Block::new(image, "serial-1")), 1);
    let mut capacity = [0; 8];
    driver.device.bar_read(0, 0x2000, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 2048);
    let request = |driver: &mut Driver, header: &[u8], data: &[u8], room: &[u32]| {
        let input: Vec<&[u8]> = [header, data]
            .into_iter()
            .filter(|b| !b.is_empty())
            .collect();
        let room = [room, &[1]].concat();
        let rooms = driver.offer(0, &input, &room);
        let written = driver.wait(0);
        let (&status, data) = rooms.split_last().unwrap();
        (driver.read(status, 1)[0], written, data.to_vec())
    };
    let data: Vec<u8> = (0..1024u32).map(|n| n as u8).collect();
    assert_eq!(request(&mut driver, &block_header(1, 7), &data, &[]).0, 0);
    assert_eq!(request(&mut driver, &block_header(4, 0), &[], &[]).0, 0);
    let (status, written, rooms) = request(&mut driver, &block_header(0, 7), &[], &[512, 512]);
    assert_eq!((status, written), (0, 1025));
    assert_eq!(
        [driver.read(rooms[0], 512), driver.read(rooms[1], 512)].concat(),
        data
    );
    let (status, _, rooms) = request(&mut driver, &block_header(8, 0), &[], &[20]);
    assert_eq!(
        (status, &driver.read(rooms[0], 9)[..]),
        (0, &b"serial-1\0"[..])
    );
    assert_eq!(
        request(&mut driver, &block_header(0, 2048), &[], &[512]).0,
        1,
        "beyond the end"
    );
    assert_eq!(
        request(&mut driver, &block_header(99, 0), &[], &[]).0,
        2,
        "no such request"
    );
    let range = [
        &7u64.to_le_bytes()[..],
        &2u32.to_le_bytes(),
        &0u32.to_le_bytes(),
    ]
    .concat();
    assert_eq!(request(&mut driver, &block_header(13, 0), &range, &[]).0, 0);
    drop(driver);
    let file = std::fs::read(&path).unwrap();
    assert!(file[7 * 512..9 * 512].iter().all(|&b| b == 0));
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn entropy_fills_the_buffer() {
    let mut driver = Driver::new(Box::new(Rng::default()), 1);
    let rooms = driver.offer(0, &[], &[64]);
    assert_eq!(driver.wait(0), 64);
    assert_ne!(driver.read(rooms[0], 64), [0; 64]);
}

/// Sends back every frame with its bytes reversed.
struct Echo {
    frames: VecDeque<Vec<u8>>,
    event: EventFd,
}

impl NetBackend for Echo {
    fn send(&mut self, frame: &[u8]) {
        self.frames.push_back(frame.iter().rev().copied().collect());
        self.event.write(1).unwrap();
    }
    fn recv(&mut self, buffer: &mut [u8]) -> Option<usize> {
        let Some(frame) = self.frames.pop_front() else {
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

#[test]
fn frames_go_out_and_come_in() {
    let event = EventFd::new(EFD_NONBLOCK).unwrap();
    let backend = Arc::new(Mutex::new(Echo {
        frames: VecDeque::new(),
        event,
    }));
    let mut driver = Driver::new(Box::new(Net::new(&NetConfig::new(backend))), 2);
    let mut mac = [0; 6];
    driver.device.bar_read(0, 0x2000, &mut mac);
    assert_eq!(mac, [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
    // The answer to the first frame has to wait for a buffer.
    driver.offer(1, &[&[0; 12], b"first"], &[]);
    assert_eq!(driver.wait(1), 0);
    for (n, text) in [&b"first"[..], b"second", b"third"].iter().enumerate() {
        if n > 0 {
            driver.offer(1, &[&[0; 12], text], &[]);
            driver.wait(1);
        }
        let rooms = driver.offer(0, &[], &[2048]);
        let len = driver.wait(0) as usize;
        let received = driver.read(rooms[0], len);
        let expected: Vec<u8> = text.iter().rev().copied().collect();
        assert_eq!(received[12..], expected);
        assert_eq!(received[..12], [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    }
}

fn pair() -> (UnixStream, ByteChannel) {
    let (host, guest) = UnixStream::pair().unwrap();
    host.set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    (host, ByteChannel::duplex(OwnedFd::from(guest)))
}

#[test]
fn a_console_carries_bytes_both_ways() {
    let (mut host, channel) = pair();
    let port = ConsolePort {
        name: None,
        channel,
    };
    let mut driver = Driver::new(Box::new(Console::new(vec![port])), 2);
    driver.offer(1, &[b"to ", b"host"], &[]);
    driver.wait(1);
    let mut bytes = [0; 7];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"to host");
    host.write_all(b"to guest").unwrap();
    let rooms = driver.offer(0, &[], &[64]);
    assert_eq!(driver.wait(0), 8);
    assert_eq!(driver.read(rooms[0], 8), b"to guest");
    // The driver stops and starts again.
    driver.write(0x14, &[0]);
    drop(driver);
    assert_eq!(host.read(&mut bytes).unwrap(), 0, "the guest's end is gone");
}

#[test]
fn a_named_port_introduces_itself_and_waits_for_its_reader() {
    let (mut host, channel) = pair();
    let port = ConsolePort {
        name: Some("org.anykvm.control".into()),
        channel,
    };
    let mut driver = Driver::new(Box::new(Console::new(vec![port])), 4);
    let message = |port: u32, event: u16, value: u16| {
        [
            &port.to_le_bytes()[..],
            &event.to_le_bytes(),
            &value.to_le_bytes(),
        ]
        .concat()
    };
    let receive = |driver: &mut Driver| {
        let rooms = driver.offer(2, &[], &[64]);
        let len = driver.wait(2) as usize;
        driver.read(rooms[0], len)
    };
    driver.offer(3, &[&message(u32::MAX, 0, 1)], &[]);
    driver.wait(3);
    assert_eq!(receive(&mut driver), message(0, 1, 1), "the port is added");
    driver.offer(3, &[&message(0, 3, 1)], &[]);
    driver.wait(3);
    let name = receive(&mut driver);
    assert_eq!(
        (&name[..8], &name[8..]),
        (&message(0, 7, 1)[..], &b"org.anykvm.control"[..])
    );
    assert_eq!(
        receive(&mut driver),
        message(0, 6, 1),
        "the host has it open"
    );

    host.write_all(b"early").unwrap();
    let rooms = driver.offer(0, &[], &[64]);
    std::thread::sleep(Duration::from_millis(30));
    assert_eq!(
        driver
            .memory
            .read_obj::<u16>(GuestAddress(driver.rings[0].base + 0x8002))
            .unwrap(),
        0
    );
    driver.offer(3, &[&message(0, 6, 1)], &[]);
    driver.wait(3);
    assert_eq!(driver.wait(0), 5);
    assert_eq!(driver.read(rooms[0], 5), b"early");
    // A driver that asks without end gets no more than a few answers.
    for _ in 0..500 {
        driver.offer(3, &[&message(0, 0, 1)], &[]);
        driver.wait(3);
    }
}
