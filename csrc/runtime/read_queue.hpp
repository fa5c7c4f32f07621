// Reads of one open file, handed to the system many at once and raw: what comes back is what the
// system said of each. A disk reaches its bandwidth only with several of them on their way.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace l3ext {

enum class IoEngine { kAuto, kUring, kPread };  // kAuto: io_uring where the kernel allows it

struct RawRead {
  std::byte* to = nullptr;
  size_t bytes = 0;    // at most 2^30
  int64_t offset = 0;  // in the file
  int64_t tag = 0;     // comes back with the result
};

struct RawResult {
  int64_t tag = 0;
  int64_t result = 0;  // bytes read, which may be fewer than asked for, or minus errno
};

// For one thread. In a child of fork() it may be destroyed and nothing else.
class ReadQueue {
 public:
  virtual ~ReadQueue() = default;  // waits for what is on its way: the system writes to its memory
  // Starts a read. At most `depth` of them, which was given to the queue's maker, are on their way
  // at once.
  virtual void push(const RawRead& read) = 0;
  // Blocks until one is complete, and takes it. There is at least one.
  virtual RawResult pop() = 0;
};

// Why this process has no io_uring, asked of the kernel once; empty: it has.
const std::string& why_no_uring();

// `fd` outlives the queue. Throws kRuntime where the system does not give what a queue needs.
std::unique_ptr<ReadQueue> make_uring_queue(int fd, int depth);

}  // namespace l3ext
