#include "runtime/near_memory.hpp"

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <thread>

#include "core/error.hpp"
#include "core/huge_pages.hpp"
#include "core/parallel.hpp"

namespace l3ext {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kTouchedAtOnce = size_t{16} << 20;  // by one thread
constexpr int kMostThreads = 8;  // clearing pages is bound by memory long before

size_t mapped_bytes(size_t bytes) {
  return (std::max<size_t>(bytes, 1) + kPage - 1) / kPage * kPage;
}

// A wish: without the system call, the node or the permission, pages lie where they would anyway.
void prefer_node(void* memory, size_t bytes, int node) {
#ifdef SYS_mbind
  constexpr int kPreferred = 1;  // MPOL_PREFERRED: of <numaif.h>, which comes with libnuma only
  constexpr int kBits = 64;
  if (node < 0 || node >= kBits) return;
  const uint64_t mask = uint64_t{1} << node;
  ::syscall(SYS_mbind, memory, bytes, kPreferred, &mask, kBits + 1, 0);
#else
  static_cast<void>(memory), static_cast<void>(bytes), static_cast<void>(node);
#endif
}

}  // namespace

int numa_node_of(const std::string& pci_bus_id, const std::string& devices) {
  std::string name = pci_bus_id;
  std::ranges::transform(name, name.begin(), [](unsigned char c) {
    return static_cast<char>(c >= 'A' && c <= 'F' ? c - 'A' + 'a' : c);
  });
  std::ifstream file(devices + "/" + name + "/numa_node");
  int node = -1;
  return file >> node && node >= 0 ? node : -1;
}

void keep_from_children(void* memory, size_t bytes) noexcept {
  ::madvise(memory, bytes, MADV_DONTFORK);
}

void* map_near(size_t bytes, int numa_node) {
  const size_t length = mapped_bytes(bytes);
  void* memory =
      ::mmap(nullptr, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    throw Error(ErrorCode::kRuntime,
                concat("cannot allocate ", bytes, " bytes of host memory: ", std::strerror(errno)));
  }
  prefer_node(memory, length, numa_node);
  keep_from_children(memory, length);
  advise_huge_pages(memory, length);
  const size_t chunks = (length + kTouchedAtOnce - 1) / kTouchedAtOnce;
  const int threads =
      std::min<int>(kMostThreads, static_cast<int>(std::thread::hardware_concurrency()));
  parallel_for(threads, static_cast<int64_t>(chunks), [&](int64_t chunk) {
    const size_t begin = static_cast<size_t>(chunk) * kTouchedAtOnce;
    std::memset(static_cast<std::byte*>(memory) + begin, 0,
                std::min(kTouchedAtOnce, length - begin));
  });
  return memory;
}

void unmap_near(void* memory, size_t bytes) noexcept { ::munmap(memory, mapped_bytes(bytes)); }

}  // namespace l3ext
