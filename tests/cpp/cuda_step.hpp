// One step of segmented attention on the emulated device: its inputs, with everything that is not
// theirs poisoned, and what a plain computation in double makes of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "attention/cuda/schedule.hpp"
#include "attention/cuda/segmented_attention.hpp"
#include "attention/plan.hpp"
#include "check.hpp"
#include "core/cuda/primitives.cuh"
#include "device_buffer.hpp"

namespace step {

using l3ext::BFloat16;
using l3ext::DType;
using l3ext::Float16;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// --- elements and matrices -----------------------------------------------------------------------
inline double value_of(float e) { return e; }
inline double value_of(BFloat16 e) { return l3ext::cuda::unpack<BFloat16>(e.bits).x; }
inline double value_of(Float16 e) { return l3ext::cuda::unpack<Float16>(e.bits).x; }

template <typename T>
T element(double value) {
  if constexpr (sizeof(T) == 4) {
    return static_cast<float>(value);
  } else {
    return {static_cast<uint16_t>(l3ext::cuda::pack<T>(static_cast<float>(value), 0))};
  }
}

template <typename T>
constexpr DType kDType = DType::kFloat32;
template <>
constexpr DType kDType<BFloat16> = DType::kBFloat16;
template <>
constexpr DType kDType<Float16> = DType::kFloat16;

// As tests/reference.py: largest |error| over the largest |reference|.
template <typename T>
constexpr double kTolerance = 2e-6;
template <>
constexpr double kTolerance<BFloat16> = 6e-3;
template <>
constexpr double kTolerance<Float16> = 8e-4;

// Strided rows on the device; what lies between them is all ones.
template <typename T>
class Matrix {
 public:
  Matrix(int64_t rows, int64_t width, int64_t stride)
      : rows_(rows),
        width_(width),
        stride_(stride),
        buffer_(rows == 0 ? 0 : (rows - 1) * stride + width) {}
  ~Matrix() { EXPECT(gaps_are_untouched()); }

  T* row(int64_t i) { return buffer_.data() + i * stride_; }
  void store(int64_t i, int64_t first, const double* values, int64_t count) {
    for (int64_t j = 0; j < count; ++j) row(i)[first + j] = element<T>(values[j]);
  }
  std::vector<double> load(int64_t i, int64_t first, int64_t count) {
    std::vector<double> values;
    for (int64_t j = 0; j < count; ++j) values.push_back(value_of(row(i)[first + j]));
    return values;
  }
  l3ext::Rows view(int64_t first = 0) { return {buffer_.data() + first, stride_}; }
  l3ext::MutableRows mutable_view(int64_t first = 0) { return {buffer_.data() + first, stride_}; }

 private:
  bool gaps_are_untouched() {
    const T ones = DeviceBuffer<T>(1)[0];
    for (int64_t i = 0; i + 1 < rows_; ++i) {
      for (int64_t j = width_; j < stride_; ++j) {
        if (std::memcmp(row(i) + j, &ones, sizeof(T)) != 0) return false;
      }
    }
    return true;
  }

  int64_t rows_, width_, stride_;
  DeviceBuffer<T> buffer_;
};

// --- a step --------------------------------------------------------------------------------------
enum class Layout { kTable, kSeparate, kDirectory };

struct Shape {
  std::vector<int64_t> rows;  // that each token of the vocabulary owns
  std::vector<int64_t> ids;   // -1: no token
  int64_t d_in = 64, d_emb = 64;
  Layout layout = Layout::kTable;
  bool tied = false;
  double scale = 1;
  int spare_multiprocessors = 0;
};

struct Gradients {
  std::vector<double> dx, dkeys, dvalues;
};
struct Wanted {
  bool dx = true, rows = true;
  bool packed = false;  // gradients of the segments' rows alone
};

template <typename T>
class Step {
 public:
  explicit Step(Shape shape_of_step);

  Shape shape;
  int64_t num_tokens, table_rows, max_rows;
  std::vector<int64_t> offsets;
  // What the device gets after rounding, [rows, width]; NaN in rows that no token of the step owns.
  std::vector<double> x, dy, keys, values;

  std::vector<double> forward();  // y
  Gradients backward(Wanted wanted = {});
  std::vector<double> expected_y() const { return reference(nullptr); }
  Gradients expected_gradients() const {
    Gradients gradients;
    reference(&gradients);
    return gradients;
  }

  // For tests that change something first; the matrices stay with the step.
  void upload();
  // This step's last positions become those of `other`, over the same table.
  void take_last(const Step& other);
  l3ext::SegmentedAttentionInputs inputs();

  DeviceBuffer<int32_t> permutation, segment_tokens, segment_queries, schedule;
  DeviceBuffer<int64_t> segment_rows, directory;
  int32_t num_segments = 0;

 private:
  static constexpr int64_t kGap = 16;  // elements between rows

  void make_plan();
  std::vector<double> reference(Gradients* gradients) const;

  std::unique_ptr<Matrix<T>> x_, dy_;
  std::vector<std::unique_ptr<Matrix<T>>> tables_;  // one, keys and values, or one per token
};

// A bool for EXPECT; says the error as a share of its budget. NaN where NaN is expected.
bool close(const std::vector<double>& actual, const std::vector<double>& expected, double tolerance,
           const char* what);
bool same_bits(const std::vector<double>& a, const std::vector<double>& b);

// ids in which token t appears counts[t] times, in random order.
std::vector<int64_t> shuffled_ids(const std::vector<int64_t>& counts);

// Every number of rows with every number of queries; one-row tokens that the step does not use in
// between, so that a row beside a segment is NaN.
Shape grid(const std::vector<int64_t>& rows, const std::vector<int64_t>& queries);
// The positions of `alone` behind others, of the same vocabulary.
Shape behind(const std::vector<int64_t>& others, Shape alone);
Shape with_widths(Shape shape, int64_t d_in, int64_t d_emb);

// Calls f<T>() with the three element types.
template <typename F>
void for_each_dtype(F&& f) {
  f.template operator()<float>();
  f.template operator()<BFloat16>();
  f.template operator()<Float16>();
}

}  // namespace step
