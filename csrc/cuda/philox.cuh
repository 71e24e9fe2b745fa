// One thread of philox_, as a function that also runs on the host (the tests walk it there).

#pragma once

#include "common/philox.h"
#include "cuda/grid.h"

namespace ncsn {

// What is written: the words themselves, or uniforms or normals made of them (the operator's `kind`).
enum class Kind : int { kWords = 0, kUniform = 1, kNormal = 2 };

struct PhiloxArgs {
  Geometry geometry;
  uint32_t* out;  // int32 words, or the bits of float32 values
  Strides strides;
  PhiloxKey key;
  uint32_t sample_offset, step, stream;
  Kind kind;
};

NCSN_HD Packed<uint32_t> bits_of(const Quad& q) {
  return {{detail::float_bits(q.v0), detail::float_bits(q.v1), detail::float_bits(q.v2),
           detail::float_bits(q.v3)}};
}

template <Access access>
NCSN_HD void philox_thread(const PhiloxArgs& args, const ThreadWork& work) {
  if (work.item >= args.geometry.groups()) return;
  const Group group = group_of<access>(args.geometry, work.item);
  for (int64_t n = work.sample; n < args.geometry.samples; n += work.sample_stride) {
    const PhiloxWords words =
        philox4x32_10({static_cast<uint32_t>(group.index),
                       args.sample_offset + static_cast<uint32_t>(n), args.step, args.stream},
                      args.key);
    Packed<uint32_t> values = {{words.w0, words.w1, words.w2, words.w3}};
    if (args.kind == Kind::kUniform) values = bits_of(uniform4(words));
    if (args.kind == Kind::kNormal) values = bits_of(normal4(words));
    store_group<access>(args.out, args.strides, n, group, values);
  }
}

inline Access philox_access(const PhiloxArgs& args) {
  const Geometry& g = args.geometry;
  if (g.channels == 1 && args.strides.spatial == 1 && g.spatial % 4 == 0 && is_packable(args.out)) {
    return Access::kVector;
  }
  if (args.strides.spatial != 1 && g.spatial % 4 == 0) return Access::kChannelMinor;
  return Access::kGeneric;
}

}  // namespace ncsn
