#include "cuda/adamw.cuh"
#include "cuda/adamw.h"
#include "cuda/launch.cuh"

namespace fastgpt::cuda {

void adamw(const AdamwTable& table, const AdamwStep& step, AdamwCoefficients* coefficients,
           cudaStream_t stream) {
  const std::vector<int64_t> sizes = {table.tensor_count, table.chunk_count};  // in place of a shape
  Launch prepare("adamw_ (prepare)", sizes, stream);
  prepare.grid(ceil_div(table.tensor_count, kPrepareThreads)).block(kPrepareThreads);
  prepare(adamw_prepare_kernel, table.tensors, coefficients, step.hyper, step.grad_norm, step.grad_scale,
          step.found_inf, step.max_grad_norm, table.tensor_count);

  Launch update("adamw_", sizes, stream);
  update.grid(table.chunk_count).block(kAdamwThreads);
  const auto start = [&](auto kernel) {
    update(kernel, table.tensors, table.chunks, coefficients, step.found_inf, step.seed, step.grad_dtype,
           step.copy_dtype.value_or(DType::kFloat));
  };
  if (step.seed != nullptr) return start(adamw_kernel<bf16, true>);
  dispatch(step.param_dtype, [&](auto type) {
    using P = typename decltype(type)::type;
    start(adamw_kernel<P, false>);
  });
}

void grad_norm(const AdamwTable& table, DType grad_dtype, float* partials, float* out, cudaStream_t stream) {
  const std::vector<int64_t> sizes = {table.tensor_count, table.chunk_count};
  Launch launch("grad_norm", sizes, stream);
  launch.grid(table.chunk_count).block(kAdamwThreads);
  dispatch(grad_dtype, [&](auto type) {
    using G = typename decltype(type)::type;
    launch(sum_squares_kernel<G>, table.tensors, table.chunks, partials);
  });
  Launch root("grad_norm (root of sum)", sizes, stream);
  root.block(kRootThreads);
  root(root_of_sum_kernel, partials, out, table.chunk_count);
}

}  // namespace fastgpt::cuda
