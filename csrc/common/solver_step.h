// One step of a solver of the reverse process for one element, shared by the CPU and the CUDA backend.
//
//     x <- a x + b score + e previous + c z,   previous <- x + d score   (of the x before)
//
// With a row (a, b, c, d, e) for each noise level this is Euler's method, ancestral sampling, a Langevin step, and the
// multistep solvers of Lu et al., "DPM-Solver++", 2022, whose `previous` is the last expected clean sample. In float32.

#pragma once

#include <cstdint>

#include "common/philox.h"

namespace ncsn {

constexpr int64_t kSolverColumns = 5;

struct SolverRow {
  float a, b, c, d, e;
};

NCSN_HD SolverRow solver_row(const float* table, int64_t rows, int64_t level) {
  // A level on the device cannot be checked before: the memory of the table is all that is read.
  const int64_t row = level < 0 ? 0 : (level < rows ? level : rows - 1);
  const float* at = table + kSolverColumns * row;
  return {at[0], at[1], at[2], at[3], at[4]};
}

NCSN_HD float solver_update(const SolverRow& row, float x, float score, float z) {
  return row.a * x + row.b * score + row.c * z;
}

NCSN_HD float multistep_update(const SolverRow& row, float x, float score, float previous, float z) {
  return row.a * x + row.b * score + row.e * previous + row.c * z;
}

NCSN_HD float solver_memory(const SolverRow& row, float x, float score) {
  return x + row.d * score;
}

}  // namespace ncsn
