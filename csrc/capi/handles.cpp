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

void throw_bad_handle(const char* argument, uintptr_t handle) {
  if (handle == 0) throw BadHandle(concat(argument, ": expected a handle, got null"));
  const Registry& ours = registry();
  const Registry* maker = &ours;
  while (handle < maker->first_handle && maker->parent != nullptr) maker = maker->parent;
  if (maker != &ours) {
    throw BadHandle(concat(argument, ": expected a handle of process ", ours.process,
                           ", got one of process ", maker->process,
                           ", from before fork(), which leaves its threads behind: open tables and "
                           "a runtime in this process"));
  }
  throw BadHandle(concat(argument,
                         ": expected an open handle, got one that was closed, or that is "
                         "of another kind"));
}

// A child of fork() starts with a registry of its own: another thread may have held the parent's
// locks, and the workers of its runtimes are not here. Registries are never destroyed, since other
// threads may be in a call while the process exits.
Registry& registry() {
  const pid_t process = ::getpid();
  Registry* known = current.load(std::memory_order_acquire);
  if (known != nullptr && known->process == process) return *known;
  auto fresh = std::make_unique<Registry>(process, next_handle.load(), known);
  if (current.compare_exchange_strong(known, fresh.get(), std::memory_order_acq_rel)) {
    return *fresh.release();
  }
  return *known;  // another thread was first
}

}  // namespace l3ext::capi
