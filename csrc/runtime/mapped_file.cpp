#include "runtime/mapped_file.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstring>
#include <new>
#include <system_error>
#include <utility>

#include "core/error.hpp"

namespace l3ext {
namespace {

#ifndef MADV_POPULATE_READ
constexpr int MADV_POPULATE_READ = 22;  // Linux 5.14, newer than some systems' headers
#endif

// How often the lease is looked at. Whoever writes to the file waits this much longer.
constexpr auto kWatchInterval = std::chrono::milliseconds(200);

}  // namespace

MappedFile::MappedFile(std::shared_ptr<const FileReader> file, const MapOptions& options)
    : file_(std::move(file)), bytes_(static_cast<size_t>(file_->size())) {
  guarded_ = options.guard && take_lease();
  // With a lease the size cannot change any more; without one this is as good as it gets.
  if (const int64_t now = file_->size_now(); now != file_->size()) {
    throw Error::io(file_->path(), 0,
                    concat("expected ", file_->size(), " bytes, got ", now,
                           ": the file changed while it was opened"));
  }
  void* at = ::mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, file_->fd(), 0);
  if (at == MAP_FAILED) {
    const int error = errno;
    throw Error::io(file_->path(), error,
                    concat("cannot map ", bytes_, " bytes: ", std::strerror(error)));
  }
  data_ = static_cast<std::byte*>(at);
  // Pages come in larger units then: every page of 0.8 GB was there, from an empty page cache,
  // after 0.3 to 0.4 s at first use, and after 0.3 to 2.3 s without (two cores, virtual disk,
  // Linux 6.18).
  ::madvise(data_, bytes_, MADV_HUGEPAGE);
  // Best effort. MAP_POPULATE would come before the advice: 0.55 to 0.7 s instead of 0.25.
  if (options.populate) ::madvise(data_, bytes_, MADV_POPULATE_READ);
  if (!guarded_) return;
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the caller's threads
  try {
    watcher_ = std::make_unique<std::thread>([this] { watch(); });
  } catch (const std::system_error& error) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    ::munmap(data_, bytes_);
    throw Error(ErrorCode::kRuntime,
                concat("cannot start the thread that guards a mapped file: ", error.what()));
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

MappedFile::~MappedFile() {
  if (!home_.is_here()) {
    [[maybe_unused]] auto* left = watcher_.release();  // a child of fork() does not have the thread
  } else if (watcher_) {
    {
      const std::scoped_lock lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    watcher_->join();
  }
  ::munmap(data_, bytes_);
}

bool MappedFile::guarded() const { return guarded_ && home_.is_here(); }

bool MappedFile::take_lease() const {
  // A lease that is broken raises a signal, SIGIO unless told otherwise, which by default ends the
  // process. We look instead of being told: no owner, so no signal; and until that is set, one that
  // is ignored by default.
  const int fd = file_->fd();
  return ::fcntl(fd, F_SETSIG, SIGURG) == 0 && ::fcntl(fd, F_SETLEASE, F_RDLCK) == 0 &&
         ::fcntl(fd, F_SETOWN, 0) == 0;
}

void MappedFile::watch() {
  std::unique_lock lock(mutex_);
  while (!changed_.wait_for(lock, kWatchInterval, [&] { return stopping_; })) {
    if (::fcntl(file_->fd(), F_GETLEASE) == F_RDLCK) continue;
    copied_ = copy();
    guarded_ = copied_.load();
    ::fcntl(file_->fd(), F_SETLEASE, F_UNLCK);  // whoever waits for it may go on
    return;
  }
  ::fcntl(file_->fd(), F_SETLEASE, F_UNLCK);
}

// Puts the file's bytes in memory of our own where they were mapped. They are read, not copied out
// of the mapping: should the kernel's patience end meanwhile, that is an error and not a signal.
bool MappedFile::copy() {
  void* at = ::mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) return false;
  auto* copy = static_cast<std::byte*>(at);
  // All of it: mremap() takes one mapping, and advice for a part would make it several.
  ::madvise(copy, bytes_, MADV_HUGEPAGE);
  try {
    constexpr int64_t kChunk = int64_t{64} << 20;
    const auto size = static_cast<int64_t>(bytes_);
    for (int64_t done = 0; done < size; done += kChunk) {
      file_->read(done, std::min(kChunk, size - done), copy + done);
    }
  } catch (...) {  // also where memory is lacking: this is our own thread
    ::munmap(copy, bytes_);
    return false;
  }
  // One step for every thread that reads: it sees the one pages or the other.
  if (::mprotect(copy, bytes_, PROT_READ) != 0 ||
      ::mremap(copy, bytes_, bytes_, MREMAP_MAYMOVE | MREMAP_FIXED, data_) == MAP_FAILED) {
    ::munmap(copy, bytes_);
    return false;
  }
  return true;
}

}  // namespace l3ext
