"""The Triton kernels of `fastgpt.ops`, one file per operation."""
