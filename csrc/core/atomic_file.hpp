// Writes a file so that a reader sees the old content or the new one, never a part: a temporary
// file beside the target, fsync, rename. A failed write (disk full) leaves the old file as it was.
// Of several at once for one path, the last to commit stays.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace l3ext {

class AtomicFile {
 public:
  // Throws kIo with the path, also where it is that of a directory or a device; kValue: empty.
  explicit AtomicFile(std::string path);
  ~AtomicFile();  // without commit(): removes the temporary file
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  void write(const void* data, size_t bytes);
  void commit();

 private:
  [[noreturn]] void fail(const char* what);

  std::string path_;
  std::string temporary_;
  int fd_ = -1;
};

}  // namespace l3ext
