"""The operations of GPT training, each with several implementations (see `fastgpt.ops.registry`)."""

from fastgpt.ops.adamw import adamw_, grad_norm
from fastgpt.ops.attention import causal_attention, causal_attention_qkvpacked
from fastgpt.ops.cross_entropy import cross_entropy
from fastgpt.ops.decode_attention import decode_attention
from fastgpt.ops.dropout import dropout_add
from fastgpt.ops.embedding import embedding
from fastgpt.ops.gelu import bias_gelu, gelu, linear_gelu
from fastgpt.ops.layer_norm import add_layer_norm, layer_norm
from fastgpt.ops.linear import linear
from fastgpt.ops.linear_cross_entropy import linear_cross_entropy
from fastgpt.ops.registry import Cost, Implementation, table, use, use_environment
from fastgpt.ops.rms_norm import rms_norm

use_environment()

__all__ = [
    "Cost",
    "Implementation",
    "adamw_",
    "add_layer_norm",
    "bias_gelu",
    "causal_attention",
    "causal_attention_qkvpacked",
    "cross_entropy",
    "decode_attention",
    "dropout_add",
    "embedding",
    "gelu",
    "grad_norm",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linear_gelu",
    "rms_norm",
    "table",
    "use",
]
