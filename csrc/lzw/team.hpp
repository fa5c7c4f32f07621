// Threads for the length of one call, which do one job after the other together. Not OpenMP's: what
// runs ahead of the parse is no loop, and ThreadSanitizer sees these wait for each other.
#pragma once

#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace l3ext::lzw {

class Team {
 public:
  using Job = std::function<void(size_t thread)>;

  // So many threads, the caller's included; fewer where the system gives no more.
  explicit Team(int num_threads);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  size_t size() const { return threads_.size() + 1; }
  // Calls job(t) for t in [1, size()), each on a thread of its own, and returns at once. The job
  // must not throw, and must live until wait() is back; one job at a time.
  void start(const Job& job);
  // Until every thread is done with the job; at once where there is none.
  void wait();
  // job(t) for t in [0, size()), 0 on this thread; back when all are done.
  void run(const Job& job) {
    start(job);
    job(0);
    wait();
  }

 private:
  void work(size_t thread);

  std::mutex mutex_;
  std::condition_variable begin_;
  std::condition_variable end_;
  const Job* job_ = nullptr;  // none: the threads end
  uint64_t jobs_ = 0;         // started so far
  size_t working_ = 0;        // threads that are not done with the last of them
  std::vector<std::thread> threads_;
};

}  // namespace l3ext::lzw
