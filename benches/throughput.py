#!/usr/bin/env python3
"""Measures throughput over the number of sequences with `mor bench -b` and draws it.

    benches/throughput.py vanilla.gguf mor3.gguf -b 1 2 4 8 16 32 --svg docs/throughput.svg
    benches/throughput.py vanilla.gguf mor3.gguf -b 32 --llama-batched-bench PATH --peer-model vanilla.gguf

The first model is what the others are compared with. With --llama-batched-bench that program runs the
peer model with as many sequences of as many tokens. Python's standard library is all it needs.
"""

import argparse
import datetime
import json
import pathlib
import sys

from compare import output, processor


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="GGUF files")
    parser.add_argument("-b", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], metavar="B", help="sequences at once")
    parser.add_argument("-n", type=int, default=256, metavar="N", help="tokens of an answer on average [%(default)s]")
    parser.add_argument("-t", type=int, default=2, metavar="T", help="threads [%(default)s]")
    parser.add_argument("--mor", default="target/release/mor", help="the program mor [%(default)s]")
    parser.add_argument("--llama-batched-bench", metavar="PATH", help="the peer")
    parser.add_argument("--peer-model", metavar="FILE", help="what it runs: the vanilla file in rows")
    parser.add_argument("--svg", type=pathlib.Path, metavar="FILE", help="draws the results")
    return parser.parse_args()


def mor(args, model):
    """The name of a model, and a measured object for each number of sequences."""
    numbers = ",".join(map(str, args.b))
    found = json.loads(output([args.mor, "bench", model, "-b", numbers, "-n", args.n, "-t", args.t, "--json"]))
    return found["model"], found["tests"]


def llama(args):
    """Tokens a second for each number of sequences."""
    results = []
    for sequences in args.b:
        # Room for all of the sequences' tokens; a prompt of one token, as with mor.
        context = sequences * (args.n + 8)
        options = ["-m", args.peer_model, "-c", context, "-npp", 1, "-ntg", args.n, "-npl", sequences, "-t", args.t]
        lines = output([args.llama_batched_bench, *options, "--output-format", "jsonl"]).splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{")]
        results.append({"sequences": sequences, "tokens_per_second": found[0]["speed_tg"], "mean_depth": 1.0})
    return "llama.cpp", results


def table(args, series):
    print(f"{datetime.date.today()}, {processor()}, {args.t} threads, answers of {args.n} tokens on average; tokens/s\n")
    print("| sequences | " + " | ".join(f"{name} | ratio" if i else name for i, (name, _) in enumerate(series)) + " |")
    print("| ---: |" + " ---: |" * (2 * len(series) - 1))
    for row, sequences in enumerate(args.b):
        base = series[0][1][row]["tokens_per_second"]
        cells = [f"{sequences}", f"{base:.1f}"]
        for _, tests in series[1:]:
            rate = tests[row]["tokens_per_second"]
            cells += [f"{rate:.1f}", f"{rate / base:.2f}"]
        print("| " + " | ".join(cells) + " |")
    print()
    for name, tests in series:
        if "share_of_places" in tests[-1]:
            last = tests[-1]
            rows = ", ".join(f"{rows:.1f}" for rows in last["rows_per_tick"])
            print(
                f"{name}, {last['sequences']} sequences: mean depth {last['mean_depth']:.2f}, "
                f"{100 * last['share_of_places']:.1f} % of the places used, rows a tick by recursion {rows}, "
                f"{last['kv_bytes_peak'] / 1e6:.1f} MB of keys and values at most"
            )


COLOURS = ["#444444", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00"]


def draw(args, series):
    """A chart of tokens a second over sequences: both axes in doublings of what is measured."""
    width, height, left, right, top, bottom = 720, 420, 64, 170, 40, 48
    most = max(test["tokens_per_second"] for _, tests in series for test in tests)
    step = next(s for s in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000) if most / s <= 8)
    high = step * -(-most // step)
    span = max(len(args.b) - 1, 1)

    def x(index):
        return left + (width - left - right) * index / span

    def y(rate):
        return height - bottom - (height - top - bottom) * rate / high

    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="22" font-size="15">Tokens a second over sequences at once, {args.t} threads</text>',
    ]
    for tick in range(0, int(high) + 1, step):
        out.append(f'<line x1="{left}" x2="{width - right}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#dddddd"/>')
        out.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    for index, sequences in enumerate(args.b):
        out.append(f'<text x="{x(index):.1f}" y="{height - bottom + 20}" text-anchor="middle">{sequences}</text>')
    out.append(f'<text x="{(left + width - right) / 2}" y="{height - 8}" text-anchor="middle">sequences</text>')
    # Names stand at the end of their lines, far enough from each other to be read.
    ends = sorted((y(tests[-1]["tokens_per_second"]), i) for i, (_, tests) in enumerate(series))
    places, last = {}, -100.0
    for wanted, i in ends:
        last = max(wanted, last + 16)
        places[i] = last
    for i, (name, tests) in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        points = [(x(index), y(test["tokens_per_second"])) for index, test in enumerate(tests)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        out += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in points]
        out.append(f'<text x="{width - right + 10}" y="{places[i] + 4:.1f}" fill="{colour}">{name}</text>')
    out.append("</svg>")
    args.svg.write_text("\n".join(out) + "\n")


def main():
    args = arguments()
    if args.llama_batched_bench and not args.peer_model:
        sys.exit("say which file llama-batched-bench is to run (--peer-model)")
    series = []
    for model in args.models:
        series.append(mor(args, model))
        print(f"measured {model}", file=sys.stderr)
    if args.llama_batched_bench:
        series.append(llama(args))
    table(args, series)
    if args.svg:
        draw(args, series)


if __name__ == "__main__":
    try:
        main()
    except (OSError, KeyboardInterrupt, BrokenPipeError) as error:
        sys.exit(str(error) or 1)
