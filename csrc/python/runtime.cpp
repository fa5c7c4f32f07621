#include "python/bindings.hpp"

namespace l3ext::python {

void bind_runtime(pybind11::module_&) {}

}  // namespace l3ext::python
