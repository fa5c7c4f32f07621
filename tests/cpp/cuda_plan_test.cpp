// Plan and schedule of the device, in the emulation: the same bits as on the host.
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "attention/cuda/schedule.hpp"
#include "attention/cuda/segmented_attention.hpp"
#include "attention/plan.hpp"
#include "check.hpp"
#include "core/cuda/device.cuh"
#include "core/error.hpp"
#include "device_buffer.hpp"

using l3ext::DType;
using l3ext::Error;
using l3ext::PlanParams;
using l3ext::PlanView;
using l3ext::cuda::kDecodeTokens;
using l3ext::cuda::Launch;

namespace {

// The outputs of a plan, each exactly as large as needed, poisoned.
struct Outputs {
  DeviceBuffer<int32_t> permutation, segment_tokens, segment_queries;
  DeviceBuffer<int64_t> segment_rows;
  DeviceBuffer<int32_t> num_segments;
  DeviceBuffer<int64_t> table_rows;
  DeviceBuffer<int32_t> schedule;

  explicit Outputs(int64_t num_tokens)
      : permutation(num_tokens, 4),
        segment_tokens(num_tokens, 4),
        segment_queries(num_tokens + 1, 4),
        segment_rows(2 * num_tokens, 8),
        num_segments(1, 4),
        table_rows(1, 8),
        schedule(l3ext::cuda::schedule_entries(num_tokens)) {}

  PlanParams params(int64_t num_tokens, const int64_t* offsets, int64_t vocab_size) {
    PlanParams params;
    params.num_tokens = num_tokens;
    params.offsets = offsets;
    params.vocab_size = vocab_size;
    params.permutation = permutation.data();
    params.segment_tokens = segment_tokens.data();
    params.segment_queries = segment_queries.data();
    params.segment_rows = segment_rows.data();
    params.num_segments = num_segments.data();
    params.table_rows = table_rows.data();
    return params;
  }
  PlanView view() const {
    PlanView view;
    view.segment_queries = segment_queries.data();
    view.segment_rows = segment_rows.data();
    view.num_tokens = permutation.size();
    view.num_segments = num_segments[0];
    return view;
  }
  bool operator==(const Outputs& other) const {
    return permutation.values() == other.permutation.values() &&
           segment_tokens.values() == other.segment_tokens.values() &&
           segment_queries.values() == other.segment_queries.values() &&
           segment_rows.values() == other.segment_rows.values() &&
           num_segments[0] == other.num_segments[0] && table_rows[0] == other.table_rows[0] &&
           schedule.values() == other.schedule.values();
  }
};

bool is_valid(int64_t id, int64_t vocab_size) { return id >= 0 && id < vocab_size; }

// On the host. It knows no invalid ids: here they are a token behind the last one, of no rows.
void plan_on_host(const std::vector<int64_t>& ids, const std::vector<int64_t>& offsets,
                  Outputs& out) {
  const int64_t vocab_size = static_cast<int64_t>(offsets.size()) - 1;
  std::vector<int64_t> tokens = ids;
  for (int64_t& token : tokens) token = is_valid(token, vocab_size) ? token : vocab_size;
  std::vector<int64_t> longer = offsets;
  longer.push_back(offsets.back());
  PlanParams params =
      out.params(static_cast<int64_t>(tokens.size()), longer.data(), vocab_size + 1);
  params.token_ids = tokens.data();
  l3ext::plan(params);
  const int32_t last = out.num_segments[0] - 1;
  if (last >= 0 && out.segment_tokens[last] == vocab_size) {
    out.segment_tokens[last] = -1;
    out.segment_rows[2 * last] = out.segment_rows[2 * last + 1] = -1;
  }
  l3ext::cuda::make_schedule(out.view(), out.schedule.data());
}

template <typename Id>
void plan_on_device(const std::vector<int64_t>& ids, const std::vector<int64_t>& offsets,
                    Outputs& out) {
  const DeviceBuffer<Id> token_ids{std::vector<Id>(ids.begin(), ids.end())};
  const DeviceBuffer<int64_t> device_offsets(offsets);
  PlanParams params = out.params(static_cast<int64_t>(ids.size()), device_offsets.data(),
                                 static_cast<int64_t>(offsets.size()) - 1);
  params.token_ids = token_ids.data();
  params.token_dtype = sizeof(Id) == 8 ? DType::kInt64 : DType::kInt32;
  DeviceBuffer<std::byte> workspace(l3ext::cuda::plan_workspace(params), 256);
  l3ext::cuda::plan(params, out.schedule.data(), {nullptr, workspace.data(), workspace.size()});
}

void schedule_on_device(const Outputs& plan, DeviceBuffer<int32_t>& schedule) {
  const int64_t num_tokens = plan.permutation.size();
  DeviceBuffer<std::byte> workspace(l3ext::cuda::schedule_workspace(num_tokens), 256);
  PlanView view = plan.view();
  view.num_segments = -7;  // on a device it is not read
  l3ext::cuda::schedule(view, plan.num_segments.data(), schedule.data(),
                        {nullptr, workspace.data(), workspace.size()});
}

// Host and device agree on both types of ids that can hold these, and on the schedule alone.
void expect_the_same(const std::vector<int64_t>& ids, const std::vector<int64_t>& offsets) {
  const int64_t num_tokens = static_cast<int64_t>(ids.size());
  Outputs host(num_tokens), wide(num_tokens), schedule_alone(num_tokens);
  plan_on_host(ids, offsets, host);
  plan_on_device<int64_t>(ids, offsets, wide);
  EXPECT(wide == host);
  const bool fits = std::all_of(ids.begin(), ids.end(),
                                [](int64_t id) { return id == static_cast<int32_t>(id); });
  if (fits) {
    Outputs narrow(num_tokens);
    plan_on_device<int32_t>(ids, offsets, narrow);
    EXPECT(narrow == host);
  }
  schedule_on_device(host, schedule_alone.schedule);
  EXPECT(schedule_alone.schedule.values() == host.schedule.values());
}

// Rows of each token: none, one, few, many.
std::vector<int64_t> random_offsets(int64_t vocab_size, std::mt19937& random) {
  const int64_t rows[] = {0, 1, 1, 1, 2, 3, 17, 512};
  std::vector<int64_t> offsets = {0};
  for (int64_t t = 0; t < vocab_size; ++t) offsets.push_back(offsets.back() + rows[random() % 8]);
  return offsets;
}

enum class Ids { kUniform, kZipf, kEqual, kDistinct, kReversed };

std::vector<int64_t> make_ids(Ids kind, int64_t num_tokens, int64_t vocab_size,
                              std::mt19937& random) {
  std::uniform_real_distribution<double> uniform;
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < num_tokens; ++i) {
    switch (kind) {
      case Ids::kUniform:
        ids.push_back(static_cast<int64_t>(random()) % vocab_size);
        break;
      case Ids::kZipf: {  // of exponent 1: the logarithm of the rank is uniform
        const double rank = std::pow(static_cast<double>(vocab_size), uniform(random));
        ids.push_back(std::min(static_cast<int64_t>(rank), vocab_size) - 1);
        break;
      }
      case Ids::kEqual:
        ids.push_back(vocab_size / 2);
        break;
      case Ids::kDistinct:  // as long as there are enough
        ids.push_back(i * 7919 % vocab_size);
        break;
      case Ids::kReversed:
        ids.push_back((num_tokens - 1 - i) % vocab_size);
        break;
    }
  }
  return ids;
}

void expect_the_same_for_all_kinds(int64_t num_tokens, std::mt19937& random) {
  for (const int64_t vocab_size : {1, 7, 1000, 200'000}) {
    const std::vector<int64_t> offsets = random_offsets(vocab_size, random);
    for (const Ids kind :
         {Ids::kUniform, Ids::kZipf, Ids::kEqual, Ids::kDistinct, Ids::kReversed}) {
      l3ext::cuda::emulation().seed = random();
      expect_the_same(make_ids(kind, num_tokens, vocab_size, random), offsets);
    }
  }
}

void a_decode_step_is_as_on_the_host() {
  std::mt19937 random(1);
  for (const int64_t num_tokens : {1, 2, 7, 31, 32, 33, 64, 300, 512}) {
    expect_the_same_for_all_kinds(num_tokens, random);
  }
  for (const int64_t num_tokens : {kDecodeTokens - 1, kDecodeTokens}) {
    expect_the_same_for_all_kinds(num_tokens, random);
  }
}

void a_larger_step_is_as_on_the_host() {
  std::mt19937 random(2);
  for (const int64_t num_tokens : {kDecodeTokens + 1, int64_t{2048}, int64_t{5000}}) {
    expect_the_same_for_all_kinds(num_tokens, random);
  }
}

void no_tokens_make_an_empty_plan() {
  expect_the_same({}, {0, 3, 4});
  Outputs out(0);
  plan_on_device<int64_t>({}, {0, 3, 4}, out);
  EXPECT(out.table_rows[0] == 4);
  EXPECT(out.num_segments[0] == 0);
  EXPECT(out.segment_queries[0] == 0);
  EXPECT(out.schedule.values() == std::vector<int32_t>(16, 0));
}

void invalid_ids_come_last_in_one_segment() {
  constexpr int64_t kMost = std::numeric_limits<int64_t>::max();
  std::mt19937 random(3);
  for (const int64_t num_tokens :
       {int64_t{1}, int64_t{5}, int64_t{33}, kDecodeTokens, int64_t{3000}}) {
    for (const int64_t vocab_size : {1, 7, 255, 256, 1000}) {
      const std::vector<int64_t> offsets = random_offsets(vocab_size, random);
      const int64_t narrow[] = {-1, vocab_size, vocab_size + 1, -(int64_t{1} << 31),
                                (int64_t{1} << 31) - 1};
      // The low halves of the last ones are valid ids.
      const int64_t wide[] = {-1,         vocab_size,       kMost,
                              -kMost - 1, int64_t{1} << 32, -(int64_t{1} << 32)};
      for (const int share : {1, 3, 100}) {  // one in so many
        std::vector<int64_t> ids = make_ids(Ids::kZipf, num_tokens, vocab_size, random);
        std::vector<int64_t> wide_ids = ids;
        for (int64_t i = 0; i < num_tokens; ++i) {
          if (random() % share != 0) continue;
          ids[i] = narrow[random() % std::size(narrow)];
          wide_ids[i] = wide[random() % std::size(wide)];
        }
        expect_the_same(ids, offsets);
        expect_the_same(wide_ids, offsets);
      }
    }
  }
  expect_the_same({0, -1, 5}, {0});  // no token is valid
  expect_the_same(std::vector<int64_t>(2000, 0), {0});
  // By hand, against a mistake that host and test share.
  Outputs out(5);
  plan_on_device<int32_t>({1, -1, 0, 9, 1}, {0, 2, 5}, out);
  EXPECT(out.permutation.values() == std::vector<int32_t>({2, 0, 4, 1, 3}));
  EXPECT(out.segment_tokens.values() == std::vector<int32_t>({0, 1, -1, -1, -1}));
  EXPECT(out.segment_queries.values() == std::vector<int32_t>({0, 1, 3, 5, 5, 5}));
  EXPECT(out.segment_rows.values() == std::vector<int64_t>({0, 2, 2, 5, -1, -1, 0, 0, 0, 0}));
  EXPECT(out.num_segments[0] == 3);
  EXPECT(out.table_rows[0] == 5);
}

void rows_past_2_to_the_31_are_kept() {
  const int64_t large = int64_t{3} << 31;
  const std::vector<int64_t> offsets = {0, large, large + 5, 2 * large, 2 * large};
  expect_the_same({3, 1, 0, 1, 2}, offsets);
  std::vector<int64_t> ids(3000, 2);
  ids[17] = 0;
  expect_the_same(ids, offsets);
}

void the_largest_vocabulary_has_room_for_invalid_ids() {
  constexpr int64_t kVocabSize = std::numeric_limits<int32_t>::max();
  constexpr size_t kBytes = (kVocabSize + 1) * sizeof(int64_t);  // few pages of it are touched
  void* pages = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  EXPECT(pages != MAP_FAILED);
  auto* offsets = static_cast<int64_t*>(pages);
  offsets[kVocabSize] = 4;
  for (const int64_t num_tokens : {int64_t{40}, int64_t{2000}}) {
    std::vector<int64_t> ids(num_tokens, kVocabSize - 1);
    ids[1] = 0;
    Outputs host(num_tokens), device(num_tokens);
    PlanParams params = host.params(num_tokens, offsets, kVocabSize);
    params.token_ids = ids.data();
    params.check_offsets = false;
    l3ext::plan(params);
    l3ext::cuda::make_schedule(host.view(), host.schedule.data());
    params = device.params(num_tokens, offsets, kVocabSize);
    params.token_ids = ids.data();
    DeviceBuffer<std::byte> workspace(l3ext::cuda::plan_workspace(params), 256);
    const Launch launch = {nullptr, workspace.data(), workspace.size()};
    l3ext::cuda::plan(params, device.schedule.data(), launch);
    EXPECT(device == host);
    ids[0] = kVocabSize;
    l3ext::cuda::plan(params, device.schedule.data(), launch);
    EXPECT(device.num_segments[0] == 3);
    EXPECT(device.segment_tokens[1] == kVocabSize - 1);
    EXPECT(device.segment_tokens[2] == -1);
  }
  munmap(pages, kBytes);
}

// Threads run in another order for every seed: a missing barrier, or one entry written by two
// threads, shows as a difference.
void the_order_of_threads_changes_nothing() {
  std::mt19937 random(4);
  for (const int64_t num_tokens : {int64_t{20}, int64_t{200}, kDecodeTokens, int64_t{1500}}) {
    const std::vector<int64_t> offsets = random_offsets(300, random);
    const std::vector<int64_t> ids = make_ids(Ids::kZipf, num_tokens, 300, random);
    for (uint64_t seed = 0; seed < 10; ++seed) {
      l3ext::cuda::emulation().seed = seed;
      expect_the_same(ids, offsets);
    }
  }
}

// The workspace is left dirty, and what lay in outputs before shows nowhere.
void buffers_can_be_used_again() {
  std::mt19937 random(5);
  for (const int64_t num_tokens : {int64_t{100}, int64_t{1500}}) {
    const std::vector<int64_t> offsets = random_offsets(300, random);
    Outputs device(num_tokens);
    for (const Ids kind : {Ids::kDistinct, Ids::kEqual, Ids::kZipf}) {
      const std::vector<int64_t> ids = make_ids(kind, num_tokens, 300, random);
      Outputs host(num_tokens);
      plan_on_host(ids, offsets, host);
      plan_on_device<int64_t>(ids, offsets, device);
      EXPECT(device == host);
    }
  }
}

void bad_arguments_are_refused_before_a_launch() {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  constexpr int64_t kTokens = 2000;
  const std::vector<int64_t> offsets = {0, 1};
  const auto refused = [&](auto&& spoil) {
    Outputs out(kTokens);
    PlanParams params = out.params(kTokens, offsets.data(), 1);
    const std::vector<int64_t> ids(kTokens, 0);
    params.token_ids = ids.data();
    int32_t* schedule = out.schedule.data();
    DeviceBuffer<std::byte> workspace(l3ext::cuda::plan_workspace(params), 256);
    Launch launch = {nullptr, workspace.data(), workspace.size()};
    spoil(params, schedule, launch);
    const std::string message = EXPECT_THROWS(Error, l3ext::cuda::plan(params, schedule, launch));
    EXPECT(out == Outputs(kTokens));
    return message;
  };
  const auto has = [](const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
  };
  EXPECT(refused([](PlanParams& params, auto&, auto&) { params.num_tokens = -1; }) ==
         "token_ids: expected 0 to 2147483647 tokens in a step, got -1");
  EXPECT(refused([](PlanParams& params, auto&, auto&) { params.num_tokens = kMost + 1; }) ==
         "token_ids: expected 0 to 2147483647 tokens in a step, got 2147483648");
  EXPECT(refused([](PlanParams& params, auto&, auto&) { params.vocab_size = -1; }) ==
         "offsets: expected 0 to 2147483647 tokens, got -1");
  EXPECT(refused([](PlanParams& params, auto&, auto&) { params.vocab_size = kMost + 1; }) ==
         "offsets: expected 0 to 2147483647 tokens, got 2147483648");
  EXPECT(refused([](PlanParams& params, auto&, auto&) { params.token_dtype = DType::kFloat32; }) ==
         "token_ids: expected int64 or int32, got float32");
  EXPECT(has(refused([](auto&, int32_t*& schedule, auto&) { ++schedule; }),
             "schedule: expected an array aligned to 16 bytes, got "));
  EXPECT(has(refused([](auto&, auto&, Launch& launch) { --launch.workspace_bytes; }),
             " bytes for 2000 tokens, got "));
  const std::string address = "workspace: expected an address aligned to 256 bytes, got ";
  EXPECT(has(refused([](auto&, auto&, Launch& launch) { launch.workspace = nullptr; }), address));
  EXPECT(has(refused([](auto&, auto&, Launch& launch) {
               launch.workspace = static_cast<std::byte*>(launch.workspace) + 64;
             }),
             address));

  const std::string too_many =
      "token_ids: expected 0 to 2147483647 tokens in a step, got 2147483648";
  PlanParams params;
  params.num_tokens = kMost + 1;
  EXPECT(EXPECT_THROWS(Error, l3ext::cuda::plan_workspace(params)) == too_many);
  EXPECT(EXPECT_THROWS(Error, l3ext::cuda::schedule_workspace(kMost + 1)) == too_many);
  params = {};
  params.vocab_size = kMost + 1;
  EXPECT(EXPECT_THROWS(Error, l3ext::cuda::plan_workspace(params)) ==
         "offsets: expected 0 to 2147483647 tokens, got 2147483648");

  DeviceBuffer<int32_t> schedule(l3ext::cuda::schedule_entries(kTokens));
  PlanView view;
  view.num_tokens = kMost + 1;
  EXPECT(EXPECT_THROWS(Error, l3ext::cuda::schedule(view, nullptr, schedule.data(), {})) ==
         too_many);
  view.num_tokens = kTokens;
  EXPECT(has(EXPECT_THROWS(Error, l3ext::cuda::schedule(view, nullptr, schedule.data(), {})),
             "workspace: expected "));
  EXPECT(has(EXPECT_THROWS(Error, l3ext::cuda::schedule(view, nullptr, schedule.data() + 1, {})),
             "schedule: expected an array aligned to 16 bytes, got "));
}

}  // namespace

int main() {
  RUN(a_decode_step_is_as_on_the_host);
  RUN(a_larger_step_is_as_on_the_host);
  RUN(no_tokens_make_an_empty_plan);
  RUN(invalid_ids_come_last_in_one_segment);
  RUN(rows_past_2_to_the_31_are_kept);
  RUN(the_largest_vocabulary_has_room_for_invalid_ids);
  RUN(the_order_of_threads_changes_nothing);
  RUN(buffers_can_be_used_again);
  RUN(bad_arguments_are_refused_before_a_launch);
  return check::failures == 0 ? 0 : 1;
}
