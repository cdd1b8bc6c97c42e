//! KVM_GET_NESTED_STATE and KVM_SET_NESTED_STATE where no guest can have guests: the state is a header that
//! says so, in the format of the host's vendor, as KVM has it for a vCPU without VMX or SVM.

use crate::cpuid::Vendor;
use crate::vcpu::Vcpu;
use kvm_abi::{Errno, kvm_nested_state, nested_state};

impl Vcpu {
    /// The header.
    pub fn nested_state(&self) -> kvm_nested_state {
        let mut state = kvm_nested_state {
            size: size_of::<kvm_nested_state>() as u32,
            ..Default::default()
        };
        match self.env.msrs.vendor() {
            Vendor::Intel => {
                state.format = nested_state::FORMAT_VMX;
                // No VMXON region, no current VMCS.
                state.hdr[..2].fill(u64::MAX);
            }
            Vendor::Amd => {
                state.format = nested_state::FORMAT_SVM;
                state.flags = nested_state::GIF_SET;
            }
        }
        state
    }

    /// Accepts what says that there is no nested guest.
    ///
    /// # Errors
    /// EINVAL for anything else.
    pub fn set_nested_state(&mut self, state: &kvm_nested_state) -> Result<(), Errno> {
        let none = self.nested_state();
        let same = state.format == none.format
            && state.flags == none.flags
            && state.size >= none.size
            && (none.format != nested_state::FORMAT_VMX || state.hdr[..2] == none.hdr[..2]);
        if same { Ok(()) } else { Err(Errno::EINVAL) }
    }
}
