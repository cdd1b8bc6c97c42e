//! Tests of the interpreter, on a fake environment and against the host CPU.

mod fake;
mod native;
mod native_ops;
mod setup;
