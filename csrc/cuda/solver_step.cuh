// One thread of solver_step_, as a function that also runs on the host (the tests walk it there).

#pragma once

#include "common/solver_step.h"
#include "cuda/grid.h"

namespace ncsn {

struct SolverArgs {
  Geometry geometry;
  float* x;
  const void* score;  // of the type that the kernel is compiled for
  float* previous;    // in the layout of x; null: there is none
  Strides x_strides, score_strides;
  const float* table;  // rows of five, on the device
  int64_t rows, level;
  const int64_t* level_ptr;  // on the device; replaces level if not null
  const int64_t* step_ptr;   // likewise
  PhiloxKey key;
  uint32_t sample_offset, step;
  bool noisy;
};

template <Access access, typename Score>
NCSN_HD void solver_step_thread(const SolverArgs& args, const ThreadWork& work) {
  if (work.item >= args.geometry.groups()) return;
  const Group group = group_of<access>(args.geometry, work.item);
  const SolverRow row = solver_row(args.table, args.rows,
                                   args.level_ptr != nullptr ? *args.level_ptr : args.level);
  const uint32_t step =
      args.step_ptr != nullptr ? static_cast<uint32_t>(*args.step_ptr) : args.step;
  for (int64_t n = work.sample; n < args.geometry.samples; n += work.sample_stride) {
    const Quad x = load_group<access>(args.x, args.x_strides, n, group);
    const Quad s =
        load_group<access>(static_cast<const Score*>(args.score), args.score_strides, n, group);
    Quad z = {0.0f, 0.0f, 0.0f, 0.0f};
    if (args.noisy) {
      z = normal4(philox4x32_10({static_cast<uint32_t>(group.index),
                                 args.sample_offset + static_cast<uint32_t>(n), step,
                                 kStreamLangevin},
                                args.key));
    }
    if (args.previous == nullptr) {
      store_group<access>(args.x, args.x_strides, n, group,
                          Packed<float>{{solver_update(row, x.v0, s.v0, z.v0),
                                         solver_update(row, x.v1, s.v1, z.v1),
                                         solver_update(row, x.v2, s.v2, z.v2),
                                         solver_update(row, x.v3, s.v3, z.v3)}});
      continue;
    }
    const Quad p = load_group<access>(args.previous, args.x_strides, n, group);
    store_group<access>(args.x, args.x_strides, n, group,
                        Packed<float>{{multistep_update(row, x.v0, s.v0, p.v0, z.v0),
                                       multistep_update(row, x.v1, s.v1, p.v1, z.v1),
                                       multistep_update(row, x.v2, s.v2, p.v2, z.v2),
                                       multistep_update(row, x.v3, s.v3, p.v3, z.v3)}});
    store_group<access>(
        args.previous, args.x_strides, n, group,
        Packed<float>{{solver_memory(row, x.v0, s.v0), solver_memory(row, x.v1, s.v1),
                       solver_memory(row, x.v2, s.v2), solver_memory(row, x.v3, s.v3)}});
  }
}

template <typename Score>
Access solver_access(const SolverArgs& args) {
  const Geometry& g = args.geometry;
  const bool packable = is_packable(args.x) && is_packable(static_cast<const Score*>(args.score)) &&
                        is_packable(args.previous);
  // One channel: every tensor is flat.
  if (g.channels == 1 && g.spatial % 4 == 0 && packable) return Access::kVector;
  if (args.x_strides.spatial != 1 && g.spatial % 4 == 0) return Access::kChannelMinor;
  return Access::kGeneric;
}

}  // namespace ncsn
