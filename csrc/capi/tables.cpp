// Tables in a file or in the caller's memory.
#include <span>

#include "capi/objects.hpp"
#include "capi/structs.hpp"
#include "runtime/table_file.hpp"

namespace l3ext::capi {
namespace {

constexpr DType kDTypes[] = {DType::kFloat64,    DType::kFloat32, DType::kBFloat16, DType::kFloat16,
                             DType::kFloat8E4M3, DType::kInt8,    DType::kInt32,    DType::kInt64};
static_assert(kDTypes[L3EXT_FLOAT8_E4M3FN] == DType::kFloat8E4M3 &&
              kDTypes[L3EXT_INT64] == DType::kInt64);

// Tells the caller that its memory is free, unless the call that it was given to failed.
struct Release {
  ~Release() {
    if (armed && release != nullptr) release(context);
  }
  void (*release)(void* context);
  void* context;
  bool armed = false;
};

DirectIo direct_io_from_c(int32_t direct_io) {
  switch (direct_io) {
    case L3EXT_DIRECT_IO_AUTO:
      return DirectIo::kAuto;
    case L3EXT_DIRECT_IO_ON:
      return DirectIo::kOn;
    case L3EXT_DIRECT_IO_OFF:
      return DirectIo::kOff;
    default:
      break;
  }
  throw Error(ErrorCode::kValue,
              concat("direct_io: expected an L3EXT_DIRECT_IO_ constant, got ", direct_io));
}

std::shared_ptr<const RowOwners> copy_owners(const l3ext_table_data& data,
                                             const std::string& name) {
  L3EXT_CHECK(data.vocab_size >= 1 && data.vocab_size <= INT32_MAX, name,
              ".vocab_size: expected 1 to ", INT32_MAX, ", got ", data.vocab_size);
  L3EXT_CHECK(data.offsets != nullptr, name, ".offsets: expected ", data.vocab_size + 1,
              " entries, got null");
  check_aligned(data.offsets, sizeof(int64_t), name + ".offsets");
  check_aligned(data.frequency, sizeof(int64_t), name + ".frequency");
  auto owners = std::make_shared<RowOwners>();
  owners->offsets.assign(data.offsets, data.offsets + data.vocab_size + 1);
  if (data.frequency != nullptr) {
    owners->frequency.assign(data.frequency, data.frequency + data.vocab_size);
  }
  owners->check(data.num_rows, name);
  return owners;
}

void add_table(Tables& tables, const l3ext_table_data& data, std::shared_ptr<Release> release) {
  const std::string name = concat("layers[", tables.tables.size(), "]");
  Table table;
  table.shape.dtype = dtype_from_c(data.dtype, concat(name, ".dtype").c_str());
  table.shape.d_in = data.d_in;
  table.shape.d_emb = data.d_emb;
  L3EXT_CHECK(data.tied == 0 || data.tied == 1, name, ".tied: expected 0 or 1, got ", data.tied);
  table.shape.tied = data.tied == 1;
  table.shape.check(name);
  // More than any address space holds; the sizes that are computed from it are numbers of 64 bits.
  constexpr int64_t kMostBytes = int64_t{1} << 57;
  L3EXT_CHECK(data.num_rows <= kMostBytes / table.shape.row_bytes(), name,
              ".num_rows: expected a table of at most ", kMostBytes, " bytes, got ", data.num_rows,
              " rows of ", table.shape.row_bytes());
  table.owners = copy_owners(data, name);
  L3EXT_CHECK(data.rows != nullptr || data.num_rows == 0, name, ".rows: expected ", data.num_rows,
              " rows, got null");
  const DType scales = DType::kFloat32;  // of rows of 8 bits
  check_aligned(data.rows,
                dtype_bytes(is_quantized(table.shape.dtype) ? scales : table.shape.dtype),
                name + ".rows");
  if (!tables.tables.empty()) {
    const std::shared_ptr<const RowOwners>& previous = tables.tables.back().owners;
    if (previous->offsets == table.owners->offsets &&
        previous->frequency == table.owners->frequency) {
      table.owners = previous;
    }
  }
  table.source = std::make_shared<RamTable>(data.rows, std::move(release));
  tables.tables.push_back(std::move(table));
  tables.rows.push_back(data.rows);
}

}  // namespace

l3ext_dtype c_dtype(DType dtype) {
  for (l3ext_dtype i = 0; i < static_cast<l3ext_dtype>(std::size(kDTypes)); ++i) {
    if (kDTypes[i] == dtype) return i;
  }
  throw Error(ErrorCode::kType, concat("no constant for ", dtype_name(dtype)));
}

DType dtype_from_c(int64_t dtype, const char* argument) {
  if (dtype >= 0 && dtype < std::ssize(kDTypes)) return kDTypes[dtype];
  throw Error(ErrorCode::kType, concat(argument, ": expected an l3ext_dtype, got ", dtype));
}

}  // namespace l3ext::capi

// --- the ABI ------------------------------------------------------------------------------------

using namespace l3ext;
using namespace l3ext::capi;

l3ext_status l3ext_tables_open(const char* path, int32_t direct_io, l3ext_tables** tables) {
  return guarded([&] {
    clear_result(tables, "tables");
    const TableFile file(check_string(path, "path"), direct_io_from_c(direct_io));
    auto opened = std::make_shared<Tables>();
    opened->tables = file.tables();
    opened->path = file.path();
    opened->direct_io = file.direct();
    *tables = registry().tables.add(std::move(opened));
  });
}

l3ext_status l3ext_tables_map(const char* path, l3ext_tables** tables) {
  return guarded([&] {
    clear_result(tables, "tables");
    MappedTables mapped = map_table_file(check_string(path, "path"));
    auto opened = std::make_shared<Tables>();
    opened->tables = std::move(mapped.tables);
    opened->path = mapped.file->file().path();
    opened->mapped = std::move(mapped.file);
    *tables = registry().tables.add(std::move(opened));
  });
}

l3ext_status l3ext_tables_create(const l3ext_table_data* layers, int64_t count,
                                 l3ext_tables** tables) {
  return guarded([&] {
    clear_result(tables, "tables");
    L3EXT_CHECK(layers != nullptr, "layers: expected an array of structs, got null");
    L3EXT_CHECK(count >= 1 && count <= 4096, "count: expected 1 to 4096 tables, got ", count);
    const size_t stride = layers[0].struct_size;
    auto created = std::make_shared<Tables>();
    std::vector<std::shared_ptr<Release>> releases;
    for (int64_t i = 0; i < count; ++i) {
      const auto* layer = reinterpret_cast<const l3ext_table_data*>(
          reinterpret_cast<const std::byte*>(layers) + static_cast<size_t>(i) * stride);
      const std::string name = concat("layers[", i, "]");
      const l3ext_table_data data = read_struct(layer, name.c_str());
      L3EXT_CHECK(data.struct_size == stride, name, ".struct_size: expected that of layers[0], ",
                  stride, ", got ", data.struct_size);
      releases.push_back(std::make_shared<Release>(Release{data.release, data.context}));
      add_table(*created, data, releases.back());
    }
    *tables = registry().tables.add(std::move(created));
    for (const auto& release : releases) release->armed = true;
  });
}

l3ext_status l3ext_tables_save(const l3ext_tables* tables, const char* path) {
  return guarded([&] {
    const auto saved = registry().tables.find(tables, "tables");
    L3EXT_CHECK(saved->path.empty(), "tables: expected tables in memory, got those of the file ",
                saved->path);
    std::vector<TableData> data;
    data.reserve(saved->tables.size());
    for (size_t i = 0; i < saved->tables.size(); ++i) {
      data.push_back({saved->tables[i].shape, saved->tables[i].owners, saved->rows[i]});
    }
    write_table_file(check_string(path, "path"), data);
  });
}

l3ext_status l3ext_tables_describe(const l3ext_tables* tables, int64_t layer,
                                   l3ext_table_info* info) {
  return guarded([&] {
    const auto described = registry().tables.find(tables, "tables");
    const size_t size = result_size(info, "info");
    const int64_t layers = std::ssize(described->tables);
    L3EXT_CHECK(layer >= 0 && layer < layers, "layer: expected 0 to ", layers - 1, ", got ", layer);
    const Table& table = described->tables[layer];
    const RowOwners& owners = *table.owners;
    l3ext_table_info facts = {};
    facts.num_layers = layers;
    facts.dtype = c_dtype(table.shape.dtype);
    facts.d_in = table.shape.d_in;
    facts.d_emb = table.shape.d_emb;
    facts.tied = table.shape.tied ? 1 : 0;
    facts.vocab_size = owners.vocab_size();
    facts.num_rows = owners.total_rows();
    facts.row_bytes = table.shape.row_bytes();
    facts.offsets = owners.offsets.data();
    facts.frequency = owners.frequency.empty() ? nullptr : owners.frequency.data();
    facts.path = described->path.empty() ? nullptr : described->path.c_str();
    facts.direct_io = described->direct_io ? 1 : 0;
    facts.mapped = described->mapped ? 1 : 0;
    facts.guarded = described->mapped && described->mapped->guarded() ? 1 : 0;
    write_struct(facts, info, size);
  });
}

l3ext_status l3ext_tables_close(l3ext_tables* tables) {
  return guarded([&] { registry().tables.take(tables, "tables"); });
}
