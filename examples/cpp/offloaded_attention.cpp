// Lookup tables in memory, served to a loop of decode steps, from C++.
//   c++ -std=c++17 offloaded_attention.cpp $(pkg-config --cflags --libs l3ext) && ./a.out
#include <cstdio>
#include <l3ext/l3ext.hpp>
#include <random>
#include <vector>

int main() {
  constexpr int64_t kVocab = 1000, kIn = 64, kEmb = 32, kRowsPerToken = 3, kCount = 8;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> rows(kVocab * kRowsPerToken * (kIn + kEmb)), x(kCount * kIn), y(kCount * kEmb);
  for (float& value : rows) value = normal(random);
  for (float& value : x) value = normal(random);
  std::vector<int64_t> offsets(kVocab + 1), frequency(kVocab);
  for (int64_t t = 0; t < kVocab; ++t) {
    offsets[t + 1] = offsets[t] + kRowsPerToken;
    frequency[t] = kVocab / (t + 1);
  }

  auto table = l3ext::sized<l3ext_table_data>();
  table.dtype = L3EXT_FLOAT32;
  table.d_in = kIn;
  table.d_emb = kEmb;
  table.vocab_size = kVocab;
  table.offsets = offsets.data();
  table.frequency = frequency.data();
  table.num_rows = offsets.back();
  table.rows = rows.data();
  try {
    l3ext_runtime_options options = l3ext::Runtime::default_options();
    options.in_place = 0;            // copy rows ahead, as for a GPU: the CPU needs no copies
    options.cache_bytes = 64 << 10;  // those of the most frequent tokens stay
    l3ext::Runtime runtime(l3ext::Tables::create({table, table}), &options);
    for (int i = 0; i < 4; ++i) {
      std::vector<int32_t> ids(kCount);
      for (int32_t& id : ids) id = static_cast<int32_t>(random() % (1 + random() % kVocab));
      l3ext::Step step = runtime.begin(ids);  // returns at once
      for (int64_t layer = 0; layer < 2; ++layer) {
        step.wait(layer);
        step.attend(layer, L3EXT_FLOAT32, x.data(), y.data());
      }
    }  // ends the step
    const l3ext_totals totals = runtime.totals();
    std::printf("%d steps, %d of %d tokens from the cache, waited %.1f us\n",
                static_cast<int>(totals.steps), static_cast<int>(totals.hits),
                static_cast<int>(totals.tokens), static_cast<double>(totals.exposed_ns) * 1e-3);
    runtime.begin(std::vector<int64_t>{kVocab});  // no such token
  } catch (const l3ext::Error& error) {
    std::printf("refused: %s\n", error.what());
    return error.status() == L3EXT_ERROR_VALUE ? 0 : 1;
  }
}
