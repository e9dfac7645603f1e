"""fastgpt: train GPT-2 with hand-written kernels."""

from fastgpt import ops
from fastgpt.config import GPTConfig
from fastgpt.model import GPT

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "__version__", "ops"]
