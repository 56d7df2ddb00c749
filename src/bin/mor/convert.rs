//! `mor convert`.

use crate::Result;
use crate::args::ConvertArgs;
use crate::terminal::{Progress, mebibytes};
use mor::convert::{ConvertOptions, convert as run};
use mor::quant::TensorType;

/// Makes a GGUF file.
pub fn convert(args: &ConvertArgs) -> Result<()> {
    let ty = args.ty.as_deref().unwrap_or("f16");
    let ty = TensorType::parse(ty)
        .filter(|ty| ty.can_encode())
        .ok_or_else(|| {
            let known = TensorType::ALL.iter().filter(|ty| ty.can_encode());
            let known: Vec<_> = known.map(|ty| ty.name().to_lowercase()).collect();
            format!(
                "'{ty}' cannot be written; possible are {}",
                known.join(", ")
            )
        })?;
    let options = ConvertOptions {
        ty,
        tokenizer: args.tokenizer.clone(),
        overrides: args.overrides.to_overrides()?,
    };
    let mut listener = Listener { progress: None };
    let summary = run(&args.input, &args.output, &options, &mut listener)?;
    drop(listener);
    eprintln!(
        "wrote and verified {}: {} tensors, {} from {}",
        args.output.display(),
        summary.tensors,
        mebibytes(summary.output_bytes),
        mebibytes(summary.input_bytes),
    );
    Ok(())
}

/// Shows a conversion on the terminal.
struct Listener {
    progress: Option<Progress>,
}

impl mor::convert::Progress for Listener {
    fn start(&mut self, total_bytes: u64) {
        self.progress = Some(Progress::new("converting", total_bytes));
    }
    fn advance(&mut self, bytes: u64) {
        if let Some(progress) = &self.progress {
            progress.advance(bytes);
        }
    }
    fn note(&mut self, text: &str) {
        match &self.progress {
            Some(progress) => progress.note(text),
            None => eprintln!("{text}"),
        }
    }
}
