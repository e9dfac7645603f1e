// fastgpt._C: importing it registers the operators with PyTorch. It also says what was built.
#include <Python.h>
#include <torch/version.h>

#include <exception>

#include "cpu/isa.h"

namespace {

PyObject* isa(PyObject*, PyObject*) {
  try {
    return PyUnicode_FromString(fastgpt::kIsaNames[static_cast<int>(fastgpt::isa())]);
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

PyMethodDef methods[] = {
    {"isa", isa, METH_NOARGS,
     "The instruction set of the CPU kernels: baseline, avx2, avx512 or avx512_bf16."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", "The native kernels of fastgpt.", -1, methods};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  PyObject* built = PyModule_Create(&module);
  if (built == nullptr) return nullptr;
  PyModule_AddStringConstant(built, "torch_version", TORCH_VERSION);
#ifdef FASTGPT_CUDA
  PyModule_AddStringConstant(built, "cuda_targets", FASTGPT_CUDA);
#endif
  return built;
}
