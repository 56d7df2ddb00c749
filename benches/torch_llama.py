"""A Llama model in plain PyTorch, as fast as compiling it makes it: what peers_cuda.py measures."""

import torch
from shapes_cuda import DEVIATION, MEAN_OUTPUT
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention


def norm(x, weight):
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    return wide.to(x.dtype) * weight


def rotated(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Cached(nn.Module):
    """One new row of each sequence attends to the sequence's cache, [sequences, context, heads, width]."""

    def __init__(self, model):
        super().__init__()
        self.shape, self.batch, self.context = model.shape, model.batch, model.context
        self.register_buffer("rows", torch.arange(model.batch, device=model.positions.device))
        self.register_buffer("positions", model.positions)

    def prepare(self):
        """Once a step, when positions are new."""

    def forward(self, layer, q, k, v):
        layer.k[self.rows, self.positions] = k
        layer.v[self.rows, self.positions] = v
        return self.attend(q, layer.k, layer.v)

    def folded(self, q, k, v):
        """Heads that share keys become rows of one head: no kernel then has to know of sharing."""
        q = q.view(self.batch, self.shape.kv_heads, -1, self.shape.head_dim)
        return q, k.transpose(1, 2), v.transpose(1, 2)


class Masked(Cached):
    """SDPA over the whole context with a mask."""

    def __init__(self, model):
        super().__init__(model)
        self.register_buffer("places", torch.arange(model.context, device=model.positions.device))
        mask = torch.zeros(model.batch, 1, 1, model.context, device=model.positions.device)
        self.register_buffer("mask", mask.to(model.embedding.dtype))

    def prepare(self):
        beyond = self.places > self.positions[:, None]
        self.mask.copy_(torch.where(beyond, float("-inf"), 0.0)[:, None, None])

    def attend(self, q, k, v):
        q, k, v = self.folded(q, k, v)
        mask = self.mask.expand(-1, -1, q.shape[2], -1)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(self.batch, -1)


class Flex(Cached):
    """FlexAttention, which passes over blocks that no sequence has come to."""

    BLOCK = 64

    def __init__(self, model):
        super().__init__(model)
        blocks = torch.arange(model.context // self.BLOCK, device=model.positions.device, dtype=torch.int32)
        self.register_buffer("blocks", blocks.expand(model.batch, 1, 1, -1).contiguous())
        self.register_buffer("count", torch.ones_like(self.blocks[..., 0]))

    def prepare(self):
        self.count.copy_((self.positions // self.BLOCK + 1)[:, None, None])

    def attend(self, q, k, v):
        q, k, v = self.folded(q, k, v)
        positions = self.positions
        mask = BlockMask.from_kv_blocks(
            self.count,
            self.blocks,
            BLOCK_SIZE=(128, self.BLOCK),
            mask_mod=lambda b, h, row, key: key <= positions[b],
            seq_lengths=(q.shape[2], self.context),
            compute_q_blocks=False,
        )
        return flex_attention(q, k, v, block_mask=mask).reshape(self.batch, -1)


class Flash(Cached):
    """PyTorch's own FlashAttention, each sequence as long as it is."""

    def __init__(self, model):
        super().__init__(model)
        ends = torch.arange(model.batch + 1, device=model.positions.device, dtype=torch.int32)
        self.register_buffer("ends", ends)
        self.register_buffer("key_ends", ends * model.context)
        self.register_buffer("used", torch.ones_like(ends[1:]))

    def prepare(self):
        self.used.copy_(self.positions + 1)

    def attend(self, q, k, v):
        attention = torch.ops.aten._flash_attention_forward
        bounds = (self.ends, self.key_ends, 1, self.context)
        found = attention(q, k.flatten(0, 1), v.flatten(0, 1), *bounds, 0.0, False, False, seqused_k=self.used)
        return found[0].reshape(self.batch, -1)


class Causal(nn.Module):
    """All rows are one prompt, whose keys and values are kept."""

    def forward(self, layer, q, k, v):
        layer.k[0, : len(k)] = k
        layer.v[0, : len(v)] = v
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        found = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return found[0].transpose(0, 1).reshape(q.shape[2], -1)


class Layer(nn.Module):
    def __init__(self, shape, batch, context, weights, zeros):
        super().__init__()
        self.shape = shape
        self.sizes = [shape.heads, shape.kv_heads, shape.kv_heads]
        width = shape.heads * shape.head_dim
        self.register_buffer("qkv", weights(sum(self.sizes) * shape.head_dim, shape.hidden))
        self.register_buffer("o", weights(shape.hidden, width))
        self.register_buffer("gate_up", weights(2 * shape.ffn, shape.hidden))
        self.register_buffer("down", weights(shape.hidden, shape.ffn))
        self.register_buffer("norms", zeros(2, shape.hidden) + 1)
        self.register_buffer("k", zeros(batch, context, shape.kv_heads, shape.head_dim))
        self.register_buffer("v", torch.zeros_like(self.k))

    def forward(self, x, delta, cos, sin, attention):
        """`delta` is what the layer before has yet to add, so that the sum and the norm are one kernel."""
        x = x + delta
        heads = F.linear(norm(x, self.norms[0]), self.qkv).view(len(x), -1, self.shape.head_dim)
        q, k, v = heads.split(self.sizes, 1)
        x = x + F.linear(attention(self, rotated(q, cos, sin), rotated(k, cos, sin), v), self.o)
        gate, up = F.linear(norm(x, self.norms[1]), self.gate_up).chunk(2, -1)
        return x, F.linear(F.silu(gate) * up, self.down)


class Llama(nn.Module):
    """A model with `batch` places. `columns` stores matrices the other way, for cuBLAS to try both."""

    def __init__(self, shape, batch, context, device, dtype, columns=False, mean=MEAN_OUTPUT, deviation=DEVIATION):
        super().__init__()
        self.shape, self.batch, self.context = shape, batch, context
        random = torch.Generator(device).manual_seed(1)
        zeros = lambda *sizes: torch.zeros(*sizes, device=device, dtype=dtype)

        def weights(rows, columns_):
            matrix = zeros(rows, columns_).normal_(0, 0.02, generator=random)
            return matrix.t().contiguous().t() if columns else matrix

        self.register_buffer("embedding", zeros(shape.vocab, shape.hidden).normal_(0, 0.5, generator=random))
        output = self.embedding.t().contiguous().t() if columns else self.embedding
        self.register_buffer("output", output)
        self.register_buffer("norm", zeros(shape.hidden) + 1)
        self.register_buffer("no_delta", zeros(1, shape.hidden))
        steps = torch.arange(0, shape.head_dim, 2, device=device) / shape.head_dim
        angles = torch.arange(context, device=device)[:, None] * 100_000.0**-steps
        self.register_buffer("angles", torch.stack([angles.cos(), angles.sin()], 1).to(dtype))
        # Each sequence begins somewhere in its life; 64 more of them wait for each place.
        lengths = torch.randn(batch, 64, generator=random, device=device) * deviation + mean
        lengths = lengths.round().long().clamp(1, context)
        begun = torch.rand(batch, generator=random, device=device) * lengths[:, 0]
        self.register_buffer("lengths", lengths)
        self.register_buffer("served", torch.zeros(batch, 1, dtype=torch.long, device=device))
        self.register_buffer("positions", begun.long())
        self.register_buffer("tokens", torch.randint(shape.vocab, (batch,), generator=random, device=device))
        self.layers = nn.ModuleList(Layer(shape, batch, context, weights, zeros) for _ in range(shape.layers))
        self.causal = Causal()
        self.attend_with(Masked)

    def attend_with(self, attention):
        self.attention = attention(self)

    def begin(self):
        self.attention.prepare()
        cos, sin = self.angles[self.positions].unbind(1)
        return self.embedding[self.tokens], cos[:, None], sin[:, None]

    def logits(self, x, delta):
        return F.linear(norm(x + delta, self.norm), self.output)

    def end(self, x, delta):
        """Draws tokens; places whose sequence ends get another, with its first token, at position 0."""
        drawn = self.logits(x, delta).argmax(-1)
        positions = self.positions + 1
        ended = positions >= self.lengths.gather(1, self.served)[:, 0]
        self.tokens.copy_(torch.where(ended, self.tokens, drawn))
        self.positions.copy_(torch.where(ended, 0, positions))
        self.served.copy_((self.served + ended[:, None]) % self.lengths.shape[1])

    def step(self, begin=begin, layer=Layer.forward, end=end):
        """A token for each sequence; the functions may be compiled ones."""
        x, cos, sin = begin(self)
        delta = self.no_delta.expand_as(x)
        for each in self.layers:
            x, delta = layer(each, x, delta, cos, sin, self.attention)
        end(self, x, delta)

    def prompt(self, tokens, layer=Layer.forward, logits=logits, last=True):
        """Logits after a prompt, of its last token or of all."""
        cos, sin = self.angles[: len(tokens), :, None].unbind(1)
        x = self.embedding[tokens]
        delta = self.no_delta.expand_as(x)
        for each in self.layers:
            x, delta = layer(each, x, delta, cos, sin, self.causal)
        return logits(self, *((x[-1:], delta[-1:]) if last else (x, delta)))


ATTENTIONS = {"flash": Flash, "flex": Flex, "sdpa": Masked}
