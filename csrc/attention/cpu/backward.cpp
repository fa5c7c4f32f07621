// Backward on the CPU, without atomics. A segment of few enough queries is one unit: scores, p and
// ds, dx, then the gradients of its rows, all while its queries are in the cache. A segment of many
// is several units; their p, ds and queries lie in a bounded workspace until all are there, then
// slices of its rows are summed over the queries, in order, each by one thread.
#include <algorithm>
#include <cstddef>
#include <span>
#include <utility>
#include <vector>

#include "attention/cpu/ahead.hpp"
#include "attention/cpu/row_kernels.hpp"
#include "attention/cpu/run_units.hpp"
#include "attention/cpu/schedule.hpp"
#include "attention/segmented_attention.hpp"
#include "core/error.hpp"
#include "core/huge_pages.hpp"
#include "core/parallel.hpp"
#include "core/scratch.hpp"

namespace l3ext {
namespace cpu {
namespace {

template <typename T>
class Backward {
 public:
  using Acc = Accumulator<T>;

  explicit Backward(const SegmentedAttentionBackwardParams& params)
      : p_(params), kernels_(row_kernels<T>(active_cpu_isa())) {}

  void run() {
    advise_huge_pages(p_.dx.data, extent<T>(p_.dx, p_.plan.num_tokens));
    const int64_t rows = p_.segment_gradients == nullptr ? p_.table_rows : p_.gradient_rows;
    advise_huge_pages(p_.dkeys.data, extent<T>(p_.dkeys, rows));
    advise_huge_pages(p_.dvalues.data, extent<T>(p_.dvalues, rows));
    // Half of a small last-level cache, of which other data want their share.
    constexpr int64_t kCachedBytes = int64_t{16} << 20;
    const int64_t width = p_.d_in + (tied() ? 0 : p_.d_emb);
    past_caches_ = rows * width * static_cast<int64_t>(sizeof(T)) > kCachedBytes;
    if (wants_rows() && p_.segment_gradients == nullptr) zero_untouched();
    const std::vector<Unit> units =
        make_units(p_.plan, kernels_.query_lanes, kernels_.backward_block);
    std::vector<Unit> whole;
    std::vector<std::span<const Unit>> shared;  // the units of one segment each
    for (size_t begin = 0, end = 0; begin < units.size(); begin = end) {
      while (end < units.size() && units[end].segment == units[begin].segment) ++end;
      if (end - begin == 1 || !wants_rows()) {
        whole.insert(whole.end(), units.begin() + begin, units.begin() + end);
      } else {
        shared.emplace_back(units.data() + begin, end - begin);
      }
    }
    // Segments until the workspace is full; one larger than it has it alone. Whole units run beside
    // the first of them.
    size_t begin = 0;
    do {
      Carver sizes;
      size_t end = begin;
      while (end < shared.size() && (end == begin || sizes.bytes() < kWorkspaceBytes)) {
        for (const Unit& unit : shared[end]) carve(sizes, unit);
        ++end;
      }
      run_group(whole, {shared.begin() + begin, shared.begin() + end}, sizes.bytes());
      whole.clear();
      begin = end;
      if (sizes.bytes() > 2 * kWorkspaceBytes) workspace().release();
    } while (begin < shared.size());
  }

  // What run_units() asks for.
  int64_t d_in() const { return p_.d_in; }
  int64_t d_emb() const { return p_.d_emb; }
  RowBlock<T> keys(const Unit& unit) const {
    return {at(p_.keys, unit.row_begin), p_.keys.stride, unit.rows()};
  }
  RowBlock<T> values(const Unit& unit) const {
    return {at(p_.values, unit.row_begin), p_.values.stride, unit.rows()};
  }
  void wish_for_queries(const Unit& unit, WishList& wishes) const {
    for (int64_t q = unit.query_begin; q < unit.query_end; ++q) {
      const int64_t position = p_.plan.permutation[q];
      wishes.add(range_of(RowBlock<T>{at(p_.dy, position), p_.d_emb, 1}, p_.d_emb));
      if (unit.rows() > 1) {
        wishes.add(range_of(RowBlock<T>{at(p_.x, position), p_.d_in, 1}, p_.d_in));
      }
    }
  }

 private:
  // What row gradients need of a unit.
  struct Saved {
    T* x;     // [queries, d_in]
    T* dy;    // [queries, d_emb]
    Acc* p;   // [rows, padded queries]
    Acc* ds;  // likewise
    int64_t queries;
    int64_t padded;
  };

  Saved carve(Carver& carver, const Unit& unit) const {
    Saved saved;
    saved.queries = unit.queries();
    saved.padded = kernels_.padded(unit.queries());
    saved.x = carver.take<T>(unit.queries() * p_.d_in);
    saved.dy = carver.take<T>(unit.queries() * p_.d_emb);
    saved.p = carver.take<Acc>(unit.rows() * saved.padded);
    saved.ds = carver.take<Acc>(unit.rows() * saved.padded);
    return saved;
  }

  // What a thread needs besides: for one unit's queries, or for a slice of a segment's rows.
  struct Work {
    const T** queries;  // [queries], where the saved x or dy lie
    Acc* packed;        // these, as the kernel wants them
    Acc* softmax_sums;  // [padded queries]
    Acc* sums;          // [queries or rows of a slice, stride_]: gradients
  };

  Work carve_work(Carver& carver, int64_t queries) const {
    Work work;
    work.queries = carver.take<const T*>(queries);
    work.packed = carver.take<Acc>(std::max(kernels_.packed_elements(queries, p_.d_in),
                                            kernels_.packed_elements(queries, p_.d_emb)));
    work.softmax_sums = carver.take<Acc>(kernels_.padded(queries));
    work.sums = carver.take<Acc>(std::max(kRowSlice, queries) * stride_);
    return work;
  }

  bool wants_dx() const { return p_.dx.data != nullptr; }
  bool wants_rows() const { return p_.dkeys.data != nullptr; }
  bool tied() const { return p_.dvalues.data == nullptr; }

  static const T* at(const Rows& rows, int64_t i) {
    return static_cast<const T*>(rows.data) + i * rows.stride;
  }
  static T* at(const MutableRows& rows, int64_t i) {
    return static_cast<T*>(rows.data) + i * rows.stride;
  }

  void zero_rows(int64_t begin, int64_t end) const {
    store_rows(zeros_.data(), 0, p_.dkeys, begin, end - begin, p_.d_in);
    if (!tied()) store_rows(zeros_.data(), 0, p_.dvalues, begin, end - begin, p_.d_emb);
  }

  void zero_untouched() const {
    constexpr int64_t kSlice = 1024;
    std::vector<std::pair<int64_t, int64_t>> gaps;
    const auto add = [&](int64_t begin, int64_t end) {
      for (; begin < end; begin += kSlice) gaps.emplace_back(begin, std::min(begin + kSlice, end));
    };
    int64_t next = 0;
    for (int64_t s = 0; s < p_.plan.num_segments; ++s) {
      add(next, p_.plan.segment_rows[2 * s]);
      next = p_.plan.segment_rows[2 * s + 1];
    }
    add(next, p_.table_rows);
    parallel_for(p_.num_threads, static_cast<int64_t>(gaps.size()),
                 [&](int64_t i) { zero_rows(gaps[i].first, gaps[i].second); });
  }

  // What shared segments need, kept between calls: fresh memory would cost a tenth of a step.
  static constexpr size_t kWorkspaceBytes = size_t{64} << 20;
  static Scratch& workspace() {
    thread_local Scratch scratch;
    return scratch;
  }

  // All of the whole units, and all units of some shared segments, which need `bytes` of workspace.
  void run_group(const std::vector<Unit>& whole, const std::vector<std::span<const Unit>>& segments,
                 size_t bytes) {
    Carver carver(bytes == 0 ? nullptr : workspace().get(bytes));

    std::vector<Unit> units = whole;
    std::vector<Saved> saved;
    struct Slice {
      std::span<const Saved> of;
      const Unit* segment;
      int64_t begin;
      int64_t end;
    };
    std::vector<Slice> slices;
    for (const auto& segment : segments) {
      for (const Unit& unit : segment) {
        units.push_back(unit);
        saved.push_back(carve(carver, unit));
      }
    }
    const Saved* first = saved.data();
    for (const auto& segment : segments) {
      for (int64_t r = 0; r < segment[0].rows(); r += kRowSlice) {
        const int64_t end = std::min(r + kRowSlice, segment[0].rows());
        slices.push_back({{first, segment.size()}, &segment[0], r, end});
      }
      first += segment.size();
    }
    run_units(p_.num_threads, kernels_, *this, units,
              [&](int64_t i, const Unit& unit, const Unit*, Wanted& wanted) {
                const bool is_whole = i < std::ssize(whole);
                Carver sizes;
                if (is_whole) carve(sizes, unit);
                carve_work(sizes, unit.queries());
                Carver scratch(thread_scratch(sizes.bytes()));
                const Saved of = is_whole ? carve(scratch, unit) : saved[i - whole.size()];
                const Work work = carve_work(scratch, unit.queries());
                query_gradients(unit, of, work, wanted);
                if (is_whole && wants_rows()) {
                  row_gradients(unit, {&of, 1}, 0, unit.rows(), work.sums, wanted);
                }
              });
    parallel_for(p_.num_threads, static_cast<int64_t>(slices.size()), [&](int64_t i) {
      Carver sizes;
      carve_work(sizes, 0);
      Carver scratch(thread_scratch(sizes.bytes()));
      const Slice& slice = slices[i];
      Wanted nothing(nullptr, nullptr);
      row_gradients(*slice.segment, slice.of, slice.begin, slice.end, carve_work(scratch, 0).sums,
                    nothing);
    });
  }

  // dx of the unit's queries, and what the gradients of its rows need.
  void query_gradients(const Unit& unit, const Saved& saved, const Work& work,
                       Wanted& wanted) const {
    const int64_t rows = unit.rows(), queries = unit.queries();
    const int32_t* positions = p_.plan.permutation + unit.query_begin;
    for (int64_t q = 0; q < queries; ++q) {
      std::copy_n(at(p_.dy, positions[q]), p_.d_emb, saved.dy + q * p_.d_emb);
    }
    if (rows <= 1) {  // the softmax of one score is 1 and does not depend on it
      std::fill_n(saved.p, rows * saved.padded, Acc{1});
      if (wants_dx()) {
        for (int64_t q = 0; q < queries; ++q) std::fill_n(at(p_.dx, positions[q]), p_.d_in, T{});
      }
      return;
    }
    for (int64_t q = 0; q < queries; ++q) {
      std::copy_n(at(p_.x, positions[q]), p_.d_in, saved.x + q * p_.d_in);
    }
    const RowBlock<T> keys = this->keys(unit), values = this->values(unit);
    const Acc scale = static_cast<Acc>(p_.scale);
    const auto score = [&](const T* of, int64_t depth, const RowBlock<T>& block, Acc factor,
                           const Ahead<T>& ahead, Acc* scores) {
      for (int64_t q = 0; q < queries; ++q) work.queries[q] = of + q * depth;
      kernels_.pack(work.queries, queries, depth, work.packed);
      kernels_.scores(block, work.packed, queries, depth, factor, ahead, scores);
    };
    score(saved.x, p_.d_in, keys, scale, {values, &wanted}, saved.p);
    kernels_.exponentials(saved.p, rows, queries, work.softmax_sums);
    score(saved.dy, p_.d_emb, values, Acc{1}, {keys, &wanted}, saved.ds);
    kernels_.softmax_backward(saved.p, work.softmax_sums, saved.ds, rows, queries, scale);
    if (!wants_dx()) return;
    kernels_.accumulate(keys, saved.ds, 1, saved.padded, queries, p_.d_in, {{}, &wanted},
                        /*add=*/false, work.sums, stride_);
    for (int64_t q = 0; q < queries; ++q) {
      kernels_.store(work.sums + q * stride_, Acc{1}, at(p_.dx, positions[q]), p_.d_in);
    }
  }

  // Gradients of the rows [begin, end) of a segment whose queries are those of `parts`, in order.
  void row_gradients(const Unit& segment, std::span<const Saved> parts, int64_t begin, int64_t end,
                     Acc* sums, Wanted& wanted) const {
    const int64_t first =
        p_.segment_gradients == nullptr ? segment.row_begin : p_.segment_gradients[segment.segment];
    for (int64_t r = begin; r < end; r += kRowSlice) {
      const int64_t count = std::min(kRowSlice, end - r);
      const auto write = [&](const MutableRows& to, int64_t columns) {
        store_rows(sums, stride_, to, first + r, count, columns);
      };
      // Of the rows' slice, from the weights and queries that each part has; sums of the parts.
      const auto sum = [&](auto weights, auto queries, int64_t columns, bool add) {
        for (const Saved& part : parts) {
          kernels_.accumulate({queries(part), columns, part.queries},
                              weights(part) + r * part.padded, part.padded, 1, count, columns,
                              {{}, &wanted}, add || &part != parts.data(), sums, stride_);
        }
      };
      if (segment.rows() > 1) {
        sum([](const Saved& part) { return part.ds; }, [](const Saved& part) { return part.x; },
            p_.d_in, /*add=*/false);
      } else {
        std::fill_n(sums, count * stride_, Acc{});
      }
      if (!tied()) write(p_.dkeys, p_.d_in);
      sum([](const Saved& part) { return part.p; }, [](const Saved& part) { return part.dy; },
          p_.d_emb, /*add=*/tied());
      write(tied() ? p_.dkeys : p_.dvalues, p_.d_emb);
    }
  }

  // Gradients of rows that no cache will hold are written past them.
  void store_rows(const Acc* from, int64_t from_stride, const MutableRows& to, int64_t begin,
                  int64_t count, int64_t columns) const {
    if (past_caches_) {
      return kernels_.store_past_caches(from, from_stride, at(to, begin), to.stride, count,
                                        columns);
    }
    for (int64_t i = 0; i < count; ++i) {
      kernels_.store(from + i * from_stride, Acc{1}, at(to, begin + i), columns);
    }
  }

  // Rows whose gradients are summed at once: they and their queries stay in the second-level cache.
  static constexpr int64_t kRowSlice = 64;

  const SegmentedAttentionBackwardParams& p_;
  const RowKernels<T>& kernels_;
  const int64_t stride_ = spread<Acc>(std::max(p_.d_in, p_.d_emb));
  const std::vector<Acc> zeros_ = std::vector<Acc>(static_cast<size_t>(stride_));
  bool past_caches_ = false;
};

}  // namespace
}  // namespace cpu

void segmented_attention_backward(const SegmentedAttentionBackwardParams& params) {
  L3EXT_CHECK(params.directory == nullptr,
              "directory: expected none, rows behind it have no "
              "gradient");
  cpu::check_plan(params.plan, params.table_rows, params.dkeys.data != nullptr);
  if (params.segment_gradients != nullptr) cpu::check_gradient_rows(params);
  dispatch_float(params.dtype, "x",
                 [&](auto tag) { cpu::Backward<typename decltype(tag)::type>(params).run(); });
}

}  // namespace l3ext
