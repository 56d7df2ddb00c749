//! `mor`: run, look at, convert and measure Mixture-of-Recursions models from a terminal.

mod args;
mod convert;
mod evaluate;
mod input;
mod inspect;
mod perplexity;
mod run;
mod terminal;

use args::{Args, Command};
use clap::Parser;
use std::process::ExitCode;

/// What the commands return: an error of the library, or a sentence.
type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Run(args) => run::run(&args),
        Command::Chat(args) => run::chat(&args),
        Command::Inspect(args) => inspect::inspect(&args),
        Command::Plan(args) => inspect::plan(&args),
        Command::Convert(args) => convert::convert(&args),
        Command::Eval(args) => evaluate::eval(&args),
        Command::GenerateTokens(args) => evaluate::generate_tokens(&args),
        Command::Perplexity(args) => perplexity::perplexity(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // A reader that closed the pipe has what it wanted.
        Err(error) if is_broken_pipe(&*error) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mor: {}", one_line(&error.to_string()));
            ExitCode::FAILURE
        }
    }
}

/// Names out of a file may hold line ends and terminal commands; what is shown must not.
fn one_line(sentence: &str) -> String {
    let mut line = String::new();
    for c in sentence.chars() {
        if c.is_control() {
            line.extend(c.escape_debug());
        } else {
            line.push(c);
        }
    }
    line
}

fn is_broken_pipe(error: &(dyn std::error::Error + 'static)) -> bool {
    let io = error.downcast_ref::<std::io::Error>();
    io.is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
