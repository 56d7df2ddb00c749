#!/usr/bin/env python3
"""Prints the ratios of what tests/cuda/device.sh measured: mor against the memory, PyTorch and itself.

    benches/ratios_cuda.py target/device
"""

import json
import pathlib
import sys

from shapes_cuda import DEVIATION, MEAN_OUTPUT, SHAPES


def allowed(shape, recursions, depth, ours, theirs):
    """What the schedule allows a MoR model of `ours` places over the vanilla one of `theirs`, in two ways.

    By rows: a row costs the same in every layer, whoever else is in the pass, so places do not matter.
    By bytes: a pass costs the weights and the keys and values that it reads. A tick of MoR reads its own
    layers, the block and the output matrix once for `ours` rows, of which ours / depth give a token; a
    step of the vanilla model reads all layers for `theirs`. Keys are as the paper's capacities leave them.
    """
    layer, output = shape.layer_weights(), shape.output_weights()
    block = (2 * (shape.layers - 2) + recursions) // (2 * recursions)
    rows = (shape.layers * layer + output) / ((2 + depth * block) * layer + output)
    shares = [(recursions - i) / recursions for i in range(recursions)]
    # A living sequence's mean position, times a key and a value.
    keys = (MEAN_OUTPUT + DEVIATION**2 / MEAN_OUTPUT) / 2 * 2 * shape.kv_heads * shape.head_dim
    vanilla = shape.layers * (layer / theirs + keys) + output / theirs
    tokens = ours / depth
    mor = ((2 + block) * layer + output) / tokens + keys * (2 + block * sum(s * s for s in shares))
    return rows, vanilla / mor


def table(folder):
    """The table of ratios, from the JSONs that device.sh wrote."""

    def load(name):
        path = folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() and path.stat().st_size else {}

    def rate(found, test):
        return next((t for t in found.get("tests", []) if t.get("test", t.get("sequences")) == test), None)

    def line(what, ours, unit, other, theirs, by=()):
        ratio = ours / theirs
        bounds, shares = [f"{bound:.2f}" for bound in by], [f"{100 * ratio / bound:.0f} %" for bound in by]
        cells = [what, f"{ours:.1f} {unit}", other, f"{theirs:.1f}", f"{ratio:.2f}", ", ".join(bounds)]
        print("| " + " | ".join([*cells, ", ".join(shares)]) + " |")

    peers = load("peers")
    parts = {name: peers.get(name) or {} for name in ("copy", "vanilla", "prompt", "decode1")}
    copy, torch = parts["copy"].get("bytes_per_second"), parts["vanilla"].get("tokens_per_second")
    print("| figure | mor | against | its rate | ratio | allowed by rows, bytes | share |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for type_ in ("f16", "q4_0"):
        if (test := rate(load(f"bench-smollm-1.7b-{type_}"), "tg128")) and copy:
            weights = test["median"] * test["weight_bytes_per_token"] / 1e9
            line(f"1.4B {type_}, tg128, weights", weights, "GB/s", "copy", copy / 1e9)
    if copy and (rate_ := parts["decode1"].get("weight_bytes_per_second")):
        line("(PyTorch, 1.4B f16, weights)", rate_ / 1e9, "GB/s", "copy", copy / 1e9)
    own = rate(load("batch-smollm-360m-f16"), 32)
    if own and torch:
        line("vanilla, B = 32", own["tokens_per_second"], "tokens/s", "PyTorch, B = 32", torch)
    for recursions in (2, 3, 4):
        for test in load(f"batch-smollm-360m-mor{recursions}-f16").get("tests", []):
            places, depth, ours = test["sequences"], test["mean_depth"], test["tokens_per_second"]
            name = f"MoR-{recursions}, depth {depth:.2f}, B = {places}"
            if torch:
                line(name, ours, "tokens/s", "PyTorch, B = 32", torch)
            if own:
                by = allowed(SHAPES["360m"], recursions, depth, places, 32)
                line(name, ours, "tokens/s", "own vanilla, B = 32", own["tokens_per_second"], by)
    for name, shape, type_ in [("360m", "360m", "f16"), ("1.4b", "1.7b", "f16"), ("1.4b", "1.7b", "q4_0")]:
        for file, rows in [("bench", 64), ("prompt", 512)]:
            test = rate(load(f"{file}-smollm-{shape}-{type_}"), "pp512")
            theirs = parts["prompt"].get(name, {}).get("tokens_per_second")
            if test and theirs:
                line(f"{name} {type_}, pp512, passes of {rows}", test["median"], "tokens/s", "PyTorch f16", theirs)


if __name__ == "__main__":
    if len(sys.argv) != 2 or not pathlib.Path(sys.argv[1]).is_dir():
        sys.exit("name the folder that tests/cuda/device.sh wrote to")
    table(pathlib.Path(sys.argv[1]))
