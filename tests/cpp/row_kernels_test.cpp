// Every table of row kernels that this machine runs, against float64: odd shapes, strides, NaN
// beside every row and pages that fault behind every array. Linked with the emulated processor, the
// same for what it runs.
#include "attention/cpu/row_kernels.hpp"

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.hpp"
#include "core/error.hpp"
#include "guarded_pages.hpp"
#include "storage.hpp"

using l3ext::BFloat16;
using l3ext::CpuIsa;
using l3ext::Float16;
using l3ext::cpu::RowBlock;
using l3ext::cpu::RowKernels;

namespace {

// `count` elements that end where a page begins that faults.
template <typename T>
class Guarded {
 public:
  explicit Guarded(int64_t count) : pages_(count * sizeof(T)), count_(count) {}
  T* data() const { return reinterpret_cast<T*>(pages_.end()) - count_; }
  T& operator[](int64_t i) const { return data()[i]; }
  int64_t size() const { return count_; }

 private:
  l3ext::cuda::emulated::GuardedPages pages_;
  int64_t count_;
};

// Values that every type holds: eight bits.
double some_value(std::mt19937& random) { return (static_cast<int>(random() % 511) - 255) / 128.0; }

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Rows of `columns` values with NaN between them, and the same in float64.
template <typename T>
struct Matrix {
  int64_t count, columns, stride;
  Guarded<T> stored;
  std::vector<double> values;

  Matrix(int64_t rows, int64_t row_columns, int64_t gap, std::mt19937& random)
      : count(rows),
        columns(row_columns),
        stride(row_columns + gap),
        stored((rows - 1) * stride + columns),
        values(rows * columns) {
    for (int64_t i = 0; i < stored.size(); ++i) assign(stored[i], kNaN);
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t c = 0; c < columns; ++c) set(r, c, some_value(random));
    }
  }
  void set(int64_t r, int64_t c, double value) {
    assign(stored[r * stride + c], value);
    values[r * columns + c] = value;
  }
  double at(int64_t r, int64_t c) const { return values[r * columns + c]; }
  RowBlock<T> block() const { return {stored.data(), stride, count}; }
  std::vector<const T*> addresses() const {
    std::vector<const T*> all;
    for (int64_t r = 0; r < count; ++r) all.push_back(stored.data() + r * stride);
    return all;
  }
};

template <typename Acc>
constexpr double kRoundoff = std::numeric_limits<Acc>::epsilon() / 2;

// Fails the test once per function and instruction set, with the first shape that differed.
struct Checker {
  const char* what;
  CpuIsa isa;
  bool ok = true;

  void near(double got, double want, double bound, const std::string& shape) {
    if (std::abs(got - want) <= bound) return;
    if (ok) {
      std::fprintf(stderr, "%s, %s, %s: got %.9g, expected %.9g +- %.2g\n", what,
                   l3ext::cpu_isa_name(isa), shape.c_str(), got, want, bound);
    }
    ok = false;
  }
};

struct Shape {
  int64_t rows, queries, depth;
};

// All edges of blocks and vectors with short depths, and few of them with a long one.
std::vector<Shape> shapes() {
  std::vector<Shape> all;
  for (const int64_t rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 15, 16, 17, 31, 32, 33, 40}) {
    for (const int64_t queries :
         {1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 14, 15, 16, 17, 31, 32, 33, 47, 48, 49, 64, 65}) {
      for (const int64_t depth : {1, 7, 31, 32, 33, 64, 100}) all.push_back({rows, queries, depth});
    }
  }
  for (const int64_t rows : {1, 17, 40, 131}) {
    for (const int64_t queries : {1, 5, 11, 17, 30, 65, 97, 128})
      all.push_back({rows, queries, 1024});
  }
  for (const int64_t queries : {1, 3, 4, 15, 26, 31, 63})
    all.push_back({9, queries, 4099 + queries % 2});
  return all;
}

// Calls f(isa, table) for every instruction set that runs here.
template <typename T, typename F>
void for_each_table(F&& f) {
  for (const CpuIsa isa : l3ext::kCpuIsas) {
    if (l3ext::cpu_runs(isa)) f(isa, l3ext::cpu::row_kernels<T>(isa));
  }
}

template <typename F>
void for_each_type(F&& f) {
  f(l3ext::TypeTag<double>{});
  f(l3ext::TypeTag<float>{});
  f(l3ext::TypeTag<BFloat16>{});
  f(l3ext::TypeTag<Float16>{});
}

template <typename T>
void check_scores(const RowKernels<T>& kernels, const Shape& shape, std::mt19937& random,
                  Checker& checker) {
  using Acc = l3ext::Accumulator<T>;
  const auto [row_count, queries, depth] = shape;
  if (queries > kernels.query_block) return;
  const Matrix<T> rows(row_count, depth, 5, random);
  const Matrix<l3ext::cpu::Query<T>> x(queries, depth, 0, random);
  const int64_t padded = kernels.padded(queries);
  const Guarded<Acc> packed(kernels.packed_elements(queries, depth));
  const Guarded<Acc> scores(row_count * padded);
  for (int64_t i = 0; i < scores.size(); ++i) scores[i] = static_cast<Acc>(kNaN);
  const double scale = depth % 2 == 0 ? 1.0 : -0.75;
  kernels.pack(x.addresses().data(), queries, depth, packed.data());
  kernels.scores(rows.block(), packed.data(), queries, depth, static_cast<Acc>(scale), {},
                 scores.data());
  const std::string name =
      l3ext::concat(row_count, " rows, ", queries, " queries, ", depth, " deep");
  for (int64_t r = 0; r < row_count; ++r) {
    for (int64_t q = 0; q < padded; ++q) {
      const auto score = static_cast<double>(scores[r * padded + q]);
      if (q >= queries) {  // nobody's, and finite
        checker.near(std::isfinite(score) ? 0 : kNaN, 0, 0, name);
        continue;
      }
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < depth; ++k) {
        const double product = x.at(q, k) * rows.at(r, k);
        sum += product;
        magnitude += std::abs(product);
      }
      const double bound = 2 * static_cast<double>(depth + 4) * kRoundoff<Acc> * magnitude;
      checker.near(score, scale * sum, std::abs(scale) * bound, name);
    }
  }
}

void scores_match_float64() {
  for_each_type([]<typename T>(l3ext::TypeTag<T>) {
    std::mt19937 random(1);
    for_each_table<T>([&](CpuIsa isa, const RowKernels<T>& kernels) {
      Checker checker{"scores", isa};
      for (const Shape& shape : shapes()) check_scores<T>(kernels, shape, random, checker);
      EXPECT(checker.ok);
    });
  });
}

// Weights of `outputs` sums over `rows`, as they lie for either order of their strides.
template <typename Acc>
struct Weights {
  int64_t stride, row_stride;
  Guarded<Acc> stored;

  Weights(int64_t outputs, int64_t rows, bool by_row, std::mt19937& random)
      : stride(by_row ? 1 : rows + 3),
        row_stride(by_row ? outputs + 3 : 1),
        stored((outputs - 1) * stride + (rows - 1) * row_stride + 1) {
    for (int64_t i = 0; i < stored.size(); ++i) stored[i] = std::numeric_limits<Acc>::quiet_NaN();
    for (int64_t i = 0; i < outputs; ++i) {
      for (int64_t r = 0; r < rows; ++r) {
        stored[i * stride + r * row_stride] =
            static_cast<Acc>(random()) / static_cast<Acc>(1LL << 32) - Acc{0.25};
      }
    }
  }
  Acc at(int64_t output, int64_t row) const { return stored[output * stride + row * row_stride]; }
};

template <typename T>
void check_sums(CpuIsa isa, const RowKernels<T>& kernels, const Shape& shape, bool by_row, bool add,
                std::mt19937& random, Checker& checker) {
  using Acc = l3ext::Accumulator<T>;
  const auto [row_count, outputs, columns] = shape;
  const Matrix<T> rows(row_count, columns, 5, random);
  const Weights<Acc> weights(outputs, row_count, by_row, random);
  const Matrix<Acc> before(outputs, columns, 2, random);
  const Guarded<Acc> out(before.stored.size());
  std::copy_n(before.stored.data(), out.size(), out.data());
  kernels.accumulate(rows.block(), weights.stored.data(), weights.stride, weights.row_stride,
                     outputs, columns, {}, add, out.data(), before.stride);
  // Each weight is rounded to bfloat16 where the products take it so.
  const bool rounds = std::is_same_v<T, BFloat16> && isa >= CpuIsa::kAvx512Bf16;
  const double error = 2 * static_cast<double>(row_count + 4) * kRoundoff<Acc>;
  const std::string name =
      l3ext::concat(row_count, " rows, ", outputs, " outputs, ", columns, " columns");
  for (int64_t i = 0; i < outputs; ++i) {
    for (int64_t c = 0; c < columns; ++c) {
      const double begin = add ? before.at(i, c) : 0;
      double sum = begin, magnitude = 0;
      for (int64_t r = 0; r < row_count; ++r) {
        const double product = static_cast<double>(weights.at(i, r)) * rows.at(r, c);
        sum += product;
        magnitude += std::abs(product);
      }
      const double bound = error * (std::abs(begin) + magnitude) + (rounds ? magnitude / 256 : 0);
      checker.near(static_cast<double>(out[i * before.stride + c]), sum, bound, name);
    }
    for (int64_t c = columns; i + 1 < outputs && c < before.stride; ++c) {
      if (!std::isnan(out[i * before.stride + c])) checker.near(0, 1, 0, name + ": wrote beside");
    }
  }
}

void accumulated_sums_match_float64() {
  for_each_type([]<typename T>(l3ext::TypeTag<T>) {
    std::mt19937 random(2);
    for_each_table<T>([&](CpuIsa isa, const RowKernels<T>& kernels) {
      Checker checker{"accumulate", isa};
      for (const Shape& shape : shapes()) {
        for (const bool by_row : {false, true}) {
          const bool add = random() % 2 == 0;
          check_sums<T>(isa, kernels, shape, by_row, add, random, checker);
        }
      }
      EXPECT(checker.ok);
    });
  });
}

// A query's scores and sums have the same bits alone as among others, the last lanes and rows too:
// but not by the products of bfloat16 blocks, which sum some queries' otherwise than others'.
void bits_do_not_depend_on_other_queries() {
  for_each_type([]<typename T>(l3ext::TypeTag<T>) {
    using Acc = l3ext::Accumulator<T>;
    std::mt19937 random(5);
    for_each_table<T>([&](CpuIsa isa, const RowKernels<T>& kernels) {
      if (std::is_same_v<T, BFloat16> && isa >= CpuIsa::kAvx512Bf16) return;
      constexpr int64_t kRows = 11, kDepth = 2100;
      const Matrix<T> rows(kRows, kDepth, 3, random);
      const Matrix<l3ext::cpu::Query<T>> x(kernels.query_block, kDepth, 0, random);
      const auto addresses = x.addresses();
      // Scores [kRows, padded] and sums [count, kDepth] of `count` queries from number `first` on.
      const auto run = [&](int64_t first, int64_t count) {
        std::vector<Acc> packed(kernels.packed_elements(count, kDepth));
        std::vector<Acc> scores(kRows * kernels.padded(count)), sums(count * kDepth);
        kernels.pack(addresses.data() + first, count, kDepth, packed.data());
        kernels.scores(rows.block(), packed.data(), count, kDepth, Acc{1}, {}, scores.data());
        kernels.accumulate(rows.block(), scores.data(), 1, kernels.padded(count), count, kDepth, {},
                           false, sums.data(), kDepth);
        return std::pair(scores, sums);
      };
      const auto [scores, sums] = run(0, kernels.query_block);
      bool same = true;
      for (const int64_t count : {1, 2, 3, 4, 5, 7, 9, 17}) {
        if (count > kernels.query_block) continue;
        for (const int64_t first : {int64_t{0}, kernels.query_block - count}) {
          const auto [some_scores, some_sums] = run(first, count);
          for (int64_t q = 0; q < count; ++q) {
            for (int64_t r = 0; r < kRows; ++r) {
              same = same && some_scores[r * kernels.padded(count) + q] ==
                                 scores[r * kernels.padded(kernels.query_block) + first + q];
            }
          }
          same =
              same && std::equal(some_sums.begin(), some_sums.end(), sums.begin() + first * kDepth);
        }
      }
      EXPECT(same);
    });
  });
}

// Every float16 number, at every place of a vector and in a tail.
void halves_widen_exactly() {
  std::vector<Float16> halves(65536 + 3);
  for (size_t i = 0; i < halves.size(); ++i) halves[i].bits = static_cast<uint16_t>(i);
  for_each_table<Float16>([&](CpuIsa, const RowKernels<Float16>& kernels) {
    std::vector<float> widened(halves.size());
    kernels.load(halves.data(), widened.data(), std::ssize(halves));
    bool exact = true;
    for (size_t i = 0; i < halves.size(); ++i) {
      const double want = value_of(halves[i]), got = static_cast<double>(widened[i]);
      exact = exact && (std::isnan(want) ? std::isnan(got)
                                         : got == want && std::signbit(got) == std::signbit(want));
    }
    EXPECT(exact);
  });
}

// Past the caches the same bits arrive, wherever rows begin and end, and nothing beside them.
void rows_arrive_past_caches() {
  for_each_type([]<typename T>(l3ext::TypeTag<T>) {
    using Acc = l3ext::Accumulator<T>;
    std::mt19937 random(4);
    for_each_table<T>([&](CpuIsa, const RowKernels<T>& kernels) {
      bool same = true;
      for (const int64_t columns :
           {int64_t{1}, int64_t{32}, int64_t{48}, int64_t{64}, int64_t{100}}) {
        for (const int64_t stride : {columns, columns + 1, columns + 32}) {
          constexpr int64_t kRows = 5;
          std::vector<Acc> from(kRows * columns);
          for (Acc& value : from) value = static_cast<Acc>(some_value(random)) / 3;
          alignas(64) static T plain[4096], past[4096];
          std::memset(plain, 0x11, sizeof(plain));
          std::memset(past, 0x11, sizeof(past));
          for (int64_t r = 0; r < kRows; ++r) {
            kernels.store(from.data() + r * columns, 1, plain + 32 + r * stride, columns);
          }
          kernels.store_past_caches(from.data(), columns, past + 32, stride, kRows, columns);
          same = same && std::memcmp(plain, past, sizeof(plain)) == 0;
        }
      }
      EXPECT(same);
    });
  });
}

// Whoever asks for more than there is gets nothing, and whatever comes first is asked for first:
// seen by the end of it, as asking leaves no other trace.
void what_is_wanted_ends() {
  using l3ext::cpu::Wanted;
  alignas(64) static std::byte memory[640];
  const l3ext::cpu::MemoryRange ranges[] = {
      {.begin = memory, .bytes = 1},
      {.begin = memory, .bytes = 100, .stride = 192, .count = 3},
      {.begin = memory, .bytes = 640}};
  for (const size_t count : {size_t{0}, size_t{1}, std::size(ranges)}) {
    Wanted wanted(ranges, ranges + count);
    int asked = 0;
    for (; !wanted.empty() && asked < 100; ++asked) wanted.ask(1);
    EXPECT(asked == (count == 0 ? 0 : count == 1 ? 1 : 1 + 3 * 2 + 10));
    wanted.ask(1000);
    EXPECT(wanted.empty());
  }
  Wanted several(ranges, ranges + std::size(ranges));
  several.ask(16);
  EXPECT(!several.empty());
  several.ask(1);
  EXPECT(several.empty());
}

// A row of NaN is in its own scores and in every sum, and nowhere else.
void nan_stays_where_it_belongs() {
  for_each_type([]<typename T>(l3ext::TypeTag<T>) {
    using Acc = l3ext::Accumulator<T>;
    std::mt19937 random(3);
    for_each_table<T>([&](CpuIsa, const RowKernels<T>& kernels) {
      constexpr int64_t kRows = 21, kColumns = 37, kBad = 18;
      Matrix<T> rows(kRows, kColumns, 5, random);
      for (int64_t c = 0; c < kColumns; ++c) rows.set(kBad, c, kNaN);
      for (const int64_t queries : {int64_t{2}, kernels.query_block}) {
        const Matrix<T> x(queries, kColumns, 0, random);
        std::vector<Acc> packed(kernels.packed_elements(queries, kColumns));
        std::vector<Acc> scores(kRows * kernels.padded(queries));
        kernels.pack(x.addresses().data(), queries, kColumns, packed.data());
        kernels.scores(rows.block(), packed.data(), queries, kColumns, Acc{1}, {}, scores.data());
        std::vector<Acc> above(queries * kColumns), all(queries * kColumns);
        const Weights<Acc> weights(queries, kRows, true, random);
        for (const auto& [count, out] : {std::pair{kBad, &above}, std::pair{kRows, &all}}) {
          kernels.accumulate({rows.stored.data(), rows.stride, count}, weights.stored.data(),
                             weights.stride, weights.row_stride, queries, kColumns, {}, true,
                             out->data(), kColumns);
        }
        bool right = true;
        for (int64_t q = 0; q < queries; ++q) {
          for (int64_t r = 0; r < kRows; ++r) {
            right = right && std::isnan(scores[r * kernels.padded(queries) + q]) == (r == kBad);
          }
          for (int64_t c = 0; c < kColumns; ++c) {
            right = right && !std::isnan(above[q * kColumns + c]);
            right = right && std::isnan(all[q * kColumns + c]);
          }
        }
        EXPECT(right);
      }
    });
  });
}

}  // namespace

int main() {
  RUN(scores_match_float64);
  RUN(accumulated_sums_match_float64);
  RUN(nan_stays_where_it_belongs);
  RUN(what_is_wanted_ends);
  RUN(bits_do_not_depend_on_other_queries);
  RUN(halves_widen_exactly);
  RUN(rows_arrive_past_caches);
  return check::failures == 0 ? 0 : 1;
}
