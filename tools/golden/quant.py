"""Golden vectors for src/quant, from the `gguf` package of PyPI (made with gguf 0.19.0, numpy 2.4).

    python tools/golden/quant.py tests/data/quant

<TYPE>.bytes, <TYPE>.f32   random blocks and the weights that they mean
encode.f32                 weights: random rows, then rows that sit on roundings
encode.<TYPE>.bytes        the same weights in the formats that have an encoder
"""

import sys
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType as T
from gguf.quants import dequantize, quantize

WEIGHTS = 1024
# Where a block holds half-precision numbers; all other bytes are free.
HALVES = {
    T.F16: [0],
    T.BF16: [],
    T.Q8_0: [0],
    T.Q4_0: [0],
    T.Q4_1: [0, 2],
    T.Q5_0: [0],
    T.Q5_1: [0, 2],
    T.Q4_K: [0, 2],
    T.Q5_K: [0, 2],
    T.Q6_K: [208],
}


def random_halves(rng, n):
    """Finite halves of every magnitude and both signs, subnormal ones among them."""
    bits = rng.integers(0, 0x7C00, n, dtype=np.uint16) | (rng.integers(0, 2, n, dtype=np.uint16) << 15)
    return bits.view(np.uint8).reshape(n, 2)


def random_blocks(rng, ty):
    length, size = GGML_QUANT_SIZES[ty]
    n = WEIGHTS // length
    blocks = rng.integers(0, 256, (n, size), dtype=np.uint8)
    for at in HALVES[ty]:
        blocks[:, at : at + 2] = random_halves(rng, n)
    if ty == T.BF16:
        blocks[:, 1] = np.where(blocks[:, 1] & 0x7F == 0x7F, 0x3F, blocks[:, 1])
    return blocks


def weights(rng):
    row = rng.normal(0, 1, WEIGHTS).astype(np.float32)
    blocks = row.reshape(-1, 32)
    blocks[1] *= np.float32(1e-5)  # the scale is a subnormal half
    blocks[2] *= np.float32(1e-9)  # the scale vanishes as a half
    blocks[3] *= np.float32(3000)
    blocks[4] = 0
    blocks[5] = 0.25
    blocks[6] = -0.25
    blocks[7] = np.arange(32) - 8 + 0.5  # half steps of a 4-bit block, as far as it reaches
    blocks[8] = np.clip(np.arange(32) - 16.5, -8, 7.5)
    blocks[9] = np.arange(32) * 8 - 127 + 0.5
    blocks[9, 0] = -127
    blocks[10] = 0
    blocks[10, 17] = 3  # one weight among zeros
    blocks[11] = np.where(np.arange(32) % 2 == 0, 1, -1)  # both ends are the largest
    blocks[12] = 10 + np.arange(32) * np.float32(1e-3)  # far from zero, close together
    blocks[13] = np.arange(32) * 0.5  # half steps of Q4_1
    return row


def main(out):
    rng = np.random.default_rng(20260721)
    out.mkdir(parents=True, exist_ok=True)
    for ty in HALVES:
        blocks = random_blocks(rng, ty)
        blocks.tofile(out / f"{ty.name}.bytes")
        values = blocks.view(np.float16).astype(np.float32) if ty == T.F16 else dequantize(blocks.reshape(-1), ty)
        values.astype("<f4").tofile(out / f"{ty.name}.f32")
    row = weights(rng)
    row.astype("<f4").tofile(out / "encode.f32")
    for ty in (T.F16, T.BF16, T.Q8_0, T.Q4_0, T.Q4_1):
        quantize(row, ty).tofile(out / f"encode.{ty.name}.bytes")


main(Path(sys.argv[1]))
