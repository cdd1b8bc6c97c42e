//! Machine checks: the banks, and what user space injects (KVM_X86_SETUP_MCE, KVM_X86_SET_MCE). Intel SDM,
//! "Machine-Check Architecture".

use crate::cpuid::Vendor;
use crate::vcpu::Vcpu;
use irqchip::Lvt;
use kvm_abi::{Errno, kvm_x86_mce};
use x86defs::{cr4, msr, vector};
use x86emu::env::Exception;

/// Banks at most, and before KVM_X86_SETUP_MCE.
const MAX_BANKS: usize = 32;
/// IA32_MCG_CAP: IA32_MCG_CTL is there.
const MCG_CTL_P: u64 = 1 << 8;
/// IA32_MCG_CAP: corrected-error interrupts.
const MCG_CMCI_P: u64 = 1 << 10;
/// IA32_MCG_CAP: software error recovery.
const MCG_SER_P: u64 = 1 << 24;
/// IA32_MCG_CAP: the number of banks; the number of extended registers.
const MCG_COUNTS: u64 = 0xff | 0xff_0000;
/// IA32_MCG_STATUS: a machine check is in progress.
const MCIP: u64 = 1 << 2;
/// IA32_MCi_CTL2: interrupt on corrected errors.
const CMCI_EN: u64 = 1 << 30;
const CMCI_THRESHOLD: u64 = 0x7fff;

/// IA32_MCi_STATUS.
mod status {
    pub const VAL: u64 = 1 << 63;
    pub const OVER: u64 = 1 << 62;
    pub const UC: u64 = 1 << 61;
    pub const PCC: u64 = 1 << 57;
    pub const S: u64 = 1 << 56;
    pub const AR: u64 = 1 << 55;
}

/// KVM_X86_GET_MCE_CAP_SUPPORTED: what KVM_X86_SETUP_MCE takes beside the number of banks.
pub fn supported(vendor: Vendor) -> u64 {
    let cmci = match vendor {
        Vendor::Intel => MCG_CMCI_P,
        Vendor::Amd => 0,
    };
    MCG_CTL_P | MCG_SER_P | cmci
}

/// One vCPU's machine-check registers.
#[derive(Clone, Debug)]
pub(crate) struct Mce {
    cap: u64,
    status: u64,
    ctl: u64,
    /// CTL, STATUS, ADDR, MISC of each bank.
    banks: [[u64; 4]; MAX_BANKS],
    ctl2: [u64; MAX_BANKS],
}

impl Default for Mce {
    fn default() -> Self {
        Mce {
            cap: MAX_BANKS as u64,
            status: 0,
            ctl: 0,
            banks: [[0; 4]; MAX_BANKS],
            ctl2: [0; MAX_BANKS],
        }
    }
}

impl Mce {
    fn count(&self) -> usize {
        (self.cap as usize & 0xff).min(MAX_BANKS)
    }

    /// The bank and which of its four registers an MSR is.
    fn register(&self, index: u32) -> Option<(usize, usize)> {
        let at = index.checked_sub(msr::MC0_CTL)? as usize;
        (at / 4 < self.count()).then_some((at / 4, at % 4))
    }

    fn ctl2_bank(&self, index: u32) -> Option<usize> {
        let bank = index.checked_sub(msr::MC0_CTL2)? as usize;
        (bank < self.count()).then_some(bank)
    }

    /// An MSR that is one of these.
    pub fn owns(index: u32) -> bool {
        matches!(
            index,
            msr::MCG_CAP
                | msr::MCG_STATUS
                | msr::MCG_CTL
                | msr::MC0_CTL2..=msr::MC31_CTL2
                | msr::MC0_CTL..msr::MC_END
        )
    }

    /// RDMSR; `None`: #GP.
    pub fn read(&self, index: u32, host: bool) -> Option<u64> {
        match index {
            msr::MCG_CAP => Some(self.cap),
            msr::MCG_STATUS => Some(self.status),
            msr::MCG_CTL => (host || self.cap & MCG_CTL_P != 0).then_some(self.ctl),
            msr::MC0_CTL2..=msr::MC31_CTL2 => {
                let there = host || self.cap & MCG_CMCI_P != 0;
                there.then_some(self.ctl2[self.ctl2_bank(index)?])
            }
            _ => {
                let (bank, register) = self.register(index)?;
                Some(self.banks[bank][register])
            }
        }
    }

    /// WRMSR; `None`: #GP. `status_writable`: AMD's HWCR.McStatusWrEn is set.
    pub fn write(
        &mut self,
        index: u32,
        value: u64,
        host: bool,
        status_writable: bool,
    ) -> Option<()> {
        let ok = |condition: bool| condition.then_some(());
        match index {
            msr::MCG_STATUS => self.status = value,
            msr::MCG_CTL => {
                ok(self.cap & MCG_CTL_P != 0 || host && value == 0)?;
                ok(value == 0 || value == u64::MAX)?;
                self.ctl = value;
            }
            msr::MC0_CTL2..=msr::MC31_CTL2 => {
                let bank = self.ctl2_bank(index)?;
                ok(self.cap & MCG_CMCI_P != 0 || host && value == 0)?;
                ok(value & !(CMCI_EN | CMCI_THRESHOLD) == 0)?;
                self.ctl2[bank] = value;
            }
            msr::MC0_CTL..msr::MC_END => {
                let (bank, register) = self.register(index)?;
                match register {
                    // All on or all off, but for bits that some systems leave off on purpose.
                    0 => ok(value == 0 || value | 1 << 10 | 1 == u64::MAX)?,
                    1 if !host => ok(value == 0 || status_writable)?,
                    _ => {}
                }
                self.banks[bank][register] = value;
            }
            _ => return None,
        }
        Some(())
    }

    /// Corrected-error interrupts are offered.
    pub fn cmci(&self) -> bool {
        self.cap & MCG_CMCI_P != 0
    }
}

/// What an injected machine check comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    /// It is in its bank, or dropped.
    Logged,
    /// LVT CMCI.
    Interrupt,
    /// #MC
    Exception,
    /// The processor shuts down.
    Shutdown,
}

impl Mce {
    /// `enabled`: CR4.MCE is set.
    fn inject(&mut self, mce: &kvm_x86_mce, enabled: bool) -> Result<Outcome, Errno> {
        let number = usize::from(mce.bank);
        if number >= self.count() || mce.status & status::VAL == 0 {
            return Err(Errno::EINVAL);
        }
        let uncorrected = mce.status & status::UC != 0;
        let bank = &mut self.banks[number];
        // Uncorrected, no action required.
        if mce.mcg_status == 0
            && mce.status & (status::PCC | status::S | status::AR) == 0
            && uncorrected
        {
            [bank[1], bank[2], bank[3]] = [mce.status, mce.addr, mce.misc];
            self.status = mce.mcg_status;
            let signal = self.cap & MCG_CMCI_P != 0 && self.ctl2[number] & CMCI_EN != 0;
            return Ok(if signal {
                Outcome::Interrupt
            } else {
                Outcome::Logged
            });
        }
        let reported = (self.cap & MCG_CTL_P == 0 || self.ctl == u64::MAX) && bank[0] == u64::MAX;
        if uncorrected && !reported {
            return Ok(Outcome::Logged);
        }
        let overflow = if bank[1] & status::VAL != 0 {
            status::OVER
        } else {
            0
        };
        if uncorrected {
            if self.status & MCIP != 0 || !enabled {
                return Ok(Outcome::Shutdown);
            }
            [bank[1], bank[2], bank[3]] = [mce.status | overflow, mce.addr, mce.misc];
            self.status = mce.mcg_status;
            return Ok(Outcome::Exception);
        }
        if bank[1] & status::VAL != 0 && bank[1] & status::UC != 0 {
            // A corrected error does not replace an uncorrected one.
            bank[1] |= status::OVER;
        } else {
            [bank[1], bank[2], bank[3]] = [mce.status | overflow, mce.addr, mce.misc];
        }
        Ok(Outcome::Logged)
    }
}

impl Vcpu {
    /// KVM_X86_SETUP_MCE: the number of banks and the features of the machine-check architecture.
    ///
    /// # Errors
    /// EINVAL for no bank or more than 32, and for features that are not supported.
    pub fn setup_mce(&mut self, cap: u64) -> Result<(), Errno> {
        let banks = cap & 0xff;
        let known = supported(self.env.msrs.vendor()) | MCG_COUNTS;
        if banks == 0 || banks > MAX_BANKS as u64 || cap & !known != 0 {
            return Err(Errno::EINVAL);
        }
        let mce = &mut self.env.msrs.mce;
        mce.cap = cap;
        if cap & MCG_CTL_P != 0 {
            mce.ctl = u64::MAX;
        }
        for bank in &mut mce.banks[..banks as usize] {
            bank[0] = u64::MAX;
        }
        mce.ctl2 = [0; MAX_BANKS];
        self.env.configure_lapic();
        Ok(())
    }

    /// KVM_X86_SET_MCE: an error in a bank.
    ///
    /// # Errors
    /// EINVAL for a bank that is not there and for an error that is not valid.
    pub fn set_mce(&mut self, mce: &kvm_x86_mce) -> Result<(), Errno> {
        let enabled = self.engine.cpu_ref().cr4 & cr4::MCE != 0;
        match self.env.msrs.mce.inject(mce, enabled)? {
            Outcome::Logged => {}
            Outcome::Interrupt => {
                if let Some(lapic) = self.env.shared.lapic() {
                    let accepted = lapic.lock().deliver_lvt(Lvt::Cmci);
                    self.env.shared.accepted(accepted);
                }
            }
            Outcome::Exception => {
                self.env.events.exception = Some(Exception {
                    vector: vector::MC,
                    error: None,
                    payload: 0,
                });
                self.env.events.exception_pending = true;
            }
            Outcome::Shutdown => self.env.events.triple_fault = true,
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: u64 = MCG_CTL_P | MCG_CMCI_P | MCG_SER_P | 10;

    fn ready() -> Mce {
        let mut m = Mce {
            cap: ALL,
            ctl: u64::MAX,
            ..Mce::default()
        };
        for bank in &mut m.banks {
            bank[0] = u64::MAX;
        }
        m
    }

    fn error(bank: u8, bits: u64) -> kvm_x86_mce {
        kvm_x86_mce {
            status: status::VAL | bits,
            addr: 0x1000,
            misc: 0x8c,
            mcg_status: 5,
            bank,
            ..Default::default()
        }
    }

    #[test]
    fn write_rules() {
        let mut m = Mce::default();
        assert_eq!(m.write(msr::MCG_CTL, u64::MAX, false, false), None);
        assert_eq!(m.write(msr::MCG_CTL, 0, true, false), Some(()));
        assert_eq!(m.write(msr::MC0_CTL2, CMCI_EN, true, false), None);
        assert_eq!(m.read(msr::MC0_CTL2, false), None);
        assert_eq!(m.read(msr::MC0_CTL2, true), Some(0));
        let mut m = ready();
        assert_eq!(m.write(msr::MCG_CTL, 5, true, false), None);
        assert_eq!(m.write(msr::MC0_CTL2, CMCI_EN | 3, false, false), Some(()));
        assert_eq!(m.write(msr::MC0_CTL2, 1 << 29, false, false), None);
        assert_eq!(m.write(msr::MC0_CTL2 + 10, 0, false, false), None);
        assert_eq!(m.write(msr::MC0_CTL + 4 * 10, 0, true, false), None);
        assert_eq!(m.write(msr::MC0_CTL + 4, 7, true, false), None);
        assert_eq!(
            m.write(msr::MC0_CTL + 4, !(1 << 10), false, false),
            Some(())
        );
        assert_eq!(m.write(msr::MC0_CTL + 1, 1, false, false), None);
        assert_eq!(m.write(msr::MC0_CTL + 1, 1, false, true), Some(()));
        assert_eq!(m.write(msr::MC0_CTL + 1, 2, true, false), Some(()));
        assert_eq!(m.write(msr::MCG_CAP, ALL, false, false), None);
    }

    #[test]
    fn uncorrected_errors_raise_mc_or_shut_down() {
        let mut m = ready();
        assert_eq!(m.inject(&error(10, 0), true), Err(Errno::EINVAL));
        let invalid = kvm_x86_mce::default();
        assert_eq!(m.inject(&invalid, true), Err(Errno::EINVAL));
        let fatal = error(1, status::UC | status::PCC);
        assert_eq!(m.inject(&fatal, false), Ok(Outcome::Shutdown), "CR4.MCE");
        assert_eq!(m.banks[1][1], 0);
        assert_eq!(m.inject(&fatal, true), Ok(Outcome::Exception));
        assert_eq!(m.banks[1], [u64::MAX, fatal.status, 0x1000, 0x8c]);
        assert_eq!(m.status, 5);
        assert_eq!(m.inject(&fatal, true), Ok(Outcome::Shutdown), "in progress");
        m.status = 0;
        assert_eq!(m.inject(&fatal, true), Ok(Outcome::Exception));
        assert_ne!(m.banks[1][1] & status::OVER, 0);
        m.status = 0;
        m.banks[2][0] = 0;
        let off = error(2, status::UC | status::PCC);
        assert_eq!(m.inject(&off, true), Ok(Outcome::Logged), "disabled");
        assert_eq!(m.banks[2][1], 0);
    }

    #[test]
    fn corrected_errors_do_not_replace_uncorrected_ones() {
        let mut m = ready();
        assert_eq!(m.inject(&error(3, 1), true), Ok(Outcome::Logged));
        assert_eq!(m.banks[3][1], status::VAL | 1);
        assert_eq!(m.inject(&error(3, 2), true), Ok(Outcome::Logged));
        assert_eq!(m.banks[3][1], status::VAL | status::OVER | 2);
        m.banks[3][1] = status::VAL | status::UC;
        assert_eq!(m.inject(&error(3, 4), true), Ok(Outcome::Logged));
        assert_eq!(m.banks[3][1], status::VAL | status::UC | status::OVER);
    }

    #[test]
    fn errors_without_action_interrupt_where_enabled() {
        let mut m = ready();
        let mut ucna = error(7, status::UC);
        ucna.mcg_status = 0;
        assert_eq!(m.inject(&ucna, true), Ok(Outcome::Logged));
        assert_eq!(m.banks[7][2], 0x1000);
        m.ctl2[7] = CMCI_EN;
        assert_eq!(m.inject(&ucna, true), Ok(Outcome::Interrupt));
        m.cap &= !MCG_CMCI_P;
        assert_eq!(m.inject(&ucna, true), Ok(Outcome::Logged));
    }
}
