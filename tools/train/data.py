#!/usr/bin/env python3
"""Text -> clean paragraphs -> train and held-out text -> tokenizer -> token ids.

    python3 data.py austen.txt --out data

The input is plain text with hard line breaks, as Project Gutenberg and the R package janeaustenr
have it. Paragraphs are unwrapped, headings and typewriter italics dropped, and every twentieth
chapter goes to the held-out text.
"""
import argparse, os, re
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"


def chapters(text):
    """Chapters as lists of paragraphs."""
    out = []
    for chunk in re.split(r"\n\s*(?:CHAPTER|Chapter|VOLUME|Volume)\s+[IVXLC\d]+\b[^\n]*\n", text):
        paragraphs = [" ".join(p.split()) for p in re.split(r"\n\s*\n", chunk)]
        paragraphs = [p.replace("_", "").replace("--", " -- ").replace("  ", " ") for p in paragraphs]
        # Titles, "THE END" and the like: no sentence ends in them.
        paragraphs = [p for p in paragraphs if len(p) > 20 and re.search(r"[.!?\"']$", p) and not p.isupper()]
        if sum(map(len, paragraphs)) > 2000:
            out.append("\n\n".join(paragraphs))
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("text", nargs="+")
    p.add_argument("--out", default="data")
    p.add_argument("--vocab", type=int, default=4096)
    a = p.parse_args()
    os.makedirs(a.out, exist_ok=True)
    all_chapters = [c for path in a.text for c in chapters(open(path, encoding="utf-8").read())]
    held_out = all_chapters[10::20]
    train = [c for i, c in enumerate(all_chapters) if i % 20 != 10]
    open(f"{a.out}/heldout.txt", "w").write("\n\n".join(held_out) + "\n")

    tokenizer = Tokenizer(models.BPE())
    # SmolLM's: single digits, then GPT-2's pattern over bytes.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(train, trainers.BpeTrainer(
        vocab_size=a.vocab, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    tokenizer.save(f"{a.out}/tokenizer.json")

    for name, texts in [("train", train), ("heldout", held_out)]:
        ids = [i for t in texts for i in [0] + tokenizer.encode(t).ids]
        np.array(ids, np.uint16).tofile(f"{a.out}/{name}.bin")
        print(f"{name}: {len(texts)} chapters, {sum(map(len, texts)):,} characters, {len(ids):,} tokens")


if __name__ == "__main__":
    main()
