//! Ethernet frames, what their sender left to be done, and the bounded queue of frames to the guest.

use std::collections::VecDeque;

/// Work on a frame that its sender left to the receiver, in the terms of the virtio-net header.
///
/// The default is a frame with nothing left to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offload {
    /// The checksum field holds only the pseudo-header sum; the rest is still to be added
    /// (`VIRTIO_NET_HDR_F_NEEDS_CSUM`).
    pub checksum: Option<PartialChecksum>,
    /// Payload bytes per segment when the frame holds more than one TCP segment
    /// (`VIRTIO_NET_HDR_GSO_TCPV4`); 0 for an ordinary frame.
    pub gso_size: u16,
    /// Bytes of Ethernet, IPv4 and TCP headers when `gso_size` is not 0.
    pub header_len: u16,
}

/// Where an unfinished checksum is, in bytes: see [`Offload::checksum`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PartialChecksum {
    /// Offset in the frame from which the checksum covers everything.
    pub start: u16,
    /// Offset of the checksum field from `start`.
    pub offset: u16,
}

/// One Ethernet frame without preamble and check sequence.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Frame {
    /// The bytes, from the destination address on.
    pub data: Vec<u8>,
    /// What the receiver has to finish.
    pub offload: Offload,
}

/// Frames on their way to the guest.
///
/// Two marks bound it: TCP stops at the lower one and goes on when the guest has taken frames; everything else
/// may fill up to the upper one and is then dropped, as on a real link.
pub(crate) struct Outbox {
    queue: VecDeque<Frame>,
    spare: Vec<Vec<u8>>,
}

const STREAM_MARK: usize = 128;
const HARD_MARK: usize = 512;

impl Outbox {
    pub(crate) fn new() -> Self {
        Self {
            queue: VecDeque::new(),
            spare: Vec::new(),
        }
    }

    /// Whether a sender that can wait may add a frame.
    pub(crate) fn has_room(&self) -> bool {
        self.queue.len() < STREAM_MARK
    }

    /// A zeroed buffer of `len` bytes for a frame, or `None` if the queue is full.
    pub(crate) fn buffer(&mut self, len: usize) -> Option<Vec<u8>> {
        if self.queue.len() >= HARD_MARK {
            return None;
        }
        let mut data = self.spare.pop().unwrap_or_default();
        data.clear();
        data.resize(len, 0);
        Some(data)
    }

    pub(crate) fn push(&mut self, frame: Frame) {
        self.queue.push_back(frame);
    }

    pub(crate) fn front(&self) -> Option<&Frame> {
        self.queue.front()
    }

    /// Drops the front frame, keeping its buffer for another one.
    pub(crate) fn consume(&mut self) {
        if let Some(frame) = self.queue.pop_front() {
            self.recycle(frame.data);
        }
    }

    /// Takes the front frame.
    pub(crate) fn pop(&mut self) -> Option<Frame> {
        self.queue.pop_front()
    }

    /// Keeps a buffer for another frame.
    pub(crate) fn recycle(&mut self, data: Vec<u8>) {
        if self.spare.len() < STREAM_MARK {
            self.spare.push(data);
        }
    }
}
