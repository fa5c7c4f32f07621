#ifdef L3EXT_WITH_CUDA

#include <cuda_runtime_api.h>

#include <algorithm>
#include <chrono>
#include <limits>

#include "core/cuda/check.hpp"
#include "core/error.hpp"
#include "runtime/cuda/calibrate.hpp"
#include "runtime/cuda/copy_engines.hpp"
#include "runtime/cuda/events.hpp"
#include "runtime/cuda/fetch_blocks.hpp"

namespace l3ext::cuda {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kSizes[] = {size_t{4} << 10, size_t{16} << 10, size_t{64} << 10,
                             size_t{256} << 10};
constexpr int64_t kCounts[] = {8, 64};
constexpr int kRuns = 4;  // the first is slower: it wakes the link up
constexpr auto kTime = std::chrono::milliseconds(50);
constexpr size_t kBytes = kSizes[3] * kCounts[1];

// What a measurement needs; gone when it ends, also by an error.
struct Bench {
  explicit Bench(Device& on) : device(on) {
    rows = device.allocate(kBytes);
    try {
      host = device.allocate_staging(kBytes);
      L3EXT_CUDA_CHECK(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, 0));
    } catch (...) {
      release();
      throw;
    }
  }
  ~Bench() { release(); }
  Bench(const Bench&) = delete;
  Bench& operator=(const Bench&) = delete;

  void release() {
    if (stream != nullptr) cudaStreamDestroy(stream);
    if (host != nullptr) device.deallocate_staging(host, kBytes);
    device.deallocate(rows, kBytes);
  }

  // The best time of some runs, us.
  template <typename Enqueue>
  double time(const Enqueue& enqueue) const {
    double best = std::numeric_limits<double>::infinity();
    for (int run = 0; run < kRuns; ++run) {
      const auto begin = Clock::now();
      enqueue();
      L3EXT_CUDA_CHECK(cudaStreamSynchronize(stream));
      best =
          std::min(best, std::chrono::duration<double, std::micro>(Clock::now() - begin).count());
    }
    return best;
  }

  Device& device;
  void* rows = nullptr;
  void* host = nullptr;
  cudaStream_t stream = nullptr;
};

}  // namespace

std::vector<CopyTiming> measure_copies(Device& device) {
  const Scope scope(device.index());
  const Bench bench(device);
  bool batches = has_batches();
  int host_addresses = 0;
  L3EXT_CUDA_CHECK(cudaDeviceGetAttribute(
      &host_addresses, cudaDevAttrCanUseHostPointerForRegisteredMem, device.index()));
  const auto end = Clock::now() + kTime;
  const CopyChoice defaults;
  CopyEngines engines;
  std::vector<CopyTiming> timings;
  for (const size_t bytes : kSizes) {
    for (const int64_t count : kCounts) {
      if (Clock::now() >= end) return timings;
      // Apart in host memory, as blocks of a table are: the last first.
      std::vector<Copy> copies;
      copies.reserve(static_cast<size_t>(count));
      for (int64_t i = 0; i < count; ++i) {
        copies.push_back({static_cast<std::byte*>(bench.rows) + i * bytes,
                          static_cast<std::byte*>(bench.host) + (count - 1 - i) * bytes, bytes});
      }
      CopyTiming timing = {bytes, count};
      timing.loop_us = bench.time([&] { CopyEngines::copy_loop(copies, bench.stream); });
      if (batches) {
        try {
          timing.batch_us = bench.time([&] { engines.copy_batch(copies, bench.stream); });
        } catch (const Error&) {  // refused: go on as where there are none
          cudaGetLastError();
          batches = false;
          for (CopyTiming& earlier : timings) earlier.batch_us = 0;
        }
      }
      if (host_addresses != 0) {
        timing.kernel_us =
            bench.time([&] { fetch_blocks(copies, defaults.kernel_blocks, bench.stream); });
      }
      timings.push_back(timing);
    }
  }
  return timings;
}

}  // namespace l3ext::cuda

#endif
