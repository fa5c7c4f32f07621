// io_uring by its system calls instead of by liburing: of that library this would use some hundred
// lines, and a wheel must neither need it where it runs nor do without io_uring because it was
// missing where the wheel was built. The kernel headers of Linux 5.6 are all it takes.
//
// File and buffers are not registered with the kernel: that moved no more bytes (O_DIRECT, 4 to
// 256 KiB, depth 16), saved 1 to 5 us of a core for a read of 64 to 256 KiB, and would count
// against RLIMIT_MEMLOCK, of which 8 MiB is a usual limit and what two readers of 16 times 256 KiB
// need.
#include <string>

#include "core/error.hpp"
#include "core/home_process.hpp"
#include "runtime/read_queue.hpp"

#if defined(L3EXT_HAVE_IO_URING)

#include <linux/io_uring.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>
#include <utility>

namespace l3ext {
namespace {

// One mapping for both rings, no lost completions, and (by its version, 5.6) IORING_OP_READ.
constexpr uint32_t kFeatures =
    IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP | IORING_FEAT_RW_CUR_POS;

[[noreturn]] void fail(const char* call, int error) {
  throw Error(ErrorCode::kRuntime, concat(call, ": ", std::strerror(error)));
}

class FileDescriptor {
 public:
  explicit FileDescriptor(long fd) : fd_(static_cast<int>(fd)) {}
  ~FileDescriptor() { ::close(fd_); }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return fd_; }

 private:
  int fd_;
};

class Mapping {
 public:
  Mapping(int fd, uint64_t offset, size_t bytes)
      : begin_(::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd,
                      static_cast<off_t>(offset))),
        bytes_(bytes) {
    if (begin_ == MAP_FAILED) fail("mmap of io_uring", errno);
  }
  ~Mapping() { ::munmap(begin_, bytes_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  template <typename T>
  T* at(uint32_t offset) const {
    return reinterpret_cast<T*>(static_cast<std::byte*>(begin_) + offset);
  }

 private:
  void* begin_;
  size_t bytes_;
};

// The two rings that process and kernel share; each side moves one end of each.
class Ring {
 public:
  explicit Ring(unsigned entries) : Ring(entries, io_uring_params{}) {}

  // The kernel sees it with the next enter(). Never more are open than `entries`: there is room.
  void push(const io_uring_sqe& entry) {
    const uint32_t tail = *sq_tail_;
    sqes_.at<io_uring_sqe>(0)[tail & sq_mask_] = entry;
    std::atomic_ref(*sq_tail_).store(tail + 1, std::memory_order_release);
  }
  // Takes the last one back, which the kernel has not started.
  io_uring_sqe withdraw() {
    const uint32_t tail = *sq_tail_ - 1;
    std::atomic_ref(*sq_tail_).store(tail, std::memory_order_release);
    return sqes_.at<io_uring_sqe>(0)[tail & sq_mask_];
  }
  bool take(io_uring_cqe& entry) {
    const uint32_t head = *cq_head_;
    if (head == std::atomic_ref(*cq_tail_).load(std::memory_order_acquire)) return false;
    entry = cqes_[head & cq_mask_];
    std::atomic_ref(*cq_head_).store(head + 1, std::memory_order_release);
    return true;
  }
  // Starts up to `count` entries, then waits for a completion if asked to. Returns how many it
  // started, or minus errno.
  int enter(unsigned count, bool wait) const {
    const long started = ::syscall(__NR_io_uring_enter, fd_.get(), count, wait ? 1U : 0U,
                                   wait ? IORING_ENTER_GETEVENTS : 0U, nullptr, size_t{0});
    return started < 0 ? -errno : static_cast<int>(started);
  }

 private:
  Ring(unsigned entries, io_uring_params params)
      : fd_(setup(entries, params)),
        rings_(fd_.get(), IORING_OFF_SQ_RING,
               std::max(params.sq_off.array + params.sq_entries * sizeof(uint32_t),
                        params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe))),
        sqes_(fd_.get(), IORING_OFF_SQES, params.sq_entries * sizeof(io_uring_sqe)),
        sq_tail_(rings_.at<uint32_t>(params.sq_off.tail)),
        sq_mask_(*rings_.at<uint32_t>(params.sq_off.ring_mask)),
        cq_head_(rings_.at<uint32_t>(params.cq_off.head)),
        cq_tail_(rings_.at<uint32_t>(params.cq_off.tail)),
        cq_mask_(*rings_.at<uint32_t>(params.cq_off.ring_mask)),
        cqes_(rings_.at<io_uring_cqe>(params.cq_off.cqes)) {
    auto* order = rings_.at<uint32_t>(params.sq_off.array);
    for (uint32_t i = 0; i < params.sq_entries; ++i) order[i] = i;
  }

  static long setup(unsigned entries, io_uring_params& params) {
    const long fd = ::syscall(__NR_io_uring_setup, entries, &params);
    if (fd < 0) fail("io_uring_setup", errno);
    if ((params.features & kFeatures) != kFeatures) {
      ::close(static_cast<int>(fd));
      fail("io_uring_setup of a kernel before Linux 5.6", ENOSYS);
    }
    return fd;
  }

  FileDescriptor fd_;
  Mapping rings_;
  Mapping sqes_;
  uint32_t* sq_tail_;
  uint32_t sq_mask_;
  uint32_t* cq_head_;
  uint32_t* cq_tail_;
  uint32_t cq_mask_;
  io_uring_cqe* cqes_;
};

class UringQueue final : public ReadQueue {
 public:
  UringQueue(int fd, int depth) : fd_(fd), ring_(static_cast<unsigned>(depth)) {}
  ~UringQueue() override {
    if (!home_.is_here()) return;  // a child of fork(): they are its parent's reads
    io_uring_cqe entry;
    while (on_their_way_ > 0) {
      if (ring_.take(entry)) {
        --on_their_way_;
      } else {
        ring_.enter(0, true);
      }
    }
  }
  UringQueue(const UringQueue&) = delete;
  UringQueue& operator=(const UringQueue&) = delete;

  void push(const RawRead& read) override {
    io_uring_sqe entry{};
    entry.opcode = IORING_OP_READ;
    entry.fd = fd_;
    entry.addr = std::bit_cast<uintptr_t>(read.to);
    entry.len = static_cast<uint32_t>(read.bytes);
    entry.off = static_cast<uint64_t>(read.offset);
    entry.user_data = static_cast<uint64_t>(read.tag);
    ring_.push(entry);
    ++pushed_;
    enter(false);
  }

  RawResult pop() override {
    io_uring_cqe entry;
    while (!ring_.take(entry)) {
      const int error = enter(true);
      if (error == 0 || error == EINTR) continue;
      if (pushed_ > 0 && error != EAGAIN && error != EBUSY) {  // a sandbox closed behind us
        --pushed_;
        return read(ring_.withdraw());
      }
      // Short of memory; or what is on its way must be waited for without the kernel's help.
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    --on_their_way_;
    return {static_cast<int64_t>(entry.user_data), entry.res};
  }

 private:
  // Starts what was pushed. Returns 0 or the errno; what was not started then is tried again.
  int enter(bool wait) {
    const int started = ring_.enter(pushed_, wait);
    if (started < 0) return -started;
    pushed_ -= static_cast<unsigned>(started);
    on_their_way_ += started;
    return 0;
  }

  // As the ring would have, by the thread that asks.
  RawResult read(const io_uring_sqe& entry) const {
    const ssize_t got = ::pread(fd_, std::bit_cast<void*>(uintptr_t{entry.addr}), entry.len,
                                static_cast<off_t>(entry.off));
    return {static_cast<int64_t>(entry.user_data), got < 0 ? -errno : got};
  }

  const int fd_;
  const HomeProcess home_;
  Ring ring_;
  unsigned pushed_ = 0;  // and not started
  int on_their_way_ = 0;
};

}  // namespace

const std::string& why_no_uring() {
  static const std::string reason = [] {
    try {
      // Containers' filters may allow one call and not the other.
      if (const int error = Ring(1).enter(0, false); error < 0) fail("io_uring_enter", -error);
      return std::string();
    } catch (const Error& error) {
      return std::string(error.what());
    }
  }();
  return reason;
}

std::unique_ptr<ReadQueue> make_uring_queue(int fd, int depth) {
  return std::make_unique<UringQueue>(fd, depth);
}

}  // namespace l3ext

#else

namespace l3ext {

const std::string& why_no_uring() {
  static const std::string reason = "this build has no io_uring";
  return reason;
}

std::unique_ptr<ReadQueue> make_uring_queue(int, int) {
  throw Error(ErrorCode::kRuntime, why_no_uring());
}

}  // namespace l3ext

#endif
