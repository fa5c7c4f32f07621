// Data-parallel loops over OpenMP: inside Python that is torch's own pool, not a second one.
#pragma once

#include <pthread.h>

#include <atomic>
#include <cstdint>
#include <exception>

namespace l3ext {

// Whether this process is a child of fork() and the one it comes from has entered OpenMP, which the
// first call stands for: the pool's threads are missing then, and GCC's pool would wait for them
// without end. Of who enters it past us, as torch does, we do not know.
inline bool openmp_is_lost() {
  static std::atomic<bool> lost = false;
  [[maybe_unused]] static const int registered =
      ::pthread_atfork(nullptr, nullptr, [] { lost.store(true); });
  return lost.load(std::memory_order_relaxed);
}

// Calls f(i) once for every i in [0, count), on up to num_threads threads, in no order. The first
// exception is rethrown here; tasks not yet begun are dropped.
template <typename F>
void parallel_for(int num_threads, int64_t count, const F& f) {
  // One thread must not enter OpenMP: a forked child may have lost its pool.
  if (num_threads <= 1 || count <= 1 || openmp_is_lost()) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  std::exception_ptr error;
  std::atomic<bool> failed = false;
  const int threads = static_cast<int>(count < num_threads ? count : num_threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) {
    if (failed.load(std::memory_order_relaxed)) continue;
    try {
      f(i);
    } catch (...) {
      if (!failed.exchange(true)) error = std::current_exception();
    }
  }
  if (failed) std::rethrow_exception(error);
}

// Calls f(i, next) once for every i in [0, count), each thread in ascending order; `next` is the
// task that the same thread does after it, or -1: time to ask for its memory.
template <typename F>
void parallel_for_ahead(int num_threads, int64_t count, const F& f) {
  std::atomic<int64_t> unclaimed = 0;
  const auto claim = [&] {
    const int64_t i = unclaimed.fetch_add(1, std::memory_order_relaxed);
    return i < count ? i : -1;
  };
  parallel_for(num_threads, num_threads, [&](int64_t) {
    for (int64_t i = claim(); i >= 0;) {
      const int64_t next = claim();
      f(i, next);
      i = next;
    }
  });
}

}  // namespace l3ext
