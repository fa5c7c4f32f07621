// The C++ header: what it owns it closes once, what fails it throws.
#include <dlpack/dlpack.h>

#include <cstdio>
#include <cstring>
#include <l3ext/l3ext.hpp>

namespace {

int failures = 0;

void expect(bool holds, const char* what) {
  if (holds) return;
  ++failures;
  std::printf("expected %s\n", what);
}

template <typename F>
l3ext_status thrown_by(F&& f, const char* part) {
  try {
    f();
  } catch (const l3ext::Error& error) {
    expect(std::strstr(error.what(), part) != nullptr, part);
    return error.status();
  }
  return L3EXT_OK;
}

}  // namespace

int main() {
  const std::vector<int64_t> offsets = {0, 1, 3};
  const std::vector<float> rows = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  int released = 0;
  auto table = l3ext::sized<l3ext_table_data>();
  table.dtype = L3EXT_FLOAT32;
  table.d_in = 3;
  table.d_emb = 2;
  table.vocab_size = 2;
  table.offsets = offsets.data();
  table.num_rows = 3;
  table.rows = rows.data();
  table.release = [](void* context) { ++*static_cast<int*>(context); };
  table.context = &released;
  try {
    l3ext::Tables tables = l3ext::Tables::create({table});
    expect(tables.describe(0).row_bytes == 20, "rows of 20 bytes");
    l3ext::Runtime runtime(tables);
    l3ext::Tables elsewhere = std::move(tables);
    expect(tables.get() == nullptr, "nothing left behind by a move");
    elsewhere.close();
    expect(runtime.describe(0).table_bytes == 60, "a table of 60 bytes");

    l3ext::Step step = runtime.begin(std::vector<int64_t>{1, 1, 0});
    step = runtime.begin(std::vector<int32_t>{1});  // ends the first
    expect(runtime.totals().steps == 1, "an assigned step to end the one before");
    step.wait(0);
    const l3ext_view view = step.view(0);
    expect(view.num_segments == 1 && view.tokens[0] == 1, "token 1");
    DLManagedTensorVersioned* values = step.tensor(0, L3EXT_VALUES);
    expect(values->dl_tensor.shape[1] == 2, "2 columns of values");
    values->deleter(values);
    const float x[] = {1, 0, 0};
    float y[2] = {};
    step.attend(0, L3EXT_FLOAT32, x, y);
    expect(y[0] > 13.9f && y[0] <= 14.f, "nearly the last row's value");
    step.end();
    expect(thrown_by([&] { step.wait(0); }, "step") == L3EXT_ERROR_HANDLE, "an ended step");
    expect(thrown_by([&] { runtime.begin(std::vector<int32_t>{7}); }, "token_ids[0]") ==
               L3EXT_ERROR_VALUE,
           "id 7 to be refused");
    expect(thrown_by([] { l3ext::Tables::open("/nowhere"); }, "/nowhere") == L3EXT_ERROR_IO,
           "no file there");
    expect(released == 0, "rows to be in use");
  } catch (const l3ext::Error& error) {
    expect(false, error.what());
  }
  expect(released == 1, "rows to be released");
  if (failures == 0) std::printf("good\n");
  return failures;
}
