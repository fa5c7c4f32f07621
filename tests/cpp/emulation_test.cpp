// The emulation finds what it is there to find, and computes what a device does.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.hpp"
#include "core/cuda/device.cuh"
#include "core/cuda/primitives.cuh"
#include "device_buffer.hpp"

using l3ext::BFloat16;
using l3ext::Error;
using l3ext::Float16;
using namespace l3ext::cuda;

namespace {

template <typename Args>
void run(void (*kernel)(Args), int blocks, int threads, int64_t shared_bytes, const Args& args,
         bool cooperative = false) {
  resident_blocks(kernel, threads, shared_bytes);
  launch(kernel, blocks, threads, shared_bytes, nullptr, args, cooperative);
}

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

// --- blocks and barriers
// ---------------------------------------------------------------------------
struct RotateArgs {
  const int* in;
  int* out;
  bool barrier;
};
__global__ void rotate(RotateArgs args) {
  auto* shared = reinterpret_cast<int*>(dynamic_shared());
  const unsigned first = blockIdx.x * blockDim.x;
  shared[threadIdx.x] = args.in[first + threadIdx.x];
  if (args.barrier) __syncthreads();
  args.out[first + threadIdx.x] = shared[(threadIdx.x + 1) % blockDim.x];
}

bool rotates(bool barrier, int threads, uint64_t seed) {
  constexpr int kBlocks = 7;
  DeviceBuffer<int> in(kBlocks * threads), out(kBlocks * threads);
  for (int i = 0; i < in.size(); ++i) in[i] = i;
  emulation().seed = seed;
  run(rotate, kBlocks, threads, threads * int64_t{4}, RotateArgs{in.data(), out.data(), barrier});
  bool right = true;
  for (int i = 0; i < out.size(); ++i) {
    right = right && out[i] == i / threads * threads + (i + 1) % threads;
  }
  return right;
}

void threads_exchange_through_shared_memory() {
  for (const int threads : {1, 31, 32, 33, 256, 1024}) {
    for (uint64_t seed = 0; seed < 3; ++seed) EXPECT(rotates(true, threads, seed));
  }
}

void a_missing_barrier_shows() {
  for (const int threads : {32, 64}) EXPECT(!rotates(false, threads, 0));
}

struct GridArgs {
  int* flags;
  int* sums;
  bool barrier;
};
__global__ void sum_of_all_blocks(GridArgs args) {
  if (threadIdx.x == 0) args.flags[blockIdx.x] = static_cast<int>(blockIdx.x) + 1;
  if (args.barrier) grid_barrier();
  if (threadIdx.x != 33) return;
  args.sums[blockIdx.x] = 0;
  for (unsigned i = 0; i < gridDim.x; ++i) args.sums[blockIdx.x] += args.flags[i];
}

void a_grid_barrier_waits_for_every_block() {
  for (uint64_t seed = 0; seed < 5; ++seed) {
    emulation().seed = seed;
    DeviceBuffer<int> flags(6), sums(6);
    run(sum_of_all_blocks, 6, 64, 0, GridArgs{flags.data(), sums.data(), true}, true);
    for (int i = 0; i < 6; ++i) EXPECT(sums[i] == 21);
  }
  DeviceBuffer<int> flags(6), sums(6);
  run(sum_of_all_blocks, 6, 64, 0, GridArgs{flags.data(), sums.data(), false}, true);
  EXPECT(sums.values() != std::vector<int>(6, 21));
  const std::string plain = EXPECT_THROWS(
      Error, run(sum_of_all_blocks, 6, 64, 0, GridArgs{flags.data(), sums.data(), true}));
  EXPECT(contains(plain, "cooperative"));
}

struct TakeArgs {
  int* next;
  int* taken;  // [items], by which block
  int items;
};
__global__ void take_items(TakeArgs args) {
  auto* item = reinterpret_cast<int*>(dynamic_shared());
  for (;;) {
    if (threadIdx.x == 0) *item = atomicAdd(args.next, 1);
    __syncthreads();
    const int mine = *item;
    __syncthreads();
    if (mine >= args.items) return;
    if (threadIdx.x == 0) args.taken[mine] = static_cast<int>(blockIdx.x);
  }
}

void persistent_blocks_share_a_queue() {
  DeviceBuffer<int> next(1), taken(100);
  next[0] = 0;
  run(take_items, 3, 64, 16, TakeArgs{next.data(), taken.data(), 100});
  std::vector<int> of_block(3);
  for (const int block : taken.values()) ++of_block[block];
  for (const int count : of_block) EXPECT(count > 0);
}

// --- warps
// -----------------------------------------------------------------------------------------
struct ShuffleArgs {
  int* out;  // [lanes, 7]
};
__global__ void shuffles(ShuffleArgs args) {
  const int lane = static_cast<int>(threadIdx.x);
  int* out = args.out + lane * 7;
  out[0] = __shfl_sync(0xffffffffu, lane, 5);
  out[1] = __shfl_sync(0xffffffffu, lane, lane + 1, 8);
  out[2] = __shfl_xor_sync(0xffffffffu, lane, 4);
  out[3] = __shfl_up_sync(0xffffffffu, lane, 2, 16);
  out[4] = __shfl_down_sync(0xffffffffu, lane, 3);
  out[5] = static_cast<int>(__ballot_sync(0xffffffffu, lane % 3 == 0));
  // Two halves of a warp are two collectives.
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  const double sent = __shfl_xor_sync(half, lane + 0.5, 15);
  out[6] = static_cast<int>(2 * sent);
}

void lanes_exchange_registers() {
  DeviceBuffer<int> out(32 * 7);
  run(shuffles, 1, 32, 0, ShuffleArgs{out.data()});
  for (int lane = 0; lane < 32; ++lane) {
    const int* got = out.data() + lane * 7;
    EXPECT(got[0] == 5);
    EXPECT(got[1] == lane / 8 * 8 + (lane + 1) % 8);
    EXPECT(got[2] == (lane ^ 4));
    EXPECT(got[3] == (lane % 16 < 2 ? lane : lane - 2));
    EXPECT(got[4] == (lane < 29 ? lane + 3 : lane));
    EXPECT(static_cast<unsigned>(got[5]) == 0x49249249u);
    EXPECT(got[6] == 2 * (lane ^ 15) + 1);
  }
}

struct DivergeArgs {
  int kind;
};
__global__ void diverge(DivergeArgs args) {
  const bool first = threadIdx.x < 16;
  if (args.kind == 0 && first) __syncwarp();
  if (args.kind == 1 && first) __syncthreads();
  if (args.kind == 1 && !first) __shfl_sync(0xffffffffu, 1, 0);
  if (args.kind == 2 && first) __shfl_sync(0xffffu, 1, 16);
  if (args.kind == 3) __syncwarp(0xffu);
  if (args.kind == 4) throw Error(l3ext::ErrorCode::kValue, "from a thread");
}

void divergence_is_reported() {
  const auto message = [](int kind) {
    return EXPECT_THROWS(Error, run(diverge, 2, 64, 0, DivergeArgs{kind}));
  };
  const std::string exited = message(0);
  EXPECT(contains(exited, "DivergeArgs") && contains(exited, "deadlock"));
  EXPECT(contains(exited, "block 0: ") && contains(exited, "block 1: "));
  EXPECT(contains(exited, "threads 0-15 __syncwarp of lanes ffffffff threads 16-63 has exited"));
  const std::string mixed = message(1);
  EXPECT(contains(mixed, "threads 0-15 __syncthreads threads 16-31 __shfl_sync"));
  EXPECT(contains(message(2), "source lane in the mask, got 16"));
  EXPECT(contains(message(3), "in its own mask"));
  EXPECT(message(4) == "from a thread");
  EXPECT(rotates(true, 64, 0));  // and the machine runs on
}

struct MessageArgs {
  int* out;
  bool sync;
};
__global__ void pass_in_warp(MessageArgs args) {
  auto* shared = reinterpret_cast<volatile int*>(dynamic_shared());
  shared[threadIdx.x] = static_cast<int>(threadIdx.x);
  if (args.sync) __syncwarp();
  args.out[threadIdx.x] = shared[31 - threadIdx.x];
}

void a_missing_syncwarp_shows() {
  DeviceBuffer<int> out(32);
  for (const bool sync : {true, false}) {
    run(pass_in_warp, 1, 32, 128, MessageArgs{out.data(), sync});
    bool right = true;
    for (int i = 0; i < 32; ++i) right = right && out[i] == 31 - i;
    EXPECT(right == sync);
  }
}

// --- memory
// ----------------------------------------------------------------------------------------
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
  run(copies, 1, 1, 48, CopyArgs{in.data(), out.data(), true, 0});
  EXPECT(out.values() == (std::vector<float>{1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0}));
  run(copies, 1, 1, 48, CopyArgs{in.data(), out.data(), false, 0});
  for (int i = 0; i < 12; ++i) EXPECT(std::isnan(out[i]));
  EXPECT(contains(
      EXPECT_THROWS(Error, run(copies, 1, 1, 64, CopyArgs{in.data(), out.data(), true, 4})),
      "aligned to 16"));
  EXPECT(contains(
      EXPECT_THROWS(Error, run(copies, 1, 1, 47, CopyArgs{in.data(), out.data(), true, 0})),
      "47 bytes of shared memory"));
}

struct SharedArgs {
  int64_t write_at;
  float* out;
};
__global__ void touch_shared(SharedArgs args) {
  std::memcpy(args.out, dynamic_shared(), 4);
  if (args.write_at >= 0) dynamic_shared()[args.write_at] = std::byte{1};
}

void shared_memory_starts_as_nan_and_has_an_end() {
  DeviceBuffer<float> out(1);
  run(touch_shared, 1, 1, 100, SharedArgs{99, out.data()});
  EXPECT(std::isnan(out[0]));
  run(touch_shared, 1, 1, 100, SharedArgs{-1, out.data()});
  EXPECT(std::isnan(out[0]));
  EXPECT(contains(EXPECT_THROWS(Error, run(touch_shared, 1, 1, 100, SharedArgs{100, out.data()})),
                  "behind its shared memory of 100 bytes"));
}

void a_launch_that_a_device_refuses_is_refused() {
  DeviceBuffer<float> out(1);
  const SharedArgs args{-1, out.data()};
  EXPECT(resident_blocks(touch_shared, 64, 227 * 1024) == 3);
  EXPECT(resident_blocks(touch_shared, 1024, 1024) == 6);
  EXPECT(resident_blocks(touch_shared, 64, 227 * 1024 + 1) == 0);
  EXPECT(contains(EXPECT_THROWS(Error, launch(touch_shared, 1, 1025, 16, nullptr, args)),
                  "1 to 1024 threads, got 1025"));
  EXPECT(contains(EXPECT_THROWS(Error, launch(touch_shared, 7, 1024, 1024, nullptr, args, true)),
                  "resident blocks, got 7"));
  resident_blocks(touch_shared, 64, 50'000);
  EXPECT(contains(EXPECT_THROWS(Error, launch(touch_shared, 1, 64, 60'000, nullptr, args)),
                  "resident_blocks() called before"));
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
  run(load, 1, 1, 0, LoadArgs{address, out.data()});
  EXPECT(out[0].x == 1 && out[0].w == 4);
  EXPECT(contains(EXPECT_THROWS(Error, run(load, 1, 1, 0, LoadArgs{address + 8, out.data()})),
                  "aligned to 16"));
}

struct FaultArgs {
  const int* in;
  int* out;
  int depth;
};
[[gnu::noinline]] int fill_stack(int depth) {
  volatile int here[256] = {depth};
  return depth == 0 ? 0 : fill_stack(depth - 1) + here[0];
}
__global__ void fault(FaultArgs args) {
  if (threadIdx.x == 5) *args.out = args.depth == 0 ? *args.in : fill_stack(args.depth);
}

// What a process that runs the kernel says before it dies.
std::string last_words(const FaultArgs& args) {
  int ends[2];
  if (pipe(ends) != 0) return "no pipe";
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    run(fault, 1, 32, 0, args);
    _exit(0);
  }
  close(ends[1]);
  std::string words;
  char part[256];
  for (ssize_t n = 0; (n = read(ends[0], part, sizeof part)) > 0;) words.append(part, n);
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return status == 0 ? "lives" : words;
}

void a_fault_says_which_thread() {
  DeviceBuffer<int> in(4), out(1);
  EXPECT(last_words({in.data(), out.data(), 0}) == "lives");
  EXPECT(contains(last_words({in.data() + 4, out.data(), 0}),
                  "block 0, thread 5: access outside of any buffer"));
  EXPECT(contains(last_words({in.data(), out.data(), 1000}), "thread 5: stack overflow"));
}

void a_buffer_sees_writes_beside_it() {
  DeviceBuffer<char> buffer(13);
  EXPECT(buffer.nothing_written_outside());
  for (const int64_t beside : {-1, 13}) {
    char& byte = buffer.data()[beside];
    byte = 0;
    EXPECT(!buffer.nothing_written_outside());
    byte = -1;
  }
}

// --- conversions and products
// ----------------------------------------------------------------------
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
  run(product<T>, 1, 32, 0, ProductArgs<T>{a.data(), b.data(), c.data()});
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
  RUN(threads_exchange_through_shared_memory);
  RUN(a_missing_barrier_shows);
  RUN(a_grid_barrier_waits_for_every_block);
  RUN(persistent_blocks_share_a_queue);
  RUN(lanes_exchange_registers);
  RUN(divergence_is_reported);
  RUN(a_missing_syncwarp_shows);
  RUN(copies_arrive_when_waited_for);
  RUN(shared_memory_starts_as_nan_and_has_an_end);
  RUN(a_launch_that_a_device_refuses_is_refused);
  RUN(loads_are_aligned);
  RUN(a_fault_says_which_thread);
  RUN(a_buffer_sees_writes_beside_it);
  RUN(conversions_round_to_the_nearest_even);
  RUN(matrix_products_match);
  return check::failures == 0 ? 0 : 1;
}
