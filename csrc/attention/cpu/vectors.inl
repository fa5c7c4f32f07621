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
inline Vec<float> widen_halves(U16 halves) {
#if L3EXT_VECTOR_BYTES == 64
  return bit_cast_vector<Vec<float>>(
      _mm512_maskz_cvtph_ps(0xffff, bit_cast_vector<__m256i>(halves)));
#elif L3EXT_VECTOR_BYTES == 32
  return bit_cast_vector<Vec<float>>(_mm256_cvtph_ps(bit_cast_vector<__m128i>(halves)));
#elif defined(__aarch64__)
  return bit_cast_vector<Vec<float>>(vcvt_f32_f16(bit_cast_vector<float16x4_t>(halves)));
#else
  // Exponent and mantissa go where a float has them, the exponent rebiased from 15 to 127. That is
  // the value but where the exponent is 0: there 2^-14 (m / 1024), and not 2^-15 (1 + m / 1024) as
  // for a float; of the two, the smaller is right everywhere. Infinity and NaN have the largest.
  constexpr uint32_t kInfinity = 0x7c00u << 13, kQuiet = 0x00400000u;
#if defined(__x86_64__)  // GCC 12 would convert them one by one
  const __m128i low = _mm_cvtsi64_si128(bit_cast_vector<int64_t>(halves));
  const U32 words = (U32)_mm_unpacklo_epi16(low, _mm_setzero_si128());
#else
  const U32 words = __builtin_convertvector(halves, U32);
#endif
  const U32 magnitude = (words & 0x7fffu) << 13;
  const auto normal = bit_cast_vector<Vec<float>>(magnitude + ((127u - 15u) << 23));
  const Vec<float> subnormal = normal * 2.0f - 0x1p-14f;
  const U32 number = bit_cast_vector<U32>(normal < subnormal ? normal : subnormal);
  const U32 beyond =
      (magnitude + ((255u - 31u) << 23)) | (magnitude > kInfinity ? U32{} + kQuiet : U32{});
  const U32 value = magnitude < kInfinity ? number : beyond;
  return bit_cast_vector<Vec<float>>(value | (words & 0x8000u) << 16);
#endif
}
inline Vec<float> load(const Float16* p) { return widen_halves(load_raw<U16>(p)); }

// As many bytes as a vector has words, or 16-bit words, sign-extended. GCC 12 would convert such
// vectors element by element: hence the instructions by name.
inline I32 load_bytes(const void* p) {
#if L3EXT_VECTOR_BYTES == 64
  return (I32)_mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128((const __m128i*)p));
#elif L3EXT_VECTOR_BYTES == 32
  return (I32)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  int32_t bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
#if defined(__aarch64__)
  return (I32)vmovl_s16(vget_low_s16(vmovl_s8(vreinterpret_s8_s32(vdup_n_s32(bytes)))));
#else
  const __m128i twice = _mm_unpacklo_epi8(_mm_cvtsi32_si128(bytes), _mm_cvtsi32_si128(bytes));
  return (I32)_mm_srai_epi32(_mm_unpacklo_epi16(twice, twice), 24);
#endif
#endif
}
using Words16 = typename VectorOf<uint16_t, L3EXT_VECTOR_BYTES>::type;
inline Words16 load_bytes_as_words16(const void* p) {
#if L3EXT_VECTOR_BYTES == 64
  return (Words16)_mm512_maskz_cvtepi8_epi16(0xffffffff, _mm256_loadu_si256((const __m256i*)p));
#elif L3EXT_VECTOR_BYTES == 32
  return (Words16)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__)
  return (Words16)vmovl_s8(vld1_s8(static_cast<const int8_t*>(p)));
#else
  const __m128i bytes = _mm_loadl_epi64((const __m128i*)p);
  return (Words16)_mm_srai_epi16(_mm_unpacklo_epi8(bytes, bytes), 8);
#endif
}
inline Vec<float> load(const int8_t* p) {
  return __builtin_convertvector(load_bytes(p), Vec<float>);
}

// Codes of float8_e4m3fn, sign-extended, as float16 numbers of 2^-8 times the value: its exponent
// and mantissa have room in theirs, subnormals too, whose widening no setting flushes. One code and
// its negative are no number: only they carry into the bit that makes the exponent the largest.
template <typename Words>
inline Words halves_of_e4m3(Words codes) {
  const Words halves = (codes << 7) & static_cast<uint16_t>(0xbf80);
  const Words carried = halves + static_cast<uint16_t>(0x0080);
  return halves | (carried & static_cast<uint16_t>(0x4000));
}
inline Vec<float> load(const Float8E4M3* p) {
  return widen_halves(halves_of_e4m3(__builtin_convertvector(load_bytes(p), U16))) * 256.0f;
}

// What load_parts() gives in terms of elements: of float8 multiples of 2^-8, since a multiplication
// of each element takes as long as that with a query.
template <typename T>
constexpr float kUnit = std::is_same_v<T, Float8E4M3> ? 256.0f : 1.0f;
// Vectors that are loaded together: two of rows in 8 bits, which share the first steps.
template <typename T>
constexpr int kParts = sizeof(T) == 1 ? 2 : 1;

template <typename T>
inline void load_parts(const T* p, Vec<Accumulator<T>> (&to)[kParts<T>]) {
  for (int i = 0; i < kParts<T>; ++i) to[i] = load(p + i * kLanes<Accumulator<T>>);
}
inline void load_parts(const Float8E4M3* p, Vec<float> (&to)[2]) {
  const Words16 codes = halves_of_e4m3(load_bytes_as_words16(p));
  U16 halves[2];
  std::memcpy(halves, &codes, sizeof(codes));
  for (int i = 0; i < 2; ++i) to[i] = widen_halves(halves[i]);
}

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
template <typename T>
inline auto load_partial_part(const T* p, int64_t count) {
  return load_partial(p, count) * (Accumulator<T>{1} / kUnit<T>);
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

// Into the first, for the few KiB that are next: rows that few queries use up at once.
template <typename T>
inline void prefetch_near(const T* p) {
  __builtin_prefetch(p, 0, 3);
}
