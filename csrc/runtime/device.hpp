// Where fetched rows go: the memory of the processor that runs attention. Work is ordered by
// queues of copies, by the caller's streams, and by fences between them, so that on a GPU nothing
// but bookkeeping happens on the host. The host twin (host_device.hpp) does everything at once and
// its fences are null; so the whole runtime runs, and is tested, where there is no accelerator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>

namespace l3ext {

// A point in the work of a queue or stream; passed when all that was put in before it is done.
// Thread-safe. A null pointer stands for a point that has passed.
class Fence {
 public:
  virtual ~Fence() = default;
  virtual bool passed() = 0;
  virtual void wait() = 0;  // blocks the calling thread; throws kRuntime where the device failed
};
using FencePtr = std::shared_ptr<Fence>;

// How long a stream stood still at a point of its work.
class Stall {
 public:
  virtual ~Stall() = default;
  virtual std::optional<int64_t> ns() = 0;  // nothing while the stream has not got past the point
};

struct Copy {
  void* target;        // on the device
  const void* source;  // in host memory or on the same device
  size_t bytes;
};

// Copies in their own order, beside everything else. One thread at a time.
class CopyQueue {
 public:
  virtual ~CopyQueue() = default;
  // How many copies pay to be issued in one call.
  virtual size_t batch() const = 0;
  // What is put in from now on starts after `fence` has passed.
  virtual void wait(const FencePtr& fence) = 0;
  // Sources stay as they are until a fence recorded after this has passed. Throws kRuntime.
  virtual void copy(std::span<const Copy> copies) = 0;
  virtual void fill(void* target, unsigned char value, size_t bytes) = 0;
  virtual FencePtr record() = 0;
};

// Work beside a stream of the caller's, and part of it: who captures the stream in a graph captures
// the branch with it. Nothing is allocated. One step at a time.
class Branch {
 public:
  virtual ~Branch() = default;
  // The branch's stream; what is put into it from now on starts after all that `stream` holds.
  virtual void* fork(void* stream) = 0;
  virtual void mark(int64_t point) = 0;                // after what the branch holds so far
  virtual void join(void* stream, int64_t point) = 0;  // `stream` goes on after the mark
};

class Device {
 public:
  virtual ~Device() = default;
  virtual std::string name() const = 0;  // as torch spells it: "cpu", "cuda:0"
  virtual int index() const = 0;         // among its kind, from 0
  // The processor reads host memory like its own: a table in RAM can be used where it lies.
  virtual bool is_host() const = 0;

  // Memory for rows, aligned to 256 bytes or more; throws kRuntime.
  virtual void* allocate(size_t bytes) = 0;
  virtual void deallocate(void* memory, size_t bytes) noexcept = 0;  // after all work on it
  // Host memory aligned to 4096 bytes that copies read at full speed, and that no child of fork()
  // has; throws kRuntime.
  virtual void* allocate_staging(size_t bytes) = 0;
  virtual void deallocate_staging(void* memory, size_t bytes) noexcept = 0;
  // Makes existing host memory readable by copies at full speed for as long as the result lives;
  // throws kRuntime where the system refuses.
  virtual std::shared_ptr<void> pin(const void* memory, size_t bytes) = 0;

  virtual std::unique_ptr<CopyQueue> make_queue() = 0;

  // `stream`: the caller's (cudaStream_t; null: the device's default stream); the host has none and
  // ignores it. From record() on, a fence that passes when all work of the stream so far is done.
  virtual FencePtr record(void* stream) = 0;
  // Work put into the stream from now on starts after the fences: the stream waits, not the host.
  // Where there is something to wait for, what it took (null: nothing).
  virtual std::shared_ptr<Stall> wait(void* stream, std::span<const FencePtr> fences) = 0;

  // A branch with so many points, whose kernels read pinned host memory at the host's addresses;
  // throws kRuntime where the device has none.
  virtual std::unique_ptr<Branch> make_branch(int64_t points);
};

// "cpu", or "cuda:0" and so on. Throws kValue for another name, kRuntime where there is no such
// device.
std::shared_ptr<Device> make_device(const std::string& name);

// Memory for rows. Shared: a tensor made of it keeps it alive after the runtime is gone.
class DeviceBuffer {
 public:
  // Owns new memory; throws kRuntime.
  DeviceBuffer(std::shared_ptr<Device> device, size_t bytes)
      : device_(std::move(device)), bytes_(bytes), data_(device_->allocate(bytes)) {}
  // A view of memory that `owner` keeps alive.
  DeviceBuffer(const void* data, size_t bytes, std::shared_ptr<void> owner)
      : bytes_(bytes), data_(const_cast<void*>(data)), owner_(std::move(owner)) {}
  ~DeviceBuffer() {
    if (device_) device_->deallocate(data_, bytes_);
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  std::byte* data() const { return static_cast<std::byte*>(data_); }
  size_t bytes() const { return bytes_; }

 private:
  std::shared_ptr<Device> device_;  // null for a view
  size_t bytes_;
  void* data_;
  std::shared_ptr<void> owner_;
};

}  // namespace l3ext
