// A device that is not the host, for tests: what a GPU does to the runtime, without one. Queues and
// streams are threads that carry out their work later, each in its own order, between each other in
// a random one that a seed fixes as far as threads allow. It runs to find faults that a GPU hides:
//   - its addresses fault when the host touches them: the bytes lie elsewhere, see at();
//   - a copy's target is all ones (NaN, -1) until the copy is done, as new memory and freed memory
//     are; copies of one call run in any order, and read a host source at any time from the call
//     on;
//   - fences pass late, and are seen late;
//   - whatever breaks the rules of runtime/device.hpp is an Error at the call or, where it shows
//     only when the work is done, one of faults(): a copy from host memory that is neither pinned
//     nor staging (or no longer), work on memory that was given back, two copies of one call to the
//     same bytes, a queue used by two threads at a time.
// Nothing but fences orders queues and streams, so that ThreadSanitizer reports as a race what no
// fence holds back.
#pragma once

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string>
#include <vector>

#include "runtime/device.hpp"

namespace examples {

struct AsyncOptions {
  uint64_t seed = 0;
  // Half of all work starts at once, the rest up to this late, a little of it up to 8 times as
  // late.
  std::chrono::microseconds delay{100};
  size_t batch = 8;  // of its queues
};

class AsyncDevice final : public l3ext::Device {
 public:
  explicit AsyncDevice(AsyncOptions options = {});
  ~AsyncDevice() override;  // when all work is done

  std::string name() const override { return "twin:0"; }
  int index() const override { return 0; }
  bool is_host() const override { return false; }
  void* allocate(size_t bytes) override;
  void deallocate(void* memory, size_t bytes) noexcept override;
  void* allocate_staging(size_t bytes) override;
  void deallocate_staging(void* memory, size_t bytes) noexcept override;
  std::shared_ptr<void> pin(const void* memory, size_t bytes) override;
  std::unique_ptr<l3ext::CopyQueue> make_queue() override;
  l3ext::FencePtr record(void* stream) override;
  std::shared_ptr<l3ext::Stall> wait(void* stream,
                                     std::span<const l3ext::FencePtr> fences) override;

  // --- what a caller does on a GPU
  void* make_stream();  // lives as long as the device; null is its default stream
  // A kernel: runs in the stream's order; what it throws becomes a fault. It must not own the
  // device.
  void run(void* stream, std::function<void()> kernel);
  void synchronize(void* stream);
  // The bytes behind a device address, for kernels, and for the host when the stream is idle.
  // Throws kRuntime unless [address, address + bytes) is memory that is allocated.
  std::byte* at(const void* address, size_t bytes) const;

  // --- what a test does to it
  void pause_queues();  // no queue begins anything more; streams go on
  void resume_queues();
  // The n-th call of copy() from now on (1: the next) throws kRuntime and copies nothing.
  void fail_copy_call(int64_t n);
  // At the n-th call's copies the device is lost, as a CUDA context is: nothing is copied from then
  // on, copy() throws, every fence that has not passed yet passes, and their wait() throws
  // kRuntime.
  void lose_at_copy_call(int64_t n);

  // --- what it saw
  std::vector<std::string> faults() const;
  size_t allocated_bytes() const;  // on the device
  size_t staging_bytes() const;
  size_t pinned_bytes() const;
  int64_t copied_bytes() const;

 private:
  class World;
  class Lane;
  class Fence;
  class Stall;
  class Queue;
  static std::shared_ptr<Fence> ours(const World& world, const l3ext::FencePtr& fence);
  std::shared_ptr<Lane> make_lane(bool is_queue);
  Lane& lane_of(void* stream) const;

  const AsyncOptions options_;
  const std::shared_ptr<World> world_;
  mutable std::mutex mutex_;
  std::vector<std::shared_ptr<Lane>> lanes_;  // of streams and queues; first: the default stream
};

}  // namespace examples
