#include "runtime/cuda/calibrate.hpp"

#include <iomanip>
#include <map>
#include <sstream>

namespace l3ext::cuda {
namespace {

constexpr double kKernelMustBeFasterBy = 1.25;

struct Totals {
  double loop_us = 0, batch_us = 0, kernel_us = 0;
  bool kernel = true;  // measured everywhere
  double bytes = 0;
};

// Bytes in a microsecond are megabytes in a second.
std::string gigabytes_per_second(double bytes, double us) {
  std::ostringstream text;
  text << std::fixed << std::setprecision(1) << bytes / us / 1e3 << " GB/s";
  return text.str();
}

std::string size_text(size_t bytes) {
  std::ostringstream text;
  if (bytes % 1024 == 0) {
    text << bytes / 1024 << " KiB";
  } else {
    text << bytes << " bytes";
  }
  return text.str();
}

}  // namespace

CopyChoice choose_copies(std::span<const CopyTiming> timings) {
  CopyChoice choice;
  if (timings.empty()) {
    choice.text = "copies one by one: nothing was measured";
    return choice;
  }
  double loop_us = 0, batch_us = 0;  // where both were measured
  std::map<size_t, Totals> by_size;
  for (const CopyTiming& timing : timings) {
    if (timing.batch_us > 0) {
      loop_us += timing.loop_us;
      batch_us += timing.batch_us;
    }
    Totals& totals = by_size[timing.bytes];
    totals.loop_us += timing.loop_us;
    totals.batch_us += timing.batch_us > 0 ? timing.batch_us : timing.loop_us;
    totals.kernel_us += timing.kernel_us;
    totals.kernel = totals.kernel && timing.kernel_us > 0;
    totals.bytes += static_cast<double>(timing.bytes) * static_cast<double>(timing.count);
  }
  choice.batched = batch_us > 0 && batch_us < loop_us;

  std::ostringstream text;
  text << (choice.batched ? "copies in batches" : "copies one by one");
  for (const auto& [bytes, totals] : by_size) {
    const double engines_us = choice.batched ? totals.batch_us : totals.loop_us;
    if (!totals.kernel || totals.kernel_us * kKernelMustBeFasterBy > engines_us) break;
    choice.kernel_below = bytes + 1;
  }
  if (choice.kernel_below > 0) {
    text << ", up to " << size_text(choice.kernel_below - 1) << " by a kernel of "
         << choice.kernel_blocks << " blocks";
  }
  text << " (";
  const char* separator = "";
  for (const auto& [bytes, totals] : by_size) {
    text << separator << size_text(bytes) << ": loop "
         << gigabytes_per_second(totals.bytes, totals.loop_us) << ", batch "
         << (batch_us > 0 ? gigabytes_per_second(totals.bytes, totals.batch_us) : "none")
         << ", kernel "
         << (totals.kernel ? gigabytes_per_second(totals.bytes, totals.kernel_us) : "none");
    separator = "; ";
  }
  text << ")";
  choice.text = text.str();
  return choice;
}

}  // namespace l3ext::cuda
