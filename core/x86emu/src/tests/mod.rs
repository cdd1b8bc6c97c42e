//! Tests of the interpreter, on a fake environment and against the host CPU.

mod control;
mod arbitrary;
mod event;
mod fake;
mod hostile;
mod machine;
mod native;
mod native_ops;
mod random;
mod paging;
mod segment;
mod setup;
mod task;
mod transfer;
