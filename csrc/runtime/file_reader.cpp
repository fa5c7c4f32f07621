#include "runtime/file_reader.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "core/error.hpp"

namespace l3ext {
namespace {

constexpr int64_t align_down(int64_t x) { return x & ~(FileReader::kAlignment - 1); }
constexpr int64_t align_up(int64_t x) { return align_down(x + FileReader::kAlignment - 1); }

}  // namespace

FileReader::FileReader(std::string path, DirectIo direct_io) : path_(std::move(path)) {
  open();
  struct stat status;
  try {
    if (::fstat(fd_, &status) != 0) {
      throw Error::io(path_, errno, concat("cannot stat: ", std::strerror(errno)));
    }
    if (!S_ISREG(status.st_mode)) {
      throw Error::io(path_, 0, "expected a regular file, got a directory or a special file");
    }
    size_ = status.st_size;
    if (direct_io != DirectIo::kOff) {
      const int flags = ::fcntl(fd_, F_GETFL);
      // Some file systems accept the flag and refuse the read: only a read tells.
      direct_ = ::fcntl(fd_, F_SETFL, flags | O_DIRECT) == 0 && can_read();
      if (!direct_) {
        if (direct_io == DirectIo::kOn) {
          throw Error::io(path_, EINVAL,
                          "direct_io: this file system does not allow O_DIRECT; pass False or "
                          "\"auto\" to read through the page cache");
        }
        ::fcntl(fd_, F_SETFL, flags);
      }
    }
  } catch (...) {
    ::close(fd_);
    throw;
  }
}

FileReader::~FileReader() { ::close(fd_); }

void FileReader::open() {
  // O_NONBLOCK: a FIFO in the file's place is refused below instead of waited on for ever.
  fd_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd_ < 0) {
    const int error = errno;
    throw Error::io(path_, error, concat("cannot open: ", std::strerror(error)));
  }
}

bool FileReader::can_read() const {
  alignas(kAlignment) std::byte page[kAlignment];
  ssize_t got;
  do {
    got = ::pread(fd_, page, sizeof page, 0);
  } while (got < 0 && errno == EINTR);
  return got >= 0;
}

const std::byte* FileReader::read(int64_t begin, int64_t bytes, std::byte* scratch) const {
  // O_DIRECT moves whole aligned blocks: read from the page that holds the first byte.
  const int64_t first = direct_ ? align_down(begin) : begin;
  const int64_t lead = begin - first;
  const int64_t wanted = lead + bytes;
  const int64_t length = direct_ ? align_up(wanted) : wanted;
  int64_t done = 0;
  while (done < wanted) {
    const ssize_t got =
        ::pread(fd_, scratch + done, static_cast<size_t>(length - done), first + done);
    if (got < 0) {
      if (errno == EINTR) continue;
      const int error = errno;
      throw Error::io(
          path_, error,
          concat("cannot read ", bytes, " bytes at offset ", begin, ": ", std::strerror(error)));
    }
    const int64_t reached = done + got;
    if (reached >= wanted) break;
    // A short read ends inside a block: O_DIRECT must go on from that block's start.
    const int64_t next = direct_ ? align_down(reached) : reached;
    if (next <= done) {
      struct stat now;
      throw Error::io(path_, 0,
                      concat("expected ", bytes, " bytes at offset ", begin, ", but the file is ",
                             ::fstat(fd_, &now) == 0 ? now.st_size : 0, " bytes long; it had ",
                             size_, " when it was opened"));
    }
    done = next;
  }
  return scratch + lead;
}

}  // namespace l3ext
