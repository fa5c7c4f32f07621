// The kernels' entry points of a build without CUDA: callers need no second way through the code.
#ifndef L3EXT_WITH_CUDA

#include "core/error.hpp"
#include "runtime/cuda/fetch_blocks.hpp"

namespace l3ext::cuda {
namespace {

[[noreturn]] void unavailable() {
  throw Error(ErrorCode::kRuntime,
              "this build of l3ext has no CUDA kernels: the library must be built with nvcc and "
              "L3EXT_CUDA=ON");
}

}  // namespace

void fetch_blocks(std::span<const Copy>, int, void*) { unavailable(); }
int64_t fetch_step_workspace(int64_t) { unavailable(); }
void fetch_step(const FetchStepParams&, void*, int64_t, void*) { unavailable(); }

}  // namespace l3ext::cuda

#endif
