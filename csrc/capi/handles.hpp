// Handles are numbers that are never used twice, in the shape of pointers that nobody follows. So
// a handle that was closed is known for what it is, and an object that one thread closes lives on
// until the calls of other threads have returned.
#pragma once

#include <sys/types.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>

#include "capi/errors.hpp"

namespace l3ext::capi {

// A number that no handle of this process, or of one that it was forked from, has had.
uintptr_t new_handle();
[[noreturn]] void throw_bad_handle(const char* argument, uintptr_t handle);

// The open objects of one kind. Thread-safe.
template <typename Handle, typename Object>
class Handles {
 public:
  Handle* add(std::shared_ptr<Object> object) {
    const uintptr_t handle = new_handle();
    const std::scoped_lock lock(mutex_);
    objects_.emplace(handle, std::move(object));
    return reinterpret_cast<Handle*>(handle);  // NOLINT(performance-no-int-to-ptr)
  }

  std::shared_ptr<Object> find(const Handle* handle, const char* argument) {
    const std::scoped_lock lock(mutex_);
    const auto found = objects_.find(reinterpret_cast<uintptr_t>(handle));
    if (found == objects_.end()) throw_bad_handle(argument, reinterpret_cast<uintptr_t>(handle));
    return found->second;
  }

  // Closes the handle: of several threads, one gets the object. Null of a null handle.
  std::shared_ptr<Object> take(const Handle* handle, const char* argument) {
    if (handle == nullptr) return nullptr;
    const std::scoped_lock lock(mutex_);
    const auto found = objects_.find(reinterpret_cast<uintptr_t>(handle));
    if (found == objects_.end()) throw_bad_handle(argument, reinterpret_cast<uintptr_t>(handle));
    std::shared_ptr<Object> object = std::move(found->second);
    objects_.erase(found);
    return object;
  }

 private:
  std::mutex mutex_;
  std::unordered_map<uintptr_t, std::shared_ptr<Object>> objects_;
};

struct Tables;
struct Runtime;
struct Step;

struct Registry {
  Registry(pid_t of, uintptr_t first, const Registry* from)
      : process(of), first_handle(first), parent(from) {}

  const pid_t process;
  const uintptr_t first_handle;  // none of this process is smaller
  const Registry* const parent;  // of the process that it was forked from; null: of none
  Handles<l3ext_tables, Tables> tables;
  Handles<l3ext_runtime, Runtime> runtimes;
  Handles<l3ext_step, Step> steps;
};

// That of this process.
Registry& registry();

}  // namespace l3ext::capi
