// An open file whose ranges are read with pread or io_uring: no mmap, so that a file cut short
// under us is an error and never a SIGBUS. With O_DIRECT the page cache is passed by: the hot set
// is the cache, and a table that is larger than RAM does not push everything else out of it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "runtime/pread_queue.hpp"
#include "runtime/read_queue.hpp"

namespace l3ext {

enum class DirectIo { kAuto, kOn, kOff };  // kAuto: where the file system allows it

class FileReader {
 public:
  static constexpr int64_t kAlignment = 4096;  // what O_DIRECT asks of every device we know

  // Throws kIo for the file, kRuntime where io_uring is asked for and not to be had.
  FileReader(std::string path, DirectIo direct_io, IoEngine engine);
  ~FileReader();
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  const std::string& path() const { return path_; }
  int fd() const { return fd_; }
  int64_t size() const { return size_; }  // when it was opened
  int64_t size_now() const;               // 0 where nobody can tell
  bool direct() const { return direct_; }
  bool uring() const { return uring_.load(); }  // how the queues reach the system

  // Reads bytes [begin, begin + bytes) into `scratch`, which is aligned to kAlignment and at least
  // bytes + 2 * kAlignment long (without O_DIRECT: any, `bytes` long); returns where the first one
  // lies. Thread-safe; throws kIo.
  const std::byte* read(int64_t begin, int64_t bytes, std::byte* scratch) const;

  // For many RangeReads at once; the file outlives it. Thread-safe; throws kRuntime.
  std::unique_ptr<ReadQueue> make_queue(int depth) const;

 private:
  void open();
  void try_direct(DirectIo direct_io);
  bool can_read() const;

  std::string path_;
  int fd_ = -1;
  int64_t size_ = 0;
  bool direct_ = false;
  bool uring_required_ = false;
  mutable std::atomic<bool> uring_{false};
  std::unique_ptr<PreadThreads> threads_;
};

// A range of a file on its way to memory: what to ask the system for next, and what to make of its
// answer. O_DIRECT's alignment, short reads and errors are the same whoever asks.
class RangeRead {
 public:
  RangeRead() = default;
  // As FileReader::read().
  RangeRead(const FileReader& file, int64_t begin, int64_t bytes, std::byte* scratch);

  RawRead next(int64_t tag) const;
  // Takes the answer: bytes read, or minus errno. Returns whether the range is all there; throws
  // kIo.
  bool advance(int64_t result);
  const std::byte* data() const { return scratch_ + (begin_ - first_); }

 private:
  const FileReader* file_ = nullptr;
  int64_t begin_ = 0;  // what was asked for
  int64_t bytes_ = 0;
  std::byte* scratch_ = nullptr;
  int64_t first_ = 0;  // where reading starts: in O_DIRECT with the page of the first byte
  int64_t length_ = 0;
  int64_t done_ = 0;  // from `first_`, in O_DIRECT whole blocks
};

}  // namespace l3ext
