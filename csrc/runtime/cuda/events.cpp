#ifdef L3EXT_WITH_CUDA

#include "runtime/cuda/events.hpp"

#include <atomic>
#include <cmath>
#include <utility>

#include "core/cuda/check.hpp"

namespace l3ext::cuda {
namespace {

constexpr int kPrepared[] = {256, 32};  // of each kind

class EventFence final : public Fence {
 public:
  EventFence(const std::shared_ptr<EventPool>& pool, cudaStream_t stream)
      : event_(pool, EventPool::kFence) {
    L3EXT_CUDA_CHECK(cudaEventRecord(event_.get(), stream));
  }

  // True also where the device failed: nobody shall ask for ever, and wait() says what happened.
  bool passed() override {
    if (passed_.load(std::memory_order_acquire)) return true;
    const Scope scope(event_.pool().device());
    const cudaError_t status = cudaEventQuery(event_.get());
    if (status == cudaErrorNotReady) {
      cudaGetLastError();  // no error, but it would be found by who looks for the last one
      return false;
    }
    if (status == cudaSuccess) passed_.store(true, std::memory_order_release);
    return true;
  }
  void wait() override {
    if (passed_.load(std::memory_order_acquire)) return;
    const Scope scope(event_.pool().device());
    L3EXT_CUDA_CHECK(cudaEventSynchronize(event_.get()));
    passed_.store(true, std::memory_order_release);
  }

  cudaEvent_t event() const { return event_.get(); }

 private:
  const PooledEvent event_;
  std::atomic<bool> passed_{false};
};

class EventStall final : public Stall {
 public:
  explicit EventStall(const std::shared_ptr<EventPool>& pool)
      : begin_(pool, EventPool::kTimed), end_(pool, EventPool::kTimed) {}

  void begin(cudaStream_t stream) { L3EXT_CUDA_CHECK(cudaEventRecord(begin_.get(), stream)); }
  void end(cudaStream_t stream) { L3EXT_CUDA_CHECK(cudaEventRecord(end_.get(), stream)); }

  std::optional<int64_t> ns() override {
    const Scope scope(end_.pool().device());
    float milliseconds = 0;
    if (cudaEventElapsedTime(&milliseconds, begin_.get(), end_.get()) != cudaSuccess) {
      cudaGetLastError();
      return std::nullopt;
    }
    return std::llround(static_cast<double>(milliseconds) * 1e6);
  }

 private:
  const PooledEvent begin_, end_;
};

}  // namespace

EventPool::EventPool(int device) : device_(device) {
  const Scope scope(device);
  for (const Kind kind : {kFence, kTimed}) {
    for (int i = 0; i < kPrepared[kind]; ++i) free_[kind].push_back(make(kind));
  }
}

EventPool::~EventPool() {
  for (const auto& events : free_) {
    for (const cudaEvent_t event : events) cudaEventDestroy(event);
  }
}

cudaEvent_t EventPool::make(Kind kind) const {
  cudaEvent_t event = nullptr;
  // A thread that waits sleeps: it waits for copies, milliseconds, and others need the processor.
  L3EXT_CUDA_CHECK(cudaEventCreateWithFlags(
      &event, kind == kTimed ? cudaEventDefault : cudaEventDisableTiming | cudaEventBlockingSync));
  return event;
}

cudaEvent_t EventPool::take(Kind kind) {
  {
    const std::scoped_lock lock(mutex_);
    if (auto& events = free_[kind]; !events.empty()) {
      const cudaEvent_t event = events.back();
      events.pop_back();
      return event;
    }
  }
  return make(kind);
}

void EventPool::give_back(Kind kind, cudaEvent_t event) noexcept {
  try {
    const std::scoped_lock lock(mutex_);
    free_[kind].push_back(event);
  } catch (...) {
    cudaEventDestroy(event);  // no memory for the list
  }
}

FencePtr record_fence(const std::shared_ptr<EventPool>& pool, cudaStream_t stream) {
  return std::make_shared<EventFence>(pool, stream);
}

void wait_for(cudaStream_t stream, std::span<const FencePtr> fences) {
  for (const FencePtr& fence : fences) {
    if (!fence || fence->passed()) continue;
    const auto* ours = dynamic_cast<const EventFence*>(fence.get());
    L3EXT_CHECK(ours != nullptr, "fence: expected one of a CUDA device");
    L3EXT_CUDA_CHECK(cudaStreamWaitEvent(stream, ours->event(), 0));
  }
}

std::shared_ptr<Stall> timed_wait_for(const std::shared_ptr<EventPool>& pool, cudaStream_t stream,
                                      std::span<const FencePtr> fences) {
  std::vector<FencePtr> open;
  for (const FencePtr& fence : fences) {
    if (fence && !fence->passed()) open.push_back(fence);
  }
  if (open.empty()) return nullptr;
  auto stall = std::make_shared<EventStall>(pool);
  stall->begin(stream);
  wait_for(stream, open);
  stall->end(stream);
  return stall;
}

}  // namespace l3ext::cuda

#endif
