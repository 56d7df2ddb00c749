//! What is written where, and what a terminal shows and a pipe does not.

use anstyle::{Ansi256Color, Style};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use mor::Plan;
use std::fmt::Arguments;
use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

/// Standard output, which gets what is written as it is. An error says that it is meant; a closed pipe keeps
/// its kind, by which the program knows it.
pub struct Stdout(io::Stdout);

/// Standard output.
pub fn stdout() -> Stdout {
    Stdout(io::stdout())
}

/// Whether standard output is to be coloured: on a terminal, unless the user wants none.
pub fn has_colours() -> bool {
    anstream::AutoStream::choice(&io::stdout()) != anstream::ColorChoice::Never
}

impl Write for Stdout {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes).map_err(unwritable)
    }
    fn flush(&mut self) -> io::Result<()> {
        self.0.flush().map_err(unwritable)
    }
}

fn unwritable(error: io::Error) -> io::Error {
    let sentence = format!("cannot write to standard output: {error}");
    io::Error::new(error.kind(), sentence)
}

/// Writes a line to standard error. Who does not listen there has nowhere else to be told.
pub fn tell(line: Arguments) {
    let _ = writeln!(anstream::stderr(), "{line}");
}

/// Names out of a file may hold line ends and terminal commands; what is shown must not.
pub fn one_line(sentence: &str) -> String {
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

/// A progress bar on standard error that appears after a second of work, and only on a terminal.
pub struct Progress {
    bar: ProgressBar,
    start: Instant,
}

impl Progress {
    /// A bar over `length` steps.
    pub fn new(what: &'static str, length: u64) -> Self {
        let bar = ProgressBar::with_draw_target(Some(length), ProgressDrawTarget::hidden());
        if let Ok(style) = ProgressStyle::with_template("{msg} {wide_bar} {percent}% {eta}") {
            bar.set_style(style);
        }
        bar.set_message(what);
        Progress {
            bar,
            start: Instant::now(),
        }
    }

    /// `steps` more are done.
    pub fn advance(&self, steps: u64) {
        self.bar.inc(steps);
        let due = self.start.elapsed() > Duration::from_secs(1);
        if due && self.bar.is_hidden() && std::io::stderr().is_terminal() {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }

    /// Writes something, for which the bar makes room.
    pub fn suspend<T>(&self, write: impl FnOnce() -> T) -> T {
        self.bar.suspend(write)
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

/// The colour of a token that ran `depth` recursions: from grey over blue and green to red.
pub fn depth_style(depth: usize) -> Style {
    const COLOURS: [u8; 7] = [245, 39, 42, 208, 196, 201, 226];
    let colour = COLOURS[depth.min(COLOURS.len() - 1)];
    Style::new().fg_color(Some(Ansi256Color(colour).into()))
}

/// `1,234,567`
pub fn grouped(n: u64) -> String {
    let digits = n.to_string();
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// `1 token`, `1,234 tokens`
pub fn counted(n: usize, what: &str) -> String {
    let plural = if n == 1 { "" } else { "s" };
    format!("{} {what}{plural}", grouped(n as u64))
}

/// What a session takes: `4.5 MiB`, or `0.1 MiB and 4.5 MiB on the GPU`
pub fn session_memory(plan: &Plan) -> String {
    let host = mebibytes(plan.bytes() as u64);
    match plan.device_bytes() {
        0 => host,
        on_gpu => format!("{host} and {} on the GPU", mebibytes(on_gpu as u64)),
    }
}

/// `4.5 MiB`
pub fn mebibytes(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / (1 << 20) as f64)
}
