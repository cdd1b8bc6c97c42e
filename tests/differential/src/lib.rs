//! Differential tests: the same code on the host CPU, in the interpreter and in the translator.
//!
//! [`forms`] makes one instruction of every form, [`sequence`] makes runs of instructions; [`suite`]
//! executes a [`case::Case`] three times and compares. `regressions/*.txt` holds what once differed,
//! a case per line ([`text`]).

pub mod campaign;
pub mod case;
pub mod forms;
pub mod guest;
pub mod host;
pub mod layout;
pub mod machine;
pub mod minimize;
pub mod random;
pub mod sequence;
pub mod suite;
pub mod text;
