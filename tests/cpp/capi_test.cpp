// The C ABI at work, from outside: through its header and the shared library alone.
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <set>
#include <thread>

#include "capi_examples.hpp"
#include "check.hpp"
#include "dlpack/dlpack.h"

using namespace examples;

// What a program compiled against this header relies on. Fields may be added at the end; a change
// of what stands here takes a new L3EXT_ABI_VERSION.
#define PINNED(type, field, offset) static_assert(offsetof(type, field) == (offset))
static_assert(L3EXT_ABI_VERSION == 1);
static_assert(L3EXT_ERROR_HANDLE == 6 && L3EXT_INT64 == 7 && L3EXT_VALUE_SCALES == 3);
static_assert(sizeof(l3ext_status) == 4 && sizeof(l3ext_dtype) == 4);
static_assert(sizeof(l3ext_table_data) == 96);
PINNED(l3ext_table_data, dtype, 8);
PINNED(l3ext_table_data, vocab_size, 40);
PINNED(l3ext_table_data, rows, 72);
PINNED(l3ext_table_data, context, 88);
static_assert(sizeof(l3ext_table_info) == 120);
PINNED(l3ext_table_info, num_layers, 8);
PINNED(l3ext_table_info, offsets, 72);
PINNED(l3ext_table_info, guarded, 112);
static_assert(sizeof(l3ext_runtime_options) == 88);
PINNED(l3ext_runtime_options, device, 8);
PINNED(l3ext_runtime_options, in_place, 32);
PINNED(l3ext_runtime_options, poison, 80);
static_assert(sizeof(l3ext_placement) == 48);
PINNED(l3ext_placement, ring_bytes, 40);
static_assert(sizeof(l3ext_totals) == 104);
PINNED(l3ext_totals, exposed_ns, 96);
static_assert(sizeof(l3ext_view) == 104);
PINNED(l3ext_view, keys, 8);
PINNED(l3ext_view, row_stride, 40);
PINNED(l3ext_view, tokens, 88);
PINNED(l3ext_view, segment_rows, 96);

namespace {

const std::vector<int32_t> kIds = {7, 3, 7, 0, 29, 3, 7};
const std::vector<int32_t> kDistinct = {0, 3, 7, 29};

void the_library_is_that_of_the_header() { EXPECT(l3ext_abi_version() == L3EXT_ABI_VERSION); }

void a_step_holds_its_rows() {
  const Example near(30, 8, 5), far(30, 6, 9, 2);
  l3ext_runtime* runtime = serve(make_tables({near.data(), far.data()}));
  l3ext_step* step = begin(runtime, kIds);
  EXPECT(l3ext_step_wait(step, 0, nullptr) == L3EXT_OK);
  EXPECT(l3ext_step_wait(step, 1, nullptr) == L3EXT_OK);
  const l3ext_view view = view_of(step, 0);
  EXPECT(holds_the_rows(view, near, kDistinct));
  EXPECT(holds_the_rows(view_of(step, 1), far, kDistinct));
  EXPECT(view.dtype == L3EXT_FLOAT32 && view.d_in == 8 && view.d_emb == 5 && view.row_stride == 52);
  EXPECT(view.key_scales == nullptr && view.value_scales == nullptr);
  EXPECT(l3ext_step_wait(step, 0, nullptr) == L3EXT_OK);  // again: earlier views stay
  EXPECT(view_of(step, 0).segment_rows == view.segment_rows);
  EXPECT(l3ext_step_end(step, nullptr) == L3EXT_OK);
  EXPECT(l3ext_runtime_close(runtime) == L3EXT_OK);
}

void ids_of_both_types_and_none() {
  const Example example(30, 8, 5);
  l3ext_runtime* runtime = serve(make_tables({example.data()}));
  const std::vector<int64_t> wide(kIds.begin(), kIds.end());
  l3ext_step* step = nullptr;
  EXPECT(l3ext_step_begin(runtime, wide.data(), L3EXT_INT64, 7, &step) == L3EXT_OK);
  l3ext_step_wait(step, 0, nullptr);
  EXPECT(holds_the_rows(view_of(step, 0), example, kDistinct));
  l3ext_step_end(step, nullptr);
  EXPECT(l3ext_step_begin(runtime, nullptr, L3EXT_INT64, 0, &step) == L3EXT_OK);
  EXPECT(l3ext_step_wait(step, 0, nullptr) == L3EXT_OK);
  EXPECT(view_of(step, 0).num_segments == 0);
  EXPECT(l3ext_step_attend(step, 0, L3EXT_FLOAT32, nullptr, nullptr, 1.0, 1) == L3EXT_OK);
  l3ext_step_end(step, nullptr);
  l3ext_runtime_close(runtime);
}

void attention_is_that_of_the_formula() {
  const Example example(30, 24, 13);
  l3ext_runtime* runtime = serve(make_tables({example.data()}));
  l3ext_step* step = begin(runtime, kIds);
  l3ext_step_wait(step, 0, nullptr);
  std::mt19937 random(5);
  std::normal_distribution<float> normal;
  std::vector<float> x(kIds.size() * example.d_in), y(kIds.size() * example.d_emb);
  for (float& value : x) value = normal(random);
  EXPECT(l3ext_step_attend(step, 0, L3EXT_FLOAT32, x.data(), y.data(), 0.5, 1) == L3EXT_OK);
  double error = 0;
  for (size_t i = 0; i < kIds.size(); ++i) {
    const auto expected = attention(example, kIds[i], x.data() + i * example.d_in, 0.5);
    for (int64_t j = 0; j < example.d_emb; ++j) {
      error = std::max(error, std::abs(expected[j] - y[i * example.d_emb + j]));
    }
  }
  EXPECT(error < 1e-5);
  l3ext_step_end(step, nullptr);
  l3ext_runtime_close(runtime);
}

// One token with two rows of int8: elements, scales, padding as the header says.
void rows_in_8_bits_bring_their_scales() {
  constexpr int64_t kIn = 3, kEmb = 2, kRowBytes = 16;
  const int8_t elements[2][5] = {{10, -20, 30, 40, 50}, {-1, 2, -3, 4, -5}};
  const float scales[2][2] = {{0.1f, 0.5f}, {0.2f, 2.0f}};
  std::vector<char> rows(2 * kRowBytes);
  Example plain(1, kIn, kEmb);
  plain.offsets = {0, 2};
  plain.rows.resize(2 * (kIn + kEmb));
  for (int64_t r = 0; r < 2; ++r) {
    std::memcpy(&rows[r * kRowBytes], elements[r], 5);
    std::memcpy(&rows[r * kRowBytes + 8], scales[r], 8);
    for (int64_t i = 0; i < 5; ++i) plain.rows[r * 5 + i] = elements[r][i] * scales[r][i >= kIn];
  }
  l3ext_table_data data = plain.data();
  data.dtype = L3EXT_INT8;
  data.rows = rows.data();
  l3ext_runtime* runtime = serve(make_tables({data}));
  l3ext_step* step = begin(runtime, {0});
  l3ext_step_wait(step, 0, nullptr);
  const l3ext_view view = view_of(step, 0);
  EXPECT(view.dtype == L3EXT_INT8 && view.row_stride == kRowBytes);
  const auto row = view.segment_rows[0];
  for (int64_t r = 0; r < 2; ++r) {
    const int64_t offset = (row + r) * view.row_stride;
    EXPECT(std::memcmp(static_cast<const char*>(view.key_scales) + offset, &scales[r][0], 4) == 0);
    EXPECT(std::memcmp(static_cast<const char*>(view.value_scales) + offset, &scales[r][1], 4) ==
           0);
  }
  const float x[kIn] = {0.3f, -0.1f, 0.2f};
  float y[kEmb];
  EXPECT(l3ext_step_attend(step, 0, L3EXT_FLOAT32, x, y, 1.0, 1) == L3EXT_OK);
  const auto expected = attention(plain, 0, x, 1.0);
  for (int64_t i = 0; i < kEmb; ++i) EXPECT(std::abs(y[i] - expected[i]) < 1e-4);

  DLManagedTensorVersioned* tensor = nullptr;
  EXPECT(l3ext_step_tensor(step, 0, L3EXT_VALUE_SCALES, &tensor) == L3EXT_OK);
  EXPECT(tensor->dl_tensor.ndim == 1 && tensor->dl_tensor.strides[0] == kRowBytes / 4);
  EXPECT(tensor->dl_tensor.byte_offset == 12 && tensor->dl_tensor.dtype.code == kDLFloat);
  tensor->deleter(tensor);
  EXPECT(l3ext_step_attend(step, 0, L3EXT_FLOAT64, x, y, 1.0, 1) == L3EXT_ERROR_TYPE);
  l3ext_step_end(step, nullptr);
  l3ext_runtime_close(runtime);
}

void tensors_show_the_rows_and_outlive_the_runtime() {
  const Example example(30, 8, 5);
  l3ext_runtime* runtime = serve(make_tables({example.data()}));
  l3ext_step* step = begin(runtime, kIds);
  l3ext_step_wait(step, 0, nullptr);
  const l3ext_view view = view_of(step, 0);
  DLManagedTensorVersioned* keys = nullptr;
  DLManagedTensorVersioned* values = nullptr;
  EXPECT(l3ext_step_tensor(step, 0, L3EXT_KEYS, &keys) == L3EXT_OK);
  EXPECT(l3ext_step_tensor(step, 0, L3EXT_VALUES, &values) == L3EXT_OK);
  EXPECT(keys->version.major == DLPACK_MAJOR_VERSION);
  EXPECT((keys->flags & DLPACK_FLAG_BITMASK_READ_ONLY) != 0);
  const DLTensor& tensor = values->dl_tensor;
  EXPECT(tensor.ndim == 2 && tensor.shape[0] == view.num_rows && tensor.shape[1] == 5);
  EXPECT(tensor.strides[0] == 13 && tensor.strides[1] == 1);
  EXPECT(tensor.device.device_type == kDLCPU && tensor.dtype.bits == 32);
  EXPECT(static_cast<char*>(tensor.data) + tensor.byte_offset == view.values);
  EXPECT(keys->dl_tensor.data == view.keys && keys->dl_tensor.byte_offset == 0);
  l3ext_step_end(step, nullptr);
  l3ext_runtime_close(runtime);
  volatile char byte = *static_cast<const char*>(keys->dl_tensor.data);  // still memory
  static_cast<void>(byte);
  keys->deleter(keys);
  values->deleter(values);
}

void tables_go_to_a_file_and_back() {
  const Example near(30, 8, 5), far(30, 6, 9, 2);
  const std::string path = temporary_path("capi_file");
  l3ext_tables* tables = make_tables({near.data(), far.data()});
  EXPECT(l3ext_tables_save(tables, path.c_str()) == L3EXT_OK);
  l3ext_table_info info = {};
  info.struct_size = sizeof info;
  EXPECT(l3ext_tables_describe(tables, 1, &info) == L3EXT_OK && info.path == nullptr);
  l3ext_tables_close(tables);

  EXPECT(l3ext_tables_open(path.c_str(), L3EXT_DIRECT_IO_AUTO, &tables) == L3EXT_OK);
  EXPECT(l3ext_tables_describe(tables, 1, &info) == L3EXT_OK);
  EXPECT(info.num_layers == 2 && info.dtype == L3EXT_FLOAT32 && info.tied == 0);
  EXPECT(info.d_in == 6 && info.d_emb == 9 && info.vocab_size == 30 && info.row_bytes == 60);
  EXPECT(info.num_rows == far.offsets.back() && path == info.path);
  EXPECT(std::equal(far.offsets.begin(), far.offsets.end(), info.offsets));
  EXPECT(std::equal(far.frequency.begin(), far.frequency.end(), info.frequency));

  l3ext_runtime_options options = default_options();
  options.cache_bytes = 1 << 10;
  l3ext_runtime* runtime = serve(tables, &options);
  l3ext_placement placement = {};
  placement.struct_size = sizeof placement;
  EXPECT(l3ext_runtime_describe(runtime, 0, &placement) == L3EXT_OK);
  EXPECT(placement.table_bytes == 52 * near.offsets.back());
  EXPECT(placement.cached_bytes > 0 && placement.cached_bytes <= 512);
  EXPECT(placement.in_place == 0 && placement.ring_bytes > 0);

  for (int i = 0; i < 3; ++i) {
    l3ext_step* step = begin(runtime, kIds);
    EXPECT(l3ext_step_wait(step, 0, nullptr) == L3EXT_OK);
    EXPECT(l3ext_step_wait(step, 1, nullptr) == L3EXT_OK);
    EXPECT(holds_the_rows(view_of(step, 0), near, kDistinct));
    EXPECT(holds_the_rows(view_of(step, 1), far, kDistinct));
    l3ext_step_end(step, nullptr);
  }
  l3ext_totals totals = {};
  totals.struct_size = sizeof totals;
  EXPECT(l3ext_runtime_totals(runtime, &totals) == L3EXT_OK);
  EXPECT(totals.steps == 3 && totals.tokens == 3 * 2 * 4 && totals.bytes > 0);
  EXPECT(totals.reused > 0 && totals.in_place_bytes == 0);
  const std::string trace = path + ".trace.json";
  EXPECT(l3ext_runtime_trace(runtime, trace.c_str()) == L3EXT_OK);
  std::ifstream written(trace);
  const std::string text((std::istreambuf_iterator<char>(written)), {});
  EXPECT(contains(text.c_str(), "traceEvents"));
  l3ext_runtime_close(runtime);
  std::remove(path.c_str());
  std::remove(trace.c_str());
}

void a_file_is_mapped_and_read_in_place() {
  const Example example(30, 8, 5);
  const std::string path = temporary_path("capi_mapped");
  l3ext_tables* tables = make_tables({example.data()});
  l3ext_tables_save(tables, path.c_str());
  l3ext_tables_close(tables);
  for (const int64_t verify : {0, 1}) {
    EXPECT(l3ext_tables_map(path.c_str(), &tables) == L3EXT_OK);
    l3ext_table_info info = {};
    info.struct_size = sizeof info;
    EXPECT(l3ext_tables_describe(tables, 0, &info) == L3EXT_OK);
    EXPECT(info.mapped == 1 && path == info.path);
    l3ext_runtime_options options = default_options();
    options.verify = verify;
    l3ext_runtime* runtime = serve(tables, &options);
    l3ext_step* step = begin(runtime, kIds);
    EXPECT(l3ext_step_wait(step, 0, nullptr) == L3EXT_OK);
    EXPECT(holds_the_rows(view_of(step, 0), example, kDistinct));
    l3ext_step_end(step, nullptr);
    l3ext_totals totals = {};
    totals.struct_size = sizeof totals;
    l3ext_runtime_totals(runtime, &totals);
    EXPECT((totals.in_place_bytes > 0) == (verify == 0));
    l3ext_runtime_close(runtime);
  }
  std::remove(path.c_str());
}

void memory_is_released_once_when_nobody_reads_it() {
  const Example example(30, 8, 5);
  std::atomic<int> released = 0;
  l3ext_table_data data = example.data();
  data.release = [](void* context) { ++*static_cast<std::atomic<int>*>(context); };
  data.context = &released;
  l3ext_tables* tables = make_tables({data, data});
  l3ext_runtime* runtime = nullptr;
  l3ext_runtime_create(tables, nullptr, &runtime);
  l3ext_tables_close(tables);
  EXPECT(released == 0);  // the runtime reads it
  l3ext_runtime_close(runtime);
  EXPECT(released == 2);  // once for each of the two

  data.d_in = 0;
  EXPECT(l3ext_tables_create(&data, 1, &tables) == L3EXT_ERROR_VALUE);
  EXPECT(released == 2);  // the call failed: still the caller's
}

void rows_are_read_in_place_or_fetched() {
  const Example example(30, 8, 5);
  std::atomic<int> released = 0;
  l3ext_table_data data = example.data();
  data.release = [](void* context) { ++*static_cast<std::atomic<int>*>(context); };
  data.context = &released;
  for (const int64_t in_place : {1, 0}) {
    l3ext_runtime_options options = default_options();
    EXPECT(options.in_place == 1);
    options.in_place = in_place;
    l3ext_runtime* runtime = serve(make_tables({data}), &options);
    l3ext_step* step = begin(runtime, kIds);
    EXPECT(l3ext_step_wait(step, 0, nullptr) == L3EXT_OK);
    const l3ext_view view = view_of(step, 0);
    EXPECT(holds_the_rows(view, example, kDistinct));
    EXPECT((view.keys == example.rows.data()) == (in_place == 1));
    DLManagedTensorVersioned* keys = nullptr;
    l3ext_step_tensor(step, 0, L3EXT_KEYS, &keys);
    l3ext_step_end(step, nullptr);
    l3ext_placement placement = {};
    placement.struct_size = sizeof placement;
    l3ext_runtime_describe(runtime, 0, &placement);
    EXPECT(placement.in_place == in_place);
    l3ext_totals totals = {};
    totals.struct_size = sizeof totals;
    l3ext_runtime_totals(runtime, &totals);
    EXPECT((totals.in_place_bytes > 0) == (in_place == 1));
    EXPECT((totals.bytes > 0) == (in_place == 0));
    released = 0;
    l3ext_runtime_close(runtime);
    EXPECT(released == 1 - in_place);  // a tensor over it keeps the caller's memory in use
    keys->deleter(keys);
    EXPECT(released == 1);
  }
}

void steps_of_several_threads() {
  const Example near(200, 8, 5), far(200, 6, 9, 2);
  l3ext_runtime_options options = default_options();
  options.in_place = 0;
  options.ring_bytes = 16 << 10;  // some steps spill
  options.cache_bytes = 4 << 10;
  l3ext_runtime* runtime = serve(make_tables({near.data(), far.data()}), &options);
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937 random(t);
      for (int i = 0; i < 50; ++i) {
        std::vector<int32_t> ids(1 + random() % 40);
        for (int32_t& id : ids) id = static_cast<int32_t>(random() % 200);
        const std::set<int32_t> sorted(ids.begin(), ids.end());
        const std::vector<int32_t> distinct(sorted.begin(), sorted.end());
        l3ext_step* step = begin(runtime, ids);
        wrong += l3ext_step_wait(step, 0, nullptr) != L3EXT_OK;
        wrong += !holds_the_rows(view_of(step, 0), near, distinct);
        wrong += l3ext_step_wait(step, 1, nullptr) != L3EXT_OK;
        wrong += !holds_the_rows(view_of(step, 1), far, distinct);
        wrong += l3ext_step_end(step, nullptr) != L3EXT_OK;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT(wrong == 0);
  l3ext_runtime_close(runtime);
}

// One step for many threads: each waits, reads and attends; the last result is the first one's.
void one_step_in_several_threads() {
  const Example example(30, 8, 5);
  l3ext_runtime* runtime = serve(make_tables({example.data()}));
  l3ext_step* step = begin(runtime, kIds);
  const std::vector<float> x(kIds.size() * 8, 0.25f);
  std::vector<std::vector<float>> y(4, std::vector<float>(kIds.size() * 5));
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (auto& out : y) {
    threads.emplace_back([&] {
      wrong += l3ext_step_wait(step, 0, nullptr) != L3EXT_OK;
      wrong += !holds_the_rows(view_of(step, 0), example, kDistinct);
      wrong += l3ext_step_attend(step, 0, L3EXT_FLOAT32, x.data(), out.data(), 1.0, 1) != L3EXT_OK;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT(wrong == 0);
  EXPECT(std::all_of(y.begin(), y.end(), [&](const auto& out) { return out == y[0]; }));
  l3ext_step_end(step, nullptr);
  l3ext_runtime_close(runtime);
}

}  // namespace

int main() {
  RUN(the_library_is_that_of_the_header);
  RUN(a_step_holds_its_rows);
  RUN(ids_of_both_types_and_none);
  RUN(attention_is_that_of_the_formula);
  RUN(rows_in_8_bits_bring_their_scales);
  RUN(tensors_show_the_rows_and_outlive_the_runtime);
  RUN(tables_go_to_a_file_and_back);
  RUN(a_file_is_mapped_and_read_in_place);
  RUN(memory_is_released_once_when_nobody_reads_it);
  RUN(rows_are_read_in_place_or_fetched);
  RUN(steps_of_several_threads);
  RUN(one_step_in_several_threads);
  return check::failures;
}
