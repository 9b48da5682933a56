//! What a library would have given: panics. Functions of memory are in `mem`.

use core::panic::PanicInfo;

use super::exit::{Status, exit};
use super::serial;

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let message = info.message();
    serial::print_anyway(format_args!("\npanic: {message}"));
    if let Some(place) = info.location() {
        serial::print_anyway(format_args!(" ({place})"));
    }
    serial::print_anyway(format_args!("\n"));
    exit(Status::Failed)
}

/// Named by the unwind tables of the prebuilt `core`; nothing unwinds here.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}

/// As above.
#[unsafe(no_mangle)]
extern "C" fn _Unwind_Resume() -> ! {
    exit(Status::Failed)
}
