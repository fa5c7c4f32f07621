#include "runtime/file_reader.hpp"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "core/error.hpp"

namespace l3ext {
namespace {

constexpr int64_t align_down(int64_t x) { return x & ~(FileReader::kAlignment - 1); }
constexpr int64_t align_up(int64_t x) { return align_down(x + FileReader::kAlignment - 1); }

}  // namespace

FileReader::FileReader(std::string path, DirectIo direct_io, IoEngine engine)
    : path_(std::move(path)), uring_required_(engine == IoEngine::kUring) {
  if (engine != IoEngine::kPread) uring_ = why_no_uring().empty();
  if (uring_required_ && !uring_) {
    throw Error(ErrorCode::kRuntime, concat("io_engine: expected a system with io_uring, got \"",
                                            why_no_uring(), "\"; pread and auto read without it"));
  }
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
    try_direct(direct_io);
    threads_ = std::make_unique<PreadThreads>(fd_);
  } catch (...) {
    ::close(fd_);
    throw;
  }
}

FileReader::~FileReader() {
  threads_.reset();
  ::close(fd_);
}

void FileReader::open() {
  // O_NONBLOCK: a FIFO in the file's place is refused below instead of waited on for ever.
  fd_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd_ < 0) {
    const int error = errno;
    throw Error::io(path_, error, concat("cannot open: ", std::strerror(error)));
  }
}

void FileReader::try_direct(DirectIo direct_io) {
  // Without O_NONBLOCK from here on: io_uring would hand it to file systems that give up at once.
  const int flags = ::fcntl(fd_, F_GETFL) & ~O_NONBLOCK;
  ::fcntl(fd_, F_SETFL, flags);
  if (direct_io == DirectIo::kOff) return;
  // Some file systems accept the flag and refuse the read: only a read tells.
  direct_ = ::fcntl(fd_, F_SETFL, flags | O_DIRECT) == 0 && can_read();
  if (direct_) return;
  if (direct_io == DirectIo::kOn) {
    throw Error::io(path_, EINVAL,
                    "direct_io: expected a file system that allows O_DIRECT, got one that does "
                    "not; off and auto read through the page cache");
  }
  ::fcntl(fd_, F_SETFL, flags);
}

bool FileReader::can_read() const {
  alignas(kAlignment) std::byte page[kAlignment];
  ssize_t got;
  do {
    got = ::pread(fd_, page, sizeof page, 0);
  } while (got < 0 && errno == EINTR);
  return got >= 0;
}

int64_t FileReader::size_now() const {
  struct stat status;
  return ::fstat(fd_, &status) == 0 ? status.st_size : 0;
}

const std::byte* FileReader::read(int64_t begin, int64_t bytes, std::byte* scratch) const {
  RangeRead range(*this, begin, bytes, scratch);
  int64_t result;
  do {
    const RawRead raw = range.next(0);
    const ssize_t got = ::pread(fd_, raw.to, raw.bytes, raw.offset);
    result = got < 0 ? -errno : got;
  } while (!range.advance(result));
  return range.data();
}

std::unique_ptr<ReadQueue> FileReader::make_queue(int depth) const {
  if (uring_) {
    try {
      return make_uring_queue(fd_, depth);
    } catch (const Error&) {
      // The kernel has io_uring and none left for us: descriptors, or memory that it may lock.
      if (uring_required_) throw;
      uring_ = false;
    }
  }
  return threads_->make_queue(depth);
}

RangeRead::RangeRead(const FileReader& file, int64_t begin, int64_t bytes, std::byte* scratch)
    : file_(&file), begin_(begin), bytes_(bytes), scratch_(scratch) {
  // O_DIRECT moves whole aligned blocks: read from the page that holds the first byte.
  first_ = file.direct() ? align_down(begin) : begin;
  length_ = begin + bytes - first_;
  if (file.direct()) length_ = align_up(length_);
}

RawRead RangeRead::next(int64_t tag) const {
  constexpr int64_t kMost = int64_t{1} << 30;  // the system reads no more than 2 GiB at once
  return {scratch_ + done_, static_cast<size_t>(std::min(length_ - done_, kMost)), first_ + done_,
          tag};
}

bool RangeRead::advance(int64_t result) {
  if (result == -EINTR || result == -EAGAIN) return false;
  if (result < 0) {
    const int error = static_cast<int>(-result);
    throw Error::io(
        file_->path(), error,
        concat("cannot read ", bytes_, " bytes at offset ", begin_, ": ", std::strerror(error)));
  }
  const int64_t reached = done_ + result;
  if (first_ + reached >= begin_ + bytes_) return true;
  // A short read ends inside a block: O_DIRECT must go on from that block's start.
  const int64_t next = file_->direct() ? align_down(reached) : reached;
  if (result == 0 || (next == done_ && file_->size_now() < begin_ + bytes_)) {
    throw Error::io(
        file_->path(), 0,
        concat("expected ", bytes_, " bytes at offset ", begin_, ", but the file is ",
               file_->size_now(), " bytes long; it had ", file_->size(), " when it was opened"));
  }
  done_ = next;
  return false;
}

}  // namespace l3ext
