#include "fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <new>

#ifndef EMULATOR_USES_UCONTEXT
// Saves the registers that a callee must keep (System V ABI) on the running stack, stores its stack
// pointer in *save, and continues on the stack `load`. swapcontext does the same with a system
// call.
extern "C" void emulator_switch_stack(void** save, void* load);
asm(R"(
.text
.hidden emulator_switch_stack
.globl emulator_switch_stack
.type emulator_switch_stack, @function
emulator_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulator_switch_stack, .-emulator_switch_stack
)");
#endif

namespace emulator {

Fiber::Fiber() {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  void* memory =
      mmap(nullptr, page + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, page, PROT_NONE) != 0) throw std::bad_alloc();
  stack_ = reinterpret_cast<uintptr_t>(memory) + page;
}

Fiber::~Fiber() {
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  munmap(reinterpret_cast<void*>(stack_ - page), page + kStackBytes);
}

#ifdef EMULATOR_USES_UCONTEXT

void Fiber::start(void (*entry)()) {
  getcontext(&context_);
  context_.uc_stack.ss_sp = reinterpret_cast<void*>(stack_);
  context_.uc_stack.ss_size = kStackBytes;
  makecontext(&context_, entry, 0);
}
void Fiber::resume() { swapcontext(&host_, &context_); }
void Fiber::suspend() { swapcontext(&context_, &host_); }

#else

void Fiber::start(void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack_ + kStackBytes);
  *--top = nullptr;  // the return address of entry, which never returns; also aligns the stack
  *--top = reinterpret_cast<void*>(entry);
  for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
  stack_pointer_ = top;
}
void Fiber::resume() { emulator_switch_stack(&host_stack_pointer_, stack_pointer_); }
void Fiber::suspend() { emulator_switch_stack(&stack_pointer_, host_stack_pointer_); }

#endif

}  // namespace emulator
