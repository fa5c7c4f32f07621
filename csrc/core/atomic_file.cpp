#include "core/atomic_file.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "core/error.hpp"

namespace l3ext {

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)) {
  L3EXT_CHECK(!path_.empty(), "path: expected the path of a file, got an empty one");
  struct stat status;
  if (::stat(path_.c_str(), &status) == 0 && !S_ISREG(status.st_mode)) {
    // The rename would put a file where /dev/null was.
    throw Error::io(path_, S_ISDIR(status.st_mode) ? EISDIR : EINVAL,
                    "expected a regular file or none, got a directory or a special file");
  }
  // Several threads may write the same file at once, and processes of the same id in containers
  // that share a folder: each has a temporary file of its own.
  static std::atomic<int64_t> number = 0;
  do {
    temporary_ = concat(path_, ".tmp.", ::getpid(), ".", number++);
    fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  } while (fd_ < 0 && errno == EEXIST);
  if (fd_ < 0) {
    const int error = errno;
    throw Error::io(path_, error, concat("cannot create: ", std::strerror(error)));
  }
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(temporary_.c_str());
}

void AtomicFile::fail(const char* what) {
  const int error = errno;
  throw Error::io(path_, error, concat(what, ": ", std::strerror(error), "; the old file stays"));
}

void AtomicFile::write(const void* data, size_t bytes) {
  const auto* p = static_cast<const char*>(data);
  while (bytes > 0) {
    const ssize_t written = ::write(fd_, p, bytes);
    if (written < 0) {
      if (errno == EINTR) continue;
      fail("cannot write");
    }
    p += written;
    bytes -= static_cast<size_t>(written);
  }
}

void AtomicFile::commit() {
  if (::fsync(fd_) != 0) fail("cannot flush");
  if (std::rename(temporary_.c_str(), path_.c_str()) != 0) fail("cannot rename");
  ::close(std::exchange(fd_, -1));
}

}  // namespace l3ext
