// What launch.cuh says of launches that CUDA refuses, and that it skips those of nothing. Argument: which.
#include <cstdio>
#include <map>
#include <string>

#include "cuda/launch.cuh"

namespace {

__global__ void fill(float* x) { x[threadIdx.x] = 1.0f; }

}  // namespace

int main(int, char** arguments) {
  using fastgpt::cuda::Launch;
  const std::map<std::string, void (*)(Launch&)> cases = {
      {"grid", [](Launch& launch) { launch.grid(1, 70000); }},
      {"shared", [](Launch& launch) { launch.shared(1 << 30); }},
      {"threads", [](Launch& launch) { launch.block(2048); }},
      {"nothing", [](Launch& launch) { launch.grid(0).block(2048); }},
  };
  try {
    Launch launch("fill", {3, 5}, nullptr);
    cases.at(arguments[1])(launch);
    launch(fill, static_cast<float*>(nullptr));
    std::puts("no error");
  } catch (const std::runtime_error& error) {
    std::puts(error.what());
  }
}
