// The two products that everything here is made of, each by one warp and without staging the table:
//   RowProducts  c[row, query]    = sum over columns of rows[row, column] * queries[query, column]
//   ColumnSums   c[column, query] = sum over rows of rows[row, column] * weights[query, row]
// Table rows are the tall side of the matrix instruction (16), queries the narrow side (8): most
// segments have few queries. The sum over columns (rows) may be taken in any order as long as both
// operands agree, so lanes load 16 adjacent bytes of a row straight into operand registers: no
// shared memory, no shuffles, full 32-byte sectors.
//
// The order of a sum depends on the columns or rows alone, never on the tile sizes chosen here: a
// query gets the same bits whichever instantiation serves it. float32 runs on the FMA units, since
// the matrix units would round its operands.
#pragma once

#include "attention/cuda/layout.hpp"
#include "core/cuda/primitives.cuh"

namespace l3ext::cuda {

template <typename T>
inline constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements in 16 bytes
template <typename T>
inline constexpr int kColumnStep = 4 * kVector<T>;  // columns that RowProducts takes at a time
template <typename T>
inline constexpr int kRowStep = sizeof(T) == 2 ? 16 : 8;  // rows that ColumnSums takes at a time

__device__ inline int lane() { return static_cast<int>(threadIdx.x % 32); }
__device__ inline int warp() { return static_cast<int>(threadIdx.x / 32); }

// --- 16 bytes of elements ------------------------------------------------------------------------
template <typename T>
__device__ inline void store_vector(T* target, const float (&v)[kVector<T>]) {
  uint4 packed;
  if constexpr (sizeof(T) == 2) {
    packed = {pack<T>(v[0], v[1]), pack<T>(v[2], v[3]), pack<T>(v[4], v[5]), pack<T>(v[6], v[7])};
  } else {
    packed = {__float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]),
              __float_as_uint(v[3])};
  }
  store_global(reinterpret_cast<uint4*>(target), packed);
}

template <typename T>
__device__ inline void add_vector(float (&sum)[kVector<T>], uint4 v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2) {
      const float2 pair = unpack<T>(words[i]);
      sum[2 * i] += pair.x, sum[2 * i + 1] += pair.y;
    } else {
      sum[i] += __uint_as_float(words[i]);
    }
  }
}

template <typename T>
__device__ inline T element(float value) {
  if constexpr (sizeof(T) == 2) {
    return T{static_cast<uint16_t>(pack<T>(value, 0.0f))};
  } else {
    return value;
  }
}

__device__ inline float4 as_floats(uint4 v) {
  return {__uint_as_float(v.x), __uint_as_float(v.y), __uint_as_float(v.z), __uint_as_float(v.w)};
}

// --- rows: 16 bytes of row r at a column ---------------------------------------------------------
template <typename T>
struct StridedRows {
  const T* base;
  int stride;  // elements
  __device__ uint4 load(int r, int column) const {
    return load_streaming(base + static_cast<int64_t>(r) * stride + column);
  }
  __device__ StridedRows from(int column) const { return {base + column, stride}; }
};

// Rows in the plan's order: row r is that of sorted position first + r.
template <typename T>
struct GatheredRows {
  const T* base;
  int stride;
  const int32_t* permutation;  // at `first`
  __device__ uint4 load(int r, int column) const {
    return load_streaming(base + static_cast<int64_t>(__ldg(permutation + r)) * stride + column);
  }
};

// --- queries of RowProducts: 16 bytes of one query at a column -----------------------------------
// Which queries a lane loads: of each tile its own one for the matrix units, all eight for FMA.
template <typename T, int Tiles>
inline constexpr int kQueriesPerLane = sizeof(T) == 2 ? Tiles : Tiles * kTileQueries;

__device__ inline int query_of_lane(int i, int element_bytes) {
  return element_bytes == 2 ? i * kTileQueries + lane() / 4 : i;
}

// From global memory through L1, where the warps of a block meet; queries past `count` are zero.
template <typename T, int Tiles>
struct GatheredQueries {
  const T* rows[kQueriesPerLane<T, Tiles>];

  __device__ GatheredQueries(const T* base, int stride, const int32_t* permutation, int count) {
#pragma unroll
    for (int i = 0; i < kQueriesPerLane<T, Tiles>; ++i) {
      const int q = query_of_lane(i, sizeof(T));
      rows[i] = nullptr;
      if (q < count) {
        const int64_t row = __ldg(permutation + q);
        rows[i] = base + row * stride + kVector<T> * (lane() % 4);
      }
    }
  }
  __device__ void begin_step(int) {}
  __device__ uint4 load(int i, int column) const {
    if (rows[i] == nullptr) return {0, 0, 0, 0};
    return __ldg(reinterpret_cast<const uint4*>(rows[i] + column));
  }
};

// --- row products --------------------------------------------------------------------------------
// Fragments of `Depth` steps are loaded while those before them are multiplied.
template <typename T, int RowBlocks, int Tiles, int Depth>
struct RowProducts {
  static constexpr bool kMma = sizeof(T) == 2;
  // kMma: accumulators as mma leaves them. Otherwise of two rows (g, g+8) and all eight queries,
  // for this lane's columns alone, until finish().
  float c[RowBlocks][Tiles][kMma ? 4 : 16];
  int tiles = Tiles;  // that have queries; the others stay zero

  struct Fragments {
    uint4 rows[Depth][RowBlocks][2];
  };

  // Columns [begin, end) of rows 0 .. 16 * RowBlocks, of which `count` >= 1 exist; the others yield
  // what nobody reads. All warps of a block must call it alike where `queries` stages by block.
  template <typename Rows, typename Queries>
  __device__ void run(const Rows& rows, int count, Queries& queries, int begin, int end) {
    const Rows of_lane = rows.from(kVector<T> * (lane() % 4));
#pragma unroll
    for (int b = 0; b < RowBlocks; ++b) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        for (int n = 0; n < Tiles; ++n) {
          for (int i = 0; i < (kMma ? 2 : 8); ++i) c[b][n][(kMma ? 2 : 8) * h + i] = 0;
        }
      }
    }
    const auto load = [&](Fragments& f, int column) {
#pragma unroll
      for (int d = 0; d < Depth; ++d) {
        // A step past the end is not multiplied: any address of the row will do.
        const int k = min(column + d * kColumnStep<T>, end - kColumnStep<T>);
#pragma unroll
        for (int b = 0; b < RowBlocks; ++b) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            // Found anew each time: offsets kept in registers would make the dense tiles spill.
            const int r = min(b * kBlockRows + h * 8 + lane() / 4, count - 1);
            f.rows[d][b][h] = of_lane.load(r, k);
          }
        }
      }
    };
    if (begin >= end) return;
    Fragments current, next;
    load(current, begin);
    for (int column = begin; column < end; column += Depth * kColumnStep<T>) {
      const int ahead = column + Depth * kColumnStep<T>;
      if (ahead < end) load(next, ahead);
#pragma unroll
      for (int d = 0; d < Depth; ++d) {
        const int k = column + d * kColumnStep<T>;
        if (k < end) {
          queries.begin_step(k);
          multiply(current.rows[d], queries, k);
        }
      }
      current = next;
    }
  }

  template <typename Queries>
  __device__ void multiply(const uint4 (&rows)[RowBlocks][2], const Queries& queries, int column) {
    if constexpr (kMma) {
      // Where few products hide it, so many tiles' queries are on their way before the first is
      // used; those that are none are zeros.
      constexpr int kTogether = RowBlocks > 1 || Tiles < 4 ? 1 : 4;
#pragma unroll
      for (int first = 0; first < Tiles; first += kTogether) {
        if (Tiles > 1 && first >= tiles) break;
        uint4 q[kTogether];
#pragma unroll
        for (int n = 0; n < kTogether; ++n) q[n] = queries.load(first + n, column);
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
#pragma unroll
          for (int b = 0; b < RowBlocks; ++b) {
            const uint4& low = rows[b][0];
            const uint4& high = rows[b][1];
            mma<T>(c[b][first + n], low.x, high.x, low.y, high.y, q[n].x, q[n].y);
            mma<T>(c[b][first + n], low.z, high.z, low.w, high.w, q[n].z, q[n].w);
          }
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < Tiles * kTileQueries; ++i) {
        const float4 q = as_floats(queries.load(i, column));
#pragma unroll
        for (int b = 0; b < RowBlocks; ++b) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const float4 row = as_floats(rows[b][h]);
            float& sum = c[b][i / kTileQueries][h * kTileQueries + i % kTileQueries];
            sum = fmaf(row.x, q.x, sum);
            sum = fmaf(row.y, q.y, sum);
            sum = fmaf(row.z, q.z, sum);
            sum = fmaf(row.w, q.w, sum);
          }
        }
      }
    }
  }

  // Hands every sum to store(row, query, value), once.
  template <typename Store>
  __device__ void finish(Store&& store) {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int b = 0; b < RowBlocks; ++b) {
#pragma unroll
      for (int n = 0; n < Tiles; ++n) {
        if constexpr (kMma) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            store(b * kBlockRows + g + 8 * (i / 2), n * kTileQueries + 2 * t + i % 2, c[b][n][i]);
          }
        } else {
#pragma unroll
          for (int i = 0; i < 16; ++i) {
            float sum = c[b][n][i];  // over the four lanes that share the rows
            sum += __shfl_xor_sync(0xffffffffu, sum, 1);
            sum += __shfl_xor_sync(0xffffffffu, sum, 2);
            const int q = i % kTileQueries;
            if (q / 2 == t) {
              store(b * kBlockRows + g + 8 * (i / kTileQueries), n * kTileQueries + q, sum);
            }
          }
        }
      }
    }
  }
};

// --- scores, and the weights that become of them -------------------------------------------------
// [query][row] in shared memory, as score_stride and score_place lay them out.
struct Scores {
  float* base;
  int stride;

  __device__ float* at(int query, int row) const {
    return base + query * stride + score_place(query, row);
  }
  struct OfQuery {
    float* base;
    int query;
    __device__ float& operator[](int row) const { return base[score_place(query, row)]; }
  };
  __device__ OfQuery of(int query) const { return {base + query * stride, query}; }
};

// Weights of ColumnSums: of one query and four rows from row first + row on, a multiple of four.
struct SharedWeights {
  static constexpr int kTilesTogether = 1;
  Scores scores;
  int first = 0;
  __device__ float4 load(int query, int row) const {
    return load_shared(reinterpret_cast<const float4*>(scores.at(query, first + row)));
  }
};

// --- column sums ---------------------------------------------------------------------------------
// Of 64 columns and kRowStep rows, what a lane loads for a ColumnSums: four rows, 16 bytes each.
template <typename T>
__device__ inline int first_row_of_lane() {
  return 4 * (sizeof(T) == 2 ? lane() % 4 : lane() / 16);
}
template <typename T>
__device__ inline int first_column_of_lane() {
  return sizeof(T) == 2 ? 8 * (lane() / 4) : 4 * (lane() % 16);
}

// Rows [0, end) held in registers, for sums with many sets of weights; 0 < end <= Steps * kRowStep.
template <typename T, int Steps>
struct HeldRows {
  uint4 rows[Steps][4];

  template <typename Rows>
  __device__ void load(const Rows& from, int end) {
#pragma unroll
    for (int s = 0; s < Steps; ++s) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int r = s * kRowStep<T> + first_row_of_lane<T>() + j;
        rows[s][j] = from.load(min(r, end - 1), first_column_of_lane<T>());
        if (r >= end) rows[s][j] = {0, 0, 0, 0};
      }
    }
  }
};

template <typename T, int Tiles, int Depth>
struct ColumnSums {
  static constexpr bool kMma = sizeof(T) == 2;
  // kMma: accumulators as mma leaves them, of four sets of 16 columns. Otherwise of eight queries
  // and this lane's four columns, over every other group of four rows, until finish().
  float c[kMma ? 4 : kTileQueries][kMma ? Tiles : 1][4];
  int tiles = Tiles;  // that have queries; nobody reads the others
  static_assert(kMma || Tiles == 1);

  struct Fragments {
    uint4 rows[Depth][4];
  };

  __device__ void clear() {
#pragma unroll
    for (auto& set : c) {
#pragma unroll
      for (auto& tile : set) {
#pragma unroll
        for (float& sum : tile) sum = 0;
      }
    }
  }

  // Multiplies the sums of query q by factors[q].
  __device__ void scale(const float* factors) {
    if constexpr (kMma) {
#pragma unroll
      for (int n = 0; n < Tiles; ++n) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float factor = factors[n * kTileQueries + 2 * (lane() % 4) + j % 2];
#pragma unroll
          for (int i = 0; i < 4; ++i) c[i][n][j] *= factor;
        }
      }
    } else {
#pragma unroll
      for (int q = 0; q < kTileQueries; ++q) {
#pragma unroll
        for (float& sum : c[q][0]) sum *= factors[q];
      }
    }
  }

  // Adds rows [begin, end) of 64 columns, `rows` beginning at the first of these;
  // weights.load(query, row) gives the weights of rows row .. row + 4, zero past `end`, which it is
  // asked for up to the next multiple of kRowStep.
  template <typename Rows, typename Weights>
  __device__ void run(const Rows& rows, int begin, int end, const Weights& weights) {
    if (begin >= end) return;
    const auto load = [&](Fragments& f, int row) {
#pragma unroll
      for (int d = 0; d < Depth; ++d) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int r = row + d * kRowStep<T> + first_row_of_lane<T>() + j;
          f.rows[d][j] = rows.load(min(r, end - 1), first_column_of_lane<T>());
        }
      }
    };
    Fragments current, next;
    load(current, begin);
    for (int row = begin; row < end; row += Depth * kRowStep<T>) {
      const int ahead = row + Depth * kRowStep<T>;
      if (ahead < end) load(next, ahead);
#pragma unroll
      for (int d = 0; d < Depth; ++d) {
        const int r = row + d * kRowStep<T>;
        if (r < end) {
          // A row past the end would only meet weights of zero; but zero times infinity is not
          // zero.
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            if (r + first_row_of_lane<T>() + j >= end) current.rows[d][j] = {0, 0, 0, 0};
          }
          multiply(current.rows[d], weights, r + first_row_of_lane<T>());
        }
      }
      current = next;
    }
  }

  template <int Steps, typename Weights>
  __device__ void add(const HeldRows<T, Steps>& held, const Weights& weights) {
#pragma unroll
    for (int s = 0; s < Steps; ++s) {
      multiply(held.rows[s], weights, s * kRowStep<T> + first_row_of_lane<T>());
    }
  }

  template <typename Weights>
  __device__ void multiply(const uint4 (&v)[4], const Weights& weights, int row) {
    if constexpr (kMma) {
      // Transposes 4 rows x 8 columns per lane into operands: set i holds columns 8 g + i and
      // 8 g + i + 4 of this lane's rows.
      uint32_t a[4][4];
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const uint4 &v0 = v[2 * p], &v1 = v[2 * p + 1];
        a[0][2 * p] = low_halves(v0.x, v1.x), a[1][2 * p] = high_halves(v0.x, v1.x);
        a[2][2 * p] = low_halves(v0.y, v1.y), a[3][2 * p] = high_halves(v0.y, v1.y);
        a[0][2 * p + 1] = low_halves(v0.z, v1.z), a[1][2 * p + 1] = high_halves(v0.z, v1.z);
        a[2][2 * p + 1] = low_halves(v0.w, v1.w), a[3][2 * p + 1] = high_halves(v0.w, v1.w);
      }
      // So many tiles' weights are on their way before the first is used; those without queries get
      // sums that nobody reads.
      constexpr int kTogether = Weights::kTilesTogether < Tiles ? Weights::kTilesTogether : Tiles;
#pragma unroll
      for (int first = 0; first < Tiles; first += kTogether) {
        if (Tiles > 1 && first >= tiles) break;
        uint2 w[kTogether];
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
          w[n] = weight_operand(weights, (first + n) * kTileQueries + lane() / 4, row);
        }
#pragma unroll
        for (int n = 0; n < kTogether; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            mma<T>(c[i][first + n], a[i][0], a[i][1], a[i][2], a[i][3], w[n].x, w[n].y);
          }
        }
      }
    } else {
#pragma unroll
      for (int q = 0; q < kTileQueries; ++q) {
        const float4 w = weights.load(q, row);
        add(c[q][0], w.x, as_floats(v[0]));
        add(c[q][0], w.y, as_floats(v[1]));
        add(c[q][0], w.z, as_floats(v[2]));
        add(c[q][0], w.w, as_floats(v[3]));
      }
    }
  }

  template <typename Weights>
  __device__ static uint2 weight_operand(const Weights& weights, int query, int row) {
    const auto w = weights.load(query, row);
    if constexpr (sizeof(w) == sizeof(float4)) {
      return {pack<T>(w.x, w.y), pack<T>(w.z, w.w)};
    } else {
      return w;
    }
  }

  __device__ static void add(float (&sum)[4], float w, float4 v) {
    sum[0] = fmaf(w, v.x, sum[0]);
    sum[1] = fmaf(w, v.y, sum[1]);
    sum[2] = fmaf(w, v.z, sum[2]);
    sum[3] = fmaf(w, v.w, sum[3]);
  }

  // Hands every sum to store(query, column, values), 16 bytes of elements at a time.
  template <typename Store>
  __device__ void finish(Store&& store) {
    float v[kVector<T>];
    if constexpr (kMma) {
#pragma unroll
      for (int n = 0; n < Tiles; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) v[i] = c[i][n][j], v[i + 4] = c[i][n][j + 2];
          store(n * kTileQueries + 2 * (lane() % 4) + j, first_column_of_lane<T>(), v);
        }
      }
    } else {
#pragma unroll
      for (int q = 0; q < kTileQueries; ++q) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          v[i] = c[q][0][i] + __shfl_xor_sync(0xffffffffu, c[q][0][i], 16);
        }
        if (q / 4 == lane() / 16) store(q, first_column_of_lane<T>(), v);
      }
    }
  }
};

}  // namespace l3ext::cuda
