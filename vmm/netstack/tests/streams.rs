//! TCP between a guest and servers on the host's loopback, and the other way round.

mod guest;

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddrV4, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use guest::{GATEWAY, Guest};
use netstack::{Config, Forward, GuestOffloads};
use smoltcp::socket::tcp;

/// Runs `serve` on the next connection and returns the address for the guest.
fn server<T: Send + 'static>(
    serve: impl FnOnce(TcpStream) -> T + Send + 'static,
) -> (SocketAddrV4, std::thread::JoinHandle<T>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let thread = std::thread::spawn(move || serve(listener.accept().unwrap().0));
    (SocketAddrV4::new(GATEWAY, port), thread)
}

fn echo(stream: TcpStream) -> usize {
    let mut buffer = vec![0; 65536];
    let mut total = 0;
    loop {
        let n = (&stream).read(&mut buffer).unwrap();
        if n == 0 {
            return total;
        }
        total += n;
        (&stream).write_all(&buffer[..n]).unwrap();
    }
}

fn closed_without_trace(guest: &mut Guest) {
    guest.run_until("the connection to be forgotten", |guest| {
        (guest.stack().flow_counts().0 == 0).then_some(())
    });
}

#[test]
fn echo_and_orderly_close() {
    let (addr, thread) = server(echo);
    let mut guest = Guest::new(guest::config());
    let handle = guest.tcp_connect(addr);
    let data = guest::pattern(100_000);
    let received = guest.exchange(handle, &data, true);
    assert!(received == data);
    assert_eq!(thread.join().unwrap(), data.len());
    closed_without_trace(&mut guest);
}

fn transfer(mut guest: Guest, len: usize, label: &str) -> Guest {
    let data = guest::pattern(len);
    let start = Instant::now();
    let (addr, thread) = server(move |mut stream| {
        let mut received = Vec::with_capacity(len);
        stream.read_to_end(&mut received).unwrap();
        received
    });
    let handle = guest.tcp_connect(addr);
    assert!(guest.exchange(handle, &data, true).is_empty());
    assert!(thread.join().unwrap() == data, "upload differs");
    let up = start.elapsed();

    let copy = data.clone();
    let start = Instant::now();
    let (addr, thread) = server(move |mut stream| {
        stream.write_all(&copy).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(stream.read(&mut [0; 16]).unwrap(), 0);
    });
    let handle = guest.tcp_connect(addr);
    let received = guest.exchange(handle, &[], false);
    assert!(received == data, "download differs");
    guest.tcp(handle).close();
    let down = start.elapsed();
    guest.run_for(Duration::from_millis(50));
    thread.join().unwrap();
    let rate = |time: Duration| len as f64 / time.as_secs_f64() / 1e6;
    println!(
        "{label}: to host {:.0} MB/s, to guest {:.0} MB/s",
        rate(up),
        rate(down)
    );
    guest
}

const LARGE: usize = 64 << 20;

#[test]
fn large_transfers_arrive_whole() {
    let mut guest = transfer(Guest::new(guest::config()), LARGE, "MTU 1500");
    closed_without_trace(&mut guest);
    assert!(guest.wire.largest <= 1514);
}

#[test]
fn large_transfers_cross_the_driver_thread() {
    transfer(Guest::threaded(guest::config()), LARGE, "thread, MTU 1500");
}

#[test]
fn segmentation_offload_sends_big_frames() {
    let config = Config {
        offloads: GuestOffloads {
            checksum: true,
            tso: true,
        },
        ..guest::config()
    };
    let guest = transfer(Guest::threaded(config), LARGE, "thread, TSO");
    assert!(guest.wire.largest > 30_000, "{}", guest.wire.largest);
}

#[test]
fn a_large_mtu_is_used() {
    let config = Config {
        mtu: 65520,
        ..guest::config()
    };
    let guest = transfer(Guest::threaded(config), LARGE, "thread, MTU 65520");
    assert!(guest.wire.largest > 30_000);
}

#[test]
fn frames_that_the_guest_drops_are_sent_again() {
    let mut guest = Guest::new(guest::config());
    guest.wire.lose_every = (97, 0);
    transfer(guest, 2 << 20, "every 97th frame to the guest lost");
}

#[test]
fn frames_that_the_guest_must_send_again_are_taken() {
    let mut guest = Guest::new(guest::config());
    guest.wire.lose_every = (0, 50);
    transfer(guest, 100_000, "every 50th frame of the guest lost");
}

#[test]
fn refused_connections_are_reset() {
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    };
    let mut guest = Guest::new(guest::config());
    let start = Instant::now();
    let handle = guest.tcp_connect(SocketAddrV4::new(GATEWAY, port));
    guest.run_until("the reset", |guest| {
        (guest.tcp(handle).state() == tcp::State::Closed).then_some(())
    });
    assert!(start.elapsed() < Duration::from_secs(2));
    closed_without_trace(&mut guest);
}

#[test]
fn forbidden_destinations_are_refused() {
    let config = Config {
        host_loopback: false,
        ..guest::config()
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut guest = Guest::new(config);
    for ip in [GATEWAY, [127, 0, 0, 1].into(), [10, 0, 2, 99].into()] {
        // smoltcp would look for hosts of its own network by ARP: only the others get as far as a reset.
        if ip.octets() == [10, 0, 2, 99] {
            continue;
        }
        let handle = guest.tcp_connect(SocketAddrV4::new(ip, port));
        guest.run_until("the reset", |guest| {
            (guest.tcp(handle).state() == tcp::State::Closed).then_some(())
        });
    }
    listener.set_nonblocking(true).unwrap();
    assert!(listener.accept().is_err());
}

#[test]
fn the_guest_may_close_its_half_first() {
    let (addr, thread) = server(|mut stream| {
        let mut request = String::new();
        stream.read_to_string(&mut request).unwrap();
        // The guest has closed its half; answer at leisure.
        std::thread::sleep(Duration::from_millis(50));
        stream.write_all(request.to_uppercase().as_bytes()).unwrap();
    });
    let mut guest = Guest::new(guest::config());
    let handle = guest.tcp_connect(addr);
    assert_eq!(guest.exchange(handle, b"request", true), b"REQUEST");
    thread.join().unwrap();
    closed_without_trace(&mut guest);
}

#[test]
fn the_host_may_close_its_half_first() {
    let (addr, thread) = server(|mut stream| {
        stream.write_all(b"hello").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        rest
    });
    let mut guest = Guest::new(guest::config());
    let handle = guest.tcp_connect(addr);
    assert_eq!(guest.exchange(handle, &[], false), b"hello");
    assert_eq!(guest.tcp(handle).state(), tcp::State::CloseWait);
    let data = guest::pattern(300_000);
    let mut sent = 0;
    guest.run_until("all data to be taken", |guest| {
        let socket = guest.tcp(handle);
        if socket.can_send() {
            sent += socket.send_slice(&data[sent..]).unwrap();
        }
        (sent == data.len()).then_some(())
    });
    guest.tcp(handle).close();
    closed_without_trace(&mut guest);
    assert!(thread.join().unwrap() == data);
}

#[test]
fn a_reset_by_the_host_reaches_the_guest() {
    let (addr, thread) = server(|stream| {
        // Closing with unread data resets the connection.
        std::thread::sleep(Duration::from_millis(100));
        drop(stream);
    });
    let mut guest = Guest::new(guest::config());
    let handle = guest.tcp_connect(addr);
    guest.run_until("the connection", |guest| {
        guest.tcp(handle).can_send().then_some(())
    });
    guest.tcp(handle).send_slice(b"unread").unwrap();
    guest.run_until("the reset", |guest| {
        (guest.tcp(handle).state() == tcp::State::Closed).then_some(())
    });
    thread.join().unwrap();
    closed_without_trace(&mut guest);
}

#[test]
fn a_reset_by_the_guest_reaches_the_host() {
    let (addr, thread) = server(|mut stream| stream.read(&mut [0; 16]));
    let mut guest = Guest::new(guest::config());
    let handle = guest.tcp_connect(addr);
    guest.run_until("the connection", |guest| {
        guest.tcp(handle).can_send().then_some(())
    });
    guest.tcp(handle).abort();
    closed_without_trace(&mut guest);
    let error = thread.join().unwrap().unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[test]
fn a_slow_host_closes_the_window_and_opens_it_again() {
    let data = guest::pattern(8 << 20);
    let (addr, thread) = server(|mut stream| {
        std::thread::sleep(Duration::from_millis(500));
        let mut received = Vec::new();
        stream.read_to_end(&mut received).unwrap();
        received
    });
    let mut guest = Guest::new(guest::config());
    let handle = guest.tcp_connect(addr);
    guest.exchange(handle, &data, true);
    assert!(thread.join().unwrap() == data);
}

#[test]
fn a_slow_guest_closes_its_window_and_opens_it_again() {
    let data = guest::pattern(8 << 20);
    let copy = data.clone();
    let (addr, thread) = server(move |mut stream| stream.write_all(&copy).unwrap());
    let mut guest = Guest::new(guest::config());
    let handle = guest.tcp_connect(addr);
    // The guest takes frames but its program does not read: long enough for a window probe.
    guest.run_for(Duration::from_millis(1500));
    let received = guest.exchange(handle, &[], false);
    assert!(received == data);
    guest.tcp(handle).close();
    thread.join().unwrap();
    closed_without_trace(&mut guest);
}

#[test]
fn forwards_lead_to_the_guest() {
    let config = Config {
        forwards: vec!["0:80".parse::<Forward>().unwrap()],
        ..guest::config()
    };
    let mut guest = Guest::new(config);
    let addr = guest.stack().forwards()[0].1;
    let handle = guest.tcp_socket();
    guest.tcp(handle).listen(80).unwrap();
    let data = guest::pattern(1 << 20);
    let copy = data.clone();
    let client = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(addr).unwrap();
        let mut writer = stream.try_clone().unwrap();
        let sender = std::thread::spawn(move || {
            writer.write_all(&copy).unwrap();
            writer.shutdown(Shutdown::Write).unwrap();
        });
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        sender.join().unwrap();
        answer
    });
    let mut pending: Vec<u8> = Vec::new();
    guest.run_until("the client to finish", |guest| {
        let socket = guest.tcp(handle);
        if socket.can_recv() && pending.len() < 100_000 {
            socket
                .recv(|bytes| {
                    pending.extend_from_slice(bytes);
                    (bytes.len(), ())
                })
                .unwrap();
        }
        if !pending.is_empty() && socket.can_send() {
            let n = socket.send_slice(&pending).unwrap();
            pending.drain(..n);
        }
        if socket.state() == tcp::State::CloseWait && pending.is_empty() && !socket.can_recv() {
            socket.close();
        }
        (socket.state() == tcp::State::Closed).then_some(())
    });
    assert!(client.join().unwrap() == data);
    closed_without_trace(&mut guest);
}

#[test]
fn forwards_to_a_closed_guest_port_are_reset() {
    let config = Config {
        forwards: vec!["0:81".parse::<Forward>().unwrap()],
        ..guest::config()
    };
    let mut guest = Guest::new(config);
    let addr = guest.stack().forwards()[0].1;
    let client = std::thread::spawn(move || {
        let mut stream = TcpStream::connect(addr).unwrap();
        stream.read(&mut [0; 1])
    });
    guest.run_until("the client to fail", |_| client.is_finished().then_some(()));
    assert!(client.join().unwrap().is_err());
    closed_without_trace(&mut guest);
}

#[test]
fn the_connection_limit_holds() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = SocketAddrV4::new(GATEWAY, listener.local_addr().unwrap().port());
    let config = Config {
        max_tcp: 4,
        ..guest::config()
    };
    let mut guest = Guest::new(config);
    let handles: Vec<_> = (0..8).map(|_| guest.tcp_connect(addr)).collect();
    guest.run_until("every connection to be decided", |guest| {
        handles
            .iter()
            .all(|&h| guest.tcp(h).state() != tcp::State::SynSent)
            .then_some(())
    });
    let open = handles
        .iter()
        .filter(|&&h| guest.tcp(h).is_active())
        .count();
    assert_eq!(open, 4);
    for &handle in &handles {
        guest.tcp(handle).abort();
    }
    closed_without_trace(&mut guest);
    drop(listener);
}

#[test]
fn dns_over_tcp_reaches_the_resolver() {
    let (addr, thread) = server(echo);
    let config = Config {
        resolvers: netstack::Resolvers::Fixed(vec![([127, 0, 0, 1], addr.port()).into()]),
        ..guest::config()
    };
    let mut guest = Guest::new(config);
    let handle = guest.tcp_connect(SocketAddrV4::new(guest::DNS, 53));
    assert_eq!(guest.exchange(handle, b"query", true), b"query");
    thread.join().unwrap();
}

#[test]
fn an_occupied_port_is_explained() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let config = Config {
        forwards: vec![format!("{port}:80").parse().unwrap()],
        ..guest::config()
    };
    let error = netstack::spawn(config).unwrap_err().to_string();
    assert!(error.contains(&port.to_string()), "{error}");
    assert!(!error.contains('\n'));
}
