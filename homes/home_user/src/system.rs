//! What `/dev/kvm` itself is: capabilities, CPUID, MSR lists, new VMs.

use crate::abi;
use crate::host::{Bare, UserHost};
use crate::vm::Vm;
use kvm_abi::{Errno, cap};
use kvm_bindings::{CpuId, MsrList, Msrs, kvm_cpuid_entry2};
use kvm_core::cpuid::{self, Vendor};
use kvm_core::engine::{Engine, EngineError};
use kvm_core::host::Host;
use kvm_core::interp_engine::InterpEngine;
use kvm_core::msr;
use std::sync::Arc;

/// Which engine executes guest code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineKind {
    /// The binary translator.
    Jit,
    /// The interpreter: slow, and the reference.
    Interp,
}

/// The system-wide part of KVM.
#[derive(Clone, Debug)]
pub struct System {
    engine: EngineKind,
}

impl System {
    /// KVM with the given engine.
    ///
    /// # Errors
    /// EOPNOTSUPP when this machine lacks what the engine needs.
    pub fn new(engine: EngineKind) -> Result<Self, Errno> {
        Ok(System { engine })
    }

    /// KVM_GET_API_VERSION.
    pub fn get_api_version(&self) -> i32 {
        kvm_abi::KVM_API_VERSION as i32
    }

    /// KVM_CHECK_EXTENSION for a KVM_CAP_* number.
    pub fn check_extension_int(&self, cap: u32) -> i32 {
        kvm_abi::cap::value(cap)
    }

    /// Whether a capability is served at all.
    pub fn check_extension(&self, cap: u32) -> bool {
        self.check_extension_int(cap) > 0
    }

    /// KVM_GET_VCPU_MMAP_SIZE.
    pub fn get_vcpu_mmap_size(&self) -> usize {
        kvm_abi::run::MMAP_SIZE
    }

    /// The recommended number of vCPUs.
    pub fn get_nr_vcpus(&self) -> usize {
        cap::value(cap::nr::NR_VCPUS) as usize
    }

    /// The most vCPUs a VM can have.
    pub fn get_max_vcpus(&self) -> usize {
        cap::value(cap::nr::MAX_VCPUS) as usize
    }

    /// The number of memslots.
    pub fn get_nr_memslots(&self) -> usize {
        cap::value(cap::nr::NR_MEMSLOTS) as usize
    }

    /// KVM_GET_SUPPORTED_CPUID.
    ///
    /// # Errors
    /// E2BIG when `max_entries` do not suffice.
    pub fn get_supported_cpuid(&self, max_entries: usize) -> Result<CpuId, Errno> {
        let entries = cpuid::supported(&Bare);
        if entries.len() > max_entries {
            return Err(Errno::E2BIG);
        }
        let entries: Vec<kvm_cpuid_entry2> = entries.iter().map(abi::out).collect();
        CpuId::from_entries(&entries).map_err(|_| Errno::E2BIG)
    }

    /// KVM_GET_EMULATED_CPUID: nothing that is not in the supported CPUID.
    ///
    /// # Errors
    /// None; the signature is kvm-ioctls'.
    pub fn get_emulated_cpuid(&self, _max_entries: usize) -> Result<CpuId, Errno> {
        CpuId::from_entries(&[]).map_err(|_| Errno::E2BIG)
    }

    /// KVM_GET_MSR_INDEX_LIST.
    ///
    /// # Errors
    /// E2BIG.
    pub fn get_msr_index_list(&self) -> Result<MsrList, Errno> {
        MsrList::from_entries(msr::INDEX_LIST).map_err(|_| Errno::E2BIG)
    }

    /// KVM_GET_MSR_FEATURE_INDEX_LIST.
    ///
    /// # Errors
    /// E2BIG.
    pub fn get_msr_feature_index_list(&self) -> Result<MsrList, Errno> {
        MsrList::from_entries(msr::FEATURE_LIST).map_err(|_| Errno::E2BIG)
    }

    /// KVM_GET_MSRS on the system: feature MSRs. How many were read.
    ///
    /// # Errors
    /// None; the signature is kvm-ioctls'.
    pub fn get_msrs(&self, msrs: &mut Msrs) -> Result<usize, Errno> {
        let vendor: Vendor = cpuid::vendor(Bare.cpuid(0, 0));
        let mut done = 0;
        for entry in msrs.as_mut_slice() {
            let Some(value) = msr::feature(entry.index, vendor) else {
                break;
            };
            entry.data = value;
            done += 1;
        }
        Ok(done)
    }

    /// KVM_CREATE_VM.
    ///
    /// # Errors
    /// ENOMEM, EMFILE, EAGAIN (no thread), EOPNOTSUPP.
    pub fn create_vm(&self) -> Result<Vm, Errno> {
        let host = Arc::new(UserHost::new()?);
        Ok(Vm::new(host, self.create_engine()?))
    }

    fn create_engine(&self) -> Result<Box<dyn Engine>, Errno> {
        let failed = |e: EngineError| match e {
            EngineError::OutOfMemory => Errno::ENOMEM,
            EngineError::Unsupported(what) => {
                log::error!("the engine cannot run here: this host lacks {what}");
                Errno::EOPNOTSUPP
            }
        };
        match self.engine {
            EngineKind::Interp => Ok(Box::new(InterpEngine::default())),
            EngineKind::Jit => match engine_jit::JitEngine::new() {
                Ok(engine) => Ok(Box::new(engine)),
                Err(e) => Err(failed(e)),
            },
        }
    }
}
