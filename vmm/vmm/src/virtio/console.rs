//! Console device: one plain console, or several named ports. See "Console Device" in the
//! specification.
//!
//! A single console port is a device without `MULTIPORT`: the guest's `hvc0`. Named ports are
//! byte channels for programs: `/dev/vportNpM` in the guest, the name in
//! `/sys/class/virtio-ports/vportNpM/name`. The host's end is always open.

use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;

use super::guest_io::Buffers;
use super::worker::{Handler, Quit, Worker};
use super::{Activation, Queues, RING_FEATURES, VirtioDevice, read_config_bytes};
use crate::channel::ByteChannel;
use crate::poll;

const F_MULTIPORT: u64 = 1 << 1;

const QUEUE_SIZE: u16 = 64;
const CONTROL_RX: usize = 2;
const CONTROL_TX: usize = 3;
/// Most bytes moved at a time.
const CHUNK: usize = 4096;

const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;
/// Most control messages that wait for the driver's buffers; a driver gets no more.
const MAX_MESSAGES: usize = 64;

/// A port of the device.
#[derive(Clone, Debug)]
pub struct ConsolePort {
    /// Name for programs in the guest; a console (`hvcN`) if none.
    pub name: Option<String>,
    /// The host's end.
    pub channel: ByteChannel,
}

/// The device.
pub struct Console {
    worker: Worker<Ports>,
    config: [u8; 12],
    queue_sizes: Vec<u16>,
    multiport: bool,
}

impl Console {
    /// A device with `ports`, at least one. Without names it is a plain console.
    #[must_use]
    pub fn new(ports: Vec<ConsolePort>) -> Self {
        let multiport = ports.len() > 1 || ports.iter().any(|port| port.name.is_some());
        let mut config = [0; 12];
        config[4..8].copy_from_slice(&(ports.len() as u32).to_le_bytes());
        let queues = if multiport { 2 * (ports.len() + 1) } else { 2 };
        let ports = ports.into_iter().map(Port::new).collect();
        Self {
            worker: Worker::new(Ports {
                ports,
                messages: VecDeque::new(),
                multiport,
            }),
            config,
            queue_sizes: vec![QUEUE_SIZE; queues],
            multiport,
        }
    }
}

impl VirtioDevice for Console {
    fn device_type(&self) -> u16 {
        3
    }

    fn pci_class(&self) -> u32 {
        0x07_8000
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        RING_FEATURES | if self.multiport { F_MULTIPORT } else { 0 }
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.worker.start(activation)
    }

    fn reset(&mut self) {
        self.worker.stop();
    }
}

struct Port {
    name: Option<String>,
    channel: ByteChannel,
    /// The host's end has said that it is over.
    ended: bool,
    /// A program in the guest has the port open. Consoles count as open.
    open: bool,
}

impl Port {
    fn new(ConsolePort { name, channel }: ConsolePort) -> Self {
        Self {
            open: name.is_none(),
            name,
            channel,
            ended: false,
        }
    }
}

struct Ports {
    ports: Vec<Port>,
    /// Control messages for the driver: header and, for a name, text.
    messages: VecDeque<Vec<u8>>,
    multiport: bool,
}

impl Ports {
    /// Queue numbers of port `index`: what the guest receives, what it sends.
    fn queues_of(index: usize) -> (usize, usize) {
        if index == 0 {
            (0, 1)
        } else {
            (2 * index + 2, 2 * index + 3)
        }
    }

    fn post(&mut self, port: usize, event: u16, value: u16, text: &[u8]) {
        if self.messages.len() >= MAX_MESSAGES {
            return;
        }
        let mut message = (port as u32).to_le_bytes().to_vec();
        message.extend_from_slice(&event.to_le_bytes());
        message.extend_from_slice(&value.to_le_bytes());
        message.extend_from_slice(text);
        self.messages.push_back(message);
    }

    /// The driver has sent a control message.
    fn control(&mut self, message: [u8; 8]) {
        let [p0, p1, p2, p3, e0, e1, v0, v1] = message;
        let port = u32::from_le_bytes([p0, p1, p2, p3]) as usize;
        let event = u16::from_le_bytes([e0, e1]);
        let value = u16::from_le_bytes([v0, v1]);
        match event {
            DEVICE_READY if value == 1 => {
                for index in 0..self.ports.len() {
                    self.post(index, PORT_ADD, 1, &[]);
                }
            }
            PORT_READY if value == 1 => {
                let Some(name) = self.ports.get(port).map(|port| port.name.clone()) else {
                    return;
                };
                match name {
                    None => self.post(port, CONSOLE_PORT, 1, &[]),
                    Some(name) => self.post(port, PORT_NAME, 1, name.as_bytes()),
                }
                self.post(port, PORT_OPEN, 1, &[]);
            }
            PORT_OPEN => {
                if let Some(port) = self.ports.get_mut(port) {
                    port.open = value == 1 || port.name.is_none();
                }
            }
            _ => {}
        }
    }

    fn send_messages(&mut self, queues: &mut Queues) {
        let mut used = false;
        while let Some(message) = self.messages.front() {
            let served = queues.serve_one(CONTROL_RX, |memory, chain| {
                Buffers::new(memory, chain).map_or(0, |b| b.writable.write(message) as u32)
            });
            if !served {
                break;
            }
            used = true;
            self.messages.pop_front();
        }
        if used {
            queues.notify(CONTROL_RX);
        }
    }
}

impl Handler for Ports {
    fn name(&self) -> &'static str {
        "virtio-console"
    }

    fn queue(&mut self, index: usize, queues: &mut Queues, quit: &Quit) {
        match index {
            CONTROL_RX if self.multiport => {}
            CONTROL_TX if self.multiport => {
                queues.serve_all(CONTROL_TX, |memory, chain| {
                    let mut message = [0; 8];
                    if Buffers::new(memory, chain)
                        .is_some_and(|b| b.readable.read(&mut message) == 8)
                    {
                        self.control(message);
                    }
                    0
                });
            }
            // The numbers of the ports' queues have the direction in their last bit.
            tx if tx % 2 == 1 => {
                let index = if tx == 1 { 0 } else { (tx - 3) / 2 };
                let Some(port) = self.ports.get(index) else {
                    return;
                };
                let mut bytes = [0; CHUNK];
                queues.serve_all(tx, |memory, chain| {
                    let Some(Buffers { mut readable, .. }) = Buffers::new(memory, chain) else {
                        return 0;
                    };
                    while readable.len() > 0 && !quit.requested() {
                        let n = readable.read(&mut bytes);
                        port.channel.write_all(&bytes[..n], &|| quit.requested());
                        if n == 0 || readable.split_front(n).is_none() {
                            break;
                        }
                    }
                    0
                });
            }
            // Buffers to receive into: `sources` looks at them.
            _ => {}
        }
        if self.multiport {
            self.send_messages(queues);
        }
    }

    fn sources(&self, queues: &Queues) -> Vec<RawFd> {
        (0..)
            .zip(&self.ports)
            .filter(|(index, port)| {
                port.open && !port.ended && queues.has_buffers(Self::queues_of(*index).0)
            })
            .filter_map(|(_, port)| port.channel.input_fd())
            .collect()
    }

    fn source(&mut self, fd: RawFd, queues: &mut Queues, _: &Quit) {
        let found = self
            .ports
            .iter()
            .position(|port| port.channel.input_fd() == Some(fd));
        let Some(index) = found else { return };
        let (rx, _) = Self::queues_of(index);
        let mut ended = false;
        let served = queues.serve_one(rx, |memory, chain| {
            let Some(buffers) = Buffers::new(memory, chain) else {
                return 0;
            };
            let mut bytes = vec![0; buffers.writable.len().min(CHUNK)];
            match poll::read(fd, &mut bytes) {
                Ok(0) if !bytes.is_empty() => {
                    ended = true;
                    0
                }
                Ok(n) => buffers.writable.write(&bytes[..n]) as u32,
                Err(e) => {
                    ended = !matches!(
                        e.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    );
                    0
                }
            }
        });
        let mut input_only = false;
        if ended && let Some(port) = self.ports.get_mut(index) {
            port.ended = true;
            input_only = port.name.is_some() && port.channel.output.is_none();
        }
        if served {
            queues.notify(rx);
        }
        // A program that reads the port finds its end, as that of a pipe. With an output, the
        // port stays open for it.
        if input_only && self.multiport {
            self.post(index, PORT_OPEN, 0, &[]);
            self.send_messages(queues);
        }
    }
}
