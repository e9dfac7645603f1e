"""The operations of GPT training, each with several implementations (see `fastgpt.ops.registry`)."""

from fastgpt.ops.layer_norm import add_layer_norm, layer_norm
from fastgpt.ops.registry import Cost, Implementation, table, use, use_environment

use_environment()

__all__ = ["Cost", "Implementation", "add_layer_norm", "layer_norm", "table", "use"]
