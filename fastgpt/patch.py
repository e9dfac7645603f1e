"""fastgpt's operations inside a Hugging Face GPT-2: the same parameters and results, other kernels.

What a patched model runs, with the implementations that `fastgpt.ops.use` chooses at each call:

- LayerNorm: `layer_norm`, and `add_layer_norm` for ln_2 with the addition of attention's output before it;
- the MLP's first layer and GELU: `linear_gelu`, which reads Conv1D's (in, out) weight transposed, in place;
- attention: `causal_attention_qkvpacked` on the output of c_attn, where attention is plainly causal over the
  tokens given: no mask, and no cache or one that is still empty;
- the loss: `cross_entropy`.

What it leaves to Hugging Face's own code:

- attention with a padding mask (Hugging Face drops a mask of ones itself), with a KV cache that holds tokens
  or is not a plain DynamicCache, across to an encoder, or with attn_implementation "eager" (which is what
  output_attentions=True takes) or "flex_attention", which always get a mask;
- blocks under gradient checkpointing, as a whole: the modules in them are patched all the same;
- an MLP whose activation is not a GELU, the product of a c_fc that is not a Conv1D (LoRA's, say), and a
  loss_function that was set.

Tested with transformers 5.24, 5.23 and 4.57, by hand with 4.46. With 4.57 blocks stay as they are, and
attention without a cache is ours only if given a mask of ones; with 4.46 attention and the loss stay too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from fastgpt import ops
from fastgpt.errors import InputError

_GELUS = {
    "gelu": "none",
    "gelu_python": "none",
    "gelu_fast": "tanh",
    "gelu_new": "tanh",
    "gelu_python_tanh": "tanh",
    "gelu_pytorch_tanh": "tanh",
}
_CACHE_NAMES = ("cache", "past_key_values")  # since 5.24, which takes the older name too, and before
_STATE = "_fastgpt_patched"


def patch_gpt2(model: Any) -> None:
    """Run a `transformers.GPT2LMHeadModel` on fastgpt's operations, in place; `unpatch_gpt2` undoes it.

    Parameters, buffers and state_dict stay the very same objects, and generation, KV caches, dropout and
    gradient checkpointing go on working. Forward hooks on ln_2 and mlp.c_fc are not called: what these do is
    fused with their neighbours.

    For training pass `use_cache=False`, or Hugging Face collects keys and values that nothing will read.

    Raises:
        InputError: transformers is not installed, the model is of another class, it is patched already, or a
            module that would be replaced has a forward of its own (accelerate's hooks, another patch).
    """
    _check_class(model)
    if _STATE in vars(model):
        raise InputError("model is patched already: call unpatch_gpt2(model) before patching it again")
    forwards = _forwards(model.config.activation_function)
    patched = {}
    for name, module in model.named_modules():
        if forward := forwards.get(type(module).forward):
            if "forward" in vars(module):
                raise InputError(
                    f"model.{name} has a forward of its own, set by accelerate's hooks or another patch: "
                    "call patch_gpt2 before them, or remove them"
                )
            patched[module] = forward
    for module, forward in patched.items():
        module.forward = functools.partial(forward, module)
    own_loss = _can_set_loss(model)
    if own_loss:
        model.loss_function = _causal_lm_loss
    vars(model)[_STATE] = (list(patched), own_loss)


def unpatch_gpt2(model: Any) -> None:
    """Undo `patch_gpt2`.

    Raises:
        InputError: the model is not patched.
    """
    _check_class(model)
    if _STATE not in vars(model):
        raise InputError("model is not patched: there is nothing to undo")
    modules, own_loss = vars(model).pop(_STATE)
    for module in modules:
        del module.forward
    if own_loss:
        del model._loss_function


def _check_class(model: Any) -> None:
    try:
        from transformers import GPT2LMHeadModel
    except ImportError:
        raise InputError("a Hugging Face model needs transformers: pip install 'fastgpt[hf]'") from None
    if not isinstance(model, GPT2LMHeadModel):
        raise InputError(f"model is a {type(model).__name__}: it must be a transformers.GPT2LMHeadModel")


def _forwards(activation: str) -> dict[Callable[..., Any], Callable[..., Any]]:
    """What to run in place of a class's forward."""
    from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention, GPT2Block

    forwards: dict[Callable[..., Any], Callable[..., Any]] = {nn.LayerNorm.forward: _layer_norm}
    if activation in _GELUS:
        forwards[GPT2MLP.forward] = functools.partial(_mlp, approximate=_GELUS[activation])
    attention, block = (inspect.signature(c.forward).parameters for c in (GPT2Attention, GPT2Block))
    cache_name = next((name for name in _CACHE_NAMES if name in attention), None)
    if cache_name is not None:
        forwards[GPT2Attention.forward] = _attention
        if cache_name in block and "output_attentions" not in block:
            forwards[GPT2Block.forward] = functools.partial(_block, cache_name=cache_name)
    return forwards


def _can_set_loss(model: Any) -> bool:
    """False where transformers is too old for it, and where the user has set one."""
    descriptor = inspect.getattr_static(type(model), "loss_function", None)
    settable = getattr(descriptor, "fset", None) is not None
    default = getattr(model, "loss_type", None) in (None, "ForCausalLM")
    return settable and default and "_loss_function" not in vars(model)


def _layer_norm(self: Any, x: Tensor) -> Tensor:
    return ops.layer_norm(x, self.weight, self.bias, eps=self.eps)


def _mlp(self: Any, x: Tensor, *, approximate: str) -> Tensor:
    from transformers.pytorch_utils import Conv1D

    if isinstance(self.c_fc, Conv1D):
        h = ops.linear_gelu(x, self.c_fc.weight.T, self.c_fc.bias, approximate=approximate)
    else:
        h = ops.gelu(self.c_fc(x), approximate=approximate)
    return self.dropout(self.c_proj(h))


def _attention(self: Any, x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    """GPT2Attention's forward; Hugging Face passes all but the hidden states x (B, T, C) by keyword."""
    cache = next((options[name] for name in _CACHE_NAMES if name in options), None)
    if args or not _plainly_causal(self, cache, options):
        return type(self).forward(self, x, *args, **options)
    B, T, C = x.shape
    qkv = self.c_attn(x).view(B, T, 3, self.num_heads, self.head_dim)  # (B, T, 3, H, D)
    if cache is not None:
        _, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, T, D) each
        cache.update(k, v, self.layer_idx)
    y = ops.causal_attention_qkvpacked(
        qkv,
        dropout_p=self.attn_dropout.p if self.training else 0.0,
        scale=getattr(self, "scaling", None),  # before 5.0: 1 / sqrt(D)
    )  # (B, T, H, D)
    return self.resid_dropout(self.c_proj(y.reshape(B, T, C))), None


def _plainly_causal(self: Any, cache: Any, options: dict[str, Any]) -> bool:
    from transformers import DynamicCache

    absent = ("attention_mask", "encoder_hidden_states", "head_mask")
    return (
        all(options.get(name) is None for name in absent)
        and not options.get("output_attentions")
        and not self.is_cross_attention
        and getattr(self.config, "is_causal", True)
        and (cache is None or (type(cache) is DynamicCache and cache.get_seq_length(self.layer_idx) == 0))
    )


def _block(
    self: Any,
    x: Tensor,
    cache: Any = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    *,
    cache_name: str,
    **options: Any,
) -> Tensor:
    cache = options.pop("past_key_values", cache)
    if encoder_hidden_states is not None or (self.gradient_checkpointing and self.training):
        forward = type(self).forward
        return forward(self, x, cache, attention_mask, encoder_hidden_states, **options)
    options.pop("encoder_attention_mask", None)
    normed = self.ln_1(x)
    branch, _ = self.attn(normed, **{cache_name: cache}, attention_mask=attention_mask, **options)
    ln = self.ln_2
    normed, x = ops.add_layer_norm(branch, x, ln.weight, ln.bias, eps=ln.eps)
    return x + self.mlp(normed)


def _causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Hugging Face's ForCausalLMLoss: the mean, or the sum over a count that spans micro-batches."""
    if shift_labels is None:
        assert labels is not None
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]  # tokens before t predict t
    targets = shift_labels.reshape(-1).to(logits.device)
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = ops.cross_entropy(
        logits.reshape(-1, vocab_size), targets, ignore_index=ignore_index, reduction=reduction
    )
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch
