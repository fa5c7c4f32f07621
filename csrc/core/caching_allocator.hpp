// Memory of large outputs that come and go with every step. Fresh memory costs a fault and zeros
// for every page, a third of a backward pass that writes each gradient once. So blocks that were
// freed are kept for the next step, as the caching allocators of devices keep them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

namespace l3ext {

class CachingAllocator {
 public:
  struct GiveBack {
    CachingAllocator* allocator = nullptr;
    size_t nbytes = 0;  // of the block
    void operator()(std::byte* data) const noexcept { allocator->free(data, nbytes); }
  };
  using Block = std::unique_ptr<std::byte, GiveBack>;  // the allocator must outlive it

  // A block that nobody wanted while so many were allocated goes back to the system.
  static constexpr uint64_t kKeptFor = 64;

  CachingAllocator() = default;
  CachingAllocator(const CachingAllocator&) = delete;
  CachingAllocator& operator=(const CachingAllocator&) = delete;
  ~CachingAllocator() { release(); }

  // The process', which is never destroyed: an output may outlive everything else.
  static CachingAllocator& of_process();

  // At least so many bytes, from the start of a huge page; they hold what their last owner left, or
  // zeros. From any thread. Throws kRuntime where the system has no memory.
  Block allocate(size_t nbytes);
  // What is kept goes back to the system.
  void release() noexcept;

  size_t kept_bytes() const;

 private:
  struct Kept {
    std::byte* data;
    size_t nbytes;
    uint64_t freed_at;  // by the number of allocations
  };

  Block kept_block(size_t nbytes);
  void free(std::byte* data, size_t nbytes) noexcept;

  // Tried, never waited for: in a child of fork() it may be locked for ever. Who does not get it
  // goes to the system.
  mutable std::mutex mutex_;
  std::vector<Kept> kept_;
  uint64_t allocations_ = 0;
};

}  // namespace l3ext
