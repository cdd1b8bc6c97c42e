//! The thread that serves a device's queues.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Activation, Queues};
use crate::poll;

/// What a device does with its queues.
pub(crate) trait Handler: Send + 'static {
    /// Name of the thread.
    fn name(&self) -> &'static str;
    /// The driver has put buffers into queue `index`.
    fn queue(&mut self, index: usize, queues: &mut Queues, quit: &Quit);
    /// Descriptors of the host to wait for now; asked before every wait.
    fn sources(&self, _queues: &Queues) -> Vec<RawFd> {
        Vec::new()
    }
    /// One of the descriptors is readable.
    fn source(&mut self, _fd: RawFd, _queues: &mut Queues, _quit: &Quit) {}
}

/// Says whether the thread has been told to end.
pub(crate) struct Quit(EventFd);

impl Quit {
    /// True once the thread should end.
    pub fn requested(&self) -> bool {
        poll::wait(&[(self.0.as_raw_fd(), poll::READ)], Some(0)).is_ok_and(|ready| ready[0] != 0)
    }
}

/// A handler at rest or at work.
pub(crate) struct Worker<H> {
    state: State<H>,
}

enum State<H> {
    Idle(H),
    Running {
        quit: EventFd,
        thread: JoinHandle<H>,
    },
    /// The thread could not be started, or died; the device cannot work any more.
    Broken,
}

impl<H: Handler> Worker<H> {
    pub fn new(handler: H) -> Self {
        Self {
            state: State::Idle(handler),
        }
    }

    /// Starts serving.
    pub fn start(&mut self, activation: Activation) -> io::Result<()> {
        self.stop();
        let quit = EventFd::new(EFD_NONBLOCK)?;
        let quit_thread = Quit(quit.try_clone()?);
        let State::Idle(handler) = std::mem::replace(&mut self.state, State::Broken) else {
            return Err(io::Error::other("the device's thread is gone"));
        };
        let queues = Queues::new(activation);
        let thread = std::thread::Builder::new()
            .name(handler.name().into())
            .spawn(move || serve(handler, queues, &quit_thread))?;
        self.state = State::Running { quit, thread };
        Ok(())
    }

    /// Stops serving and waits for the thread.
    pub fn stop(&mut self) {
        self.state = match std::mem::replace(&mut self.state, State::Broken) {
            State::Running { quit, thread } => {
                let _ = quit.write(1);
                thread.join().map_or(State::Broken, State::Idle)
            }
            other => other,
        };
    }
}

impl<H> Drop for Worker<H> {
    fn drop(&mut self) {
        if let State::Running { quit, thread } = std::mem::replace(&mut self.state, State::Broken) {
            let _ = quit.write(1);
            let _ = thread.join();
        }
    }
}

fn serve<H: Handler>(mut handler: H, mut queues: Queues, quit: &Quit) -> H {
    let events: Vec<(usize, RawFd)> = (0..)
        .zip(&queues.queues)
        .filter_map(|(index, active)| Some((index, active.as_ref()?.event.as_raw_fd())))
        .collect();
    loop {
        let sources = handler.sources(&queues);
        let mut fds = vec![(quit.0.as_raw_fd(), poll::READ)];
        fds.extend(events.iter().map(|&(_, fd)| (fd, poll::READ)));
        fds.extend(sources.iter().map(|&fd| (fd, poll::READ)));
        let ready = match poll::wait(&fds, None) {
            Ok(ready) => ready,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => {
                log::error!("{}: {e}", handler.name());
                return handler;
            }
        };
        if ready[0] != 0 {
            return handler;
        }
        for (&(index, _), &ready) in events.iter().zip(&ready[1..]) {
            if ready != 0 {
                if let Some(Some(active)) = queues.queues.get(index) {
                    let _ = active.event.read();
                }
                handler.queue(index, &mut queues, quit);
            }
        }
        for (&fd, &ready) in sources.iter().zip(&ready[1 + events.len()..]) {
            if ready != 0 {
                handler.source(fd, &mut queues, quit);
            }
        }
    }
}
