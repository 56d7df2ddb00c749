#!/usr/bin/env python3
"""Writes tests/data/convert/: the PyTorch files that the converter's tests read.

    python3 tools/golden/convert.py        (torch 2.6, safetensors, tokenizers)

Each is a reference case saved as training scripts save it, or a file that must be refused.
"""
import os, pickle, shutil, zipfile
import torch
from safetensors.torch import load_file

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
CASES, OUT = os.path.join(ROOT, "tests", "cases"), os.path.join(ROOT, "tests", "data", "convert")


def folder(name, case=None):
    path = os.path.join(OUT, name)
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path)
    if case:
        for file in ["config.json", "mor.yaml"]:
            shutil.copyfile(os.path.join(CASES, case, file), os.path.join(path, file))
    return path


def case(name):
    return load_file(os.path.join(CASES, name, "model.safetensors"))


def evil(path):
    """A pickle that would run a command when loaded."""
    class Command:
        def __reduce__(self):
            return os.system, ("true",)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:
        # Python names os.system by the module that defines it; a forger writes what reads best.
        z.writestr("archive/data.pkl", pickle.dumps(Command(), protocol=2).replace(b"cposix\n", b"cos\n"))
        z.writestr("archive/byteorder", "little")


def main():
    tied = case("expert_rec4_tied")
    # As torch.save writes a state dict: ordered, with _metadata, parameters among plain tensors,
    # two names on one storage.
    state = torch.nn.Module().state_dict()
    for i, (name, tensor) in enumerate(tied.items()):
        state[name] = torch.nn.Parameter(tensor) if i % 2 else tensor
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, os.path.join(folder("bin", "expert_rec4_tied"), "pytorch_model.bin"))

    cycle = case("expert_cycle")
    bf16 = {"module._orig_mod." + n: t.bfloat16() for n, t in cycle.items()}
    torch.save({"model": bf16, "step": 7, "best": 1.5}, os.path.join(folder("bf16", "expert_cycle"), "pytorch_model.bin"))

    # Two shards with an index; all layers of one shard are views of one storage, at offsets.
    path = folder("sharded", "token_cycle")
    token = case("token_cycle")
    ordered = sorted(token)
    index = {"metadata": {}, "weight_map": {}}
    for number, part in enumerate([ordered[:10], ordered[10:]], 1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        flat, views, at = torch.cat([token[n].flatten() for n in part]), {}, 0
        for n in part:
            views[n] = flat[at:at + token[n].numel()].view(token[n].shape)
            at += token[n].numel()
            index["weight_map"][n] = file
        torch.save(views, os.path.join(path, file), pickle_protocol=4)
    import json
    with open(os.path.join(path, "pytorch_model.bin.index.json"), "w") as f:
        json.dump(index, f, indent=1)

    evil(os.path.join(folder("evil"), "pytorch_model.bin"))
    small = {"model.embed_tokens.weight": torch.zeros(4, 2)}
    torch.save(small, os.path.join(folder("legacy"), "pytorch_model.bin"), _use_new_zipfile_serialization=False)
    torch.save({"model.embed_tokens.weight": torch.zeros(2, 4).t()}, os.path.join(folder("strided"), "pytorch_model.bin"))
    tokenizer(folder("tokenizer"))


def tokenizer(path):
    """A small vocabulary cut as SmolLM's, saved by the library itself, with what it makes of some text."""
    import json
    from tokenizers import Tokenizer, models, pre_tokenizers, decoders, trainers
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    t.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    t.train_from_iterator(["the robot goes on and the other robot stops there, then 12 robots go"] * 3, trainer)
    t.add_tokens(["<tool>"])
    t.save(os.path.join(path, "tokenizer.json"))
    config = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}, "unk_token": "<|endoftext|>",
              "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}]}
    texts = ["the other robot", "123 robots, then <|im_end|>", "Größe <tool> 7"]
    for name, value in [("tokenizer_config.json", config), ("expected.json", [[s, t.encode(s).ids] for s in texts])]:
        with open(os.path.join(path, name), "w") as f:
            json.dump(value, f, indent=1, ensure_ascii=False)


if __name__ == "__main__":
    main()
