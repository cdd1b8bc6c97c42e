//! Paging: formats, permissions, flushes.

use conformance::asm::*;
use conformance::layout::*;
use conformance::tables::*;
use conformance::{Machine, asm, each};
use iced_x86::code_asm::*;

#[test]
fn hello() {
    each(|engine| {
        let m = Machine::new(engine);
        m.load(ENTRY, 64, |a| {
            report_value(a, 7);
            attempt(a, |a| asm!(a; mov(eax, dword_ptr(0x5000_0000u64));));
            attempt(a, |a| asm!(a; ud2();));
            end(a);
        });
        let mut v = m.long(0, ENTRY);
        assert_eq!(m.finish(&mut v), [7]);
        assert_eq!(m.vectors(), [(14, 0), (6, 0)]);
    });
}
