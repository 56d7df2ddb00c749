#!/usr/bin/env python3
"""Runs llama-bench and `mor bench` in turn on the same file and prints a table of medians.

    benches/compare.py MODEL.gguf --llama-bench build/bin/llama-bench -t 1 2 -d 0 4096

Each round runs every test once in each program, one after the other, so that what slows the machine
down for a while slows both down. See benches/README.md.
"""

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="the GGUF file")
    parser.add_argument("--peer-model", help="what llama-bench runs instead: the vanilla twin of a MoR file")
    parser.add_argument("--mor", default="target/release/mor", help="the program mor [%(default)s]")
    parser.add_argument("--llama-bench", default="llama-bench", help="the program llama-bench [%(default)s]")
    parser.add_argument("-p", type=int, nargs="*", default=[512], metavar="N", help="tokens of a prompt")
    parser.add_argument("-n", type=int, nargs="*", default=[128], metavar="N", help="tokens to generate")
    parser.add_argument("-d", type=int, nargs="*", default=[0], metavar="N", help="tokens in the context before")
    parser.add_argument("-t", type=int, nargs="*", default=[1], metavar="T", help="threads")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each test in each program [%(default)s]")
    return parser.parse_args()


def output(command):
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}; say where it is (see --help)")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        sys.exit(f"{' '.join(map(str, command))} failed: {last}")
    return done.stdout


def llama(args, options):
    model = args.peer_model or args.model
    test = json.loads(output([args.llama_bench, "-m", model, "-o", "json", "-r", "1", *options]))[0]
    return test["avg_ts"], f"{test['build_number']} ({test['build_commit']})"


def mor(args, options):
    test = json.loads(output([args.mor, "bench", args.model, "--json", "-r", "1", *options]))["tests"][0]
    return test["tokens_per_second"], test["mean_depth"]


def processor():
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":")[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def main():
    args = arguments()
    lengths = [("pp", n, 0) for n in args.p if n] + [("tg", 0, n) for n in args.n if n]
    tests = [(kind, p, n, d, t) for t in args.t for d in args.d for kind, p, n in lengths]
    if not tests or args.rounds < 1:
        sys.exit("there is nothing to measure; give tokens with -p or -n, and a round or more")
    rates = {test: ([], []) for test in tests}
    depths = {test: [] for test in tests}
    build = ""
    for number in range(args.rounds):
        for test in tests:
            kind, p, n, d, t = test
            options = ["-p", str(p), "-n", str(n), "-d", str(d), "-t", str(t)]
            ours, depth = mor(args, options)
            theirs, build = llama(args, options)
            rates[test][0].append(ours)
            rates[test][1].append(theirs)
            depths[test].append(depth)
            shown = f"round {number + 1} of {args.rounds}: {kind}{p or n} -d {d} -t {t}"
            print(f"{shown}: mor {ours:.1f}, llama.cpp {theirs:.1f} tokens/s", file=sys.stderr)
    version = output([args.mor, "--version"]).strip()
    today = datetime.date.today().isoformat()
    print(f"{today}, {processor()}, {version}, llama.cpp {build}; medians of {args.rounds} rounds, tokens/s")
    names = [path.replace("\\", "/").rsplit("/", 1)[-1] for path in (args.model, args.peer_model or args.model)]
    print(f"mor: {names[0]}; llama.cpp: {names[1]}\n")
    print("| test | threads | mean depth | mor | llama.cpp | ratio |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for test in tests:
        kind, p, n, d, t = test
        ours, theirs = map(statistics.median, rates[test])
        name = f"{kind}{p or n}" + (f" @ d{d}" if d else "")
        depth = statistics.mean(depths[test])
        print(f"| {name} | {t} | {depth:.2f} | {ours:.1f} | {theirs:.1f} | {ours / theirs:.2f} |")


if __name__ == "__main__":
    main()
