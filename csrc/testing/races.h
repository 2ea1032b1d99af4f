// SPDX-License-Identifier: Apache-2.0
// What ThreadSanitizer has to know to find races between fibers as if they were threads: which fiber runs, and what
// orders memory. Nothing without SIMULATOR_FINDS_RACES. Then kernels are compiled with -fsanitize=thread and the
// simulator itself is not, since its own data belong to one operating-system thread.
#pragma once

#if defined(SIMULATOR_FINDS_RACES)
#include <sanitizer/tsan_interface.h>

// Code that works for several fibers at once.
#define SIMULATOR_NO_RACES __attribute__((no_sanitize("thread")))

extern "C" {
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
}
#else
#define SIMULATOR_NO_RACES
#endif

namespace simulator {

// What happened before publish(place) happened before what follows observe(place).
inline void publish([[maybe_unused]] const void* place) {
#if defined(SIMULATOR_FINDS_RACES)
  __tsan_release(const_cast<void*>(place));
#endif
}
inline void observe([[maybe_unused]] const void* place) {
#if defined(SIMULATOR_FINDS_RACES)
  __tsan_acquire(const_cast<void*>(place));
#endif
}

// Memory that is allocated, written or freed in this scope belongs to no fiber.
struct NoRaces {
#if defined(SIMULATOR_FINDS_RACES)
  NoRaces() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~NoRaces() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  NoRaces() {}
#endif
  NoRaces(const NoRaces&) = delete;
  NoRaces& operator=(const NoRaces&) = delete;
};

}  // namespace simulator
