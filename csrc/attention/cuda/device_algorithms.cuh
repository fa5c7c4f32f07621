// The device-wide algorithms that are not ours: CUB's under nvcc, plain loops in the emulation.
//
// Each has CUB's convention: without `storage` it only says in `bytes` how much it needs; with it,
// the work is enqueued on the stream. Functions given to them are called on the device with indices
// from 0 to count - 1.
#pragma once

#include "core/cuda/device.cuh"

#ifdef __CUDACC__

#include <thrust/iterator/counting_iterator.h>
#include <thrust/iterator/transform_iterator.h>

#include <cub/device/device_radix_sort.cuh>
#include <cub/device/device_scan.cuh>
#include <cub/device/device_select.cuh>

namespace l3ext::cuda {

// Stable; of the keys only the low `bits` count.
inline void sort_pairs(void* storage, size_t& bytes, const uint32_t* keys, uint32_t* sorted_keys,
                       const int32_t* values, int32_t* sorted_values, int64_t count, int bits,
                       Stream stream) {
  L3EXT_CUDA_CHECK(cub::DeviceRadixSort::SortPairs(storage, bytes, keys, sorted_keys, values,
                                                   sorted_values, static_cast<int>(count), 0, bits,
                                                   stream));
}

// The indices of which `predicate` holds, ascending, and their number.
template <typename Predicate>
void select_indices(void* storage, size_t& bytes, const Predicate& predicate, int32_t* selected,
                    int32_t* num_selected, int64_t count, Stream stream) {
  const thrust::counting_iterator<int32_t> indices(0);
  L3EXT_CUDA_CHECK(cub::DeviceSelect::Flagged(
      storage, bytes, indices, thrust::make_transform_iterator(indices, predicate), selected,
      num_selected, static_cast<int>(count), stream));
}

struct Plus {
  template <typename T>
  __host__ __device__ T operator()(const T& a, const T& b) const {
    return a + b;
  }
};

// sums[i]: the sum of element(0) .. element(i).
template <typename T, typename Element>
void inclusive_scan(void* storage, size_t& bytes, const Element& element, T* sums, int64_t count,
                    Stream stream) {
  const auto elements =
      thrust::make_transform_iterator(thrust::counting_iterator<int32_t>(0), element);
  L3EXT_CUDA_CHECK(cub::DeviceScan::InclusiveScan(storage, bytes, elements, sums, Plus{},
                                                  static_cast<int>(count), stream));
}

}  // namespace l3ext::cuda

#else

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

namespace l3ext::cuda {

// True if there is work to do. Its storage is garbage then, as a device algorithm would leave it.
inline bool spoil_storage(void* storage, size_t& bytes) {
  constexpr size_t kBytes = 1000;
  if (storage == nullptr) {
    bytes = kBytes;
    return false;
  }
  L3EXT_CHECK(bytes >= kBytes, "storage: expected ", kBytes, " bytes, got ", bytes);
  std::memset(storage, 0x5a, kBytes);
  return true;
}

inline void sort_pairs(void* storage, size_t& bytes, const uint32_t* keys, uint32_t* sorted_keys,
                       const int32_t* values, int32_t* sorted_values, int64_t count, int bits,
                       Stream) {
  if (!spoil_storage(storage, bytes)) return;
  const auto low_bits = [&](int64_t i) { return keys[i] & ((uint64_t{1} << bits) - 1); };
  std::vector<int64_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), int64_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t a, int64_t b) { return low_bits(a) < low_bits(b); });
  for (int64_t i = 0; i < count; ++i) {
    sorted_keys[i] = keys[order[i]];
    sorted_values[i] = values[order[i]];
  }
}

template <typename Predicate>
void select_indices(void* storage, size_t& bytes, const Predicate& predicate, int32_t* selected,
                    int32_t* num_selected, int64_t count, Stream) {
  if (!spoil_storage(storage, bytes)) return;
  *num_selected = 0;
  for (int32_t i = 0; i < count; ++i) {
    if (predicate(i)) selected[(*num_selected)++] = i;
  }
}

template <typename T, typename Element>
void inclusive_scan(void* storage, size_t& bytes, const Element& element, T* sums, int64_t count,
                    Stream) {
  if (!spoil_storage(storage, bytes)) return;
  T sum = {};
  for (int32_t i = 0; i < count; ++i) sums[i] = sum = sum + element(i);
}

}  // namespace l3ext::cuda

#endif
