"""An expert-choice Mixture-of-Recursions model with middle_cycle sharing (Bae et al., 2025), for training.

Own first layer, a shared block run up to N_r times, own last layer. Before recursion r a linear router
scores the tokens still active; training keeps the best floor(capacity[r] * T) of them (hierarchical
top-k), gathers them, runs the block and adds g * block(x), g = alpha * sigmoid(score). An auxiliary loss
teaches each router to predict its own top-k, so that at inference sigmoid(score) >= 0.5 decides causally.
"""
import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass
class Config:
    vocab: int = 4096
    hidden: int = 256
    heads: int = 8
    kv_heads: int = 4
    ffn: int = 704
    block: int = 3          # layers of the shared block
    recursions: int = 3
    alpha: float = 0.1
    eps: float = 1e-5
    theta: float = 10000.0
    context: int = 256
    dropout: float = 0.1

    @property
    def capacities(self):
        return [(self.recursions - r) / self.recursions for r in range(self.recursions)]


class RmsNorm(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(c.hidden)), c.eps

    def forward(self, x):
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


def rope(x, cos, sin):
    """x [B, H, T, d]; the two halves of a head rotate together."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Layer(nn.Module):
    """RMSNorm, rotary GQA attention, RMSNorm, SwiGLU; both halves residual."""

    def __init__(self, c):
        super().__init__()
        self.c, d = c, c.hidden // c.heads
        self.input_layernorm, self.post_attention_layernorm = RmsNorm(c), RmsNorm(c)
        self.q_proj, self.o_proj = nn.Linear(c.hidden, c.heads * d, bias=False), nn.Linear(c.heads * d, c.hidden, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(c.hidden, c.kv_heads * d, bias=False) for _ in "kv")
        self.gate_proj, self.up_proj = (nn.Linear(c.hidden, c.ffn, bias=False) for _ in "gu")
        self.down_proj = nn.Linear(c.ffn, c.hidden, bias=False)

    def forward(self, x, rotation, mask=None):
        """x [B, T, D] in order of position; mask [B, T, T] is True where a query may look, causal by default."""
        c, (B, T, _) = self.c, x.shape
        h = self.input_layernorm(x)
        q, k, v = (p(h).view(B, T, n, -1).transpose(1, 2) for p, n in
                   [(self.q_proj, c.heads), (self.k_proj, c.kv_heads), (self.v_proj, c.kv_heads)])
        q, k = rope(q, *rotation).to(v.dtype), rope(k, *rotation).to(v.dtype)
        k, v = (t.repeat_interleave(c.heads // c.kv_heads, 1) for t in (k, v))
        a = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None], is_causal=mask is None)
        x = x + F.dropout(self.o_proj(a.transpose(1, 2).reshape(B, T, -1)), c.dropout, self.training)
        h = self.post_attention_layernorm(x)
        return x + F.dropout(self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h)), c.dropout, self.training)


class MoR(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.c = c
        self.embed = nn.Embedding(c.vocab, c.hidden)
        self.first, self.last = Layer(c), Layer(c)
        self.block = nn.ModuleList(Layer(c) for _ in range(c.block))
        self.routers = nn.ModuleList(nn.Linear(c.hidden, 1, bias=False) for _ in range(c.recursions))
        self.norm = RmsNorm(c)
        d = c.hidden // c.heads
        angle = torch.arange(c.context)[:, None] / c.theta ** (torch.arange(0, d, 2) / d)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)
        depth = 2 + c.block * c.recursions
        for name, p in self.named_parameters():
            if p.dim() == 2:
                residual = "o_proj" in name or "down_proj" in name
                nn.init.normal_(p, std=0.02 if not residual else 0.02 / math.sqrt(2 * depth))
        nn.init.normal_(self.embed.weight, std=0.05)

    def rotation(self, pos):
        """cos and sin for positions pos [B, T], shaped to broadcast over heads."""
        return self.cos[pos][:, None], self.sin[pos][:, None]

    def head(self, x):
        x = self.last(x, self.rotation(torch.arange(x.shape[1])[None]))
        return F.linear(F.dropout(self.norm(x), self.c.dropout, self.training), self.embed.weight)

    def start(self, ids):
        x = F.dropout(self.embed(ids), self.c.dropout, self.training)
        return self.first(x, self.rotation(torch.arange(ids.shape[1])[None]))

    def forward(self, ids):
        """ids [B, T] -> logits [B, T, V], auxiliary loss, depth [B, T]; capacity routing."""
        x, (B, T) = self.start(ids), ids.shape
        active = torch.arange(T).expand(B, T)
        depth, aux = torch.zeros(B, T, dtype=torch.long), 0.0
        for r, capacity in enumerate(self.c.capacities):
            rows = x.gather(1, active[..., None].expand(-1, -1, x.shape[-1]))
            score = self.routers[r](rows).float()[..., 0]
            keep = score.topk(max(1, int(capacity * T)), 1).indices.sort(1).values
            target = torch.zeros_like(score).scatter_(1, keep, 1.0)
            aux = aux + F.binary_cross_entropy_with_logits(score, target)
            active = active.gather(1, keep)
            index = keep[..., None].expand(-1, -1, x.shape[-1])
            h, rotation = rows.gather(1, index), self.rotation(active)
            for layer in self.block:
                h = layer(h, rotation)
            gate = self.c.alpha * torch.sigmoid(score.gather(1, keep))[..., None]
            x = x.scatter_add(1, active[..., None].expand(-1, -1, x.shape[-1]), (h * gate).to(x.dtype))
            depth.scatter_(1, active, r + 1)
        return self.head(x), aux, depth

    @torch.no_grad()
    def threshold(self, ids):
        """The same with causal routing: a token stays while sigmoid(score) >= 0.5."""
        x, (B, T) = self.start(ids), ids.shape
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        active, depth = torch.ones(B, T, dtype=torch.bool), torch.zeros(B, T, dtype=torch.long)
        rotation = self.rotation(torch.arange(T)[None])
        for r in range(self.c.recursions):
            score = self.routers[r](x).float()
            active = active & (score[..., 0] >= 0)
            # A row that left attends to itself, so that its unused result stays finite.
            mask = (causal & active[:, None, :]) | torch.eye(T, dtype=torch.bool)
            h = x
            for layer in self.block:
                h = layer(h, rotation, mask)
            x = torch.where(active[..., None], x + h * self.c.alpha * torch.sigmoid(score), x)
            depth[active] = r + 1
        return self.head(x), depth

    def checkpoint(self):
        """Tensors under the names of the authors' training code; a shared tensor once, under its first name."""
        out = {"model.embed_tokens.weight": self.embed.weight, "model.norm.weight": self.norm.weight}
        def put(prefix, layer):
            for name, p in layer.named_parameters():
                part = name.split(".")[0]
                group = "" if "layernorm" in part else "self_attn." if part[0] in "qkvo" else "mlp."
                group = "mlp." if part.split("_")[0] in ("gate", "up", "down") else group
                out[f"{prefix}.{group}{name}"] = p
        put("model.layers.0", self.first)
        for j, layer in enumerate(self.block):
            put(f"model.layers.1.block.{j}", layer)
        for r, router in enumerate(self.routers):
            out[f"model.layers.{1 + r}.mor_router.router.weight"] = router.weight
        put(f"model.layers.{1 + self.c.recursions}", self.last)
        return {k: v.detach().float().contiguous().clone() for k, v in out.items()}

    def config_json(self):
        c = self.c
        return {"architectures": ["MoRLlamaForCausalLM"], "model_type": "llama", "vocab_size": c.vocab, "hidden_size": c.hidden,
                "intermediate_size": c.ffn, "num_hidden_layers": 2 + c.block * c.recursions, "num_attention_heads": c.heads,
                "num_key_value_heads": c.kv_heads, "head_dim": c.hidden // c.heads, "hidden_act": "silu", "rms_norm_eps": c.eps,
                "rope_theta": c.theta, "max_position_embeddings": c.context, "tie_word_embeddings": True,
                "bos_token_id": 0, "eos_token_id": 0, "torch_dtype": "float32"}

    def mor_yaml(self):
        c = self.c
        return {"model": "smollm", "precision": "fp32",
                "recursive": {"enable": True, "base_depth": None, "num_recursion": c.recursions, "sharing": "middle_cycle",
                              "ln_share": True, "initialization": "random"},
                "kv_sharing": {"enable": False}, "relaxation": {"enable": False},
                "mor": {"enable": True, "type": "expert", "capacity": ",".join(map(str, c.capacities)), "router_type": "linear",
                        "temp": 1.0, "expert": {"router_func": "sigmoid", "alpha": c.alpha, "sampling": "aux_loss",
                                                "include_first": True, "coeff": 0.001, "gating": "weighted"},
                        "token": {"router_func": "softmax", "alpha": 1.0, "balancing": "loss", "gating": "weighted"}}}
