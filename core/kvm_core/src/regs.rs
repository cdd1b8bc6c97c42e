//! A vCPU's state in KVM's structs: the KVM_GET_* and KVM_SET_* ioctls.

use crate::cpuid::{Cpuid, supported_xcr0};
use crate::vcpu::{Vcpu, request};
use alloc::vec::Vec;
use guestmem::PAGE_SIZE;
use kvm_abi::{
    Errno, kvm_cpuid_entry, kvm_cpuid_entry2, kvm_debugregs, kvm_dtable, kvm_fpu, kvm_lapic_state,
    kvm_mp_state, kvm_msr_entry, kvm_pre_fault_memory, kvm_regs, kvm_segment, kvm_sregs,
    kvm_sregs2, kvm_translation, kvm_xcr, kvm_xcrs, kvm_xsave, mp_state,
};
use x86defs::{cr0, cr4, dr, efer, rflags};
use x86emu::env::PhysMem;
use x86emu::state::{CpuState, DescriptorTable, Segment, XSAVE_SIZE, gpr, sreg};
use x86emu::{control, paging};

/// Offsets in the XSAVE area.
mod area {
    pub const FCW: usize = 0;
    pub const FSW: usize = 2;
    pub const FTW: usize = 4;
    pub const FOP: usize = 6;
    pub const FIP: usize = 8;
    pub const FDP: usize = 16;
    pub const MXCSR: usize = 24;
    pub const ST: usize = 32;
    pub const XMM: usize = 160;
    pub const XSTATE_BV: usize = 512;
    pub const XCOMP_BV: usize = 520;
    pub const HEADER_END: usize = 576;
}

const MXCSR_MASK: u32 = 0xffff;

/// KVM_SREGS2_FLAGS_PDPTRS_VALID
const PDPTRS_VALID: u64 = 1;

fn segment_to_abi(s: &Segment) -> kvm_segment {
    let bit = |n: u16| ((s.attr >> n) & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: s.kind(),
        present: u8::from(s.present() && !s.unusable),
        dpl: s.dpl(),
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: u8::from(s.unusable),
        padding: 0,
    }
}

fn segment_from_abi(s: &kvm_segment) -> Segment {
    let bit = |value: u8, n: u16| u16::from(value & 1) << n;
    Segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        attr: u16::from(s.type_ & 0xf)
            | bit(s.s, 4)
            | u16::from(s.dpl & 3) << 5
            | bit(s.present, 7)
            | bit(s.avl, 12)
            | bit(s.l, 13)
            | bit(s.db, 14)
            | bit(s.g, 15),
        unusable: s.unusable != 0 || s.present == 0,
    }
}

fn table_to_abi(t: &DescriptorTable) -> kvm_dtable {
    kvm_dtable {
        base: t.base,
        limit: t.limit,
        padding: [0; 3],
    }
}

fn table_from_abi(t: &kvm_dtable) -> DescriptorTable {
    DescriptorTable {
        base: t.base,
        limit: t.limit,
    }
}

fn le16(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    let mut b = [0; 8];
    b.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(b)
}

/// The registers that `kvm_sregs` and `kvm_sregs2` share, and the rest of the one that is made.
macro_rules! same_sregs {
    ($from:expr => $to:ident { $($rest:tt)* }) => {{
        let s = $from;
        $to {
            cs: s.cs, ds: s.ds, es: s.es, fs: s.fs, gs: s.gs, ss: s.ss, tr: s.tr, ldt: s.ldt,
            gdt: s.gdt, idt: s.idt,
            cr0: s.cr0, cr2: s.cr2, cr3: s.cr3, cr4: s.cr4, cr8: s.cr8,
            efer: s.efer, apic_base: s.apic_base,
            $($rest)*
        }
    }};
}

impl Vcpu {
    // General and system registers.

    /// KVM_GET_REGS.
    pub fn regs(&self) -> kvm_regs {
        let cpu = self.engine.cpu_ref();
        let g = &cpu.gpr;
        kvm_regs {
            rax: g[gpr::RAX],
            rbx: g[gpr::RBX],
            rcx: g[gpr::RCX],
            rdx: g[gpr::RDX],
            rsi: g[gpr::RSI],
            rdi: g[gpr::RDI],
            rsp: g[gpr::RSP],
            rbp: g[gpr::RBP],
            r8: g[8],
            r9: g[9],
            r10: g[10],
            r11: g[11],
            r12: g[12],
            r13: g[13],
            r14: g[14],
            r15: g[15],
            rip: cpu.rip,
            rflags: cpu.rflags,
        }
    }

    /// KVM_SET_REGS. An exception that is not being delivered yet is dropped, as in KVM.
    pub fn set_regs(&mut self, r: &kvm_regs) {
        let cpu = self.engine.cpu();
        cpu.gpr = [
            r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11,
            r.r12, r.r13, r.r14, r.r15,
        ];
        cpu.rip = r.rip;
        cpu.rflags = r.rflags & rflags::DEFINED | rflags::ONE;
        if core::mem::take(&mut self.env.events.exception_pending) {
            self.env.events.exception = None;
        }
        self.engine.state_changed();
    }

    /// KVM_GET_SREGS.
    pub fn sregs(&self) -> kvm_sregs {
        let cpu = self.engine.cpu_ref();
        let (apic_base, cr8) = self.apic_base_and_cr8();
        let mut interrupt_bitmap = [0; 4];
        if let Some(vector) = self.env.events.interrupt {
            interrupt_bitmap[usize::from(vector / 64)] = 1 << (vector % 64);
        }
        kvm_sregs {
            cs: segment_to_abi(&cpu.seg[sreg::CS]),
            ds: segment_to_abi(&cpu.seg[sreg::DS]),
            es: segment_to_abi(&cpu.seg[sreg::ES]),
            fs: segment_to_abi(&cpu.seg[sreg::FS]),
            gs: segment_to_abi(&cpu.seg[sreg::GS]),
            ss: segment_to_abi(&cpu.seg[sreg::SS]),
            tr: segment_to_abi(&cpu.tr),
            ldt: segment_to_abi(&cpu.ldtr),
            gdt: table_to_abi(&cpu.gdtr),
            idt: table_to_abi(&cpu.idtr),
            cr0: cpu.cr0,
            cr2: cpu.cr2,
            cr3: cpu.cr3,
            cr4: cpu.cr4,
            cr8,
            efer: cpu.efer,
            apic_base,
            interrupt_bitmap,
        }
    }

    /// KVM_SET_SREGS.
    ///
    /// # Errors
    /// EINVAL for control-register values that no CPU could be in.
    pub fn set_sregs(&mut self, s: &kvm_sregs) -> Result<(), Errno> {
        self.set_sregs_common(s)?;
        let cpu = self.engine.cpu();
        let pae = cr0::PG | cr0::PE;
        if cpu.cr0 & pae == pae && cpu.cr4 & cr4::PAE != 0 && cpu.efer & efer::LMA == 0 {
            let cr3 = cpu.cr3;
            if let Ok(pdptrs) = control::load_pdptrs(&mut self.env, cr3) {
                self.engine.cpu().pdptrs = pdptrs;
            }
        }
        self.env.events.interrupt = None;
        for (i, word) in s.interrupt_bitmap.iter().enumerate() {
            if *word != 0 {
                self.env.events.interrupt = Some((i * 64) as u8 + word.trailing_zeros() as u8);
                self.env.events.interrupt_acked = true;
            }
        }
        self.engine.state_changed();
        Ok(())
    }

    /// KVM_GET_SREGS2.
    pub fn sregs2(&self) -> kvm_sregs2 {
        let s = self.sregs();
        let cpu = self.engine.cpu_ref();
        let pae = cpu.cr0 & cr0::PG != 0 && cpu.cr4 & cr4::PAE != 0 && cpu.efer & efer::LMA == 0;
        same_sregs!(s => kvm_sregs2 {
            flags: if pae { PDPTRS_VALID } else { 0 },
            pdptrs: if pae { cpu.pdptrs } else { [0; 4] },
        })
    }

    /// KVM_SET_SREGS2.
    ///
    /// # Errors
    /// As KVM_SET_SREGS; EINVAL for unknown flags, and for PDPTRs without PAE paging.
    pub fn set_sregs2(&mut self, s: &kvm_sregs2) -> Result<(), Errno> {
        let given = s.flags & PDPTRS_VALID != 0;
        let pae = s.cr0 & cr0::PG != 0 && s.cr4 & cr4::PAE != 0 && s.efer & efer::LMA == 0;
        if s.flags & !PDPTRS_VALID != 0 || given && !pae {
            return Err(Errno::EINVAL);
        }
        self.set_sregs_common(&same_sregs!(s => kvm_sregs {
            interrupt_bitmap: [0; 4],
        }))?;
        if given {
            self.engine.cpu().pdptrs = s.pdptrs;
        }
        Ok(())
    }

    fn set_sregs_common(&mut self, s: &kvm_sregs) -> Result<(), Errno> {
        let mut cr4_known = self.env.features.cr4_allowed;
        if self.env.cpuid.entries().is_empty() {
            // Nobody has said yet what the processor lacks.
            cr4_known = self.env.vm.cr4_supported();
        }
        if s.cr4 & !cr4_known != 0
            || s.cr0 & !cr0::DEFINED != 0
            || (s.cr0 & cr0::PG != 0 && s.cr0 & cr0::PE == 0)
            || (s.cr0 & cr0::NW != 0 && s.cr0 & cr0::CD == 0)
        {
            return Err(Errno::EINVAL);
        }
        let efer_known =
            efer::SCE | efer::LME | efer::LMA | efer::NX | efer::FFXSR | efer::AUTOIBRS;
        if s.efer & !efer_known != 0 {
            return Err(Errno::EINVAL);
        }
        if s.efer & efer::LME != 0 && s.cr0 & cr0::PG != 0 {
            if s.cr4 & cr4::PAE == 0 || s.efer & efer::LMA == 0 {
                return Err(Errno::EINVAL);
            }
        } else if s.efer & efer::LMA != 0 || s.cs.l != 0 {
            return Err(Errno::EINVAL);
        }
        match self.env.shared.lapic() {
            Some(lapic) => {
                let mut lapic = lapic.lock();
                lapic
                    .set_base(s.apic_base, true)
                    .map_err(|_| Errno::EINVAL)?;
                lapic.set_cr8(s.cr8);
            }
            None => {
                self.env.user_apic_base = s.apic_base;
                self.env.user_cr8 = s.cr8 & 0xf;
            }
        }
        let cpu = self.engine.cpu();
        cpu.seg[sreg::CS] = segment_from_abi(&s.cs);
        cpu.seg[sreg::DS] = segment_from_abi(&s.ds);
        cpu.seg[sreg::ES] = segment_from_abi(&s.es);
        cpu.seg[sreg::FS] = segment_from_abi(&s.fs);
        cpu.seg[sreg::GS] = segment_from_abi(&s.gs);
        cpu.seg[sreg::SS] = segment_from_abi(&s.ss);
        cpu.tr = segment_from_abi(&s.tr);
        cpu.ldtr = segment_from_abi(&s.ldt);
        cpu.gdtr = table_from_abi(&s.gdt);
        cpu.idtr = table_from_abi(&s.idt);
        cpu.cr0 = s.cr0 | cr0::ET;
        cpu.cr2 = s.cr2;
        cpu.cr3 = s.cr3;
        cpu.cr4 = s.cr4;
        cpu.efer = s.efer;
        cpu.cpl = privilege(cpu);
        self.engine.state_changed();
        Ok(())
    }

    fn apic_base_and_cr8(&self) -> (u64, u64) {
        match self.env.shared.lapic() {
            Some(lapic) => {
                let lapic = lapic.lock();
                (lapic.base(), lapic.cr8())
            }
            None => (self.env.user_apic_base, self.env.user_cr8),
        }
    }

    // FPU.

    /// KVM_GET_FPU.
    pub fn fpu(&self) -> kvm_fpu {
        let a = &self.engine.cpu_ref().xsave.0;
        let bv = le64(a, area::XSTATE_BV);
        let mut fpu = kvm_fpu {
            fcw: 0x37f,
            mxcsr: u32::from_le_bytes([a[24], a[25], a[26], a[27]]),
            ..Default::default()
        };
        // A component that is in its initial state need not be in the area.
        if bv & 1 != 0 || bv == 0 {
            fpu.fcw = le16(a, area::FCW);
            fpu.fsw = le16(a, area::FSW);
            fpu.ftwx = a[area::FTW];
            fpu.last_opcode = le16(a, area::FOP);
            fpu.last_ip = le64(a, area::FIP);
            fpu.last_dp = le64(a, area::FDP);
            for (i, st) in fpu.fpr.iter_mut().enumerate() {
                st.copy_from_slice(&a[area::ST + 16 * i..][..16]);
            }
        }
        if bv & 2 != 0 || bv == 0 {
            for (i, xmm) in fpu.xmm.iter_mut().enumerate() {
                xmm.copy_from_slice(&a[area::XMM + 16 * i..][..16]);
            }
        }
        fpu
    }

    /// KVM_SET_FPU.
    pub fn set_fpu(&mut self, fpu: &kvm_fpu) {
        let a = &mut self.engine.cpu().xsave.0;
        a[area::FCW..][..2].copy_from_slice(&fpu.fcw.to_le_bytes());
        a[area::FSW..][..2].copy_from_slice(&fpu.fsw.to_le_bytes());
        a[area::FTW] = fpu.ftwx;
        a[area::FOP..][..2].copy_from_slice(&fpu.last_opcode.to_le_bytes());
        a[area::FIP..][..8].copy_from_slice(&fpu.last_ip.to_le_bytes());
        a[area::FDP..][..8].copy_from_slice(&fpu.last_dp.to_le_bytes());
        a[area::MXCSR..][..4].copy_from_slice(&(fpu.mxcsr & MXCSR_MASK).to_le_bytes());
        for (i, st) in fpu.fpr.iter().enumerate() {
            a[area::ST + 16 * i..][..16].copy_from_slice(st);
        }
        for (i, xmm) in fpu.xmm.iter().enumerate() {
            a[area::XMM + 16 * i..][..16].copy_from_slice(xmm);
        }
        a[area::XSTATE_BV] |= 3;
        self.engine.state_changed();
    }

    /// KVM_GET_XSAVE and KVM_GET_XSAVE2.
    pub fn xsave(&self) -> kvm_xsave {
        let mut out = kvm_xsave::default();
        out.region[..XSAVE_SIZE].copy_from_slice(&self.engine.cpu_ref().xsave.0);
        out
    }

    /// KVM_SET_XSAVE.
    ///
    /// # Errors
    /// EINVAL for a compacted area, components that are not offered, reserved bits.
    pub fn set_xsave(&mut self, x: &kvm_xsave) -> Result<(), Errno> {
        let r = &x.region;
        let supported = supported_xcr0(&*self.env.vm.host) | 3;
        let mxcsr = u32::from_le_bytes([r[24], r[25], r[26], r[27]]);
        if le64(r, area::XSTATE_BV) & !supported != 0
            || mxcsr & !MXCSR_MASK != 0
            || r[area::XCOMP_BV..area::HEADER_END].iter().any(|&b| b != 0)
        {
            return Err(Errno::EINVAL);
        }
        self.engine.cpu().xsave.0.copy_from_slice(&r[..XSAVE_SIZE]);
        self.engine.state_changed();
        Ok(())
    }

    /// KVM_GET_XCRS.
    pub fn xcrs(&self) -> kvm_xcrs {
        let mut out = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        out.xcrs[0] = kvm_xcr {
            xcr: 0,
            reserved: 0,
            value: self.engine.cpu_ref().xcr0,
        };
        out
    }

    /// KVM_SET_XCRS.
    ///
    /// # Errors
    /// EINVAL for values that XSETBV refuses.
    pub fn set_xcrs(&mut self, x: &kvm_xcrs) -> Result<(), Errno> {
        if x.flags != 0 || x.nr_xcrs as usize > x.xcrs.len() {
            return Err(Errno::EINVAL);
        }
        for xcr in &x.xcrs[..x.nr_xcrs as usize] {
            if xcr.xcr == 0 {
                if !control::valid_xcr0(xcr.value, self.env.features.xcr0_allowed) {
                    return Err(Errno::EINVAL);
                }
                self.engine.cpu().xcr0 = xcr.value;
                self.engine.state_changed();
                break;
            }
        }
        Ok(())
    }

    // MSRs and CPUID.

    /// KVM_GET_MSRS: reads MSRs until one is unknown; how many were read.
    pub fn msrs(&mut self, entries: &mut [kvm_msr_entry]) -> usize {
        for (i, entry) in entries.iter_mut().enumerate() {
            match self.env.get_msr(self.engine.cpu_ref(), entry.index, true) {
                Ok(value) => entry.data = value,
                Err(_) => return i,
            }
        }
        entries.len()
    }

    /// KVM_SET_MSRS: writes MSRs until one is refused; how many were written.
    pub fn set_msrs(&mut self, entries: &[kvm_msr_entry]) -> usize {
        let mut done = 0;
        for entry in entries {
            let cpu = self.engine.cpu();
            if self
                .env
                .set_msr(cpu, entry.index, entry.data, true)
                .is_err()
            {
                log::debug!("MSR {:#x} refused from user space", entry.index);
                break;
            }
            done += 1;
        }
        self.engine.state_changed();
        done
    }

    /// KVM_SET_CPUID2. After the first KVM_RUN only what is set already can be set.
    ///
    /// # Errors
    /// E2BIG, ENOMEM, EINVAL for register state that is not offered, and for a change that comes too late.
    pub fn set_cpuid(&mut self, entries: &[kvm_cpuid_entry2]) -> Result<(), Errno> {
        let mut cpuid = Cpuid::new(entries)?;
        if self.env.vm.settings.hlt_in_guest() {
            // Nobody would hear of a halted vCPU that it is to be woken.
            cpuid.hide_pv_unhalt();
        }
        if self.env.has_run {
            return if self.env.cpuid.same(&cpuid) {
                Ok(())
            } else {
                Err(Errno::EINVAL)
            };
        }
        let host = supported_xcr0(&*self.env.vm.host);
        if cpuid.xcr0() & !(host | 3) != 0 {
            return Err(Errno::EINVAL);
        }
        self.env.set_cpuid(cpuid);
        self.engine.state_changed();
        Ok(())
    }

    /// KVM_SET_CPUID, whose entries have no subleaves.
    ///
    /// # Errors
    /// As KVM_SET_CPUID2.
    pub fn set_cpuid1(&mut self, entries: &[kvm_cpuid_entry]) -> Result<(), Errno> {
        let mut list = Vec::new();
        list.try_reserve_exact(entries.len())
            .map_err(|_| Errno::ENOMEM)?;
        list.extend(entries.iter().map(|e| kvm_cpuid_entry2 {
            function: e.function,
            eax: e.eax,
            ebx: e.ebx,
            ecx: e.ecx,
            edx: e.edx,
            ..Default::default()
        }));
        self.set_cpuid(&list)
    }

    /// KVM_GET_CPUID2: with the bits that follow the vCPU's state as they are now.
    pub fn cpuid(&self) -> Vec<kvm_cpuid_entry2> {
        let base = self.env.apic_base();
        self.env.cpuid.now(self.engine.cpu_ref(), base)
    }

    /// KVM_CAP_ENFORCE_PV_FEATURE_CPUID: KVM's own MSRs and hypercalls are there only where the guest's CPUID
    /// says so.
    pub fn enforce_pv_cpuid(&mut self, on: bool) {
        self.env.enforce_pv_cpuid = on;
    }

    // Interrupts and events.

    /// KVM_GET_LAPIC.
    ///
    /// # Errors
    /// EINVAL without an in-kernel local APIC.
    pub fn lapic(&self) -> Result<kvm_lapic_state, Errno> {
        let now = self.env.now();
        let lapic = self.env.shared.lapic().ok_or(Errno::EINVAL)?;
        Ok(kvm_lapic_state {
            regs: lapic.lock().save(self.env.vm.wide_apic_ids(), now),
        })
    }

    /// KVM_SET_LAPIC.
    ///
    /// # Errors
    /// EINVAL without an in-kernel local APIC, or when the state names another vCPU.
    pub fn set_lapic(&mut self, state: &kvm_lapic_state) -> Result<(), Errno> {
        let now = self.env.now();
        let wide = self.env.vm.wide_apic_ids();
        self.env
            .shared
            .lapic()
            .ok_or(Errno::EINVAL)?
            .lock()
            .restore(&state.regs, wide, now)
            .map_err(|_| Errno::EINVAL)?;
        self.env.arm_timer();
        Ok(())
    }

    /// KVM_INTERRUPT: queues an external interrupt; only without an in-kernel 8259.
    ///
    /// # Errors
    /// EINVAL for a vector above 255, ENXIO with an irqchip, EEXIST when one is queued already.
    pub fn interrupt(&mut self, irq: u32) -> Result<(), Errno> {
        let vector = u8::try_from(irq).map_err(|_| Errno::EINVAL)?;
        if self.env.vm.pic_in_kernel() {
            return Err(Errno::ENXIO);
        }
        if self.env.shared.lapic().is_some() {
            if self.env.events.extint.is_some() {
                return Err(Errno::EEXIST);
            }
            self.env.events.extint = Some(vector);
            return Ok(());
        }
        if self.env.events.interrupt.is_some() {
            return Err(Errno::EEXIST);
        }
        self.env.events.interrupt = Some(vector);
        self.env.events.interrupt_acked = false;
        Ok(())
    }

    /// KVM_NMI.
    pub fn nmi(&mut self) {
        self.env.shared.queue_nmi();
    }

    /// KVM_GET_MP_STATE.
    pub fn mp_state(&mut self) -> kvm_mp_state {
        self.process_requests();
        kvm_mp_state {
            mp_state: self.env.mp_state,
        }
    }

    /// KVM_SET_MP_STATE.
    ///
    /// # Errors
    /// EINVAL for unknown states, and for all but RUNNABLE without an in-kernel local APIC.
    pub fn set_mp_state(&mut self, state: &kvm_mp_state) -> Result<(), Errno> {
        // INIT does not come through in SMM.
        let smm = self.env.smm || self.env.events.smi;
        let init = matches!(
            state.mp_state,
            mp_state::INIT_RECEIVED | mp_state::SIPI_RECEIVED
        );
        if smm && init {
            return Err(Errno::EINVAL);
        }
        let in_kernel = self.env.shared.lapic().is_some();
        match state.mp_state {
            mp_state::RUNNABLE => {}
            mp_state::UNINITIALIZED | mp_state::INIT_RECEIVED | mp_state::HALTED if in_kernel => {}
            mp_state::SIPI_RECEIVED if in_kernel => {
                self.env.mp_state = mp_state::INIT_RECEIVED;
                let vector = self.env.shared.sipi_vector();
                self.env.shared.queue_sipi(vector);
                return Ok(());
            }
            _ => return Err(Errno::EINVAL),
        }
        self.env.mp_state = state.mp_state;
        Ok(())
    }

    // Debugging.

    /// KVM_GET_DEBUGREGS.
    pub fn debug_regs(&self) -> kvm_debugregs {
        let cpu = self.engine.cpu_ref();
        kvm_debugregs {
            db: cpu.dr,
            dr6: cpu.dr6,
            dr7: cpu.dr7,
            ..Default::default()
        }
    }

    /// KVM_SET_DEBUGREGS.
    ///
    /// # Errors
    /// EINVAL for unknown flags and for bits above 31 in DR6 and DR7.
    pub fn set_debug_regs(&mut self, d: &kvm_debugregs) -> Result<(), Errno> {
        if d.flags != 0 || d.dr6 >> 32 != 0 || d.dr7 >> 32 != 0 {
            return Err(Errno::EINVAL);
        }
        let cpu = self.engine.cpu();
        cpu.dr = d.db;
        cpu.dr6 = d.dr6;
        cpu.dr7 = d.dr7 | dr::DR7_FIXED;
        self.engine.state_changed();
        Ok(())
    }

    /// KVM_TRANSLATE. Without paging the address is its own translation as a whole, of which KVM takes all
    /// ones for none.
    pub fn translate(&mut self, linear: u64) -> kvm_translation {
        let gpa = if self.engine.cpu_ref().cr0 & cr0::PG != 0 {
            paging::peek(self.engine.cpu_ref(), &mut self.env, linear).map_or(u64::MAX, |m| m.gpa)
        } else {
            linear
        };
        kvm_translation {
            linear_address: linear,
            physical_address: gpa,
            valid: u8::from(gpa != u64::MAX),
            writeable: 1,
            ..Default::default()
        }
    }

    /// KVM_PRE_FAULT_MEMORY: brings guest memory in, page by page; `range` becomes what is left.
    ///
    /// # Errors
    /// EINVAL; ENOENT where there is no memslot, EFAULT where the host has no memory, if that is at once so.
    pub fn pre_fault(&mut self, range: &mut kvm_pre_fault_memory) -> Result<(), Errno> {
        let aligned = (range.gpa | range.size).is_multiple_of(PAGE_SIZE);
        let ends = range.gpa.checked_add(range.size);
        if range.flags != 0 || !aligned || ends.is_none_or(|end| end <= range.gpa) {
            return Err(Errno::EINVAL);
        }
        let mut done = false;
        while range.size != 0 {
            if self.kick_pending() {
                return if done { Ok(()) } else { Err(Errno::EINTR) };
            }
            self.env.host_fault = false;
            let page = self.env.host_ptr(range.gpa, 1, false);
            if page.is_none() {
                let fault = core::mem::take(&mut self.env.host_fault);
                return match (done, fault) {
                    (true, _) => Ok(()),
                    (false, true) => Err(Errno::EFAULT),
                    (false, false) => Err(Errno::ENOENT),
                };
            }
            range.gpa += PAGE_SIZE;
            range.size -= PAGE_SIZE;
            done = true;
        }
        Ok(())
    }

    // Time.

    /// KVM_GET_TSC_KHZ.
    pub fn tsc_khz(&self) -> u32 {
        self.env.tsc_khz
    }

    /// KVM_SET_TSC_KHZ: only the host's frequency, within 250 ppm, can be had; 0 means just that.
    ///
    /// # Errors
    /// EINVAL.
    pub fn set_tsc_khz(&mut self, khz: u32) -> Result<(), Errno> {
        let host = self.env.vm.host.tsc_khz();
        let khz = if khz == 0 { host } else { khz };
        if !crate::settings::tsc_khz_served(khz, host) {
            return Err(Errno::EINVAL);
        }
        self.env.tsc_khz = khz;
        Ok(())
    }

    /// KVM_KVMCLOCK_CTRL: tells the guest that it was paused.
    ///
    /// # Errors
    /// EINVAL when it uses no kvmclock.
    pub fn kvmclock_ctrl(&mut self) -> Result<(), Errno> {
        if self.env.set_guest_stopped(self.engine.cpu_ref()) {
            Ok(())
        } else {
            Err(Errno::EINVAL)
        }
    }

    /// Whether a kick is waiting to make [`Vcpu::run`] return.
    pub fn kick_pending(&self) -> bool {
        self.env.shared.has_requests(request::USER)
    }
}

/// The privilege level that a set of segment registers stands for.
fn privilege(cpu: &CpuState) -> u8 {
    if !cpu.protected() {
        0
    } else if cpu.v86() {
        3
    } else {
        cpu.seg[sreg::SS].dpl()
    }
}
