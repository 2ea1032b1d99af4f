// SPDX-License-Identifier: Apache-2.0
// Cooperative fibers of one operating-system thread: an own stack each, switched by hand.
#pragma once

#include <cstddef>

#if defined(__x86_64__) && !defined(SIMULATOR_UCONTEXT)
#define SIMULATOR_SWITCH_BY_HAND
#else
#include <ucontext.h>  // portable, with two system calls a switch
#endif

namespace simulator {

// A suspended flow of control. The sanitizers are told about every switch.
class Context {
 public:
  Context();  // the running flow, to come back to
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;
  ~Context();

  // Makes this a fiber that runs entry() on [stack, stack + size) when first switched to. entry never returns.
  void start(void (*entry)(), void* stack, size_t size);

  // Suspends the running flow into `from` and resumes this one. `from_ends`: it will never be resumed.
  void resume(Context& from, bool from_ends);

  // publish(place) on behalf of this fiber (see races.h).
  void publish_at(const void* place);

  // The first statement of an entry function; previous is the flow that switched here.
  static void entered(Context& previous);

 private:
#if defined(SIMULATOR_SWITCH_BY_HAND)
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
  const void* stack_bottom_ = nullptr;  // known to AddressSanitizer
  size_t stack_size_ = 0;
  void* race_fiber_ = nullptr;  // ThreadSanitizer's
  bool started_ = false;
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
