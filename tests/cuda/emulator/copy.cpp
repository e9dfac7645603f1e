// The copies of cp.async: apart from the runtime because the sanitizers are to see them.
#include "emulator_runtime.h"

namespace emulator {

void copy_16(void* to, const void* from, bool valid) {
  for (int i = 0; i < 2; ++i) {
    static_cast<uint64_t*>(to)[i] = valid ? static_cast<const uint64_t*>(from)[i] : 0;
  }
}

}  // namespace emulator
