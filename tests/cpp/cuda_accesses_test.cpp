// How the kernels' warps reach memory: every sector of global memory that a load or store touches
// is needed, and shared memory is read and written without bank conflicts; where that is not so, by
// how much. Arrays lie and rows end at multiples of 128 bytes here, as torch's do.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <map>
#include <utility>
#include <vector>

#include "attention/cuda/schedule.hpp"
#include "attention/cuda/segmented_attention.hpp"
#include "attention/plan_buffers.hpp"
#include "check.hpp"
#include "core/cuda/primitives.cuh"
#include "runtime/cuda/fetch_blocks.hpp"

using namespace l3ext;
using namespace l3ext::cuda;

namespace {

constexpr int64_t kDIn = 256, kDEmb = 128;

class Array {
 public:
  explicit Array(int64_t bytes) : storage_(static_cast<size_t>(bytes) + 256) {}
  std::byte* data() const {
    const auto begin = reinterpret_cast<uintptr_t>(storage_.data());
    return const_cast<std::byte*>(storage_.data()) + (256 - begin % 256) % 256;
  }

 private:
  std::vector<std::byte> storage_;  // zeros, which every dtype takes for numbers
};

// `tokens` tokens of `rows` rows with `queries` queries each, in order.
struct Step {
  Step(DType type, int64_t tokens, int64_t rows, int64_t queries, bool tied_table = false)
      : dtype(type),
        tied(tied_table),
        count(tokens * queries),
        table_rows(tokens * rows),
        max_rows(rows),
        x(bytes_of(count * kDIn)),
        dx(bytes_of(count * kDIn)),
        y(bytes_of(count * kDEmb * 2)),
        table(bytes_of(table_rows * (kDIn + kDEmb))),
        gradients(bytes_of(table_rows * (kDIn + kDEmb))),
        schedule(4 * schedule_entries(count)) {
    std::vector<int64_t> ids, offsets{0};
    for (int64_t t = 0; t < tokens; ++t) {
      ids.insert(ids.end(), static_cast<size_t>(queries), t);
      offsets.push_back(offsets.back() + rows);
    }
    plan.make(ids, offsets);
    make_schedule(plan.view(), reinterpret_cast<int32_t*>(schedule.data()));
  }

  int64_t bytes_of(int64_t elements) const {
    return elements * static_cast<int64_t>(dtype_bytes(dtype));
  }
  int64_t d_emb() const { return tied ? kDIn : kDEmb; }

  template <typename Params>
  Params params() {
    const int64_t stride = tied ? kDIn : kDIn + kDEmb;
    Params params;
    params.dtype = dtype;
    params.plan = plan.view();
    params.plan.schedule = reinterpret_cast<int32_t*>(schedule.data());
    params.plan.max_rows = max_rows;
    params.x = {x.data(), kDIn};
    params.keys = {table.data(), stride};
    params.values = {table.data() + (tied ? 0 : bytes_of(kDIn)), stride};
    params.table_rows = table_rows;
    params.d_in = kDIn;
    params.d_emb = d_emb();
    return params;
  }

  std::vector<LaunchAccesses> forward() {
    auto params = this->params<SegmentedAttentionParams>();
    params.y = {y.data(), d_emb()};
    const Array workspace(segmented_attention_workspace(params));
    AccessCounter counter;
    segmented_attention(params, {nullptr, workspace.data(), segmented_attention_workspace(params)});
    return std::move(counter.launches);
  }
  std::vector<LaunchAccesses> backward() {
    auto params = this->params<SegmentedAttentionBackwardParams>();
    const int64_t stride = params.keys.stride;
    params.dy = {y.data(), d_emb()};
    params.dx = {dx.data(), kDIn};
    params.dkeys = {gradients.data(), stride};
    if (!tied) params.dvalues = {gradients.data() + bytes_of(kDIn), stride};
    const int64_t bytes = segmented_attention_backward_workspace(params);
    const Array workspace(bytes);
    AccessCounter counter;
    segmented_attention_backward(params, {nullptr, workspace.data(), bytes});
    return std::move(counter.launches);
  }

  DType dtype;
  bool tied;
  int64_t count, table_rows, max_rows;
  Array x, dx, y, table, gradients, schedule;
  PlanBuffers plan;
};

// --- the counter ---------------------------------------------------------------------------------
struct PatternArgs {
  const float* in;
  int stride;  // floats from lane to lane
};
// Everything twice, and by a second warp that reads one element alone.
__global__ void pattern(PatternArgs args) {
  auto* shared = reinterpret_cast<float*>(dynamic_shared());
  const int lane = static_cast<int>(threadIdx.x % 32), at = threadIdx.x < 32 ? lane : 0;
  for (int i = 0; i < 2; ++i) {
    const float value = __ldg(args.in + at * args.stride);
    store_shared(shared + at * args.stride, value);
    __syncthreads();
  }
}
struct RoundsArgs {
  const float4* in;
};
// Lanes leave after one, two or three rounds.
__global__ void rounds(RoundsArgs args) {
  const int lane = static_cast<int>(threadIdx.x);
  for (int i = 0; i <= lane % 3; ++i) load_streaming(args.in + 32 * i + lane);
}
struct WideArgs {
  int stride;  // of 16 bytes
};
__global__ void wide(WideArgs args) {
  auto* shared = reinterpret_cast<float4*>(dynamic_shared());
  store_shared(shared + threadIdx.x * args.stride, float4{});
}

template <typename Args>
LaunchAccesses counted(void (*kernel)(Args), int threads, const Args& args) {
  resident_blocks(kernel, threads, 64 * 1024);
  AccessCounter counter;
  launch(kernel, 1, threads, 64 * 1024, nullptr, args);
  return counter.launches.at(0);
}

bool is(const AccessCount& count, int64_t instructions, int64_t transactions, int64_t least) {
  return count.instructions == instructions && count.transactions == transactions &&
         count.least == least;
}

void sectors_and_banks_are_counted() {
  const Array in(64 * 1024);
  const auto* floats = reinterpret_cast<const float*>(in.data());
  const auto expect = [&](int stride, int64_t sectors, int64_t wavefronts) {
    const LaunchAccesses counts = counted(pattern, 64, PatternArgs{floats, stride});
    // Two rounds of each warp; the second warp's are a sector and a word.
    const int64_t least = stride == 0 ? 1 : 4;
    EXPECT(is(counts.of(Access::kGlobalLoad, 4), 4, 2 * (sectors + 1), 2 * (least + 1)));
    EXPECT(is(counts.of(Access::kSharedStore, 4), 4, 2 * (wavefronts + 1), 4));
    EXPECT(is(counts.of(Access::kSharedLoad, 4), 0, 0, 0));
  };
  expect(0, 1, 1);  // all lanes the same word: one pass
  expect(1, 4, 1);
  expect(2, 8, 2);
  expect(8, 32, 8);
  expect(9, 32, 1);
  expect(32, 32, 32);
  // A sector that begins in the middle of one costs one more.
  EXPECT(is(counted(pattern, 32, PatternArgs{floats + 1, 1}).of(Access::kGlobalLoad, 4), 2, 10, 8));
  // 16 bytes: a quarter of the warp at a time.
  EXPECT(is(counted(wide, 32, WideArgs{1}).of(Access::kSharedStore, 16), 1, 4, 4));
  EXPECT(is(counted(wide, 32, WideArgs{2}).of(Access::kSharedStore, 16), 1, 8, 4));
  EXPECT(is(counted(wide, 32, WideArgs{8}).of(Access::kSharedStore, 16), 1, 32, 4));
}

void lanes_that_leave_a_loop_are_missing_from_its_last_rounds() {
  const Array in(64 * 1024);
  const auto counts = counted(rounds, 32, RoundsArgs{reinterpret_cast<const float4*>(in.data())});
  const AccessCount loads = counts.of(Access::kGlobalLoad, 16);
  EXPECT(loads.instructions == 3);
  EXPECT(loads.least == 16 + 11 + 5);  // 32, 21 and 10 lanes of 16 bytes
}

void nothing_is_counted_without_a_counter() {
  const Array in(4096);
  const auto* floats = reinterpret_cast<const float*>(in.data());
  resident_blocks(pattern, 64, 64 * 1024);
  AccessCounter counter;
  EXPECT_THROWS(Error, AccessCounter());  // nor two
  EXPECT(counter.launches.empty());
  launch(pattern, 1, 64, 64 * 1024, nullptr, PatternArgs{floats, 1});
  EXPECT(counter.launches.size() == 1);
}

// --- the kernels ---------------------------------------------------------------------------------
// More than the least, and why.
struct Excess {
  Access access;
  int bytes;
  double factor;  // at most
};
// Row numbers of the queries: a few bytes beside kilobytes of rows, and read again from L1.
constexpr Excess kRowNumbers = {Access::kGlobalLoad, 4, 3.0};

constexpr const char* kNames[] = {"global loads", "global stores", "shared loads", "shared stores"};

// All accesses of these kinds are there, and none takes more than the least but for `excesses`.
bool least(const std::vector<LaunchAccesses>& launches,
           const std::vector<std::pair<Access, int>>& kinds, std::vector<Excess> excesses = {}) {
  excesses.push_back(kRowNumbers);
  std::map<std::pair<Access, int>, AccessCount> sums;
  for (const auto& kind : kinds) sums[kind] = {};
  for (const LaunchAccesses& launch : launches) {
    for (const auto& [kind, count] : launch.counts) sums[kind] += count;
  }
  bool right = true;
  for (const auto& [kind, sum] : sums) {
    double factor = 1;
    for (const Excess& e : excesses) {
      if (std::pair(e.access, e.bytes) == kind) factor = e.factor;
    }
    const auto allowed = static_cast<int64_t>(factor * static_cast<double>(sum.least));
    if (sum.instructions > 0 && sum.transactions <= allowed) continue;
    std::fprintf(stderr, "%s of %d bytes: %ld instructions, %ld transactions, least %ld\n",
                 kNames[static_cast<int>(kind.first)], kind.second,
                 static_cast<long>(sum.instructions), static_cast<long>(sum.transactions),
                 static_cast<long>(sum.least));
    right = false;
  }
  return right;
}

constexpr std::pair<Access, int> kLoads = {Access::kGlobalLoad, 16},
                                 kStores = {Access::kGlobalStore, 16},
                                 kWeights = {Access::kSharedLoad, 16},
                                 kScores = {Access::kSharedStore, 4},
                                 kStaged = {Access::kSharedStore, 16},
                                 kAcross = {Access::kSharedLoad, 4};

// Rows that fill several blocks of 16, and few, whose columns the warps share.
void forward_of_few_queries() {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const int64_t rows : {16, 32, 160}) {
      EXPECT(least(Step(dtype, 140, rows, 8).forward(), {kLoads, kStores, kWeights, kScores}));
    }
    EXPECT(least(Step(dtype, 1100, 16, 1).forward(), {kLoads, kStores, kWeights, kScores}));
  }
}

void forward_of_many_queries() {
  for (const int64_t rows : {32, 160, 272}) {
    EXPECT(least(Step(DType::kBFloat16, 17, rows, 64).forward(),
                 rows > 128 ? std::vector{kLoads, kStores, kWeights, kScores, kStaged}
                            : std::vector{kLoads, kStores, kWeights, kScores}));
    EXPECT(
        least(Step(DType::kFloat32, 17, rows, 64).forward(), {kLoads, kStores, kWeights, kScores}));
  }
}

void forward_of_tied_tables() {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const int64_t rows : {32, 160}) {
      EXPECT(least(Step(dtype, 140, rows, 8, true).forward(),
                   {kLoads, kStores, kWeights, kScores, kStaged}));
    }
  }
}

void decode() {
  for (const DType dtype : {DType::kBFloat16, DType::kFloat32}) {
    for (const auto& [tokens, queries] : {std::pair{1, 1}, {1, 8}, {10, 8}, {40, 1}}) {
      // Parts of 16 rows lie 20 apart, so that two queries' meet in four banks when they are added.
      EXPECT(least(Step(dtype, tokens, 160, queries).forward(),
                   {kLoads, kStores, kWeights, kScores, kStaged, kAcross},
                   {{Access::kSharedLoad, 4, 2.0}}));
    }
  }
}

void backward() {
  const std::vector always = {kLoads, kStores, kWeights, kScores};
  for (const int64_t rows : {32, 160}) {
    // Row gradients in the block that has the weights: of 8 queries, and in 16 bits of 32.
    std::vector with_rows = always;
    with_rows.push_back(kAcross);
    EXPECT(least(Step(DType::kBFloat16, 140, rows, 8).backward(), with_rows));
    EXPECT(least(Step(DType::kFloat32, 140, rows, 8).backward(), with_rows));
    EXPECT(least(Step(DType::kBFloat16, 35, rows, 32).backward(), with_rows));
    // Of more, the weights go to the workspace: transposed, and in float32 half a sector at a time.
    EXPECT(least(Step(DType::kBFloat16, 17, rows, 64).backward(), always,
                 {{Access::kSharedLoad, 4, 2.0}}));
    EXPECT(least(Step(DType::kFloat32, 17, rows, 64).backward(), always,
                 {{Access::kSharedLoad, 4, 2.0}, {Access::kGlobalStore, 16, 1.8}}));
  }
}

void rows_from_host_memory() {
  const Array target(100000), source(100000);
  for (const size_t bytes : {size_t{512}, size_t{6144}, size_t{98304}}) {
    const Copy copy = {target.data(), source.data(), bytes};
    AccessCounter counter;
    fetch_blocks({&copy, 1}, 2, nullptr);
    EXPECT(least(counter.launches, {kLoads, kStores}));
  }
}

}  // namespace

int main() {
  RUN(sectors_and_banks_are_counted);
  RUN(lanes_that_leave_a_loop_are_missing_from_its_last_rounds);
  RUN(nothing_is_counted_without_a_counter);
  RUN(forward_of_few_queries);
  RUN(forward_of_many_queries);
  RUN(forward_of_tied_tables);
  RUN(decode);
  RUN(backward);
  RUN(rows_from_host_memory);
  return check::failures == 0 ? 0 : 1;
}
