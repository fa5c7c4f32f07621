// The edge: no exception crosses it. They become a code, and a text of the calling thread.
#pragma once

#include <stdexcept>
#include <utility>

#include "l3ext/l3ext.h"

namespace l3ext::capi {

// A handle that names nothing, which no other part of the library knows of.
struct BadHandle : std::runtime_error {
  using runtime_error::runtime_error;
};

// The code of the exception being handled; its text becomes the thread's.
l3ext_status report_exception() noexcept;

// Runs a function of the ABI.
template <typename F>
l3ext_status guarded(F&& f) noexcept {
  try {
    std::forward<F>(f)();
    return L3EXT_OK;
  } catch (...) {
    return report_exception();
  }
}

}  // namespace l3ext::capi
