// adamw_ and grad_norm have no derivative: autograd passes them by.
#include <torch/library.h>

TORCH_LIBRARY_IMPL(fastgpt_native, Autograd, m) {
  m.impl("adamw__forward", torch::CppFunction::makeFallthrough());
  m.impl("grad_norm_forward", torch::CppFunction::makeFallthrough());
}
