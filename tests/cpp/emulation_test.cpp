// The emulation of blocks, barriers, warps and memory finds what it is there to find.
#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

#include "check.hpp"
#include "core/cuda/device.cuh"
#include "device_buffer.hpp"
#include "run_kernel.hpp"

using l3ext::Error;
using namespace l3ext::cuda;

namespace {

// --- blocks and barriers -------------------------------------------------------------------------
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
  run_kernel(rotate, kBlocks, threads, threads * int64_t{4},
             RotateArgs{in.data(), out.data(), barrier});
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
    run_kernel(sum_of_all_blocks, 6, 64, 0, GridArgs{flags.data(), sums.data(), true}, true);
    for (int i = 0; i < 6; ++i) EXPECT(sums[i] == 21);
  }
  DeviceBuffer<int> flags(6), sums(6);
  run_kernel(sum_of_all_blocks, 6, 64, 0, GridArgs{flags.data(), sums.data(), false}, true);
  EXPECT(sums.values() != std::vector<int>(6, 21));
  const std::string plain = EXPECT_THROWS(
      Error, run_kernel(sum_of_all_blocks, 6, 64, 0, GridArgs{flags.data(), sums.data(), true}));
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
  run_kernel(take_items, 3, 64, 16, TakeArgs{next.data(), taken.data(), 100});
  std::vector<int> of_block(3);
  for (const int block : taken.values()) ++of_block[block];
  for (const int count : of_block) EXPECT(count > 0);
}

// --- warps ---------------------------------------------------------------------------------------
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
  run_kernel(shuffles, 1, 32, 0, ShuffleArgs{out.data()});
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
    return EXPECT_THROWS(Error, run_kernel(diverge, 2, 64, 0, DivergeArgs{kind}));
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
    run_kernel(pass_in_warp, 1, 32, 128, MessageArgs{out.data(), sync});
    bool right = true;
    for (int i = 0; i < 32; ++i) right = right && out[i] == 31 - i;
    EXPECT(right == sync);
  }
}

// --- memory --------------------------------------------------------------------------------------
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
  run_kernel(touch_shared, 1, 1, 100, SharedArgs{99, out.data()});
  EXPECT(std::isnan(out[0]));
  run_kernel(touch_shared, 1, 1, 100, SharedArgs{-1, out.data()});
  EXPECT(std::isnan(out[0]));
  EXPECT(contains(
      EXPECT_THROWS(Error, run_kernel(touch_shared, 1, 1, 100, SharedArgs{100, out.data()})),
      "behind its shared memory of 100 bytes"));
}

void a_launch_that_a_device_refuses_is_refused() {
  DeviceBuffer<float> out(1);
  const SharedArgs args{-1, out.data()};
  EXPECT(resident_blocks(touch_shared, 64, 227 * 1024) == 3);
  EXPECT(resident_blocks(touch_shared, 1024, 1024) == 6);
  EXPECT(resident_blocks(touch_shared, 64, 114 * 1024) == 3);
  EXPECT(contains(EXPECT_THROWS(Error, resident_blocks(touch_shared, 64, 227 * 1024 + 1)),
                  "232449 bytes of shared memory"));
  EXPECT(contains(EXPECT_THROWS(Error, launch(touch_shared, 1, 1025, 16, nullptr, args)),
                  "1 to 1024 threads, got 1025"));
  EXPECT(contains(EXPECT_THROWS(Error, launch(touch_shared, 7, 1024, 1024, nullptr, args, true)),
                  "resident blocks, got 7"));
  EXPECT(contains(EXPECT_THROWS(Error, launch(rotate, 1, 64, 60'000, nullptr, RotateArgs{})),
                  "resident_blocks() called before"));
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
    run_kernel(fault, 1, 32, 0, args);
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

}  // namespace

int main() {
  RUN(threads_exchange_through_shared_memory);
  RUN(a_missing_barrier_shows);
  RUN(a_grid_barrier_waits_for_every_block);
  RUN(persistent_blocks_share_a_queue);
  RUN(lanes_exchange_registers);
  RUN(divergence_is_reported);
  RUN(a_missing_syncwarp_shows);
  RUN(shared_memory_starts_as_nan_and_has_an_end);
  RUN(a_launch_that_a_device_refuses_is_refused);
  RUN(a_fault_says_which_thread);
  RUN(a_buffer_sees_writes_beside_it);
  return check::failures == 0 ? 0 : 1;
}
