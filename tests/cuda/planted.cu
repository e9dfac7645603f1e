// Small kernels, each right as it is and wrong with its bug planted: what the emulator must let pass, and
// catch.
//
//     planted NAME 0|1      prints the output's bits, or "error: ..." where the emulator stops the kernel
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"

using namespace fastgpt::cuda;

namespace {

constexpr int kThreads = 64;

// What a kernel has to work with: as large as it says, so that AddressSanitizer sees its ends.
struct Data {
  const float* in;  // kThreads values
  float* out;       // kThreads values, zero
  bool bug;
};

__global__ void missing_barrier(Data d) {
  FASTGPT_SHARED(float, tile, kThreads);
  const int t = threadIdx.x;
  tile[t] = d.in[t];
  if (!d.bug) __syncthreads();
  d.out[t] = tile[kThreads - 1 - t];
}

__global__ void missing_barrier_of_a_loop(Data d) {
  FASTGPT_SHARED(float, tile, kThreads);
  const int t = threadIdx.x;
  for (int i = 0; i < 3; ++i) {
    tile[t] = d.in[t] + i;
    __syncthreads();
    d.out[t] += tile[kThreads - 1 - t];
    if (!d.bug) __syncthreads();
  }
}

__global__ void missing_warp_barrier(Data d) {
  FASTGPT_SHARED(float, tile, kThreads);
  const int t = threadIdx.x;
  tile[t] = d.in[t];
  if (!d.bug) __syncwarp();
  d.out[t] = tile[t ^ 1];
}

__global__ void weak_wait(Data d) {
  FASTGPT_SHARED(float, tile, 2 * 4 * kThreads);
  const int t = threadIdx.x;
  float* const own = tile + 8 * t;
  const float* const from = d.in + t / 4 * 4;
  ptx::cp_async_16(own, from, true);
  ptx::cp_async_commit();
  ptx::cp_async_16(own + 4, from, t % 2 == 0);
  ptx::cp_async_commit();
  if (d.bug) {
    ptx::cp_async_wait<1>();
  } else {
    ptx::cp_async_wait<0>();
  }
  d.out[t] = own[0] + own[4 + t % 4];
}

__global__ void wait_without_barrier(Data d) {
  FASTGPT_SHARED(float, tile, kThreads);
  const int t = threadIdx.x;
  if (t % 4 == 0) ptx::cp_async_16(tile + t, d.in + t, true);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  if (!d.bug) __syncthreads();
  d.out[t] = tile[kThreads - 1 - t];
}

// Of four blocks, each adds 1.
__global__ void add_across_blocks(Data d) {
  if (threadIdx.x != 0) return;
  if (d.bug) {
    d.out[0] += 1.0f;
  } else {
    atomicAdd(d.out, 1.0f);
  }
}

__global__ void write_by_two_threads(Data d) {
  if (threadIdx.x % 32 == 0) d.out[d.bug ? 0 : threadIdx.x] = 1.0f;
}

__global__ void shuffle_of_exited_lanes(Data d) {
  const int t = threadIdx.x;
  if (d.bug && t % 32 >= 16) return;
  d.out[t] = __shfl_xor_sync(kFullWarp, d.in[t], 1);
}

__global__ void shuffle_outside_of_mask(Data d) {
  const int t = threadIdx.x;
  if (t % 32 < 16) d.out[t] = __shfl_sync(0xffffu, d.in[t], d.bug ? 20 : 15);
}

__global__ void shared_write_past_the_end(Data d) {
  FASTGPT_SHARED(float, tile, kThreads);
  const int t = threadIdx.x;
  tile[t + d.bug] = d.in[t];
  d.out[t] = d.in[t];
}

__global__ void shared_read_past_the_end(Data d) {
  FASTGPT_DYNAMIC_SHARED(bytes);
  float* const tile = reinterpret_cast<float*>(bytes);
  const int t = threadIdx.x;
  tile[t] = d.in[t];
  d.out[t] = tile[t + d.bug];
}

__global__ void global_read_past_the_end(Data d) {
  const int t = threadIdx.x;
  d.out[t] = d.in[t + d.bug] * 0.0f;
}

__global__ void uninitialised_shared(Data d) {
  FASTGPT_SHARED(float, tile, kThreads);
  const int t = threadIdx.x;
  if (!d.bug || t % 2 == 0) tile[t] = d.in[t];
  d.out[t] = tile[t];
}

__global__ void misaligned_vector(Data d) {
  if (threadIdx.x == 0) d.out[0] = load_vec<Vec<float>>(d.in + (d.bug ? 1 : 4))[0];
}

__global__ void misaligned_copy(Data d) {
  FASTGPT_SHARED(float, tile, kThreads);
  if (threadIdx.x != 0) return;
  ptx::cp_async_16(tile + (d.bug ? 2 : 4), d.in, true);
  ptx::cp_async_wait<0>();
}

__global__ void copy_to_global(Data d) {
  FASTGPT_SHARED(float, tile, 4);
  if (threadIdx.x == 0) ptx::cp_async_16(d.bug ? d.out : tile, d.in, true);
}

__global__ void divergent_barriers(Data d) {
  if (d.bug && threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void barrier_after_exit(Data d) {
  if (d.bug && threadIdx.x == 40) return;
  __syncthreads();
}

__global__ void barrier_and_shuffle(Data d) {
  if (d.bug && threadIdx.x == 3) {
    __syncthreads();
  } else {
    d.out[threadIdx.x] = __shfl_xor_sync(kFullWarp, 1.0f, 1);
  }
}

void run(void (*kernel)(Data), bool bug, int blocks) {
  const auto allocate = [] { return static_cast<float*>(std::aligned_alloc(16, kThreads * sizeof(float))); };
  float *in = allocate(), *out = allocate();
  for (int i = 0; i < kThreads; ++i) in[i] = 1.0f + i, out[i] = 0.0f;
  try {
    Launch launch("planted", {kThreads}, nullptr);
    launch.grid(blocks).block(kThreads).shared(kThreads * sizeof(float));
    launch(kernel, Data{in, out, bug});
    for (int i = 0; i < kThreads; ++i) {
      uint32_t bits;
      std::memcpy(&bits, &out[i], sizeof(bits));
      std::printf("%08x ", bits);
    }
  } catch (const std::runtime_error& error) {
    std::printf("error: %s", error.what());
  }
  std::puts("");
  std::free(in);
  std::free(out);
}

}  // namespace

#define KERNEL(name) {#name, name}

int main(int, char** arguments) {
  const std::map<std::string, void (*)(Data)> kernels = {
      KERNEL(missing_barrier),          KERNEL(missing_barrier_of_a_loop),
      KERNEL(missing_warp_barrier),     KERNEL(weak_wait),
      KERNEL(wait_without_barrier),     KERNEL(add_across_blocks),
      KERNEL(write_by_two_threads),     KERNEL(shuffle_of_exited_lanes),
      KERNEL(shuffle_outside_of_mask),  KERNEL(shared_write_past_the_end),
      KERNEL(shared_read_past_the_end), KERNEL(global_read_past_the_end),
      KERNEL(uninitialised_shared),     KERNEL(misaligned_vector),
      KERNEL(misaligned_copy),          KERNEL(copy_to_global),
      KERNEL(divergent_barriers),       KERNEL(barrier_after_exit),
      KERNEL(barrier_and_shuffle),
  };
  const std::string name = arguments[1];
  run(kernels.at(name), arguments[2][0] == '1', name == "add_across_blocks" ? 4 : 1);
}
