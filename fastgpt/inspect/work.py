"""The work of a launch of the package: `cost` of its operation where that is this kernel's alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgpt.inspect.bounds import Work
from fastgpt.ops.adamw import cost as adamw_cost
from fastgpt.ops.adamw import norm_cost
from fastgpt.ops.attention import cost as attention_cost
from fastgpt.ops.cross_entropy import cost as cross_entropy_cost
from fastgpt.ops.dropout import cost as dropout_cost
from fastgpt.ops.embedding import cost as embedding_cost
from fastgpt.ops.gelu import cost as gelu_cost
from fastgpt.ops.gelu import linear_cost
from fastgpt.ops.layer_norm import cost as layer_norm_cost

Arguments = dict[str, Any]  # of a kernel, by the names of its parameters
ROWS_OF_THREE = 3  # products that one fp32 product becomes in tf32x3


def work(kernel: str, arguments: Arguments, call: Any) -> Work:
    """Of a launch of `kernel`; `call` is the example's launcher call, a partial with its arguments.

    Every tensor is read or written once where an operation's `cost` says nothing else: an intermediate that
    another kernel made (partial sums, statistics) is work for this one.
    """
    touched = sum(x.numel() * x.element_size() for x in arguments.values() if isinstance(x, Tensor))
    special = _SPECIAL.get(kernel)
    return special(arguments, touched, call) if special else Work(bytes=touched)


def _products(flops: float, moved: float, dtype: torch.dtype, times: int = ROWS_OF_THREE) -> Work:
    """Matrix products in the tensor cores: of fp32 operands `times` of tf32 ones."""
    if dtype == torch.float32:
        return Work(flops, moved, times * flops if times else None, "tf32")
    return Work(flops, moved, flops, "fp16" if dtype == torch.float16 else "bf16")


def _attention(products: int) -> Callable[[Arguments, float, Any], Work]:
    """Attention over the pairs that are seen, with `products` of 2 D flops for each."""

    def find(a: Arguments, touched: float, call: Any) -> Work:
        q, k = a["q_ptr"], a["k_ptr"]
        window = a["window"] if a["WINDOWED"] else None
        cost = attention_cost(
            q.shape[0], q.shape[1], k.shape[1], q.shape[2], q.shape[3], q.dtype, window=window
        )
        return _products(cost.flops * products / 2, touched, q.dtype)

    return find


def _linear_gelu(a: Arguments, touched: float, call: Any) -> Work:
    cost = linear_cost(a["M"], a["K"], a["N"], a["x_ptr"].dtype)
    precise = a["x_ptr"].dtype == torch.float32 and a["PRECISION"] == "ieee"
    products = _products(2 * a["M"] * a["K"] * a["N"], touched, a["x_ptr"].dtype, 0 if precise else 3)
    return Work(cost.flops, touched, products.tensor_flops, products.precision)


def _norm(*, backward: bool) -> Callable[[Arguments, float, Any], Work]:
    def find(a: Arguments, touched: float, call: Any) -> Work:
        return Work(layer_norm_cost(a["R"], a["C"], torch.bfloat16, backward=backward).flops, touched)

    return find


def _elements(cost: Callable[..., Any], like: str, **options: Any) -> Callable[[Arguments, float, Any], Work]:
    """Operations on each element of the argument `like`."""

    def find(a: Arguments, touched: float, call: Any) -> Work:
        return Work(cost(a[like].numel(), a[like].dtype, **options).flops, touched)

    return find


def _update(a: Arguments, touched: float, call: Any) -> Work:
    """The tables that the kernel gets hold addresses: the tensors are the launcher's arguments."""
    params, grads, copies = call.args[0], call.args[1], call.args[5]
    copy = copies[0].dtype if copies else None
    costs = [adamw_cost(p.numel(), p.dtype, g.dtype, copy=copy) for p, g in zip(params, grads, strict=True)]
    return Work(sum(c.flops for c in costs), sum(c.bytes for c in costs))


def _sum_squares(a: Arguments, touched: float, call: Any) -> Work:
    costs = [norm_cost(g.numel(), g.dtype) for g in call.args[0]]
    return Work(sum(c.flops for c in costs), sum(c.bytes for c in costs))


def _embedding(a: Arguments, touched: float, call: Any) -> Work:
    batch, length = a["idx_ptr"].shape
    cost = embedding_cost(
        batch, length, a["C"], a["y_ptr"].dtype, vocab_size=a["V"], block_size=a["wp_ptr"].shape[0]
    )
    return Work(cost.flops, cost.bytes)


def _tokens_backward(a: Arguments, touched: float, call: Any) -> Work:
    """The rows of dy once; of the table only rows that occur, at most as many."""
    dy = a["dy_ptr"]
    return Work(dy.numel(), 2 * dy.numel() * dy.element_size())


def _row(a: Arguments, touched: float, call: Any) -> Work:
    logits = a["logits_ptr"]
    rows, width = logits.shape
    gradient = a["dlogits_ptr"] is not None
    flops = cross_entropy_cost(rows, width, logits.dtype).flops
    flops += cross_entropy_cost(rows, width, logits.dtype, backward=True).flops if gradient else 0
    once = rows * width * logits.element_size()
    return Work(flops, (2 if gradient else 1) * once + 12 * rows)


_SPECIAL: dict[str, Callable[[Arguments, float, Any], Work]] = {
    "_attention_forward": _attention(2),  # q k, p v
    "_attention_backward_queries": _attention(3),  # q k again, do v, ds k
    "_attention_backward_keys": _attention(4),  # q k again, do v, p do, ds q
    "_linear_gelu": _linear_gelu,
    "_forward": _norm(backward=False),
    "_forward_wide": _norm(backward=False),
    "_backward": _norm(backward=True),
    "_backward_wide": _norm(backward=True),
    "_gelu_forward": _elements(gelu_cost, "x_ptr"),
    "_gelu_backward": _elements(gelu_cost, "x_ptr", backward=True),
    "_bias_gelu_forward": _elements(gelu_cost, "x_ptr"),
    "_bias_gelu_backward": _elements(gelu_cost, "x_ptr", backward=True),
    "_dropout_add_forward": _elements(dropout_cost, "x_ptr"),
    "_dropout_add_backward": _elements(dropout_cost, "dy_ptr", backward=True),
    "_update": _update,
    "_sum_squares": _sum_squares,
    "_embedding_forward": _embedding,
    "_tokens_backward": _tokens_backward,
    "_row": _row,
}
