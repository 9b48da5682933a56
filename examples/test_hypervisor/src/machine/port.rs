//! I/O ports.

/// Write a byte.
pub fn write8(port: u16, value: u8) {
    // SAFETY: OUT touches no memory. The ports that this program writes (serial line, timer, debug
    // exits) are of devices that do no DMA.
    unsafe { x86::io::outb(port, value) }
}

/// Read a byte.
pub fn read8(port: u16) -> u8 {
    // SAFETY: as for `write8`.
    unsafe { x86::io::inb(port) }
}

/// Write four bytes.
pub fn write32(port: u16, value: u32) {
    // SAFETY: as for `write8`.
    unsafe { x86::io::outl(port, value) }
}
