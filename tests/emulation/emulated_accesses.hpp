// Counts what a device's memory would do for the accesses of a kernel's warps: 32-byte sectors of
// global memory, wavefronts (passes) of shared memory; beside them the least that would do. Off
// unless a test makes an AccessCounter. It sees what goes through core/cuda/primitives.cuh and
// __ldg, and no other access.
//
// Lanes do not run side by side here, so which accesses are one instruction is found afterwards:
// between two collectives or barriers of a warp, the n-th time that each lane comes by the same
// place in the code. A lane that skips one of several rounds and not the last would be misplaced.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

namespace l3ext::cuda {

enum class Access { kGlobalLoad, kGlobalStore, kSharedLoad, kSharedStore };

// Of instructions of one kind and width. Shared memory serves 32 lanes at a time with 4 bytes each,
// 16 with 8 or 8 with 16, in as many wavefronts as the fullest of its 32 banks has words to give.
struct AccessCount {
  int64_t instructions = 0;
  int64_t transactions = 0;  // sectors or wavefronts
  int64_t least = 0;         // if the same bytes lay side by side, or spread over the banks

  AccessCount& operator+=(const AccessCount& other) {
    instructions += other.instructions;
    transactions += other.transactions;
    least += other.least;
    return *this;
  }
};

struct LaunchAccesses {
  const char* args_type;  // names the kernel
  int64_t shared_bytes;
  std::map<std::pair<Access, int>, AccessCount> counts;  // by kind and bytes of a lane

  AccessCount of(Access access, int bytes) const {
    const auto found = counts.find({access, bytes});
    return found == counts.end() ? AccessCount{} : found->second;
  }
};

// Counts the launches that are made while it lives; one at a time.
class AccessCounter {
 public:
  AccessCounter();
  ~AccessCounter();
  AccessCounter(const AccessCounter&) = delete;
  AccessCounter& operator=(const AccessCounter&) = delete;

  std::vector<LaunchAccesses> launches;
};

namespace emulated {

inline AccessCounter* access_counter = nullptr;

AccessCount count_instruction(Access access, int bytes, uint32_t lanes,
                              const std::array<uintptr_t, 32>& addresses);

// The accesses of one warp that are not yet known to be whole instructions.
class WarpAccesses {
 public:
  void add(const void* place, Access access, int bytes, int lane, const void* address);
  void close(LaunchAccesses& launch);  // at a collective or barrier

 private:
  struct Instruction {
    uint32_t lanes = 0;
    std::array<uintptr_t, 32> addresses;
  };
  struct Place {
    std::array<size_t, 32> done = {};  // instructions, by each lane
    std::vector<Instruction> instructions;
  };
  std::map<std::tuple<const void*, Access, int>, Place> places_;
};

// Of the thread that runs; the caller's own place in the code counts.
void count_access(Access access, const void* address, int bytes);

template <typename T>
[[gnu::always_inline]] inline void note_access(Access access, const T* address) {
  if (access_counter != nullptr) [[unlikely]] {
    count_access(access, address, static_cast<int>(sizeof(T)));
  }
}

}  // namespace emulated
}  // namespace l3ext::cuda
