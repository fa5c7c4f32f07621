// What follows from measured copies, and from what the system says about memory near a device.
#include "runtime/cuda/calibrate.hpp"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>

#include "check.hpp"
#include "core/error.hpp"
#include "runtime/near_memory.hpp"
#include "runtime_examples.hpp"

namespace {

using namespace l3ext;
using cuda::choose_copies;
using cuda::CopyTiming;

bool contains(const std::string& text, const char* part) {
  return text.find(part) != std::string::npos;
}

constexpr size_t kSmall = 4096, kMiddle = 16384, kLarge = 65536;

void batches_where_they_are_faster() {
  const CopyTiming faster[] = {{kSmall, 64, 200, 80, 0}, {kLarge, 64, 210, 100, 0}};
  const CopyChoice batched = choose_copies(faster);
  EXPECT(batched.batched && batched.kernel_below == 0);
  EXPECT(contains(batched.text, "copies in batches (4 KiB: loop 1.3 GB/s, batch 3.3 GB/s"));
  const CopyTiming slower[] = {{kSmall, 64, 80, 200, 0}, {kLarge, 64, 230, 100, 0}};
  EXPECT(choose_copies(slower).batched);  // 310 against 300 us in all
  const CopyTiming slowest[] = {{kSmall, 64, 80, 200, 0}, {kLarge, 64, 210, 200, 0}};
  EXPECT(!choose_copies(slowest).batched);
  const CopyTiming none[] = {{kSmall, 64, 80, 0, 0}};
  EXPECT(!choose_copies(none).batched);
  EXPECT(contains(choose_copies(none).text, "batch none, kernel none"));
}

void the_kernel_where_it_is_faster_by_a_quarter() {
  const CopyTiming timings[] = {
      {kLarge, 64, 300, 100, 99},  // faster, but not by enough
      {kMiddle, 8, 40, 30, 20},
      {kMiddle, 64, 200, 80, 40},
      {kSmall, 8, 30, 20, 10},
  };
  const CopyChoice choice = choose_copies(timings);
  EXPECT(choice.batched && choice.kernel_below == kMiddle + 1);
  EXPECT(contains(choice.text, "up to 16 KiB by a kernel of 4 blocks"));

  // A size for which it does not serve ends it, even if larger ones would be served again.
  const CopyTiming gap[] = {{kSmall, 8, 30, 20, 20}, {kMiddle, 8, 40, 30, 2}};
  EXPECT(choose_copies(gap).kernel_below == 0);
  // Over all counts of a size: 64 copies count more than 8.
  const CopyTiming mixed[] = {{kSmall, 8, 30, 10, 12}, {kSmall, 64, 300, 100, 60}};
  EXPECT(choose_copies(mixed).kernel_below == kSmall + 1);
  // Not measured for every count: unknown.
  const CopyTiming partial[] = {{kSmall, 8, 30, 20, 1}, {kSmall, 64, 300, 100, 0}};
  EXPECT(choose_copies(partial).kernel_below == 0);
}

void without_measurements() {
  const CopyChoice choice = choose_copies({});
  EXPECT(!choice.batched && choice.kernel_below == 0 &&
         contains(choice.text, "nothing was measured"));
}

void memory_node_of_a_device() {
  namespace fs = std::filesystem;
  const fs::path devices = examples::temporary_path("pci");
  fs::create_directories(devices / "0000:3b:00.0");
  const auto says = [&](const char* text) {
    std::ofstream(devices / "0000:3b:00.0" / "numa_node") << text;
    return numa_node_of("0000:3B:00.0", devices.string());
  };
  EXPECT(says("1\n") == 1);
  EXPECT(says("-1\n") == -1);
  EXPECT(says("") == -1);
  EXPECT(says("none") == -1);
  EXPECT(numa_node_of("0000:00:00.0", devices.string()) == -1);
  fs::remove_all(devices);
  EXPECT(numa_node_of("no:such:device") == -1);
}

void memory_near_a_device() {
  for (const size_t bytes : {size_t{0}, size_t{1}, size_t{5000}, size_t{40} << 20}) {
    for (const int node : {-1, 0, 63, 1000}) {  // most of them do not exist: a wish
      auto* memory = static_cast<unsigned char*>(map_near(bytes, node));
      EXPECT(reinterpret_cast<uintptr_t>(memory) % 4096 == 0);
      EXPECT(std::all_of(memory, memory + bytes, [](unsigned char b) { return b == 0; }));
      if (bytes > 0) memory[bytes - 1] = 1;
      unmap_near(memory, bytes);
    }
  }
  EXPECT(contains(EXPECT_THROWS(Error, map_near(size_t{1} << 60, -1)), "cannot allocate"));
}

}  // namespace

int main() {
  RUN(batches_where_they_are_faster);
  RUN(the_kernel_where_it_is_faster_by_a_quarter);
  RUN(without_measurements);
  RUN(memory_node_of_a_device);
  RUN(memory_near_a_device);
  return check::failures == 0 ? 0 : 1;
}
