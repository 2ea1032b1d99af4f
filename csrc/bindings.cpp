// SPDX-License-Identifier: Apache-2.0
// `_C`: what was built, kernel plans, and the host RNG as NumPy. No tensors: those go through torch.ops.diffullama.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>
#include <utility>

#include "common/bernoulli.h"
#include "common/philox.h"
#include "kernel_plans.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["built with torch"] = DIFFULLAMA_BUILT_TORCH;
  info["built with CUDA"] = DIFFULLAMA_BUILT_CUDA;
  info["built archs"] = DIFFULLAMA_BUILT_ARCHS;
  info["compiler"] = DIFFULLAMA_BUILT_COMPILER;
  return info;
}

// Words of the counters (index4[i], tag, stream[i]): uint32 [n, 4].
py::array_t<uint32_t> philox_words(uint64_t seed, const py::array_t<uint64_t>& index4, uint32_t tag,
                                   const py::array_t<uint32_t>& stream) {
  const auto index = index4.unchecked<1>();
  const auto streams = stream.unchecked<1>();
  if (index.shape(0) != streams.shape(0)) throw std::invalid_argument("index4 and stream must have one length");
  py::array_t<uint32_t> words({index.shape(0), py::ssize_t{4}});
  auto out = words.mutable_unchecked<2>();
  for (py::ssize_t i = 0; i < index.shape(0); ++i) {
    const auto w = diffullama::philox(seed, index(i), static_cast<diffullama::Tag>(tag), streams(i));
    for (int lane = 0; lane < 4; ++lane) out(i, lane) = w.w[lane];
  }
  return words;
}

py::dict kernel_plan(const std::string& op, const py::kwargs& shape) {
  std::map<std::string, int64_t> sizes;
  for (const auto& [name, size] : shape) sizes[py::cast<std::string>(name)] = py::cast<int64_t>(size);
  const diffullama::KernelPlan plan = diffullama::plan_of(op, std::move(sizes));
  py::dict out;
  out["kernel"] = plan.kernel;
  out["grid"] = plan.grid;
  out["block"] = plan.block;
  out["cluster"] = plan.cluster;
  out["shared_bytes"] = plan.shared_bytes;
  out["bytes"] = plan.bytes;
  out["flops"] = plan.flops;
  return out;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build info and host-side parts of diffullama_ext that need no tensors.";
  m.def("build_info", &build_info);
  m.def("kernel_plan", &kernel_plan, py::arg("op"));
  m.def("kernel_plan_ops", &diffullama::planned_ops);
  m.def("philox_words", &philox_words, py::arg("seed"), py::arg("index4"), py::arg("tag"), py::arg("stream"));
  m.def("threshold32", &diffullama::threshold32, py::arg("p"));
}
