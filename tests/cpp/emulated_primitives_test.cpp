// The emulation's primitives: asynchronous copies, loads, conversions, matrix products.
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <vector>

#include "check.hpp"
#include "core/cuda/device.cuh"
#include "core/cuda/primitives.cuh"
#include "device_buffer.hpp"
#include "run_kernel.hpp"

using l3ext::BFloat16;
using l3ext::Error;
using l3ext::Float16;
using namespace l3ext::cuda;

namespace {

// --- memory --------------------------------------------------------------------------------------
struct CopyArgs {
  const float* in;
  float* out;  // [3, 4]
  bool wait;
  int64_t misaligned;
};
__global__ void copies(CopyArgs args) {
  std::byte* shared = dynamic_shared();
  auto* values = reinterpret_cast<float*>(shared);
  for (int i = 0; i < 12; ++i) values[i] = 1;
  copy_async(shared, args.in, true);
  commit_copies();
  copy_async(shared + 16 + args.misaligned, args.in + 4, true);
  copy_async(shared + 32, nullptr, false);
  commit_copies();
  if (args.wait) {
    wait_copies<1>();
    for (int i = 0; i < 4; ++i) args.out[i] = values[i];
    const bool early = values[4] == values[4];
    wait_copies<0>();
    for (int i = 4; i < 12; ++i) args.out[i] = early ? -1 : values[i];
  } else {
    for (int i = 0; i < 12; ++i) args.out[i] = values[i];
  }
}

void copies_arrive_when_waited_for() {
  DeviceBuffer<float> in({1, 2, 3, 4, 5, 6, 7, 8}), out(12);
  run_kernel(copies, 1, 1, 48, CopyArgs{in.data(), out.data(), true, 0});
  EXPECT(out.values() == (std::vector<float>{1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0}));
  run_kernel(copies, 1, 1, 48, CopyArgs{in.data(), out.data(), false, 0});
  for (int i = 0; i < 12; ++i) EXPECT(std::isnan(out[i]));
  EXPECT(contains(
      EXPECT_THROWS(Error, run_kernel(copies, 1, 1, 64, CopyArgs{in.data(), out.data(), true, 4})),
      "aligned to 16"));
  EXPECT(contains(
      EXPECT_THROWS(Error, run_kernel(copies, 1, 1, 47, CopyArgs{in.data(), out.data(), true, 0})),
      "47 bytes of shared memory"));
}

struct LoadArgs {
  const std::byte* address;
  uint4* out;
};
__global__ void load(LoadArgs args) { *args.out = load_streaming(args.address); }

void loads_are_aligned() {
  DeviceBuffer<unsigned> in({1, 2, 3, 4});
  DeviceBuffer<uint4> out(1);
  const auto* address = reinterpret_cast<const std::byte*>(in.data());
  run_kernel(load, 1, 1, 0, LoadArgs{address, out.data()});
  EXPECT(out[0].x == 1 && out[0].w == 4);
  EXPECT(
      contains(EXPECT_THROWS(Error, run_kernel(load, 1, 1, 0, LoadArgs{address + 8, out.data()})),
               "aligned to 16"));
}

// --- conversions and products --------------------------------------------------------------------
void conversions_round_to_the_nearest_even() {
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT(pack<BFloat16>(1.0f, -2.0f) == 0xc0003f80u);
  EXPECT(pack<BFloat16>(0x1.01p0f, 0x1.03p0f) == 0x3f823f80u);  // ties
  EXPECT(pack<BFloat16>(infinity, 3.4e38f) == 0x7f807f80u);
  EXPECT(pack<BFloat16>(std::nanf(""), -infinity) == 0xff807fffu);
  EXPECT(pack<BFloat16>(1e-40f, -0.0f) == 0x80000001u);
  EXPECT(pack<Float16>(1.0f, -2.0f) == 0xc0003c00u);
  EXPECT(pack<Float16>(2049.0f, 2051.0f) == 0x68026800u);  // ties
  EXPECT(pack<Float16>(65519.0f, 65520.0f) == 0x7c007bffu);
  EXPECT(pack<Float16>(std::nanf(""), -infinity) == 0xfc007fffu);
  EXPECT(pack<Float16>(0x1p-24f, 0x1p-25f) == 0x00000001u);
  EXPECT(pack<Float16>(0x1.8p-24f, 0x1.ffcp-15f) == 0x04000002u);
  // Every value comes back, and halfway between neighbours goes to the even one.
  for (uint32_t bits = 0; bits < 0x7c00; ++bits) {
    const float value = unpack<Float16>(bits).x, next = unpack<Float16>(bits + 1).x;
    EXPECT(pack<Float16>(value, -value) == (bits | (bits | 0x8000) << 16));
    if (bits + 1 == 0x7c00) break;
    EXPECT(pack<Float16>((value + next) / 2, 0) == bits + bits % 2);
  }
  EXPECT(unpack<Float16>(0x7c00fc00u).x == -infinity && unpack<Float16>(0x7c00fc00u).y == infinity);
  EXPECT(std::isnan(unpack<Float16>(0x7c01u).x));
  EXPECT(unpack<BFloat16>(0x3f80c000u).x == -2.0f && unpack<BFloat16>(0x3f80c000u).y == 1.0f);
  EXPECT(low_halves(0x11112222u, 0x33334444u) == 0x44442222u);
  EXPECT(high_halves(0x11112222u, 0x33334444u) == 0x33331111u);
}

template <typename T>
struct ProductArgs {
  const float* a;  // [16, 16]
  const float* b;  // [16, 8]
  float* c;        // [16, 8]
};
template <typename T>
__global__ void product(ProductArgs<T> args) {
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  const auto a = [&](int row, int k) {
    return pack<T>(args.a[row * 16 + k], args.a[row * 16 + k + 1]);
  };
  const auto b = [&](int k) { return pack<T>(args.b[k * 8 + g], args.b[(k + 1) * 8 + g]); };
  float c[4] = {1, 1, 1, 1};
  mma<T>(c, a(g, 2 * t), a(g + 8, 2 * t), a(g, 2 * t + 8), a(g + 8, 2 * t + 8), b(2 * t),
         b(2 * t + 8));
  for (int i = 0; i < 4; ++i) args.c[(g + i / 2 * 8) * 8 + 2 * t + i % 2] = c[i];
}

template <typename T>
void product_matches() {
  std::mt19937 random(1);
  DeviceBuffer<float> a(256), b(128), c(128);
  // Small integers are exact in every type.
  for (int i = 0; i < 256; ++i) a[i] = static_cast<float>(random() % 31) - 15;
  for (int i = 0; i < 128; ++i) b[i] = static_cast<float>(random() % 31) - 15;
  run_kernel(product<T>, 1, 32, 0, ProductArgs<T>{a.data(), b.data(), c.data()});
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      float expected = 1;
      for (int k = 0; k < 16; ++k) expected += a[row * 16 + k] * b[k * 8 + column];
      EXPECT(c[row * 8 + column] == expected);
    }
  }
}

void matrix_products_match() {
  product_matches<BFloat16>();
  product_matches<Float16>();
}

}  // namespace

int main() {
  RUN(copies_arrive_when_waited_for);
  RUN(loads_are_aligned);
  RUN(conversions_round_to_the_nearest_even);
  RUN(matrix_products_match);
  return check::failures == 0 ? 0 : 1;
}
