// The host as a device: rows in page-aligned RAM, copies by memcpy, done when the call returns.
#pragma once

#include <memory>
#include <string>

#include "runtime/device.hpp"

namespace l3ext {

class HostDevice : public Device {
 public:
  std::string name() const override { return "cpu"; }
  int index() const override { return 0; }
  bool is_host() const override { return true; }
  void* allocate(size_t bytes) override;
  void deallocate(void* memory, size_t bytes) noexcept override;
  void* allocate_staging(size_t bytes) override;
  void deallocate_staging(void* memory, size_t bytes) noexcept override {
    deallocate(memory, bytes);
  }
  std::shared_ptr<void> pin(const void*, size_t) override { return nullptr; }
  std::unique_ptr<CopyQueue> make_queue() override;
  FencePtr record(void*) override { return nullptr; }
  std::shared_ptr<Stall> wait(void* stream, std::span<const FencePtr> fences) override;
};

}  // namespace l3ext
