// One function per area; module.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace l3ext::python {

void bind_system(pybind11::module_& module);
void bind_lzw(pybind11::module_& module);
void bind_plan(pybind11::module_& module);
void bind_attention(pybind11::module_& module);
void bind_runtime(pybind11::module_& module);
void bind_graph_runtime(pybind11::module_& module);  // after bind_runtime, whose tables it takes

// For a long call without the GIL: true once Ctrl-C (or another Python signal handler that
// raises) wants it to stop. The binding then throws pybind11::error_already_set.
bool interrupted();

}  // namespace l3ext::python
