# SPDX-License-Identifier: Apache-2.0
# Finds the CUTLASS headers: CUTLASS_DIR (a checkout, or a folder with include/cutlass), else the `nvidia-cutlass` wheel of
# the Python that builds. Defines the target `cutlass`; kernels that use CuTe link it.
find_package(Python REQUIRED COMPONENTS Interpreter)
set(CUTLASS_DIR "$ENV{CUTLASS_DIR}" CACHE PATH "CUTLASS checkout; empty: the nvidia-cutlass wheel")
if(CUTLASS_DIR)
  set(cutlass_root "${CUTLASS_DIR}")
else()
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c
      "import importlib.util as u; print(u.find_spec('cutlass_library').submodule_search_locations[0] + '/source')"
    OUTPUT_VARIABLE cutlass_root OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()
if(NOT EXISTS "${cutlass_root}/include/cutlass/cutlass.h")
  message(FATAL_ERROR "CUTLASS headers not found (looked in '${cutlass_root}'): pip install nvidia-cutlass, or set CUTLASS_DIR")
endif()
message(STATUS "CUTLASS: ${cutlass_root}/include")
add_library(cutlass INTERFACE)
target_include_directories(cutlass SYSTEM INTERFACE "${cutlass_root}/include")
