#include "capi/handles.hpp"

#include <unistd.h>

#include <atomic>

#include "core/error.hpp"

namespace l3ext::capi {
namespace {

std::atomic<uintptr_t> next_handle = 1;
std::atomic<Registry*> current = nullptr;

}  // namespace

uintptr_t new_handle() { return next_handle.fetch_add(1, std::memory_order_relaxed); }

void throw_bad_handle(const char* argument, bool null) {
  throw BadHandle(concat(argument, null ? ": expected a handle, got null"
                                        : ": expected an open handle, got one that was closed, or "
                                          "that is from before fork(), or of another kind"));
}

// A child of fork() starts with a registry of its own: another thread may have held the parent's
// locks, and the workers of its runtimes are not here. Registries are never destroyed, since other
// threads may be in a call while the process exits.
Registry& registry() {
  const pid_t process = ::getpid();
  Registry* known = current.load(std::memory_order_acquire);
  if (known != nullptr && known->process == process) return *known;
  auto fresh = std::make_unique<Registry>(process);
  if (current.compare_exchange_strong(known, fresh.get(), std::memory_order_acq_rel)) {
    return *fresh.release();
  }
  return *known;  // another thread was first
}

}  // namespace l3ext::capi
