//! The cases.

mod arguments;
mod descriptors;
mod handlers;
mod masks;
mod nothing;
mod paths;
mod processes;
mod state;
mod threads;

macro_rules! cases {
    ($($module:ident: $($name:ident)*;)*) => {
        /// A name and what it does.
        pub const CASES: &[(&str, fn())] = &[$($((stringify!($name), $module::$name as fn())),*),*];
    };
}

cases! {
    paths: device_exists device_opens;
    descriptors: duplicates close_ranges mapping_outlives polls destroys_everything created_and_destroyed;
    processes: fork_makes_foreign exec_inherits exec_inherited sockets_carry;
    threads: two_vms vcpu_changes_threads closed_while_running many_callers;
    handlers: signal_ends_run handler_uses_vcpu handler_jumps_out restart_is_no_restart reset_hand no_defer
        mask_in_handler realtime_queues timers storm handler_calls_back bsd_signal faults unhandled_fault;
    masks: blocked_and_ignored signal_mask signal_mask_default signal_mask_blocks immediate_exit signalfd
        cancel_elsewhere;
    arguments: bad_pointers bad_numbers;
    state: state_of_modes state_of_everything state_of_two;
    nothing: nothing_opened cost;
}
