//! The cascaded 8259A pair of a PC with the ELCR of the PCI chipsets.

use crate::message::{IrqSource, LineLevel};

/// Ports of the pair: master, slave, ELCR.
pub const PORTS: [u16; 6] = [0x20, 0x21, 0xa0, 0xa1, 0x4d0, 0x4d1];

const CASCADE: u8 = 2;

/// The fields of `struct kvm_pic_state`, one 8259.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "named as in the uapi structure")]
pub struct PicState {
    pub last_irr: u8,
    pub irr: u8,
    pub imr: u8,
    pub isr: u8,
    pub priority_add: u8,
    pub irq_base: u8,
    pub read_reg_select: u8,
    pub poll: u8,
    pub special_mask: u8,
    pub init_state: u8,
    pub auto_eoi: u8,
    pub rotate_on_auto_eoi: u8,
    pub special_fully_nested_mode: u8,
    pub init4: u8,
    pub elcr: u8,
    pub elcr_mask: u8,
}

/// What raising or lowering a line did, for `KVM_IRQ_LINE_STATUS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LineOutcome {
    /// The line is low, or the request is new (status 1).
    Delivered,
    /// Already requested (status 0).
    Coalesced,
    /// Masked (status -1).
    Masked,
}

impl PicState {
    fn set_line(&mut self, line: u8, level: bool) -> LineOutcome {
        let bit = 1 << line;
        let mut outcome = LineOutcome::Delivered;
        let requests = level && (self.elcr & bit != 0 || self.last_irr & bit == 0);
        if requests {
            if self.irr & bit != 0 {
                outcome = LineOutcome::Coalesced;
            }
            self.irr |= bit;
        } else if !level && self.elcr & bit != 0 {
            self.irr &= !bit;
        }
        if level {
            self.last_irr |= bit;
        } else {
            self.last_irr &= !bit;
        }
        if self.imr & bit != 0 {
            LineOutcome::Masked
        } else {
            outcome
        }
    }

    /// Position of the best line of `mask` in the current rotation, 8 if none.
    fn priority(&self, mask: u8) -> u8 {
        mask.rotate_right(u32::from(self.priority_add & 7))
            .trailing_zeros() as u8
    }

    fn line_at(&self, priority: u8) -> u8 {
        priority.wrapping_add(self.priority_add) & 7
    }

    /// The line that asks for service now.
    fn pending(&self, master: bool) -> Option<u8> {
        let priority = self.priority(self.irr & !self.imr);
        let mut in_service = self.isr;
        if self.special_mask != 0 {
            in_service &= !self.imr;
        }
        // The slave may interrupt itself: it resolves its own priorities.
        if self.special_fully_nested_mode != 0 && master {
            in_service &= !(1 << CASCADE);
        }
        (priority < self.priority(in_service)).then(|| self.line_at(priority))
    }

    /// Interrupt acknowledge of `line`; returns the mask of lines whose service ended.
    fn acknowledge(&mut self, line: u8) -> u8 {
        let bit = 1 << line;
        if self.elcr & bit == 0 {
            self.irr &= !bit;
        }
        if self.auto_eoi == 0 {
            self.isr |= bit;
            return 0;
        }
        if self.rotate_on_auto_eoi != 0 {
            self.priority_add = (line + 1) & 7;
        }
        bit
    }

    /// ICW1, ICW2, ICW3, ICW4 and OCW1-3; returns the mask of lines whose service ended.
    fn write(&mut self, odd_port: bool, value: u8) -> u8 {
        if odd_port {
            return self.write_odd(value);
        }
        if value & 0x10 != 0 {
            return self.start_init(value);
        }
        if value & 0x08 != 0 {
            self.write_ocw3(value);
            return 0;
        }
        self.write_ocw2(value)
    }

    fn start_init(&mut self, icw1: u8) -> u8 {
        let ended = self.isr | self.irr & !self.elcr;
        self.init4 = icw1 & 1;
        self.last_irr = 0;
        self.irr &= self.elcr;
        self.imr = 0;
        self.isr = 0;
        self.priority_add = 0;
        self.special_mask = 0;
        self.read_reg_select = 0;
        self.poll = 0;
        if self.init4 == 0 {
            self.special_fully_nested_mode = 0;
            self.auto_eoi = 0;
        }
        self.init_state = 1;
        ended
    }

    fn write_ocw3(&mut self, value: u8) {
        if value & 4 != 0 {
            self.poll = 1;
        }
        if value & 2 != 0 {
            self.read_reg_select = value & 1;
        }
        if value & 0x40 != 0 {
            self.special_mask = value >> 5 & 1;
        }
    }

    fn write_ocw2(&mut self, value: u8) -> u8 {
        let line = value & 7;
        match value >> 5 {
            command @ (0 | 4) => {
                self.rotate_on_auto_eoi = command >> 2;
                0
            }
            command @ (1 | 5) => {
                // In special mask mode a masked in-service line is not the one that ends.
                let mask = if self.special_mask != 0 {
                    self.isr & !self.imr
                } else {
                    self.isr
                };
                let priority = self.priority(mask);
                if priority == 8 {
                    return 0;
                }
                let line = self.line_at(priority);
                if command == 5 {
                    self.priority_add = (line + 1) & 7;
                }
                self.end(line)
            }
            3 => self.end(line),
            6 => {
                self.priority_add = (line + 1) & 7;
                0
            }
            7 => {
                self.priority_add = (line + 1) & 7;
                self.end(line)
            }
            _ => 0,
        }
    }

    fn end(&mut self, line: u8) -> u8 {
        self.isr &= !(1 << line);
        1 << line
    }

    fn write_odd(&mut self, value: u8) -> u8 {
        match self.init_state {
            0 => self.imr = value,
            1 => {
                self.irq_base = value & 0xf8;
                self.init_state = 2;
            }
            2 => self.init_state = if self.init4 != 0 { 3 } else { 0 },
            _ => {
                self.special_fully_nested_mode = value >> 4 & 1;
                self.auto_eoi = value >> 1 & 1;
                self.init_state = 0;
            }
        }
        0
    }
}

/// The pair.
#[derive(Clone, Debug)]
pub struct Pic {
    master: PicState,
    slave: PicState,
    lines: [LineLevel; 16],
    acked: u16,
}

impl Default for Pic {
    fn default() -> Self {
        Self::new()
    }
}

impl Pic {
    /// The state after power-on: uninitialised, nothing masked.
    pub fn new() -> Self {
        Self {
            master: PicState {
                elcr_mask: 0xf8,
                ..PicState::default()
            },
            slave: PicState {
                elcr_mask: 0xde,
                ..PicState::default()
            },
            lines: [LineLevel::default(); 16],
            acked: 0,
        }
    }

    /// Sets one source's level of `line` (0-15); others are ignored. See [`Pic::output`] after.
    pub fn set_irq(&mut self, line: u8, source: IrqSource, level: bool) -> LineOutcome {
        let Some(sources) = self.lines.get_mut(usize::from(line)) else {
            return LineOutcome::Masked;
        };
        let level = sources.set(source, level);
        let outcome = if line < 8 {
            self.master.set_line(line, level)
        } else {
            self.slave.set_line(line & 7, level)
        };
        self.update();
        outcome
    }

    /// Passes the slave's request on to the master as a pulse.
    fn update(&mut self) {
        if self.slave.pending(false).is_some() {
            self.master.set_line(CASCADE, true);
            self.master.set_line(CASCADE, false);
        }
    }

    /// The INTR output of the master.
    pub fn output(&self) -> bool {
        self.master.pending(true).is_some()
    }

    /// The INTA cycle: the vector, which is that of line 7 or 15 if the request went away.
    pub fn ack(&mut self) -> u8 {
        let vector = match self.master.pending(true) {
            Some(CASCADE) => {
                self.acknowledge_master(CASCADE);
                let line = self.slave.pending(false);
                if let Some(line) = line {
                    let ended = self.slave.acknowledge(line);
                    self.acked |= u16::from(ended) << 8;
                }
                self.slave.irq_base.wrapping_add(line.unwrap_or(7))
            }
            Some(line) => {
                self.acknowledge_master(line);
                self.master.irq_base.wrapping_add(line)
            }
            None => self.master.irq_base.wrapping_add(7),
        };
        self.update();
        vector
    }

    fn acknowledge_master(&mut self, line: u8) {
        self.acked |= u16::from(self.master.acknowledge(line));
    }

    /// Takes the mask of lines acknowledged by the guest (EOI, auto EOI or initialisation) since
    /// the last call: their GSIs' acknowledge listeners are due.
    pub fn take_acked(&mut self) -> u16 {
        core::mem::take(&mut self.acked)
    }

    /// Mask of masked lines, slave in the high half (KVM's mask notifiers).
    pub fn masked(&self) -> u16 {
        u16::from(self.slave.imr) << 8 | u16::from(self.master.imr)
    }

    /// A byte read of one of [`PORTS`]; other ports read as all ones.
    pub fn port_read(&mut self, port: u16) -> u8 {
        match port {
            0x20 | 0x21 => self.read(true, port & 1 != 0),
            0xa0 | 0xa1 => self.read(false, port & 1 != 0),
            0x4d0 => self.master.elcr,
            0x4d1 => self.slave.elcr,
            _ => 0xff,
        }
    }

    fn read(&mut self, master: bool, odd_port: bool) -> u8 {
        let chip = if master {
            &mut self.master
        } else {
            &mut self.slave
        };
        if chip.poll != 0 {
            chip.poll = 0;
            return self.poll(master);
        }
        match (odd_port, chip.read_reg_select) {
            (true, _) => chip.imr,
            (false, 0) => chip.irr,
            (false, _) => chip.isr,
        }
    }

    /// The read after a poll command acts as an interrupt acknowledge (8259A, "Poll Command").
    fn poll(&mut self, master: bool) -> u8 {
        let chip = if master {
            &mut self.master
        } else {
            &mut self.slave
        };
        let result = match chip.pending(master) {
            Some(line) => {
                let ended = u16::from(chip.acknowledge(line));
                self.acked |= if master { ended } else { ended << 8 };
                if !master {
                    self.master.irr &= !(1 << CASCADE);
                }
                0x80 | line
            }
            None => 7,
        };
        self.update();
        result
    }

    /// A byte write to one of [`PORTS`]. See [`Pic::output`] and [`Pic::take_acked`] after.
    pub fn port_write(&mut self, port: u16, value: u8) {
        match port {
            0x20 | 0x21 => self.acked |= u16::from(self.master.write(port & 1 != 0, value)),
            0xa0 | 0xa1 => self.acked |= u16::from(self.slave.write(port & 1 != 0, value)) << 8,
            0x4d0 => self.master.elcr = value & self.master.elcr_mask,
            0x4d1 => self.slave.elcr = value & self.slave.elcr_mask,
            _ => return,
        }
        self.update();
    }

    /// The states of master and slave for `KVM_GET_IRQCHIP`.
    pub fn state(&self) -> [PicState; 2] {
        [self.master, self.slave]
    }

    /// Restores the master (`KVM_IRQCHIP_PIC_MASTER`).
    pub fn set_master(&mut self, state: &PicState) {
        self.master = *state;
        self.update();
    }

    /// Restores the slave (`KVM_IRQCHIP_PIC_SLAVE`).
    pub fn set_slave(&mut self, state: &PicState) {
        self.slave = *state;
        self.update();
    }
}
