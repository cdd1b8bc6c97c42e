//! Where things are in the guest's memory. Everything is identity-mapped by default.

/// Bytes of guest memory, from guest-physical address 0.
pub const MEMORY: u64 = 64 << 20;
/// Real-mode programs.
pub const REAL: u64 = 0x1000;
/// The global descriptor table, see [`crate::tables`].
pub const GDT: u64 = 0x2000;
/// The 64-bit interrupt descriptor table.
pub const IDT: u64 = 0x3000;
/// The 64-bit task state segment.
pub const TSS: u64 = 0x4000;
/// 32-bit task state segments, 0x100 bytes each.
pub const TSS32: u64 = 0x4400;
/// The 64-bit entries of the vectors, 16 bytes each.
pub const STUBS: u64 = 0x5000;
/// What they jump to.
pub const COMMON: u64 = 0x6000;
/// The end of user code, vector 0x80.
pub const USER_END: u64 = 0x6400;
/// 32-bit: what the entries jump to.
pub const COMMON32: u64 = 0x6800;
/// The 32-bit entries of the vectors.
pub const STUBS32: u64 = 0x7000;
/// The exceptions so far: a count, and from [`LOG_FIRST`] records of eight quadwords.
pub const LOG: u64 = 0x8000;
/// The first record.
pub const LOG_FIRST: u64 = 0x8040;
/// The most records.
pub const LOG_MAX: u64 = 100;
/// The 32-bit interrupt descriptor table.
pub const IDT32: u64 = 0xa000;
/// Where the kernel goes on when user code ends.
pub const USER_RETURN: u64 = 0xa800;
/// The top of the second stack of the interrupt stack table.
pub const IST2: u64 = 0xc000;
/// The top of the first stack of the interrupt stack table.
pub const IST1: u64 = 0xd000;
/// The top of the stack for exceptions of user code.
pub const RSP0: u64 = 0xe000;
/// The top of the kernel's stack.
pub const STACK: u64 = 0xf000;
/// Programs.
pub const ENTRY: u64 = 0x1_0000;
/// Page tables, to [`DATA`].
pub const TABLES: u64 = 0x2_0000;
/// Page tables of tests with many address spaces.
pub const MORE_TABLES: u64 = 40 << 20;
/// Their end.
pub const MORE_TABLES_END: u64 = 48 << 20;
/// Free for tests, to 1 MiB.
pub const DATA: u64 = 0x4_0000;
/// Second programs: user code, other vCPUs.
pub const SECOND: u64 = 0x8_0000;
/// The top of user code's stack.
pub const USER_STACK: u64 = 0x9_f000;
/// Stacks of application processors, downwards from here + 4096 * (number + 1).
pub const AP_STACKS: u64 = 0x10_0000;

/// A value to report.
pub const PORT_REPORT: u16 = 0x10;
/// The program is done.
pub const PORT_END: u16 = 0xf4;
/// An exception that nobody asked for.
pub const PORT_UNEXPECTED: u16 = 0xf5;
/// The host's part: a test can act at writes to it and answer reads.
pub const PORT_HOST: u16 = 0x11;
