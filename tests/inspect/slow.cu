// Planted: all that a CUDA kernel can get wrong at once. tests/inspect/test_diagnosis.py has it diagnosed.

constexpr int kColumns = 96;

// c = a b for (n, n) and (n, kColumns): neighbouring threads read numbers that are n apart, products are
// multiply-adds, and 1024 threads leave each 64 registers for 96 sums.
__global__ void __launch_bounds__(1024) slow_matmul(const float* a, const float* b, float* c, int n) {
  const int row = threadIdx.x;
  float sums[kColumns] = {};
  for (int k = 0; k < n; ++k) {
    const float x = a[static_cast<long long>(row) * n + k];
#pragma unroll
    for (int j = 0; j < kColumns; ++j) sums[j] += x * b[k * kColumns + j];
  }
#pragma unroll
  for (int j = 0; j < kColumns; ++j) c[row * kColumns + j] = sums[j];
}

// Every thread of a warp hits the same bank: a column of a (32, 32) tile without padding.
__global__ void __launch_bounds__(32) conflicts(const float* x, float* y) {
  __shared__ float tile[32 * 32];
  for (int row = 0; row < 32; ++row) tile[row * 32 + threadIdx.x] = x[row * 32 + threadIdx.x];
  __syncthreads();
  for (int row = 0; row < 32; ++row) y[row * 32 + threadIdx.x] = tile[threadIdx.x * 32 + row];
}
