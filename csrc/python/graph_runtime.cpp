// Tables for steps that a graph holds.
#include "runtime/graph_runtime.hpp"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "core/dlpack_dtype.hpp"
#include "python/array_reader.hpp"
#include "python/bindings.hpp"
#include "python/runtime_objects.hpp"
#include "python/tensor_arg.hpp"

namespace py = pybind11;

namespace l3ext::python {
namespace {

void check_place(const TensorArg& array, const char* argument, const Device& device) {
  const Place& place = array->place;
  const bool there = device.is_host()
                         ? place.on_host()
                         : place.kind == Place::Kind::kCuda && place.index == device.index();
  if (!there) {
    throw Error(ErrorCode::kType, concat(argument, ": expected an array on ", device.name(),
                                         ", got one ", place_name(place)));
  }
}

// `ticket`: how many tokens, then these, behind them any. Its address tells steps apart.
void begin(GraphRuntime& runtime, const TensorArg& ticket, uintptr_t stream) {
  check_place(ticket, "ticket", runtime.device());
  check_dtype(ticket.view(), "ticket", DType::kInt32);
  check_shape(ticket.view(), "ticket", {-1});
  check_contiguous(ticket.view(), "ticket");
  L3EXT_CHECK(ticket->shape[0] >= 1, "ticket: expected the number of tokens first, got none");
  py::gil_scoped_release release;
  const auto* count = ticket->as<int32_t>();
  runtime.begin(count + 1, count, ticket->shape[0] - 1, count, stream_of(stream));
}

}  // namespace

void bind_graph_runtime(py::module_& module) {
  py::class_<GraphRuntime, std::shared_ptr<GraphRuntime>>(module, "GraphRuntime")
      .def(py::init([](const std::vector<PyTable>& tables, const std::string& device,
                       int64_t cache_bytes, int64_t ring_bytes, bool in_place, int fetch_blocks) {
             std::vector<Table> sources = runtime_tables(tables);
             py::gil_scoped_release release;
             const GraphOptions options{.cache_bytes = cache_bytes,
                                        .ring_bytes = ring_bytes,
                                        .in_place = in_place,
                                        .fetch_blocks = fetch_blocks};
             return std::shared_ptr<GraphRuntime>(
                 new GraphRuntime(std::move(sources), make_device(device), options),
                 DeleteAtHome());
           }),
           py::arg("tables"), py::arg("device"), py::kw_only(), py::arg("cache_bytes"),
           py::arg("ring_bytes"), py::arg("in_place"), py::arg("fetch_blocks"))
      .def("check_home", &GraphRuntime::check_home)
      .def_property_readonly("is_home", &GraphRuntime::is_home)
      .def("begin", begin, py::arg("ticket"), py::arg("stream"))
      .def(
          "wait",
          [](GraphRuntime& self, int64_t layer, uintptr_t step, uintptr_t stream) {
            self.wait(layer, stream_of(step), stream_of(stream));
          },
          py::arg("layer"), py::arg("step"), py::arg("stream"))
      .def(
          "end",
          [](GraphRuntime& self, uintptr_t step, uintptr_t stream) {
            self.end(stream_of(step), stream_of(stream));
          },
          py::arg("step"), py::arg("stream"))
      .def(
          "directory",
          [](const GraphRuntime& self, int64_t layer) {
            return buffer_capsule(self.directory(layer), self.device(), dlpack_dtype(DType::kInt64),
                                  {1, self.vocab_size()});
          },
          py::arg("layer"))
      .def("counters",
           [](const GraphRuntime& self) {
             return buffer_capsule(self.counters(), self.device(), dlpack_dtype(DType::kInt64),
                                   {self.num_layers(), 4});
           })
      .def("placement", [](const GraphRuntime& self) {
        py::list layers;
        for (const GraphRuntime::LayerPlacement& layer : self.placement()) {
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

}  // namespace l3ext::python
