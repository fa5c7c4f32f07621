// Tables, table files, the prefetcher and its ledger.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/dlpack_dtype.hpp"
#include "python/bindings.hpp"
#include "python/runtime_objects.hpp"
#include "python/tensor_arg.hpp"
#include "runtime/host_device.hpp"
#include "runtime/prefetcher.hpp"
#include "runtime/table_file.hpp"

namespace py = pybind11;

namespace l3ext::python {
namespace {

// Keeps a Python object alive from C++; the last owner may be any thread, without the GIL.
std::shared_ptr<void> keep(py::object object) {
  return {new py::object(std::move(object)), [](void* kept) {
            py::gil_scoped_acquire gil;
            delete static_cast<py::object*>(kept);
          }};
}

std::vector<int64_t> int64_vector(const TensorArg& array, const char* argument) {
  check_host(array.view(), argument);
  check_dtype(array.view(), argument, DType::kInt64);
  check_shape(array.view(), argument, {-1});
  check_contiguous(array.view(), argument);
  return {array->as<int64_t>(), array->as<int64_t>() + array->shape[0]};
}

// A table of this shape whose rows are those of `data`.
PyTable table_over(const py::object& data, const TensorArg& rows, const TableShape& shape,
                   const TensorArg& offsets, const py::object& frequency) {
  check_host(rows.view(), "data");
  check_contiguous(rows.view(), "data");
  PyTable result;
  result.table.shape = shape;
  shape.check("table");
  auto owners = std::make_shared<RowOwners>();
  owners->offsets = int64_vector(offsets, "offsets");
  if (!frequency.is_none()) {
    owners->frequency = int64_vector(TensorArg::from_object(frequency), "frequency");
  }
  owners->check(rows->shape[0], "table");
  result.table.owners = std::move(owners);
  result.table.source = std::make_shared<RamTable>(rows->data, keep(data));
  result.data = rows->data;
  return result;
}

PyTable make_table(const py::object& data, const TensorArg& offsets, const py::object& frequency,
                   int64_t d_in, bool tied) {
  const TensorArg rows = TensorArg::from_object(data);
  check_shape(rows.view(), "data", {-1, -1});
  const int64_t width = rows->shape[1];
  L3EXT_CHECK(tied ? d_in == width : d_in < width, "data: expected ",
              tied ? "exactly" : "more than", " d_in = ", d_in, " columns",
              tied ? " (tied)" : " (keys, then values)", ", got ", width);
  L3EXT_CHECK(!is_quantized(rows->dtype), "data: expected l3ext.QuantizedTable for rows of ",
              dtype_name(rows->dtype), ", which need scales, got an array");
  return table_over(data, rows, {rows->dtype, d_in, tied ? d_in : width - d_in, tied}, offsets,
                    frequency);
}

// `keys`: the view of `storage` that l3ext.QuantizedTable makes, for its dtype and width.
PyTable make_quantized_table(const py::object& storage, const TensorArg& keys,
                             const TensorArg& offsets, const py::object& frequency, int64_t d_emb,
                             bool tied) {
  const TensorArg rows = TensorArg::from_object(storage);
  check_dtype(rows.view(), "storage", DType::kUInt8);
  check_shape(keys.view(), "keys", {-1, -1});
  const TableShape shape = {keys->dtype, keys->shape[1], d_emb, tied};
  check_shape(rows.view(), "storage", {keys->shape[0], shape.row_bytes()});
  return table_over(storage, rows, shape, offsets, frequency);
}

template <typename T>
py::array_t<T> numpy_array(const std::vector<T>& values) {
  return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

std::vector<TableData> table_data(const std::vector<PyTable>& tables) {
  std::vector<TableData> data;
  data.reserve(tables.size());
  for (const PyTable& table : tables) {
    L3EXT_CHECK(table.data != nullptr, "tables: expected tables in RAM, got one in a file");
    data.push_back({table.table.shape, table.table.owners, table.data});
  }
  return data;
}

std::vector<PyTable> py_tables(const std::vector<Table>& tables) {
  std::vector<PyTable> result;
  result.reserve(tables.size());
  for (const Table& table : tables) result.push_back({table, nullptr});
  return result;
}

// The first rows of a buffer: their elements, or if they are quantised their bytes.
py::capsule rows_capsule(std::shared_ptr<DeviceBuffer> buffer, const Device& device,
                         const TableShape& shape, int64_t rows) {
  const bool quantized = is_quantized(shape.dtype);
  return buffer_capsule(std::move(buffer), device,
                        dlpack_dtype(quantized ? DType::kUInt8 : shape.dtype),
                        {rows, quantized ? shape.row_bytes() : shape.width()});
}

double to_us(int64_t ns) { return static_cast<double>(ns) * 1e-3; }

py::dict step_dict(const StepRecord& step) {
  py::list layers;
  for (const LayerRecord& layer : step.layers) {
    py::dict facts;
    facts["tokens"] = layer.tokens;
    facts["rows"] = layer.rows;
    facts["bytes"] = layer.bytes;
    facts["hits"] = layer.hits;
    facts["hit_bytes"] = layer.hit_bytes;
    facts["reused"] = layer.reused;
    facts["reused_bytes"] = layer.reused_bytes;
    facts["in_place_bytes"] = layer.in_place_bytes;
    facts["near"] = layer.near;
    facts["near_bytes"] = layer.near_bytes;
    facts["spilled"] = layer.spilled;
    facts["cancelled"] = layer.cancelled;
    facts["fetch_us"] = to_us(layer.fetch_end_ns - layer.fetch_begin_ns);
    facts["exposed_us"] = to_us(layer.exposed_ns);
    facts["fetch_begin_us"] = to_us(layer.fetch_begin_ns);
    facts["fetch_end_us"] = to_us(layer.fetch_end_ns);
    facts["wait_begin_us"] = to_us(layer.wait_begin_ns);
    facts["wait_end_us"] = to_us(layer.wait_end_ns);
    layers.append(std::move(facts));
  }
  py::dict facts;
  facts["step"] = step.step;
  facts["begin_us"] = to_us(step.begin_ns);
  facts["end_us"] = to_us(step.end_ns);
  facts["layers"] = std::move(layers);
  return facts;
}

py::dict totals_dict(const LedgerTotals& totals) {
  py::dict facts;
  facts["steps"] = totals.steps;
  facts["tokens"] = totals.tokens;
  facts["rows"] = totals.rows;
  facts["bytes"] = totals.bytes;
  facts["hits"] = totals.hits;
  facts["hit_bytes"] = totals.hit_bytes;
  facts["reused"] = totals.reused;
  facts["reused_bytes"] = totals.reused_bytes;
  facts["in_place_bytes"] = totals.in_place_bytes;
  facts["near"] = totals.near;
  facts["near_bytes"] = totals.near_bytes;
  facts["spilled"] = totals.spilled;
  facts["fetch_us"] = to_us(totals.fetch_ns);
  facts["exposed_us"] = to_us(totals.exposed_ns);
  return facts;
}

void bind_tables(py::module_& module) {
  py::class_<PyTable>(module, "Table")
      .def(py::init(&make_table), py::arg("data"), py::arg("offsets"), py::arg("frequency"),
           py::arg("d_in"), py::arg("tied"))
      .def_static("quantized", &make_quantized_table, py::arg("storage"), py::arg("keys"),
                  py::arg("offsets"), py::arg("frequency"), py::arg("d_emb"), py::arg("tied"))
      .def_property_readonly("dtype",
                             [](const PyTable& t) { return dtype_name(t.table.shape.dtype); })
      .def_property_readonly("d_in", [](const PyTable& t) { return t.table.shape.d_in; })
      .def_property_readonly("d_emb", [](const PyTable& t) { return t.table.shape.d_emb; })
      .def_property_readonly("tied", [](const PyTable& t) { return t.table.shape.tied; })
      .def_property_readonly("row_bytes",
                             [](const PyTable& t) { return t.table.shape.row_bytes(); })
      .def_property_readonly("offsets",
                             [](const PyTable& t) { return numpy_array(t.table.owners->offsets); })
      .def("rows",
           [](const PyTable& t) {
             const Table& table = t.table;
             const std::byte* memory = table.source->memory();
             const int64_t rows = table.owners->total_rows();
             L3EXT_CHECK(memory != nullptr || rows == 0,
                         "tables: expected tables in host memory, got one in a file");
             const auto bytes = static_cast<size_t>(rows * table.shape.row_bytes());
             return rows_capsule(std::make_shared<DeviceBuffer>(memory, bytes, table.source),
                                 HostDevice(), table.shape, rows);
           })
      .def("checksums",
           [](const PyTable& t) {
             if (t.data == nullptr) return numpy_array(t.table.checksums);
             std::vector<uint32_t> checksums;
             {
               py::gil_scoped_release release;
               checksums = block_checksums(t.data, t.table.shape.row_bytes(), *t.table.owners);
             }
             return numpy_array(checksums);
           })
      .def("drop_checksums", [](PyTable& t) { t.table.checksums.clear(); });

  py::enum_<DirectIo>(module, "DirectIo")
      .value("AUTO", DirectIo::kAuto)
      .value("ON", DirectIo::kOn)
      .value("OFF", DirectIo::kOff);
  py::enum_<IoEngine>(module, "IoEngine")
      .value("AUTO", IoEngine::kAuto)
      .value("URING", IoEngine::kUring)
      .value("PREAD", IoEngine::kPread);
  py::class_<TableFile>(module, "TableFile")
      .def(py::init([](const std::filesystem::path& path, DirectIo direct_io, IoEngine engine) {
             py::gil_scoped_release release;
             return std::make_unique<TableFile>(path, direct_io, engine);
           }),
           py::arg("path"), py::arg("direct_io"), py::arg("io_engine"))
      .def_property_readonly("direct", &TableFile::direct)
      .def_property_readonly("io_engine", &TableFile::io_engine)
      .def("tables", [](const TableFile& file) { return py_tables(file.tables()); });
  py::class_<MappedTables>(module, "MappedTables")
      .def(py::init([](const std::filesystem::path& path) {
             py::gil_scoped_release release;
             return std::make_unique<MappedTables>(map_table_file(path));
           }),
           py::arg("path"))
      .def_property_readonly("guarded",
                             [](const MappedTables& mapped) { return mapped.file->guarded(); })
      .def("tables", [](const MappedTables& mapped) { return py_tables(mapped.tables); });
  module.def(
      "write_table_file",
      [](const std::filesystem::path& path, const std::vector<PyTable>& tables) {
        const std::vector<TableData> data = table_data(tables);
        py::gil_scoped_release release;
        write_table_file(path, data, interrupted);
      },
      py::arg("path"), py::arg("tables"));
}

void bind_ledger(py::module_& module) {
  py::class_<Ledger, std::shared_ptr<Ledger>>(module, "Ledger")
      .def("steps",
           [](const Ledger& ledger) {
             py::list steps;
             for (const StepRecord& step : ledger.steps()) steps.append(step_dict(step));
             return steps;
           })
      .def("totals", [](const Ledger& ledger) { return totals_dict(ledger.totals()); })
      .def("clear", &Ledger::clear)
      .def(
          "write_chrome_trace",
          [](const Ledger& ledger, const std::filesystem::path& path) {
            py::gil_scoped_release release;
            ledger.write_chrome_trace(path);
          },
          py::arg("path"));
}

void bind_prefetcher(py::module_& module) {
  using Step = Prefetcher::Step;
  py::class_<Step>(module, "PrefetchStep")
      .def(
          "wait",
          [](Step& step, int64_t layer, const TensorArg& segment_rows, uintptr_t stream) {
            const auto segments = static_cast<int64_t>(step.tokens().size());
            check_dtype(segment_rows.view(), "segment_rows", DType::kInt64);
            check_shape(segment_rows.view(), "segment_rows", {segments, 2});
            check_contiguous(segment_rows.view(), "segment_rows");
            check_writable(segment_rows.view(), "segment_rows");
            py::gil_scoped_release release;
            step.wait(layer, stream_of(stream), interrupted);
            step.segment_rows(layer, segment_rows->as<int64_t>());
          },
          py::arg("layer"), py::arg("segment_rows"), py::arg("stream") = 0)
      .def(
          "spill",
          [](const Step& step, int64_t layer) -> py::object {
            if (!step.spilled(layer)) return py::none();
            auto buffer = step.rows(layer);
            const TableShape& shape = step.prefetcher().shape(layer);
            const int64_t rows = static_cast<int64_t>(buffer->bytes()) / shape.row_bytes();
            return rows_capsule(std::move(buffer), step.prefetcher().device(), shape, rows);
          },
          py::arg("layer"))
      .def(
          "near_segments",
          [](const Step& step, int64_t layer) { return numpy_array(step.near_segments(layer)); },
          py::arg("layer"))
      .def(
          "end",
          [](Step& step, uintptr_t stream) {
            py::gil_scoped_release release;
            step.end(stream_of(stream));
          },
          py::arg("stream") = 0);

  py::class_<Prefetcher, std::shared_ptr<Prefetcher>>(module, "Prefetcher")
      .def(py::init([](const std::vector<PyTable>& tables, const std::string& device,
                       int64_t cache_bytes, int64_t ring_bytes, int num_workers, int queue_depth,
                       int64_t piece_bytes, int64_t record_steps, bool in_place, bool poison) {
             std::vector<Table> sources = runtime_tables(tables);
             py::gil_scoped_release release;
             return Prefetcher::create(std::move(sources), make_device(device),
                                       {.cache_bytes = cache_bytes,
                                        .ring_bytes = ring_bytes,
                                        .num_workers = num_workers,
                                        .queue_depth = queue_depth,
                                        .piece_bytes = piece_bytes,
                                        .record_steps = record_steps,
                                        .in_place = in_place,
                                        .poison = poison});
           }),
           py::arg("tables"), py::arg("device"), py::kw_only(), py::arg("cache_bytes"),
           py::arg("ring_bytes"), py::arg("num_workers"), py::arg("queue_depth"),
           py::arg("piece_bytes"), py::arg("record_steps"), py::arg("in_place"), py::arg("poison"))
      .def(
          "begin",
          [](const std::shared_ptr<Prefetcher>& self, const TensorArg& tokens) {
            check_host(tokens.view(), "token_ids");
            check_dtype(tokens.view(), "token_ids", DType::kInt32);
            check_shape(tokens.view(), "token_ids", {-1});
            check_contiguous(tokens.view(), "token_ids");
            py::gil_scoped_release release;
            return Prefetcher::begin(
                self, {tokens->as<int32_t>(), static_cast<size_t>(tokens->shape[0])});
          },
          py::arg("token_ids"))
      .def(
          "arena",
          [](const Prefetcher& self, int64_t layer) {
            return rows_capsule(self.arena(layer), self.device(), self.shape(layer),
                                self.arena_rows(layer));
          },
          py::arg("layer"))
      .def(
          "use_near_data",
          [](Prefetcher& self, double fetch_us_per_byte, double attend_us,
             double attend_us_per_byte) {
            self.use_near_data(NearDataCosts{fetch_us_per_byte, attend_us, attend_us_per_byte});
          },
          py::arg("fetch_us_per_byte"), py::arg("attend_us"), py::arg("attend_us_per_byte"))
      .def("check_home", &Prefetcher::check_home)
      .def_property_readonly("is_home", &Prefetcher::is_home)
      .def("close", &Prefetcher::close, py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("ledger", &Prefetcher::ledger)
      .def("placement", [](const Prefetcher& self) {
        py::list layers;
        for (const Prefetcher::LayerPlacement& layer : self.placement()) {
          py::dict facts;
          facts["table_bytes"] = layer.table_bytes;
          facts["in_place"] = layer.in_place;
          facts["hot_tokens"] = layer.hot_tokens;
          facts["hot_bytes"] = layer.hot_bytes;
          facts["ring_bytes"] = layer.ring_bytes;
          layers.append(std::move(facts));
        }
        return layers;
      });
}

}  // namespace

void bind_runtime(py::module_& module) {
  bind_tables(module);
  bind_ledger(module);
  bind_prefetcher(module);
}

}  // namespace l3ext::python
