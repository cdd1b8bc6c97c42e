//! Timers of a connection, with time made by hand.

use std::net::{TcpListener, TcpStream};

use smoltcp::wire::EthernetAddress;

use super::*;
use crate::config::Config;
use crate::poller::Poller;

struct Bench {
    link: Link,
    conn: Conn,
    peer: TcpStream,
}

fn bench() -> Bench {
    let mut link = Link::new(Config::default(), Poller::new().unwrap());
    let guest = SocketAddrV4::new(link.config.guest_ip, 80);
    let remote = SocketAddrV4::new(link.config.gateway_ip, 4000);
    link.learn(*guest.ip(), EthernetAddress([2, 0, 0, 0, 0, 1]));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let socket = listener.accept().unwrap().0;
    socket.set_nonblocking(true).unwrap();
    let conn = Conn::from_host(guest, remote, socket, &mut link);
    Bench { link, conn, peer }
}

impl Bench {
    /// Serves the connection and takes the TCP segments it sent: sequence number, flags and payload length.
    fn serve(&mut self) -> (Next, Vec<(u32, u8, usize)>) {
        let next = self.conn.service(&mut self.link);
        let mut segments = Vec::new();
        while let Some(frame) = self.link.out.pop() {
            let packet = TcpPacket::new_checked(&frame.data[34..]).unwrap();
            let payload = packet.payload().len();
            segments.push((packet.seq_number().0 as u32, frame.data[47], payload));
        }
        (next, segments)
    }

    /// Lets the timer run out.
    fn expire(&mut self) {
        self.link.now = self.conn.timer().expect("no timer");
        self.conn.timeout(&mut self.link);
    }

    fn input(&mut self, control: TcpControl, seq: u32, ack: u32, window: u16) {
        let segment = TcpRepr {
            src_port: 80,
            dst_port: 4000,
            control,
            seq_number: TcpSeqNumber(seq as i32),
            ack_number: Some(TcpSeqNumber(ack as i32)),
            window_len: window,
            window_scale: None,
            max_seg_size: Some(1460),
            sack_permitted: false,
            sack_ranges: [None; 3],
            timestamp: None,
            payload: &[],
        };
        self.conn.input(&segment, &mut self.link);
    }

    /// Completes the handshake and returns the next sequence number towards the guest. The guest's next is 101.
    fn establish(&mut self) -> u32 {
        let (_, segments) = self.serve();
        let next = segments[0].0.wrapping_add(1);
        self.input(TcpControl::Syn, 100, next, 1000);
        let (_, segments) = self.serve();
        assert_eq!(segments, [(next, 0x10, 0)]);
        next
    }
}

#[test]
fn an_unanswered_syn_is_repeated_and_given_up() {
    let mut bench = bench();
    let mut sent = 0;
    let start = bench.link.now;
    loop {
        let (next, segments) = bench.serve();
        if next == Next::Closed {
            break;
        }
        assert_eq!(segments.len(), 1);
        assert_eq!(segments[0].1, 0x02);
        sent += 1;
        bench.expire();
    }
    assert_eq!(sent, MAX_RETRIES + 1);
    let taken = bench.link.now - start;
    assert!(taken > Duration::from_secs(120) && taken < Duration::from_secs(900));
}

#[test]
fn unacknowledged_data_is_repeated() {
    use std::io::Write;
    let mut bench = bench();
    let seq = bench.establish();
    bench.peer.write_all(&[7; 1460]).unwrap();
    bench.conn.host_event(true, true, false).unwrap();
    // The window of 1000 bytes limits the segment.
    let (_, segments) = bench.serve();
    assert_eq!(segments, [(seq, 0x10, 1000)]);
    bench.expire();
    let (_, segments) = bench.serve();
    assert_eq!(segments, [(seq, 0x10, 1000)]);
    // Three duplicates bring the segment back before its time.
    for _ in 0..3 {
        bench.input(TcpControl::None, 101, seq, 1000);
    }
    let (_, segments) = bench.serve();
    assert_eq!(segments, [(seq, 0x10, 1000)]);
    bench.input(TcpControl::None, 101, seq.wrapping_add(1000), 1000);
    let (_, segments) = bench.serve();
    assert_eq!(segments, [(seq.wrapping_add(1000), 0x18, 460)]);
}

#[test]
fn a_closed_window_is_probed_for_as_long_as_the_guest_answers() {
    use std::io::Write;
    let mut bench = bench();
    let seq = bench.establish();
    bench.input(TcpControl::None, 101, seq, 0);
    bench.peer.write_all(&[7; 100]).unwrap();
    bench.conn.host_event(true, true, false).unwrap();
    assert_eq!(bench.serve().1, []);
    for _ in 0..3 * MAX_RETRIES {
        bench.expire();
        let (next, segments) = bench.serve();
        assert_ne!(next, Next::Closed);
        assert_eq!(segments, [(seq.wrapping_sub(1), 0x10, 0)]);
        bench.input(TcpControl::None, 101, seq, 0);
    }
    bench.input(TcpControl::None, 101, seq, 1000);
    assert_eq!(bench.serve().1, [(seq, 0x18, 100)]);
}

#[test]
fn a_silent_guest_loses_an_idle_connection() {
    let mut bench = bench();
    let seq = bench.establish();
    let mut probes = 0;
    loop {
        bench.expire();
        let (next, segments) = bench.serve();
        if next == Next::Closed {
            assert_eq!(segments.last().map(|s| s.1), Some(0x14));
            break;
        }
        assert_eq!(segments, [(seq.wrapping_sub(1), 0x10, 0)]);
        probes += 1;
        if probes == 5 {
            // An answer starts the count again.
            bench.input(TcpControl::None, 101, seq, 1000);
            bench.serve();
        }
    }
    assert_eq!(probes, 5 + KEEPALIVE_PROBES);
}

#[test]
fn a_guest_that_takes_no_frames_is_not_given_up() {
    let mut bench = bench();
    bench.establish();
    while bench.link.out.has_room() {
        let gateway = bench.link.config.gateway_ip;
        bench.link.send_arp_request(gateway);
    }
    for _ in 0..1000 {
        bench.expire();
        assert_ne!(bench.conn.service(&mut bench.link), Next::Closed);
    }
}
