// Reads ranges of a file with pread: no mmap, so that a file cut short under us is an error and
// never a SIGBUS. With O_DIRECT the page cache is passed by: the hot set is the cache, and a table
// that is larger than RAM does not push everything else out of it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace l3ext {

enum class DirectIo { kAuto, kOn, kOff };  // kAuto: where the file system allows it

class FileReader {
 public:
  static constexpr int64_t kAlignment = 4096;  // what O_DIRECT asks of every device we know

  FileReader(std::string path, DirectIo direct_io);  // throws kIo
  ~FileReader();
  FileReader(const FileReader&) = delete;
  FileReader& operator=(const FileReader&) = delete;

  const std::string& path() const { return path_; }
  int64_t size() const { return size_; }  // when it was opened
  bool direct() const { return direct_; }

  // Reads bytes [begin, begin + bytes) into `scratch`, which is aligned to kAlignment and at least
  // bytes + 2 * kAlignment long; returns where the first one lies. Thread-safe; throws kIo.
  const std::byte* read(int64_t begin, int64_t bytes, std::byte* scratch) const;

 private:
  void open();
  bool can_read() const;

  std::string path_;
  int fd_ = -1;
  int64_t size_ = 0;
  bool direct_ = false;
};

}  // namespace l3ext
