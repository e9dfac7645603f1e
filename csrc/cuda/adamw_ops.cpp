// adamw_ and grad_norm on CUDA tensors. The equations are in fastgpt/ops/adamw.py.
#include <cstring>
#include <list>
#include <mutex>
#include <vector>

#include "cuda/adamw.h"
#include "cuda/aligned.h"
#include "cuda/tensors.h"
#include "shared/adamw.h"
#ifndef FASTGPT_EMULATED
#include <c10/cuda/CUDAGraphsC10Utils.h>
#endif

namespace fastgpt::cuda {
namespace {

using at::Tensor;

#ifdef FASTGPT_EMULATED
bool capturing() { return false; }
#else
bool capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}
#endif

// To the device, from pinned memory: then the copy is in the stream and the host does not wait for it, and
// PyTorch keeps the memory until the copy is done.
template <typename T>
Tensor send(const std::vector<T>& values, at::Device device) {
  const int64_t bytes = static_cast<int64_t>(values.size() * sizeof(T));
  const Tensor host = at::empty({bytes}, at::TensorOptions(at::kByte).pinned_memory(device.is_cuda()));
  if (bytes > 0) std::memcpy(host.mutable_data_ptr(), values.data(), bytes);
  return host.to(device, /*non_blocking=*/true);
}

// The tables on the device. They hold addresses and sizes only: while those are the same, so is the table,
// whatever tensors they are of by now.
struct SentTable {
  std::vector<AdamwTensor> key;
  at::Device device;
  cudaStream_t stream;  // in which it was sent
  Tensor tensors, chunks;
  int64_t chunk_count;

  AdamwTable get() const {
    return {reinterpret_cast<const AdamwTensor*>(tensors.const_data_ptr()),
            reinterpret_cast<const AdamwChunk*>(chunks.const_data_ptr()), static_cast<int64_t>(key.size()),
            chunk_count};
  }
};

SentTable make_table(const std::vector<AdamwTensor>& rows, at::Device device) {
  std::vector<AdamwChunk> chunks;
  for (size_t i = 0; i < rows.size(); ++i) {
    const int64_t count = (rows[i].numel + kAdamwChunk - 1) / kAdamwChunk;
    for (int64_t j = 0; j < count; ++j) chunks.push_back({static_cast<int32_t>(i), static_cast<int32_t>(j)});
  }
  return {rows,
          device,
          current_stream(),
          send(rows, device),
          send(chunks, device),
          static_cast<int64_t>(chunks.size())};
}

bool same(const std::vector<AdamwTensor>& a, const std::vector<AdamwTensor>& b) {
  static_assert(sizeof(AdamwTensor) == 7 * 8 + 2 * 4, "no padding, which would be compared too");
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(AdamwTensor)) == 0;
}

SentTable table_of(const std::vector<AdamwTensor>& rows, at::Device device) {
  constexpr size_t kRemembered = 64;  // those of a few optimizers, when gradients move between a few places
  static std::mutex mutex;            // autograd and users have threads
  static auto& tables = *new std::list<SentTable>;  // the newest first; at exit CUDA may be gone before them
  static auto& captured = *new std::list<SentTable>;  // CUDA graphs read these for as long as they live
  const std::lock_guard<std::mutex> lock(mutex);
  const bool in_capture = capturing();
  for (auto table = tables.begin(); table != tables.end(); ++table) {
    // In another stream the table might not have arrived; a capture begins with everything done.
    const bool arrived = in_capture || table->stream == current_stream();
    if (table->device == device && arrived && same(table->key, rows)) {
      tables.splice(tables.begin(), tables, table);
      if (in_capture) captured.push_back(*table);
      return *table;
    }
  }
  TORCH_CHECK_VALUE(
      !in_capture,
      "the gradients are not where they were in the step before: take a step before capturing a "
      "CUDA graph, and keep gradients in place, zero_grad(set_to_none=False)");
  tables.push_front(make_table(rows, device));
  if (tables.size() > kRemembered) tables.pop_back();
  return tables.front();
}

const float* scalar(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? tensor->const_data_ptr<float>() : nullptr;
}

void adamw_op(at::TensorList params, at::TensorList grads, at::TensorList exp_avgs,
              at::TensorList exp_avg_sqs, at::TensorList steps, at::TensorList copies, const Tensor& hyper,
              at::IntArrayRef groups, const std::optional<Tensor>& grad_norm, double max_grad_norm,
              const std::optional<Tensor>& grad_scale, const std::optional<Tensor>& found_inf,
              const std::optional<Tensor>& seed) {
  const DeviceGuard guard(params[0]);
  check_order(params, exp_avgs, exp_avg_sqs, copies);
  std::vector<AdamwTensor> rows(params.size());
  std::vector<Tensor> ordered(params.size());  // gradients in the order of their parameters
  for (size_t i = 0; i < params.size(); ++i) {
    const Tensor& param = params[i];
    ordered[i] = in_order(grads[i], param);
    AdamwTensor& row = rows[i];
    row.param = param.mutable_data_ptr();
    row.grad = ordered[i].const_data_ptr();
    row.exp_avg = exp_avgs[i].mutable_data_ptr<float>();
    row.exp_avg_sq = exp_avg_sqs[i].mutable_data_ptr<float>();
    row.step = steps[i].mutable_data_ptr<float>();
    row.copy = copies.empty() ? nullptr : copies[i].mutable_data_ptr();
    row.numel = param.numel();
    row.group = static_cast<int32_t>(groups[i]);
    row.aligned = aligned(row.param, row.grad, row.exp_avg, row.exp_avg_sq, row.copy);
  }
  const SentTable table = table_of(rows, params[0].device());
  const Tensor coefficients = at::empty({static_cast<int64_t>(params.size() * sizeof(AdamwCoefficients))},
                                        params[0].options().dtype(at::kByte));
  const Tensor values = hyper.contiguous();
  AdamwStep step;
  step.hyper = values.const_data_ptr<double>();
  step.grad_norm = scalar(grad_norm);
  step.grad_scale = scalar(grad_scale);
  step.found_inf = scalar(found_inf);
  step.max_grad_norm = static_cast<float>(max_grad_norm);
  step.seed = seed.has_value() ? seed->const_data_ptr<int64_t>() : nullptr;
  step.param_dtype = dtype_of(params[0]);
  step.grad_dtype = dtype_of(grads[0]);
  if (!copies.empty()) step.copy_dtype = dtype_of(copies[0]);
  adamw(table.get(), step, static_cast<AdamwCoefficients*>(coefficients.mutable_data_ptr()),
        current_stream());
}

Tensor grad_norm_op(at::TensorList grads) {
  const DeviceGuard guard(grads[0]);
  std::vector<AdamwTensor> rows(grads.size(), AdamwTensor{});
  std::vector<Tensor> filled(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) {
    filled[i] = dense(grads[i]) ? grads[i] : grads[i].contiguous();
    rows[i].grad = filled[i].const_data_ptr();
    rows[i].numel = grads[i].numel();
    rows[i].aligned = aligned(rows[i].grad);
  }
  const SentTable table = table_of(rows, grads[0].device());
  const auto options = grads[0].options().dtype(at::kFloat);
  const Tensor partials = at::empty({table.chunk_count}, options), out = at::empty({}, options);
  grad_norm(table.get(), dtype_of(grads[0]), partials.mutable_data_ptr<float>(),
            out.mutable_data_ptr<float>(), current_stream());
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(FASTGPT_LIBRARY, FASTGPT_KEY, m) {
  m.impl("adamw__forward", &adamw_op);
  m.impl("grad_norm_forward", &grad_norm_op);
}

}  // namespace fastgpt::cuda
