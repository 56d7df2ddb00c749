//! `mor`: run, look at, convert and measure Mixture-of-Recursions models from a terminal.

mod args;
mod bandwidth;
mod bench;
mod bench_batch;
mod chat;
mod convert;
mod divergence;
mod evaluate;
mod input;
mod inspect;
mod interrupt;
mod perplexity;
mod plan;
mod run;
mod synth;
mod terminal;
mod tokenize;

use args::{Args, Command};
use interrupt::INTERRUPTED;
use std::io::Write;
use std::process::ExitCode;
use terminal::{has_colours, one_line, stdout, tell};

/// What the commands return: an error of the library, or a sentence.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let (result, code) = match Args::read() {
        Ok(args) => (command(args.command), ExitCode::SUCCESS),
        Err(usage) => explain(&usage),
    };
    // What is still buffered is written now, while an error can be told.
    match result.and_then(|()| Ok(stdout().flush()?)) {
        Ok(()) => code,
        // A reader that closed the pipe has what it wanted.
        Err(error) if is_broken_pipe(&*error) => code,
        Err(error) => {
            tell(format_args!("mor: {}", one_line(&error.to_string())));
            match error.downcast_ref() {
                Some(mor::Error::Cancelled) => ExitCode::from(INTERRUPTED),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn command(command: Command) -> Result<()> {
    match command {
        Command::Run(args) => run::run(&args),
        Command::Chat(args) => chat::chat(&args),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Plan(args) => plan::plan(&args),
        Command::Convert(args) => convert::convert(&args),
        Command::Eval(args) => evaluate::eval(&args),
        Command::GenerateTokens(args) => evaluate::generate_tokens(&args),
        Command::Tokenize(args) => tokenize::tokenize(&args),
        Command::Detokenize(args) => tokenize::detokenize(&args),
        Command::Perplexity(args) => perplexity::perplexity(&args),
        Command::Bench(args) => bench::bench(&args),
        Command::Synth(args) => synth::synth(&args),
    }
}

/// Help that was asked for goes to standard output, wrong usage is told.
fn explain(usage: &clap::Error) -> (Result<()>, ExitCode) {
    let text = usage.render();
    if usage.use_stderr() {
        let _ = write!(anstream::stderr(), "{}", text.ansi());
        return (Ok(()), ExitCode::from(2));
    }
    let written = match has_colours() {
        true => write!(stdout(), "{}", text.ansi()),
        false => write!(stdout(), "{text}"),
    };
    (written.map_err(Into::into), ExitCode::SUCCESS)
}

fn is_broken_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
