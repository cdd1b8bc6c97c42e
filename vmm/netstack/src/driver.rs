//! Network back ends in threads of their own, joined to a virtual network card by two bounded queues.

use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::event::{EventfdFlags, eventfd};

use crate::config::{Config, Forward};
use crate::frame::{Frame, Offload};
use crate::poller::Waker;
use crate::stack::Stack;

/// Frames that may wait in each direction.
const QUEUE: usize = 256;
/// Largest frame that the guest may send, in bytes: a full IPv4 packet and its Ethernet header.
pub const MAX_FRAME: usize = 65535 + 14;

#[derive(Default)]
struct Lane {
    queue: VecDeque<Frame>,
    spare: Vec<Vec<u8>>,
    /// The producer found the queue full and wants to know when there is room.
    stalled: bool,
}

impl Lane {
    fn is_full(&self) -> bool {
        self.queue.len() >= QUEUE
    }

    /// Appends a copy of a frame. Returns whether the queue was empty.
    fn push(&mut self, data: &[u8], offload: Offload) -> bool {
        let mut buffer = self.spare.pop().unwrap_or_default();
        buffer.clear();
        buffer.extend_from_slice(data);
        self.queue.push_back(Frame {
            data: buffer,
            offload,
        });
        self.queue.len() == 1
    }

    fn recycle(&mut self, buffer: Vec<u8>) {
        if self.spare.len() < QUEUE {
            self.spare.push(buffer);
        }
    }

    /// Whether a stalled producer should be told now; tells only once.
    fn take_stall(&mut self) -> bool {
        self.queue.len() <= QUEUE / 2 && std::mem::take(&mut self.stalled)
    }
}

/// What a back end's thread and its [`Handle`] share.
pub(crate) struct Shared {
    from_guest: Mutex<Lane>,
    to_guest: Mutex<Lane>,
    event: OwnedFd,
    stop: AtomicBool,
    dead: AtomicBool,
}

fn lock(lane: &Mutex<Lane>) -> MutexGuard<'_, Lane> {
    // A lane is consistent between any two of its operations, so a panic elsewhere leaves it usable.
    lane.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    pub(crate) fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            from_guest: Mutex::default(),
            to_guest: Mutex::default(),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            stop: AtomicBool::new(false),
            dead: AtomicBool::new(false),
        }))
    }

    fn signal(&self) {
        // The only failure is a full counter, and then the event is set already.
        let _ = rustix::io::write(&self.event, &1u64.to_ne_bytes());
    }

    pub(crate) fn stopping(&self) -> bool {
        self.stop.load(Ordering::Acquire)
    }

    /// Marks the back end as ended and wakes the device so that it finds out.
    pub(crate) fn die(&self) {
        self.dead.store(true, Ordering::Release);
        self.signal();
    }

    /// Moves all frames of the guest to `batch`, which must be empty.
    pub(crate) fn take_batch(&self, batch: &mut VecDeque<Frame>) {
        let mut lane = lock(&self.from_guest);
        std::mem::swap(&mut lane.queue, batch);
        let signal = lane.take_stall();
        drop(lane);
        if signal {
            self.signal();
        }
    }

    /// Empties `batch`, keeping its buffers for further frames.
    pub(crate) fn recycle_batch(&self, batch: &mut VecDeque<Frame>) {
        if batch.is_empty() {
            return;
        }
        let mut lane = lock(&self.from_guest);
        for frame in batch.drain(..) {
            lane.recycle(frame.data);
        }
    }

    /// Queues frames for the guest from `frames`, which is handed a function that says whether it took the frame.
    pub(crate) fn deliver(&self, frames: impl FnOnce(&mut dyn FnMut(&[u8], Offload) -> bool)) {
        let mut lane = lock(&self.to_guest);
        let mut signal = false;
        frames(&mut |data, offload| {
            if lane.is_full() {
                lane.stalled = true;
                return false;
            }
            signal |= lane.push(data, offload);
            true
        });
        drop(lane);
        if signal {
            self.signal();
        }
    }

    /// Starts a delivery of frames for the guest: returns how many the queue takes, and moves buffers for reuse to
    /// `spare`. After a return of 0 the back end is woken when there is room.
    fn begin_delivery(&self, spare: &mut Vec<Vec<u8>>) -> usize {
        let mut lane = lock(&self.to_guest);
        spare.append(&mut lane.spare);
        let room = QUEUE.saturating_sub(lane.queue.len());
        lane.stalled |= room == 0;
        room
    }

    /// Queues the frames of a delivery and empties `frames`.
    fn finish_delivery(&self, frames: &mut Vec<Frame>) {
        if frames.is_empty() {
            return;
        }
        let mut lane = lock(&self.to_guest);
        let was_empty = lane.queue.is_empty();
        lane.queue.extend(frames.drain(..));
        drop(lane);
        if was_empty {
            self.signal();
        }
    }

    /// Whether a frame for the guest would be taken; if not, the back end is woken when one would.
    pub(crate) fn has_room(&self) -> bool {
        let mut lane = lock(&self.to_guest);
        lane.stalled |= lane.is_full();
        !lane.is_full()
    }
}

/// Wakes a back end's thread.
pub(crate) type Wake = Box<dyn Fn() + Send + Sync>;

/// A running network back end, as a virtual network card sees it. Dropping it ends the back end.
///
/// The card sends the guest's frames with [`Handle::send`], waits for [`Handle::event_fd`], and then takes frames with
/// [`Handle::recv`] until there are none. All methods may be called from any thread.
pub struct Handle {
    shared: Arc<Shared>,
    wake: Wake,
    thread: Option<JoinHandle<()>>,
    forwards: Vec<(Forward, SocketAddr)>,
}

/// Why [`Handle::send`] did not take a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The queue is full. [`Handle::event_fd`] becomes readable when it has room; a card may also drop the frame.
    #[error("the network back end's queue is full")]
    Full,
    /// No frame is this long.
    #[error("the frame is longer than {MAX_FRAME} bytes")]
    TooLong,
    /// The back end has ended.
    #[error("the network back end has ended")]
    Closed,
}

impl Handle {
    pub(crate) fn new(
        shared: Arc<Shared>,
        wake: Wake,
        thread: JoinHandle<()>,
        forwards: Vec<(Forward, SocketAddr)>,
    ) -> Self {
        Self {
            shared,
            wake,
            thread: Some(thread),
            forwards,
        }
    }

    /// Sends a frame of the guest.
    ///
    /// # Errors
    /// The frame was not taken: see [`SendError`].
    pub fn send(&self, frame: &[u8], offload: Offload) -> Result<(), SendError> {
        if frame.len() > MAX_FRAME {
            return Err(SendError::TooLong);
        }
        if self.is_closed() {
            return Err(SendError::Closed);
        }
        let mut lane = lock(&self.shared.from_guest);
        if lane.is_full() {
            lane.stalled = true;
            return Err(SendError::Full);
        }
        let was_empty = lane.push(frame, offload);
        drop(lane);
        if was_empty {
            (self.wake)();
        }
        Ok(())
    }

    /// Takes the next frame for the guest. Give its buffer back with [`Handle::recycle`] to save allocations.
    pub fn recv(&self) -> Option<Frame> {
        let mut lane = lock(&self.shared.to_guest);
        let frame = lane.queue.pop_front();
        let wake = lane.take_stall();
        drop(lane);
        if wake {
            (self.wake)();
        }
        frame
    }

    /// Gives back a frame from [`Handle::recv`] for reuse.
    pub fn recycle(&self, frame: Frame) {
        lock(&self.shared.to_guest).recycle(frame.data);
    }

    /// An eventfd, readable after frames have arrived for an empty queue, after a full send queue has room again, and
    /// after the back end has ended. It signals changes: after one, call [`Handle::clear_event`] and then
    /// [`Handle::recv`] until it returns `None` (or again when the guest has given new buffers).
    pub fn event_fd(&self) -> BorrowedFd<'_> {
        self.shared.event.as_fd()
    }

    /// Makes [`Handle::event_fd`] unreadable until the next change.
    pub fn clear_event(&self) {
        // Nothing to read means that it is clear.
        let _ = rustix::io::read(&self.shared.event, &mut [0u8; 8]);
    }

    /// Whether the back end has ended by itself.
    pub fn is_closed(&self) -> bool {
        self.shared.dead.load(Ordering::Acquire)
    }

    /// The port forwards and the host addresses that they listen on.
    pub fn forwards(&self) -> &[(Forward, SocketAddr)] {
        &self.forwards
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        (self.wake)();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed already.
            let _ = thread.join();
        }
    }
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Handle")
            .field("forwards", &self.forwards)
            .field("closed", &self.is_closed())
            .finish_non_exhaustive()
    }
}

/// Starts a [`Stack`] in a thread.
///
/// # Errors
/// As for [`Stack::new`], or the thread cannot be started.
pub fn spawn(config: Config) -> io::Result<Handle> {
    let stack = Stack::new(config)?;
    let waker: Waker = stack.waker();
    let forwards = stack.forwards().to_vec();
    let shared = Shared::new()?;
    let theirs = Arc::clone(&shared);
    let thread = std::thread::Builder::new()
        .name("net-user".into())
        .spawn(move || {
            if let Err(error) = drive(stack, &theirs) {
                log::error!("user-mode network stopped: {error}");
            }
            theirs.die();
        })?;
    Ok(Handle::new(
        shared,
        Box::new(move || waker.wake()),
        thread,
        forwards,
    ))
}

fn drive(mut stack: Stack, shared: &Shared) -> io::Result<()> {
    let mut batch = VecDeque::new();
    let (mut frames, mut spare) = (Vec::with_capacity(QUEUE), Vec::new());
    while !shared.stopping() {
        // This order loses no wake-up: the wait takes the signal, and only then is the queue looked at.
        stack.wait(None)?;
        shared.take_batch(&mut batch);
        for frame in &batch {
            stack.from_guest(&frame.data, frame.offload);
        }
        shared.recycle_batch(&mut batch);
        stack.service();
        // Frames are made without holding the queue's lock: making them takes system calls.
        loop {
            let room = shared.begin_delivery(&mut spare);
            for buffer in spare.drain(..) {
                stack.recycle(buffer);
            }
            while frames.len() < room
                && let Some(frame) = stack.next_frame()
            {
                frames.push(frame);
            }
            let more = room > 0 && frames.len() == room;
            shared.finish_delivery(&mut frames);
            if !more {
                break;
            }
        }
    }
    Ok(())
}
