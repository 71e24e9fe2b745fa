// The Python module ncsn_fast._C. Importing it registers the CPU operators of csrc/cpu; what it offers to Python are the
// facts of the build, never tensors.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "build_config.h"
#include "cpu/conv3x3/kernels.h"
#include "cpu/simd.h"
#include "cpu/threads.h"

namespace py = pybind11;

namespace {

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_config() {
  using namespace py::literals;
  const std::string cuda = NCSN_CUDA_VERSION;
  return py::dict(
      "compiler"_a = compiler(), "flags"_a = NCSN_COMPILER_FLAGS,
      "threads"_a = ncsn::own_threads() ? "own" : "torch", "simd_levels"_a = ncsn::simd_levels(),
      "simd_level"_a = ncsn::simd_name(ncsn::simd_level()),
      "conv_panel"_a = ncsn::conv_kernels().panel, "torch"_a = NCSN_TORCH_VERSION,
      "cuda"_a = cuda.empty() ? py::object(py::none()) : py::object(py::str(cuda)),
      "cuda_architectures"_a = NCSN_CUDA_ARCHITECTURES, "schemas"_a = NCSN_SCHEMAS);
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "The C++ kernels of ncsn_fast.";
  m.def("build_config", &build_config, "Compiler, flags, SIMD levels and versions of this build.");
}
