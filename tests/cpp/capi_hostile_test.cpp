// The C ABI in wrong hands: null, closed and foreign handles, structs of other sizes, damaged
// files, fork, and closing under the feet of other threads.
#include <sys/resource.h>
#include <sys/wait.h>

#include <atomic>
#include <cstdio>
#include <fstream>
#include <locale>
#include <numeric>
#include <thread>

#include "capi_examples.hpp"
#include "check.hpp"

using namespace examples;

// The call gives this code, and a text in which `part` stands.
#define EXPECT_ERROR(code, part, ...)                   \
  do {                                                  \
    EXPECT((__VA_ARGS__) == (code));                    \
    EXPECT(contains(l3ext_error_text(), part));         \
    if (!contains(l3ext_error_text(), part)) {          \
      std::fprintf(stderr, "%s\n", l3ext_error_text()); \
    }                                                   \
  } while (false)

namespace {

const Example kExample(30, 8, 5);

// Workers that fetch, not rows in place.
l3ext_runtime* example_runtime() {
  l3ext_runtime_options options = default_options();
  options.in_place = 0;
  return serve(make_tables({kExample.data()}), &options);
}

void null_is_an_error_and_closing_it_is_none() {
  l3ext_tables* tables = nullptr;
  l3ext_runtime* runtime = nullptr;
  l3ext_step* step = nullptr;
  DLManagedTensorVersioned* tensor = nullptr;
  l3ext_view view = {};
  view.struct_size = sizeof view;
  l3ext_totals totals = {};
  totals.struct_size = sizeof totals;
  const int32_t id = 0;
  const l3ext_table_data data = kExample.data();
  float x[8] = {};

  EXPECT(l3ext_tables_close(nullptr) == L3EXT_OK);
  EXPECT(l3ext_runtime_close(nullptr) == L3EXT_OK);
  EXPECT(l3ext_step_end(nullptr, nullptr) == L3EXT_OK);

  const l3ext_status handle = L3EXT_ERROR_HANDLE, value = L3EXT_ERROR_VALUE;
  EXPECT_ERROR(handle, "tables", l3ext_tables_save(nullptr, "x"));
  EXPECT_ERROR(handle, "tables", l3ext_tables_describe(nullptr, 0, nullptr));
  EXPECT_ERROR(handle, "tables", l3ext_runtime_create(nullptr, nullptr, &runtime));
  EXPECT_ERROR(handle, "runtime", l3ext_runtime_describe(nullptr, 0, nullptr));
  EXPECT_ERROR(handle, "runtime", l3ext_runtime_totals(nullptr, &totals));
  EXPECT_ERROR(handle, "runtime", l3ext_runtime_trace(nullptr, "x"));
  EXPECT_ERROR(handle, "runtime", l3ext_step_begin(nullptr, &id, L3EXT_INT32, 1, &step));
  EXPECT_ERROR(handle, "step", l3ext_step_wait(nullptr, 0, nullptr));
  EXPECT_ERROR(handle, "step", l3ext_step_view(nullptr, 0, &view));
  EXPECT_ERROR(handle, "step", l3ext_step_tensor(nullptr, 0, L3EXT_KEYS, &tensor));
  EXPECT_ERROR(handle, "step", l3ext_step_attend(nullptr, 0, L3EXT_FLOAT32, x, x, 1.0, 1));

  EXPECT_ERROR(value, "path", l3ext_tables_open(nullptr, 0, &tables));
  EXPECT_ERROR(value, "tables", l3ext_tables_open("x", 0, nullptr));
  EXPECT_ERROR(value, "path", l3ext_tables_map(nullptr, &tables));
  EXPECT_ERROR(value, "tables", l3ext_tables_map("x", nullptr));
  EXPECT_ERROR(value, "layers", l3ext_tables_create(nullptr, 1, &tables));
  EXPECT_ERROR(value, "tables", l3ext_tables_create(&data, 1, nullptr));
  EXPECT_ERROR(value, "options", l3ext_runtime_options_init(nullptr, 88));
  tables = make_tables({data});
  EXPECT_ERROR(value, "path", l3ext_tables_save(tables, nullptr));
  EXPECT_ERROR(value, "info", l3ext_tables_describe(tables, 0, nullptr));
  EXPECT_ERROR(value, "runtime", l3ext_runtime_create(tables, nullptr, nullptr));
  runtime = serve(tables);
  EXPECT_ERROR(value, "placement", l3ext_runtime_describe(runtime, 0, nullptr));
  EXPECT_ERROR(value, "totals", l3ext_runtime_totals(runtime, nullptr));
  EXPECT_ERROR(value, "path", l3ext_runtime_trace(runtime, nullptr));
  EXPECT_ERROR(value, "step", l3ext_step_begin(runtime, &id, L3EXT_INT32, 1, nullptr));
  EXPECT_ERROR(value, "token_ids", l3ext_step_begin(runtime, nullptr, L3EXT_INT32, 1, &step));
  step = begin(runtime, {3});
  l3ext_step_wait(step, 0, nullptr);
  EXPECT_ERROR(value, "view", l3ext_step_view(step, 0, nullptr));
  EXPECT_ERROR(value, "tensor", l3ext_step_tensor(step, 0, L3EXT_KEYS, nullptr));
  EXPECT_ERROR(value, "x:", l3ext_step_attend(step, 0, L3EXT_FLOAT32, nullptr, x, 1.0, 1));
  EXPECT_ERROR(value, "y:", l3ext_step_attend(step, 0, L3EXT_FLOAT32, x, nullptr, 1.0, 1));
  l3ext_step_end(step, nullptr);
  l3ext_runtime_close(runtime);
}

void a_closed_handle_is_known() {
  l3ext_tables* tables = make_tables({kExample.data()});
  l3ext_runtime* runtime = nullptr;
  l3ext_runtime_create(tables, nullptr, &runtime);
  EXPECT(l3ext_tables_close(tables) == L3EXT_OK);
  EXPECT_ERROR(L3EXT_ERROR_HANDLE, "tables", l3ext_tables_close(tables));
  EXPECT_ERROR(L3EXT_ERROR_HANDLE, "closed", l3ext_tables_save(tables, "x"));

  l3ext_step* step = begin(runtime, {3, 4});
  l3ext_step* open = begin(runtime, {5});
  l3ext_step_wait(open, 0, nullptr);
  EXPECT(l3ext_step_end(step, nullptr) == L3EXT_OK);
  EXPECT_ERROR(L3EXT_ERROR_HANDLE, "step", l3ext_step_end(step, nullptr));
  EXPECT_ERROR(L3EXT_ERROR_HANDLE, "step", l3ext_step_wait(step, 0, nullptr));

  EXPECT(l3ext_runtime_close(runtime) == L3EXT_OK);
  EXPECT_ERROR(L3EXT_ERROR_HANDLE, "runtime", l3ext_runtime_close(runtime));
  const int32_t id = 0;
  EXPECT_ERROR(L3EXT_ERROR_HANDLE, "runtime",
               l3ext_step_begin(runtime, &id, L3EXT_INT32, 1, &step));
  EXPECT(step == nullptr);
  // A step that its runtime left behind: errors, and it can be ended.
  l3ext_view view = {};
  view.struct_size = sizeof view;
  float x[8], y[5];
  EXPECT_ERROR(L3EXT_ERROR_RUNTIME, "closed", l3ext_step_wait(open, 0, nullptr));
  EXPECT_ERROR(L3EXT_ERROR_RUNTIME, "closed", l3ext_step_view(open, 0, &view));
  EXPECT_ERROR(L3EXT_ERROR_RUNTIME, "closed",
               l3ext_step_attend(open, 0, L3EXT_FLOAT32, x, y, 1.0, 1));
  EXPECT(l3ext_step_end(open, nullptr) == L3EXT_OK);
}

void a_handle_of_another_kind_is_known() {
  l3ext_runtime* runtime = example_runtime();
  auto* wrong = reinterpret_cast<l3ext_step*>(runtime);
  EXPECT_ERROR(L3EXT_ERROR_HANDLE, "kind", l3ext_step_wait(wrong, 0, nullptr));
  EXPECT_ERROR(L3EXT_ERROR_HANDLE, "kind", l3ext_step_end(wrong, nullptr));
  EXPECT(l3ext_runtime_close(runtime) == L3EXT_OK);
}

void values_out_of_range() {
  l3ext_tables* tables = nullptr;
  l3ext_runtime* runtime = nullptr;
  l3ext_table_data data = kExample.data();
  const auto wrong_table = [&](const char* part, l3ext_status code = L3EXT_ERROR_VALUE) {
    tables = reinterpret_cast<l3ext_tables*>(1);
    EXPECT_ERROR(code, part, l3ext_tables_create(&data, 1, &tables));
    EXPECT(tables == nullptr);
    data = kExample.data();
  };
  data.dtype = L3EXT_INT32;
  wrong_table("float", L3EXT_ERROR_TYPE);
  data.dtype = 99;
  wrong_table("layers[0].dtype", L3EXT_ERROR_TYPE);
  data.d_emb = 0;
  wrong_table("layers[0]");
  data.tied = 2;
  wrong_table("tied");
  data.tied = 1;  // d_emb is not d_in
  wrong_table("tied");
  data.vocab_size = 0;
  wrong_table("vocab_size");
  data.num_rows += 1;
  wrong_table("rows");
  data.offsets = nullptr;
  wrong_table("offsets");
  data.rows = nullptr;
  wrong_table("rows");
  std::vector<int64_t> far = kExample.offsets;  // its bytes are no number of 64 bits
  data.num_rows = far.back() = int64_t{1} << 60;
  data.offsets = far.data();
  wrong_table("num_rows");
  EXPECT_ERROR(L3EXT_ERROR_VALUE, "count", l3ext_tables_create(&data, 0, &tables));
  EXPECT_ERROR(L3EXT_ERROR_VALUE, "count", l3ext_tables_create(&data, -1, &tables));
  EXPECT_ERROR(L3EXT_ERROR_VALUE, "direct_io", l3ext_tables_open("x", 7, &tables));

  const Example other(31, 8, 5);
  tables = make_tables({kExample.data(), other.data()});
  EXPECT_ERROR(L3EXT_ERROR_VALUE, "vocabulary", l3ext_runtime_create(tables, nullptr, &runtime));
  l3ext_tables_close(tables);

  tables = make_tables({kExample.data()});
  l3ext_table_info info = {};
  info.struct_size = sizeof info;
  EXPECT_ERROR(L3EXT_ERROR_VALUE, "layer", l3ext_tables_describe(tables, 1, &info));
  EXPECT_ERROR(L3EXT_ERROR_VALUE, "layer", l3ext_tables_describe(tables, -1, &info));
  const auto wrong_options = [&](const char* part, auto change, l3ext_status code) {
    l3ext_runtime_options options = default_options();
    change(options);
    EXPECT_ERROR(code, part, l3ext_runtime_create(tables, &options, &runtime));
    EXPECT(runtime == nullptr);
  };
  const l3ext_status value = L3EXT_ERROR_VALUE;
  wrong_options("tpu:0", [](auto& o) { o.device = "tpu:0"; }, value);
  wrong_options("device", [](auto& o) { o.device = nullptr; }, value);
  wrong_options("device", [](auto& o) { o.device = ""; }, value);
  wrong_options("cache_bytes", [](auto& o) { o.cache_bytes = -1; }, value);
  wrong_options("num_workers", [](auto& o) { o.num_workers = int64_t{1} << 32; }, value);
  wrong_options("in_place", [](auto& o) { o.in_place = 3; }, value);
  wrong_options("queue_depth", [](auto& o) { o.queue_depth = 0; }, value);
  wrong_options("piece_bytes", [](auto& o) { o.piece_bytes = 5000; }, value);
  wrong_options("piece_bytes", [](auto& o) { o.piece_bytes = int64_t{1} << 62; }, value);
  wrong_options("verify", [](auto& o) { o.verify = 2; }, value);
  wrong_options("poison", [](auto& o) { o.poison = -1; }, value);

  runtime = serve(tables);
  l3ext_step* step = nullptr;
  const int32_t ids[] = {0, 30};
  const int64_t wide[] = {0, 1, (int64_t{1} << 32) + 1};
  const int64_t negative[] = {-1};
  EXPECT_ERROR(value, "token_ids[1]", l3ext_step_begin(runtime, ids, L3EXT_INT32, 2, &step));
  EXPECT_ERROR(value, "4294967297", l3ext_step_begin(runtime, wide, L3EXT_INT64, 3, &step));
  EXPECT_ERROR(value, "got -1", l3ext_step_begin(runtime, negative, L3EXT_INT64, 1, &step));
  EXPECT_ERROR(value, "count", l3ext_step_begin(runtime, ids, L3EXT_INT32, -1, &step));
  EXPECT_ERROR(L3EXT_ERROR_TYPE, "dtype", l3ext_step_begin(runtime, ids, L3EXT_FLOAT32, 1, &step));
  step = begin(runtime, {3});
  l3ext_view view = {};
  view.struct_size = sizeof view;
  DLManagedTensorVersioned* tensor = nullptr;
  float x[8] = {}, y[5];
  EXPECT_ERROR(value, "l3ext_step_wait", l3ext_step_view(step, 0, &view));
  EXPECT_ERROR(value, "layer", l3ext_step_wait(step, 1, nullptr));
  l3ext_step_wait(step, 0, nullptr);
  EXPECT_ERROR(value, "layer", l3ext_step_view(step, 1, &view));
  EXPECT_ERROR(value, "layer", l3ext_step_view(step, -1, &view));
  EXPECT_ERROR(value, "part", l3ext_step_tensor(step, 0, 4, &tensor));
  EXPECT_ERROR(value, "no scales", l3ext_step_tensor(step, 0, L3EXT_KEY_SCALES, &tensor));
  EXPECT_ERROR(L3EXT_ERROR_TYPE, "float16",
               l3ext_step_attend(step, 0, L3EXT_FLOAT16, x, y, 1.0, 1));
  EXPECT_ERROR(value, "num_threads", l3ext_step_attend(step, 0, L3EXT_FLOAT32, x, y, 1.0, 0));
  l3ext_step_end(step, nullptr);
  l3ext_runtime_close(runtime);
}

void addresses_between_elements() {
  const auto beside = [](auto* address) {
    return reinterpret_cast<decltype(address)>(reinterpret_cast<uintptr_t>(address) + 1);
  };
  const l3ext_status value = L3EXT_ERROR_VALUE;
  l3ext_tables* tables = nullptr;
  l3ext_table_data data = kExample.data();
  data.rows = beside(kExample.rows.data());
  EXPECT_ERROR(value, "layers[0].rows", l3ext_tables_create(&data, 1, &tables));
  data.dtype = L3EXT_INT8;
  EXPECT_ERROR(value, "multiple of 4", l3ext_tables_create(&data, 1, &tables));
  data = kExample.data();
  data.offsets = beside(kExample.offsets.data());
  EXPECT_ERROR(value, "layers[0].offsets", l3ext_tables_create(&data, 1, &tables));
  data = kExample.data();
  data.frequency = beside(kExample.frequency.data());
  EXPECT_ERROR(value, "layers[0].frequency", l3ext_tables_create(&data, 1, &tables));

  l3ext_runtime* runtime = example_runtime();
  l3ext_step* step = nullptr;
  const int32_t ids[] = {1, 2};
  EXPECT_ERROR(value, "token_ids", l3ext_step_begin(runtime, beside(ids), L3EXT_INT32, 1, &step));
  step = begin(runtime, {3});
  l3ext_step_wait(step, 0, nullptr);
  float x[9] = {}, y[9];
  EXPECT_ERROR(value, "x:", l3ext_step_attend(step, 0, L3EXT_FLOAT32, beside(x), y, 1.0, 1));
  EXPECT_ERROR(value, "y:", l3ext_step_attend(step, 0, L3EXT_FLOAT32, x, beside(y), 1.0, 1));
  l3ext_step_end(step, nullptr);
  l3ext_runtime_close(runtime);
}

void structs_of_other_headers() {
  // An older caller: the last fields are missing.
  struct OldOptions {
    size_t struct_size;
    const char* device;
    int64_t cache_bytes;
  } old = {};
  EXPECT(l3ext_runtime_options_init(reinterpret_cast<l3ext_runtime_options*>(&old), sizeof old) ==
         L3EXT_OK);
  EXPECT(old.struct_size == sizeof old && std::string("cpu") == old.device);
  l3ext_tables* tables = make_tables({kExample.data()});
  l3ext_runtime* runtime = nullptr;
  EXPECT(l3ext_runtime_create(tables, reinterpret_cast<const l3ext_runtime_options*>(&old),
                              &runtime) == L3EXT_OK);
  // A newer one: what this library does not know must be zero.
  struct NewOptions {
    l3ext_runtime_options known;
    int64_t unknown;
  } newer = {default_options(), 0};
  newer.known.struct_size = sizeof newer;
  l3ext_runtime* second = nullptr;
  EXPECT(l3ext_runtime_create(tables, &newer.known, &second) == L3EXT_OK);
  l3ext_runtime_close(second);
  newer.unknown = 1;
  EXPECT_ERROR(L3EXT_ERROR_VALUE, "does not know",
               l3ext_runtime_create(tables, &newer.known, &second));
  EXPECT(second == nullptr);

  // Results: no byte behind an older struct is touched, what a newer one adds becomes zero.
  struct OldTotals {
    size_t struct_size;
    int64_t steps;
    int64_t guard;
  } totals = {16, -1, -1};
  EXPECT(l3ext_runtime_totals(runtime, reinterpret_cast<l3ext_totals*>(&totals)) == L3EXT_OK);
  EXPECT(totals.struct_size == 16 && totals.steps == 0 && totals.guard == -1);
  struct NewTotals {
    l3ext_totals known;
    int64_t unknown;
  } more = {{}, -1};
  more.known.struct_size = sizeof more;
  EXPECT(l3ext_runtime_totals(runtime, &more.known) == L3EXT_OK && more.unknown == 0);
  for (const size_t size : {size_t{0}, size_t{7}, size_t{12}, size_t{4104}, SIZE_MAX}) {
    more.known.struct_size = size;
    EXPECT_ERROR(L3EXT_ERROR_VALUE, "struct_size", l3ext_runtime_totals(runtime, &more.known));
  }

  // Arrays of structs lie struct_size apart.
  struct NewData {
    l3ext_table_data known;
    int64_t unknown;
  } layers[2] = {{kExample.data(), 0}, {kExample.data(), 0}};
  layers[0].known.struct_size = layers[1].known.struct_size = sizeof(NewData);
  l3ext_tables* both = nullptr;
  EXPECT(l3ext_tables_create(&layers[0].known, 2, &both) == L3EXT_OK);
  l3ext_tables_close(both);
  layers[1].known.struct_size = sizeof(l3ext_table_data);
  EXPECT_ERROR(L3EXT_ERROR_VALUE, "layers[1].struct_size",
               l3ext_tables_create(&layers[0].known, 2, &both));
  l3ext_runtime_close(runtime);
  l3ext_tables_close(tables);
}

void files_that_are_wrong() {
  const std::string path = temporary_path("capi_damaged");
  l3ext_tables* tables = nullptr;
  EXPECT_ERROR(L3EXT_ERROR_IO, path.c_str(), l3ext_tables_open(path.c_str(), 0, &tables));
  EXPECT_ERROR(L3EXT_ERROR_IO, path.c_str(), l3ext_tables_map(path.c_str(), &tables));
  std::ofstream(path) << "no table file";
  EXPECT_ERROR(L3EXT_ERROR_IO, path.c_str(), l3ext_tables_map(path.c_str(), &tables));
  EXPECT_ERROR(L3EXT_ERROR_IO, path.c_str(), l3ext_tables_open(path.c_str(), 0, &tables));
  EXPECT(tables == nullptr);

  tables = make_tables({kExample.data(), kExample.data()});
  EXPECT_ERROR(L3EXT_ERROR_IO, "/nowhere/", l3ext_tables_save(tables, "/nowhere/x"));
  EXPECT(l3ext_tables_save(tables, path.c_str()) == L3EXT_OK);
  l3ext_tables_close(tables);
  {
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(4096);  // the first row of the first table
    file.put('\x7f').put('\x7f');
  }
  l3ext_tables_open(path.c_str(), L3EXT_DIRECT_IO_OFF, &tables);
  EXPECT_ERROR(L3EXT_ERROR_VALUE, "in memory", l3ext_tables_save(tables, path.c_str()));
  l3ext_runtime_options options = default_options();
  options.verify = 0;
  l3ext_runtime* careless = nullptr;
  l3ext_runtime_create(tables, &options, &careless);
  l3ext_step* step = begin(careless, {0});
  EXPECT(l3ext_step_wait(step, 0, nullptr) == L3EXT_OK);
  l3ext_step_end(step, nullptr);
  l3ext_runtime_close(careless);

  l3ext_runtime* runtime = serve(tables);
  step = begin(runtime, {0, 1});
  EXPECT_ERROR(L3EXT_ERROR_IO, "checksum", l3ext_step_wait(step, 0, nullptr));
  EXPECT(contains(l3ext_error_text(), path.c_str()));
  EXPECT(l3ext_step_wait(step, 1, nullptr) == L3EXT_OK);  // the other layer goes on
  EXPECT(holds_the_rows(view_of(step, 1), kExample, {0, 1}));
  l3ext_step_end(step, nullptr);
  step = begin(runtime, {7});
  EXPECT(l3ext_step_wait(step, 0, nullptr) == L3EXT_OK);  // and so do other tokens
  l3ext_step_end(step, nullptr);
  EXPECT_ERROR(L3EXT_ERROR_IO, "/nowhere/", l3ext_runtime_trace(runtime, "/nowhere/x"));
  l3ext_runtime_close(runtime);
  std::remove(path.c_str());
}

// Such a program's numbers are no concern of files and texts.
void a_program_of_another_locale() {
  struct Dots : std::numpunct<char> {
    char do_thousands_sep() const override { return '.'; }
    std::string do_grouping() const override { return "\3"; }
  };
  const std::locale before = std::locale::global(std::locale(std::locale::classic(), new Dots));
  const std::string path = temporary_path("capi_locale");
  const Example large(3000, 8, 5);
  l3ext_tables* tables = make_tables({large.data()});
  EXPECT(l3ext_tables_save(tables, path.c_str()) == L3EXT_OK);
  l3ext_tables_close(tables);
  EXPECT(l3ext_tables_open(path.c_str(), 0, &tables) == L3EXT_OK);
  l3ext_step* step = nullptr;
  l3ext_runtime* runtime = serve(tables);
  const int32_t id = 3000;
  EXPECT_ERROR(L3EXT_ERROR_VALUE, "got 3000",
               l3ext_step_begin(runtime, &id, L3EXT_INT32, 1, &step));
  std::locale::global(before);
  l3ext_runtime_close(runtime);
  EXPECT(l3ext_tables_open(path.c_str(), 0, &tables) == L3EXT_OK);
  l3ext_tables_close(tables);
  std::remove(path.c_str());
}

void error_texts_belong_to_threads_and_are_cut() {
  l3ext_tables* tables = nullptr;
  l3ext_tables_open("/nowhere/here", 0, &tables);
  std::thread([&] {
    EXPECT(std::string(l3ext_error_text()).empty());
    EXPECT_ERROR(L3EXT_ERROR_HANDLE, "null", l3ext_step_wait(nullptr, 0, nullptr));
  }).join();
  EXPECT(contains(l3ext_error_text(), "/nowhere/here"));
  const std::string longest(3000, 'x');
  l3ext_tables_open(longest.c_str(), 0, &tables);
  EXPECT(std::string(l3ext_error_text()) == longest.substr(0, 1023));
}

#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)  // their memory has no limit
// In a child, as a limit is the whole process's.
void memory_that_is_not_there() {
  const pid_t child = ::fork();
  if (child == 0) {
    const std::vector<int64_t> offsets(size_t{1} << 24);
    l3ext_table_data data = kExample.data();
    data.vocab_size = static_cast<int64_t>(offsets.size()) - 1;
    data.offsets = offsets.data();
    data.frequency = nullptr;
    data.num_rows = 0;
    const rlimit limit = {1 << 20, 1 << 20};
    ::setrlimit(RLIMIT_AS, &limit);
    l3ext_tables* tables = nullptr;
    const bool good = l3ext_tables_create(&data, 1, &tables) == L3EXT_ERROR_MEMORY &&
                      tables == nullptr && contains(l3ext_error_text(), "memory");
    ::_exit(good ? 0 : 1);
  }
  int status = -1;
  ::waitpid(child, &status, 0);
  EXPECT(status == 0);
}
#endif

// Some threads use a runtime that another one closes: every call returns, with a code that says so.
void a_runtime_is_closed_under_its_users() {
  for (int round = 0; round < 20; ++round) {
    l3ext_runtime* runtime = example_runtime();
    std::atomic<int> wrong = 0, closed = 0;
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t) {
      threads.emplace_back([&] {
        const auto fine = [](l3ext_status status) {
          return status == L3EXT_OK || status == L3EXT_ERROR_HANDLE ||
                 status == L3EXT_ERROR_RUNTIME;
        };
        const int32_t ids[] = {3, 1, 4};
        for (int i = 0; i < 20; ++i) {
          l3ext_step* step = nullptr;
          wrong += !fine(l3ext_step_begin(runtime, ids, L3EXT_INT32, 3, &step));
          wrong += !fine(l3ext_step_wait(step, 0, nullptr));
          wrong += !fine(l3ext_step_end(step, nullptr));
        }
        closed += l3ext_runtime_close(runtime) == L3EXT_OK;
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT(wrong == 0 && closed == 1);
  }
}

// Handles of the parent are unknown to a child, whatever locks were held; it may make its own.
void a_forked_child_starts_anew() {
  std::vector<int32_t> ids(30);  // enough for two threads
  std::iota(ids.begin(), ids.end(), 0);
  l3ext_runtime* runtime = example_runtime();
  l3ext_step* step = begin(runtime, ids);
  l3ext_totals totals = {};
  totals.struct_size = sizeof totals;
  const std::vector<float> x(ids.size() * 8, 1.0f);
#ifndef __SANITIZE_THREAD__  // which does not see OpenMP's barriers, and allows no threads in a
                             // child
  // The child has no pool: it does not wait for that either.
  std::vector<float> y(ids.size() * 5), again(y.size());
  EXPECT(l3ext_step_wait(step, 0, nullptr) == L3EXT_OK);
  EXPECT(l3ext_step_attend(step, 0, L3EXT_FLOAT32, x.data(), y.data(), 1.0, 2) == L3EXT_OK);
#endif
  const std::string refusal = "expected a handle of process ";
  const std::string of_parent = ", got one of process " + std::to_string(::getpid()) + ", from";
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(100);  // ends a child that hangs
    check::failures = 0;
    const int32_t id = 0;
    l3ext_step* mine = nullptr;
    const std::string text = refusal + std::to_string(::getpid()) + of_parent;
    const l3ext_status handle = L3EXT_ERROR_HANDLE;
    EXPECT_ERROR(handle, text, l3ext_step_begin(runtime, &id, L3EXT_INT32, 1, &mine));
    EXPECT_ERROR(handle, text, l3ext_step_wait(step, 0, nullptr));
    EXPECT_ERROR(handle, text, l3ext_runtime_totals(runtime, &totals));
    EXPECT_ERROR(handle, text, l3ext_step_end(step, nullptr));
    EXPECT_ERROR(handle, text, l3ext_runtime_close(runtime));
#ifndef __SANITIZE_THREAD__
    l3ext_runtime* own = example_runtime();
    mine = begin(own, ids);
    EXPECT(own != runtime && l3ext_step_wait(mine, 0, nullptr) == L3EXT_OK);
    EXPECT(l3ext_step_attend(mine, 0, L3EXT_FLOAT32, x.data(), again.data(), 1.0, 2) == L3EXT_OK);
    EXPECT(again == y);
    EXPECT(l3ext_step_end(mine, nullptr) == L3EXT_OK);
    EXPECT_ERROR(handle, "closed", l3ext_step_end(mine, nullptr));
    // Of those of the grandparent, the grandchild knows whose they were.
    const pid_t grandchild = ::fork();
    if (grandchild == 0) {
      EXPECT_ERROR(handle, of_parent, l3ext_runtime_close(runtime));
      EXPECT_ERROR(handle, "one of process " + std::to_string(::getppid()),
                   l3ext_runtime_close(own));
      ::_exit(check::failures == 0 ? 0 : 1);
    }
    int its = -1;
    ::waitpid(grandchild, &its, 0);
    EXPECT(its == 0);
    EXPECT(l3ext_runtime_close(own) == L3EXT_OK);
#endif
    ::_exit(check::failures == 0 ? 0 : 1);
  }
  int status = -1;
  ::waitpid(child, &status, 0);
  EXPECT(status == 0);
  EXPECT(l3ext_step_wait(step, 0, nullptr) == L3EXT_OK);
  l3ext_step_end(step, nullptr);
  EXPECT(l3ext_runtime_close(runtime) == L3EXT_OK);
}

// To be the last one: the process ends with open handles and running workers, and without a leak.
void a_program_may_end_with_everything_open() {
  l3ext_step* step = begin(example_runtime(), {3});
  EXPECT(l3ext_step_wait(step, 0, nullptr) == L3EXT_OK);
}

}  // namespace

int main() {
  RUN(null_is_an_error_and_closing_it_is_none);
  RUN(a_closed_handle_is_known);
  RUN(a_handle_of_another_kind_is_known);
  RUN(values_out_of_range);
  RUN(addresses_between_elements);
  RUN(structs_of_other_headers);
  RUN(files_that_are_wrong);
  RUN(a_program_of_another_locale);
  RUN(error_texts_belong_to_threads_and_are_cut);
#if !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
  RUN(memory_that_is_not_there);
#endif
  RUN(a_runtime_is_closed_under_its_users);
  RUN(a_forked_child_starts_anew);
  RUN(a_program_may_end_with_everything_open);
  return check::failures;
}
