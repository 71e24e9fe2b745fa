// What the threads of a block share, behind an interface that a host program can stand in for: barriers, shuffles, shared
// memory, and the shared memory of the other blocks of a cluster.
//
// A kernel's body is a template over the thread it runs in. On a GPU that is DeviceThread; in the tests it is a fibre
// that stops at every barrier, whose shared memory notices two threads that meet without a barrier between them.

#pragma once

#include <cstdint>
#include <cstring>

#include "common/philox.h"  // NCSN_HD

namespace ncsn {

constexpr unsigned kWarp = 32;

// W elements in one access.
template <typename T, int W>
struct alignas(W * sizeof(T)) Vec {
  T v[W];
};

// Elements of T in 16 bytes, the widest access there is.
template <typename T>
constexpr int kWide = static_cast<int>(16 / sizeof(T));

struct DeviceThread {
  // A number in shared memory that one thread writes and another reads.
  template <typename A>
  using Cell = A;

  unsigned x, y, size_x, size_y;         // the thread in its block
  unsigned block_x, block_y, blocks_y;   // the block in its grid
  char* memory;                          // the block's shared memory, 16-byte aligned

  NCSN_HD unsigned index() const { return y * size_x + x; }
  NCSN_HD unsigned threads() const { return size_x * size_y; }

  // The part of the shared memory that begins at a byte: cells, or what a thread keeps for itself.
  template <typename A>
  NCSN_HD A* cells(unsigned byte) const {
    return reinterpret_cast<A*>(memory + byte);
  }
  template <typename V>
  NCSN_HD V* own() const {
    return reinterpret_cast<V*>(memory);
  }

  NCSN_HD void sync() const {
#if defined(__CUDA_ARCH__)
    __syncthreads();
#endif
  }

  // The value of the lane whose number differs in these bits; every thread of the warp calls it.
  template <typename A>
  NCSN_HD A shuffle_xor(A value, unsigned bits) const {
#if defined(__CUDA_ARCH__)
    return __shfl_xor_sync(0xFFFFFFFFu, value, bits);
#else
    return value;
#endif
  }

  // A barrier for all threads of the cluster's blocks; what they wrote before, all see after it.
  NCSN_HD void sync_cluster() const {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
#elif defined(__CUDA_ARCH__)
    __trap();  // launched on nothing older
#endif
  }

  // The cell at the same place in another block of the cluster.
  NCSN_HD float remote(const float* cell, unsigned rank) const {
    float value = 0;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    const auto local = static_cast<uint32_t>(__cvta_generic_to_shared(cell));
    uint32_t there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(local), "r"(rank));
    asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(value) : "r"(there) : "memory");
#endif
    return value;
  }
};

// Memory access is spelled as integers of the vector's size, and a store of 16 bytes as what the hardware calls it: else
// the compiler takes vectors apart here and there.
template <int bytes>
struct Word;
template <>
struct Word<1> {
  using type = uint8_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint64_t;
};
#if defined(__CUDACC__)
template <>
struct Word<16> {
  using type = uint4;
};
#else
template <>
struct Word<16> {
  struct type {
    uint64_t words[2];
  };
};
#endif

template <typename T, int W>
NCSN_HD Vec<T, W> load(const T* from) {
  const auto word = *reinterpret_cast<const typename Word<sizeof(Vec<T, W>)>::type*>(from);
  Vec<T, W> value;
  memcpy(&value, &word, sizeof value);
  return value;
}

// A vector of 16 bytes goes to global memory; copy_in is for the shared one.
template <typename T, int W>
NCSN_HD void store(T* to, const Vec<T, W>& value) {
  typename Word<sizeof(Vec<T, W>)>::type word;
  memcpy(&word, &value, sizeof word);
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof word == 16) {
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
                 "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
                 : "memory");
    return;
  }
#endif
  *reinterpret_cast<decltype(word)*>(to) = word;
}

// One vector into shared memory that only this thread uses.
template <typename T, int W>
NCSN_HD void store_own(Vec<T, W>* to, const Vec<T, W>& value) {
  using Bits = typename Word<sizeof(Vec<T, W>)>::type;
  Bits bits;
  memcpy(&bits, &value, sizeof bits);
  *reinterpret_cast<Bits*>(to) = bits;
}

// Starts the copy of one vector from global memory to shared memory that only this thread uses.
template <typename T, int W>
NCSN_HD void copy_in(Vec<T, W>* to, const T* from) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Vec<T, W>) == 16) {
    const auto shared = static_cast<uint32_t>(__cvta_generic_to_shared(to));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(from) : "memory");
    return;
  }
#endif
  store(to->v, load<T, W>(from));
}

// Waits for the copies that this thread has started.
NCSN_HD void wait_for_copies() {
#if defined(__CUDA_ARCH__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

}  // namespace ncsn
