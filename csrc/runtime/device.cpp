#include "runtime/device.hpp"

#include <charconv>

#include "core/error.hpp"
#include "runtime/cuda_device.hpp"
#include "runtime/host_device.hpp"

namespace l3ext {

std::unique_ptr<Branch> Device::make_branch(int64_t) {
  throw Error(ErrorCode::kRuntime,
              concat("device: expected one whose kernels read host memory, got ", name()));
}

std::shared_ptr<Device> make_device(const std::string& name) {
  if (name == "cpu") return std::make_shared<HostDevice>();
  constexpr std::string_view kCuda = "cuda:";
  const bool numbered = name.starts_with(kCuda);
  int index = 0;
  const char *begin = name.data() + (numbered ? kCuda.size() : 0), *end = name.data() + name.size();
  const auto [stop, error] = std::from_chars(begin, end, index);
  const bool is_cuda = name == "cuda" || (numbered && error == std::errc() && stop == end);
  L3EXT_CHECK(is_cuda, "device: expected \"cpu\", \"cuda\" or \"cuda:0\" and so on, got \"", name,
              "\"");
  return make_cuda_device(index);
}

}  // namespace l3ext
