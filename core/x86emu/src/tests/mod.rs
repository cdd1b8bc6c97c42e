//! Tests of the interpreter, on a fake environment and against the host CPU.

mod arbitrary;
mod by_hand;
mod control;
mod event;
mod fake;
mod hostile;
mod machine;
#[path = "../../../../homes/home_user/src/native.rs"]
mod native;
mod native_ops;
mod paging;
mod random;
mod segment;
mod setup;
mod smm;
mod speed;
mod task;
mod transfer;
mod vectors;
