#include "python/bindings.hpp"

namespace l3ext::python {

void bind_lzw(pybind11::module_&) {}

}  // namespace l3ext::python
