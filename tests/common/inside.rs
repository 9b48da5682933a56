//! Is this thread inside the library, and may what it calls there allocate? For a test that refuses
//! memory: hosts and tests get theirs all the same.

use std::cell::Cell;

/// Where a thread is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Inside {
    /// In a test or its host.
    #[default]
    Test,
    /// In a call that may fail for want of memory.
    Fallible,
    /// In a call that cannot fail, and must not allocate.
    Infallible,
}

thread_local! {
    static WHERE: Cell<Inside> = const { Cell::new(Inside::Test) };
}

/// Where the thread is; in a test when it ends.
pub fn inside() -> Inside {
    WHERE.try_with(Cell::get).unwrap_or_default()
}

fn within<R>(place: Inside, work: impl FnOnce() -> R) -> R {
    /// Goes back also when the work panics.
    struct Back(Inside);
    impl Drop for Back {
        fn drop(&mut self) {
            WHERE.set(self.0);
        }
    }
    let _back = Back(WHERE.replace(place));
    work()
}

/// Make a call that may fail for want of memory.
pub fn fallible<R>(call: impl FnOnce() -> R) -> R {
    within(Inside::Fallible, call)
}

/// Make a call that cannot fail.
pub fn infallible<R>(call: impl FnOnce() -> R) -> R {
    within(Inside::Infallible, call)
}

/// The library calls its host.
pub fn host<R>(call: impl FnOnce() -> R) -> R {
    within(Inside::Test, call)
}
