// Threads that run one function together and meet at barriers. They spin for a few microseconds, then sleep:
// where other processes want the cores, spinning would take the time that the late thread needs.
#pragma once

#include <atomic>
#include <cstdint>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <mutex>
#include <thread>
#include <unistd.h>
#include <vector>

namespace pb {

static inline void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#else
  std::atomic_signal_fence(std::memory_order_seq_cst);
#endif
}

constexpr int SPINS = 3000;

// A number that threads wait on until it is no longer what they saw.
class Gate {
 public:
  uint32_t value() const { return value_.load(std::memory_order_acquire); }

  void open() {
    value_.fetch_add(1, std::memory_order_seq_cst);
    if (num_asleep_.load(std::memory_order_seq_cst) > 0)
      syscall(SYS_futex, reinterpret_cast<uint32_t *>(&value_), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
  }

  void wait(uint32_t seen) {
    for (int i = 0; i < SPINS; i++) {
      if (value() != seen) return;
      pause_briefly();
    }
    num_asleep_.fetch_add(1, std::memory_order_seq_cst);
    while (value_.load(std::memory_order_seq_cst) == seen)
      syscall(SYS_futex, reinterpret_cast<uint32_t *>(&value_), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
    num_asleep_.fetch_sub(1, std::memory_order_seq_cst);
  }

 private:
  std::atomic<uint32_t> value_{0};
  std::atomic<int> num_asleep_{0};
};

constexpr int MAX_COUNTERS = 64;

class Pool {
 public:
  explicit Pool(int num_threads) : num_threads_(num_threads) {
    for (int i = 1; i < num_threads; i++) threads_.emplace_back([this, i] { work(i); });
  }

  ~Pool() {
    is_over_ = true;
    start_.open();
    for (auto &thread : threads_) thread.join();
  }

  int num_threads() const { return num_threads_; }

  // Runs function(argument, pool, thread) in every thread, the caller's included; returns when all are done.
  void run(void (*function)(void *, Pool &, int), void *argument) {
    std::lock_guard<std::mutex> alone(alone_);
    for (auto &counter : counters_) counter.next.store(0, std::memory_order_relaxed);
    function_ = function;
    argument_ = argument;
    start_.open();
    function(argument, *this, 0);
    barrier();
  }

  // All threads have arrived: what each wrote before is seen by all.
  void barrier() {
    if (num_threads_ == 1) return;
    uint32_t seen = meeting_.value();
    if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
      num_arrived_.store(0, std::memory_order_relaxed);
      meeting_.open();
    } else {
      meeting_.wait(seen);
    }
  }

  // Hands out [0, num_items) of phase `phase` in pieces, to whoever asks; a phase must end with a barrier.
  template <class Work> void share(uint32_t phase, long num_items, long piece, Work work) {
    auto &counter = counters_[phase % MAX_COUNTERS].next;
    for (;;) {
      long first = counter.fetch_add(piece, std::memory_order_relaxed);
      if (first >= num_items) break;
      long last = first + piece < num_items ? first + piece : num_items;
      work(first, last);
    }
  }

  // The counter of a phase that lies half a round behind is zeroed for its next turn.
  void recycle(uint32_t phase) {
    counters_[(phase + MAX_COUNTERS / 2) % MAX_COUNTERS].next.store(0, std::memory_order_relaxed);
  }

 private:
  struct alignas(64) Counter {
    std::atomic<long> next{0};
  };

  void work(int thread) {
    uint32_t seen = 0;
    for (;;) {
      start_.wait(seen);
      seen++;
      if (is_over_) return;
      function_(argument_, *this, thread);
      barrier();
    }
  }

  int num_threads_;
  std::vector<std::thread> threads_;
  Gate start_, meeting_;
  std::atomic<int> num_arrived_{0};
  std::atomic<bool> is_over_{false};
  std::mutex alone_;
  void (*function_)(void *, Pool &, int) = nullptr;
  void *argument_ = nullptr;
  Counter counters_[MAX_COUNTERS];
};

// One thread's view of a step: the same phases in the same order in every thread.
class Team {
 public:
  Team(Pool &pool, int thread) : pool_(pool), thread_(thread) {}
  int thread() const { return thread_; }
  int num_threads() const { return pool_.num_threads(); }

  // Work on [0, num_items), then meet.
  template <class Work> void each(long num_items, long piece, Work work) {
    if (thread_ == 0) pool_.recycle(phase_);
    pool_.share(phase_, num_items, piece, work);
    phase_++;
    pool_.barrier();
  }

 private:
  Pool &pool_;
  int thread_;
  uint32_t phase_ = 0;
};

}  // namespace pb
