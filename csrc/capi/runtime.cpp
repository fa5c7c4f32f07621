// Runtimes: creation, facts, ledger.
#include "capi/objects.hpp"
#include "capi/structs.hpp"

namespace l3ext::capi {
namespace {

l3ext_runtime_options default_options() {
  const PrefetchOptions defaults;
  l3ext_runtime_options options = {};
  options.struct_size = sizeof options;
  options.device = "cpu";
  options.cache_bytes = defaults.cache_bytes;
  options.ring_bytes = defaults.ring_bytes;
  options.in_place = defaults.in_place ? 1 : 0;
  options.num_workers = defaults.num_workers;
  options.queue_depth = defaults.queue_depth;
  options.piece_bytes = defaults.piece_bytes;
  options.record_steps = defaults.record_steps;
  options.verify = 1;
  options.poison = 0;
  return options;
}

bool flag(int64_t value, const char* argument) {
  L3EXT_CHECK(value == 0 || value == 1, argument, ": expected 0 or 1, got ", value);
  return value == 1;
}

PrefetchOptions prefetch_options(const l3ext_runtime_options& options) {
  L3EXT_CHECK(options.num_workers >= 1 && options.num_workers <= 256,
              "options.num_workers: expected 1 to 256, got ", options.num_workers);
  L3EXT_CHECK(options.queue_depth >= 1 && options.queue_depth <= INT32_MAX,
              "options.queue_depth: expected at least 1, got ", options.queue_depth);
  PrefetchOptions result;
  result.cache_bytes = options.cache_bytes;
  result.ring_bytes = options.ring_bytes;
  result.num_workers = static_cast<int>(options.num_workers);
  result.in_place = flag(options.in_place, "options.in_place");
  result.queue_depth = static_cast<int>(options.queue_depth);
  result.piece_bytes = options.piece_bytes;
  result.record_steps = options.record_steps;
  result.poison = flag(options.poison, "options.poison");
  return result;
}

}  // namespace
}  // namespace l3ext::capi

// --- the ABI ------------------------------------------------------------------------------------

using namespace l3ext;
using namespace l3ext::capi;

l3ext_status l3ext_runtime_options_init(l3ext_runtime_options* options, size_t struct_size) {
  return guarded([&] {
    L3EXT_CHECK(options != nullptr, "options: expected a struct for the result, got null");
    check_struct_size(struct_size, "options");
    write_struct(default_options(), options, struct_size);
  });
}

l3ext_status l3ext_runtime_create(const l3ext_tables* tables, const l3ext_runtime_options* options,
                                  l3ext_runtime** runtime) {
  return guarded([&] {
    clear_result(runtime, "runtime");
    const auto of = registry().tables.find(tables, "tables");
    const l3ext_runtime_options wanted =
        options == nullptr ? default_options() : read_struct(options, "options", default_options());
    std::vector<Table> served = of->tables;
    if (!flag(wanted.verify, "options.verify")) {
      for (Table& table : served) table.checksums.clear();
    }
    auto created = std::make_shared<Runtime>();
    created->owners = served[0].owners;
    created->prefetcher = Prefetcher::create(
        std::move(served), make_device(check_string(wanted.device, "options.device")),
        prefetch_options(wanted));
    *runtime = registry().runtimes.add(std::move(created));
  });
}

l3ext_status l3ext_runtime_describe(const l3ext_runtime* runtime, int64_t layer,
                                    l3ext_placement* placement) {
  return guarded([&] {
    const auto described = registry().runtimes.find(runtime, "runtime");
    const size_t size = result_size(placement, "placement");
    const auto& layers = described->prefetcher->placement();
    L3EXT_CHECK(layer >= 0 && layer < std::ssize(layers), "layer: expected 0 to ",
                layers.size() - 1, ", got ", layer);
    const Prefetcher::LayerPlacement& of = layers[layer];
    l3ext_placement facts = {};
    facts.table_bytes = of.table_bytes;
    facts.in_place = of.in_place ? 1 : 0;
    facts.cached_tokens = of.hot_tokens;
    facts.cached_bytes = of.hot_bytes;
    facts.ring_bytes = of.ring_bytes;
    write_struct(facts, placement, size);
  });
}

l3ext_status l3ext_runtime_totals(const l3ext_runtime* runtime, l3ext_totals* totals) {
  return guarded([&] {
    const auto of = registry().runtimes.find(runtime, "runtime");
    const size_t size = result_size(totals, "totals");
    const LedgerTotals sums = of->prefetcher->ledger()->totals();
    l3ext_totals facts = {};
    facts.steps = sums.steps;
    facts.tokens = sums.tokens;
    facts.rows = sums.rows;
    facts.bytes = sums.bytes;
    facts.hits = sums.hits;
    facts.hit_bytes = sums.hit_bytes;
    facts.reused = sums.reused;
    facts.reused_bytes = sums.reused_bytes;
    facts.in_place_bytes = sums.in_place_bytes;
    facts.spilled = sums.spilled;
    facts.fetch_ns = sums.fetch_ns;
    facts.exposed_ns = sums.exposed_ns;
    write_struct(facts, totals, size);
  });
}

l3ext_status l3ext_runtime_trace(const l3ext_runtime* runtime, const char* path) {
  return guarded([&] {
    const auto of = registry().runtimes.find(runtime, "runtime");
    of->prefetcher->ledger()->write_chrome_trace(check_string(path, "path"));
  });
}

l3ext_status l3ext_runtime_close(l3ext_runtime* runtime) {
  return guarded([&] {
    if (const auto closed = registry().runtimes.take(runtime, "runtime")) {
      closed->prefetcher->close();
    }
  });
}
