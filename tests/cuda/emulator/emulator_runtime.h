// The runtime's functions, called by emulator.h and emulator_ptx.h.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <functional>

namespace emulator {

struct Site {
  const char* file;
  int line;

  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

struct Thread {
  uint3 thread, block;
  dim3 block_size, grid_size;
  int lane, warp;
};

extern Thread* current;

// Runs `body` as every thread of every block. Throws std::runtime_error, naming the kernel, where a thread
// fails.
void launch(const char* kernel, dim3 grid, dim3 block, int64_t dynamic_shared_bytes,
            const std::function<void()>& body);

// Notes the size of a launch, for emulator_launches.
void record(const void* function, dim3 block, int64_t dynamic_shared_bytes);

// Ends the launch: "KERNEL: FILE:LINE: message, in block (x, y, z), thread (x, y, z)".
[[noreturn]] void fail(Site site, const char* format, ...) __attribute__((format(printf, 2, 3)));
[[noreturn]] void misaligned(const void* pointer, size_t bytes, Site site);

// The block's copy of a __shared__ declaration, 0xFF in every byte when it is first reached.
void* shared(const char* declaration, const char* name, size_t bytes);
unsigned char* dynamic_shared();
void check_shared(const void* pointer, size_t bytes, const char* name, Site site);

// Waits for all threads of the block; the sum of what they brought.
int barrier(int value, const char* name, Site site);

// Four words a lane.
using Words = uint64_t[4];
// All lanes of `mask` meet: each leaves its words, the last runs `combine` on those of all 32, and each gets
// them. They stay until the lane's next but one collective with this mask. Orders no memory.
const Words* exchange(uint32_t mask, const uint64_t* words, int count, void (*combine)(Words*),
                      const char* name, Site site);
void warp_barrier(uint32_t mask, Site site);

// In a random schedule others may run first.
void before_atomic();

void cp_async(void* to, const void* from, bool valid, Site site);
void cp_async_commit();
void cp_async_wait(int groups);
// Compiled with the sanitizers, which see the copy as one of the thread that asked for it.
void copy_16(void* to, const void* from, bool valid);

}  // namespace emulator
