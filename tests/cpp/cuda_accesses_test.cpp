// How the kernels' warps reach memory: every sector of global memory that a load or store touches is
// needed, and shared memory is read and written without bank conflicts; where that is not so, by
// how much. Arrays lie and rows end at multiples of 128 bytes here, as torch's do.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
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

}  // namespace

#include <typeinfo>
void show(const char* what, const std::vector<LaunchAccesses>& ls) {
  for (auto& l : ls) {
    for (auto& [k, c] : l.counts) {
      static const char* names[] = {"gload", "gstore", "sload", "sstore"};
      std::printf("%-28s %-30s %s%d: %ld instr, %ld trans, least %ld  ratio %.2f\n", what, l.args_type, names[(int)k.first], k.second, c.instructions, c.transactions, c.least, double(c.transactions)/double(c.least));
    }
  }
}
int main() {
  for (DType d : {DType::kBFloat16, DType::kFloat32}) {
    std::printf("%s\n", dtype_name(d));
    show("forward stream", Step(d, 140, 32, 8).forward());
    show("forward stream 150 rows", Step(d, 140, 160, 8).forward());
    show("forward dense", Step(d, 17, 160, 64).forward());
    show("forward slabs", Step(d, 140, 160, 8, true).forward());
    show("decode", Step(d, 10, 160, 8).forward());
    show("decode 1", Step(d, 40, 32, 1).forward());
    show("backward stream", Step(d, 140, 32, 8).backward());
    show("backward dense", Step(d, 17, 160, 64).backward());
    show("backward whole", Step(d, 35, 160, 32).backward());
  }
  Array a(1 << 20), b(1 << 20);
}
