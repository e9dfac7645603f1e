"""GPT-2: a decoder-only Transformer, with every hot operation called through `fastgpt.ops`.

GPTConfig's options put what came later in the place of some of its parts (docs/modern.md).

Shapes: B sequences, T tokens, C channels (n_embd), H heads of D = C / H, V rows of the padded vocabulary.
Parameter names are GPT-2's; linear weights are (out, in), as in torch.nn.Linear.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.config import GPTConfig, Recompute
from fastgpt.errors import InputError
from fastgpt.rotary import Rotation

INIT_STD = 0.02


def _recomputed(function: Callable[..., Any], *args: Any, draws: bool = False) -> Any:
    """`function(*args)`, run again in backward, with the same random numbers if it `draws` any."""
    from torch.utils.checkpoint import checkpoint  # where it is used: importing fastgpt stays quick

    return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=draws)


class KVCache:
    """Keys and values of the tokens already seen, so that a new token costs one row of attention.

    Two tensors (n_layer, B, capacity, H, D), allocated once and filled up to `length`.

    Args:
        config: of the model.
        batch: sequences, B.
        device, dtype: of the keys and values.
        capacity: the most tokens it will hold; by default block_size.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        capacity: int | None = None,
    ) -> None:
        capacity = config.block_size if capacity is None else capacity
        shape = (config.n_layer, batch, capacity, config.n_head, config.head_size)
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def take(self, rows: Tensor) -> None:
        """Make row i of the batch what row `rows[i]` was, int64 (new B,): texts that go on differently."""
        self.k, self.v = self.k.index_select(1, rows), self.v.index_select(1, rows)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store a layer's k and v, (B, T, H, D), after `length`; attention of q to them and all before."""
        end = self.length + k.size(1)
        self.k[layer, :, self.length : end] = k
        self.v[layer, :, self.length : end] = v
        return ops.causal_attention(q, self.k[layer, :, :end], self.v[layer, :, :end])


class StaticCache:
    """The tensors of a KVCache, to which `GPT.decode` adds a token at a place that only the device knows.

    A step then depends on no number of the host and no shape that changes: a CUDA graph can replay it.

    Args:
        cache: its `length` stays what it is. How many tokens still fit, the caller has to count.
    """

    def __init__(self, cache: KVCache) -> None:
        self.k, self.v = cache.k, cache.v
        places = torch.tensor([cache.length, cache.length + 1], device=cache.k.device)
        self._places = places  # in one tensor: one addition moves both
        self.position, self.length = places[:1], places[1:]  # of the next token; of the text with it

    def seek(self, length: int) -> None:
        """Go on after the first `length` tokens."""
        self._places.copy_(torch.tensor([length, length + 1]))

    def advance(self) -> None:
        self._places.add_(1)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As KVCache's, for one token: (B, 1, H, D) each."""
        keys, values = self.k[layer], self.v[layer]
        keys.index_copy_(1, self.position, k.to(keys.dtype))
        values.index_copy_(1, self.position, v.to(values.dtype))
        return ops.decode_attention(q, keys, values, self.length)


Cache = KVCache | StaticCache


class LayerNorm(nn.Module):
    """The parameters of a LayerNorm with an optional bias."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.n_embd))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.bias else None

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias)

    def add(self, branch: Tensor, x: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        """Add a branch's output to the residual stream x: returns (normalised, the new x), each (B, T, C)."""
        if dropout:
            x = ops.dropout_add(branch, x, p=dropout)
            return self(x), x
        return ops.add_layer_norm(branch, x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """The parameters of an RMSNorm over `width` channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight.to(x.dtype))  # of one dtype under autocast too, as eager needs it

    def add(self, branch: Tensor, x: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        """As LayerNorm's."""
        x = ops.dropout_add(branch, x, p=dropout) if dropout else branch + x
        return self(x), x


def _norm(config: GPTConfig) -> LayerNorm | RMSNorm:
    return LayerNorm(config) if config.norm == "layer_norm" else RMSNorm(config.n_embd)


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return ops.linear(x, layer.weight, layer.bias)


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.n_head, self.dropout = layer, config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm, self.k_norm = RMSNorm(config.head_size), RMSNorm(config.head_size)

    def forward(self, x: Tensor, rotation: Rotation | None, cache: Cache | None) -> Tensor:
        B, T, C = x.shape
        qkv = _linear(self.c_attn, x).view(B, T, 3, self.n_head, C // self.n_head)  # (B, T, 3, H, D)
        dropout_p = self.dropout if self.training else 0.0
        if cache is None and rotation is None and not self.qk_norm:
            y = ops.causal_attention_qkvpacked(qkv, dropout_p=dropout_p)  # (B, T, H, D)
        else:
            q, k, v = qkv.unbind(2)  # (B, T, H, D) each
            if self.qk_norm:
                q, k = self.q_norm(q), self.k_norm(k)
            if rotation is not None:
                q, k = rotation(q), rotation(k)
            if cache is not None:
                y = cache.attend(self.layer, q, k, v)
            else:
                y = ops.causal_attention(q, k, v, dropout_p=dropout_p)
        return _linear(self.c_proj, y.view(B, T, C))


class MLP(nn.Module):
    """Two linear layers, wider in the middle; swiglu has a third, whose output gates that of the first."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.recompute = False
        self.c_fc = nn.Linear(config.n_embd, config.mlp_size, bias=config.bias)
        if config.activation == "swiglu":
            self.c_gate = nn.Linear(config.n_embd, config.mlp_size, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_size, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.recompute and torch.is_grad_enabled():
            return _recomputed(self._gelu_and_project, _linear(self.c_fc, x))
        if self.activation == "relu":
            h = F.relu(_linear(self.c_fc, x))  # (B, T, 4C)
        elif self.activation == "relu2":
            h = F.relu(_linear(self.c_fc, x)).square()
        elif self.activation == "swiglu":
            h = F.silu(_linear(self.c_gate, x)) * _linear(self.c_fc, x)
        else:
            h = ops.linear_gelu(x, self.c_fc.weight, self.c_fc.bias, approximate=self._approximate)
        return _linear(self.c_proj, h)

    @property
    def _approximate(self) -> str:
        return "tanh" if self.activation == "gelu_tanh" else "none"

    def _gelu_and_project(self, h: Tensor) -> Tensor:
        return _linear(self.c_proj, ops.gelu(h, approximate=self._approximate))


class Block(nn.Module):
    """x += attention(ln_1(x)); x += mlp(ln_2(x)).

    Each addition is fused with the norm after it, so a block takes the output of the branch before it,
    not yet added to the residual stream x, and hands over its own in the same state.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.ln_1 = _norm(config)
        self.attn = Attention(config, layer)
        self.ln_2 = _norm(config)
        self.mlp = MLP(config)

    def forward(
        self, branch: Tensor | None, x: Tensor, rotation: Rotation | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        dropout = self.dropout if self.training else 0.0
        if branch is None:
            normed = self.ln_1(x)
        else:
            normed, x = self.ln_1.add(branch, x, dropout)
        normed, x = self.ln_2.add(self.attn(normed, rotation, cache), x, dropout)
        return self.mlp(normed), x


class Transformer(nn.Module):
    """The parameters of the network, under GPT-2's names."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        if config.position == "learned":
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = _norm(config)


class GPT(nn.Module):
    """The language model. The classifier's weights are the token embedding's, unless config says otherwise.

    Args:
        config: its shape; the defaults are GPT-2 (124M).
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = Transformer(config)
        self.recompute_blocks = False
        if not config.tied_head:
            self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self._init_weights()

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, *, block_size: int | None = None, dropout: float | None = None
    ) -> GPT:
        """A trained model, on the CPU in fp32 and in evaluation mode.

        Args:
            name_or_path: gpt2, gpt2-medium, gpt2-large or gpt2-xl; or a run, a checkpoint, a Hugging Face
                GPT-2 folder, a `ckpt.pt` of nanoGPT or a `.bin` of llm.c.
            block_size: a shorter context than the file's.
            dropout: for training on; by default that of a run or of nanoGPT's file, and 0 for the others.

        Raises:
            InputError: none of these, damaged, not GPT-2, or trained on a context shorter than block_size.
        """
        from fastgpt.pretrained import model_from, read_pretrained  # they need this module

        return model_from(read_pretrained(str(name_or_path)), block_size=block_size, dropout=dropout)

    def _init_weights(self) -> None:
        """GPT-2's: normal(0, 0.02), and smaller into the residual stream, which sums 2 n_layer branches."""
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(p, std=INIT_STD / math.sqrt(2 * self.config.n_layer))
            elif p.dim() == 2:
                nn.init.normal_(p, std=INIT_STD)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def recompute(self, what: Recompute) -> None:
        """What backward is to compute again instead of keeping it, from here on.

        `gelu`: the outputs of GELU, 4C a token and layer, which the projection after it reads again in
        backward; its inputs are kept in their place, so linear and GELU are then two operations. `block`:
        everything but the 2C a token and layer that a block starts from, for a second forward pass.
        """
        self.recompute_blocks = what == "block"
        for module in self.modules():
            if isinstance(module, MLP):
                module.recompute = what == "gelu"

    @property
    def token_embedding(self) -> Tensor:
        """(V, C), rows vocab_size.. are padding."""
        return self.transformer.wte.weight

    @property
    def classifier(self) -> Tensor:
        """(V, C): the token embedding, or the weights of an untied head."""
        return self.token_embedding if self.config.tied_head else self.lm_head.weight

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """The normalised residual stream after the last block, (B, T, C), for token ids idx (B, T).

        With a cache, idx holds only the tokens after the `cache.length` already seen.
        """
        start = 0 if cache is None else cache.length
        if start + idx.size(1) > self.config.block_size:
            raise InputError(
                f"{start + idx.size(1)} tokens do not fit in block_size = {self.config.block_size}: "
                f"pass the last {self.config.block_size} at most"
            )
        rotation: Rotation | None = None
        if self.config.position == "learned":
            x = ops.embedding(idx, self.token_embedding, self.transformer.wpe.weight, start=start)
        else:
            x = F.embedding(idx, self.token_embedding)
            rotation = Rotation(start, idx.size(1), self.config.head_size, like=x)
        x = self._blocks(x, rotation, cache)
        if cache is not None:
            cache.length += idx.size(1)
        return x

    def decode(self, token: Tensor, cache: StaticCache) -> Tensor:
        """The logits (B, vocab_size) after one more token, ids (B,), which the cache then holds.

        The host waits for nothing, so that a CUDA graph can capture it; nor does it look at how much has been
        written: there are no more than `block_size` positions.
        """
        idx = token[:, None]
        rotation: Rotation | None = None
        if self.config.position == "learned":
            here = self.transformer.wpe.weight.index_select(0, cache.position)  # (1, C)
            x = ops.embedding(idx, self.token_embedding, here)
        else:
            x = F.embedding(idx, self.token_embedding)
            rotation = Rotation(cache.position, 1, self.config.head_size, like=x)
        x = self._blocks(x, rotation, cache)
        cache.advance()
        return self.logits(x[:, -1])

    def _blocks(self, x: Tensor, rotation: Rotation | None, cache: Cache | None) -> Tensor:
        """From the embedded tokens to the normalised residual stream, (B, T, C) both."""
        dropout = self.config.dropout if self.training else 0.0
        x = F.dropout(x, dropout)
        branch: Tensor | None = None
        for block in self.transformer.h:
            if self.recompute_blocks and torch.is_grad_enabled():
                branch, x = _recomputed(block, branch, x, rotation, cache, draws=dropout > 0)
            else:
                branch, x = block(branch, x, rotation, cache)
        assert branch is not None  # n_layer >= 1
        return self.transformer.ln_f.add(branch, x, dropout)[0]

    def logits(self, x: Tensor) -> Tensor:
        """(..., vocab_size) from (..., C): padded columns are cut off, so they can never be sampled."""
        return F.linear(x, self.classifier)[..., : self.config.vocab_size]

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        reduction: Literal["mean", "sum", "none"] = "mean",
        return_logits: bool = True,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Logits and, given targets, the cross entropy.

        Args:
            idx: (B, T) token ids, T <= block_size.
            targets: (B, T) token ids to predict; -100 is ignored.
            reduction: of the loss over all tokens that are not ignored.
            return_logits: False saves the memory of the logits when only the loss is needed.

        Returns:
            (logits (B, T, vocab_size) or None, loss or None without targets).
        """
        x = self.hidden(idx)
        logits = self.logits(x) if return_logits else None
        if targets is None:
            return logits, None
        if logits is not None:
            return logits, ops.cross_entropy(logits, targets, reduction=reduction)
        loss = ops.linear_cross_entropy(
            x, self.classifier, targets, reduction=reduction, vocab_size=self.config.vocab_size
        )
        return None, loss

    def num_params(self, *, embeddings: bool = True) -> int:
        """Parameters, padding rows not counted; without `embeddings`, less those that only look rows up.

        The position embedding is one; the token embedding is not where it is the classifier's matrix too.
        """
        config = self.config
        matrices = 1 if config.tied_head else 2  # of vocab_size rows
        padding = matrices * (config.padded_vocab_size - config.vocab_size) * config.n_embd
        total = sum(p.numel() for p in self.parameters()) - padding
        if embeddings:
            return total
        untied = (matrices - 1) * config.vocab_size * config.n_embd
        positions = config.block_size * config.n_embd if config.position == "learned" else 0
        return total - positions - untied

    def flops_per_token(self) -> int:
        """Floating point operations per token of a training step at full context.

        6 N + 12 L C T (PaLM, appendix B): 2 operations a weight forward and 4 backward for the N parameters
        that take part in matmuls, and in each of L layers q k^T and p v over T positions, forward and
        backward. The causal half is not taken off, as is usual in published MFU figures.
        """
        c = self.config
        return 6 * self.num_params(embeddings=False) + 12 * c.n_layer * c.n_embd * c.block_size

    def crop_block_size(self, block_size: int) -> None:
        """Shorten the context in place, for instance to finetune GPT-2 on shorter windows.

        Raises:
            InputError: block_size is longer than the model's.
        """
        if block_size > self.config.block_size:
            raise InputError(
                f"block_size {block_size} is longer than the model's {self.config.block_size}: "
                "positions can be cut off, but those never trained on not added"
            )
        self.config = dataclasses.replace(self.config, block_size=block_size)
        if self.config.position == "learned":
            wpe = self.transformer.wpe
            wpe.weight = nn.Parameter(wpe.weight.data[:block_size].clone())
            wpe.num_embeddings = block_size
