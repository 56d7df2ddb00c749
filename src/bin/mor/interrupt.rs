//! Ctrl-C.

use crate::Result;
use mor::Canceller;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// As shells report a program that Ctrl-C ended.
pub const INTERRUPTED: u8 = 130;

/// What Ctrl-C sets, of work that looks at it; the second time it ends the program.
pub fn flag() -> Result<Arc<AtomicBool>> {
    let flag = Arc::new(AtomicBool::new(false));
    let set = Arc::clone(&flag);
    handle(move || {
        if set.swap(true, Ordering::SeqCst) {
            std::process::exit(INTERRUPTED.into());
        }
    })?;
    Ok(flag)
}

fn handle(handler: impl FnMut() + 'static + Send) -> Result<()> {
    let sentence = |e| {
        format!(
            "cannot start the thread that waits for Ctrl-C ({e}); raise the limit (ulimit -u, a container's limit)"
        )
    };
    Ok(ctrlc::set_handler(handler).map_err(sentence)?)
}

/// How often the text is asked to end. It may not see it, while nobody takes what it writes.
const PATIENCE: u32 = 2;

/// What Ctrl-C does: it ends the text that is being written, and the program when there is none or it does not end.
/// (While a line is typed on a terminal, Ctrl-C is a key and comes from the line editor.)
pub struct Interrupt {
    /// How often Ctrl-C still asks.
    patience: Arc<AtomicU32>,
    canceller: Canceller,
}

impl Interrupt {
    pub fn new(canceller: Canceller) -> Result<Self> {
        let patience = Arc::new(AtomicU32::new(0));
        let (left, cancel) = (Arc::clone(&patience), canceller.clone());
        handle(move || {
            let asks = |left: u32| left.checked_sub(1);
            match left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, asks) {
                Ok(_) => cancel.cancel(),
                Err(_) => std::process::exit(INTERRUPTED.into()),
            }
        })?;
        Ok(Interrupt {
            patience,
            canceller,
        })
    }

    pub fn arm(&self) {
        // One that came when the last answer was just done.
        self.canceller.reset();
        self.patience.store(PATIENCE, Ordering::SeqCst);
    }

    pub fn disarm(&self) {
        self.patience.store(0, Ordering::SeqCst);
    }
}
