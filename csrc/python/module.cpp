#include <pybind11/pybind11.h>

#include "python/bindings.hpp"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Native core of l3ext; the public interface is the Python package.";
  l3ext::python::bind_system(module);
  l3ext::python::bind_lzw(module);
  l3ext::python::bind_plan(module);
  l3ext::python::bind_attention(module);
  l3ext::python::bind_runtime(module);
  l3ext::python::bind_graph_runtime(module);
}
