#!/usr/bin/env python3
"""Trains the default model on the data that data.py made, and writes the authors' checkpoint layout.

    python3 train.py --data data --out checkpoint --minutes 60

The learning rate falls along a cosine that ends when the minutes do; the checkpoint with the lowest
held-out loss (mean of both routing modes) is the one that stays in --out.
"""
import argparse, json, math, os, shutil, time
import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch.nn import functional as F

from model import Config, MoR


def export(model, a):
    os.makedirs(a.out, exist_ok=True)
    save_file(model.checkpoint(), f"{a.out}/model.safetensors")
    json.dump(model.config_json(), open(f"{a.out}/config.json", "w"), indent=1)
    yaml.safe_dump(model.mor_yaml(), open(f"{a.out}/mor.yaml", "w"), sort_keys=False)
    shutil.copy(f"{a.data}/tokenizer.json", a.out)
    json.dump({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "add_bos_token": True},
              open(f"{a.out}/tokenizer_config.json", "w"))


@torch.no_grad()
def evaluate(model, ids, windows=48):
    """Mean loss and share of tokens per depth on evenly spread windows, in both modes."""
    model.eval()
    T, result = model.c.context, {}
    starts = np.linspace(0, len(ids) - T - 1, windows).astype(int)
    x = torch.stack([ids[s:s + T] for s in starts])
    y = torch.stack([ids[s + 1:s + T + 1] for s in starts])
    for mode in ("capacity", "threshold"):
        loss, depths = 0.0, []
        for b in range(0, windows, 16):
            out = model(x[b:b + 16]) if mode == "capacity" else model.threshold(x[b:b + 16])
            loss += F.cross_entropy(out[0].float().flatten(0, 1), y[b:b + 16].flatten(), reduction="sum").item()
            depths.append(out[-1].flatten())
        share = torch.bincount(torch.cat(depths), minlength=model.c.recursions + 1) / y.numel()
        result[mode] = (loss / y.numel(), [round(s, 3) for s in share.tolist()])
    model.train()
    return result


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--data", default="data"); p.add_argument("--out", default="checkpoint")
    p.add_argument("--minutes", type=float, default=60); p.add_argument("--batch", type=int, default=12)
    p.add_argument("--lr", type=float, default=2e-3); p.add_argument("--aux", type=float, default=0.02)
    p.add_argument("--dropout", type=float, default=0.1); p.add_argument("--seed", type=int, default=1)
    p.add_argument("--every", type=float, default=4, help="minutes between evaluations")
    p.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    a = p.parse_args()
    torch.manual_seed(a.seed)
    train, held_out = (torch.from_numpy(np.fromfile(f"{a.data}/{n}.bin", np.uint16).astype(np.int64)) for n in ("train", "heldout"))
    c = Config(dropout=a.dropout)
    model = MoR(c)
    print(f"{sum(q.numel() for q in model.parameters()):,} parameters, {len(train):,} training tokens", flush=True)
    matrices = [q for q in model.parameters() if q.dim() == 2]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1},
                                   {"params": [q for q in model.parameters() if q.dim() != 2], "weight_decay": 0.0}],
                                  lr=a.lr, betas=(0.9, 0.95))
    start, best, seen, step, next_evaluation = time.time(), math.inf, 0, 0, a.every
    while True:
        minutes = (time.time() - start) / 60
        done = min(1.0, minutes / a.minutes)
        if minutes >= next_evaluation or done >= 1.0:
            next_evaluation = minutes + a.every
            r = evaluate(model, held_out)
            mean = (r["capacity"][0] + r["threshold"][0]) / 2
            print(f"{minutes:5.1f} min  step {step}  {seen:,} tokens  held-out {r}", flush=True)
            if mean < best:
                best = mean
                export(model, a)
            if done >= 1.0:
                break
        lr = a.lr * min(1.0, (step + 1) / 100) * (0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * done)))
        for group in optimizer.param_groups:
            group["lr"] = lr
        at = torch.randint(len(train) - c.context - 1, (a.batch,))
        x = torch.stack([train[i:i + c.context] for i in at])
        y = torch.stack([train[i + 1:i + c.context + 1] for i in at])
        with torch.autocast("cpu", torch.bfloat16, enabled=not a.fp32):
            logits, aux, _ = model(x)
            loss = F.cross_entropy(logits.float().flatten(0, 1), y.flatten())
        (loss + a.aux * aux).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, seen = step + 1, seen + x.numel()
        if step % 20 == 0:
            print(f"{minutes:5.1f} min  step {step}  loss {loss.item():.3f}  aux {aux.item():.3f}", flush=True)


if __name__ == "__main__":
    main()
