//! COM1: a 16550 by vm-superio, with the host's byte channel behind it.

use std::convert::Infallible;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vm_superio::serial::SerialEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::channel::ByteChannel;
use crate::hypervisor::Vm;
use crate::layout::SERIAL_GSI;
use crate::machine::Stop;
use crate::poll;

type Uart = Serial<Interrupt, Drained, Output>;

/// COM1 and the thread that feeds it.
pub struct SerialPort {
    uart: Arc<Mutex<Uart>>,
    quit: EventFd,
    feeder: Option<JoinHandle<()>>,
}

impl SerialPort {
    /// Connects COM1 to `console`.
    ///
    /// # Errors
    /// When the host has no more event descriptors or threads.
    pub fn new(vm: Option<&Arc<Vm>>, stop: &Arc<Stop>, console: &ByteChannel) -> io::Result<Self> {
        let drained = EventFd::new(EFD_NONBLOCK)?;
        let quit = EventFd::new(EFD_NONBLOCK)?;
        let output = Output {
            channel: console.clone(),
            stop: Arc::clone(stop),
        };
        let uart = Serial::with_events(
            Interrupt(vm.cloned()),
            Drained(drained.try_clone()?),
            output,
        );
        let uart = Arc::new(Mutex::new(uart));
        let feeder = match &console.input {
            None => None,
            Some(input) => {
                let (uart, quit, input) = (Arc::clone(&uart), quit.try_clone()?, Arc::clone(input));
                let run = move || feed(&uart, input.as_raw_fd(), &drained, &quit);
                Some(
                    std::thread::Builder::new()
                        .name("serial".into())
                        .spawn(run)?,
                )
            }
        };
        Ok(Self { uart, quit, feeder })
    }

    /// The guest reads register `offset`.
    pub fn read(&self, offset: u8) -> u8 {
        lock(&self.uart).read(offset)
    }

    /// The guest writes register `offset`.
    pub fn write(&self, offset: u8, value: u8) {
        // The only error is a loopback FIFO that is full: the byte is lost, as on hardware.
        if let Err(e) = lock(&self.uart).write(offset, value) {
            log::debug!("serial port: {e:?}");
        }
    }
}

impl Drop for SerialPort {
    fn drop(&mut self) {
        let _ = self.quit.write(1);
        if let Some(feeder) = self.feeder.take() {
            let _ = feeder.join();
        }
    }
}

/// Moves bytes from the host to the UART, no faster than the guest takes them.
fn feed(uart: &Mutex<Uart>, input: i32, drained: &EventFd, quit: &EventFd) {
    let mut buffer = [0u8; 64];
    loop {
        let space = lock(uart).fifo_capacity().min(buffer.len());
        // With no space, wait for the guest to drain the FIFO rather than for the host.
        let source = if space == 0 {
            drained.as_raw_fd()
        } else {
            input
        };
        let ready = match poll::wait(
            &[(quit.as_raw_fd(), poll::READ), (source, poll::READ)],
            None,
        ) {
            Ok(ready) => ready,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        if ready[0] != 0 {
            return;
        }
        if ready[1] == 0 {
            continue;
        }
        if space == 0 {
            let _ = drained.read();
            continue;
        }
        match poll::read(input, &mut buffer[..space]) {
            // The end of the input is not the end of the console.
            Ok(0) => return,
            Ok(n) => {
                if let Err(e) = lock(uart).enqueue_raw_bytes(&buffer[..n]) {
                    log::debug!("serial port: {e:?}");
                }
            }
            Err(e)
                if matches!(
                    e.kind(),
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                ) => {}
            Err(_) => return,
        }
    }
}

/// COM1's edge-triggered interrupt.
struct Interrupt(Option<Arc<Vm>>);

impl Trigger for Interrupt {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        let Some(vm) = &self.0 else { return Ok(()) };
        for level in [true, false] {
            if let Err(e) = vm.set_irq_line(SERIAL_GSI, level) {
                log::warn!("serial interrupt: {e}");
            }
        }
        Ok(())
    }
}

/// Tells the feeder that the guest has emptied the FIFO.
struct Drained(EventFd);

impl SerialEvents for Drained {
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}
    fn in_buffer_empty(&self) {
        let _ = self.0.write(1);
    }
}

/// The host's end of the transmitter.
struct Output {
    channel: ByteChannel,
    stop: Arc<Stop>,
}

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.channel.write_all(bytes, &|| self.stop.requested());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
