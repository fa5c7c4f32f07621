// Where fetched rows go: the memory of the processor that runs attention. The host twin
// (host_device.hpp) lets the whole runtime run and be tested where there is no accelerator; a GPU
// implements copy() as an asynchronous copy on a stream and finish() as waiting for its event.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <utility>

namespace l3ext {

// The copies of one worker thread, carried out in order.
class CopyQueue {
 public:
  virtual ~CopyQueue() = default;
  // `source` lies in host memory or on the same device and must stay as it is until finish().
  virtual void copy(void* target, const void* source, size_t bytes) = 0;
  // Returns when every copy so far has landed: sources may change, targets may be read.
  virtual void finish() = 0;
};

class Device {
 public:
  virtual ~Device() = default;
  virtual std::string name() const = 0;  // as torch spells it

  // Memory for rows, aligned to a page; throws kRuntime.
  virtual void* allocate(size_t bytes) = 0;
  virtual void deallocate(void* memory, size_t bytes) noexcept = 0;
  // Host memory aligned to 4096 bytes that copy() reads at full speed; throws kRuntime.
  virtual void* allocate_staging(size_t bytes) = 0;
  virtual void deallocate_staging(void* memory, size_t bytes) noexcept = 0;

  virtual void fill(void* target, unsigned char value, size_t bytes) = 0;
  virtual std::unique_ptr<CopyQueue> make_queue() = 0;
};

// Owns memory for rows. Shared: a tensor made of it keeps it alive after the runtime is gone.
class DeviceBuffer {
 public:
  DeviceBuffer(std::shared_ptr<Device> device, size_t bytes)
      : device_(std::move(device)), bytes_(bytes), data_(device_->allocate(bytes)) {}
  ~DeviceBuffer() { device_->deallocate(data_, bytes_); }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;

  std::byte* data() const { return static_cast<std::byte*>(data_); }
  size_t bytes() const { return bytes_; }
  void fill(unsigned char value, size_t begin, size_t bytes) {
    device_->fill(data() + begin, value, bytes);
  }

 private:
  std::shared_ptr<Device> device_;
  size_t bytes_;
  void* data_;
};

}  // namespace l3ext
