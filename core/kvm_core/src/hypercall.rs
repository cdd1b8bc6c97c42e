//! KVM's hypercalls ("Linux KVM Hypercall" in the kernel documentation).

use crate::chipset;
use crate::env::VcpuEnv;
use crate::sync::yield_now;
use kvm_abi::paravirt::hypercall::{self as nr, ENOSYS, EPERM};
use x86defs::cpuid::kvm_feature;
use x86emu::env::Stop;
use x86emu::state::{CodeSize, CpuState, gpr};

/// Serves the hypercall in RAX, with arguments in RBX, RCX, RDX and RSI; the result goes to RAX.
pub(crate) fn call(env: &mut VcpuEnv, cpu: &mut CpuState) -> Result<(), Stop> {
    let wide = cpu.code_size() == CodeSize::Bits64;
    let arg = |i: usize| {
        let value = cpu.gpr[i];
        if wide { value } else { value & 0xffff_ffff }
    };
    let (number, a0, a1) = (arg(gpr::RAX), arg(gpr::RBX), arg(gpr::RCX));
    let (a2, a3) = (arg(gpr::RDX), arg(gpr::RSI));
    let result = if cpu.cpl != 0 {
        0u64.wrapping_sub(EPERM)
    } else {
        match number {
            nr::VAPIC_POLL_IRQ => 0,
            nr::KICK_CPU if env.pv_offered(kvm_feature::PV_UNHALT) => {
                kick_cpu(env, a1 as u32);
                // The other vCPU may need the CPU that this one occupies.
                yield_now();
                0
            }
            nr::SEND_IPI if env.pv_offered(kvm_feature::PV_SEND_IPI) => {
                send_ipi(env, a0, a1, a2 as u32, a3, wide)
            }
            nr::SCHED_YIELD if env.pv_offered(kvm_feature::PV_SCHED_YIELD) => {
                yield_now();
                0
            }
            _ => 0u64.wrapping_sub(ENOSYS),
        }
    };
    cpu.gpr[gpr::RAX] = if wide { result } else { result & 0xffff_ffff };
    Ok(())
}

fn kick_cpu(env: &VcpuEnv, apic_id: u32) {
    if let Some(vcpu) = env.vm.vcpus().iter().find(|v| v.id() == apic_id) {
        vcpu.unhalt();
    }
}

/// KVM_HC_SEND_IPI: a bitmap of APIC ids counted from `min`.
fn send_ipi(env: &VcpuEnv, low: u64, high: u64, min: u32, icr: u64, wide: bool) -> u64 {
    let Some(mut message) = chipset::pv_ipi(icr) else {
        return 0u64.wrapping_sub(nr::EINVAL);
    };
    let cluster = if wide { 64 } else { 32 };
    let vcpus = env.vm.vcpus();
    let mut reached = 0;
    for (bitmap, base) in [(low, min), (high, min.saturating_add(cluster))] {
        for bit in 0..cluster {
            if bitmap & (1 << bit) == 0 {
                continue;
            }
            let id = base.saturating_add(bit);
            message.dest = id;
            if let Some(vcpu) = vcpus.iter().find(|v| v.id() == id)
                && let Some(lapic) = vcpu.lapic()
            {
                let accepted = lapic.lock().accept_message(&message);
                vcpu.accepted(accepted);
                reached += u64::from(accepted.is_accepted());
            }
        }
    }
    reached
}
