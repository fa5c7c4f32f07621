#include "runtime/host_device.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "core/error.hpp"
#include "runtime/near_memory.hpp"

namespace l3ext {
namespace {

class HostQueue final : public CopyQueue {
 public:
  size_t batch() const override { return 1; }
  void wait(const FencePtr& fence) override {
    if (fence) fence->wait();
  }
  void copy(std::span<const Copy> copies) override {
    for (const Copy& copy : copies) std::memcpy(copy.target, copy.source, copy.bytes);
  }
  void fill(void* target, unsigned char value, size_t bytes) override {
    std::memset(target, value, bytes);
  }
  FencePtr record() override { return nullptr; }
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

void* HostDevice::allocate_staging(size_t bytes) {
  void* memory = allocate(bytes);
  keep_from_children(memory, std::max<size_t>(bytes, 1));
  return memory;
}

std::unique_ptr<CopyQueue> HostDevice::make_queue() { return std::make_unique<HostQueue>(); }

std::shared_ptr<Stall> HostDevice::wait(void*, std::span<const FencePtr> fences) {
  for (const FencePtr& fence : fences) {
    if (fence) fence->wait();
  }
  return nullptr;
}

}  // namespace l3ext
