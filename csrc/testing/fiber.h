// SPDX-License-Identifier: Apache-2.0
// Cooperative fibers of one operating-system thread: an own stack each, switched by hand.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace simulator {

// A suspended flow of control. AddressSanitizer is told about every switch, so it knows the stack it is on.
class Context {
 public:
  Context() = default;  // the flow that first switches away from it
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  // Makes this a fiber that runs entry() on [stack, stack + size) when first switched to. entry never returns.
  void start(void (*entry)(), void* stack, size_t size);

  // Suspends the running flow into `from` and resumes this one. `from_ends`: it will never be resumed.
  void resume(Context& from, bool from_ends);

  // The first statement of an entry function; previous is the flow that switched here.
  static void entered(Context& previous);

 private:
#if defined(__x86_64__)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  const void* stack_bottom_ = nullptr;  // known to AddressSanitizer
  size_t stack_size_ = 0;
};

// Stacks of one size behind guard pages, mapped when first needed and used again.
class StackPool {
 public:
  static constexpr size_t kSize = size_t{1} << 17;

  // The i-th stack of the pool; it holds nothing.
  char* stack(size_t i);
  // Its usable part: ends of different stacks fall on different cache lines of a page.
  static size_t usable(size_t i) { return kSize - i % 13 * 320; }

 private:
  static constexpr size_t kPerChunk = 256;
  char* chunks_[64] = {};
};

}  // namespace simulator
