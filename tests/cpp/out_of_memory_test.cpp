// Every allocation of a call fails once: the call says so and leaves nothing behind, and the rows
// of later steps are right.
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <new>
#include <random>
#include <utility>

#include "capi_examples.hpp"
#include "check.hpp"

using namespace examples;

namespace {

thread_local int64_t left = -1;  // allocations of this thread before the one that fails; -1: none

thread_local bool is_ours = false;
std::atomic<bool> others_fail = false;  // every allocation of the library's threads

void* allocate(size_t bytes, size_t alignment) {
  if (left >= 0 && left-- == 0) throw std::bad_alloc();
  if (others_fail && !is_ours) throw std::bad_alloc();
  void* memory = std::aligned_alloc(alignment, (bytes + alignment) / alignment * alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(size_t bytes) { return allocate(bytes, alignof(std::max_align_t)); }
void* operator new(size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<size_t>(alignment));
}
void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  return std::malloc(bytes);  // NOLINT(cppcoreguidelines-no-malloc)
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { std::free(memory); }

namespace {

const Example kExample(300, 16, 8, 1, 3);

// Makes the first, the second, ... allocation of the call fail, until it is through with all. What
// it gives is OK or that memory is out.
void with_each_allocation_failing(const std::function<l3ext_status()>& call) {
  for (int64_t n = 0;; ++n) {
    left = n;
    const l3ext_status status = call();
    const bool failed = left < 0;
    left = -1;
    EXPECT(status == L3EXT_OK || (failed && status == L3EXT_ERROR_MEMORY));
    if (!failed) return;
  }
}

// What else a call needs is done with all memory there is.
template <typename F>
void undisturbed(F&& f) {
  const int64_t before = std::exchange(left, -1);
  std::forward<F>(f)();
  left = before;
}

void tables_and_files() {
  const std::string path = temporary_path("oom");
  const std::vector<l3ext_table_data> layers = {kExample.data(), kExample.data()};
  l3ext_tables* tables = nullptr;
  with_each_allocation_failing([&] {
    const l3ext_status status = l3ext_tables_create(layers.data(), 2, &tables);
    undisturbed([&] { l3ext_tables_close(tables); });
    return status;
  });
  tables = make_tables(layers);
  with_each_allocation_failing([&] { return l3ext_tables_save(tables, path.c_str()); });
  l3ext_tables_close(tables);
  with_each_allocation_failing([&] {
    const l3ext_status status = l3ext_tables_open(path.c_str(), L3EXT_DIRECT_IO_AUTO, &tables);
    undisturbed([&] { l3ext_tables_close(tables); });
    return status;
  });
  l3ext_tables_open(path.c_str(), L3EXT_DIRECT_IO_AUTO, &tables);
  l3ext_runtime* runtime = nullptr;
  with_each_allocation_failing([&] {
    const l3ext_status status = l3ext_runtime_create(tables, nullptr, &runtime);
    undisturbed([&] { l3ext_runtime_close(runtime); });
    return status;
  });
  l3ext_tables_close(tables);
  std::remove(path.c_str());
}

// Of ten tokens, from begin to end.
l3ext_status one_step(l3ext_runtime* runtime, std::minstd_rand& random) {
  int32_t ids[10];
  for (int32_t& id : ids) id = static_cast<int32_t>(random() % 300);
  const float x[10 * 16] = {};
  float y[10 * 8];
  l3ext_step* step = nullptr;
  l3ext_status status = l3ext_step_begin(runtime, ids, L3EXT_INT32, 10, &step);
  for (int64_t layer = 0; layer < 2 && status == L3EXT_OK; ++layer) {
    status = l3ext_step_wait(step, layer, nullptr);
    if (status != L3EXT_OK) break;
    undisturbed([&] {
      const l3ext_view view = view_of(step, layer);
      const std::vector<int32_t> distinct(view.tokens, view.tokens + view.num_segments);
      EXPECT(holds_the_rows(view, kExample, distinct));
    });
    status = l3ext_step_attend(step, layer, L3EXT_FLOAT32, x, y, 1.0, 1);
  }
  // Without memory for the ledger it ends all the same, and says so.
  const l3ext_status ended = l3ext_step_end(step, nullptr);
  return status == L3EXT_OK ? ended : status;
}

void steps() {
  for (const int64_t ring_bytes : {0, 16000, 1 << 20}) {
    for (const int64_t poison : {0, 1}) {
      l3ext_runtime_options options = default_options();
      options.cache_bytes = 8000;
      options.ring_bytes = ring_bytes;
      options.in_place = 0;
      options.poison = poison;
      l3ext_runtime* runtime = serve(make_tables({kExample.data(), kExample.data()}), &options);
      std::minstd_rand random(1);
      for (int round = 0; round < 10; ++round) {
        with_each_allocation_failing([&] { return one_step(runtime, random); });
      }
      for (int i = 0; i < 100; ++i) EXPECT(one_step(runtime, random) == L3EXT_OK);
      l3ext_totals before = {}, after = {};
      before.struct_size = after.struct_size = sizeof before;
      l3ext_runtime_totals(runtime, &before);
      for (int i = 0; i < 100; ++i) EXPECT(one_step(runtime, random) == L3EXT_OK);
      l3ext_runtime_totals(runtime, &after);
      // Every block of the ring has been given back.
      EXPECT(after.steps - before.steps == 100);
      EXPECT(after.spilled - before.spilled == (ring_bytes == 0 ? 200 : 0));
      l3ext_runtime_close(runtime);
    }
  }
}

// An exception in one of them would end the process.
void workers() {
  const std::string path = temporary_path("oom_workers");
  l3ext_tables* tables = make_tables({kExample.data(), kExample.data()});
  l3ext_tables_save(tables, path.c_str());
  l3ext_tables_close(tables);
  for (const bool in_file : {true, false}) {
    if (in_file) EXPECT(l3ext_tables_open(path.c_str(), L3EXT_DIRECT_IO_AUTO, &tables) == L3EXT_OK);
    if (!in_file) tables = make_tables({kExample.data(), kExample.data()});
    l3ext_runtime_options options = default_options();
    options.in_place = 0;
    options.ring_bytes = 16000;
    l3ext_runtime* runtime = serve(tables, &options);
    std::minstd_rand random(2);
    others_fail = true;
    for (int i = 0; i < 200; ++i) {
      const l3ext_status status = one_step(runtime, random);
      EXPECT(status == L3EXT_OK || (in_file && status == L3EXT_ERROR_MEMORY));
    }
    others_fail = false;
    EXPECT(one_step(runtime, random) == L3EXT_OK);
    l3ext_runtime_close(runtime);
  }
  std::remove(path.c_str());
}

}  // namespace

int main() {
  is_ours = true;
  RUN(tables_and_files);
  RUN(steps);
  RUN(workers);
  return check::failures;
}
