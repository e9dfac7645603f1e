// adamw_ and grad_norm on CPU tensors. The equations are in fastgpt/ops/adamw.py.
#include "cpu/adamw.h"

#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/common.h"
#include "shared/adamw.h"

#define FASTGPT_LOOPS "cpu/loops/adamw.h"
#include "cpu/each_isa.h"

namespace fastgpt {
namespace {

constexpr int64_t kGrain = 4;  // chunks that are worth a thread

Type type_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return Type::kFloat;
    case at::kBFloat16:
      return Type::kBFloat16;
    case at::kHalf:
      return Type::kHalf;
    default:
      TORCH_CHECK_TYPE(false, "native kernels take float32, float16 and bfloat16, not ",
                       tensor.scalar_type());
  }
}

// The chunks of tensors, one after another.
class Chunks {
 public:
  template <typename T>
  explicit Chunks(const std::vector<T>& tensors) {
    for (const T& tensor : tensors) ends_.push_back(count() + (tensor.numel + kChunk - 1) / kChunk);
  }

  int64_t count() const { return ends_.empty() ? 0 : ends_.back(); }

  // f(number of the tensor, number of the chunk in it, number of the chunk), in parallel.
  template <typename F>
  void for_each(F f) const {
    parallel_for(0, count(), kGrain, [&](int64_t begin, int64_t end) {
      int64_t tensor = std::upper_bound(ends_.begin(), ends_.end(), begin) - ends_.begin();
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        while (chunk >= ends_[tensor]) ++tensor;
        f(tensor, chunk - (tensor == 0 ? 0 : ends_[tensor - 1]), chunk);
      }
    });
  }

 private:
  std::vector<int64_t> ends_;
};

float scalar(const std::optional<Tensor>& tensor) { return *tensor->const_data_ptr<float>(); }

// clip / grad_scale
float gradient_scale(const std::optional<Tensor>& grad_norm, double max_grad_norm,
                     const std::optional<Tensor>& grad_scale) {
  float scale = grad_scale.has_value() ? 1.0f / scalar(grad_scale) : 1.0f;
  if (grad_norm.has_value()) {
    const float clip = static_cast<float>(max_grad_norm) / (scalar(grad_norm) * scale + 1e-6f);
    scale *= clip > 1.0f ? 1.0f : clip;  // a NaN stays
  }
  return scale;
}

// What depends on the step and the hyperparameters: lr, beta1, beta2, eps, weight decay. In double: at step
// 1, 1 - beta2^t = 0.001 would keep 16 bits of a float's 24.
void set_coefficients(AdamwTensor& a, const double* hyper, double t) {
  const double lr = hyper[0], beta1 = hyper[1], beta2 = hyper[2], eps = hyper[3], decay = hyper[4];
  a.decay = static_cast<float>(1.0 - lr * decay);
  a.step_size = static_cast<float>(lr / (1.0 - std::pow(beta1, t)));
  a.inverse_root = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, t)));
  a.weight1 = static_cast<float>(1.0 - beta1);
  a.beta2 = static_cast<float>(beta2);
  a.weight2 = static_cast<float>(1.0 - beta2);
  a.eps = static_cast<float>(eps);
}

void adamw_forward(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
                   at::TensorList exp_avg_sqs, at::TensorList steps, at::TensorList copies,
                   const Tensor& hyper, at::IntArrayRef groups, const std::optional<Tensor>& grad_norm,
                   double max_grad_norm, const std::optional<Tensor>& grad_scale,
                   const std::optional<Tensor>& found_inf, const std::optional<Tensor>& seed) {
  check_order(params, exp_avgs, exp_avg_sqs, copies);
  if (found_inf.has_value() && scalar(found_inf) != 0.0f) return;
  const float scale = gradient_scale(grad_norm, max_grad_norm, grad_scale);
  const Tensor table = hyper.contiguous();
  std::vector<AdamwTensor> tensors(params.size());
  std::vector<Tensor> ordered(params.size());  // gradients in the order of their parameters
  for (size_t i = 0; i < params.size(); ++i) {
    AdamwTensor& a = tensors[i];
    ordered[i] = in_order(grads[i], params[i]);
    a.param = params[i].data_ptr();
    a.param_type = type_of(params[i]);
    a.grad = ordered[i].const_data_ptr();
    a.grad_type = type_of(grads[i]);
    a.exp_avg = exp_avgs[i].data_ptr<float>();
    a.exp_avg_sq = exp_avg_sqs[i].data_ptr<float>();
    a.copy = copies.empty() ? nullptr : copies[i].data_ptr();
    a.copy_type = copies.empty() ? Type::kNone : type_of(copies[i]);
    a.numel = params[i].numel();
    a.scale = scale;
    float& step = *steps[i].data_ptr<float>();
    step += 1.0f;
    set_coefficients(a, table.const_data_ptr<double>() + groups[i] * table.size(1), step);
  }
  const int64_t* key = seed.has_value() ? seed->const_data_ptr<int64_t>() : nullptr;
  const auto loop = FASTGPT_CHOOSE(adamw_chunk);
  Chunks(tensors).for_each(
      [&](int64_t tensor, int64_t chunk, int64_t number) { loop(tensors[tensor], chunk, number, key); });
}

Tensor grad_norm_forward(at::TensorList grads) {
  std::vector<Tensor> plain_grads;
  std::vector<NormTensor> tensors;
  for (const Tensor& grad : grads) {
    plain_grads.push_back(dense(grad) ? grad : grad.contiguous());
    tensors.push_back({plain_grads.back().const_data_ptr(), type_of(grad), grad.numel()});
  }
  const Chunks chunks(tensors);
  std::vector<float> sums(chunks.count());
  const auto loop = FASTGPT_CHOOSE(square_sum);
  chunks.for_each(
      [&](int64_t tensor, int64_t chunk, int64_t number) { sums[number] = loop(tensors[tensor], chunk); });
  double total = 0.0;
  for (const float each : sums) total += each;
  const Tensor norm = empty({}, at::kFloat);
  *norm.data_ptr<float>() = static_cast<float>(std::sqrt(total));
  return norm;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastgpt_native, CPU, m) {
  m.impl("adamw__forward", &adamw_forward);
  m.impl("grad_norm_forward", &grad_norm_forward);
}

}  // namespace fastgpt
