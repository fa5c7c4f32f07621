// Many reads at once where there is no io_uring, as in most containers: threads that call pread.
#pragma once

#include <memory>
#include <mutex>

#include "core/home_process.hpp"
#include "runtime/read_queue.hpp"

namespace l3ext {

// The threads of one open file, as many as the deepest of its queues asks for: queues share them,
// of which a runtime has one for every worker and layer.
class PreadThreads {
 public:
  explicit PreadThreads(int fd);
  ~PreadThreads();
  PreadThreads(const PreadThreads&) = delete;
  PreadThreads& operator=(const PreadThreads&) = delete;

  // The threads outlive the queue. A queue of depth 1 needs none: pop() reads. Thread-safe; throws
  // kRuntime where threads are lacking, and in a child of fork().
  std::unique_ptr<ReadQueue> make_queue(int depth);

 private:
  struct Shared;
  class Queue;

  const int fd_;
  const HomeProcess home_;
  std::mutex growing_;
  std::unique_ptr<Shared> shared_;
};

}  // namespace l3ext
