// The CUDA kernels on a real device against the CPU's, on steps small enough for compute-sanitizer:
// every kernel in every dtype. Skipped (exit code 77) where there is no device.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "../../benchmarks/cuda_memory.hpp"
#include "attention/cuda/schedule.hpp"
#include "attention/cuda/segmented_attention.hpp"
#include "attention/plan_buffers.hpp"
#include "check.hpp"
#include "core/cuda_devices.hpp"
#include "core/dtype.hpp"

using l3ext::DType;
using l3ext::bench::DeviceMemory;
using l3ext::bench::Memory;
using l3ext::bench::on_device;

namespace {

// Elements of any of the three dtypes, by their bits; conversions good enough to compare with.
float to_float(DType dtype, const std::byte* p) {
  uint32_t bits = 0;
  std::memcpy(&bits, p, l3ext::dtype_bytes(dtype));
  if (dtype == DType::kBFloat16) bits <<= 16;
  if (dtype == DType::kFloat16) {
    const int exponent = static_cast<int>(bits >> 10 & 31);
    const float mantissa = static_cast<float>(bits & 1023) / 1024;
    const float magnitude = exponent == 31  ? NAN
                            : exponent == 0 ? std::ldexp(mantissa, -14)
                                            : std::ldexp(1 + mantissa, exponent - 15);
    return (bits & 0x8000) != 0 ? -magnitude : magnitude;
  }
  float value = 0;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Between 1/16 and 1/4 in magnitude, of either sign, whatever the dtype.
std::vector<std::byte> random_elements(DType dtype, int64_t count, uint32_t seed) {
  std::mt19937 random(seed);
  const auto size = static_cast<int64_t>(l3ext::dtype_bytes(dtype));
  std::vector<std::byte> bytes(static_cast<size_t>(count * size));
  for (int64_t i = 0; i < count; ++i) {
    const auto r = static_cast<uint32_t>(random());
    uint32_t bits = 0;
    if (dtype == DType::kFloat32) bits = (r & 0x80ffffff) | 0x3d800000;
    if (dtype == DType::kBFloat16) bits = (r & 0x80ff) | 0x3d80;
    if (dtype == DType::kFloat16) bits = (r & 0x87ff) | 0x2c00;
    std::memcpy(bytes.data() + i * size, &bits, static_cast<size_t>(size));
  }
  return bytes;
}

struct Arrays {
  std::vector<std::byte> y, dx, dtable;
};

// One step: the same arrays for the host and for the device.
struct Step {
  static constexpr int64_t kDIn = 128;

  DType dtype;
  int64_t tokens;
  bool tied;  // values are the keys
  int64_t d_emb, width;
  std::vector<int64_t> offsets{0}, ids;
  std::vector<std::byte> x, dy, table;
  l3ext::PlanBuffers plan;

  Step(DType type, int64_t num_tokens, bool tied_table)
      : dtype(type),
        tokens(num_tokens),
        tied(tied_table),
        d_emb(tied ? kDIn : 64),
        width(tied ? kDIn : kDIn + d_emb) {
    for (const int64_t rows : {40, 100, 1, 2, 17, 64, 130, 1, 9}) {
      offsets.push_back(offsets.back() + rows);
    }
    // However many positions there are, one token has 3 of them and one 12: stream chunks, and what
    // slabs take of the dense ones.
    std::mt19937 random(3);
    for (int64_t i = 0; i < tokens; ++i) {
      ids.push_back(i % 3 == 1 && i < 45 ? (i < 9 ? 0 : 1)
                                         : 2 + static_cast<int64_t>(random() % 7));
    }
    x = random_elements(dtype, tokens * kDIn, 4);
    dy = random_elements(dtype, tokens * d_emb, 5);
    table = random_elements(dtype, offsets.back() * width, 6);
    plan.make(ids, offsets);
  }

  int64_t bytes_of(int64_t elements) const {
    return elements * static_cast<int64_t>(l3ext::dtype_bytes(dtype));
  }

  int64_t value_bytes() const { return tied ? 0 : bytes_of(kDIn); }  // from a row's start

  // Parameters over arrays that lie at these addresses, all with rows of their own width.
  template <typename Params>
  void fill(Params& params, const std::byte* x_at, const std::byte* table_at) const {
    params.dtype = dtype;
    params.x = {x_at, kDIn};
    params.keys = {table_at, width};
    params.values = {table_at + value_bytes(), width};
    params.table_rows = offsets.back();
    params.d_in = kDIn;
    params.d_emb = d_emb;
    params.scale = 0.5;
  }
  l3ext::SegmentedAttentionBackwardParams backward(const std::byte* x_at, const std::byte* table_at,
                                                   const std::byte* dy_at, std::byte* dx_at,
                                                   std::byte* dtable_at) const {
    l3ext::SegmentedAttentionBackwardParams params;
    fill(params, x_at, table_at);
    params.dy = {dy_at, d_emb};
    params.dx = {dx_at, kDIn};
    params.dkeys = {dtable_at, width};
    if (!tied) params.dvalues = {dtable_at + value_bytes(), width};
    return params;
  }
};

Arrays run_on_host(const Step& step) {
  Arrays out;
  out.y.resize(step.bytes_of(step.tokens * step.d_emb));
  out.dx.resize(step.x.size());
  out.dtable.resize(step.table.size());
  l3ext::SegmentedAttentionParams forward;
  step.fill(forward, step.x.data(), step.table.data());
  forward.plan = step.plan.view();
  forward.y = {out.y.data(), step.d_emb};
  l3ext::segmented_attention(forward);
  auto backward = step.backward(step.x.data(), step.table.data(), step.dy.data(), out.dx.data(),
                                out.dtable.data());
  backward.plan = step.plan.view();
  l3ext::segmented_attention_backward(backward);
  return out;
}

template <typename T>
std::vector<T> to_host(const Memory& memory, size_t count) {
  std::vector<T> values(count);
  L3EXT_CUDA_CHECK(
      cudaMemcpy(values.data(), memory->as<T>(), count * sizeof(T), cudaMemcpyDeviceToHost));
  return values;
}

Memory upload(const std::vector<std::byte>& bytes) {
  return on_device(bytes.data(), static_cast<int64_t>(bytes.size()));
}

// For outputs: all ones, which is NaN in every dtype.
Memory poisoned(int64_t bytes) {
  auto memory = std::make_unique<DeviceMemory>(bytes);
  L3EXT_CUDA_CHECK(cudaMemset(memory->as<void>(), 0xff, static_cast<size_t>(bytes)));
  return memory;
}

// Of a workspace of exactly the size asked for, so that a sanitizer sees what is beyond it.
template <typename Run>
void with_workspace(int64_t bytes, Run&& run) {
  const DeviceMemory workspace(bytes);
  run(l3ext::cuda::Launch{nullptr, workspace.as<void>(), bytes});
  L3EXT_CUDA_CHECK(cudaDeviceSynchronize());
}

Arrays run_on_device(const Step& step) {
  const int64_t n = step.tokens;
  const Memory ids = on_device(step.ids.data(), n);
  const Memory offsets = on_device(step.offsets.data(), std::ssize(step.offsets));
  const auto permutation = std::make_unique<DeviceMemory>(4 * n);
  const auto tokens = std::make_unique<DeviceMemory>(4 * n);
  const auto queries = std::make_unique<DeviceMemory>(4 * (n + 1));
  const auto rows = std::make_unique<DeviceMemory>(16 * n);
  const auto num_segments = std::make_unique<DeviceMemory>(4);
  const auto table_rows = std::make_unique<DeviceMemory>(8);
  const DeviceMemory schedule(4 * l3ext::cuda::schedule_entries(n));
  l3ext::PlanParams params;
  params.token_ids = ids->as<void>();
  params.num_tokens = n;
  params.offsets = offsets->as<int64_t>();
  params.vocab_size = std::ssize(step.offsets) - 1;
  params.check_offsets = false;
  params.permutation = permutation->as<int32_t>();
  params.segment_tokens = tokens->as<int32_t>();
  params.segment_queries = queries->as<int32_t>();
  params.segment_rows = rows->as<int64_t>();
  params.num_segments = num_segments->as<int32_t>();
  params.table_rows = table_rows->as<int64_t>();
  with_workspace(l3ext::cuda::plan_workspace(params), [&](const l3ext::cuda::Launch& launch) {
    l3ext::cuda::plan(params, schedule.as<int32_t>(), launch);
  });
  EXPECT(to_host<int32_t>(permutation, n) == step.plan.permutation);
  EXPECT(to_host<int32_t>(tokens, n) == step.plan.segment_tokens);
  EXPECT(to_host<int32_t>(queries, n + 1) == step.plan.segment_queries);
  EXPECT(to_host<int64_t>(rows, 2 * n) == step.plan.segment_rows);
  EXPECT(to_host<int32_t>(num_segments, 1)[0] == step.plan.num_segments);
  EXPECT(to_host<int64_t>(table_rows, 1)[0] == step.plan.table_rows);

  l3ext::PlanView view;
  view.permutation = permutation->as<int32_t>();
  view.segment_queries = queries->as<int32_t>();
  view.segment_rows = rows->as<int64_t>();
  view.segment_tokens = tokens->as<int32_t>();
  view.num_tokens = n;
  view.schedule = schedule.as<int32_t>();
  view.max_rows = 130;

  const Memory x = upload(step.x), dy = upload(step.dy), table = upload(step.table);
  const int64_t y_bytes = step.bytes_of(n * step.d_emb);
  const Memory y = poisoned(y_bytes), through_addresses = poisoned(y_bytes);
  l3ext::SegmentedAttentionParams forward;
  step.fill(forward, x->as<std::byte>(), table->as<std::byte>());
  forward.plan = view;
  const auto attend = [&](const Memory& to) {
    forward.y = {to->as<void>(), step.d_emb};
    with_workspace(l3ext::cuda::segmented_attention_workspace(forward),
                   [&](const l3ext::cuda::Launch& launch) {
                     l3ext::cuda::segmented_attention(forward, launch);
                   });
  };
  attend(y);
  // The same rows behind the address of each token's first.
  std::vector<int64_t> addresses;
  for (const int64_t first : step.offsets) {
    addresses.push_back(static_cast<int64_t>(
        reinterpret_cast<uintptr_t>(table->as<std::byte>() + step.bytes_of(first * step.width))));
  }
  const Memory directory = on_device(addresses.data(), params.vocab_size);
  forward.directory = directory->as<int64_t>();
  forward.vocab_size = params.vocab_size;
  forward.keys.data = forward.values.data = nullptr;
  forward.value_offset = step.tied ? 0 : Step::kDIn;
  attend(through_addresses);
  const auto size = static_cast<size_t>(y_bytes);
  EXPECT(to_host<std::byte>(y, size) == to_host<std::byte>(through_addresses, size));

  const Memory dx = poisoned(static_cast<int64_t>(step.x.size()));
  const Memory dtable = poisoned(static_cast<int64_t>(step.table.size()));
  auto backward = step.backward(x->as<std::byte>(), table->as<std::byte>(), dy->as<std::byte>(),
                                dx->as<std::byte>(), dtable->as<std::byte>());
  backward.plan = view;
  with_workspace(l3ext::cuda::segmented_attention_backward_workspace(backward),
                 [&](const l3ext::cuda::Launch& launch) {
                   l3ext::cuda::segmented_attention_backward(backward, launch);
                 });
  return {to_host<std::byte>(y, size), to_host<std::byte>(dx, step.x.size()),
          to_host<std::byte>(dtable, step.table.size())};
}

// Largest difference over the largest value; both sides round to the dtype.
bool close(DType dtype, const std::vector<std::byte>& got, const std::vector<std::byte>& expected,
           const char* what) {
  double worst = 0, largest = 0;
  bool finite = got.size() == expected.size();
  for (size_t i = 0; finite && i < got.size(); i += l3ext::dtype_bytes(dtype)) {
    const double g = to_float(dtype, got.data() + i), e = to_float(dtype, expected.data() + i);
    finite = std::isfinite(g);
    worst = std::max(worst, std::abs(g - e));
    largest = std::max(largest, std::abs(e));
  }
  const double tolerance = dtype == DType::kFloat32   ? 1e-5
                           : dtype == DType::kFloat16 ? 2e-3
                                                      : 1.5e-2;
  if (finite && worst <= tolerance * largest) return true;
  std::fprintf(stderr, "%s, %s: %.2e of the largest value, tolerance %.2e\n", what,
               l3ext::dtype_name(dtype), finite ? worst / largest : NAN, tolerance);
  return false;
}

// Above 1024 tokens run the forward kernels, below the decode kernel; some segments are dense.
template <int64_t Tokens, bool Tied>
void device_and_host_agree() {
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    const Step step(dtype, Tokens, Tied);
    const Arrays expected = run_on_host(step), got = run_on_device(step);
    EXPECT(close(dtype, got.y, expected.y, "y"));
    EXPECT(close(dtype, got.dx, expected.dx, "dx"));
    EXPECT(close(dtype, got.dtable, expected.dtable, "dtable"));
  }
}

}  // namespace

int main() {
  if (l3ext::cuda_devices().empty()) {
    std::puts("skipped: no CUDA device here");
    return 77;
  }
  RUN((device_and_host_agree<1, false>));
  RUN((device_and_host_agree<50, false>));
  RUN((device_and_host_agree<1100, false>));
  RUN((device_and_host_agree<50, true>));
  RUN((device_and_host_agree<1100, true>));
  return check::failures == 0 ? 0 : 1;
}
