// The choice between torch's threads and our own, and our own across a fork.

#include "cpu/threads.h"

#include <torch/csrc/stable/ops.h>

#include <cctype>
#include <cstdlib>
#include <string>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace ncsn {
namespace {

// Never freed: its threads use it until the process ends. A fork copies it without its threads, and its locks as they
// happen to be, so that the child begins with another.
std::atomic<Pool*> the_pool{nullptr};

Pool& pool() {
  static const bool made = [] {
    the_pool = new Pool;
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { the_pool = new Pool; });
#endif
    return true;
  }();
  static_cast<void>(made);
  return *the_pool.load();
}

}  // namespace

bool own_threads() {
  static const bool own = [] {
    const char* const policy = std::getenv("OMP_WAIT_POLICY");
    std::string lower = policy == nullptr ? "" : policy;
    for (char& c : lower) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
    return lower == "passive";
  }();
  return own;
}

void run_ranges(int64_t n, int64_t grain, Pool::Body body, const void* context) {
  if (own_threads()) {
    return pool().run(n, grain, torch::stable::get_num_threads(), body, context);
  }
  torch::stable::parallel_for(
      0, n, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace ncsn
