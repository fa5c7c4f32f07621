// The counting behind the attention benchmarks' floors.
#include "../../benchmarks/attention_workload.hpp"

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "check.hpp"
#include "core/error.hpp"

using l3ext::Error;
using l3ext::bench::Cost;
using l3ext::bench::make_workload;
using l3ext::bench::StepShape;
using l3ext::bench::Workload;

namespace {

// The same step as in tests/bench/test_bench.py.
void a_step_is_counted_as_by_hand() {
  const std::vector<int64_t> offsets{0, 1, 4, 4, 5, 10}, ids{4, 1, 0, 1, 0, 2, 4};
  const StepShape shape(ids, offsets);
  EXPECT(shape.tokens == 7 && shape.segments == 4 && shape.rows == 9);
  EXPECT(shape.single_rows == 1 && shape.single_tokens == 2 && shape.pairs == 5 + 3 + 3 + 5);
  const Cost forward = shape.forward(10, 4, 2, 2);
  EXPECT(forward.bytes == 2 * (8 * 10 + 9 * 4 + 5 * 10 + 7 * 4));
  EXPECT(forward.flops == 2 * 16 * 14);
  const Cost quantized = shape.forward(10, 4, 1, 4);
  EXPECT(quantized.bytes == 8 * 10 + 9 * 4 + 4 * (5 * 10 + 7 * 4));
  EXPECT(quantized.flops == forward.flops);
  const Cost backward = shape.backward(10, 4, 2);
  EXPECT(backward.bytes == 2 * (8 * 10 + 8 * 4 + 5 * 10 + 7 * 4 + 7 * 10 + 9 * 14));
  EXPECT(backward.flops == 2 * 16 * (3 * 10 + 2 * 4));
}

void the_synthetic_workload_is_the_documented_one() {
  const Workload workload = make_workload(180000, 710000, 65536);
  EXPECT(workload.vocab_size() == 180000);
  EXPECT(workload.table_rows() <= 710000 && workload.table_rows() > 709000);
  EXPECT(workload.max_rows() == 512);
  const StepShape shape(workload.step(0, 65536), workload.offsets);
  EXPECT(shape.segments > 20200 && shape.segments < 21200);
  EXPECT(shape.rows > 432000 && shape.rows < 450000);
  const Workload again = make_workload(180000, 710000, 65536);
  EXPECT(again.tokens == workload.tokens);
}

void steps_follow_each_other() {
  Workload workload;
  workload.tokens = {0, 1, 2, 3, 4, 5, 6};
  EXPECT(workload.step(0, 3)[0] == 0 && workload.step(1, 3)[0] == 3 && workload.step(2, 3)[0] == 0);
  const std::string message = EXPECT_THROWS(Error, workload.step(0, 8));
  EXPECT(message == "step: expected at most 7 tokens, got 8");
}

void files_of_the_environment_are_read_and_checked() {
  const std::string stem =
      (std::filesystem::temp_directory_path() / ("l3ext_workload." + std::to_string(::getpid())))
          .string();
  const std::string rows = stem + ".rows", tokens = stem + ".tokens";
  const auto write = [](const std::string& path, const std::vector<int32_t>& values) {
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(values.data()),
               static_cast<std::streamsize>(values.size() * sizeof(int32_t)));
  };
  ::setenv("L3EXT_BENCH_ROWS", rows.c_str(), 1);
  std::string message = EXPECT_THROWS(Error, make_workload(8, 8, 8));
  EXPECT(message.find("expected L3EXT_BENCH_TOKENS beside it") != std::string::npos);
  ::setenv("L3EXT_BENCH_TOKENS", tokens.c_str(), 1);
  message = EXPECT_THROWS(Error, make_workload(8, 8, 8));
  EXPECT(message.find("cannot read") != std::string::npos);
  write(rows, {3, 1, 2});
  write(tokens, {2, 0, 1, 2});
  const Workload workload = make_workload(8, 8, 8);
  EXPECT((workload.offsets == std::vector<int64_t>{0, 3, 4, 6}));
  EXPECT((workload.tokens == std::vector<int64_t>{2, 0, 1, 2}));
  write(tokens, {2, 3});
  message = EXPECT_THROWS(Error, make_workload(8, 8, 8));
  EXPECT(message.find("expected ids in [0, 3), got 3") != std::string::npos);
  write(rows, {3, 0, 2});
  message = EXPECT_THROWS(Error, make_workload(8, 8, 8));
  EXPECT(message.find("expected one row or more for every token, got 0") != std::string::npos);
  write(rows, {});
  message = EXPECT_THROWS(Error, make_workload(8, 8, 8));
  EXPECT(message.find("expected int32 values, got none") != std::string::npos);
  ::unsetenv("L3EXT_BENCH_ROWS");
  ::unsetenv("L3EXT_BENCH_TOKENS");
  std::remove(rows.c_str());
  std::remove(tokens.c_str());
}

}  // namespace

int main() {
  ::unsetenv("L3EXT_BENCH_ROWS");
  ::unsetenv("L3EXT_BENCH_TOKENS");
  RUN(a_step_is_counted_as_by_hand);
  RUN(the_synthetic_workload_is_the_documented_one);
  RUN(steps_follow_each_other);
  RUN(files_of_the_environment_are_read_and_checked);
  return check::failures == 0 ? 0 : 1;
}
