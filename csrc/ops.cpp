// The schemas: the contract that the CPU and the CUDA implementation of an operation both meet. They are
// those of the other implementations (`Operator` in fastgpt/ops/*.py, where the equations are); a test
// compares them.
#include <torch/library.h>

TORCH_LIBRARY(fastgpt_native, m) {
  m.def(
      "layer_norm_forward(Tensor x, Tensor weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, "
      "Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor mean, Tensor rstd, bool has_bias) "
      "-> (Tensor dx, Tensor dw, Tensor db)");
  m.def(
      "add_layer_norm_forward(Tensor x, Tensor residual, Tensor weight, Tensor? bias, float eps) -> "
      "(Tensor y, Tensor summed, Tensor mean, Tensor rstd)");
  m.def(
      "add_layer_norm_backward(Tensor dy, Tensor? dsummed, Tensor summed, Tensor weight, Tensor mean, "
      "Tensor rstd, bool has_bias) -> (Tensor dx, Tensor dw, Tensor db)");
  m.def("rms_norm_forward(Tensor x, Tensor weight, float eps) -> (Tensor y, Tensor rstd)");
  m.def("rms_norm_backward(Tensor dy, Tensor x, Tensor weight, Tensor rstd) -> (Tensor dx, Tensor dw)");
  m.def("gelu_forward(Tensor x, str approximate) -> Tensor y");
  m.def("gelu_backward(Tensor dy, Tensor x, str approximate) -> Tensor dx");
  m.def("bias_gelu_forward(Tensor x, Tensor bias, str approximate) -> Tensor y");
  m.def("bias_gelu_backward(Tensor dy, Tensor x, Tensor bias, str approximate) -> (Tensor dx, Tensor db)");
  m.def(
      "linear_gelu_forward(Tensor x, Tensor weight, Tensor? bias, str approximate, bool save) -> (Tensor "
      "y, Tensor h)");
  m.def(
      "linear_gelu_backward(Tensor dy, Tensor x, Tensor weight, Tensor h, str approximate, bool "
      "has_bias, bool need_dx, bool need_dw) -> (Tensor dx, Tensor dw, Tensor db)");
  m.def("linear_forward(Tensor x, Tensor weight, Tensor? bias) -> Tensor y");
  m.def(
      "linear_backward(Tensor dy, Tensor x, Tensor weight, bool need_dx, bool need_dw, bool need_db) -> "
      "(Tensor dx, Tensor dw, Tensor db)");
  m.def(
      "attention_forward(Tensor q, Tensor? k, Tensor? v, Tensor? seed, float dropout_p, float? scale, "
      "SymInt? window) -> (Tensor o, Tensor lse)");
  m.def(
      "attention_backward(Tensor do, Tensor q, Tensor? k, Tensor? v, Tensor o, Tensor lse, Tensor? seed, "
      "float dropout_p, float? scale, SymInt? window) -> (Tensor dq, Tensor dk, Tensor dv)");
  m.def("embedding_forward(Tensor idx, Tensor token_weight, Tensor position_weight, SymInt start) -> Tensor");
  m.def(
      "embedding_backward(Tensor dy, Tensor idx, SymInt vocab_size, SymInt block_size, SymInt start, "
      "ScalarType token_dtype, ScalarType position_dtype) -> (Tensor dwt, Tensor dwp)");
  m.def("dropout_add_forward(Tensor x, Tensor residual, Tensor seed, float p) -> Tensor");
  m.def("dropout_add_backward(Tensor dy, Tensor seed, float p, ScalarType dtype) -> Tensor");
  m.def(
      "cross_entropy_forward(Tensor logits, Tensor targets, int ignore_index, float label_smoothing, "
      "float z_loss, str reduction, SymInt vocab_size, bool with_gradient) -> (Tensor loss, Tensor "
      "count, Tensor dlogits)");
  m.def(
      "cross_entropy_backward(Tensor(a!) dlogits, Tensor dloss, Tensor logits, Tensor targets, Tensor "
      "count, int ignore_index, float label_smoothing, float z_loss, SymInt vocab_size, bool filled) -> "
      "()");
  m.def(
      "linear_cross_entropy_forward(Tensor x, Tensor weight, Tensor targets, Tensor? dloss, SymInt "
      "chunk_rows, int ignore_index, float label_smoothing, float z_loss, str reduction, SymInt "
      "vocab_size, bool x_gradient, bool weight_gradient) -> (Tensor loss, Tensor count, Tensor dx, "
      "Tensor dw)");
  m.def(
      "linear_cross_entropy_backward(Tensor gradient, Tensor? dloss, Tensor count, SymInt rows, "
      "ScalarType dtype) -> Tensor scaled");
  m.def(
      "adamw__forward(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] "
      "exp_avg_sqs, Tensor(d!)[] steps, Tensor(e!)[] copies, Tensor hyper, int[] groups, Tensor? "
      "grad_norm, float max_grad_norm, Tensor? grad_scale, Tensor? found_inf, Tensor? seed) -> ()");
  m.def("grad_norm_forward(Tensor[] grads) -> Tensor");
}
