//! Single kernels, on one thread: `cargo bench --features bench --bench kernels [-- WORD ...]`. A line
//! is measured if its text holds all the words.
//!
//! The rounds go over all lines in turn and the best counts, so that what slows the machine down for a
//! while slows no single line down.

use mor::KvType;
use mor::cpu::bench::{Barrier, LongAttention, MatrixProduct, levels};
use mor::quant::TensorType;
use std::time::{Duration, Instant};

const ROUNDS: usize = 7;
/// What a line is repeated for in a round.
const SPAN: Duration = Duration::from_millis(30);

struct Line {
    text: String,
    run: Box<dyn FnMut()>,
    /// Multiplications of a run, and bytes that it reads.
    products: f64,
    bytes: f64,
    best: f64,
}

fn main() {
    let words: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    let mut lines = Vec::new();
    for set in levels() {
        matrix_products(&set, &mut lines);
        attentions(&set, &mut lines);
    }
    barriers(&mut lines);
    lines.retain(|line| words.iter().all(|word| line.text.contains(word.as_str())));
    if lines.is_empty() {
        eprintln!("no kernel here has {words:?} in its name");
        std::process::exit(1);
    }
    for _ in 0..ROUNDS {
        for line in &mut lines {
            line.best = line.best.min(seconds(&mut line.run));
        }
    }
    println!(
        "{:44} {:>9} {:>11} {:>9}",
        "kernel", "µs", "10^9 mul/s", "GB/s"
    );
    for line in lines {
        println!(
            "{:44} {:9.2} {:11.2} {:9.2}",
            line.text,
            1e6 * line.best,
            line.products / line.best / 1e9,
            line.bytes / line.best / 1e9
        );
    }
}

/// The mean time of a run.
fn seconds(run: &mut dyn FnMut()) -> f64 {
    run();
    let start = Instant::now();
    let mut count = 0;
    while start.elapsed() < SPAN {
        run();
        count += 1;
    }
    start.elapsed().as_secs_f64() / f64::from(count)
}

fn matrix_products(set: &str, lines: &mut Vec<Line>) {
    // The feed-forward matrix of a 135M model: in the second-level cache in four bits.
    let [rows, columns] = [1536, 576];
    for ty in TensorType::ALL {
        let layouts: &[bool] = if ty.block_len() > 1 {
            &[false, true]
        } else {
            &[false]
        };
        // The K types need a multiple of 256.
        let columns = if ty.row_bytes(columns).is_some() {
            columns
        } else {
            768
        };
        let rows_at_once = [1, 4, 16, 64];
        let cases = layouts
            .iter()
            .flat_map(|tiled| rows_at_once.map(|n| (*tiled, n)));
        for (tiled, n) in cases {
            let Some(mut product) = MatrixProduct::new(set, ty, tiled, [rows, columns], n) else {
                continue;
            };
            let layout = if tiled { "tiles" } else { "rows" };
            lines.push(Line {
                text: format!("{set} {} {layout} {rows}x{columns} n={n}", ty.name()),
                products: (rows * columns * n) as f64,
                bytes: product.weight_bytes() as f64,
                run: Box::new(move || product.run()),
                best: f64::INFINITY,
            });
        }
    }
}

fn attentions(set: &str, lines: &mut Vec<Line>) {
    let (heads, dim, context) = ([9, 3], 64, 1024);
    for (ty, name) in [
        (KvType::F32, "f32"),
        (KvType::F16, "f16"),
        (KvType::Q8_0, "q8_0"),
    ] {
        for rows in [1, 64] {
            let Some(mut attention) = LongAttention::new(set, ty, heads, dim, context, rows) else {
                continue;
            };
            lines.push(Line {
                text: format!("{set} attention {name} context={context} n={rows}"),
                products: (2 * heads[0] * dim * context * rows) as f64,
                bytes: attention.bytes() as f64,
                run: Box::new(move || attention.run()),
                best: f64::INFINITY,
            });
        }
    }
}

/// What it costs to share an operation, beside the operation.
fn barriers(lines: &mut Vec<Line>) {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    for threads in [2, 4, 8].into_iter().filter(|n| *n <= cores) {
        let Some(mut barrier) = Barrier::new(threads) else {
            continue;
        };
        lines.push(Line {
            text: format!("barrier threads={threads}"),
            products: 0.0,
            bytes: 0.0,
            run: Box::new(move || barrier.run()),
            best: f64::INFINITY,
        });
    }
}
