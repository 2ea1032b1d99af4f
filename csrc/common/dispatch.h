// SPDX-License-Identifier: Apache-2.0
// Runtime values to template arguments, without macros.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <type_traits>
#include <utility>

#include "tensor.h"

namespace diffullama {

template <class T>
struct TypeIs {
  using type = T;
};

// Calls f(TypeIs<T>{}) with the element type of a float tensor.
template <class F>
decltype(auto) with_float_type(ScalarType dtype, F&& f) {
  switch (dtype) {
    case ScalarType::Float:
      return f(TypeIs<float>{});
    case ScalarType::Double:
      return f(TypeIs<double>{});
    case ScalarType::Half:
      return f(TypeIs<c10::Half>{});
    case ScalarType::BFloat16:
      return f(TypeIs<c10::BFloat16>{});
    default:
      throw std::invalid_argument("expected float32, float64, float16 or bfloat16");
  }
}

// Arithmetic type of an element type: double stays, everything else computes in float.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

inline ScalarType wide_dtype(ScalarType dtype) { return dtype == ScalarType::Double ? dtype : ScalarType::Float; }

}  // namespace diffullama
