// From a dtype that is known at run time to a type that is known to the compiler, and the type of its arithmetic.

#pragma once

#include <torch/headeronly/core/ScalarType.h>

#include <type_traits>

namespace ncsn {

// float32 for the 16-bit types, else the type itself.
template <typename T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T>
struct Type {
  using type = T;
};

// Calls f with Type<T> of a floating dtype; false if it is none of the four.
template <typename F>
bool for_dtype(torch::headeronly::ScalarType dtype, const F& f) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float:
      f(Type<float>{});
      return true;
    case ScalarType::Double:
      f(Type<double>{});
      return true;
    case ScalarType::BFloat16:
      f(Type<torch::headeronly::BFloat16>{});
      return true;
    case ScalarType::Half:
      f(Type<torch::headeronly::Half>{});
      return true;
    default:
      return false;
  }
}

inline bool is_floating(torch::headeronly::ScalarType dtype) {
  return for_dtype(dtype, [](auto) {});
}

}  // namespace ncsn
