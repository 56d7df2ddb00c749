#!/usr/bin/env python3
"""Measures on an NVIDIA GPU what `mor` is compared with: how fast memory is copied, and compiled PyTorch.

    benches/peers_cuda.py --json peers.json                     all parts, within 100 seconds
    benches/peers_cuda.py copy vanilla --batch 48               some parts

PyTorch runs a Llama of random weights in F16. `vanilla` is many sequences as `mor bench -b` has them: no
prefix, answers of 256 tokens on average (deviation 64), and who ends makes place for the next at once, all of
it within the step. The fastest of several ways to compile and to attend counts. See benches/README.md.
"""

import argparse
import contextlib
import json
import pathlib
import signal
import statistics
import subprocess
import sys
import time

from shapes_cuda import CONTEXT, SHAPES

PARTS = ["check", "copy", "vanilla", "prompt", "decode1", "llama"]
PROMPT = 512
BEGUN = time.monotonic()


class TooLong(BaseException):
    """A compilation passed its limit. No Exception, so that nobody takes it for a failed kernel."""


@contextlib.contextmanager
def limited(seconds):
    def stop(*_):
        raise TooLong(f"not compiled in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Peers:
    """The measurements, each a method that returns what goes into the JSON."""

    def __init__(self, args):
        import torch
        from torch_llama import ATTENTIONS, Layer, Llama

        self.args, self.torch = args, torch
        self.cuda = args.device != "cpu"
        self.dtype = torch.float16 if self.cuda else torch.float32
        self.Llama, self.Layer, self.attentions = Llama, Layer, dict(ATTENTIONS)

    def left(self):
        return self.args.limit - (time.monotonic() - BEGUN)

    def seconds(self, run, times, rounds=5, capture=True):
        """Seconds of one run, the median of rounds of so many; on a GPU run as a captured graph."""
        torch = self.torch
        if not self.cuda:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()) if capture else contextlib.nullcontext():
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        if capture:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                run()
            run = graph.replay
        found = []
        for _ in range(rounds + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(times):
                run()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1000 / times)
        return statistics.median(found[1:])

    def compiled(self, way):
        """The functions of a step, compiled one of several ways."""
        self.torch._dynamo.reset()
        functions = [self.Llama.begin, self.Layer.forward, self.Llama.end, self.Llama.logits]
        if way == "eager":
            return functions
        how = {
            "tuned": {"mode": "max-autotune-no-cudagraphs"},
            # Products with one row become reductions, of which tuning finds the best.
            "descent": {"options": {"coordinate_descent_tuning": True}},
        }.get(way, {})
        return [self.torch.compile(f, fullgraph=True, dynamic=False, **how) for f in functions]

    def attempt(self, what, make, limit=None):
        """What `make` returns, or None and a line why not."""
        try:
            with limited(max(1.0, min(self.args.compile_limit, self.left() if limit is None else limit))):
                return make()
        except (Exception, TooLong) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            print(f"  {what}: left out, {type(error).__name__}: {reason[:160]}", flush=True)
            self.torch._dynamo.reset()

    def stepper(self, model, way):
        """A step of this model, compiled; it has run once."""
        if way == "reduce-overhead":
            self.torch._dynamo.reset()
            whole = self.torch.compile(self.Llama.step, fullgraph=True, dynamic=False, mode=way)
            run = lambda: whole(model)
        else:
            begin, layer, end, _ = self.compiled(way)
            run = lambda: model.step(begin, layer, end)
        run()
        return run

    def decode(self, model, way, attention):
        """Seconds of a step, or None."""

        def make():
            model.attend_with(self.attentions[attention])
            return self.stepper(model, way)

        start, what = time.monotonic(), f"{way}, {attention}"
        if run := self.attempt(what, make):
            compiling = time.monotonic() - start
            time_ = self.attempt(what, lambda: self.seconds(run, 128, capture=way != "reduce-overhead"), 30)
            if time_:
                rate = model.batch / time_
                print(f"  {what}: {rate:.1f} tokens/s, {1e3 * time_:.3f} ms a step, compiled in {compiling:.1f} s")
            return time_

    def model(self, name, batch, **options):
        name = name if self.cuda else "tiny"
        return self.Llama(SHAPES[name], batch, CONTEXT, self.args.device, self.dtype, **options)

    def check(self):
        """Step by step, at different positions, a model has the logits of its prompt forward."""
        torch, worst = self.torch, {}
        model = self.Llama(SHAPES["tiny"], 3, 128, self.args.device, self.dtype)
        tokens = torch.randint(512, (3, 100), device=self.args.device)
        full = torch.stack([model.prompt(row, last=False) for row in tokens])
        for name, attention in list(self.attentions.items()):

            def difference():
                model.attend_with(attention)
                worst_steps, rows = [], torch.arange(3, device=self.args.device)
                for step in range(100):
                    model.positions.copy_((step - 7 * rows).clamp(0))
                    model.tokens.copy_(tokens[rows, model.positions])
                    x, cos, sin = model.begin()
                    delta = model.no_delta.expand_as(x)
                    for layer in model.layers:
                        x, delta = layer(x, delta, cos, sin, model.attention)
                    wrong = (model.logits(x, delta) - full[rows, model.positions]).abs().max() / full.abs().max()
                    worst_steps.append(wrong)
                return torch.stack(worst_steps).max().item()

            worst[name] = self.attempt(f"check of {name}", difference)
            # Not a number is wrong, too.
            if worst[name] is None or not worst[name] <= (0.01 if self.cuda else 1e-4):
                print(f"check: {name} is wrong or not to be had, and is not measured", flush=True)
                del self.attentions[name]
        print("check: " + ", ".join(f"{k} {v:.1e}" for k, v in worst.items() if v is not None))
        return {"largest_difference": worst}

    def copy(self):
        """Bytes read and written a second by a copy within the device."""
        size = 2 << 30 if self.cuda else 1 << 24
        source = self.torch.zeros(size, dtype=self.torch.uint8, device=self.args.device)
        target = self.torch.empty_like(source)
        rate = 2 * size / self.seconds(lambda: target.copy_(source), 10, 9, capture=False)
        print(f"copy: {rate / 1e9:.1f} GB/s read and written")
        return {"bytes_per_second": rate}

    def vanilla(self):
        """Many sequences of the vanilla model, compiled: the fastest way counts."""
        found = {}
        model = self.model("360m", self.args.batch)
        ways = [("eager", next(iter(self.attentions))), *(("layers", name) for name in self.attentions)]
        for way, attention in ways:
            found[way, attention, "rows"] = self.decode(model, way, attention)
        best = lambda: min((v, k) for k, v in found.items() if v)[1]
        _, attention, _ = best()
        columns = self.model("360m", self.args.batch, columns=True)
        found["layers", attention, "columns"] = self.decode(columns, "layers", attention)
        _, attention, layout = best()
        model = columns if layout == "columns" else model
        for way in ("tuned", "reduce-overhead"):
            # Other parts need time as well.
            if self.left() < 30:
                print(f"  {way}: left out, the time is up")
                continue
            found[way, attention, layout] = self.decode(model, way, attention)
        way = best()
        rate = self.args.batch / found[way]
        print(f"vanilla: {rate:.1f} tokens/s, {self.args.batch} sequences, {', '.join(way)}")
        variants = {", ".join(k): self.args.batch / v for k, v in found.items() if v}
        return {"tokens_per_second": rate, "sequences": self.args.batch, "way": way, "variants": variants}

    def prompt(self):
        """A prompt's forward up to the logits of its last token."""
        results = {}
        for name in ("360m", "1.4b"):
            model = self.model(name, 1)
            tokens = self.torch.randint(model.shape.vocab, (PROMPT,), device=self.args.device)
            rates = {}
            for way in ("eager", "layers"):

                def make():
                    _, layer, _, logits = self.compiled(way)
                    model.prompt(tokens, layer, logits)
                    return self.seconds(lambda: model.prompt(tokens, layer, logits), 10)

                if time_ := self.attempt(f"prompt {name}, {way}", make):
                    rates[way] = PROMPT / time_
            if rates:
                print(f"prompt: {name}: {max(rates.values()):.1f} tokens/s ({', '.join(rates)})", flush=True)
                results[name] = {"tokens_per_second": max(rates.values()), "variants": rates}
        return results

    def decode1(self):
        """One sequence of 128 tokens with the large model."""
        model = self.model("1.4b", 1, mean=128, deviation=0)
        attention = next(name for name in ("flex", "sdpa") if name in self.attentions)
        times = [t for way in ("eager", "layers", "descent") if (t := self.decode(model, way, attention))]
        if not times:
            return None
        shape = model.shape
        size = (shape.layers * shape.layer_weights() + shape.output_weights()) * 2
        print(f"decode1: {1 / min(times):.1f} tokens/s, {size / min(times) / 1e9:.1f} GB/s of weights")
        return {"tokens_per_second": 1 / min(times), "weight_bytes_per_second": size / min(times)}

    def llama(self):
        """llama.cpp's own figures, where its folder and files are named."""
        if not self.args.llama or not self.args.llama_model:
            print("llama: left out, --llama FOLDER and --llama-model FILE name it")
            return None
        command = [str(self.args.llama / "llama-bench"), "-o", "json", "-ngl", "99", "-p", "512", "-n", "128"]
        for file in self.args.llama_model:
            command += ["-m", str(file)]
        tests = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rows = [{k: t[k] for k in ("model_filename", "n_prompt", "n_gen", "avg_ts", "build_commit")} for t in tests]
        for row in rows:
            print(f"llama: {row['model_filename']} pp{row['n_prompt']} tg{row['n_gen']}: {row['avg_ts']:.1f} tokens/s")
        return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} [all]")
    parser.add_argument("--json", type=pathlib.Path, metavar="FILE", help="writes all results")
    parser.add_argument("--batch", type=int, default=32, metavar="B", help="sequences at once [%(default)s]")
    parser.add_argument("--limit", type=float, default=100, metavar="S", help="seconds in all [%(default)s]")
    parser.add_argument("--compile-limit", type=float, default=25, metavar="S", help="of each way [%(default)s]")
    parser.add_argument("--llama", type=pathlib.Path, metavar="FOLDER", help="where llama-bench is")
    parser.add_argument("--llama-model", type=pathlib.Path, nargs="*", metavar="FILE", help="what it runs")
    # `cpu` runs tiny shapes without graphs, to try this script.
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    try:
        import torch
    except ImportError:
        sys.exit("PyTorch is not installed here")
    if args.device != "cpu" and not torch.cuda.is_available():
        sys.exit("PyTorch sees no GPU here")
    name = torch.cuda.get_device_name() if args.device != "cpu" else "cpu"
    print(f"{name}, PyTorch {torch.__version__}", flush=True)
    peers, results = Peers(args), {"device": name, "torch": torch.__version__}
    with torch.no_grad():
        for part in PARTS:
            if args.parts and part not in args.parts:
                continue
            try:
                results[part] = getattr(peers, part)()
            except Exception as error:
                print(f"{part}: failed, {type(error).__name__}: {error}", flush=True)
                results[part] = None
            if args.device != "cpu":
                torch.cuda.empty_cache()
            if args.json:
                args.json.write_text(json.dumps(results, indent=2) + "\n")
    failed = [part for part in results if results[part] is None and part != "llama"]
    print(f"{time.monotonic() - BEGUN:.0f} s; failed: {', '.join(failed) or 'nothing'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
