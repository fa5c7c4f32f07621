// Vectors of the compiler's own kind (the same source is SSE2, AVX2, AVX-512 or NEON), loads that
// widen, stores that round.

template <typename Lane, int kBytes>
struct VectorOf {
  typedef Lane type __attribute__((vector_size(kBytes)));
};
template <typename Acc>
using Vec = typename VectorOf<Acc, L3EXT_VECTOR_BYTES>::type;
template <typename Acc>
constexpr int kLanes = L3EXT_VECTOR_BYTES / sizeof(Acc);

template <typename V, typename From>
inline V load_raw(const From* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}

template <typename To, typename From>
inline To bit_cast_vector(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof(to));
  return to;
}

using U32 = typename VectorOf<uint32_t, L3EXT_VECTOR_BYTES>::type;
using I32 = typename VectorOf<int32_t, L3EXT_VECTOR_BYTES>::type;
using U16 = typename VectorOf<uint16_t, L3EXT_VECTOR_BYTES / 2>::type;

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = half & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {  // infinity, NaN (kept quiet)
    bits =
        sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13) | (magnitude > 0x7c00u ? 0x400000u : 0);
  } else if (magnitude >= 0x400u) {
    bits = sign | ((magnitude + 0x1c000u) << 13);
  } else {  // zero or subnormal: magnitude * 2^-24 is exact in float
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((bits >> 13) & 0x3ffu));
  if (bits >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds past 65504
  if (bits < 0x38800000u) {  // subnormal: the addition rounds to a multiple of 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    const float shifted = magnitude + 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &shifted, 4);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
  }
  bits += 0xc8000fffu + ((bits >> 13) & 1u);  // rebias the exponent, round to nearest even
  return static_cast<uint16_t>(sign | (bits >> 13));
}

inline Vec<double> load(const double* p) { return load_raw<Vec<double>>(p); }
inline Vec<float> load(const float* p) { return load_raw<Vec<float>>(p); }
inline Vec<float> load(const BFloat16* p) {
  return bit_cast_vector<Vec<float>>(__builtin_convertvector(load_raw<U16>(p), U32) << 16);
}
// Of as many halves as the argument holds.
inline auto widen_halves(typename VectorOf<uint16_t, 8>::type halves) {
  typename VectorOf<float, 16>::type v;
#if defined(__aarch64__)
  v = vcvt_f32_f16(bit_cast_vector<float16x4_t>(halves));
#else
  for (int i = 0; i < 4; ++i) v[i] = half_to_float(halves[i]);
#endif
  return v;
}
#if L3EXT_VECTOR_BYTES >= 32
inline auto widen_halves(typename VectorOf<uint16_t, 16>::type halves) {
  return bit_cast_vector<typename VectorOf<float, 32>::type>(
      _mm256_cvtph_ps(bit_cast_vector<__m128i>(halves)));
}
#endif
#if L3EXT_VECTOR_BYTES >= 64
inline auto widen_halves(typename VectorOf<uint16_t, 32>::type halves) {
  return bit_cast_vector<typename VectorOf<float, 64>::type>(
      _mm512_maskz_cvtph_ps(0xffff, bit_cast_vector<__m256i>(halves)));
}
#endif
inline Vec<float> load(const Float16* p) { return widen_halves(load_raw<U16>(p)); }

// Of every word, byte number kByte as the highest one.
template <int kByte, typename Words>
inline Words byte_on_top(Words words) {
  if constexpr (kByte == 3) {
    return words;
  } else {
    return words << (24 - 8 * kByte);
  }
}
template <int kByte, typename Words>
inline auto widen_int8(Words words) {
  using Integers = typename VectorOf<int32_t, sizeof(Words)>::type;
  const auto value = bit_cast_vector<Integers>(byte_on_top<kByte>(words)) >> 24;
  return __builtin_convertvector(value, typename VectorOf<float, sizeof(Words)>::type);
}
// Exponent and mantissa go where a float has them, the exponent rebiased from 7 to 127. That is the
// value but where the exponent is 0: there 2^-6 (m / 8), and not 2^-7 (1 + m / 8) as for a float;
// of the two, the smaller is right everywhere. No step meets a subnormal float, which would be
// slow, and zero where the caller flushes them. The largest magnitude alone is no number.
template <int kByte, typename Words>
inline auto widen_e4m3(Words words) {
  using Floats = typename VectorOf<float, sizeof(Words)>::type;
  const Words top = byte_on_top<kByte>(words);
  const Words magnitude = (top >> 4) & 0x07f00000u;
  const auto normal = bit_cast_vector<Floats>(magnitude + ((127u - 7u) << 23));
  const auto subnormal = normal * 2.0f - 0x1p-6f;
  const auto value = bit_cast_vector<Words>(normal < subnormal ? normal : subnormal);
  const Words number = value | (top & 0x80000000u);
  return bit_cast_vector<Floats>(magnitude == 0x07f00000u ? Words{} + 0x7fc00000u : number);
}

// As many bytes as there are words, sign-extended. GCC 12 would convert such a vector element by
// element: hence the instructions by name.
inline U32 load_bytes(const void* p) {
#if L3EXT_VECTOR_BYTES == 64
  return (U32)_mm512_maskz_cvtepi8_epi32(0xffff,
                                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif L3EXT_VECTOR_BYTES == 32
  return (U32)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  U32 v;
  // NOLINTNEXTLINE(bugprone-signed-char-misuse): the sign is meant to be extended.
  for (int i = 0; i < kLanes<float>; ++i) v[i] = static_cast<const int8_t*>(p)[i];
  return v;
#endif
}
inline Vec<float> load(const int8_t* p) {
  return __builtin_convertvector(bit_cast_vector<I32>(load_bytes(p)), Vec<float>);
}
inline Vec<float> load(const Float8E4M3* p) { return widen_e4m3<0>(load_bytes(p)); }

inline void store(Vec<double> v, double* p) { std::memcpy(p, &v, sizeof(v)); }
inline void store(Vec<float> v, float* p) { std::memcpy(p, &v, sizeof(v)); }
inline void store(Vec<float> v, BFloat16* p) {
  const U32 bits = bit_cast_vector<U32>(v);
  const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const U32 quiet = (bits >> 16) | 0x40u;
  const U32 chosen = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
  const U16 narrow = __builtin_convertvector(chosen, U16);
  std::memcpy(p, &narrow, sizeof(narrow));
}
inline void store(Vec<float> v, Float16* p) {
#if L3EXT_VECTOR_BYTES == 64
  const __m256i narrow =
      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow);
#elif L3EXT_VECTOR_BYTES == 32
  const __m128i narrow = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow);
#elif defined(__aarch64__)
  vst1_f16(reinterpret_cast<float16_t*>(p), vcvt_f16_f32(v));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i].bits = float_to_half(v[i]);
#endif
}

// Keeps a loaded vector in a register. Otherwise GCC folds the load into every multiplication that
// uses the vector: as many loads as FMAs, of which the processor does no more a cycle.
template <typename V>
inline void keep_in_register(V& v) {
#if defined(__AVX512F__)
  __asm__("" : "+v"(v));
#elif defined(__aarch64__)
  __asm__("" : "+w"(v));
#elif defined(__x86_64__)
  __asm__("" : "+x"(v));
#else
  static_cast<void>(v);
#endif
}

// The same number in every lane. (0 - x would be an addition: x - 0 is x, for -0 too.)
template <typename Acc>
inline Vec<Acc> broadcast(Acc x) {
  return x - Vec<Acc>{};
}

// The first `count` lanes; the rest are zero and nothing past them is read.
template <typename T>
inline auto load_partial(const T* p, int64_t count) {
  T buffer[kLanes<Accumulator<T>>] = {};
  std::memcpy(buffer, p, static_cast<size_t>(count) * sizeof(T));
  return load(buffer);
}
template <typename Acc, typename T>
inline void store_partial(Vec<Acc> v, T* p, int64_t count) {
  T buffer[kLanes<Acc>];
  store(v, buffer);
  std::memcpy(p, buffer, static_cast<size_t>(count) * sizeof(T));
}

// v with its lanes moved down by kDistance, cyclically.
template <typename Acc, int kDistance, size_t... kLane>
inline Vec<Acc> rotate_lanes(Vec<Acc> v, std::index_sequence<kLane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(v, v, ((kLane + kDistance) % sizeof...(kLane))...);
#else
  using Index = std::conditional_t<sizeof(Acc) == 8, int64_t, int32_t>;
  using Indices = typename VectorOf<Index, L3EXT_VECTOR_BYTES>::type;
  return __builtin_shuffle(v, Indices{((kLane + kDistance) % sizeof...(kLane))...});
#endif
}

// Halves are added until one lane is left: a fixed order for each width.
template <typename Acc, int kWidth = kLanes<Acc> / 2>
inline Acc sum_lanes(Vec<Acc> v) {
  v += rotate_lanes<Acc, kWidth>(v, std::make_index_sequence<kLanes<Acc>>());
  if constexpr (kWidth > 1) {
    return sum_lanes<Acc, kWidth / 2>(v);
  } else {
    return v[0];
  }
}

template <typename T>
void load_row(const T* from, Accumulator<T>* to, int64_t count) {
  using Acc = Accumulator<T>;
  int64_t i = 0;
  for (; i + kLanes<Acc> <= count; i += kLanes<Acc>) store(load(from + i), to + i);
  if (i < count) store_partial<Acc>(load_partial(from + i, count - i), to + i, count - i);
}

template <typename T>
void store_row(const Accumulator<T>* from, Accumulator<T> factor, T* to, int64_t count) {
  using Acc = Accumulator<T>;
  int64_t i = 0;
  for (; i + kLanes<Acc> <= count; i += kLanes<Acc>) store(load(from + i) * factor, to + i);
  if (i < count) store_partial<Acc>(load_partial(from + i, count - i) * factor, to + i, count - i);
}

// As many bytes as a vector of them has, to where one may begin, past the caches where the
// processor can.
template <size_t kBytes>
inline void write_past_caches(const void* from, void* to) {
#if L3EXT_VECTOR_BYTES >= 64
  if constexpr (kBytes == 64) return _mm512_stream_si512((__m512i*)to, _mm512_loadu_si512(from));
#endif
#if L3EXT_VECTOR_BYTES >= 32
  if constexpr (kBytes == 32) {
    return _mm256_stream_si256((__m256i*)to, _mm256_loadu_si256((const __m256i*)from));
  }
#endif
#if defined(__x86_64__)
  if constexpr (kBytes == 16)
    return _mm_stream_si128((__m128i*)to, _mm_loadu_si128((const __m128i*)from));
#endif
  std::memcpy(to, from, kBytes);
}

template <typename T>
void store_rows_past_caches(const Accumulator<T>* from, int64_t from_stride, T* to,
                            int64_t to_stride, int64_t rows, int64_t columns) {
  using Acc = Accumulator<T>;
  constexpr size_t kBytes = kLanes<Acc> * sizeof(T);
  for (int64_t r = 0; r < rows; ++r, from += from_stride, to += to_stride) {
    if (reinterpret_cast<uintptr_t>(to) % kBytes != 0 || columns % kLanes<Acc> != 0) {
      store_row<T>(from, Acc{1}, to, columns);
      continue;
    }
    for (int64_t i = 0; i < columns; i += kLanes<Acc>) {
      T vector[kLanes<Acc>];
      store(load(from + i), vector);
      write_past_caches<kBytes>(vector, to + i);
    }
  }
#if defined(__x86_64__)
  _mm_sfence();  // such writes are ordered by nothing else, not by an unlocked mutex either
#endif
}

// --- transposes -------------------------------------------------------------------------------

// Swaps lanes crosswise between two vectors, kDistance apart: one step of a transpose.
template <typename Lane, int kBytes, int kDistance, size_t... kLane>
inline void exchange(typename VectorOf<Lane, kBytes>::type& a,
                     typename VectorOf<Lane, kBytes>::type& b, std::index_sequence<kLane...>) {
  using Vector = typename VectorOf<Lane, kBytes>::type;
  constexpr int kAll = sizeof...(kLane);
#if defined(__clang__)
  const Vector low =
      __builtin_shufflevector(a, b, ((kLane & kDistance) ? kLane - kDistance + kAll : kLane)...);
  const Vector high =
      __builtin_shufflevector(a, b, ((kLane & kDistance) ? kLane + kAll : kLane + kDistance)...);
#else
  using Index = std::conditional_t<sizeof(Lane) == 8, int64_t, int32_t>;
  using Indices = typename VectorOf<Index, kBytes>::type;
  const Vector low =
      __builtin_shuffle(a, b, Indices{((kLane & kDistance) ? kLane - kDistance + kAll : kLane)...});
  const Vector high =
      __builtin_shuffle(a, b, Indices{((kLane & kDistance) ? kLane + kAll : kLane + kDistance)...});
#endif
  a = low;
  b = high;
}

// Transposes a square block, a vector a row. Wide steps first: they are shuffles of whole lanes.
template <typename Lane, int kBytes, int kDistance = kBytes / sizeof(Lane) / 2>
inline void transpose(typename VectorOf<Lane, kBytes>::type* v) {
  constexpr int kAll = kBytes / sizeof(Lane);
#pragma GCC unroll 16
  for (int i = 0; i < kAll; ++i) {
    if ((i & kDistance) == 0) {
      exchange<Lane, kBytes, kDistance>(v[i], v[i + kDistance], std::make_index_sequence<kAll>());
    }
  }
  if constexpr (kDistance > 1) transpose<Lane, kBytes, kDistance / 2>(v);
}

// Of every word, its stored element number kElement, widened.
template <typename T, int kElement, typename WordVector>
inline auto widen_word(WordVector words) {
  constexpr int kBytes = sizeof(WordVector);
  if constexpr (std::is_same_v<T, Accumulator<T>>) {
    return bit_cast_vector<typename VectorOf<T, kBytes>::type>(words);
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return bit_cast_vector<typename VectorOf<float, kBytes>::type>(
        kElement == 0 ? words << 16 : words & 0xffff0000u);
  } else if constexpr (std::is_same_v<T, int8_t>) {
    return widen_int8<kElement>(words);
  } else if constexpr (std::is_same_v<T, Float8E4M3>) {
    return widen_e4m3<kElement>(words);
  } else {
    const auto halves = __builtin_convertvector(kElement == 0 ? words & 0xffffu : words >> 16,
                                                typename VectorOf<uint16_t, kBytes / 2>::type);
    return widen_halves(halves);
  }
}

// --- rows --------------------------------------------------------------------------------------

// RowKernels::padded(), which is compiled for any instruction set.
template <typename Acc>
constexpr int64_t padded(int64_t queries) {
  constexpr int64_t kStep = kLanes<Acc>;
  return queries == 1 ? 1 : (queries + kStep - 1) / kStep * kStep;
}

// The row that comes `ahead` rows after the first of `rows`: one of them, or what is read next.
template <typename T>
inline const T* row_ahead(const RowBlock<T>& rows, int64_t ahead, const RowBlock<T>& next) {
  if (ahead < rows.count) return rows.row(ahead);
  if (next.count == 0) return rows.row(0);
  ahead -= rows.count;  // what lies behind the last row nobody may want
  return next.row(ahead < next.count ? ahead : next.count - 1);
}

// The rows from number `ahead` on; where there is none, what is read next.
template <typename T>
inline RowBlock<T> rows_ahead(const RowBlock<T>& rows, int64_t ahead, const RowBlock<T>& next) {
  return ahead < rows.count ? rows.part(ahead, rows.count) : next;
}

// Into the second-level cache: the first takes it from there faster than it is used up.
template <typename T>
inline void prefetch(const T* p) {
  __builtin_prefetch(p, 0, 2);
}
