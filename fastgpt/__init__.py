"""fastgpt: train GPT-2 with hand-written kernels."""

from fastgpt import ops
from fastgpt.config import GPTConfig
from fastgpt.model import GPT
from fastgpt.patch import patch_gpt2, unpatch_gpt2

__version__ = "0.1.0"
__all__ = ["GPT", "GPTConfig", "__version__", "ops", "patch_gpt2", "unpatch_gpt2"]
