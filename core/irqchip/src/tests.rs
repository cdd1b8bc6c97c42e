//! Tests of the chipset side, and of everything against hostile input.

mod hostile;
mod ioapic;
mod pic;
mod pit;
mod routing;
