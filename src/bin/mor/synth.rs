//! `mor synth`.

use crate::Result;
use crate::args::SynthArgs;
use crate::convert::Listener;
use crate::input;
use crate::terminal::{counted, mebibytes, one_line, tell};
use mor::convert::{SynthOptions, synth as run};

/// Makes a random model.
pub fn synth(args: &SynthArgs) -> Result<()> {
    let options = SynthOptions {
        shape: args.shape,
        layers: args.layers,
        ty: args.ty,
        seed: args.seed,
        mean_depth: args.mean_depth,
    };
    input::no_stream(&args.output)?;
    let mut listener = Listener::new("making the model")?;
    let summary = run(&args.output, &options, &mut listener)?;
    drop(listener);
    let calibrated = summary
        .calibrated
        .map(|(cut, depth)| format!(", a mean depth of {depth:.2} at a cut of {cut:.4}"));
    tell(format_args!(
        "wrote {}: {} stored, {} logical, {}{}",
        one_line(&args.output.display().to_string()),
        counted(summary.stored_layers, "layer"),
        summary.logical_layers,
        mebibytes(summary.output_bytes),
        calibrated.unwrap_or_default(),
    ));
    Ok(())
}
