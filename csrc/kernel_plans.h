// SPDX-License-Identifier: Apache-2.0
// The launch plan of every op by name, for `kernel_plan` in Python. Sizes are named as in the ops' documentation: B
// batch, L length, M masks, N rows, V vocabulary, H hidden; element_size in bytes; flags are 0 or 1.
#pragma once

#include <algorithm>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "attention/attention_hopper_plan.h"
#include "attention/attention_plan.h"
#include "attention_mask/attention_mask_plan.h"
#include "common/kernel_plan.h"
#include "noising/noising_plan.h"
#include "shifted_cross_entropy/loss_plan.h"
#include "unmasking/token_stats_plan.h"
#include "unmasking/unmask_plan.h"

namespace diffullama {

// The sizes of one question. Taking a size uses it up; what is left at the end was not understood. Those of the device
// and of elements are taken from every question.
class PlanSizes {
 public:
  PlanSizes(std::string op, std::map<std::string, int64_t> sizes) : op_(std::move(op)), sizes_(std::move(sizes)) {
    device_.n_sm = static_cast<int>(take("n_sm", device_.n_sm));
    device_.shared_bytes = take("shared_bytes", device_.shared_bytes);
    device_.clusters = take("clusters", device_.clusters) != 0;
    is_half_ = take("float16", 0) != 0;
    element_size_ = static_cast<int>(take("element_size", 2));
    if (element_size_ == 2 || element_size_ == 4 || element_size_ == 8) return;
    throw std::invalid_argument("element_size must be 2, 4 or 8, got " + std::to_string(element_size_));
  }

  int64_t take(const std::string& name) {
    if (sizes_.count(name) == 0) throw std::invalid_argument("kernel_plan of " + op_ + " needs " + name);
    const int64_t size = sizes_.extract(name).mapped();
    if (size >= 0 && size <= int64_t{1} << 40) return size;
    throw std::invalid_argument(name + " must be in [0, 2^40], got " + std::to_string(size));
  }

  int64_t take(const std::string& name, int64_t otherwise) { return sizes_.count(name) ? take(name) : otherwise; }

  bool flag(const std::string& name) { return take(name, 0) != 0; }

  int element_size() const { return element_size_; }

  bool is_half() const { return is_half_; }  // of two bytes: float16 or bfloat16

  const DeviceLimits& device() const { return device_; }

  void check_all_taken() const {
    if (!sizes_.empty()) throw std::invalid_argument("kernel_plan of " + op_ + " takes no " + sizes_.begin()->first);
  }

 private:
  std::string op_;
  std::map<std::string, int64_t> sizes_;
  DeviceLimits device_;
  int element_size_ = 2;
  bool is_half_ = false;
};

// L is both lengths where they are one. masks=M says that there are bits. takes_width: which D the kernel is made for.
template <class PlanOfKernel>
KernelPlan plan_attention_with(PlanSizes& s, bool (*takes_width)(int64_t), const PlanOfKernel& plan_of_kernel) {
  AttentionSizes sizes{};
  sizes.B = s.take("B");
  sizes.H = s.take("H");
  sizes.Hkv = s.take("Hkv", sizes.H);
  sizes.D = s.take("D");
  sizes.element_size = s.element_size();
  const int64_t L = s.take("L", -1);
  sizes.Lq = L < 0 ? s.take("Lq") : L;
  sizes.Lk = L < 0 ? s.take("Lk") : L;
  const bool causal = s.flag("causal");
  const int64_t n_masks = s.take("masks", 0);
  if (sizes.Hkv == 0 || sizes.H % sizes.Hkv != 0) throw std::invalid_argument("H must be a multiple of Hkv");
  if (causal && n_masks > 0) throw std::invalid_argument("causal and masks exclude each other");
  const MaskKind kind = causal ? MaskKind::kCausal : n_masks > 0 ? MaskKind::kBits : MaskKind::kFull;
  KernelPlan plan = plan_of_kernel(sizes, s.is_half(), kind, n_masks);
  if (sizes.element_size == 2 && takes_width(sizes.D)) return plan;
  KernelPlan reference{"reference"};  // PyTorch's operators
  reference.bytes = plan.bytes;
  reference.flops = plan.flops;
  return reference;
}

// hopper=1: the kernels of sm_90a.
inline KernelPlan plan_attention(PlanSizes& s) {
  if (s.flag("hopper")) {
    const int n_sm = s.device().n_sm;
    return plan_attention_with(s, is_hopper_attention_width, [&](const auto& sizes, bool is_half, auto kind, auto n) {
      return plan_attention_hopper(sizes, is_half, kind, n, n_sm);
    });
  }
  return plan_attention_with(s, is_attention_width, [](const auto& sizes, bool is_half, auto kind, auto n) {
    return plan_attention(sizes, is_half, kind, n);
  });
}
inline KernelPlan plan_attention_backward(PlanSizes& s) {
  if (s.flag("hopper")) {
    const int n_sm = s.device().n_sm;
    return plan_attention_with(s, is_hopper_attention_width, [&](const auto& sizes, bool is_half, auto kind, auto n) {
      return plan_attention_hopper_backward(sizes, is_half, kind, n, n_sm);
    });
  }
  return plan_attention_with(s, is_attention_width, [](const auto& sizes, bool is_half, auto kind, auto n) {
    return plan_attention_backward(sizes, is_half, kind, n);
  });
}

inline KernelPlan plan_mask_tokens(PlanSizes& s) {
  const int64_t B = s.take("B"), L = s.take("L");
  return plan_mask_tokens(B, L, s.flag("maskable"), s.flag("p_by_token"), s.device().n_sm);
}

// N scored tokens: the kernel of one chunk, the traffic and GEMMs of all of them.
inline KernelPlan plan_linear(PlanSizes& s, KernelPlan (*plan)(int64_t, int64_t, int64_t, int64_t, int)) {
  const int64_t n = s.take("N"), H = s.take("H"), V = s.take("V");
  const int element_size = s.element_size();
  const int64_t chunk = s.take("chunk_rows", rows_within(kChunkBytes, V, element_size));
  return plan(n, H, V, std::clamp<int64_t>(chunk, 1, std::max<int64_t>(n, 1)), element_size);
}

inline KernelPlan plan_linear_loss(PlanSizes& s) { return plan_linear(s, plan_linear_loss); }
inline KernelPlan plan_linear_nll(PlanSizes& s) { return plan_linear(s, plan_linear_nll); }

// N of the B * L tokens are scored, by default all.
inline KernelPlan plan_logits_loss(PlanSizes& s) {
  const int64_t B = s.take("B"), L = s.take("L"), n = s.take("N", B * L);
  return plan_logits_loss(B, L, n, s.take("V"), s.element_size(), s.flag("backward"));
}

inline KernelPlan plan_token_stats(PlanSizes& s) {
  const int64_t N = s.take("N"), V = s.take("V");
  const bool greedy = s.flag("greedy"), truncated = s.flag("truncated");
  const Draw draw = greedy ? Draw::kGreedy : truncated ? Draw::kTruncated : Draw::kWhole;
  return plan_token_stats(N, V, s.element_size(), draw, s.device()).launch;
}

inline KernelPlan plan_unmask(PlanSizes& s) {
  const int64_t B = s.take("B");
  return plan_unmask(B, s.take("L"));
}

inline KernelPlan plan_annealed_mask(PlanSizes& s) { return plan_annealed_mask(s.take("L")); }

// M masks, one by default, of Lq queries and Lk keys.
struct MaskSizes {
  int64_t M, Lq, Lk;
  explicit MaskSizes(PlanSizes& s) : M(s.take("M", 1)), Lq(s.take("Lq")), Lk(s.take("Lk")) {}
};

// Tensors are taken to be aligned: whole words, or not, is then a matter of Lk.
inline KernelPlan plan_pack_mask(PlanSizes& s) {
  const MaskSizes m(s);
  return plan_pack_mask(m.M, m.Lq, m.Lk, m.Lk % 32 == 0);
}

inline KernelPlan plan_unpack_mask(PlanSizes& s) {
  const MaskSizes m(s);
  return plan_unpack_mask(m.M, m.Lq, m.Lk, m.Lk % 32 == 0);
}

inline KernelPlan plan_id_mask(PlanSizes& s) {
  const MaskSizes m(s);
  return plan_id_mask(m.M, m.Lq, m.Lk);
}

inline KernelPlan plan_fragment_mask(PlanSizes& s) {
  const MaskSizes m(s);
  return plan_fragment_mask(m.M, m.Lq, m.Lk, s.flag("transpose"));
}

inline KernelPlan plan_mask_tile_classes(PlanSizes& s) {
  const MaskSizes m(s);
  const int64_t rows = std::max<int64_t>(s.take("tile_rows"), 1), cols = std::max<int64_t>(s.take("tile_cols"), 1);
  return plan_mask_tile_classes(m.M, m.Lq, m.Lk, rows, cols);
}

inline const std::map<std::string, KernelPlan (*)(PlanSizes&)>& plans() {
  static const std::map<std::string, KernelPlan (*)(PlanSizes&)> table = {
      {"annealed_mask", plan_annealed_mask},
      {"attention", plan_attention},
      {"attention_backward", plan_attention_backward},
      {"fragment_mask", plan_fragment_mask},
      {"id_mask", plan_id_mask},
      {"linear_shifted_cross_entropy", plan_linear_loss},
      {"linear_shifted_nll", plan_linear_nll},
      {"mask_tile_classes", plan_mask_tile_classes},
      {"mask_tokens", plan_mask_tokens},
      {"pack_mask", plan_pack_mask},
      {"shifted_cross_entropy", plan_logits_loss},
      {"token_stats", plan_token_stats},
      {"unmask", plan_unmask},
      {"unpack_mask", plan_unpack_mask},
  };
  return table;
}

inline std::vector<std::string> planned_ops() {
  std::vector<std::string> names;
  for (const auto& [op, plan] : plans()) names.push_back(op);
  return names;
}

inline KernelPlan plan_of(const std::string& op, std::map<std::string, int64_t> sizes) {
  const auto found = plans().find(op);
  if (found == plans().end()) {
    std::string known;
    for (const std::string& name : planned_ops()) known += (known.empty() ? "" : ", ") + name;
    throw std::invalid_argument("op must be one of " + known + ", got '" + op + "'");
  }
  PlanSizes given(op, std::move(sizes));
  const KernelPlan plan = found->second(given);
  given.check_all_taken();
  return plan;
}

}  // namespace diffullama
