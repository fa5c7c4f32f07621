// What a child of fork() can do with its parent's runtime: let go of it, and get an error for all
// else, at once, whatever locks were held. The parent notices nothing.
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "check.hpp"
#include "core/home_process.hpp"
#include "runtime/graph_runtime.hpp"
#include "runtime_examples.hpp"

using namespace l3ext;
using namespace examples;

namespace {

// Whether a child process that runs `test` comes to its end, and nothing fails in it.
bool in_a_child(const std::function<void()>& test) {
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(100);  // a child that hangs ends by this signal
    check::failures = 0;
    try {
      test();
    } catch (const std::exception& error) {
      check::expect(false, error.what(), __FILE__, __LINE__);
    }
    ::_exit(check::failures == 0 ? 0 : 1);
  }
  int status = -1;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// Whether it is refused as the parent's.
template <typename F>
bool is_refused(const char* object, F&& use) {
  const std::string start = concat("this ", object, " belongs to process ", ::getppid(),
                                   " and came to process ", ::getpid(), " through fork()");
  try {
    use();
  } catch (const Error& error) {
    return error.code() == ErrorCode::kRuntime && std::string(error.what()).starts_with(start);
  }
  return false;
}

void use_in_a_child(std::shared_ptr<Prefetcher>& prefetcher,
                    std::optional<Prefetcher::Step>& step) {
  const std::vector<int32_t> tokens = {1};
  int64_t rows[2];
  const auto refused = [](auto&& use) { return is_refused("runtime", use); };
  EXPECT(refused([&] { Prefetcher::begin(prefetcher, tokens); }));
  EXPECT(refused([&] { prefetcher->arena(0); }));
  EXPECT(refused([&] { prefetcher->use_near_data(std::nullopt); }));
  EXPECT(refused([&] { step->wait(0); }));
  EXPECT(refused([&] { step->rows(0); }));
  EXPECT(refused([&] { step->spilled(0); }));
  EXPECT(refused([&] { step->near_segments(0); }));
  EXPECT(refused([&] { step->segment_rows(0, rows); }));
  const std::shared_ptr<Ledger> ledger = prefetcher->ledger();
  EXPECT(is_refused("ledger", [&] { ledger->steps(); }));
  EXPECT(is_refused("ledger", [&] { ledger->totals(); }));
  EXPECT(is_refused("ledger", [&] { ledger->clear(); }));
  EXPECT(is_refused("ledger", [&] { ledger->write_chrome_trace("/nowhere/here"); }));
  step->end();
  prefetcher->close();
  EXPECT(refused([&] { step->wait(0); }));  // and not "ended" or "closed"
  step.reset();
  prefetcher.reset();
}

void a_child_gets_errors_and_lets_go() {
  const Example example = make_example(20, 3, 8, 8, 12);
  auto prefetcher = make_prefetcher({ram_table(example)}, {});
  std::optional<Prefetcher::Step> step(Prefetcher::begin(prefetcher, std::vector<int32_t>{1}));
  EXPECT(in_a_child([&] { use_in_a_child(prefetcher, step); }));
  step->wait(0);
  EXPECT(holds_the_rows(*step, 0, example));
  step->end();
  EXPECT(prefetcher->ledger()->totals().steps == 1);
}

// Calls back from where the prefetcher holds its lock, and from where the ledger holds its.
class CallingDevice final : public HostDevice {
 public:
  FencePtr record(void*) override {
    if (within_prefetcher) within_prefetcher();
    return nullptr;
  }
  std::shared_ptr<Stall> wait(void*, std::span<const FencePtr>) override {
    return std::make_shared<CallingStall>(*this);
  }
  std::function<void()> within_prefetcher, within_ledger;

 private:
  struct CallingStall final : Stall {
    explicit CallingStall(const CallingDevice& on) : device(on) {}
    std::optional<int64_t> ns() override {
      if (device.within_ledger) device.within_ledger();
      return 0;
    }
    const CallingDevice& device;
  };
};

void a_child_needs_none_of_the_locks() {
  const Example example = make_example(20, 3, 8, 8, 13);
  const auto device = std::make_shared<CallingDevice>();
  PrefetchOptions options;
  options.in_place = false;
  std::shared_ptr<Prefetcher> prefetcher =
      Prefetcher::create({ram_table(example)}, device, options);
  std::optional<Prefetcher::Step> step(Prefetcher::begin(prefetcher, std::vector<int32_t>{1}));
  step->wait(0);
  int forks = 0;
  const auto fork_here = [&] {
    ++forks;
    EXPECT(in_a_child([&] {
      device->within_prefetcher = device->within_ledger = nullptr;
      use_in_a_child(prefetcher, step);
    }));
  };
  device->within_prefetcher = fork_here;
  step->end();
  device->within_prefetcher = nullptr;
  device->within_ledger = fork_here;
  EXPECT(prefetcher->ledger()->totals().steps == 1);
  EXPECT(forks == 2);
}

void a_child_gets_errors_of_a_graph_runtime() {
  const Example example = make_example(20, 3, 8, 8, 14);
  GraphRuntime runtime({ram_table(example)}, std::make_shared<HostDevice>(), {});
  const int32_t token = 1, count = 1;
  char step = 0;
  runtime.begin(&token, &count, 1, &step, nullptr);
  EXPECT(in_a_child([&] {
    const auto refused = [](auto&& use) { return is_refused("runtime", use); };
    EXPECT(refused([&] { runtime.begin(&token, &count, 1, &step, nullptr); }));
    EXPECT(refused([&] { runtime.wait(0, &step, nullptr); }));
    runtime.end(&step, nullptr);
    EXPECT(refused([&] { runtime.wait(0, &step, nullptr); }));  // and not "an earlier one"
  }));
  runtime.wait(0, &step, nullptr);
}

struct Counted {
  explicit Counted(int& to) : deleted(to) {}
  ~Counted() { ++deleted; }
  Counted(const Counted&) = delete;
  Counted& operator=(const Counted&) = delete;
  int& deleted;
};

void only_the_home_process_deletes() {
  int deleted = 0;
  std::shared_ptr<Counted> object(new Counted(deleted), DeleteAtHome());
  EXPECT(in_a_child([&] {
    object.reset();
    EXPECT(deleted == 0);
  }));
  object.reset();
  EXPECT(deleted == 1);
}

// Reads past the page cache go there: a child must not take pages that are being read into.
void a_child_has_no_staging() {
  HostDevice device;
  constexpr size_t kBytes = 10000;
  void* staging = device.allocate_staging(kBytes);
  void* rows = device.allocate(kBytes);
  unsigned char resident[3];
  const auto is_mapped = [&](void* memory) { return ::mincore(memory, kBytes, resident) == 0; };
  EXPECT(is_mapped(staging) && is_mapped(rows));
  EXPECT(in_a_child([&] {
    EXPECT(!is_mapped(staging) && errno == ENOMEM);
    EXPECT(is_mapped(rows));
  }));
  device.deallocate_staging(staging, kBytes);
  device.deallocate(rows, kBytes);
}

}  // namespace

int main() {
  RUN(a_child_gets_errors_and_lets_go);
  RUN(a_child_needs_none_of_the_locks);
  RUN(a_child_gets_errors_of_a_graph_runtime);
  RUN(only_the_home_process_deletes);
  RUN(a_child_has_no_staging);
  return check::failures;
}
