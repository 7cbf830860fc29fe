// A fiber: a stack of its own and a place to continue. One CUDA thread runs on each.
#pragma once

#include <cstddef>
#include <cstdint>

#if !defined(__x86_64__) || defined(EMULATOR_UCONTEXT)
#define EMULATOR_USES_UCONTEXT 1
#include <ucontext.h>
#endif

namespace emulator {

class Fiber {
 public:
  static constexpr size_t kStackBytes = 64 * 1024;

  Fiber();
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Prepares the stack so that the next resume() calls entry(), which must never return.
  void start(void (*entry)());
  void resume();   // host to fiber; returns when the fiber suspends
  void suspend();  // fiber to host

  bool owns(uintptr_t address) const { return address - stack_ < kStackBytes; }

 private:
  uintptr_t stack_ = 0;  // lowest usable address; a page without access lies below it
#ifdef EMULATOR_USES_UCONTEXT
  ucontext_t context_{};
  ucontext_t host_{};
#else
  void* stack_pointer_ = nullptr;
  void* host_stack_pointer_ = nullptr;
#endif
};

}  // namespace emulator
