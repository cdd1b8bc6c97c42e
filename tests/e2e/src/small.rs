//! Guests of a few instructions, and machines for them.
