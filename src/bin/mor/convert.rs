//! `mor convert`.

use crate::Result;
use crate::args::ConvertArgs;
use crate::input;
use crate::interrupt;
use crate::terminal::{Progress, counted, mebibytes, one_line, tell};
use mor::convert::{ConvertOptions, convert as run};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Makes a GGUF file.
pub fn convert(args: &ConvertArgs) -> Result<()> {
    input::readable(&args.input)?;
    for file in [&args.tokenizer, &args.training_config]
        .into_iter()
        .flatten()
    {
        input::readable(file)?;
    }
    let options = ConvertOptions {
        ty: args.ty,
        layout: args.layout.into(),
        training: args.training_config.clone(),
        tokenizer: args.tokenizer.clone(),
        overrides: args.overrides.to_overrides(),
    };
    input::no_stream(&args.output)?;
    let mut listener = Listener::new("converting")?;
    let summary = run(&args.input, &args.output, &options, &mut listener)?;
    drop(listener);
    tell(format_args!(
        "wrote and verified {}: {}, {} from {}",
        one_line(&args.output.display().to_string()),
        counted(summary.tensors, "tensor"),
        mebibytes(summary.output_bytes),
        mebibytes(summary.input_bytes),
    ));
    Ok(())
}

/// Shows on the terminal how a file is made. Ctrl-C ends that, and nothing of the file is left.
pub struct Listener {
    what: &'static str,
    interrupted: Arc<AtomicBool>,
    progress: Option<Progress>,
}

impl Listener {
    /// `what`: what is being done.
    pub fn new(what: &'static str) -> Result<Self> {
        Ok(Listener {
            what,
            interrupted: interrupt::flag()?,
            progress: None,
        })
    }
}

impl mor::convert::Progress for Listener {
    fn start(&mut self, total_bytes: u64) {
        self.progress = Some(Progress::new(self.what, total_bytes));
    }
    fn advance(&mut self, bytes: u64) {
        if let Some(progress) = &self.progress {
            progress.advance(bytes);
        }
    }
    fn is_cancelled(&self) -> bool {
        self.interrupted.load(Ordering::SeqCst)
    }
    fn note(&mut self, text: &str) {
        let text = one_line(text);
        match &self.progress {
            Some(progress) => progress.suspend(|| tell(format_args!("{text}"))),
            None => tell(format_args!("{text}")),
        }
    }
}
