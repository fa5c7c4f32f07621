// The host as a device: rows in page-aligned RAM, copies by memcpy.
#pragma once

#include <memory>
#include <string>

#include "runtime/device.hpp"

namespace l3ext {

class HostDevice final : public Device {
 public:
  std::string name() const override { return "cpu"; }
  void* allocate(size_t bytes) override;
  void deallocate(void* memory, size_t bytes) noexcept override;
  void* allocate_staging(size_t bytes) override { return allocate(bytes); }
  void deallocate_staging(void* memory, size_t bytes) noexcept override {
    deallocate(memory, bytes);
  }
  void fill(void* target, unsigned char value, size_t bytes) override;
  std::unique_ptr<CopyQueue> make_queue() override;
};

}  // namespace l3ext
