// Memory that grows in place. A small block comes from malloc; a large one straight from the
// system, which moves its pages when it grows, and in huge pages where the system has them: what is
// read at random misses the TLB with nearly every read otherwise, and a fresh page costs a fault.
#pragma once

#include <cstddef>

namespace l3ext::lzw {

class Pages {
 public:
  Pages() = default;
  Pages(Pages&& other) noexcept { swap(other); }
  Pages& operator=(Pages&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Pages();

  void* data() const { return data_; }
  size_t nbytes() const { return nbytes_; }

  // To at least so many bytes; keeps those that are there, and new ones are zero. Throws
  // std::bad_alloc; nothing has changed then.
  void grow(size_t nbytes);
  // Gives memory beyond so many bytes back.
  void shrink(size_t nbytes) noexcept;
  // Gives the memory of the whole pages within bytes [begin .. end) back; they read as zeros then.
  void release(size_t begin, size_t end) noexcept;

 private:
  void swap(Pages& other) noexcept;

  void* data_ = nullptr;
  size_t nbytes_ = 0;
  bool mapped_ = false;
};

}  // namespace l3ext::lzw
