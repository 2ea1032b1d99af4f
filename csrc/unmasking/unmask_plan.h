// SPDX-License-Identifier: Apache-2.0
// Launch plan of unmask: one block a sequence.
#pragma once

#include "../common/kernel_plan.h"

namespace diffullama {

constexpr int kUnmaskThreads = 512;
constexpr int kUnmaskGroup = 4;  // consecutive positions of a thread: one Philox call, accesses of 16 bytes
// Longer sequences' keys are made again from global memory in every pass, instead of kept in shared memory (64 KB).
constexpr int64_t kUnmaskResident = 8192;
constexpr int64_t kUnmaskMaxLength = int64_t{1} << 30;  // positions and counts of a sequence are int

inline KernelPlan plan_unmask(int64_t B, int64_t L) {
  constexpr int64_t kRound = kUnmaskThreads * kUnmaskGroup;
  KernelPlan plan{"unmask_kernel"};
  plan.grid = B;
  plan.block = kUnmaskThreads;
  plan.shared_bytes = L <= kUnmaskResident ? ceil_div(L, kRound) * kRound * 8 : 0;
  const int64_t read = 8 + 1 + 8 + 4, written = 8 + 1;  // xt, masked, token, confidence; xt, committed
  plan.bytes = B * L * (read + written) + B * (4 + 8 + 8);
  return plan;
}

}  // namespace diffullama
