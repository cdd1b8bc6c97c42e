//! Bits of the control registers, RFLAGS and EFER that the processor core looks at, under one prefix each.

pub use x86defs::cr0::{
    AM as CR0_AM, CD as CR0_CD, EM as CR0_EM, ET as CR0_ET, MP as CR0_MP, NE as CR0_NE,
    NW as CR0_NW, PE as CR0_PE, PG as CR0_PG, TS as CR0_TS, WP as CR0_WP,
};
pub use x86defs::cr4::{
    DE as CR4_DE, FSGSBASE as CR4_FSGSBASE, LA57 as CR4_LA57, OSFXSR as CR4_OSFXSR,
    OSXSAVE as CR4_OSXSAVE, PAE as CR4_PAE, PCE as CR4_PCE, PCIDE as CR4_PCIDE, PGE as CR4_PGE,
    PSE as CR4_PSE, PVI as CR4_PVI, SMAP as CR4_SMAP, SMEP as CR4_SMEP, TSD as CR4_TSD,
    UMIP as CR4_UMIP, VME as CR4_VME,
};
pub use x86defs::efer::{LMA as EFER_LMA, LME as EFER_LME, NX as EFER_NXE, SCE as EFER_SCE};
pub use x86defs::rflags::{
    AC, CF, DEFINED as ALL_FLAGS, DF, ID, IF, IOPL, NT, OF, RF, STATUS as ARITH, TF, VIF, VIP, VM,
    ZF,
};
