//! What the two ends of a migration say to each other: frames over TCP.
//!
//! A frame is a header of 16 bytes (kind, length of the payload, checksum over all of it; little
//! endian) and the payload. Every length is checked before memory is set aside, and a frame that
//! is not through within the timeout is an error: a peer that trickles is as good as silent. The
//! checksum finds broken bytes, not forged ones: who may connect is for the network to decide.
//!
//! | frame | from | says |
//! |---|---|---|
//! | `Hello` | source | version, shape of the VM, its program |
//! | `Accept`, `Refuse` | target | whether it has room for that |
//! | `Pages` | source | up to [`BATCH`] pages, each with its number |
//! | `RoundEnd` | source | how many pages this round had |
//! | `Final` | source | the VM stands still; this was the last round |
//! | `Ready` | target | the hash of what it has. **It will run the VM if told to** |
//! | `Go` | source | the VM is yours; the hash of its memory, which was the same |
//! | `Running` | target | it runs |

use std::fmt;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

/// First word of `Hello`.
const MAGIC: u64 = u64::from_le_bytes(*b"mini_vmm");
/// Version of this protocol; both ends must have the same.
pub const VERSION: u64 = 1;
/// Pages in one frame, at most.
pub const BATCH: usize = 64;
/// Bytes in a page.
pub const PAGE: usize = 4096;
/// Longest reason of a refusal that is read.
const REASON: usize = 256;
const HEADER: usize = 16;
/// Words of `Hello`.
const HELLO: usize = 10;

/// The VM that is to be moved. What it means that these are possible values is for the target to
/// judge; the wire carries them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hello {
    /// Number of vCPUs.
    pub vcpus: u64,
    /// Pages of guest data.
    pub pages: u64,
    /// `Churn::multiplier`.
    pub multiplier: u64,
    /// `Churn::offset`.
    pub offset: u64,
    /// `Churn::written`.
    pub written: u64,
    /// `Churn::delay`.
    pub delay: u64,
    /// `Workload::overlap`, 0 or 1.
    pub overlap: u64,
    /// Rounds that are sent at most.
    pub rounds: u64,
}

/// Pages and their contents.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    bytes: Vec<u8>,
    count: usize,
}

impl Batch {
    /// Number of pages.
    pub fn len(&self) -> usize {
        self.count
    }

    /// No pages?
    pub fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// No room for another page?
    pub fn is_full(&self) -> bool {
        self.count >= BATCH
    }

    /// Forget the pages, keep the room.
    pub fn clear(&mut self) {
        self.bytes.clear();
        self.count = 0;
    }

    /// Add page `number`, whose words are `words` (512 of them).
    pub fn push(&mut self, number: u64, words: impl Iterator<Item = u64>) {
        self.bytes.extend_from_slice(&number.to_le_bytes());
        words.for_each(|word| self.bytes.extend_from_slice(&word.to_le_bytes()));
        self.count += 1;
        debug_assert_eq!(self.bytes.len(), self.count * (8 + PAGE), "whole pages");
    }

    /// Each page: its number and its words.
    pub fn pages(&self) -> impl Iterator<Item = (u64, impl Iterator<Item = u64>)> {
        self.bytes.chunks_exact(8 + PAGE).map(|page| {
            let mut words = words(page);
            (words.next().unwrap_or(u64::MAX), words)
        })
    }
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// See the module documentation, here and below.
    Hello(Hello),
    /// The target has room.
    Accept,
    /// The target does not want it; why, in words.
    Refuse(String),
    /// Pages.
    Pages(Batch),
    /// Number of pages of the round that ends.
    RoundEnd(u64),
    /// Nothing more comes.
    Final,
    /// Hash of the target's memory.
    Ready([u64; 2]),
    /// The VM is the target's; hash of the source's memory.
    Go([u64; 2]),
    /// The target runs it.
    Running,
}

impl Frame {
    fn kind(&self) -> u32 {
        match self {
            Self::Hello(_) => 1,
            Self::Accept => 2,
            Self::Refuse(_) => 3,
            Self::Pages(_) => 4,
            Self::RoundEnd(_) => 5,
            Self::Final => 6,
            Self::Ready(_) => 7,
            Self::Go(_) => 8,
            Self::Running => 9,
        }
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "Hello",
            Self::Accept => "Accept",
            Self::Refuse(_) => "Refuse",
            Self::Pages(_) => "Pages",
            Self::RoundEnd(_) => "RoundEnd",
            Self::Final => "Final",
            Self::Ready(_) => "Ready",
            Self::Go(_) => "Go",
            Self::Running => "Running",
        }
    }
}

/// Why a connection is of no more use. Nothing of a frame that failed was acted upon.
#[derive(Debug)]
#[non_exhaustive]
pub enum WireError {
    /// The peer is gone: the connection ended within or between frames.
    Closed,
    /// No complete frame came, or could be sent, in this time.
    Timeout(Duration),
    /// A system call failed.
    Io(io::Error),
    /// Not this protocol.
    Magic(u64),
    /// Another version of it.
    Version {
        /// What the peer speaks.
        theirs: u64,
    },
    /// A kind of frame that does not exist.
    Kind(u32),
    /// A length that frames of this kind do not have.
    Length {
        /// The kind.
        kind: u32,
        /// Bytes of payload.
        length: u64,
    },
    /// Bytes were changed on the way.
    Checksum {
        /// The kind of the frame.
        kind: u32,
    },
    /// Not the frame whose turn it is.
    Unexpected {
        /// The frame that came.
        got: &'static str,
        /// The frame, or frames, that were due.
        wanted: &'static str,
    },
    /// The target refused.
    Refused(String),
    /// A value that is not possible.
    Value {
        /// What it was to be.
        what: &'static str,
        /// The value.
        value: u64,
        /// The largest that is possible.
        most: u64,
    },
    /// The two ends hold different memory.
    Differ {
        /// Hash of the source's memory.
        source: [u64; 2],
        /// Hash of the target's memory.
        target: [u64; 2],
    },
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Closed => f.write_str("the peer closed the connection"),
            Self::Timeout(time) => write!(f, "no complete frame within {time:?}"),
            Self::Io(error) => error.fmt(f),
            Self::Magic(word) => write!(f, "the peer does not migrate: it began with {word:#x}"),
            Self::Version { theirs } => {
                write!(f, "the peer speaks version {theirs}, this end version {VERSION}")
            }
            Self::Kind(kind) => write!(f, "there is no frame of kind {kind}"),
            Self::Length { kind, length } => write!(f, "a frame of kind {kind} has {length} bytes"),
            Self::Checksum { kind } => write!(f, "a frame of kind {kind} came damaged"),
            Self::Unexpected { got, wanted } => write!(f, "{got} came where {wanted} was due"),
            Self::Refused(why) => write!(f, "the target refused: {why}"),
            Self::Value { what, value, most } => write!(f, "{what} {value}: at most {most}"),
            Self::Differ { source, target } => {
                write!(f, "memory differs: hash {source:x?} at the source, {target:x?} here")
            }
        }
    }
}

impl std::error::Error for WireError {}

/// A hash of words in order, of two lanes that share nothing but the words.
#[derive(Clone, Copy, Debug)]
pub struct Hash([u64; 2]);

impl Hash {
    /// Of nothing.
    pub fn new() -> Self {
        Self([0x243f_6a88_85a3_08d3, 0x1319_8a2e_0370_7344])
    }

    /// Add a word.
    #[inline]
    pub fn add(&mut self, word: u64) {
        let [a, b] = self.0;
        let a = (a ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
        let b = (b.rotate_left(29) ^ word).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
        self.0 = [a ^ a >> 32, b ^ b >> 29];
    }

    /// The hash.
    pub fn get(self) -> [u64; 2] {
        self.0
    }
}

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    bytes.chunks(8).map(|chunk| {
        let mut word = [0; 8];
        word.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
        u64::from_le_bytes(word)
    })
}

fn checksum(kind: u32, payload: &[u8]) -> u64 {
    let mut hash = Hash::new();
    hash.add(u64::from(kind) << 32 | payload.len() as u64);
    words(payload).for_each(|word| hash.add(word));
    hash.get()[0]
}

/// One end of a connection.
#[derive(Debug)]
pub struct Wire {
    stream: TcpStream,
    timeout: Duration,
    /// Bytes sent, headers included.
    pub sent: u64,
}

impl Wire {
    /// Speak over `stream`; a frame takes at most `timeout`, which is not 0.
    ///
    /// # Errors
    /// `Io` if the stream cannot be configured.
    pub fn new(stream: TcpStream, timeout: Duration) -> Result<Self, WireError> {
        // Answers are short and somebody waits for them.
        stream.set_nodelay(true).map_err(WireError::Io)?;
        stream.set_nonblocking(false).map_err(WireError::Io)?;
        Ok(Self { stream, timeout, sent: 0 })
    }

    /// Send a frame.
    ///
    /// # Errors
    /// `Closed`, `Timeout`, `Io`: the connection is of no more use.
    pub fn send(&mut self, frame: &Frame) -> Result<(), WireError> {
        let mut short = Vec::new();
        let payload: &[u8] = match frame {
            Frame::Pages(batch) => &batch.bytes,
            Frame::Refuse(why) => &why.as_bytes()[..why.len().min(REASON)],
            Frame::Hello(hello) => {
                put(&mut short, &[MAGIC, VERSION, hello.vcpus, hello.pages]);
                put(&mut short, &[hello.multiplier, hello.offset, hello.written, hello.delay]);
                put(&mut short, &[hello.overlap, hello.rounds])
            }
            Frame::RoundEnd(pages) => put(&mut short, &[*pages]),
            Frame::Ready(hash) | Frame::Go(hash) => put(&mut short, hash),
            Frame::Accept | Frame::Final | Frame::Running => &[],
        };
        let kind = frame.kind();
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[4..8].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        header[8..].copy_from_slice(&checksum(kind, payload).to_le_bytes());
        let end = Instant::now() + self.timeout;
        self.write(&header, end)?;
        self.write(payload, end)?;
        self.sent += (HEADER + payload.len()) as u64;
        Ok(())
    }

    /// Has the peer closed the connection, as far as is known here? Nothing may be on its way.
    ///
    /// # Errors
    /// `Closed`, or `Io`.
    pub fn still_open(&mut self) -> Result<(), WireError> {
        self.stream.set_nonblocking(true).map_err(WireError::Io)?;
        let peeked = self.stream.peek(&mut [0]);
        self.stream.set_nonblocking(false).map_err(WireError::Io)?;
        match peeked {
            Ok(0) => Err(WireError::Closed),
            Ok(_) => Ok(()),
            Err(error) => self.failed(error),
        }
    }

    /// The next frame.
    ///
    /// # Errors
    /// Any of [`WireError`] but `Refused` and `Differ`.
    pub fn receive(&mut self) -> Result<Frame, WireError> {
        let end = Instant::now() + self.timeout;
        let mut header = [0; HEADER];
        self.read(&mut header, end)?;
        let [first, check] = [0, 1].map(|n| words(&header).nth(n).unwrap_or(0));
        let (kind, length) = (first as u32, (first >> 32) as usize);
        let whole_pages = length % (8 + PAGE) == 0 && length / (8 + PAGE) <= BATCH && length > 0;
        let possible = match kind {
            1 => length == 8 * HELLO,
            2 | 6 | 9 => length == 0,
            3 => length <= REASON,
            4 => whole_pages,
            5 => length == 8,
            7 | 8 => length == 16,
            other => return Err(WireError::Kind(other)),
        };
        if !possible {
            return Err(WireError::Length { kind, length: length as u64 });
        }
        // At most BATCH pages, checked above.
        let mut payload = vec![0; length];
        self.read(&mut payload, end)?;
        if checksum(kind, &payload) != check {
            return Err(WireError::Checksum { kind });
        }
        decode(kind, payload)
    }

    fn left(&self, end: Instant) -> Result<Duration, WireError> {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(WireError::Timeout(self.timeout)) } else { Ok(left) }
    }

    fn failed(&self, error: io::Error) -> Result<(), WireError> {
        match error.kind() {
            // The end of the frame's time decides.
            io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
                Ok(())
            }
            io::ErrorKind::BrokenPipe
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::ConnectionAborted
            | io::ErrorKind::UnexpectedEof => Err(WireError::Closed),
            _ => Err(WireError::Io(error)),
        }
    }

    fn write(&mut self, mut bytes: &[u8], end: Instant) -> Result<(), WireError> {
        while !bytes.is_empty() {
            let left = self.left(end)?;
            self.stream.set_write_timeout(Some(left)).map_err(WireError::Io)?;
            match self.stream.write(bytes) {
                Ok(0) => return Err(WireError::Closed),
                Ok(count) => bytes = &bytes[count..],
                Err(error) => self.failed(error)?,
            }
        }
        Ok(())
    }

    fn read(&mut self, mut bytes: &mut [u8], end: Instant) -> Result<(), WireError> {
        while !bytes.is_empty() {
            let left = self.left(end)?;
            self.stream.set_read_timeout(Some(left)).map_err(WireError::Io)?;
            match self.stream.read(bytes) {
                Ok(0) => return Err(WireError::Closed),
                Ok(count) => bytes = &mut bytes[count..],
                Err(error) => self.failed(error)?,
            }
        }
        Ok(())
    }
}

fn put<'a>(bytes: &'a mut Vec<u8>, words: &[u64]) -> &'a [u8] {
    words.iter().for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
    bytes
}

/// A payload whose length and checksum are right.
fn decode(kind: u32, payload: Vec<u8>) -> Result<Frame, WireError> {
    if kind == 4 {
        let count = payload.len() / (8 + PAGE);
        return Ok(Frame::Pages(Batch { bytes: payload, count }));
    }
    let mut rest = words(&payload);
    let mut word = || rest.next().unwrap_or(0);
    Ok(match kind {
        1 => {
            let (magic, theirs) = (word(), word());
            if magic != MAGIC {
                return Err(WireError::Magic(magic));
            }
            if theirs != VERSION {
                return Err(WireError::Version { theirs });
            }
            Frame::Hello(Hello {
                vcpus: word(),
                pages: word(),
                multiplier: word(),
                offset: word(),
                written: word(),
                delay: word(),
                overlap: word(),
                rounds: word(),
            })
        }
        2 => Frame::Accept,
        3 => Frame::Refuse(String::from_utf8_lossy(&payload).into_owned()),
        5 => Frame::RoundEnd(word()),
        6 => Frame::Final,
        7 => Frame::Ready([word(), word()]),
        8 => Frame::Go([word(), word()]),
        9 => Frame::Running,
        other => return Err(WireError::Kind(other)),
    })
}
