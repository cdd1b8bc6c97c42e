//! One TCP connection of the guest, ended here and continued on a host socket.
//!
//! The link to the guest loses nothing by itself: a frame is lost only when the guest drops it. So there is no
//! congestion control; the guest's window limits what is in flight, and loss is mended by going back to the first
//! unacknowledged byte. Segments beyond a gap are not kept: the guest sends them again.

use std::io::{self, Read};
use std::net::{SocketAddrV4, TcpStream};
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendFlags};
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{IpAddress, TcpControl, TcpPacket, TcpRepr, TcpSeqNumber};

use super::ring::Ring;
use crate::link::{IPV4_HEADER, Link};

pub(super) const TCP_HEADER: usize = 20;
/// Window scale offered to the guest; 16-bit windows then count units of 128 bytes.
const WINDOW_SHIFT: u8 = 7;
/// Segment size that RFC 9293 assumes of a peer that names none.
const DEFAULT_MSS: u16 = 536;
/// Smaller segments than this are not worth their headers, whatever the guest asks for.
const MIN_MSS: u16 = 64;
/// Bytes that one connection may move each way before others have their turn.
const QUANTUM: usize = 256 * 1024;

const RTO_INITIAL: Duration = Duration::from_secs(1);
const RTO_MIN: Duration = Duration::from_millis(200);
const RTO_MAX: Duration = Duration::from_secs(60);
/// Unanswered retransmissions before a connection is given up: several minutes.
const MAX_RETRIES: u32 = 12;
const CONNECT_LIMIT: Duration = Duration::from_secs(180);
const KEEPALIVE_IDLE: Duration = Duration::from_secs(600);
const KEEPALIVE_STEP: Duration = Duration::from_secs(75);
const KEEPALIVE_PROBES: u32 = 9;

/// Whether sequence number `a` is before `b`.
fn before(a: u32, b: u32) -> bool {
    (a.wrapping_sub(b) as i32) < 0
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// The guest has sent SYN; the host socket is not connected yet.
    Connecting,
    /// SYN sent to the guest for a forwarded connection.
    SynSent,
    /// SYN and ACK sent to the guest.
    SynReceived,
    Established,
    Closed,
}

/// What a turn of [`Conn::service`] left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Next {
    /// Nothing to do until an event.
    Idle,
    /// More to do, perhaps when the guest has taken frames.
    Again,
    /// The connection is over.
    Closed,
}

pub(super) struct Conn {
    pub(super) guest: SocketAddrV4,
    pub(super) remote: SocketAddrV4,
    /// Queued for a turn of service.
    pub(super) queued: bool,
    socket: TcpStream,
    state: State,

    host_readable: bool,
    host_writable: bool,
    /// The host's peer sends no more.
    host_eof: bool,
    /// The host's peer has been told that the guest sends no more.
    host_shut: bool,

    // Host to guest. `tx` starts at `snd_una`; the FIN follows its last byte once `host_eof` is set.
    tx: Ring,
    snd_una: u32,
    snd_nxt: u32,
    snd_max: u32,
    snd_wnd: u32,
    snd_shift: u8,
    mss: u16,
    fin_acked: bool,
    duplicate_acks: u32,
    resend_first: bool,
    probe: bool,

    // Guest to host.
    rx: Ring,
    rcv_nxt: u32,
    rcv_shift: u8,
    guest_fin: bool,
    window_edge: u32,
    ack_now: bool,

    timer: Option<Instant>,
    /// The timer is for something that the guest owes, not for keepalive.
    timer_is_rto: bool,
    retries: u32,
    srtt: Option<(Duration, Duration)>,
    timed: Option<(u32, Instant)>,
}

impl Conn {
    fn new(guest: SocketAddrV4, remote: SocketAddrV4, socket: TcpStream, link: &mut Link) -> Self {
        let iss = link.random();
        let buffer = link.config.tcp_buffer;
        Self {
            guest,
            remote,
            queued: false,
            socket,
            state: State::Connecting,
            host_readable: false,
            host_writable: false,
            host_eof: false,
            host_shut: false,
            tx: Ring::new(buffer),
            snd_una: iss,
            snd_nxt: iss,
            snd_max: iss,
            snd_wnd: 0,
            snd_shift: 0,
            mss: DEFAULT_MSS,
            fin_acked: false,
            duplicate_acks: 0,
            resend_first: false,
            probe: false,
            rx: Ring::new(buffer),
            rcv_nxt: 0,
            rcv_shift: 0,
            guest_fin: false,
            window_edge: 0,
            ack_now: false,
            timer: None,
            timer_is_rto: false,
            retries: 0,
            srtt: None,
            timed: None,
        }
    }

    /// A connection that the guest opens with `syn`, over a host socket that is still connecting.
    pub(super) fn from_guest(
        guest: SocketAddrV4,
        remote: SocketAddrV4,
        socket: TcpStream,
        syn: &TcpRepr<'_>,
        link: &mut Link,
    ) -> Self {
        let mut conn = Self::new(guest, remote, socket, link);
        conn.timer = Some(link.now + CONNECT_LIMIT);
        conn.take_syn(syn, link);
        conn
    }

    /// A connection that the host's side opens, over an accepted socket.
    pub(super) fn from_host(
        guest: SocketAddrV4,
        remote: SocketAddrV4,
        socket: TcpStream,
        link: &mut Link,
    ) -> Self {
        let mut conn = Self::new(guest, remote, socket, link);
        conn.state = State::SynSent;
        conn
    }

    pub(super) fn socket(&self) -> &TcpStream {
        &self.socket
    }

    /// Sequence number of the guest's SYN while nothing has followed it.
    pub(super) fn guest_syn(&self) -> u32 {
        self.rcv_nxt.wrapping_sub(1)
    }

    fn take_syn(&mut self, syn: &TcpRepr<'_>, link: &Link) {
        self.rcv_nxt = (syn.seq_number.0 as u32).wrapping_add(1);
        self.window_edge = self.rcv_nxt;
        self.snd_wnd = u32::from(syn.window_len);
        if let Some(shift) = syn.window_scale {
            self.snd_shift = shift.min(14);
            self.rcv_shift = WINDOW_SHIFT;
        }
        let own = (link.config.mtu - IPV4_HEADER - TCP_HEADER) as u16;
        let theirs = syn.max_seg_size.unwrap_or(DEFAULT_MSS).max(MIN_MSS);
        self.mss = theirs.min(own);
    }

    /// The host socket changed. Returns the error if connecting failed.
    pub(super) fn host_event(
        &mut self,
        readable: bool,
        writable: bool,
        failed: bool,
    ) -> Result<(), io::Error> {
        self.host_readable |= readable;
        self.host_writable |= writable;
        if self.state == State::Connecting && (writable || failed) {
            if let Some(error) = self.socket.take_error()? {
                return Err(error);
            }
            // Writable before the connection exists would be a spurious event: only a peer makes it real.
            if self.socket.peer_addr().is_ok() {
                self.state = State::SynReceived;
                self.timer = None;
            }
        }
        Ok(())
    }

    // ---- segments from the guest -------------------------------------------------------------------------------

    /// Takes a segment of this connection.
    pub(super) fn input(&mut self, segment: &TcpRepr<'_>, link: &mut Link) {
        let seq = segment.seq_number.0 as u32;
        let ack = segment.ack_number.map(|ack| ack.0 as u32);
        let rst = segment.control == TcpControl::Rst;
        let syn = segment.control == TcpControl::Syn;
        if self.state == State::Established && self.in_flight() == 0 {
            // Any sign of life answers keepalive probes.
            self.retries = 0;
        }
        match self.state {
            State::Closed => {}
            State::Connecting => {
                if rst {
                    self.close_hard();
                }
            }
            State::SynSent => {
                let expected = self.snd_max;
                match ack {
                    Some(ack) if ack != expected || expected == self.snd_una => {
                        self.refuse_ack(ack, rst, link);
                    }
                    Some(_) if rst => self.close_hard(),
                    Some(ack) if syn => {
                        self.take_syn(segment, link);
                        self.snd_una = ack;
                        self.snd_nxt = ack;
                        self.establish();
                        self.ack_now = true;
                    }
                    _ => {}
                }
            }
            State::SynReceived => {
                if rst {
                    if seq == self.rcv_nxt {
                        self.close_hard();
                    }
                } else if syn {
                    // The guest has not seen our answer yet.
                    if seq.wrapping_add(1) == self.rcv_nxt {
                        self.snd_nxt = self.snd_una;
                    }
                } else if let Some(ack) = ack {
                    if ack != self.snd_una.wrapping_add(1) || ack != self.snd_max {
                        self.send_reset(ack, link);
                        return;
                    }
                    self.snd_una = ack;
                    self.snd_nxt = ack;
                    self.establish();
                    self.established_input(segment, seq, ack, link);
                }
            }
            State::Established => {
                if rst {
                    let offset = seq.wrapping_sub(self.rcv_nxt) as usize;
                    if offset == 0 {
                        self.close_hard();
                    } else if offset < self.rx.free() {
                        self.ack_now = true;
                    }
                } else if syn {
                    // RFC 5961: a guest that has forgotten this connection answers the ACK with a reset.
                    self.ack_now = true;
                } else if let Some(ack) = ack {
                    self.established_input(segment, seq, ack, link);
                }
            }
        }
    }

    fn establish(&mut self) {
        self.state = State::Established;
        self.timer = None;
        self.retries = 0;
    }

    fn established_input(&mut self, segment: &TcpRepr<'_>, seq: u32, ack: u32, link: &Link) {
        self.take_ack(segment, ack, link);
        let payload = segment.payload;
        let fin = segment.control == TcpControl::Fin;
        let offset = self.rcv_nxt.wrapping_sub(seq) as i32;
        if offset < 0 || offset as usize > payload.len() {
            // A gap, an old segment, or a keepalive probe: say what is expected.
            self.ack_now = true;
            return;
        }
        let fresh = &payload[offset as usize..];
        if fresh.is_empty() && !fin {
            self.ack_now |= !payload.is_empty();
            return;
        }
        self.ack_now = true;
        if self.guest_fin {
            return;
        }
        let taken = self.rx.push(fresh);
        self.rcv_nxt = self.rcv_nxt.wrapping_add(taken as u32);
        if fin && taken == fresh.len() {
            self.guest_fin = true;
            self.rcv_nxt = self.rcv_nxt.wrapping_add(1);
        }
    }

    fn take_ack(&mut self, segment: &TcpRepr<'_>, ack: u32, link: &Link) {
        if before(self.snd_max, ack) {
            self.ack_now = true;
            return;
        }
        if before(ack, self.snd_una) {
            return;
        }
        let window = u32::from(segment.window_len) << self.snd_shift;
        let acked = ack.wrapping_sub(self.snd_una) as usize;
        if acked > 0 {
            let data = acked.min(self.tx.len());
            self.tx.consume(data);
            self.fin_acked |= acked > data;
            self.snd_una = ack;
            if before(self.snd_nxt, ack) {
                self.snd_nxt = ack;
            }
            self.duplicate_acks = 0;
            self.retries = 0;
            self.timer = None;
            if let Some((seq, sent)) = self.timed
                && !before(ack, seq)
            {
                self.timed = None;
                self.sample_rtt(link.now.saturating_duration_since(sent));
            }
        } else if segment.payload.is_empty()
            && segment.control == TcpControl::None
            && window == self.snd_wnd
            && self.in_flight() > 0
        {
            self.duplicate_acks += 1;
            if self.duplicate_acks == 3 {
                self.resend_first = true;
            }
        }
        if window == 0 {
            // A guest that answers window probes may keep its window closed as long as it likes.
            self.retries = self.retries.min(MAX_RETRIES / 2);
        } else if self.snd_wnd == 0 {
            // What was lost meanwhile need not wait for the next probe.
            self.timer = None;
            self.retries = 0;
        }
        self.snd_wnd = window;
    }

    fn sample_rtt(&mut self, rtt: Duration) {
        self.srtt = Some(match self.srtt {
            None => (rtt, rtt / 2),
            Some((srtt, var)) => ((srtt * 7 + rtt) / 8, (var * 3 + srtt.abs_diff(rtt)) / 4),
        });
    }

    fn rto(&self) -> Duration {
        let base = self.srtt.map_or(RTO_INITIAL, |(srtt, var)| srtt + var * 4);
        base.clamp(RTO_MIN, RTO_MAX)
            .saturating_mul(1 << self.retries.min(16))
            .min(RTO_MAX)
    }

    fn in_flight(&self) -> u32 {
        self.snd_nxt.wrapping_sub(self.snd_una)
    }

    // ---- service -------------------------------------------------------------------------------------------------

    /// Moves bytes between the host socket and the buffers, and sends the guest what it may be sent.
    pub(super) fn service(&mut self, link: &mut Link) -> Next {
        if self.state == State::Established {
            let moved = self.write_host().and_then(|()| self.read_host());
            match moved {
                Ok(()) => {}
                Err(error) => {
                    log::debug!("connection {} to {}: {error}", self.guest, self.remote);
                    self.abort(link);
                }
            }
        }
        let blocked = self.transmit(link);
        if self.state == State::Established
            && self.fin_acked
            && self.guest_fin
            && self.host_shut
            && !self.ack_now
        {
            self.state = State::Closed;
        }
        if self.state == State::Closed {
            return Next::Closed;
        }
        self.arm_timer(link.now);
        let can_read = self.state == State::Established
            && self.host_readable
            && !self.host_eof
            && self.tx.free() > 0;
        let can_write =
            self.state == State::Established && self.host_writable && !self.rx.is_empty();
        if blocked || can_read || can_write {
            Next::Again
        } else {
            Next::Idle
        }
    }

    fn write_host(&mut self) -> io::Result<()> {
        let mut budget = QUANTUM;
        while self.host_writable && !self.rx.is_empty() && budget > 0 {
            let sent = rustix::net::sendmsg(
                &self.socket,
                &self.rx.io_slices(),
                &mut SendAncillaryBuffer::default(),
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            );
            match sent {
                Ok(n) => {
                    self.rx.consume(n);
                    budget = budget.saturating_sub(n.max(1));
                }
                Err(rustix::io::Errno::AGAIN) => self.host_writable = false,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        if self.guest_fin && self.rx.is_empty() && !self.host_shut {
            self.host_shut = true;
            match self.socket.shutdown(std::net::Shutdown::Write) {
                // The peer has gone altogether; reading tells how.
                Err(error) if error.kind() != io::ErrorKind::NotConnected => return Err(error),
                _ => {}
            }
        }
        // Tell the guest of a window that has become worth using.
        let edge = self.rcv_nxt.wrapping_add(self.window());
        let gain = edge.wrapping_sub(self.window_edge);
        let half = (self.rx.free() + self.rx.len()) / 2;
        let worth = (2 * usize::from(self.mss)).min(half);
        if !self.guest_fin && gain as i32 >= worth as i32 {
            self.ack_now = true;
        }
        Ok(())
    }

    fn read_host(&mut self) -> io::Result<()> {
        let mut budget = QUANTUM;
        while self.host_readable && !self.host_eof && self.tx.free() > 0 && budget > 0 {
            match self.tx.fill(|bufs| (&self.socket).read_vectored(bufs)) {
                Ok(0) => self.host_eof = true,
                Ok(n) => budget = budget.saturating_sub(n),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.host_readable = false;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// The window to offer, in bytes that its field can express.
    fn window(&self) -> u32 {
        let most = usize::from(u16::MAX) << self.rcv_shift;
        ((self.rx.free().min(most) >> self.rcv_shift) << self.rcv_shift) as u32
    }

    /// Sends what is due. Returns whether the queue to the guest stopped it.
    fn transmit(&mut self, link: &mut Link) -> bool {
        match self.state {
            State::Connecting | State::Closed => false,
            State::SynSent | State::SynReceived => {
                if self.snd_nxt != self.snd_una {
                    return false;
                }
                if !link.out.has_room() {
                    return true;
                }
                let acks = self.state == State::SynReceived;
                // An unknown guest address turns this into an ARP request; the timer tries again.
                self.send_syn(acks, link);
                self.snd_nxt = self.snd_una.wrapping_add(1);
                self.snd_max = self.snd_nxt;
                false
            }
            State::Established => self.transmit_stream(link),
        }
    }

    fn transmit_stream(&mut self, link: &mut Link) -> bool {
        let mut budget = QUANTUM;
        loop {
            if !link.out.has_room() {
                return self.ack_now || self.resend_first || self.probe || self.sendable(link) > 0;
            }
            if self.resend_first {
                self.resend_first = false;
                let sent = self.in_flight() as usize;
                let n = self.tx.len().min(usize::from(self.mss)).min(sent);
                let fin = n == self.tx.len() && sent > n;
                self.timed = None;
                self.send_segment(0, n, fin, link);
                continue;
            }
            let offset = self.in_flight() as usize;
            let n = self.sendable(link);
            let fin_due = self.host_eof && !self.fin_acked && offset + n == self.tx.len();
            if (n == 0 && !fin_due) || budget == 0 {
                break;
            }
            self.probe = false;
            let end = self.snd_nxt.wrapping_add(n as u32 + u32::from(fin_due));
            self.send_segment(offset, n, fin_due, link);
            self.snd_nxt = end;
            if before(self.snd_max, end) {
                self.snd_max = end;
                if self.timed.is_none() {
                    self.timed = Some((end, link.now));
                }
            }
            budget = budget.saturating_sub(n.max(1));
        }
        if self.probe {
            self.probe = false;
            // An old sequence number makes the guest answer with its state, its window included.
            let seq = self.snd_una.wrapping_sub(1);
            self.send_control(seq, TcpControl::None, true, link);
        }
        if self.ack_now {
            self.send_control(self.snd_nxt, TcpControl::None, true, link);
        }
        budget == 0
    }

    /// Bytes that the next segment may carry.
    fn sendable(&self, link: &Link) -> usize {
        let offset = self.in_flight() as usize;
        let waiting = self.tx.len().saturating_sub(offset);
        let window = (self.snd_wnd as usize).saturating_sub(offset);
        let mss = usize::from(self.mss);
        let n = waiting.min(window).min(self.max_payload(link));
        // A window that opens by crumbs is left to grow while the guest still owes an acknowledgement.
        if n < mss && n < waiting && offset > 0 {
            return 0;
        }
        n
    }

    fn max_payload(&self, link: &Link) -> usize {
        let mss = usize::from(self.mss);
        if link.config.offloads.tso {
            (usize::from(u16::MAX) - IPV4_HEADER - TCP_HEADER) / mss * mss
        } else {
            mss
        }
    }

    fn repr(&self, seq: u32, control: TcpControl, acks: bool) -> TcpRepr<'static> {
        TcpRepr {
            src_port: self.remote.port(),
            dst_port: self.guest.port(),
            control,
            seq_number: TcpSeqNumber(seq as i32),
            ack_number: acks.then_some(TcpSeqNumber(self.rcv_nxt as i32)),
            window_len: (self.window() >> self.rcv_shift) as u16,
            window_scale: None,
            max_seg_size: None,
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &[],
        }
    }

    fn send_syn(&mut self, acks: bool, link: &mut Link) {
        let mut repr = self.repr(self.snd_una, TcpControl::Syn, acks);
        // The window of a SYN is never scaled.
        repr.window_len = self.rx.free().min(usize::from(u16::MAX)) as u16;
        if !acks || self.rcv_shift != 0 {
            repr.window_scale = Some(WINDOW_SHIFT);
        }
        repr.max_seg_size = Some((link.config.mtu - IPV4_HEADER - TCP_HEADER) as u16);
        self.window_edge = self.rcv_nxt.wrapping_add(u32::from(repr.window_len));
        emit(link, self.remote, self.guest, &repr);
        self.ack_now = false;
    }

    fn send_control(&mut self, seq: u32, control: TcpControl, acks: bool, link: &mut Link) {
        let repr = self.repr(seq, control, acks);
        if emit(link, self.remote, self.guest, &repr) && acks {
            self.acknowledged();
        }
    }

    fn acknowledged(&mut self) {
        self.ack_now = false;
        self.window_edge = self.rcv_nxt.wrapping_add(self.window());
    }

    /// Sends `n` bytes from `offset` of the send buffer, and the FIN with them if asked.
    fn send_segment(&mut self, offset: usize, n: usize, fin: bool, link: &mut Link) {
        let control = if fin {
            TcpControl::Fin
        } else if offset + n == self.tx.len() {
            TcpControl::Psh
        } else {
            TcpControl::None
        };
        let repr = self.repr(self.snd_una.wrapping_add(offset as u32), control, true);
        let gso = (n > usize::from(self.mss)).then_some((self.mss, TCP_HEADER));
        let (a, b) = self.tx.pieces(offset, n);
        let (src, dst) = (self.remote, self.guest);
        let sent = link.send_tcp(*src.ip(), *dst.ip(), TCP_HEADER + n, gso, |segment| {
            let (header, payload) = segment.split_at_mut(TCP_HEADER);
            emit_header(header, src, dst, &repr);
            payload[..a.len()].copy_from_slice(a);
            payload[a.len()..].copy_from_slice(b);
        });
        if sent {
            self.acknowledged();
        }
    }

    /// Answers an acknowledgement of something never sent, unless it comes with a reset itself.
    fn refuse_ack(&self, ack: u32, rst: bool, link: &mut Link) {
        if !rst {
            self.send_reset(ack, link);
        }
    }

    fn send_reset(&self, seq: u32, link: &mut Link) {
        let repr = self.repr(seq, TcpControl::Rst, false);
        emit(link, self.remote, self.guest, &repr);
    }

    // ---- ends ----------------------------------------------------------------------------------------------------

    /// Ends the connection on both sides with resets.
    pub(super) fn abort(&mut self, link: &mut Link) {
        if self.state == State::Closed {
            return;
        }
        match self.state {
            // In answer to the SYN, so it needs the ACK to be believed.
            State::Connecting => {
                let mut repr = self.repr(0, TcpControl::Rst, true);
                repr.window_len = 0;
                emit(link, self.remote, self.guest, &repr);
            }
            _ => self.send_control(self.snd_nxt, TcpControl::Rst, true, link),
        }
        self.close_hard();
    }

    /// Forgets the connection and resets the host's side.
    fn close_hard(&mut self) {
        // Best effort: without it the peer sees an orderly end.
        let _ = rustix::net::sockopt::set_socket_linger(&self.socket, Some(Duration::ZERO));
        self.state = State::Closed;
    }

    // ---- time ----------------------------------------------------------------------------------------------------

    pub(super) fn timer(&self) -> Option<Instant> {
        self.timer
    }

    fn arm_timer(&mut self, now: Instant) {
        let owed = match self.state {
            State::Connecting | State::Closed => return,
            State::SynSent | State::SynReceived => true,
            State::Established => self.awaits_guest(),
        };
        if owed {
            if self.timer.is_none() || !self.timer_is_rto {
                self.timer = Some(now + self.rto());
            }
        } else if self.retries > 0 {
            self.timer = Some(now + KEEPALIVE_STEP);
        } else {
            self.timer = Some(now + KEEPALIVE_IDLE);
        }
        self.timer_is_rto = owed;
    }

    /// Whether the guest owes an acknowledgement or a window.
    fn awaits_guest(&self) -> bool {
        self.in_flight() > 0 || (!self.tx.is_empty() && self.snd_wnd == 0)
    }

    /// The timer has run out.
    pub(super) fn timeout(&mut self, link: &mut Link) {
        self.timer = None;
        if !link.out.has_room() {
            // A guest that takes no frames is stopped, not lost.
            self.timer = Some(link.now + RTO_MIN);
            self.timer_is_rto = true;
            return;
        }
        self.retries += 1;
        self.timed = None;
        match self.state {
            State::Closed => {}
            State::Connecting => self.abort(link),
            _ if self.awaits_guest() || self.state != State::Established => {
                if self.retries > MAX_RETRIES {
                    self.abort(link);
                    return;
                }
                self.snd_nxt = self.snd_una;
                self.probe = self.state == State::Established && self.snd_wnd == 0;
            }
            _ => {
                self.rx.shrink();
                self.tx.shrink();
                if self.retries > KEEPALIVE_PROBES {
                    self.abort(link);
                    return;
                }
                self.probe = true;
            }
        }
    }
}

/// Sends a segment without payload.
pub(super) fn emit(
    link: &mut Link,
    src: SocketAddrV4,
    dst: SocketAddrV4,
    repr: &TcpRepr<'_>,
) -> bool {
    link.send_tcp(*src.ip(), *dst.ip(), repr.header_len(), None, |segment| {
        emit_header(segment, src, dst, repr);
    })
}

fn emit_header(header: &mut [u8], src: SocketAddrV4, dst: SocketAddrV4, repr: &TcpRepr<'_>) {
    repr.emit(
        &mut TcpPacket::new_unchecked(header),
        &IpAddress::Ipv4(*src.ip()),
        &IpAddress::Ipv4(*dst.ip()),
        &ChecksumCapabilities::ignored(),
    );
}

#[cfg(test)]
#[path = "conn_tests.rs"]
mod tests;
