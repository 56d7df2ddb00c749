#!/usr/bin/env python3
"""What types of weights and of keys and values cost in quality: a table in Markdown.

    python3 benches/quality.py BASE TEXT [--types f16 q8_0 q4_0] [--kv f16 q8_0] [--llama PATH]

BASE is a checkpoint folder or a GGUF file, in F32 or F16 so that it says what the training said. It is
converted to F32 and to each type; `mor perplexity --against` compares each with the F32 file, which
runs with keys and values in F32. With --llama, llama-perplexity measures the same files over the same
tokens, where it can open them. Everything that is written goes to a temporary folder (TMPDIR says
where); of the converted files only two exist at a time. Needs Python's standard library and `mor`.
"""

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=pathlib.Path, help="a checkpoint folder or a GGUF file")
    parser.add_argument("text", type=pathlib.Path, help="the text to predict")
    parser.add_argument("--types", nargs="+", metavar="TYPE", default=["f32", "f16", "bf16", "q8_0", "q4_1", "q4_0"])
    parser.add_argument("--kv", nargs="+", metavar="TYPE", default=["f16"], help="types of keys and values [f16]")
    parser.add_argument("--bytes", type=int, metavar="N", help="take only so much of the text")
    parser.add_argument("--context", type=int, default=512, help="tokens of a window [512]")
    parser.add_argument("--threads", type=int, help="[one per core]")
    parser.add_argument("--tokenizer", metavar="FILE", help="for `mor convert`, when the checkpoint has none")
    parser.add_argument("--mor", metavar="PATH", help="the program [that of cargo build --release]")
    parser.add_argument("--llama", metavar="PATH", help="llama-perplexity, to measure beside it")
    return parser.parse_args()


def built():
    target = os.environ.get("CARGO_TARGET_DIR", "target")
    return REPOSITORY / target / "release" / ("mor.exe" if os.name == "nt" else "mor")


def run(*command):
    """Runs a program; gives its exit code, standard output and standard error."""
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, errors="replace")
    except OSError as error:
        sys.exit(f"cannot run {command[0]}: {error.strerror}")
    return done.returncode, done.stdout, done.stderr


def mor(args, *command):
    code, out, errors = run(args.mor or built(), *command)
    if code != 0:
        sys.exit(f"{' '.join(map(str, command))}: {errors.strip()}")
    return out


def convert(args, ty, out):
    tokenizer = ["--tokenizer", args.tokenizer] if args.tokenizer else []
    # llama.cpp knows no tiles; the results are the same bits.
    layout = ["--layout", "rows"] if args.llama else []
    mor(args, "convert", args.base, "-o", out, "--type", ty, *layout, *tokenizer)


def threads(args):
    return ["-t", args.threads] if args.threads else []


def measure(args, model, kv, text, base):
    """The object that `mor perplexity` prints."""
    out = mor(args, "perplexity", model, text, "-c", args.context, "--kv", kv, "--against", base, "--json", *threads(args))
    return json.loads(out)


def llama_perplexity(args, model, kv, text):
    """The estimate of llama-perplexity, or None where it has none."""
    options = ["-c", args.context, "-ctk", kv, "-ctv", kv, *threads(args)]
    code, out, errors = run(args.llama, "-m", model, "-f", text, *options)
    found = re.search(r"Final estimate: PPL = ([0-9.]+)", out + errors)
    if code != 0 or not found:
        print(f"{args.llama} has no estimate for {model.name} with {kv} keys", file=sys.stderr)
        return None
    return float(found[1])


def excerpt(args, folder):
    """The text, or as much of it as was asked for, whole characters only."""
    text = folder / "text.txt"
    text.write_bytes(args.text.read_bytes()[: args.bytes].decode(errors="ignore").encode())
    return text


def row(cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def main():
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="mor-quality-") as folder:
        folder = pathlib.Path(folder)
        text = excerpt(args, folder)
        base = folder / "base.gguf"
        convert(args, "f32", base)
        row(["weights", "keys, values", "MB", "perplexity"] + ["llama.cpp"] * bool(args.llama) + ["KL divergence", "same top"])
        row(["---", "---"] + ["---:"] * (4 + bool(args.llama)))
        for ty in args.types:
            model = base if ty == "f32" else folder / f"{ty}.gguf"
            if model != base:
                convert(args, ty, model)
            for kv in args.kv:
                found = measure(args, model, kv, text, base)
                cells = [ty, kv, f"{model.stat().st_size / 1e6:.1f}", f"{found['perplexity']:.4f}"]
                if args.llama:
                    peer = llama_perplexity(args, model, kv, text)
                    cells.append(f"{peer:.4f}" if peer else "-")
                cells.append(f"{found['kl_mean']:.6f} ± {found['kl_standard_error']:.6f}")
                cells.append(f"{100 * found['same_top']:.2f} %")
                row(cells)
            if model != base:
                model.unlink()


if __name__ == "__main__":
    try:
        main()
    except (OSError, KeyboardInterrupt) as error:
        sys.exit(str(error) or 1)
