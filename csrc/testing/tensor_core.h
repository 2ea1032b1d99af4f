// SPDX-License-Identifier: Apache-2.0
// ldmatrix and mma.sync on the host, for csrc/common/tensor_core.cuh: the last lane to arrive works for the warp.
#pragma once

#include <cstdint>
#include <cstring>

#include "simulator.h"

namespace simulator {

// Each lane reads its own row, so that a bad address is its fault.
template <int kCount, bool kTranspose>
struct LoadMatrix {
  uint16_t row[8];
  uint32_t (&fragment)[kCount];

  SIMULATOR_NO_RACES static void complete(LoadMatrix* const* lanes, uint32_t) {
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int m = 0; m < kCount; ++m) {
        LoadMatrix* const* rows = lanes + 8 * m;
        const uint32_t low = kTranspose ? rows[2 * q]->row[g] : rows[g]->row[2 * q];
        const uint32_t high = kTranspose ? rows[2 * q + 1]->row[g] : rows[g]->row[2 * q + 1];
        lanes[lane]->fragment[m] = low | high << 16;
      }
    }
  }
};

template <int kCount, bool kTranspose>
void ldmatrix(uint32_t (&fragment)[kCount], const void* row, Site site) {
  LoadMatrix<kCount, kTranspose> lane{{}, fragment};
  if (lane_of_thread() < 8 * kCount) {
    if (reinterpret_cast<uintptr_t>(row) % 16) fail("ldmatrix needs rows aligned to 16 bytes");
    std::memcpy(lane.row, row, sizeof lane.row);
  }
  warp_collective("ldmatrix", ~0u, lane, site);
}

template <class T>
struct Multiply {
  float (&c)[4];
  const uint32_t (&a)[4];
  const uint32_t (&b)[2];

  SIMULATOR_NO_RACES static float element(uint32_t packed, int half) {
    const auto bits = static_cast<uint16_t>(packed >> 16 * half);
    T v;
    std::memcpy(&v, &bits, sizeof v);
    return static_cast<float>(v);
  }

  SIMULATOR_NO_RACES static void complete(Multiply* const* lanes, uint32_t) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, q = lane % 4;
      for (int half = 0; half < 2; ++half) {
        for (int r = 0; r < 4; ++r) a[g + r % 2 * 8][2 * q + r / 2 * 8 + half] = element(lanes[lane]->a[r], half);
        for (int r = 0; r < 2; ++r) b[2 * q + r * 8 + half][g] = element(lanes[lane]->b[r], half);
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + r / 2 * 8, column = 2 * (lane % 4) + r % 2;
        float& c = lanes[lane]->c[r];
        for (int k = 0; k < 16; ++k) c += a[row][k] * b[k][column];
      }
    }
  }
};

template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site) {
  Multiply<T> lane{c, a, b};
  warp_collective("mma.sync", ~0u, lane, site);
}

}  // namespace simulator
