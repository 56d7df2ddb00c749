#!/usr/bin/env python3
"""Makes random checkpoints and what the reference says of them, in the layout of tests/cases.

    pip install numpy pyyaml
    python3 tests/shapes/make.py MOR_REFERENCE.PY FOLDER FIRST LAST [--long]
    MOR_TEST_CASES=FOLDER cargo test --release --test reference

MOR_REFERENCE.PY is the executable specification that tests/cases come from. Each seed from FIRST to LAST - 1 gives
one case: its kind, order of layers, widths, heads, routers and texts are random, and odd where they may be. With
--long texts have up to 600 tokens and models are wider. A seed is passed over where single precision could not be
asked for the same result: where a route or a greedy token is decided by next to nothing, or where the reference
itself, in single precision, is off by more than 3e-5 standard deviations (as where a router without a function
multiplies numbers until their squares overflow).
"""
import argparse
import importlib.util
import json
import os
import random
import shutil
import sys

import numpy as np
import yaml

SEQUENCES = 2
GREEDY = 32  # of which 8 are the first sequence's first
MODES = ("capacity", "threshold")


class Watched:
    """numpy as the reference uses it, which keeps the weights that the capacity mode sorts."""

    def __init__(self):
        self.sorted = []

    def __getattr__(self, name):
        return getattr(np, name)

    def argsort(self, values, **options):
        self.sorted.append(np.sort(values))
        return np.argsort(values, **options)


def load_reference(path):
    """The reference as a module that notes what its routes depend on."""
    spec = importlib.util.spec_from_file_location("mor_reference", path)
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    reference.np = Watched()
    reference.scores = []
    score = reference.Model.score

    def watched(self, weights, x):
        reference.scores.append(score(self, weights, x))
        return reference.scores[-1]

    reference.Model.score = watched
    return reference


def write_safetensors(path, tensors):
    names = {np.dtype("float32"): "F32", np.dtype("float16"): "F16", np.dtype("int64"): "I64"}
    head, data = {}, b""
    for name, tensor in tensors.items():
        raw = np.ascontiguousarray(tensor).tobytes()
        head[name] = {
            "dtype": names[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    head = json.dumps(head).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head + data)


class Checkpoint:
    """A random model: what config.json, mor.yaml and model.safetensors say."""

    def __init__(self, seed, long):
        pick, self.numbers = random.Random(seed), np.random.default_rng(seed)
        kind = pick.choice(["expert"] * 4 + ["token"] * 3 + ["recursive"] * 2 + ["vanilla"])
        routed = kind in ("expert", "token")
        head = pick.choice([32, 64, 96, 128] if long else [2, 4, 6, 8, 10, 16, 20, 32, 64, 80])
        kv_heads = pick.choice([1, 1, 2, 3])
        heads = kv_heads * pick.choice([1, 2, 3, 4, 5, 7, 8])
        hidden = pick.choice([128, 256, 320, 576] if long else [8, 16, 24, 30, 32, 33, 36, 40, 48, 63, 64, 65, 72])
        if pick.random() < 0.3:
            hidden = heads * head
        inner = pick.choice([256, 384, 512, 1536] if long else [16, 31, 32, 50, 64, 65, 96, 100])
        vocab = pick.choice([300, 1000, 1024] if long else [17, 32, 64, 96, 97, 100, 128, 131])
        recursions = 1 if kind == "vanilla" else pick.choice([2, 3, 4, 5])
        block = pick.choice([1, 1, 2, 3])
        orders = {"recursive": ["cycle", "sequence", "middle_cycle", "middle_sequence"], "vanilla": ["cycle"]}
        sharing = pick.choice(orders.get(kind, ["cycle", "middle_cycle"]))
        middle = kind != "vanilla" and sharing.startswith("middle")
        layers = block * recursions + 2 * middle
        kv_shared = routed and pick.random() < 0.4
        own_norms = kind != "vanilla" and pick.random() < 0.25
        own_attention = routed and pick.random() < 0.2
        self.dtype = np.float16 if pick.random() < 0.2 else np.float32
        capacities = [(recursions - i) / recursions for i in range(recursions)]
        if pick.random() < 0.5:
            capacities = sorted((pick.uniform(0.05, 1) for _ in range(recursions)), reverse=True)
        if pick.random() < 0.1:
            capacities[-1] = 0.0
        router_type = pick.choice(["linear", "mlp"])
        self.length = pick.choice([8, 257, 300, 513, 600] if long else [8, 9, 17, 31, 33, 40, 64, 65, 100])
        self.pick = pick
        self.config = {
            "architectures": ["MoRLlamaForCausalLM" if routed else "LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "vocab_size": vocab,
            "max_position_embeddings": 1024,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head,
            "rms_norm_eps": pick.choice([1e-5, 1e-6, 1e-3]),
            "rope_theta": pick.choice([1000.0, 10000.0, 100000.0, 500000.0]),
            "tie_word_embeddings": pick.random() < 0.3,
        }
        if hidden == heads * head and pick.random() < 0.5:
            del self.config["head_dim"]
        self.training = {
            "recursive": {
                "enable": kind != "vanilla",
                "num_recursion": recursions,
                "sharing": sharing,
                "ln_share": not own_norms,
            },
            "kv_sharing": {"enable": kv_shared, "update_cache": False},
            "relaxation": {"enable": False},
            "mor": {
                "enable": routed,
                "type": kind if routed else None,
                "capacity": ",".join(map(str, capacities)),
                "rand_router": False,
                "router_type": router_type,
                "temp": pick.choice([1.0, 1.0, 0.5, 2.0, 3.0]),
                "expert": {
                    "router_func": pick.choice(["sigmoid", "sigmoid", "tanh", None]),
                    "alpha": pick.choice([0.1, 0.5, 1.0]),
                    "sampling": pick.choice(["aux_loss", "aux_router"]),
                    "gating": pick.choice(["weighted", "weighted", "none"]),
                },
                "token": {
                    "router_func": pick.choice(["softmax", "sigmoid"]),
                    "alpha": pick.choice([0.1, 1.0]),
                    "balancing": pick.choice(["loss", "loss_free"]),
                    "gating": pick.choice(["weighted", "none"]),
                },
            },
        }
        self.name = f"{kind}_{sharing}" if kind != "vanilla" else kind
        self.name += f"_{hidden}_{heads}_{kv_heads}_{head}_{recursions}x{block}_{seed}"
        self.kind, self.capacities = kind, capacities

        self.tensors = {}
        self.put("model.embed_tokens.weight", vocab, hidden, scale=1.0)
        if not self.config["tie_word_embeddings"]:
            self.put("lm_head.weight", vocab, hidden)
        self.norm("model.norm", hidden)
        first = int(middle)

        def layer_name(r, j):
            if kind == "expert":
                return f"model.layers.{first + r}.block.{j}"
            if kind == "token":
                return f"model.layers.{first}.block_list.{r}.{j}"
            if sharing.endswith("sequence"):
                return f"model.layers.{first + j * recursions + r}"
            return f"model.layers.{first + r * block + j}"

        def norms(name):
            self.norm(name + ".input_layernorm", hidden)
            self.norm(name + ".post_attention_layernorm", hidden)

        def attention(name):
            for part, rows in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                self.put(f"{name}.self_attn.{part}_proj.weight", rows * head, hidden)
            self.put(f"{name}.self_attn.o_proj.weight", hidden, heads * head)

        def layer(name):
            norms(name)
            attention(name)
            self.put(name + ".mlp.gate_proj.weight", inner, hidden)
            self.put(name + ".mlp.up_proj.weight", inner, hidden)
            self.put(name + ".mlp.down_proj.weight", hidden, inner)

        for j in range(block):
            layer(layer_name(0, j))
            for r in range(1, recursions):
                if own_norms:
                    norms(layer_name(r, j))
                if own_attention:
                    attention(layer_name(r, j))
        if middle:
            layer("model.layers.0")
            after = {"expert": first + recursions, "token": first + 1}.get(kind, layers - 1)
            layer(f"model.layers.{after}")

        router_inner = pick.choice([2 * hidden, hidden, 7, 33])
        spread = pick.choice([0.5, 1.0, 3.0])

        def router(name, outputs):
            if router_type == "linear":
                self.put(name + ".router.weight", outputs, hidden, scale=spread * hidden**-0.5)
            else:
                self.put(name + ".router.0.weight", router_inner, hidden)
                self.put(name + ".router.2.weight", outputs, router_inner, scale=2 * spread * router_inner**-0.5)

        if kind == "expert":
            for r in range(recursions):
                router(f"model.layers.{first + r}.mor_router", 1)
                if self.by_aux_router():
                    router(f"model.layers.{first + r}.mlp_router", 1)
        if kind == "token":
            router(f"model.layers.{first}.mor_router", recursions)
            if self.training["mor"]["token"]["balancing"] == "loss_free":
                self.put(f"model.layers.{first}.router_bias", recursions, scale=0.2)

    def put(self, name, *shape, scale=None, mean=0.0):
        scale = shape[-1] ** -0.5 if scale is None else scale
        self.tensors[name] = (self.numbers.normal(size=shape) * scale + mean).astype(self.dtype)

    def norm(self, name, width):
        self.put(name + ".weight", width, scale=0.1, mean=1.0)

    def by_aux_router(self):
        return self.training["mor"]["expert"]["sampling"] == "aux_router"

    def write(self, folder):
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder)
        names = sorted(self.tensors)
        if self.pick.random() < 0.5:
            self.pick.shuffle(names)
        write_safetensors(f"{folder}/model.safetensors", {name: self.tensors[name] for name in names})
        with open(f"{folder}/config.json", "w") as file:
            json.dump(self.config, file, indent=1)
        with open(f"{folder}/mor.yaml", "w") as file:
            yaml.safe_dump(self.training, file, sort_keys=False)


class Case:
    """A checkpoint and texts that single precision must decide as double precision does."""

    def __init__(self, reference, checkpoint, folder):
        self.reference, self.checkpoint = reference, checkpoint
        self.model, self.single = reference.Model(folder), in_single_precision(reference, folder)

    def expected(self):
        """What expected.safetensors holds, or None."""
        vocab, numbers = self.checkpoint.config["vocab_size"], self.checkpoint.numbers
        texts, results, greedy = [], [], None
        for _ in range(200):
            text = numbers.integers(0, vocab, size=self.checkpoint.length)
            result = self.both_modes(text)
            if result is None:
                continue
            if greedy is None:
                greedy = self.greedy(text[:8])
                if greedy is None:
                    continue
            texts.append(text)
            results.append(result)
            if len(texts) == SEQUENCES:
                break
        else:
            return None
        expected = {"input_ids": np.array(texts, np.int64), "greedy": np.array(greedy, np.int64)}
        for mode in MODES:
            expected[f"logits_{mode}"] = np.array([r[mode][0] for r in results], np.float32)
            expected[f"depth_{mode}"] = np.array([r[mode][1] for r in results], np.int64)
        return expected

    def both_modes(self, text):
        results = {}
        for mode in MODES:
            results[mode] = self.run(text, mode)
            if results[mode] is None:
                return None
            logits, depths = results[mode]
            with np.errstate(all="ignore"):
                other, other_depths = self.single.run(text, mode)
            error = np.abs(other - logits).max() / logits.std()
            if not error < 3e-5 or (depths != other_depths).any():
                return None
        return results

    def greedy(self, prompt):
        tokens = list(prompt)
        while len(tokens) < GREEDY:
            result = self.run(np.array(tokens), "threshold")
            if result is None:
                return None
            last = result[0][-1]
            second, best = np.sort(last)[-2:]
            if best - second < 1e-3 * last.std():
                return None
            tokens.append(int(last.argmax()))
        return tokens

    def run(self, text, mode):
        """Logits and depths, or None where a route is decided by next to nothing."""
        self.reference.scores.clear()
        self.reference.np.sorted.clear()
        logits, depths = self.model.run(text, mode)
        return (logits, depths) if self.is_decided(len(text), mode) else None

    def is_decided(self, length, mode):
        mor, scores = self.checkpoint.training["mor"], self.reference.scores
        if self.checkpoint.kind == "expert" and mode == "threshold":
            by_aux = self.checkpoint.by_aux_router()
            cut = 0.5 if mor["expert"]["router_func"] is None and not by_aux else 0.0
            deciding = scores[1::2] if by_aux else scores
            return all(np.abs(s - cut).min(initial=np.inf) > 1e-3 for s in deciding)
        if self.checkpoint.kind == "expert":
            for capacity, weights in zip(self.checkpoint.capacities, self.reference.np.sorted):
                kept = max(1, int(capacity * length))
                if kept < len(weights):
                    out, last = weights[kept], weights[kept - 1]
                    if out - last < 2e-6 * max(1, abs(out)):
                        return False
        if self.checkpoint.kind == "token":
            function = {"sigmoid": self.reference.sigmoid, "softmax": self.reference.softmax}
            weights = function[mor["token"]["router_func"]](scores[0]) * mor["token"]["alpha"]
            if self.model.router_bias is not None and mor["token"]["balancing"] == "loss_free":
                weights = weights + self.model.router_bias
            best = np.sort(weights, -1)
            return (best[:, -1] - best[:, -2]).min() > 1e-5
        return True


def in_single_precision(reference, folder):
    model = reference.Model(folder)
    single = lambda tensor: tensor.astype(np.float32) if isinstance(tensor, np.ndarray) else tensor
    for name, value in vars(model).items():
        setattr(model, name, single(value))
    for layer in sum(model.layers, []) + model.first + model.last:
        layer.w = {name: single(tensor) for name, tensor in layer.w.items()}
    for routers in (model.router, model.aux_router):
        routers[:] = [router and [single(tensor) for tensor in router] for router in routers]
    return model


def main():
    arguments = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    arguments.add_argument("reference")
    arguments.add_argument("folder")
    arguments.add_argument("first", type=int)
    arguments.add_argument("last", type=int)
    arguments.add_argument("--long", action="store_true")
    given = arguments.parse_args()
    reference = load_reference(given.reference)
    for seed in range(given.first, given.last):
        checkpoint = Checkpoint(seed, given.long)
        folder = f"{given.folder}/{checkpoint.name}"
        checkpoint.write(folder)
        expected = Case(reference, checkpoint, folder).expected()
        if expected is None:
            shutil.rmtree(folder)
            print(f"{seed}: passed over")
            continue
        write_safetensors(f"{folder}/expected.safetensors", expected)
        depths = np.bincount(expected["depth_threshold"].ravel()).tolist()
        print(f"{checkpoint.name}: depths {depths}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
