// One product of 16 x 16 and 16 x 8 small integers, which is exact, with the operands brought to the lanes in
// every way that ptx.cuh has. Prints the 128 results of each way.
#include <cstdio>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

using namespace fastgpt::cuda;

namespace {

constexpr int M = 16, N = 8, K = 16;

FASTGPT_DEVICE float a_at(int row, int k) { return static_cast<float>((row * 5 + k * 3) % 7 - 3); }
FASTGPT_DEVICE float b_at(int k, int column) { return static_cast<float>((k * 2 + column * 5) % 9 - 4); }

template <typename T>
FASTGPT_DEVICE uint32_t pack(float low, float high) {
  Vec<T, 2> pair{{from_float<T>(low), from_float<T>(high)}};
  return *reinterpret_cast<const uint32_t*>(&pair);
}

enum Way { kTables, kLdmatrix, kTransposed, kWays };

template <typename T>
__global__ void multiply(float* out, Way way) {
  FASTGPT_SHARED(T, a_rows, M * K);
  FASTGPT_SHARED(T, a_columns, K * M);
  FASTGPT_SHARED(T, b_rows, K * N);
  FASTGPT_SHARED(T, b_columns, N * K);
  const int lane = threadIdx.x, group = lane / 4, t = lane % 4;
  for (int i = lane; i < M * K; i += kWarpSize) {
    a_rows[i] = from_float<T>(a_at(i / K, i % K));
    a_columns[i] = from_float<T>(a_at(i % M, i / M));
  }
  for (int i = lane; i < K * N; i += kWarpSize) {
    b_rows[i] = from_float<T>(b_at(i / N, i % N));
    b_columns[i] = from_float<T>(b_at(i % K, i / K));
  }
  __syncwarp();
  uint32_t a[4], b[2];
  if (way == kTables) {
    for (int i = 0; i < 4; ++i) {
      const int row = group + i % 2 * 8, k = 2 * t + i / 2 * 8;
      a[i] = pack<T>(a_at(row, k), a_at(row, k + 1));
    }
    for (int i = 0; i < 2; ++i) b[i] = pack<T>(b_at(2 * t + 8 * i, group), b_at(2 * t + 8 * i + 1, group));
  } else if (way == kLdmatrix) {
    ptx::ldmatrix_x4(a, a_rows + lane % 16 * K + lane / 16 * 8);
    ptx::ldmatrix_x2(b, b_columns + lane % 8 * K + lane / 8 % 2 * 8);
  } else {
    // Matrices of a_columns: row k, columns m. The four in the order of a: m 0, m 8, then the same of k 8.
    ptx::ldmatrix_x4_trans(a, a_columns + (lane % 8 + lane / 16 * 8) * M + lane / 8 % 2 * 8);
    ptx::ldmatrix_x2_trans(b, b_rows + lane % 16 * N);
  }
  float d[4] = {};
  ptx::mma_m16n8k16<T>(d, a, b);
  for (int i = 0; i < 4; ++i) out[(group + i / 2 * 8) * N + 2 * t + i % 2] = d[i];
}

template <typename T>
void print() {
  for (int way = 0; way < kWays; ++way) {
    std::vector<float> out(M * N);
    Launch launch("multiply", {M, N, K}, nullptr);
    launch.block(kWarpSize);
    launch(multiply<T>, out.data(), static_cast<Way>(way));
    for (const float value : out) std::printf("%g ", value);
    std::puts("");
  }
}

}  // namespace

int main() {
  print<bf16>();
  print<half>();
}
