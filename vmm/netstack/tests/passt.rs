//! The external passt as back end, if it is installed.

mod guest;

use std::io::{Read, Write};
use std::net::{SocketAddrV4, TcpListener};

use guest::{Guest, Port};
use netstack::passt::{PasstConfig, spawn};

#[test]
fn passt_carries_a_connection() {
    let dir = std::env::temp_dir().join(format!("netstack-passt-{}", std::process::id()));
    std::fs::create_dir_all(&dir).unwrap();
    // passt gives up root: it must be able to make its socket all the same.
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o777);
    std::fs::set_permissions(&dir, mode).unwrap();
    let mut config = PasstConfig::new(dir.join("socket"));
    config.args = ["--address", "10.0.2.15", "--netmask", "24"]
        .iter()
        .chain(&["--gateway", "10.0.2.2", "--mtu", "1500", "--ipv4-only"])
        .map(ToString::to_string)
        .collect();
    let handle = match spawn(&config) {
        Ok(handle) => handle,
        Err(error) => {
            println!("SKIPPED: {error}");
            std::fs::remove_dir_all(dir).unwrap();
            return;
        }
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 7];
        stream.read_exact(&mut request).unwrap();
        stream.write_all(&request).unwrap();
    });
    let mut guest = Guest::unconfigured(Port::Thread(handle), 1500, false);
    guest.configure(guest::GUEST);
    let connection = guest.tcp_connect(SocketAddrV4::new(guest::GATEWAY, port));
    assert_eq!(guest.exchange(connection, b"through", false), b"through");
    server.join().unwrap();
    drop(guest);
    std::fs::remove_dir_all(dir).unwrap();
}
