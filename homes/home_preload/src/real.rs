//! The C library's own functions.

use std::ffi::CStr;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A function of the C library's, looked up when it is first needed.
pub struct Real {
    name: &'static CStr,
    address: AtomicUsize,
}

impl Real {
    pub const fn new(name: &'static CStr) -> Self {
        Real {
            name,
            address: AtomicUsize::new(0),
        }
    }

    /// Its address; 0 where the C library has no such function.
    pub fn address(&self) -> usize {
        let known = self.address.load(Ordering::Relaxed);
        if known != 0 {
            return known;
        }
        // SAFETY: the name ends with a zero byte.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, self.name.as_ptr()) } as usize;
        self.address.store(found, Ordering::Relaxed);
        found
    }
}

/// errno becomes `number`; the result is -1.
pub fn fail(number: i32) -> i32 {
    // SAFETY: the location of errno is the thread's own.
    unsafe { *libc::__errno_location() = number };
    -1
}

/// Calls the C library's function of that name and type; ENOSYS where it has none.
macro_rules! real {
    ($name:ident ( $($arg:expr),* ) : fn( $($ty:ty),* ) -> $ret:ty) => {{
        static FUNCTION: $crate::real::Real = $crate::real::Real::new(
            match ::std::ffi::CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                Ok(name) => name,
                Err(_) => panic!("a name"),
            },
        );
        match FUNCTION.address() {
            0 => $crate::real::fail(libc::ENOSYS) as isize as $ret,
            address => {
                // SAFETY: the address is that of the C library's function of this name, whose type is given;
                // the arguments are the program's.
                unsafe {
                    let f: unsafe extern "C" fn($($ty),*) -> $ret = ::std::mem::transmute(address);
                    f($($arg),*)
                }
            }
        }
    }};
}
pub(crate) use real;
