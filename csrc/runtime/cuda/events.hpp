// Fences and stalls of a CUDA device: events, which come from a pool, as making one costs more than
// recording it. Host code of CUDA builds only.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "core/cuda_devices.hpp"
#include "runtime/device.hpp"

namespace l3ext::cuda {

// This thread's calls do not break a graph capture of another thread (cudaEventQuery, cudaMalloc or
// cudaHostUnregister would, in the mode that torch captures in), until the scope ends.
class BesideCaptures {
 public:
  BesideCaptures() noexcept { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;  // while inside: the one before
};

// And the device is current.
class Scope {
 public:
  explicit Scope(int device) : guard_(device) {}
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;

 private:
  CudaDeviceGuard guard_;
  BesideCaptures beside_captures_;
};

// Shared: a fence may outlive the device that recorded it.
class EventPool {
 public:
  enum Kind { kFence, kTimed };

  explicit EventPool(int device);  // makes as many as a step in full flow has
  ~EventPool();
  EventPool(const EventPool&) = delete;
  EventPool& operator=(const EventPool&) = delete;

  int device() const { return device_; }
  cudaEvent_t take(Kind kind);
  void give_back(Kind kind, cudaEvent_t event) noexcept;

 private:
  cudaEvent_t make(Kind kind) const;

  const int device_;
  std::mutex mutex_;
  std::vector<cudaEvent_t> free_[2];
};

class PooledEvent {
 public:
  PooledEvent(std::shared_ptr<EventPool> pool, EventPool::Kind kind)
      : pool_(std::move(pool)), kind_(kind), event_(pool_->take(kind)) {}
  ~PooledEvent() { pool_->give_back(kind_, event_); }
  PooledEvent(const PooledEvent&) = delete;
  PooledEvent& operator=(const PooledEvent&) = delete;

  cudaEvent_t get() const { return event_; }
  const EventPool& pool() const { return *pool_; }

 private:
  const std::shared_ptr<EventPool> pool_;
  const EventPool::Kind kind_;
  const cudaEvent_t event_;
};

// All work of `stream` up to here.
FencePtr record_fence(const std::shared_ptr<EventPool>& pool, cudaStream_t stream);

// Makes `stream` wait for the fences that have not passed: all of one device, in its Scope.
void wait_for(cudaStream_t stream, std::span<const FencePtr> fences);
// The same, timed; null if all have passed.
std::shared_ptr<Stall> timed_wait_for(const std::shared_ptr<EventPool>& pool, cudaStream_t stream,
                                      std::span<const FencePtr> fences);

}  // namespace l3ext::cuda
