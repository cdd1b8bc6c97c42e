//! The DHCP server: one lease, always the same.

use std::net::Ipv4Addr;

use smoltcp::wire::{DhcpMessageType, DhcpOption, DhcpPacket, DhcpRepr, Ipv4Address};

use crate::link::Link;
use std::net::SocketAddrV4;

pub(crate) const SERVER_PORT: u16 = 67;
const CLIENT_PORT: u16 = 68;
const LEASE_SECONDS: u32 = 24 * 3600;
/// RFC 1542 clients drop shorter messages.
const MIN_MESSAGE: usize = 300;
const OPTION_HOST_NAME: u8 = 12;
const OPTION_INTERFACE_MTU: u8 = 26;

/// Answers a DHCP message of the guest.
pub(crate) fn input(link: &mut Link, payload: &[u8]) {
    let Ok(packet) = DhcpPacket::new_checked(payload) else {
        return;
    };
    let Ok(request) = DhcpRepr::parse(&packet) else {
        return;
    };
    let (own_ip, lease) = (link.config.gateway_ip, link.config.guest_ip);
    let answer = match request.message_type {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Inform => DhcpMessageType::Ack,
        DhcpMessageType::Request => {
            if request.server_identifier.is_some_and(|id| id != own_ip) {
                // The client has chosen another server.
                return;
            }
            let wanted = request.requested_ip.unwrap_or(request.client_ip);
            if wanted == lease {
                DhcpMessageType::Ack
            } else {
                DhcpMessageType::Nak
            }
        }
        _ => return,
    };
    let leases = answer != DhcpMessageType::Nak && request.message_type != DhcpMessageType::Inform;
    let informs = answer != DhcpMessageType::Nak;

    let config = &link.config;
    let mtu = (config.mtu as u16).to_be_bytes();
    let mut options = Vec::new();
    if let Some(name) = config.hostname.as_ref().filter(|_| informs) {
        options.push(DhcpOption {
            kind: OPTION_HOST_NAME,
            data: name.as_bytes(),
        });
    }
    if config.mtu != 1500 && informs {
        options.push(DhcpOption {
            kind: OPTION_INTERFACE_MTU,
            data: &mtu,
        });
    }
    let reply = DhcpRepr {
        message_type: answer,
        transaction_id: request.transaction_id,
        secs: 0,
        client_hardware_address: request.client_hardware_address,
        client_ip: if request.message_type == DhcpMessageType::Inform {
            request.client_ip
        } else {
            Ipv4Address::UNSPECIFIED
        },
        your_ip: if leases {
            lease
        } else {
            Ipv4Address::UNSPECIFIED
        },
        server_ip: own_ip,
        router: informs.then_some(own_ip),
        subnet_mask: informs.then(|| config.netmask()),
        relay_agent_ip: Ipv4Address::UNSPECIFIED,
        broadcast: request.broadcast,
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(own_ip),
        parameter_request_list: None,
        dns_servers: informs.then(|| [config.dns_ip].into_iter().collect()),
        max_size: None,
        lease_duration: leases.then_some(LEASE_SECONDS),
        renew_duration: None,
        rebind_duration: None,
        additional_options: &options,
    };
    let mut message = vec![0; reply.buffer_len().max(MIN_MESSAGE)];
    if reply
        .emit(&mut DhcpPacket::new_unchecked(&mut message[..]))
        .is_err()
    {
        return;
    }
    // Broadcast reaches every client, whatever state its address is in.
    link.send_udp(
        SocketAddrV4::new(own_ip, SERVER_PORT),
        SocketAddrV4::new(Ipv4Addr::BROADCAST, CLIENT_PORT),
        &message,
    );
    if leases {
        link.learn(lease, request.client_hardware_address);
    }
}
