//! The `anykvm` command.

fn main() {}
