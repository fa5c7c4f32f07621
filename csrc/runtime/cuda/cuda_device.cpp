// A queue is a stream, a fence an event. Streams do not block on the legacy default stream, which
// is torch's: a copy would wait for the layers that it is to hide behind. They have the highest
// priority: the copy engines do not know it, but the blocks of the fetch kernel go first.
#ifdef L3EXT_WITH_CUDA

#include "runtime/cuda_device.hpp"

#include <cuda_runtime_api.h>
#include <sys/resource.h>

#include <algorithm>
#include <list>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "core/cuda/check.hpp"
#include "core/error.hpp"
#include "runtime/cuda/calibrate.hpp"
#include "runtime/cuda/copy_engines.hpp"
#include "runtime/cuda/events.hpp"
#include "runtime/cuda/fetch_blocks.hpp"
#include "runtime/near_memory.hpp"

namespace l3ext {
namespace cuda {
namespace {

// A batch shall be worth its call, and end soon enough for the next layer's to begin.
constexpr size_t kBatch = 64;

cudaStream_t make_stream() {
  int least = 0, greatest = 0;
  L3EXT_CUDA_CHECK(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  cudaStream_t stream = nullptr;
  L3EXT_CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest));
  return stream;
}

class CudaQueue final : public CopyQueue {
 public:
  CudaQueue(std::shared_ptr<EventPool> pool, const CopyChoice& choice)
      : pool_(std::move(pool)), choice_(choice) {
    const Scope scope(pool_->device());
    forked_ = std::make_unique<PooledEvent>(pool_, EventPool::kFence);
    copied_ = std::make_unique<PooledEvent>(pool_, EventPool::kFence);
    stream_ = make_stream();
    beside_ = make_stream();
    small_.reserve(kBatch);
    large_.reserve(kBatch);
  }
  ~CudaQueue() override {  // what is in them is still done
    cudaStreamDestroy(stream_);
    cudaStreamDestroy(beside_);
  }

  size_t batch() const override { return kBatch; }
  void wait(const FencePtr& fence) override {
    const Scope scope(pool_->device());
    wait_for(stream_, {&fence, 1});
  }
  void copy(std::span<const Copy> copies) override {
    const Scope scope(pool_->device());
    join();  // calls keep their order, copies of a call have none
    small_.clear();
    large_.clear();
    for (const Copy& copy : copies) {
      (copy.bytes < choice_.kernel_below ? small_ : large_).push_back(copy);
    }
    if (large_.empty() || small_.empty()) {
      fetch_blocks(small_, choice_.kernel_blocks, stream_);
    } else {
      // The kernel need not wait for the engines, which have a stream to themselves meanwhile.
      L3EXT_CUDA_CHECK(cudaEventRecord(forked_->get(), stream_));
      L3EXT_CUDA_CHECK(cudaStreamWaitEvent(beside_, forked_->get(), 0));
      fetch_blocks(small_, choice_.kernel_blocks, beside_);
      L3EXT_CUDA_CHECK(cudaEventRecord(copied_->get(), beside_));
      open_ = true;
    }
    if (choice_.batched) {
      engines_.copy_batch(large_, stream_);
    } else {
      CopyEngines::copy_loop(large_, stream_);
    }
  }
  void fill(void* target, unsigned char value, size_t bytes) override {
    const Scope scope(pool_->device());
    join();
    L3EXT_CUDA_CHECK(cudaMemsetAsync(target, value, bytes, stream_));
  }
  FencePtr record() override {
    const Scope scope(pool_->device());
    join();
    return record_fence(pool_, stream_);
  }

 private:
  // What comes now comes after the kernel too.
  void join() {
    if (!open_) return;
    L3EXT_CUDA_CHECK(cudaStreamWaitEvent(stream_, copied_->get(), 0));
    open_ = false;
  }

  const std::shared_ptr<EventPool> pool_;
  const CopyChoice choice_;
  std::unique_ptr<PooledEvent> forked_, copied_;
  cudaStream_t stream_ = nullptr, beside_ = nullptr;
  bool open_ = false;  // `beside_` holds copies that nothing waits for yet
  CopyEngines engines_;
  std::vector<Copy> small_, large_;
};

class CudaBranch final : public Branch {
 public:
  CudaBranch(std::shared_ptr<EventPool> pool, int64_t points) : pool_(std::move(pool)) {
    const Scope scope(pool_->device());
    forked_ = std::make_unique<PooledEvent>(pool_, EventPool::kFence);
    for (int64_t i = 0; i < points; ++i) {
      marks_.push_back(std::make_unique<PooledEvent>(pool_, EventPool::kFence));
    }
    stream_ = make_stream();
  }
  ~CudaBranch() override { cudaStreamDestroy(stream_); }

  void* fork(void* stream) override {
    const Scope scope(pool_->device());
    L3EXT_CUDA_CHECK(cudaEventRecord(forked_->get(), static_cast<cudaStream_t>(stream)));
    L3EXT_CUDA_CHECK(cudaStreamWaitEvent(stream_, forked_->get(), 0));
    return stream_;
  }
  void mark(int64_t point) override {
    const Scope scope(pool_->device());
    L3EXT_CUDA_CHECK(cudaEventRecord(marks_[static_cast<size_t>(point)]->get(), stream_));
  }
  void join(void* stream, int64_t point) override {
    const Scope scope(pool_->device());
    L3EXT_CUDA_CHECK(cudaStreamWaitEvent(static_cast<cudaStream_t>(stream),
                                         marks_[static_cast<size_t>(point)]->get(), 0));
  }

 private:
  const std::shared_ptr<EventPool> pool_;
  std::unique_ptr<PooledEvent> forked_;
  std::vector<std::unique_ptr<PooledEvent>> marks_;
  cudaStream_t stream_ = nullptr;
};

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  L3EXT_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

std::string lock_limit() {
  rlimit limit = {};
  if (::getrlimit(RLIMIT_MEMLOCK, &limit) != 0) return "unknown";
  return limit.rlim_cur == RLIM_INFINITY ? "unlimited" : concat(limit.rlim_cur, " bytes");
}

void register_memory(void* memory, size_t bytes, unsigned flags) {
  const cudaError_t status = cudaHostRegister(memory, bytes, flags);
  if (status == cudaSuccess) return;
  cudaGetLastError();
  const std::string advice =
      status == cudaErrorHostMemoryAlreadyRegistered
          ? "Expected memory of which no part is pinned, with whole pages of its own, or all of it "
            "mapped to the device"
          : concat(
                "Expected memory that the system lets a process lock: raise the limit (ulimit "
                "-l, now ",
                lock_limit(), "), free memory, or serve the table from its file");
  throw Error(ErrorCode::kRuntime,
              concat("cannot pin ", bytes, " bytes of host memory at ", memory, ": CUDA error ",
                     int{status}, ", ", cudaGetErrorString(status), ". ", advice));
}

// And mapped, so that a kernel reads it at the same address.
bool is_pinned(const void* p) {
  cudaPointerAttributes attributes = {};
  const bool known = cudaPointerGetAttributes(&attributes, p) == cudaSuccess;
  cudaGetLastError();
  return known && attributes.type == cudaMemoryTypeHost && attributes.devicePointer == p;
}

// CUDA registers a page once in a process, so one registration serves all who ask for the same
// memory. What the caller registered, as torch does with pinned tensors, stays the caller's.
class Registrations {
 public:
  static Registrations& of_process() {
    static auto& registrations = *new Registrations;  // for good: tensors outlive statics
    return registrations;
  }

  std::shared_ptr<void> get(const void* memory, size_t bytes, unsigned flags) {
    const auto* begin = static_cast<const std::byte*>(memory);
    const std::scoped_lock lock(mutex_);
    auto range = std::ranges::find_if(ranges_, [&](const Range& known) {
      return known.begin <= begin && begin + bytes <= known.begin + known.bytes;
    });
    if (range == ranges_.end()) {
      if (is_pinned(begin) && is_pinned(begin + bytes - 1))
        return {const_cast<std::byte*>(begin), [](void*) {}};
      register_memory(const_cast<std::byte*>(begin), bytes, flags);
      range = ranges_.insert(range, {begin, bytes, 0});
    }
    ++range->users;
    return {const_cast<std::byte*>(begin), [this, range](void*) { let_go(range); }};
  }

 private:
  struct Range {
    const std::byte* begin;
    size_t bytes;
    int64_t users;
  };
  using Ranges = std::list<Range>;

  void let_go(Ranges::iterator range) {
    const std::scoped_lock lock(mutex_);
    if (--range->users > 0) return;
    const BesideCaptures beside_captures;
    cudaHostUnregister(const_cast<std::byte*>(range->begin));
    cudaGetLastError();
    ranges_.erase(range);
  }

  std::mutex mutex_;
  Ranges ranges_;
};

class StreamDevice final : public Device {
 public:
  StreamDevice(int index, CopyChoice choice)
      : index_(index), pool_(std::make_shared<EventPool>(index)), choice_(std::move(choice)) {
    const Scope scope(index_);
    char bus_id[32] = {};
    if (cudaDeviceGetPCIBusId(bus_id, sizeof(bus_id), index_) == cudaSuccess) {
      numa_node_ = numa_node_of(bus_id);
    }
    if (attribute(cudaDevAttrHostRegisterReadOnlySupported, index_) != 0) {
      pin_flags_ |= cudaHostRegisterReadOnly;
    }
    // Else pinned memory has another address on the device, which a kernel would have to know.
    reads_host_ = attribute(cudaDevAttrCanUseHostPointerForRegisteredMem, index_) != 0;
    if (!reads_host_) choice_.kernel_below = 0;
  }

  std::string name() const override { return concat("cuda:", index_); }
  int index() const override { return index_; }
  bool is_host() const override { return false; }
  const CopyChoice& choice() const { return choice_; }
  void set_choice(CopyChoice choice) { choice_ = std::move(choice); }

  void* allocate(size_t bytes) override {
    const Scope scope(index_);
    void* memory = nullptr;
    const cudaError_t allocated = cudaMalloc(&memory, std::max<size_t>(bytes, 1));
    if (allocated == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      size_t free = 0, total = 0;
      L3EXT_CUDA_CHECK(cudaMemGetInfo(&free, &total));
      throw Error(ErrorCode::kRuntime, concat("cannot allocate ", bytes, " bytes on ", name(), ": ",
                                              free, " of ", total, " are free"));
    }
    L3EXT_CUDA_CHECK(allocated);
    return memory;
  }
  void deallocate(void* memory, size_t) noexcept override {
    try {
      const Scope scope(index_);
      cudaFree(memory);
    } catch (...) {
      return;  // the device is lost, and the memory with it
    }
  }

  void* allocate_staging(size_t bytes) override {
    const Scope scope(index_);
    void* memory = map_near(bytes, numa_node_);
    try {
      register_memory(memory, std::max<size_t>(bytes, 1),
                      cudaHostRegisterPortable | cudaHostRegisterMapped);
    } catch (...) {
      unmap_near(memory, bytes);
      throw;
    }
    return memory;
  }
  void deallocate_staging(void* memory, size_t bytes) noexcept override {
    // Were the call refused, CUDA would take whatever comes to this address next for these pages.
    const BesideCaptures beside_captures;
    cudaHostUnregister(memory);
    cudaGetLastError();
    unmap_near(memory, bytes);
  }
  std::shared_ptr<void> pin(const void* memory, size_t bytes) override {
    if (bytes == 0) return nullptr;
    const Scope scope(index_);
    return Registrations::of_process().get(memory, bytes, pin_flags_);
  }

  std::unique_ptr<CopyQueue> make_queue() override {
    return std::make_unique<CudaQueue>(pool_, choice_);
  }

  FencePtr record(void* stream) override {
    const Scope scope(index_);
    check_not_capturing(static_cast<cudaStream_t>(stream));
    return record_fence(pool_, static_cast<cudaStream_t>(stream));
  }
  std::shared_ptr<Stall> wait(void* stream, std::span<const FencePtr> fences) override {
    const Scope scope(index_);
    check_not_capturing(static_cast<cudaStream_t>(stream));
    return timed_wait_for(pool_, static_cast<cudaStream_t>(stream), fences);
  }

  std::unique_ptr<Branch> make_branch(int64_t points) override {
    if (!reads_host_) return Device::make_branch(points);
    return std::make_unique<CudaBranch>(pool_, points);
  }

 private:
  // A captured event would belong to the graph, and a graph replays without the fetch.
  static void check_not_capturing(cudaStream_t stream) {
    cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
    L3EXT_CUDA_CHECK(cudaStreamIsCapturing(stream, &capture));
    if (capture != cudaStreamCaptureStatusNone) {
      throw Error(ErrorCode::kRuntime,
                  "stream: expected one that captures no graph: a step's rows are fetched outside "
                  "of it, before it is replayed");
    }
  }

  const int index_;
  const std::shared_ptr<EventPool> pool_;
  CopyChoice choice_;
  bool reads_host_ = true;  // kernels do, at the host's addresses
  int numa_node_ = -1;
  unsigned pin_flags_ = cudaHostRegisterPortable | cudaHostRegisterMapped;
};

std::shared_ptr<StreamDevice> make_device(int index, const CopyChoice& choice) {
  int count = 0;
  L3EXT_CUDA_CHECK(cudaGetDeviceCount(&count));
  L3EXT_CHECK(index >= 0 && index < count, "device: expected an index from 0 to ", count - 1,
              ", got ", index);
  return std::make_shared<StreamDevice>(index, choice);
}

}  // namespace
}  // namespace cuda

std::shared_ptr<Device> make_cuda_device(int index, const CopyChoice& choice) {
  return cuda::make_device(index, choice);
}

std::shared_ptr<Device> make_cuda_device(int index) {
  auto device = cuda::make_device(index, {});
  device->set_choice(cuda::choose_copies(cuda::measure_copies(*device)));
  return device;
}

const CopyChoice* copy_choice(const Device& device) {
  const auto* cuda_device = dynamic_cast<const cuda::StreamDevice*>(&device);
  return cuda_device == nullptr ? nullptr : &cuda_device->choice();
}

}  // namespace l3ext

#else

#include "core/error.hpp"
#include "runtime/cuda_device.hpp"

namespace l3ext {

std::shared_ptr<Device> make_cuda_device(int index, const CopyChoice&) {
  throw Error(ErrorCode::kRuntime,
              concat("device: expected the host, as this build of l3ext has no CUDA, got cuda:",
                     index, ". Build it with nvcc and L3EXT_CUDA=ON"));
}
std::shared_ptr<Device> make_cuda_device(int index) { return make_cuda_device(index, {}); }
const CopyChoice* copy_choice(const Device&) { return nullptr; }

}  // namespace l3ext

#endif
