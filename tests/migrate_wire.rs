//! The frames of `examples/mini_vmm migrate`: what is sent arrives, and a peer that means ill, or
//! trickles, or vanishes, is an error and never more.

#![allow(dead_code, reason = "a module of the example, of which the test uses a part")]

#[path = "../examples/mini_vmm/migrate/wire.rs"]
mod wire;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use mmu_model::Random;
use wire::{BATCH, Batch, Frame, Hello, PAGE, Wire, WireError};

const TIMEOUT: Duration = Duration::from_millis(300);

/// Of the checksum.
const SEED: u64 = 0x243f_6a88_85a3_08d3;
const FACTOR: u64 = 0xff51_afd7_ed55_8ccd;

fn pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let near = TcpStream::connect(listener.local_addr().unwrap()).expect("connect");
    (near, listener.accept().expect("accept").0)
}

fn wires() -> (Wire, Wire) {
    let (near, far) = pair();
    (Wire::new(near, TIMEOUT).unwrap(), Wire::new(far, TIMEOUT).unwrap())
}

fn hello() -> Hello {
    let (vcpus, pages, multiplier, offset) = (2, 4096, 0x9e37_79b9, 5);
    let (written, delay, overlap, rounds) = (128, 3, 1, 30);
    Hello { vcpus, pages, multiplier, offset, written, delay, overlap, rounds }
}

fn batch(pages: usize) -> Batch {
    let mut batch = Batch::default();
    for n in 0..pages as u64 {
        batch.push(n * 3, (0..512).map(|word| n << 32 | word));
    }
    batch
}

fn frames() -> Vec<Frame> {
    vec![
        Frame::Hello(hello()),
        Frame::Accept,
        Frame::Refuse("no room".to_owned()),
        Frame::Pages(batch(1)),
        Frame::Pages(batch(BATCH)),
        Frame::RoundEnd(65),
        Frame::Final,
        Frame::Ready([3, 4]),
        Frame::Go([5, 6]),
        Frame::Running,
    ]
}

/// The bytes of a frame on the wire.
fn bytes_of(frame: &Frame) -> Vec<u8> {
    let (near, mut far) = pair();
    let frame = frame.clone();
    let sender = thread::spawn(move || Wire::new(near, TIMEOUT).unwrap().send(&frame).unwrap());
    let mut bytes = Vec::new();
    far.read_to_end(&mut bytes).unwrap();
    sender.join().unwrap();
    bytes
}

/// What the receiver says to `bytes` and the end of the connection after them.
fn answer_to(bytes: &[u8]) -> Result<Frame, WireError> {
    let (mut near, far) = pair();
    let bytes = bytes.to_vec();
    let sender = thread::spawn(move || {
        let _ = near.write_all(&bytes);
        let _ = near.shutdown(Shutdown::Write);
        near
    });
    let answer = Wire::new(far, TIMEOUT).unwrap().receive();
    drop(sender.join().unwrap());
    answer
}

#[test]
fn every_frame_arrives_as_it_was_sent() {
    let (mut near, mut far) = wires();
    for frame in frames() {
        thread::scope(|scope| {
            scope.spawn(|| near.send(&frame).unwrap());
            assert_eq!(far.receive().unwrap(), frame);
        });
    }
    let pages = batch(BATCH);
    assert!(pages.is_full() && pages.len() == BATCH);
    for (n, (number, words)) in pages.pages().enumerate() {
        assert_eq!(number, n as u64 * 3);
        assert!(words.eq((0..512).map(|word| (n as u64) << 32 | word)));
    }
}

#[test]
fn a_connection_cut_anywhere_in_a_frame_is_an_error() {
    for frame in [Frame::Hello(hello()), Frame::Pages(batch(2)), Frame::Final] {
        let bytes = bytes_of(&frame);
        assert_eq!(answer_to(&bytes).unwrap(), frame);
        for cut in (0..bytes.len()).filter(|cut| *cut < 40 || cut % 509 == 0) {
            let answer = answer_to(&bytes[..cut]);
            assert!(matches!(answer, Err(WireError::Closed)), "{cut}: {answer:?}");
        }
    }
}

#[test]
fn no_damaged_frame_is_taken_for_a_whole_one() {
    let seed = 11;
    let mut random = Random::new(seed);
    for frame in frames() {
        let whole = bytes_of(&frame);
        for _ in 0..60 {
            let mut bytes = whole.clone();
            let at = random.below(bytes.len() as u64) as usize;
            let bit = random.below(8);
            bytes[at] ^= 1 << bit;
            let answer = answer_to(&bytes);
            assert!(answer.is_err(), "seed {seed}: {frame:?} bit {bit} of byte {at}: {answer:?}");
        }
    }
}

#[test]
fn random_bytes_are_refused_without_setting_memory_aside() {
    let seed = 12;
    let mut random = Random::new(seed);
    for round in 0..200 {
        let mut bytes: Vec<u8> = (0..random.below(200)).map(|_| random.below(256) as u8).collect();
        // Half of them claim a kind that exists, with any length.
        if round % 2 == 0 && bytes.len() >= 4 {
            bytes[..4].copy_from_slice(&(random.below(10) as u32).to_le_bytes());
        }
        assert!(answer_to(&bytes).is_err(), "seed {seed}, round {round}");
    }
    // A length of 4 GiB is refused by the header alone.
    let mut header = [0xff; 16];
    header[..4].copy_from_slice(&4u32.to_le_bytes());
    let answer = answer_to(&header);
    assert!(matches!(answer, Err(WireError::Length { kind: 4, .. })), "{answer:?}");
}

#[test]
fn another_version_and_another_protocol_are_named() {
    let whole = bytes_of(&Frame::Hello(hello()));
    let with_word = |index: usize, word: u64| {
        let mut bytes = whole.clone();
        bytes[16 + 8 * index..][..8].copy_from_slice(&word.to_le_bytes());
        // The checksum, as the documentation of the format has it.
        let words = bytes[16..].chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap()));
        let length = bytes.len() as u64 - 16;
        let check = std::iter::once(1 << 32 | length).chain(words).fold(SEED, |hash, word| {
            let hash = (hash ^ word).wrapping_mul(FACTOR);
            hash ^ hash >> 32
        });
        bytes[8..16].copy_from_slice(&check.to_le_bytes());
        bytes
    };
    assert_eq!(with_word(1, wire::VERSION), whole, "the checksum is computed right here");
    let answer = answer_to(&with_word(0, 7));
    assert!(matches!(answer, Err(WireError::Magic(7))), "{answer:?}");
    let answer = answer_to(&with_word(1, wire::VERSION + 1));
    assert!(matches!(answer, Err(WireError::Version { .. })), "{answer:?}");
    let (mut near, far) = pair();
    near.write_all(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n").unwrap();
    let answer = Wire::new(far, TIMEOUT).unwrap().receive();
    assert!(matches!(answer, Err(WireError::Kind(_))), "{answer:?}");
}

#[test]
fn silence_and_a_trickle_end_in_a_timeout() {
    let (near, far) = pair();
    let start = Instant::now();
    let answer = Wire::new(far, TIMEOUT).unwrap().receive();
    assert!(matches!(answer, Err(WireError::Timeout(_))), "{answer:?}");
    drop(near);

    let (mut near, far) = pair();
    let bytes = bytes_of(&Frame::Pages(batch(1)));
    let trickle = thread::spawn(move || {
        for byte in bytes {
            if near.write_all(&[byte]).is_err() {
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
    });
    let answer = Wire::new(far, TIMEOUT).unwrap().receive();
    assert!(matches!(answer, Err(WireError::Timeout(_))), "{answer:?}");
    trickle.join().unwrap();
    // Each took its timeout, and not the 20 s that the trickle would have.
    assert!(start.elapsed() < Duration::from_secs(10));
}

#[test]
fn a_peer_that_does_not_read_ends_in_a_timeout() {
    let (near, _far) = pair();
    let mut near = Wire::new(near, TIMEOUT).unwrap();
    let pages = Frame::Pages(batch(BATCH));
    // More than the kernel buffers.
    let stuck = (0..(1 << 30) / (BATCH * PAGE)).find_map(|_| near.send(&pages).err());
    assert!(matches!(stuck, Some(WireError::Timeout(_))), "{stuck:?}");
}
