//! Pages that the host must read in while the vCPU goes on: tokens and the pages waited for.
//!
//! Owns [`AsyncPages`], one per vCPU (KVM row 3.26). A fault that ends in
//! [`ResolveError::NeedsIo`](crate::traits::ResolveError::NeedsIo) may be answered in two ways: the
//! embedder reads the page in and enters the guest, or it starts the read, tells the guest that the
//! page is not there, under a token, and enters at once. This is the bookkeeping of the second: how
//! many are under way, which gfn a token stands for, and that a token is never 0 (KVM row B17),
//! which guests take for "nothing". When the page is there, the fault is repeated as a prefetch
//! ([`PageFault::prefetch`](crate::fault::PageFault::prefetch)), because the guest has not used it.
//!
//! Plain values of one thread: no locks, no ordering.

use core::num::NonZeroU32;

use arrayvec::ArrayVec;

use crate::addr::Gfn;

/// Pages that one vCPU may wait for at once.
#[doc(alias = "ASYNC_PF_PER_VCPU")]
pub const MAX_ASYNC_PAGES: usize = 64;

/// Low bits of a token: the vCPU.
const VCPU_BITS: u32 = 12;
/// Largest number above them.
const LAST_ID: u32 = u32::MAX >> VCPU_BITS;

/// Names a page that is being read in, to the guest too. Never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct AsyncToken(NonZeroU32);

impl AsyncToken {
    /// As the guest sees it.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0.get()
    }
}

/// What a fault on a page that must be read in comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum AsyncStart {
    /// Start the read and tell the guest the token.
    Started(AsyncToken),
    /// The page is being read in already and the guest was told: it has nothing else to do, so the
    /// vCPU halts until a page is ready.
    Halt(AsyncToken),
    /// [`MAX_ASYNC_PAGES`] are under way: read the page in now, and do not tell the guest.
    Full,
}

/// A vCPU number that does not fit in a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadVcpu {
    /// The number given.
    pub vcpu: u32,
    /// One past the largest.
    pub limit: u32,
}

impl core::fmt::Display for BadVcpu {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "vCPU {} has no tokens: there are {}", self.vcpu, self.limit)
    }
}

impl core::error::Error for BadVcpu {}

/// The pages that one vCPU waits for.
#[doc(alias = "kvm_async_pf")]
#[derive(Debug)]
pub struct AsyncPages {
    vcpu: u32,
    /// Number of the last token, 1 to [`LAST_ID`], or 0 before the first.
    last: u32,
    waiting: ArrayVec<(AsyncToken, Gfn), MAX_ASYNC_PAGES>,
}

impl AsyncPages {
    /// Nothing waited for. Tokens of vCPUs with different numbers differ.
    ///
    /// # Errors
    /// [`BadVcpu`] for a number of more than 12 bits.
    pub const fn new(vcpu: u32) -> Result<Self, BadVcpu> {
        let limit = 1 << VCPU_BITS;
        if vcpu >= limit {
            return Err(BadVcpu { vcpu, limit });
        }
        Ok(Self { vcpu, last: 0, waiting: ArrayVec::new_const() })
    }

    /// A fault on `gfn` found that the page must be read in.
    #[doc(alias = "kvm_arch_setup_async_pf")]
    pub fn start(&mut self, gfn: Gfn) -> AsyncStart {
        if let Some((token, _)) = self.waiting.iter().find(|(_, waiting)| *waiting == gfn) {
            return AsyncStart::Halt(*token);
        }
        if self.waiting.is_full() {
            return AsyncStart::Full;
        }
        let token = self.next_token();
        self.waiting.push((token, gfn));
        AsyncStart::Started(token)
    }

    /// The read is over, or given up: forget the token. Returns the gfn to prefetch; `None` if
    /// there is no such token, or no more.
    #[doc(alias = "kvm_arch_async_page_ready")]
    pub fn finish(&mut self, token: AsyncToken) -> Option<Gfn> {
        let at = self.waiting.iter().position(|(waiting, _)| *waiting == token)?;
        Some(self.waiting.swap_remove(at).1)
    }

    /// Pages being read in.
    #[must_use]
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Nothing waited for?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The next token that nobody waits under. Ends, because fewer are waited under than exist.
    fn next_token(&mut self) -> AsyncToken {
        loop {
            // The number is what keeps the token of vCPU 0 from being 0, so it starts again at 1.
            self.last = if self.last < LAST_ID { self.last + 1 } else { 1 };
            let token = (self.last << VCPU_BITS) | self.vcpu;
            let token = AsyncToken(NonZeroU32::new(token).unwrap_or(NonZeroU32::MAX));
            if self.waiting.iter().all(|(waiting, _)| *waiting != token) {
                return token;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn started(pages: &mut AsyncPages, gfn: u64) -> AsyncToken {
        match pages.start(Gfn::new(gfn)) {
            AsyncStart::Started(token) => token,
            other => panic!("gfn {gfn:#x}: {other:?}"),
        }
    }

    /// KVM row B17: the number of vCPU 0's tokens is all that they are.
    #[test]
    fn tokens_are_never_zero_nor_doubled_when_the_numbers_start_again() {
        for vcpu in [0, 1, 0xfff] {
            let mut pages = AsyncPages::new(vcpu).expect("12 bits");
            // One that stays through the whole round, and one just before the wrap.
            let old = started(&mut pages, 1);
            pages.last = LAST_ID - 2;
            let mut seen = [old; 6];
            for (gfn, seen) in (2..).zip(seen.iter_mut().skip(1)) {
                *seen = started(&mut pages, gfn);
            }
            let tokens = seen.map(AsyncToken::get);
            let last = !0xfff;
            let numbers = [1 << 12, last - 0x1000u32, last, 2 << 12, 3 << 12, 4 << 12];
            assert_eq!(tokens, numbers.map(|number| number | vcpu));
            for (gfn, token) in (1..).zip(seen) {
                assert_eq!(pages.finish(token), Some(Gfn::new(gfn)));
                assert_eq!(pages.finish(token), None, "once");
            }
            assert!(pages.is_empty());
        }
    }

    #[test]
    fn a_second_fault_halts_and_a_full_vcpu_reads_at_once() {
        let mut pages = AsyncPages::new(3).expect("12 bits");
        let first = started(&mut pages, 100);
        for gfn in 101..164 {
            let _ = started(&mut pages, gfn);
        }
        assert_eq!(pages.len(), MAX_ASYNC_PAGES);
        assert_eq!(pages.start(Gfn::new(100)), AsyncStart::Halt(first));
        assert_eq!(pages.start(Gfn::new(164)), AsyncStart::Full);
        assert_eq!(pages.finish(first), Some(Gfn::new(100)));
        assert_ne!(started(&mut pages, 100), first);
        let refused = AsyncPages::new(1 << 12).expect_err("13 bits");
        assert_eq!(refused, BadVcpu { vcpu: 4096, limit: 4096 });
    }
}
