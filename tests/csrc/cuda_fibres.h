// Runs the body of a CUDA kernel on the CPU: each thread of a block, or of a cluster of blocks, is a fibre.
//
// A fibre runs until it must wait for others: at a barrier, or in a shuffle. The order in which fibres get their turns is
// the caller's choice; the result must not depend on it. Shared memory notices two threads that touch one number without
// a barrier between them, one of them writing; a number outside of the block's shared memory; and threads that wait for
// a barrier others never reach.

#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cuda/block.cuh"

namespace fibres {

inline std::string problem;  // the first one found, of any launch

inline void report(const std::string& what) {
  if (problem.empty()) problem = what;
}

struct Meeting {  // a barrier of some fibres
  int size = 0, arrived = 0;
  uint64_t rounds = 0;
};

struct Fibre {
  ucontext_t start;
  jmp_buf state;
  bool started = false, done = false;
  Meeting* waits_for = nullptr;
  uint64_t since = 0;
  int epoch = 0, cluster_epoch = 0, shuffles = 0, block = 0;
  unsigned index = 0;
};

inline Fibre* running = nullptr;
inline jmp_buf scheduler;

// Tells the first cells of a block that are read or written in one interval between barriers by different threads.
template <typename A>
class Cell {
 public:
  void operator=(A value) {
    touch();
    if (writer_epoch_ == running->epoch && writer_ != running->index) report("two writes race");
    if (reader_epoch_ == running->epoch && reader_ != static_cast<int64_t>(running->index)) {
      report("a write races with a read");
    }
    if (remote_epoch_ == running->cluster_epoch) report("a write races with another block's read");
    writer_epoch_ = running->epoch;
    writer_cluster_epoch_ = running->cluster_epoch;
    writer_ = running->index;
    value_ = value;
  }

  operator A() const {
    touch();
    if (writer_epoch_ == running->epoch && writer_ != running->index) report("a read races with a write");
    const bool first = reader_epoch_ != running->epoch;
    reader_ = first || reader_ == static_cast<int64_t>(running->index) ? running->index : -1;
    reader_epoch_ = running->epoch;
    return value_;
  }

  void operator=(const Cell& other) { *this = static_cast<A>(other); }

  A remote() const {
    touch();
    if (writer_cluster_epoch_ == running->cluster_epoch) report("another block's read races with a write");
    remote_epoch_ = running->cluster_epoch;
    return value_;
  }

  void forbid() { forbidden_ = true; }

 private:
  void touch() const {
    if (forbidden_) report("outside of shared memory");
  }

  A value_ = std::numeric_limits<A>::quiet_NaN();
  bool forbidden_ = false;
  int writer_epoch_ = -1, writer_cluster_epoch_ = -1;
  unsigned writer_ = 0;
  mutable int reader_epoch_ = -1, remote_epoch_ = -1;
  mutable int64_t reader_ = -1;
};

struct Launch {
  unsigned blocks_x, blocks_y, size_x, size_y;
  int64_t shared = 0;
  unsigned cluster = 1;
};

struct Warp {
  Meeting meeting;
  double values[2][ncsn::kWarp];
};

struct Block {
  static constexpr int kGuard = 1024;

  Block(const Launch& launch, unsigned threads)
      : shared(launch.shared), memory(static_cast<size_t>(launch.shared) / 16 + 1) {
    std::memset(memory.data(), 0xFF, memory.size() * 16);  // NaN of every type
    meeting.size = static_cast<int>(threads);
    warps.resize((threads + ncsn::kWarp - 1) / ncsn::kWarp);
    for (size_t w = 0; w < warps.size(); ++w) {
      const auto rest = threads - static_cast<unsigned>(w) * ncsn::kWarp;
      warps[w].meeting.size = static_cast<int>(std::min(rest, ncsn::kWarp));
    }
  }

  template <typename A>
  Cell<A>* cells(unsigned byte) {
    auto& held = [this]() -> std::vector<Cell<A>>& {
      if constexpr (sizeof(A) == 8) return doubles;
      else return floats;
    }();
    if (held.empty()) {
      const auto size = (static_cast<size_t>(shared) - byte) / sizeof(A);
      held.resize(size + kGuard);
      for (size_t i = size; i < held.size(); ++i) held[i].forbid();
    }
    return held.data();
  }

  struct alignas(16) Sixteen {
    char bytes[16];
  };

  int64_t shared;
  std::vector<Sixteen> memory;
  std::vector<Cell<float>> floats;
  std::vector<Cell<double>> doubles;
  std::vector<Warp> warps;
  Meeting meeting;
};

inline void wait(Meeting& meeting) {
  if (++meeting.arrived == meeting.size) {
    meeting.arrived = 0;
    ++meeting.rounds;
    return;
  }
  running->waits_for = &meeting;
  running->since = meeting.rounds;
  if (_setjmp(running->state) == 0) _longjmp(scheduler, 1);
}

// What a kernel's body sees of its thread: the interface of ncsn::DeviceThread.
struct Thread {
  template <typename A>
  using Cell = fibres::Cell<A>;

  unsigned x, y, size_x, size_y, block_x, block_y, blocks_y;
  Block* block;
  std::vector<std::unique_ptr<Block>>* cluster;
  Meeting* cluster_meeting;

  unsigned index() const { return y * size_x + x; }
  unsigned threads() const { return size_x * size_y; }

  template <typename A>
  Cell<A>* cells(unsigned byte) const {
    return block->cells<A>(byte);
  }
  template <typename V>
  V* own() const {
    return reinterpret_cast<V*>(block->memory.data());
  }

  void sync() const {
    wait(block->meeting);
    ++running->epoch;
  }

  template <typename A>
  A shuffle_xor(A value, unsigned bits) const {
    Warp& warp = block->warps[index() / ncsn::kWarp];
    if (warp.meeting.size != static_cast<int>(ncsn::kWarp)) report("a shuffle in part of a warp");
    double* values = warp.values[running->shuffles++ % 2];
    values[index() % ncsn::kWarp] = static_cast<double>(value);
    wait(warp.meeting);
    return static_cast<A>(values[index() % ncsn::kWarp ^ bits]);
  }

  void sync_cluster() const {
    wait(*cluster_meeting);
    ++running->epoch;
    ++running->cluster_epoch;
  }

  float remote(const Cell<float>* cell, unsigned rank) const {
    const auto at = cell - block->floats.data();
    return (*cluster)[rank]->floats[static_cast<size_t>(at)].remote();
  }
};

template <typename Body>
struct Start {
  static inline const Body* body;
  static inline Thread thread;  // of the fibre that starts

  static void enter() {
    const Thread mine = thread;
    (*body)(mine);
    running->done = true;
    _longjmp(scheduler, 1);
  }
};

// Order of turns: 0 as numbered, 1 backwards, else shuffled anew in every round.
template <typename Body>
void run(const Launch& launch, int order, const Body& body) {
  constexpr size_t kStack = 48 * 1024;
  static std::vector<std::unique_ptr<char[]>> stacks;
  const unsigned threads = launch.size_x * launch.size_y, all = threads * launch.cluster;
  while (stacks.size() < all) stacks.emplace_back(new char[kStack]);
  std::mt19937 random(static_cast<unsigned>(order));
  std::vector<unsigned> turns(all);
  std::iota(turns.begin(), turns.end(), 0u);
  if (order == 1) std::reverse(turns.begin(), turns.end());
  if (launch.blocks_x % launch.cluster != 0) return report("blocks are no multiple of the cluster");

  for (unsigned by = 0; by < launch.blocks_y; ++by) {
    for (unsigned bx = 0; bx < launch.blocks_x; bx += launch.cluster) {
      std::vector<std::unique_ptr<Block>> blocks;
      for (unsigned b = 0; b < launch.cluster; ++b) blocks.emplace_back(new Block(launch, threads));
      Meeting cluster_meeting;
      cluster_meeting.size = static_cast<int>(all);
      std::vector<Fibre> fibres(all);
      unsigned left = all;
      while (left > 0) {
        bool progress = false;
        if (order > 1) std::shuffle(turns.begin(), turns.end(), random);
        for (unsigned turn : turns) {
          Fibre& fibre = fibres[turn];
          if (fibre.done || (fibre.waits_for && fibre.waits_for->rounds == fibre.since)) continue;
          fibre.waits_for = nullptr;
          progress = true;
          running = &fibre;
          if (_setjmp(scheduler) == 0) {
            if (fibre.started) _longjmp(fibre.state, 1);
            fibre.started = true;
            fibre.block = static_cast<int>(turn / threads);
            fibre.index = turn % threads;
            Start<Body>::body = &body;
            Start<Body>::thread = {fibre.index % launch.size_x,
                                   fibre.index / launch.size_x,
                                   launch.size_x,
                                   launch.size_y,
                                   bx + turn / threads,
                                   by,
                                   launch.blocks_y,
                                   blocks[turn / threads].get(),
                                   &blocks,
                                   &cluster_meeting};
            getcontext(&fibre.start);
            fibre.start.uc_stack.ss_sp = stacks[turn].get();
            fibre.start.uc_stack.ss_size = kStack;
            fibre.start.uc_link = nullptr;
            makecontext(&fibre.start, &Start<Body>::enter, 0);
            setcontext(&fibre.start);
          }
          if (fibre.done) --left;
        }
        if (!progress) return report("threads wait at a barrier that others never reach");
      }
    }
  }
}

}  // namespace fibres
