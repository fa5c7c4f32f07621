#include "emulated_device.hpp"

#include <ucontext.h>
#include <unistd.h>

#include <array>
#include <csignal>
#include <cstdio>
#include <exception>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "guarded_pages.hpp"

#ifdef __SANITIZE_ADDRESS__
#include <pthread.h>
#include <sanitizer/common_interface_defs.h>
#endif

EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace l3ext::cuda {
namespace {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 64 * 1024;
constexpr int64_t kPlainSharedBytes = 48 * 1024;  // more needs a function attribute on a device

using emulated::GuardedPages;

// --- fibers --------------------------------------------------------------------------------------
struct Copy {
  std::byte* shared;
  const void* global;
  bool valid;
  int group;
};

struct Warp;

// One CUDA thread, or (without a stack) the host. A fiber outlives its thread and runs others. What
// every switch reads comes first: lanes take turns at every collective.
struct alignas(64) Fiber {
  void* context[5];                // of __builtin_setjmp
  const char* waits_in = nullptr;  // of a thread that cannot run
  void* operand = nullptr;
  Warp* warp = nullptr;
  uint32_t mask = 0;  // of the lanes that it waits for
  unsigned thread = 0;
  bool started = true;

  std::vector<Copy> copies;
  int groups = 0;  // committed
  std::unique_ptr<GuardedPages> stack;
  ucontext_t start;
};

struct Block;

struct Warp {
  Block* block;
  std::array<Fiber, kLanes> fibers;
  uint32_t live = 0, runnable = 0;
  uint32_t waiting = 0;  // lanes in a collective
  int stride = 1;        // from one lane to the next that runs; odd
  bool queued = false;
  emulated::WarpAccesses accesses;
};

struct Block {
  unsigned index = 0;
  int live = 0, at_barrier = 0;
  std::unique_ptr<GuardedPages> shared;
  std::byte* shared_begin = nullptr;
  std::vector<std::unique_ptr<Warp>> warps;
};

// The state of the launch that runs. Blocks, fibers and stacks stay for the next one.
struct Machine {
  Fiber host;
  Fiber* current = &host;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Warp*> queue;  // that have runnable lanes
  emulated::LaunchShape shape = {};
  const std::function<void()>* kernel = nullptr;
  std::exception_ptr error;
  std::array<void*, kLanes> operands;  // of the collective that completes
  int at_grid_barrier = 0;
  uint64_t random_state = 0;
  bool running = false;
  std::unordered_map<const void*, int64_t> shared_allowed;  // by resident_blocks()

  uint32_t random() {  // xorshift64*
    random_state ^= random_state >> 12;
    random_state ^= random_state << 25;
    random_state ^= random_state >> 27;
    return static_cast<uint32_t>(random_state * 0x2545f4914f6cdd1dull >> 32);
  }
};
Machine machine;

Block& block_of(const Fiber& fiber) { return *fiber.warp->block; }

// AddressSanitizer has to know which stack is in use.
#ifdef __SANITIZE_ADDRESS__
void tell_sanitizer_of_switch_to(const Fiber& to, void** fake_stack) {
  static const std::pair<void*, size_t> host_stack = [] {
    pthread_attr_t attributes;
    void* begin = nullptr;
    size_t bytes = 0;
    pthread_getattr_np(pthread_self(), &attributes);
    pthread_attr_getstack(&attributes, &begin, &bytes);
    pthread_attr_destroy(&attributes);
    return std::pair(begin, bytes);
  }();
  __sanitizer_start_switch_fiber(fake_stack, to.stack ? to.stack->begin() : host_stack.first,
                                 to.stack ? to.stack->bytes() : host_stack.second);
}
void tell_sanitizer_of_arrival(void* fake_stack) {
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
}
#else
void tell_sanitizer_of_switch_to(const Fiber&, void**) {}
void tell_sanitizer_of_arrival(void*) {}
#endif

// Saves this fiber and goes on with `to`; returns when another fiber switches back. The builtins
// save three registers and leave the rest to the compiler, and without a call on the way the
// processor goes on predicting returns.
[[gnu::noinline]] void switch_to(Fiber& to) {
  Fiber& from = *machine.current;
  if (&from == &to) return;
  machine.current = &to;
  threadIdx.x = to.thread;
  void* fake_stack = nullptr;
  tell_sanitizer_of_switch_to(to, &fake_stack);
  if (__builtin_setjmp(from.context) == 0) {
    if (!to.started) {
      to.started = true;
      setcontext(&to.start);
    }
    __builtin_longjmp(to.context, 1);
  }
  tell_sanitizer_of_arrival(fake_stack);
}

// Another runnable lane of the warp, in this round's order; else the host.
Fiber& next_of(Warp& warp, int lane) {
  if (warp.runnable == 0) return machine.host;
  do {
    lane = (lane + warp.stride) % kLanes;
  } while ((warp.runnable >> lane & 1) == 0);
  return warp.fibers[lane];
}

void make_runnable(Warp& warp, uint32_t lanes) {
  warp.runnable |= lanes;
  warp.stride = static_cast<int>(machine.random() | 1) & (kLanes - 1);
  if (!warp.queued && lanes != 0) machine.queue.push_back(&warp);
  warp.queued = warp.queued || lanes != 0;
}

// What a warp has accessed since it was here last is whole instructions now.
void close_accesses(Warp& warp) {
  if (emulated::access_counter != nullptr) {
    warp.accesses.close(emulated::access_counter->launches.back());
  }
}

void release(Block& block) {
  block.at_barrier = 0;
  for (auto& warp : block.warps) {
    close_accesses(*warp);
    make_runnable(*warp, warp->live);
  }
}

void stop_running(Fiber& fiber, const char* waits_in, uint32_t mask) {
  fiber.waits_in = waits_in;
  fiber.mask = mask;
  fiber.warp->runnable &= ~(1u << fiber.thread % kLanes);
}

void exit_thread(Fiber& fiber) {
  Warp& warp = *fiber.warp;
  stop_running(fiber, "has exited", 0);
  warp.live &= ~(1u << fiber.thread % kLanes);
  if (warp.live == 0) close_accesses(warp);
  Block& block = *warp.block;
  --block.live;
  if (block.live > 0 && block.at_barrier == block.live) release(block);
  switch_to(machine.error ? machine.host : next_of(warp, fiber.thread % kLanes));
}

// What every fiber runs: one thread after the other.
void run_threads() {
  tell_sanitizer_of_arrival(nullptr);
  for (;;) {
    try {
      (*machine.kernel)();
    } catch (...) {
      machine.error = std::current_exception();
    }
    exit_thread(*machine.current);
  }
}

void prepare(Fiber& fiber, int stagger) {
  fiber.stack = std::make_unique<GuardedPages>(kStackBytes);
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack->begin();
  // Stacks that begin at the same offset of a page would share the same lines of the cache.
  fiber.start.uc_stack.ss_size = kStackBytes - stagger * size_t{320};
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, run_threads, 0);
  fiber.started = false;
}

// --- blocks --------------------------------------------------------------------------------------
void start_block(Block& block, unsigned index) {
  const emulated::LaunchShape& shape = machine.shape;
  block.index = index;
  block.live = shape.threads;
  block.at_barrier = 0;
  const auto shared_bytes = static_cast<size_t>(shape.shared_bytes);
  if (!block.shared || block.shared->begin() + shared_bytes > block.shared->end()) {
    block.shared = std::make_unique<GuardedPages>(shared_bytes);
  }
  block.shared_begin = block.shared->end() - (shared_bytes + 127) / 128 * 128;
  std::fill(block.shared_begin, block.shared->end(), std::byte{0xff});
  block.warps.resize(static_cast<size_t>(shape.threads + kLanes - 1) / kLanes);
  for (size_t w = 0; w < block.warps.size(); ++w) {
    if (!block.warps[w]) block.warps[w] = std::make_unique<Warp>();
    Warp& warp = *block.warps[w];
    warp.block = &block;
    warp.live = warp.runnable = warp.waiting = 0;
    warp.queued = false;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int thread = static_cast<int>(w) * kLanes + lane;
      if (thread >= shape.threads) break;
      Fiber& fiber = warp.fibers[lane];
      if (!fiber.stack) prepare(fiber, lane);
      fiber.warp = &warp;
      fiber.thread = static_cast<unsigned>(thread);
      fiber.copies.clear();
      fiber.groups = 0;
      warp.live |= 1u << lane;
    }
    make_runnable(warp, warp.live);
  }
}

// Bytes between the end of shared memory and its page.
void check_shared_end(const Block& block) {
  const std::byte* end = block.shared_begin + machine.shape.shared_bytes;
  L3EXT_CHECK(std::all_of(end, static_cast<const std::byte*>(block.shared->end()),
                          [](std::byte b) { return b == std::byte{0xff}; }),
              "kernel(", machine.shape.args_type, "): block ", block.index,
              " wrote behind its shared memory of ", machine.shape.shared_bytes, " bytes");
}

// "block 0 threads 0-31 __syncthreads, ..." of all blocks.
std::string where_threads_wait() {
  std::ostringstream text;
  for (const auto& block : machine.blocks) {
    if (block->live == 0) continue;
    text << "; block " << block->index << ":";
    int first = 0;
    for (int thread = 0; thread < machine.shape.threads; ++thread) {
      const auto fiber = [&](int t) -> const Fiber& {
        return block->warps[t / kLanes]->fibers[t % kLanes];
      };
      const bool last = thread + 1 == machine.shape.threads ||
                        fiber(thread + 1).waits_in != fiber(thread).waits_in ||
                        fiber(thread + 1).mask != fiber(thread).mask;
      if (!last) continue;
      text << " threads " << first << "-" << thread << " " << fiber(thread).waits_in;
      if (fiber(thread).mask != 0)
        text << " of lanes " << std::hex << fiber(thread).mask << std::dec;
      first = thread + 1;
    }
  }
  return std::move(text).str();
}

// Runs warps in random order until no lane can run.
void run_queue(std::vector<unsigned>& blocks_to_come) {
  while (!machine.queue.empty() && !machine.error) {
    const size_t pick = machine.random() % machine.queue.size();
    Warp& warp = *machine.queue[pick];
    blockIdx.x = warp.block->index;
    switch_to(next_of(warp, static_cast<int>(machine.random() % kLanes)));
    if (warp.runnable != 0) continue;
    warp.queued = false;
    machine.queue[pick] = machine.queue.back();
    machine.queue.pop_back();
    if (warp.block->live != 0 || machine.error) continue;
    check_shared_end(*warp.block);
    if (blocks_to_come.empty()) continue;
    start_block(*warp.block, blocks_to_come.back());
    blocks_to_come.pop_back();
  }
}

// --- faults --------------------------------------------------------------------------------------
struct sigaction previous_action;

void explain_fault(int signal, siginfo_t* info, void*) {
  const Fiber& fiber = *machine.current;
  char text[512];
  int length = 0;
  if (fiber.stack) {
    const auto* address = static_cast<const std::byte*>(info->si_addr);
    const bool overflow = address < fiber.stack->begin() && fiber.stack->begin() - address <= 4096;
    length = std::snprintf(
        text, sizeof text, "emulated CUDA: kernel(%s), block %u, thread %u: %s at address %p\n",
        machine.shape.args_type, block_of(fiber).index, fiber.thread,
        overflow ? "stack overflow" : "access outside of any buffer", info->si_addr);
  }
  if (length > 0) (void)!write(STDERR_FILENO, text, static_cast<size_t>(length));
  sigaction(signal, &previous_action, nullptr);  // and fault again
}

void explain_faults() {
  static std::array<std::byte, 64 * 1024> signal_stack;  // the fiber's own may be full
  stack_t stack = {};
  stack.ss_sp = signal_stack.data();
  stack.ss_size = signal_stack.size();
  sigaltstack(&stack, nullptr);
  struct sigaction action = {};
  action.sa_sigaction = explain_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &previous_action);
}

}  // namespace

Emulation& emulation() {
  static Emulation settings;
  return settings;
}

std::byte* dynamic_shared() { return block_of(*machine.current).shared_begin; }

void grid_barrier() {
  const emulated::LaunchShape& shape = machine.shape;
  L3EXT_CHECK(shape.cooperative, "grid_barrier: expected a cooperative launch, got a plain one");
  Fiber& fiber = *machine.current;
  stop_running(fiber, "grid_barrier", 0);
  if (++machine.at_grid_barrier < shape.blocks * shape.threads) {
    return switch_to(next_of(*fiber.warp, fiber.thread % kLanes));
  }
  machine.at_grid_barrier = 0;
  for (auto& block : machine.blocks) release(*block);
  switch_to(machine.host);
}

namespace emulated {

// False unless all lanes of the mask wait for the same.
[[gnu::noinline]] bool gather_operands(const Fiber& fiber) {
  for (uint32_t rest = fiber.mask; rest != 0; rest &= rest - 1) {
    const int i = std::countr_zero(rest);
    const Fiber& other = fiber.warp->fibers[i];
    if (other.mask != fiber.mask ||
        (other.waits_in != fiber.waits_in && std::strcmp(other.waits_in, fiber.waits_in) != 0)) {
      return false;
    }
    machine.operands[i] = other.operand;
  }
  return true;
}

int lane() { return static_cast<int>(machine.current->thread % kLanes); }

void collective(const char* name, uint32_t mask, void* operand, Combine combine) {
  Fiber& fiber = *machine.current;
  Warp& warp = *fiber.warp;
  const uint32_t bit = 1u << lane();
  L3EXT_CHECK(mask & bit, name, ": expected lane ", lane(), " in its own mask, got ", mask);
  fiber.operand = operand;
  stop_running(fiber, name, mask);
  warp.waiting |= bit;
  if ((warp.waiting & mask) != mask || !gather_operands(fiber)) {
    return switch_to(next_of(warp, lane()));
  }
  combine(machine.operands.data(), mask);
  close_accesses(warp);
  warp.waiting &= ~mask;
  make_runnable(warp, mask);
  const uint32_t chance = machine.random();
  const bool other_warp = chance % 16 == 0;
  switch_to(other_warp ? machine.host : next_of(warp, static_cast<int>(chance >> 8) % kLanes));
}

void block_barrier() {
  Fiber& fiber = *machine.current;
  stop_running(fiber, "__syncthreads", 0);
  Block& block = block_of(fiber);
  if (++block.at_barrier < block.live) return switch_to(next_of(*fiber.warp, lane()));
  release(block);
  switch_to(machine.host);
}

[[gnu::noinline]] void count_access(Access access, const void* address, int bytes) {
  const Fiber& fiber = *machine.current;
  fiber.warp->accesses.add(__builtin_return_address(0), access, bytes, lane(), address);
}

void copy_async(void* shared, const void* global, bool valid) {
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  L3EXT_CHECK(aligned(shared) && aligned(global),
              "copy_async: expected addresses aligned to 16 bytes, got ", shared, " and ", global);
  auto* target = static_cast<std::byte*>(shared);
  const int64_t offset = target - dynamic_shared();
  L3EXT_CHECK(offset >= 0 && offset + 16 <= machine.shape.shared_bytes,
              "copy_async: expected a target in the block's ", machine.shape.shared_bytes,
              " bytes of shared memory, got offset ", offset);
  std::fill(target, target + 16, std::byte{0xff});
  Fiber& fiber = *machine.current;
  fiber.copies.push_back({target, global, valid, fiber.groups});
}

void commit_copies() { ++machine.current->groups; }

void wait_copies(int pending) {
  Fiber& fiber = *machine.current;
  size_t done = 0;
  for (; done < fiber.copies.size(); ++done) {
    const Copy& copy = fiber.copies[done];
    if (copy.group >= fiber.groups - pending) break;
    if (copy.valid) {
      std::memcpy(copy.shared, copy.global, 16);
    } else {
      std::fill(copy.shared, copy.shared + 16, std::byte{0});
    }
  }
  fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<int64_t>(done));
}

int resident_blocks(const void* kernel, int threads, int64_t shared_bytes) {
  // Of one multiprocessor. Registers, which are not emulated, leave room for two blocks of the
  // attention kernels: more would only be more stacks.
  constexpr int kThreads = 2048, kBlocks = 2;
  constexpr int64_t kReserved = 1024;  // bytes of shared memory per block
  const int64_t limit = emulation().shared_bytes;
  if (threads < 1 || threads > 1024 || shared_bytes > limit) {
    throw Error(
        ErrorCode::kRuntime,
        concat("device: expected room for a kernel of ", threads, " threads and ", shared_bytes,
               " bytes of shared memory, got a device with at most ", limit, " bytes a block"));
  }
  int64_t& allowed = machine.shared_allowed[kernel];
  allowed = std::max(allowed, shared_bytes);
  const auto by_shared = (limit + kReserved) / (shared_bytes + kReserved);
  return emulation().multiprocessors *
         static_cast<int>(std::min<int64_t>({kThreads / threads, kBlocks, by_shared}));
}

void launch(const LaunchShape& shape, const std::function<void()>& kernel) {
  if (shape.blocks == 0) return;
  const auto check = [&](bool holds, const char* expected, int64_t got) {
    L3EXT_CHECK(holds, "launch of kernel(", shape.args_type, "): expected ", expected, ", got ",
                got);
  };
  check(!machine.running, "no launch from within a kernel", 1);
  check(shape.blocks > 0, "blocks >= 0", shape.blocks);
  check(shape.threads >= 1 && shape.threads <= 1024, "1 to 1024 threads", shape.threads);
  const auto allowed = machine.shared_allowed.find(shape.kernel);
  check(shape.shared_bytes <= kPlainSharedBytes ||
            (allowed != machine.shared_allowed.end() && shape.shared_bytes <= allowed->second),
        "resident_blocks() called before with as many shared bytes", shape.shared_bytes);
  if (shape.cooperative) {
    check(shape.blocks <= resident_blocks(shape.kernel, shape.threads, shape.shared_bytes),
          "a cooperative launch of resident blocks", shape.blocks);
  }
  static const bool once = (explain_faults(), true);
  (void)once;

  if (access_counter != nullptr) {
    access_counter->launches.push_back({shape.args_type, shape.shared_bytes, {}});
  }
  machine.running = true;
  machine.shape = shape;
  machine.kernel = &kernel;
  machine.error = nullptr;
  machine.at_grid_barrier = 0;
  machine.random_state = (emulation().seed + 1) * 0x9e3779b97f4a7c15ull;
  machine.queue.clear();
  blockDim.x = static_cast<unsigned>(shape.threads);
  gridDim.x = static_cast<unsigned>(shape.blocks);
  std::vector<unsigned> to_come(static_cast<size_t>(shape.blocks));
  for (unsigned i = 0; i < to_come.size(); ++i) {
    to_come[i] = i;
    std::swap(to_come[i], to_come[machine.random() % (i + 1)]);
  }
  // A plain launch has at least one block under way per multiprocessor, a cooperative one has all.
  const int together =
      shape.cooperative ? shape.blocks : std::min(shape.blocks, emulation().multiprocessors);
  machine.blocks.resize(static_cast<size_t>(together));
  try {
    for (auto& block : machine.blocks) {
      if (!block) block = std::make_unique<Block>();
      start_block(*block, to_come.back());
      to_come.pop_back();
    }
    run_queue(to_come);
    if (machine.error) std::rethrow_exception(machine.error);
    for (const auto& block : machine.blocks) {
      if (block->live == 0) continue;
      throw Error(ErrorCode::kRuntime,
                  concat("kernel(", shape.args_type, "): deadlock", where_threads_wait()));
    }
    machine.running = false;
  } catch (...) {
    machine.blocks.clear();  // with the fibers that stopped half way
    machine.running = false;
    throw;
  }
}

}  // namespace emulated
}  // namespace l3ext::cuda
