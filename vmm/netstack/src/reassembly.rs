//! Reassembly of IPv4 fragments from the guest, for datagrams larger than the MTU.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use smoltcp::wire::Ipv4Packet;

use crate::link::IPV4_HEADER;

const MAX_DATAGRAMS: usize = 16;
const MAX_FRAGMENTS: usize = 128;
const MAX_PAYLOAD: usize = 65535 - IPV4_HEADER;
const LIFETIME: Duration = Duration::from_secs(15);

#[derive(Clone, Copy, PartialEq, Eq)]
struct Id {
    src: Ipv4Addr,
    dst: Ipv4Addr,
    protocol: u8,
    ident: u16,
}

struct Datagram {
    id: Id,
    data: Vec<u8>,
    /// Start and end of each fragment; none overlap.
    pieces: Vec<(usize, usize)>,
    have: usize,
    total: Option<usize>,
    began: Instant,
}

#[derive(Default)]
pub(crate) struct Reassembly {
    datagrams: Vec<Datagram>,
}

impl Reassembly {
    /// Adds a fragment. Returns the payload of the datagram that it completes.
    ///
    /// Fragments that overlap or contradict each other spoil their datagram, since nobody sends such by accident.
    pub(crate) fn add(&mut self, packet: &Ipv4Packet<&[u8]>, now: Instant) -> Option<Vec<u8>> {
        let id = Id {
            src: packet.src_addr(),
            dst: packet.dst_addr(),
            protocol: packet.next_header().into(),
            ident: packet.ident(),
        };
        self.datagrams
            .retain(|d| now.saturating_duration_since(d.began) < LIFETIME);
        let index = match self.datagrams.iter().position(|d| d.id == id) {
            Some(index) => index,
            None => {
                if self.datagrams.len() >= MAX_DATAGRAMS {
                    self.datagrams.remove(0);
                }
                self.datagrams.push(Datagram {
                    id,
                    data: Vec::new(),
                    pieces: Vec::new(),
                    have: 0,
                    total: None,
                    began: now,
                });
                self.datagrams.len() - 1
            }
        };
        let start = usize::from(packet.frag_offset());
        match self.datagrams[index].insert(start, packet.payload(), packet.more_frags()) {
            Ok(false) => None,
            Ok(true) => Some(self.datagrams.remove(index).data),
            Err(Spoiled) => {
                self.datagrams.remove(index);
                None
            }
        }
    }
}

struct Spoiled;

impl Datagram {
    /// Returns whether the datagram is complete.
    fn insert(&mut self, start: usize, payload: &[u8], more: bool) -> Result<bool, Spoiled> {
        let end = start + payload.len();
        let overlaps = self.pieces.iter().any(|&(s, e)| start < e && s < end);
        let beyond = self.total.is_some_and(|total| end > total);
        if payload.is_empty()
            || end > MAX_PAYLOAD
            || self.pieces.len() >= MAX_FRAGMENTS
            || overlaps
            || beyond
        {
            return Err(Spoiled);
        }
        if !more {
            if self.total.is_some() || self.data.len() > end {
                return Err(Spoiled);
            }
            self.total = Some(end);
        }
        if self.data.len() < end {
            self.data.resize(end, 0);
        }
        self.data[start..end].copy_from_slice(payload);
        self.pieces.push((start, end));
        self.have += payload.len();
        Ok(self.total == Some(self.have))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fragment(ident: u16, offset: usize, more: bool, payload: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 20 + payload.len()];
        let mut packet = Ipv4Packet::new_unchecked(&mut bytes[..]);
        packet.set_version(4);
        packet.set_header_len(20);
        packet.set_total_len(20 + payload.len() as u16);
        packet.set_ident(ident);
        packet.clear_flags();
        packet.set_more_frags(more);
        packet.set_frag_offset(offset as u16);
        packet.payload_mut().copy_from_slice(payload);
        bytes
    }

    fn add(reassembly: &mut Reassembly, bytes: &[u8]) -> Option<Vec<u8>> {
        reassembly.add(&Ipv4Packet::new_checked(bytes).unwrap(), Instant::now())
    }

    #[test]
    fn puts_fragments_together_in_any_order() {
        let mut reassembly = Reassembly::default();
        assert_eq!(add(&mut reassembly, &fragment(1, 16, false, b"end")), None);
        assert_eq!(
            add(&mut reassembly, &fragment(1, 0, true, b"01234567")),
            None
        );
        assert_eq!(
            add(&mut reassembly, &fragment(1, 8, true, b"89abcdef")),
            Some(b"0123456789abcdefend".to_vec())
        );
        assert!(reassembly.datagrams.is_empty());
    }

    #[test]
    fn drops_overlaps_and_stays_bounded() {
        let mut reassembly = Reassembly::default();
        add(&mut reassembly, &fragment(1, 0, true, &[0; 16]));
        add(&mut reassembly, &fragment(1, 8, true, &[0; 16]));
        assert!(reassembly.datagrams.is_empty());
        for ident in 0..1000 {
            add(&mut reassembly, &fragment(ident, 65528, true, &[0; 64]));
            add(&mut reassembly, &fragment(ident, 800, true, &[0; 64]));
        }
        assert_eq!(reassembly.datagrams.len(), MAX_DATAGRAMS);
    }
}
