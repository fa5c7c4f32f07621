#include "runtime/host_device.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/error.hpp"

namespace l3ext {
namespace {

class HostQueue final : public CopyQueue {
 public:
  void copy(void* target, const void* source, size_t bytes) override {
    std::memcpy(target, source, bytes);
  }
  void finish() override {}
};

}  // namespace

void* HostDevice::allocate(size_t bytes) {
  // mmap and not malloc: page-aligned, and given back to the system when freed.
  void* memory = ::mmap(nullptr, std::max<size_t>(bytes, 1), PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) {
    throw Error(ErrorCode::kRuntime,
                concat("cannot allocate ", bytes, " bytes of host memory: ", std::strerror(errno)));
  }
  ::madvise(memory, std::max<size_t>(bytes, 1), MADV_HUGEPAGE);  // a wish: refusal costs nothing
  return memory;
}

void HostDevice::deallocate(void* memory, size_t bytes) noexcept {
  ::munmap(memory, std::max<size_t>(bytes, 1));
}

void HostDevice::fill(void* target, unsigned char value, size_t bytes) {
  std::memset(target, value, bytes);
}

std::unique_ptr<CopyQueue> HostDevice::make_queue() { return std::make_unique<HostQueue>(); }

}  // namespace l3ext
