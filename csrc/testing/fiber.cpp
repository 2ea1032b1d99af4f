// SPDX-License-Identifier: Apache-2.0
#include "fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <new>
#include <stdexcept>

#include "races.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(SIMULATOR_SWITCH_BY_HAND)
// Saves the registers that a call preserves, stores the stack pointer at *from, and takes up where `to` was saved.
extern "C" void simulator_switch(void** from, void* to);
asm(R"(
.text
.p2align 4
.type simulator_switch, @function
simulator_switch:
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
.size simulator_switch, .-simulator_switch
)");
#endif

namespace simulator {

Context::Context() {
#if defined(SIMULATOR_FINDS_RACES)
  race_fiber_ = __tsan_get_current_fiber();
#endif
}

Context::~Context() {
#if defined(SIMULATOR_FINDS_RACES)
  if (started_) __tsan_destroy_fiber(race_fiber_);
#endif
}

void Context::start(void (*entry)(), void* stack, size_t size) {
  stack_bottom_ = stack;
  stack_size_ = size;
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, size);  // frames of a fiber that was abandoned
#endif
#if defined(SIMULATOR_FINDS_RACES)
  if (!started_) race_fiber_ = __tsan_create_fiber(0);  // dear: one for all that start here
#endif
  started_ = true;
#if defined(SIMULATOR_SWITCH_BY_HAND)
  // Six registers, entry as the return address, and a null caller, where unwinding ends. The ABI wants
  // rsp % 16 == 8 at a function's first instruction.
  const auto top = (reinterpret_cast<uintptr_t>(stack) + size) & ~uintptr_t{15};
  auto* frame = reinterpret_cast<void**>(top) - 8;
  std::memset(frame, 0, 8 * sizeof(void*));
  frame[6] = reinterpret_cast<void*>(entry);
  stack_pointer_ = frame;
#else
  getcontext(&context_);
  context_.uc_stack.ss_sp = stack;
  context_.uc_stack.ss_size = size;
  context_.uc_link = nullptr;
  makecontext(&context_, entry, 0);
#endif
}

void Context::resume(Context& from, [[maybe_unused]] bool from_ends) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(from_ends ? nullptr : &fake_stack, stack_bottom_, stack_size_);
#endif
#if defined(SIMULATOR_FINDS_RACES)
  __tsan_switch_to_fiber(race_fiber_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(SIMULATOR_SWITCH_BY_HAND)
  simulator_switch(&from.stack_pointer_, stack_pointer_);
#else
  swapcontext(&from.context_, &context_);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

void Context::publish_at([[maybe_unused]] const void* place) {
#if defined(SIMULATOR_FINDS_RACES)
  void* running = __tsan_get_current_fiber();
  __tsan_switch_to_fiber(race_fiber_, __tsan_switch_to_fiber_no_sync);
  publish(place);
  __tsan_switch_to_fiber(running, __tsan_switch_to_fiber_no_sync);
#endif
}

void Context::entered([[maybe_unused]] Context& previous) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom;
  size_t size;
  __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
  if (previous.stack_bottom_ == nullptr) {  // the thread's own stack, known only now
    previous.stack_bottom_ = bottom;
    previous.stack_size_ = size;
  }
#endif
}

char* StackPool::stack(size_t i) {
  constexpr size_t kGuard = 4096, kStride = kSize + kGuard;
  if (i >= kPerChunk * (sizeof chunks_ / sizeof *chunks_))
    throw std::runtime_error("simulator: too many threads alive");
  char*& chunk = chunks_[i / kPerChunk];
  if (chunk == nullptr) {
    void* memory = mmap(nullptr, kPerChunk * kStride, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    chunk = static_cast<char*>(memory);
    for (size_t k = 0; k < kPerChunk; ++k) mprotect(chunk + k * kStride + kGuard, kSize, PROT_READ | PROT_WRITE);
  }
  return chunk + i % kPerChunk * kStride + kGuard;
}

}  // namespace simulator
