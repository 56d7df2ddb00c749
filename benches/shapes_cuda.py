"""Shapes and lengths that peers_cuda.py and ratios_cuda.py share."""

from dataclasses import dataclass

# Answers as `mor bench -b` has them, and the places of a sequence's cache.
MEAN_OUTPUT, DEVIATION, CONTEXT = 256, 64, 512


@dataclass(frozen=True)
class Shape:
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    layers: int
    vocab: int = 49152
    head_dim: int = 64

    def layer_weights(self):
        """Weights of a layer's matrices."""
        width = self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.hidden * (width + 3 * self.ffn)

    def output_weights(self):
        return self.hidden * self.vocab


SHAPES = {
    "360m": Shape(960, 2560, 15, 5, 32),
    "1.4b": Shape(2048, 8192, 32, 32, 20),
    "tiny": Shape(128, 256, 6, 2, 3, 512, 32),
}
