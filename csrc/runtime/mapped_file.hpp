// A file mapped for reading: one copy of its bytes in the page cache, whatever the number of
// processes that map it, and nothing to clean up however they end.
//
// Writers must replace such a file by rename, as write_table_file() does: who maps the old one
// keeps it. A file that is cut short in place instead takes its pages away from everybody who maps
// it, and reading there is a SIGBUS. So the mapping is guarded, where the system has leases (a
// local file system, a file of this user or the capability CAP_LEASE, nobody who has it open for
// writing): the kernel then holds back whoever opens the file for writing or cuts it short, for 45
// s by /proc/sys/fs/lease-break-time, until a thread here has put a copy in memory of our own where
// the mapping was. Pointers into it stay valid and see the bytes as they were.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <thread>

#include "core/home_process.hpp"
#include "runtime/file_reader.hpp"

namespace l3ext {

struct MapOptions {
  bool guard = true;      // where it can be had
  bool populate = false;  // read the whole file and map all its pages now, not at first use
};

class MappedFile {
 public:
  // Throws kIo where the file cannot be mapped, kRuntime where a thread is lacking.
  MappedFile(std::shared_ptr<const FileReader> file, const MapOptions& options);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const FileReader& file() const { return *file_; }
  const std::byte* data() const { return data_; }
  // Whether the bytes stay as they are, and readable, if somebody writes to the file or cuts it
  // short. Not in a child of fork(), which has no thread that would see to it.
  bool guarded() const;
  // Whether somebody did, and the bytes are a copy of our own now.
  bool copied() const { return copied_.load(); }

 private:
  bool take_lease() const;
  void watch();
  bool copy();

  const std::shared_ptr<const FileReader> file_;
  const HomeProcess home_;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
  std::atomic<bool> guarded_{false};
  std::atomic<bool> copied_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;  // guarded by mutex_
  std::unique_ptr<std::thread> watcher_;
};

}  // namespace l3ext
