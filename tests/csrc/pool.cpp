// Runs csrc/cpu/pool.h, as a program of its own, under the checks of a sanitizer or none: pool CHECK.

#include "cpu/pool.h"

#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace {

using ncsn::Pool;

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "%s\n", what);
  std::exit(1);
}

template <typename F>
void run(Pool& pool, int64_t n, int64_t grain, int64_t threads, const F& f) {
  pool.run(
      n, grain, threads,
      [](const void* context, int64_t begin, int64_t end) {
        (*static_cast<const F*>(context))(begin, end);
      },
      &f);
}

// Plain numbers, not atomic ones: a sanitizer sees whether two threads ever have the same item, and whether the caller
// sees what the workers wrote.
void every_item_once(Pool& pool, int64_t n, int64_t grain, int64_t threads) {
  std::vector<int64_t> seen(static_cast<size_t>(n));
  run(pool, n, grain, threads, [&](int64_t begin, int64_t end) {
    require(0 <= begin && begin < end && end <= n, "a range outside of the loop");
    for (int64_t i = begin; i < end; ++i) ++seen[static_cast<size_t>(i)];
  });
  for (const int64_t times : seen) require(times == 1, "an item did not run once");
}

void items() {
  Pool& pool = *new Pool;
  for (int64_t round = 0; round < 2000; ++round) {
    every_item_once(pool, round % 97, 1 + round % 5, 1 + round % 6);
  }
  require(pool.workers() == 5, "workers");
}

// From several threads at once, and from within a body.
void callers() {
  Pool& pool = *new Pool;
  std::vector<std::thread> threads;
  for (int i = 0; i < 3; ++i) {
    threads.emplace_back([&] {
      for (int64_t round = 0; round < 1000; ++round) every_item_once(pool, 64, 1, 3);
    });
  }
  for (std::thread& thread : threads) thread.join();
  run(pool, 8, 1, 3, [&](int64_t, int64_t) { every_item_once(pool, 9, 1, 3); });
}

void errors() {
  Pool& pool = *new Pool;
  for (int64_t bad = 0; bad < 40; ++bad) {
    std::string caught;
    try {
      run(pool, 40, 1, 3, [&](int64_t begin, int64_t end) {
        if (begin <= bad && bad < end) throw std::runtime_error("item " + std::to_string(bad));
      });
    } catch (const std::runtime_error& error) {
      caught = error.what();
    }
    require(caught == "item " + std::to_string(bad), "the exception of a body");
    every_item_once(pool, 40, 1, 3);
  }
}

#if defined(__linux__)
// Its worker runs only when nothing else wants its core, where a thread of this program always does.
void starved() {
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(sched_getcpu(), &one);
  Pool& pool = *new Pool;
  std::atomic<bool> met{false};
  const std::thread::id caller = std::this_thread::get_id();
  while (!met) {
    run(pool, 8, 1, 2, [&](int64_t, int64_t) {
      if (std::this_thread::get_id() == caller) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));  // leaves some to the worker
        return;
      }
      sched_param none = {};
      require(pthread_setschedparam(pthread_self(), SCHED_IDLE, &none) == 0, "SCHED_IDLE");
      require(pthread_setaffinity_np(pthread_self(), sizeof one, &one) == 0, "affinity");
      met = true;
    });
  }
  std::atomic<bool> over{false};
  std::thread hog([&] {
    pthread_setaffinity_np(pthread_self(), sizeof one, &one);
    while (!over) {
    }
  });
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t round = 0; round < 2000; ++round) every_item_once(pool, 64, 1, 2);
  const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
  over = true;
  hog.join();
  std::printf("%.6f\n", took.count());
}
#endif

}  // namespace

int main(int, char** argv) {
  const std::string check = argv[1];
  if (check == "items") items();
  if (check == "callers") callers();
  if (check == "errors") errors();
#if defined(__linux__)
  if (check == "starved") starved();
#endif
  std::puts("ok");
  std::fflush(stdout);
  std::_Exit(0);  // as a process does whose pool is never freed
}
