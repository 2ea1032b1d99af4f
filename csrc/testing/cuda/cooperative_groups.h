// SPDX-License-Identifier: Apache-2.0
// The grid barrier of a cooperative launch.
#pragma once

#include "../simulator.h"

namespace cooperative_groups {

struct grid_group {
  void sync(simulator::Site site = simulator::Site::here()) const { simulator::grid_barrier(site); }
};

inline grid_group this_grid() { return {}; }

}  // namespace cooperative_groups
