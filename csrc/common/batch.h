// From PyTorch's tensors to pointers and the canonical geometry, with the checks that keep a kernel inside its memory.
//
// The public functions in Python have checked everything with better words; these guard direct calls of the operators.

#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "common/dtype.h"
#include "common/geometry.h"

namespace ncsn {

// One tensor of a batch.
struct Operand {
  void* data;
  torch::headeronly::ScalarType dtype;
  Strides strides;
};

inline bool is_contiguous(const torch::stable::Tensor& t) {
  return is_contiguous(t.sizes().data(), t.strides().data(), t.dim());
}

inline bool is_channels_last(const torch::stable::Tensor& t) {
  return is_channels_last(t.sizes().data(), t.strides().data(), t.dim());
}

inline Operand operand(const torch::stable::Tensor& t, const Geometry& geometry, const char* name) {
  const bool contiguous = is_contiguous(t);
  STD_TORCH_CHECK(contiguous || is_channels_last(t), name, " must be contiguous or channels_last");
  return {t.data_ptr(), t.scalar_type(),
          contiguous ? contiguous_strides(geometry) : channels_last_strides(geometry)};
}

inline void check_like(const torch::stable::Tensor& t, const torch::stable::Tensor& x,
                       const char* name) {
  STD_TORCH_CHECK(is_floating(t.scalar_type()), name, " must be floating point, got ",
                  torch::headeronly::toString(t.scalar_type()));
  STD_TORCH_CHECK(t.device() == x.device(), name, " must be on the device of x");
  bool same = t.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = t.size(i) == x.size(i);
  STD_TORCH_CHECK(same, name, " must have the shape of x");
}

// A gradient as dense memory in the layout of x: itself, or a copy.
inline torch::stable::Tensor in_layout_of(const torch::stable::Tensor& x,
                                          const torch::stable::Tensor& grad) {
  bool same = true;
  for (int64_t i = 0; i < x.dim(); ++i) {
    same = same && (x.size(i) == 1 || x.stride(i) == grad.stride(i));
  }
  if (same) return grad;
  torch::stable::Tensor copy = torch::stable::empty_like(x);
  torch::stable::copy_(copy, grad);
  return copy;
}

// A pointer to the one element of a tensor on the device of x; null if there is no tensor.
template <typename T>
const T* one_element(const std::optional<torch::stable::Tensor>& t, const torch::stable::Tensor& x,
                     const char* name) {
  if (!t) return nullptr;
  STD_TORCH_CHECK(t->numel() == 1, name, " must have one element, got ", t->numel());
  STD_TORCH_CHECK(t->device() == x.device(), name, " must be on the device of x");
  return t->const_data_ptr<T>();
}

// The geometry that serves all of the tensors: flat if each is contiguous, else by channels.
inline Geometry geometry_of(const torch::stable::Tensor& x, bool all_contiguous) {
  STD_TORCH_CHECK(x.dim() >= 1, "expected at least one axis, the samples");
  return all_contiguous ? flat_geometry(x.sizes().data(), x.dim())
                        : planar_geometry(x.sizes().data(), x.dim());
}

struct LangevinBatch {
  Geometry geometry;
  Operand x, score;
  std::optional<Operand> noise;
};

inline LangevinBatch langevin_batch(const torch::stable::Tensor& x,
                                    const torch::stable::Tensor& score,
                                    const std::optional<torch::stable::Tensor>& noise) {
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float,
                  "x must be float32, got ", torch::headeronly::toString(x.scalar_type()));
  check_like(score, x, "score");
  if (noise) check_like(*noise, x, "noise");
  const Geometry geometry = geometry_of(
      x, is_contiguous(x) && is_contiguous(score) && (!noise || is_contiguous(*noise)));
  LangevinBatch batch = {geometry, operand(x, geometry, "x"), operand(score, geometry, "score"),
                         std::nullopt};
  if (noise) batch.noise = operand(*noise, geometry, "noise");
  return batch;
}

// Of solver_step_.
struct SolverBatch {
  Geometry geometry;
  Operand x, score;
  std::optional<Operand> previous;  // in the layout of x
  const float* table;
  int64_t rows;
};

inline SolverBatch solver_batch(const torch::stable::Tensor& x, const torch::stable::Tensor& score,
                                const std::optional<torch::stable::Tensor>& previous,
                                const torch::stable::Tensor& table) {
  using torch::headeronly::ScalarType;
  const LangevinBatch batch = langevin_batch(x, score, std::nullopt);
  STD_TORCH_CHECK(table.scalar_type() == ScalarType::Float && table.dim() == 2 &&
                      table.size(0) >= 1 && table.size(1) == 5 && is_contiguous(table),
                  "table must be float32, (K, 5) and contiguous");
  STD_TORCH_CHECK(table.device() == x.device(), "table must be on the device of x");
  SolverBatch result = {batch.geometry, batch.x, batch.score, std::nullopt,
                        table.const_data_ptr<float>(), table.size(0)};
  if (previous) {
    check_like(*previous, x, "previous");
    STD_TORCH_CHECK(previous->scalar_type() == ScalarType::Float, "previous must be float32");
    for (int64_t i = 0; i < x.dim(); ++i) {
      STD_TORCH_CHECK(x.size(i) == 1 || x.stride(i) == previous->stride(i),
                      "previous must have the strides of x");
    }
    result.previous = Operand{previous->data_ptr(), ScalarType::Float, batch.x.strides};
  }
  return result;
}

}  // namespace ncsn
