// l3ext.h for C++17: objects that close themselves, and errors that are thrown. Everything is
// inline over the C functions, whose comments say what it does.
#ifndef L3EXT_L3EXT_HPP_
#define L3EXT_L3EXT_HPP_

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "l3ext/l3ext.h"

namespace l3ext {

class Error : public std::runtime_error {
 public:
  Error(l3ext_status status, const char* text) : std::runtime_error(text), status_(status) {}
  l3ext_status status() const noexcept { return status_; }

 private:
  l3ext_status status_;
};

inline void check(l3ext_status status) {
  if (status != L3EXT_OK) throw Error(status, l3ext_error_text());
}

// A struct that says its size.
template <typename Struct>
Struct sized() {
  Struct result = {};
  result.struct_size = sizeof result;
  return result;
}

namespace detail {

// Owns a handle; moved, never copied.
template <typename Handle, l3ext_status (*close_handle)(Handle*)>
class Owner {
 public:
  Owner() = default;
  explicit Owner(Handle* handle) : handle_(handle) {}
  Owner(Owner&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Owner& operator=(Owner&& other) noexcept {
    if (this != &other) {
      close_handle(handle_);
      handle_ = std::exchange(other.handle_, nullptr);
    }
    return *this;
  }
  ~Owner() { close_handle(handle_); }

  Handle* get() const noexcept { return handle_; }
  Handle* release() noexcept { return std::exchange(handle_, nullptr); }
  // Now, with an error where there is one.
  void close() { check(close_handle(release())); }

 private:
  Handle* handle_ = nullptr;
};

inline l3ext_status end_step(l3ext_step* step) { return l3ext_step_end(step, nullptr); }

}  // namespace detail

class Tables : public detail::Owner<l3ext_tables, l3ext_tables_close> {
 public:
  static Tables open(const std::string& path, int32_t direct_io = L3EXT_DIRECT_IO_AUTO) {
    l3ext_tables* handle = nullptr;
    check(l3ext_tables_open(path.c_str(), direct_io, &handle));
    return Tables(handle);
  }
  static Tables map(const std::string& path) {
    l3ext_tables* handle = nullptr;
    check(l3ext_tables_map(path.c_str(), &handle));
    return Tables(handle);
  }
  static Tables create(const std::vector<l3ext_table_data>& layers) {
    l3ext_tables* handle = nullptr;
    check(l3ext_tables_create(layers.data(), static_cast<int64_t>(layers.size()), &handle));
    return Tables(handle);
  }

  void save(const std::string& path) const { check(l3ext_tables_save(get(), path.c_str())); }
  l3ext_table_info describe(int64_t layer) const {
    auto info = sized<l3ext_table_info>();
    check(l3ext_tables_describe(get(), layer, &info));
    return info;
  }

 private:
  using Owner::Owner;
};

class Step : public detail::Owner<l3ext_step, detail::end_step> {
 public:
  void wait(int64_t layer, void* stream = nullptr) { check(l3ext_step_wait(get(), layer, stream)); }
  l3ext_view view(int64_t layer) const {
    auto view = sized<l3ext_view>();
    check(l3ext_step_view(get(), layer, &view));
    return view;
  }
  // To be released by its deleter.
  DLManagedTensorVersioned* tensor(int64_t layer, int32_t part) const {
    DLManagedTensorVersioned* tensor = nullptr;
    check(l3ext_step_tensor(get(), layer, part, &tensor));
    return tensor;
  }
  void attend(int64_t layer, l3ext_dtype dtype, const void* x, void* y, double scale = 1.0,
              int32_t num_threads = 1) const {
    check(l3ext_step_attend(get(), layer, dtype, x, y, scale, num_threads));
  }
  void end(void* stream = nullptr) { check(l3ext_step_end(release(), stream)); }

 private:
  friend class Runtime;
  using Owner::Owner;
};

class Runtime : public detail::Owner<l3ext_runtime, l3ext_runtime_close> {
 public:
  static l3ext_runtime_options default_options() {
    l3ext_runtime_options options;
    check(l3ext_runtime_options_init(&options, sizeof options));
    return options;
  }
  explicit Runtime(const Tables& tables, const l3ext_runtime_options* options = nullptr)
      : Owner(create(tables, options)) {}

  // Token ids of int32_t or int64_t.
  template <typename Id>
  Step begin(const Id* token_ids, size_t count) {
    static_assert(std::is_same_v<Id, int32_t> || std::is_same_v<Id, int64_t>);
    const l3ext_dtype dtype = std::is_same_v<Id, int32_t> ? L3EXT_INT32 : L3EXT_INT64;
    l3ext_step* handle = nullptr;
    check(l3ext_step_begin(get(), token_ids, dtype, static_cast<int64_t>(count), &handle));
    return Step(handle);
  }
  template <typename Id>
  Step begin(const std::vector<Id>& token_ids) {
    return begin(token_ids.data(), token_ids.size());
  }

  l3ext_placement describe(int64_t layer) const {
    auto placement = sized<l3ext_placement>();
    check(l3ext_runtime_describe(get(), layer, &placement));
    return placement;
  }
  l3ext_totals totals() const {
    auto totals = sized<l3ext_totals>();
    check(l3ext_runtime_totals(get(), &totals));
    return totals;
  }
  void trace(const std::string& path) const { check(l3ext_runtime_trace(get(), path.c_str())); }

 private:
  static l3ext_runtime* create(const Tables& tables, const l3ext_runtime_options* options) {
    l3ext_runtime* handle = nullptr;
    check(l3ext_runtime_create(tables.get(), options, &handle));
    return handle;
  }
};

}  // namespace l3ext

#endif  // L3EXT_L3EXT_HPP_
