//! System-management mode on every engine: the same addresses hold other code and other data there.
#![expect(unsafe_code, reason = "memory regions are raw addresses")]

mod machine;

use iced_x86::code_asm::*;
use kvm_bindings::{Msrs, kvm_msr_entry, kvm_userspace_memory_region};
use machine::{ENTRY, Machine, Memory, each, expect_out};

const MSR_SMBASE: u32 = 0x9e;

#[test]
fn code_and_data_of_smm_are_not_the_others() {
    each(|engine| {
        let m = Machine::new(engine, false);
        let smm = Memory::new();
        // SAFETY: `smm` outlives the vCPU, and nothing runs after it is dropped.
        unsafe {
            m.vm.set_user_memory_region(kvm_userspace_memory_region {
                slot: 1 << 16,
                flags: 0,
                guest_phys_addr: 0,
                memory_size: 0x1_0000,
                userspace_addr: smm.0 as u64,
            })
            .unwrap();
        }
        m.load(ENTRY, 16, |a| {
            let mut again = a.create_label();
            a.set_label(&mut again).unwrap();
            a.mov(al, byte_ptr(0x9000)).unwrap();
            a.call(0x8000).unwrap();
            a.add(al, 1).unwrap();
            a.mov(byte_ptr(0x9000), al).unwrap();
            a.out(1, al).unwrap();
            a.jmp(again).unwrap();
        });
        m.load(0x8000, 16, |a| {
            a.mov(bx, 0x11).unwrap();
            a.add(al, 1).unwrap();
            a.ret().unwrap();
        });
        // The handler, at the same address as the routine.
        let mut handler = CodeAssembler::new(16).unwrap();
        handler.mov(al, byte_ptr(0x9000)).unwrap();
        handler.add(al, 3).unwrap();
        handler.mov(byte_ptr(0x9000), al).unwrap();
        handler.out(2, al).unwrap();
        handler.rsm().unwrap();
        smm.write(0x8000, &handler.assemble(0x8000).unwrap());
        let mut v = m.vcpu(0);
        let base = [kvm_msr_entry {
            index: MSR_SMBASE,
            data: 0,
            ..Default::default()
        }];
        assert_eq!(v.set_msrs(&Msrs::from_entries(&base).unwrap()).unwrap(), 1);
        let (mut ordinary, mut inside) = (0u8, 0u8);
        for _ in 0..30 {
            for _ in 0..3 {
                ordinary = ordinary.wrapping_add(2);
                assert_eq!(expect_out(&mut v, 1), [ordinary]);
            }
            v.smi().unwrap();
            inside = inside.wrapping_add(3);
            assert_eq!(expect_out(&mut v, 2), [inside]);
            assert_eq!(v.get_kvm_run().flags, 1);
        }
        ordinary = ordinary.wrapping_add(2);
        assert_eq!(expect_out(&mut v, 1), [ordinary]);
        assert_eq!(v.get_kvm_run().flags, 0);
        assert_eq!((m.memory.u8(0x9000), smm.u8(0x9000)), (ordinary, inside));
        drop(v);
        drop(m);
        drop(smm);
    });
}
