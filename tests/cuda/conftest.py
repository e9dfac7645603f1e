import triton_interpreter

triton_interpreter.request()  # the tests here import kernels too, and others run after them
