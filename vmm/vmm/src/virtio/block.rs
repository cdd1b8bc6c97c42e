//! Block device. See "Block Device" in the specification.

use std::io;

use super::disk::{DiskImage, SECTOR};
use super::guest_io::{Buffers, Span};
use super::worker::{Handler, Quit, Worker};
use super::{Activation, Queues, RING_FEATURES, VirtioDevice, read_config_bytes};

const F_SEG_MAX: u64 = 1 << 2;
const F_RO: u64 = 1 << 5;
const F_BLK_SIZE: u64 = 1 << 6;
const F_FLUSH: u64 = 1 << 9;
const F_DISCARD: u64 = 1 << 13;
const F_WRITE_ZEROES: u64 = 1 << 14;

const T_IN: u32 = 0;
const T_OUT: u32 = 1;
const T_FLUSH: u32 = 4;
const T_GET_ID: u32 = 8;
const T_DISCARD: u32 = 11;
const T_WRITE_ZEROES: u32 = 13;

const S_OK: u8 = 0;
const S_IOERR: u8 = 1;
const S_UNSUPP: u8 = 2;

const QUEUE_SIZE: u16 = 256;
/// Data buffers per request, besides header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Most sectors per discard or write-zeroes range: 1 GiB.
const MAX_RANGE: u32 = 1 << 21;
/// Ranges per discard request; one per write-zeroes request.
const MAX_RANGES: u32 = 16;
const HEADER: usize = 16;
const ID_LEN: usize = 20;

/// The device.
pub struct Block {
    worker: Worker<Server>,
    config: [u8; 60],
    read_only: bool,
}

impl Block {
    /// A disk with the content of `image`, which names itself `serial`.
    #[must_use]
    pub fn new(image: DiskImage, serial: &str) -> Self {
        let mut config = [0; 60];
        let mut put = |at: usize, value: &[u8]| config[at..at + value.len()].copy_from_slice(value);
        put(0, &(image.size() / SECTOR).to_le_bytes());
        put(12, &SEG_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(34, &1u16.to_le_bytes());
        put(36, &MAX_RANGE.to_le_bytes());
        put(40, &MAX_RANGES.to_le_bytes());
        put(44, &1u32.to_le_bytes());
        put(48, &MAX_RANGE.to_le_bytes());
        put(52, &1u32.to_le_bytes());
        put(56, &[1]);
        let read_only = image.read_only();
        let mut id = [0; ID_LEN];
        for (to, from) in id.iter_mut().zip(serial.bytes()) {
            *to = from;
        }
        Self {
            worker: Worker::new(Server { image, id }),
            config,
            read_only,
        }
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u16 {
        2
    }

    fn pci_class(&self) -> u32 {
        0x01_8000
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let writable = if self.read_only {
            F_RO
        } else {
            F_DISCARD | F_WRITE_ZEROES
        };
        RING_FEATURES | F_SEG_MAX | F_BLK_SIZE | F_FLUSH | writable
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

struct Server {
    image: DiskImage,
    id: [u8; ID_LEN],
}

impl Handler for Server {
    fn name(&self) -> &'static str {
        "virtio-blk"
    }

    fn queue(&mut self, index: usize, queues: &mut Queues, _: &Quit) {
        // A driver that does not know how to flush expects every write to last.
        let write_through = queues.features & F_FLUSH == 0;
        queues.serve_all(index, |memory, chain| {
            Buffers::new(memory, chain)
                .and_then(|buffers| self.serve(buffers, write_through))
                .unwrap_or(0)
        });
    }
}

impl Server {
    /// Serves a request; returns the bytes written to guest memory, or `None` if the request
    /// is no request.
    fn serve(&mut self, buffers: Buffers<'_>, write_through: bool) -> Option<u32> {
        let Buffers {
            mut readable,
            mut writable,
        } = buffers;
        let header_span = readable.split_front(HEADER)?;
        let mut header = [0; HEADER];
        header_span.read(&mut header);
        let (kind, sector) = header.split_at(8);
        let kind = u32::from_le_bytes(kind[..4].try_into().ok()?);
        let sector = u64::from_le_bytes(sector.try_into().ok()?);
        // The status is the last byte that the device writes.
        let data_len = writable.len().checked_sub(1)?;
        let data = writable.split_front(data_len)?;
        let result = self.execute(kind, sector, &readable, &data, write_through);
        let (status, written) = match result {
            Ok(written) => (S_OK, written),
            Err(e) if e.kind() == io::ErrorKind::Unsupported => (S_UNSUPP, 0),
            Err(e) => {
                log::warn!("disk request {kind} at sector {sector}: {e}");
                (S_IOERR, 0)
            }
        };
        writable.write(&[status]);
        u32::try_from(written + 1).ok()
    }

    fn execute(
        &mut self,
        kind: u32,
        sector: u64,
        input: &Span<'_>,
        output: &Span<'_>,
        write_through: bool,
    ) -> io::Result<usize> {
        let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
        let offset = sector.checked_mul(SECTOR).ok_or_else(invalid)?;
        match kind {
            T_IN => {
                self.image.read_at(output.slices(), offset)?;
                Ok(output.len())
            }
            T_OUT => {
                self.image.write_at(input.slices(), offset)?;
                if write_through {
                    self.image.flush()?;
                }
                Ok(0)
            }
            T_FLUSH => self.image.flush().map(|()| 0),
            T_GET_ID => Ok(output.write(&self.id)),
            T_DISCARD | T_WRITE_ZEROES => {
                let max = if kind == T_DISCARD {
                    MAX_RANGES as usize
                } else {
                    1
                };
                let mut ranges = vec![0; max * 16 + 1];
                let len = input.read(&mut ranges);
                if len == 0 || len > max * 16 || !len.is_multiple_of(16) {
                    return Err(invalid());
                }
                for range in ranges[..len].chunks_exact(16) {
                    let (start, rest) = range.split_at(8);
                    let start = u64::from_le_bytes(start.try_into().map_err(io::Error::other)?);
                    let count = u32::from_le_bytes([rest[0], rest[1], rest[2], rest[3]]);
                    let offset = start.checked_mul(SECTOR).ok_or_else(invalid)?;
                    if count > MAX_RANGE {
                        return Err(invalid());
                    }
                    let len = u64::from(count) * SECTOR;
                    if kind == T_DISCARD {
                        self.image.discard(offset, len)?;
                    } else {
                        self.image.write_zeroes(offset, len)?;
                    }
                }
                if write_through {
                    self.image.flush()?;
                }
                Ok(0)
            }
            _ => Err(io::ErrorKind::Unsupported.into()),
        }
    }
}
