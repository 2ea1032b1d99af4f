// SPDX-License-Identifier: Apache-2.0
// The stable-ABI tensor, and the host checks of arguments. std::invalid_argument reaches Python as ValueError and
// std::out_of_range as IndexError. The Python functions check everything a user can get wrong, with the full message;
// these keep a direct call of torch.ops from touching memory it should not.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace diffullama {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::invalid_argument(message.str());
}

constexpr int64_t kAny = -1;  // a free dimension in check_tensor

inline void check_tensor(const char* name, const Tensor& t, ScalarType dtype, std::initializer_list<int64_t> shape,
                         const Tensor* same_device = nullptr) {
  check(t.scalar_type() == dtype, name, " has the wrong dtype");
  bool matches = t.dim() == static_cast<int64_t>(shape.size());
  int64_t d = 0;
  for (const int64_t size : shape) {
    if (!matches) break;
    matches = size == kAny || t.size(d) == size;
    ++d;
  }
  if (!matches) {
    std::ostringstream want, have;
    for (const int64_t size : shape) want << (size == kAny ? std::string("*") : std::to_string(size)) << " ";
    for (int64_t i = 0; i < t.dim(); ++i) have << t.size(i) << " ";
    check(false, name, " must have shape [ ", want.str(), "], got [ ", have.str(), "]");
  }
  if (same_device != nullptr) {
    check(t.device() == same_device->device(), name, " must be on the device of the other arguments");
  }
}

inline bool is_floating(ScalarType dtype) {
  return dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::Half ||
         dtype == ScalarType::BFloat16;
}

inline Tensor as_contiguous(const Tensor& t) { return torch::stable::contiguous(t); }

inline std::optional<Tensor> as_contiguous(const std::optional<Tensor>& t) {
  return t ? std::optional<Tensor>(torch::stable::contiguous(*t)) : std::nullopt;
}

inline Tensor empty_like_device(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

inline Tensor zeros_like_device(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_zeros(like, shape, dtype);
}

// A bool tensor's bytes, 0 or 1: GCC does not vectorise loops over bool.
inline const uint8_t* const_bytes(const Tensor& t) {
  return reinterpret_cast<const uint8_t*>(t.const_data_ptr<bool>());
}
inline uint8_t* mutable_bytes(const Tensor& t) { return reinterpret_cast<uint8_t*>(t.mutable_data_ptr<bool>()); }

// The value of a one-element int64 tensor on the CPU.
inline int64_t scalar_of(const char* name, const Tensor& t) {
  check(t.scalar_type() == ScalarType::Long && t.numel() == 1, name, " must be int64 with one element");
  return *t.const_data_ptr<int64_t>();
}

}  // namespace diffullama
