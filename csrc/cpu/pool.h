// Threads that take the ranges of a loop in turn, for machines on which other work runs too. Nothing here knows torch.
//
// At the end of an OpenMP loop every thread waits for every other, also for one that the system has not let run at all,
// and meanwhile spins. Here whichever thread runs takes the next range, the caller among them, and the caller waits for
// ranges that were taken alone: a thread that took nothing holds nothing up. Waiting is a short spin, then sleep.
//
// The state of a loop is one word, the ticket: a number of the loop, how many ranges it has and the next one. A thread
// takes a range by counting that up, if the word is still what it was when it read what to run. So a thread that wakes
// late finds either work or another word, and touches nothing of a loop that has ended.

#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#include <signal.h>
#endif

namespace ncsn {

class Pool {
 public:
  Pool() = default;
  ~Pool() = delete;  // its threads use it until the process ends

  // Runs the items begin .. end - 1 of a loop.
  using Body = void (*)(const void* context, int64_t begin, int64_t end);

  static constexpr int64_t kRangesPerThread = 4;  // what is left to others if one thread does not run

  // body(context, begin, end) for ranges of at least `grain` items that make up 0 .. n - 1, by up to `threads` threads.
  // An exception of a body is thrown here, when all ranges that were taken have ended. From several threads at once the
  // first has the workers; within a body there are none.
  void run(int64_t n, int64_t grain, int64_t threads, Body body, const void* context) {
    if (n <= 0) return;
    const int64_t most = std::min<int64_t>(threads * kRangesPerThread, kMostRanges);
    const int64_t ranges = std::min((n + grain - 1) / std::max<int64_t>(grain, 1), most);
    if (threads <= 1 || ranges <= 1 || inside()) return body(context, 0, n);
    const std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock()) return body(context, 0, n);
    add_workers(threads - 1);
    body_.store(body, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    items_.store(n, std::memory_order_relaxed);
    helpers_.store(threads - 1, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    ++loop_;
    ticket_.store(Ticket{loop_, static_cast<uint64_t>(ranges), 0}.word());
    wake();
    inside() = true;
    work();
    inside() = false;
    await(ranges);
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  int64_t workers() const { return workers_; }

 private:
  static constexpr int64_t kMostRanges = 0xffff;
  using Clock = std::chrono::steady_clock;
  static constexpr std::chrono::microseconds kSpin{50};  // of the order of what a thread costs to wake

  struct Ticket {
    uint64_t loop, ranges, next;  // 32, 16 and 16 bits

    explicit Ticket(uint64_t word)
        : loop(word >> 32), ranges(word >> 16 & 0xffff), next(word & 0xffff) {}
    Ticket(uint64_t loop, uint64_t ranges, uint64_t next) : loop(loop), ranges(ranges), next(next) {}
    uint64_t word() const { return loop << 32 | ranges << 16 | next; }
    bool open() const { return next < ranges; }
  };

  // Whether this thread is at work in a pool.
  static bool& inside() {
    thread_local bool is = false;
    return is;
  }

  // Takes ranges until there are none.
  void work() {
    uint64_t word = ticket_.load();
    while (Ticket(word).open()) {
      const Body body = body_.load(std::memory_order_relaxed);
      const void* const context = context_.load(std::memory_order_relaxed);
      const int64_t n = items_.load(std::memory_order_relaxed);
      // Else what was read may be another loop's.
      if (!ticket_.compare_exchange_weak(word, word + 1)) continue;
      const auto i = static_cast<int64_t>(Ticket(word).next);
      const auto ranges = static_cast<int64_t>(Ticket(word).ranges);
      try {
        body(context, n * i / ranges, n * (i + 1) / ranges);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex_);
        if (!error_) error_ = std::current_exception();
      }
      if (done_.fetch_add(1) + 1 == ranges && caller_sleeps_.load()) {
        const std::lock_guard<std::mutex> lock(mutex_);
        ended_.notify_one();
      }
      word = ticket_.load();
    }
  }

  void await(int64_t ranges) {
    const auto ended = [&] { return done_.load() == ranges; };
    if (spin(ended)) return;
    std::unique_lock<std::mutex> lock(mutex_);
    caller_sleeps_.store(true);
    ended_.wait(lock, ended);
    caller_sleeps_.store(false);
  }

  void wake() {
    if (sleeping_.load() == 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    begun_.notify_all();
  }

  // The life of the worker of a number.
  void serve(int64_t number) {
    inside() = true;
    const auto wanted = [&] {
      return Ticket(ticket_.load()).open() && number < helpers_.load(std::memory_order_relaxed);
    };
    for (;;) {
      if (!spin(wanted)) {
        std::unique_lock<std::mutex> lock(mutex_);
        sleeping_.fetch_add(1);
        begun_.wait(lock, wanted);
        sleeping_.fetch_sub(1);
      }
      work();
    }
  }

  template <typename Condition>
  static bool spin(const Condition& condition) {
    const Clock::time_point end = Clock::now() + kSpin;
    do {
      for (int i = 0; i < 16; ++i) {
        if (condition()) return true;
        pause();
      }
    } while (Clock::now() < end);
    return false;
  }

  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
  }

  // They live as long as the process, and leave its signals to others.
  void add_workers(int64_t count) {
    if (workers_ >= count) return;
#if defined(__unix__) || defined(__APPLE__)
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
#endif
    for (; workers_ < count; ++workers_) {
      std::thread([this, number = workers_] { serve(number); }).detach();
    }
#if defined(__unix__) || defined(__APPLE__)
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
#endif
  }

  std::mutex owner_;  // held by the thread whose loop it is
  int64_t workers_ = 0;
  uint64_t loop_ = 0;

  std::atomic<uint64_t> ticket_{0};
  std::atomic<Body> body_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<int64_t> items_{0}, helpers_{0}, done_{0}, sleeping_{0};
  std::atomic<bool> caller_sleeps_{false};

  std::mutex mutex_;  // of what follows
  std::condition_variable begun_, ended_;
  std::exception_ptr error_;
};

}  // namespace ncsn
