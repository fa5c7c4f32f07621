#include "core/atomic_file.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "core/error.hpp"

namespace l3ext {

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)) {
  temporary_ = concat(path_, ".tmp.", ::getpid());
  fd_ = ::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
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
