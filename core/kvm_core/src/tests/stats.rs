//! What KVM_GET_STATS_FD's descriptor reads.

use super::fake::{Cpu, out, touch, vm, with_code};
use crate::shared_memory::tests::Pages;
use crate::stats::StatsImage;
use kvm_abi::Errno;
use kvm_abi::run::reason;
use std::collections::BTreeMap;
use std::string::{String, ToString};
use std::vec;
use std::vec::Vec;

fn u32_at(bytes: &[u8], at: usize) -> usize {
    u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap()) as usize
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&b| b == 0).unwrap();
    core::str::from_utf8(&bytes[..end]).unwrap().to_string()
}

/// The name, and the values by name; what the kernel's own test of the descriptor checks, checked.
fn parse(image: &StatsImage) -> (String, BTreeMap<String, Vec<u64>>) {
    let mut bytes = vec![0; 1 << 16];
    let n = image.read(0, &mut bytes);
    assert_eq!(n, image.size());
    bytes.truncate(n);
    let name_size = u32_at(&bytes, 4);
    let (count, id) = (u32_at(&bytes, 8), u32_at(&bytes, 12));
    let (descs, data) = (u32_at(&bytes, 16), u32_at(&bytes, 20));
    assert!(count > 0 && descs >= 24 && id >= 24);
    let desc_size = 16 + name_size;
    assert!(descs + desc_size * count <= data);
    let mut values = BTreeMap::new();
    let mut covered = 0;
    for desc in bytes[descs..data].chunks(desc_size) {
        let flags = u32_at(desc, 0);
        assert!(flags & 0xf <= 4 && flags >> 4 & 0xf <= 4 && flags >> 8 & 0xf <= 1);
        let exponent = i16::from_ne_bytes([desc[4], desc[5]]);
        let seconds = flags >> 4 & 0xf == 2;
        assert!(if seconds {
            exponent <= 0
        } else {
            exponent >= 0
        });
        let size = usize::from(u16::from_ne_bytes([desc[6], desc[7]]));
        let offset = u32_at(desc, 8);
        assert_eq!(u32_at(desc, 12), 0);
        assert!(size > 0);
        let at = data + offset;
        let value = bytes[at..at + size * 8]
            .chunks(8)
            .map(|c| u64::from_ne_bytes(c.try_into().unwrap()))
            .collect();
        covered += size * 8;
        values.insert(text(&desc[16..]), value);
    }
    assert_eq!(values.len(), count, "names are distinct");
    assert_eq!(data + covered, n);
    (text(&bytes[id..id + name_size]), values)
}

#[test]
fn counters_count() {
    let vm = vm();
    // Memory ends at 0x8000.
    let code = [out(1), touch(0x9000), out(2), Vec::from([0xf4])].concat();
    with_code(&vm, 8, &code);
    let mut cpu = Cpu::new(&vm, 3);
    cpu.start(0x1000);
    let image = StatsImage::of_vcpu(cpu.vcpu.shared(), 77);
    let (name, before) = parse(&image);
    assert_eq!(name, "kvm-77/vcpu-3");
    assert!(before.values().flatten().all(|&v| v == 0));
    for expected in [reason::IO, reason::MMIO, reason::IO, reason::HLT] {
        assert_eq!(cpu.run(), expected);
    }
    cpu.vcpu.shared().user_kick();
    cpu.vcpu.run().unwrap_err();
    let (_, after) = parse(&image);
    let get = |name: &str| after[name][0];
    assert_eq!((get("io_exits"), get("mmio_exits")), (2, 1));
    assert_eq!((get("halt_exits"), get("signal_exits")), (1, 1));
    assert_eq!(get("insn_emulation"), 3);
    assert!(get("exits") >= 4);
    assert_eq!(get("irq_injections"), 0);
    assert_eq!(get("blocking"), 0);
    assert_eq!(after["halt_wait_hist"].len(), 32);
}

#[test]
fn sleeping_is_counted() {
    let vm = vm();
    vm.create_irqchip().unwrap();
    with_code(&vm, 8, &[0xf4]);
    let mut cpu = Cpu::new(&vm, 0);
    cpu.start(0x1000);
    // Nobody wakes it: the sleep ends with a signal.
    cpu.vcpu.run().unwrap_err();
    let (_, values) = parse(&StatsImage::of_vcpu(cpu.vcpu.shared(), 1));
    assert_eq!(values["halt_wait_hist"].iter().sum::<u64>(), 1);
    assert_eq!(values["halt_wakeup"], [0]);
    assert_eq!(values["halt_exits"], [1]);
}

#[test]
fn of_a_vm() {
    let vm = vm();
    let image = StatsImage::of_vm(&vm, 4_000_000_000);
    let (name, values) = parse(&image);
    assert_eq!(name, "kvm-4000000000");
    assert_eq!(values["remote_tlb_flush"], [0]);
    with_code(&vm, 8, &[]);
    assert_eq!(parse(&image).1["remote_tlb_flush"], [1]);
}

#[test]
fn an_image_in_shared_memory_is_live() {
    let vm = vm();
    with_code(&vm, 8, &[out(1), out(2)].concat());
    let mut cpu = Cpu::new(&vm, 0);
    cpu.start(0x1000);
    cpu.run();
    let image = StatsImage::of_vcpu(cpu.vcpu.shared(), 9);
    assert_eq!(image.share(Pages::new(0)), Err(Errno::EINVAL));
    let pages = Pages::new(1);
    image.share(pages.clone()).unwrap();
    assert_eq!(image.share(pages.clone()), Err(Errno::EEXIST));
    let same = || {
        let mut shared = vec![0; image.size()];
        pages.window().read(0, &mut shared);
        let mut read = vec![0; image.size()];
        image.read(0, &mut read);
        assert_eq!(shared, read);
        parse(&image).1["io_exits"][0]
    };
    assert_eq!(same(), 1);
    cpu.run();
    assert_eq!(same(), 2);
}

#[test]
fn any_part_of_the_image() {
    let vm = vm();
    let cpu = Cpu::new(&vm, 0);
    let image = StatsImage::of_vcpu(cpu.vcpu.shared(), 1);
    let mut whole = vec![0; image.size() + 10];
    assert_eq!(image.read(0, &mut whole), image.size());
    for (offset, len) in [(0, 1), (23, 2), (24, 48), (70, 100), (image.size() - 8, 8)] {
        let mut part = vec![0; len];
        assert_eq!(image.read(offset as u64, &mut part), len);
        assert_eq!(part, whole[offset..offset + len]);
    }
    let end = image.size() as u64;
    assert_eq!(image.read(end - 3, &mut [0; 8]), 3);
    assert_eq!(image.read(end, &mut [0; 8]), 0);
    assert_eq!(image.read(u64::MAX, &mut [0; 8]), 0);
}
