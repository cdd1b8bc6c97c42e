//! System-management mode: an SMI's arrival and RSM. The registers' side is [`x86emu::smm`]; here is what is
//! around them: memory, NMIs, what waits for the end.

use crate::env::VcpuEnv;
use crate::vcpu::Vcpu;
use x86defs::cpuid::ext1_edx;
use x86emu::env::{Exit, Stop};
use x86emu::smm::{self, AREA_OFFSET, AREA_SIZE};
use x86emu::state::CpuState;

impl Vcpu {
    /// KVM_SMI.
    pub fn smi(&mut self) {
        self.env.shared.queue_smi();
    }

    /// Puts the vCPU in or out of SMM; its registers stay. What it sees of memory is other memory.
    pub(crate) fn set_smm(&mut self, smm: bool) {
        self.engine.cpu().smm = smm;
        self.env.smm = smm;
        self.engine.state_changed();
    }

    /// Takes an SMI: the state goes to memory, and the handler is next.
    pub(crate) fn enter_smm(&mut self) {
        self.env.msrs.count_smi();
        let smbase = self.env.msrs.smbase();
        let cpu = self.engine.cpu();
        let area = smm::save(cpu, smbase as u32, self.env.smm_area_is_long());
        self.env.smm_inside_nmi = cpu.nmi_blocked;
        smm::enter(cpu, smbase as u32);
        self.set_smm(true);
        let at = smbase.wrapping_add(AREA_OFFSET);
        let env = &mut self.env;
        if !env.smram.write(&env.vm.smram, at, &area) {
            log::warn!(
                "vcpu {}: no RAM for the state that an SMI saves, at {at:#x}",
                env.shared.id()
            );
        }
    }
}

impl VcpuEnv {
    /// The processor has long mode, so the area has room for it.
    fn smm_area_is_long(&self) -> bool {
        self.features.ext1_edx & ext1_edx::LM != 0
    }

    /// RSM.
    pub fn leave_smm(&mut self, cpu: &mut CpuState) -> Result<(), Stop> {
        let at = self.msrs.smbase().wrapping_add(AREA_OFFSET);
        let mut area = [0; AREA_SIZE];
        if !self.smram.read(&self.vm.smram, at, &mut area) {
            return Err(Stop::Exit(Exit::EmulationFailed));
        }
        let long = self.smm_area_is_long();
        // Page tables are in ordinary memory from here on.
        self.smm = false;
        match smm::resume(cpu, self, &area, long) {
            Ok(smbase) => self.msrs.set_smbase(smbase.into()),
            Err(stop) => {
                self.smm = true;
                return Err(stop);
            }
        }
        cpu.nmi_blocked = core::mem::take(&mut self.smm_inside_nmi);
        let waiting = &self.events;
        if waiting.smi || waiting.latched_init || waiting.nmis != 0 {
            self.shared.kick();
        }
        Ok(())
    }
}
