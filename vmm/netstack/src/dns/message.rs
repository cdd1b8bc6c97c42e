//! As much of the DNS message format (RFC 1035) as a forwarder that answers a few names itself needs.

use std::net::Ipv4Addr;

pub(super) const HEADER: usize = 12;
/// Largest answer over UDP without EDNS.
const MAX_PLAIN_ANSWER: usize = 512;

const FLAG_RESPONSE: u16 = 0x8000;
const FLAG_RECURSION_DESIRED: u16 = 0x0100;
const FLAG_RECURSION_AVAILABLE: u16 = 0x0080;
const OPCODE: u16 = 0x7800;
const SERVFAIL: u16 = 2;

const TYPE_A: u16 = 1;
const TYPE_AAAA: u16 = 28;
const CLASS_IN: u16 = 1;
const TTL_SECONDS: u32 = 60;

fn word(message: &[u8], at: usize) -> Option<u16> {
    let bytes = message.get(at..at.checked_add(2)?)?;
    Some(u16::from_be_bytes([bytes[0], bytes[1]]))
}

/// The identifier of a query that may be passed on.
pub(super) fn query_id(message: &[u8]) -> Option<u16> {
    let flags = word(message, 2)?;
    (message.len() >= HEADER && flags & FLAG_RESPONSE == 0)
        .then(|| word(message, 0))
        .flatten()
}

/// Whether `message` answers a query with identifier `id`.
pub(super) fn answers(message: &[u8], id: u16) -> bool {
    message.len() >= HEADER
        && word(message, 0) == Some(id)
        && word(message, 2).is_some_and(|flags| flags & FLAG_RESPONSE != 0)
}

/// The one question of an ordinary query.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Question {
    /// Dotted name in lower case without the final dot.
    pub(super) name: String,
    qtype: u16,
    qclass: u16,
    end: usize,
}

impl Question {
    /// Whether the answer could be an IPv4 or an IPv6 address.
    pub(super) fn wants_address(&self) -> bool {
        self.qclass == CLASS_IN && matches!(self.qtype, TYPE_A | TYPE_AAAA)
    }
}

pub(super) fn question(query: &[u8]) -> Option<Question> {
    query_id(query)?;
    if word(query, 2)? & OPCODE != 0 || word(query, 4)? != 1 {
        return None;
    }
    let mut name = String::new();
    let mut at = HEADER;
    loop {
        let len = usize::from(*query.get(at)?);
        at += 1;
        if len == 0 {
            break;
        }
        // Longer "lengths" are compression pointers, which a question has no use for.
        if len > 63 || name.len() + len > 254 {
            return None;
        }
        if !name.is_empty() {
            name.push('.');
        }
        for &byte in query.get(at..at + len)? {
            name.push(char::from(byte.to_ascii_lowercase()));
        }
        at += len;
    }
    Some(Question {
        name,
        qtype: word(query, at)?,
        qclass: word(query, at + 2)?,
        end: at + 4,
    })
}

fn header(query: &[u8], rcode: u16, questions: u16, answers: u16) -> Vec<u8> {
    let id = word(query, 0).unwrap_or(0);
    let asked = word(query, 2).unwrap_or(0) & (OPCODE | FLAG_RECURSION_DESIRED);
    let flags = FLAG_RESPONSE | FLAG_RECURSION_AVAILABLE | asked | rcode;
    [id, flags, questions, answers, 0, 0]
        .iter()
        .flat_map(|word| word.to_be_bytes())
        .collect()
}

/// The answer "the resolver failed" to `query`.
pub(super) fn server_failure(query: &[u8]) -> Vec<u8> {
    match question(query) {
        None => header(query, SERVFAIL, 0, 0),
        Some(question) => {
            let mut answer = header(query, SERVFAIL, 1, 0);
            answer.extend_from_slice(query.get(HEADER..question.end).unwrap_or_default());
            answer
        }
    }
}

/// The answer that `question` of `query` has these addresses, and no IPv6 ones.
pub(super) fn addresses(query: &[u8], question: &Question, ips: &[Ipv4Addr]) -> Vec<u8> {
    const RECORD: usize = 16;
    let room = MAX_PLAIN_ANSWER.saturating_sub(question.end) / RECORD;
    let count = if question.qtype == TYPE_A {
        ips.len().min(room)
    } else {
        0
    };
    let mut answer = header(query, 0, 1, count as u16);
    answer.extend_from_slice(query.get(HEADER..question.end).unwrap_or_default());
    for ip in &ips[..count] {
        // The name is a pointer to the question's.
        answer.extend_from_slice(&(0xc000 | HEADER as u16).to_be_bytes());
        answer.extend_from_slice(&TYPE_A.to_be_bytes());
        answer.extend_from_slice(&CLASS_IN.to_be_bytes());
        answer.extend_from_slice(&TTL_SECONDS.to_be_bytes());
        answer.extend_from_slice(&4u16.to_be_bytes());
        answer.extend_from_slice(&ip.octets());
    }
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUERY: &[u8] =
        b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x03WwW\x04test\x00\x00\x01\x00\x01";

    #[test]
    fn reads_a_question() {
        let question = question(QUERY).unwrap();
        assert_eq!(question.name, "www.test");
        assert!(question.wants_address());
        assert_eq!(query_id(QUERY), Some(0x1234));
    }

    #[test]
    fn answers_with_addresses_and_failures() {
        let question = question(QUERY).unwrap();
        let answer = addresses(QUERY, &question, &[Ipv4Addr::new(192, 0, 2, 7)]);
        assert!(answers(&answer, 0x1234));
        assert_eq!(&answer[6..8], &[0, 1]);
        assert!(answer.ends_with(&[0, 4, 192, 0, 2, 7]));
        let failure = server_failure(QUERY);
        assert_eq!(failure[3] & 0xf, 2);
        assert_eq!(&failure[HEADER..], &QUERY[HEADER..]);
    }

    #[test]
    fn damaged_queries_are_no_questions() {
        for len in 0..QUERY.len() {
            assert!(question(&QUERY[..len]).is_none());
            server_failure(&QUERY[..len]);
        }
        let mut pointer = QUERY.to_vec();
        pointer[HEADER] = 0xc0;
        assert!(question(&pointer).is_none());
        let mut response = QUERY.to_vec();
        response[2] |= 0x80;
        assert!(query_id(&response).is_none());
    }
}
