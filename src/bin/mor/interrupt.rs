//! Ctrl-C.

use crate::Result;
use mor::Canceller;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// As shells report a program that Ctrl-C ended.
pub const INTERRUPTED: i32 = 130;

/// What Ctrl-C does: it ends the text that is being written, and the program when there is none.
/// (While a line is typed on a terminal, Ctrl-C is a key and comes from the line editor.)
pub struct Interrupt {
    answering: Arc<AtomicBool>,
    canceller: Canceller,
}

impl Interrupt {
    pub fn new(canceller: Canceller) -> Result<Self> {
        let answering = Arc::new(AtomicBool::new(false));
        let (seen, cancel) = (Arc::clone(&answering), canceller.clone());
        ctrlc::set_handler(move || match seen.load(Ordering::SeqCst) {
            true => cancel.cancel(),
            false => std::process::exit(INTERRUPTED),
        })?;
        Ok(Interrupt {
            answering,
            canceller,
        })
    }

    pub fn arm(&self) {
        // One that came when the last answer was just done.
        self.canceller.reset();
        self.answering.store(true, Ordering::SeqCst);
    }

    pub fn disarm(&self) {
        self.answering.store(false, Ordering::SeqCst);
    }
}
