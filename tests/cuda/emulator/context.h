// Stacks and the switch between them, with what AddressSanitizer and ThreadSanitizer must be told.
#pragma once

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#ifdef EMULATOR_ADDRESS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef EMULATOR_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace emulator {

#ifdef EMULATOR_THREAD_SANITIZER
// What `from` did before release is ordered before what comes after acquire; nothing else orders fibers.
inline void release(void* where) { __tsan_release(where); }
inline void acquire(void* where) { __tsan_acquire(where); }
#else
inline void release(void*) {}
inline void acquire(void*) {}
#endif

inline void forbid(void* from, size_t bytes) {
#ifdef EMULATOR_ADDRESS_SANITIZER
  __asan_poison_memory_region(from, bytes);
#else
  static_cast<void>(from), static_cast<void>(bytes);
#endif
}
inline void allow(void* from, size_t bytes) {
#ifdef EMULATOR_ADDRESS_SANITIZER
  __asan_unpoison_memory_region(from, bytes);
#else
  static_cast<void>(from), static_cast<void>(bytes);
#endif
}

// Memory, zero in every byte.
inline char* map(size_t bytes) {
  // Asked of the kernel itself: for mmap, ThreadSanitizer would write its shadow of all these bytes.
  const auto mapped = syscall(SYS_mmap, nullptr, bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == -1) throw std::runtime_error("emulator: out of memory");
  return reinterpret_cast<char*>(mapped);
}

// The same memory, or under ThreadSanitizer other: what it knows about a block's is forgotten with it.
inline char* renew(char* memory, size_t bytes) {
#ifdef EMULATOR_THREAD_SANITIZER
  if (memory != nullptr) munmap(memory, bytes);
  return map(bytes);
#else
  return memory != nullptr ? memory : map(bytes);
#endif
}

#ifdef __x86_64__
// Saves the registers that a function keeps on the stack, whose address goes to *save, and takes up those at
// `to`.
extern "C" void emulator_switch(void** save, void* to);
#endif

// Something that can be switched to: a fiber with a stack of its own, or the thread that called `launch`.
class Context {
 public:
  static constexpr size_t kStack = 128 << 10;

  // Makes a fiber that will run `entry`, which must not return, on kStack bytes from `stack` on.
  void start(void (*entry)(), char* stack) {
    stack_ = stack;
#ifdef EMULATOR_THREAD_SANITIZER
    sanitizer_ = __tsan_create_fiber(0);
#endif
    allow(stack_, kStack);
    fake_stack_ = nullptr;
#ifdef EMULATOR_ADDRESS_SANITIZER
    bottom_ = stack_;
    size_ = kStack;
#endif
#ifdef __x86_64__
    void** top = reinterpret_cast<void**>(stack_ + kStack - 64);
    *--top = nullptr;  // where a return address would be
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    saved_ = top;
#else
    getcontext(&saved_);
    saved_.uc_stack = {stack_, 0, kStack};
    saved_.uc_link = nullptr;
    makecontext(&saved_, entry, 0);
#endif
  }

  // For the thread that runs the fibers, before it switches to the first.
  void adopt() {
#ifdef EMULATOR_THREAD_SANITIZER
    sanitizer_ = __tsan_get_current_fiber();
#endif
  }

  // After it has been left for the last time.
  void finish() {
#ifdef EMULATOR_THREAD_SANITIZER
    __tsan_destroy_fiber(sanitizer_);
#endif
  }

  // Runs `to` until it switches back here; `leaving` for good, it does not.
  void switch_to(Context& to, bool leaving = false) {
#ifdef EMULATOR_ADDRESS_SANITIZER
    __sanitizer_start_switch_fiber(leaving ? nullptr : &fake_stack_, to.bottom_, to.size_);
    to.from_ = this;
#endif
#ifdef EMULATOR_THREAD_SANITIZER
    __tsan_switch_to_fiber(to.sanitizer_, __tsan_switch_to_fiber_no_sync);
#endif
    static_cast<void>(leaving);
#ifdef __x86_64__
    emulator_switch(&saved_, to.saved_);
#else
    swapcontext(&saved_, &to.saved_);
#endif
    arrived();
  }

  // First thing in a fiber, and after each switch back to one.
  void arrived() {
#ifdef EMULATOR_ADDRESS_SANITIZER
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_stack_, &bottom, &size);
    from_->bottom_ = bottom;
    from_->size_ = size;
#endif
  }

 private:
  char* stack_ = nullptr;
#ifdef __x86_64__
  void* saved_ = nullptr;
#else
  ucontext_t saved_;
#endif
  void* fake_stack_ = nullptr;
  void* sanitizer_ = nullptr;
#ifdef EMULATOR_ADDRESS_SANITIZER
  const void* bottom_ = nullptr;  // of the stack, as AddressSanitizer wants to be told
  size_t size_ = 0;
  Context* from_ = nullptr;
#endif
};

}  // namespace emulator
