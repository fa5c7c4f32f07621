#include "runtime/device.hpp"

#include "core/error.hpp"
#include "runtime/host_device.hpp"

namespace l3ext {

std::shared_ptr<Device> make_device(const std::string& name) {
  L3EXT_CHECK(name == "cpu", "device: expected \"cpu\", got \"", name, "\"");
  return std::make_shared<HostDevice>();
}

}  // namespace l3ext
