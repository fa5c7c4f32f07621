// Mapped tables: one copy for all processes, and what becomes of it when the file changes.
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "check.hpp"
#include "runtime_examples.hpp"

using namespace l3ext;
using namespace examples;

namespace {

// A table file of some MiB, removed at the end.
struct File {
  explicit File(const char* name)
      : path(temporary_path(name)), example(make_example(200, 60, 96, 32, 5)) {
    const TableData tables[] = {example.data(), example.data()};
    write_table_file(path, tables);
  }
  ~File() { std::filesystem::remove(path); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  bool is_held_by(const MappedTables& mapped) const {
    return std::ranges::all_of(mapped.tables, [&](const Table& table) {
      return std::memcmp(table.source->memory(), example.rows.data(),
                         example.rows.size() * sizeof(float)) == 0;
    });
  }

  std::string path;
  Example example;
};

// A child process that runs `test` and says how it went by its status.
pid_t start(const std::function<bool()>& test) {
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child != 0) return child;
  check::failures = 0;
  bool passed = false;
  try {
    passed = test();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "in the child: %s\n", error.what());
  }
  ::_exit(passed && check::failures == 0 ? 0 : 1);
}
bool passed(pid_t child) {
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// KiB of the mapping at `data` by /proc/<pid>/smaps.
int64_t in_smaps(pid_t pid, const std::byte* data, const std::string& field) {
  std::ifstream smaps(concat("/proc/", pid, "/smaps"));
  std::ostringstream begin;
  begin << std::hex << reinterpret_cast<uintptr_t>(data) << "-";
  std::string line;
  while (std::getline(smaps, line) && line.compare(0, begin.str().size(), begin.str()) != 0) {
  }
  while (std::getline(smaps, line)) {
    if (line.compare(0, field.size() + 1, field + ":") == 0)
      return std::stoll(line.substr(field.size() + 1));
  }
  return -1;
}

void mapped_tables_are_the_files() {
  const File file("mapped");
  for (const bool populate : {false, true}) {
    const MappedTables mapped = map_table_file(file.path, {.populate = populate});
    const int64_t there = in_smaps(::getpid(), mapped.file->data(), "Rss") * 1024;
    EXPECT((there >= mapped.file->file().size()) == populate);
    EXPECT(file.is_held_by(mapped));
    EXPECT(mapped.tables[0].shape == file.example.shape);
    EXPECT(mapped.tables[1].owners->offsets == file.example.owners->offsets);
    EXPECT(mapped.file->guarded() && !mapped.file->copied());
    const auto prefetcher = make_prefetcher(mapped.tables, {.ring_bytes = 1 << 20});
    std::mt19937 random(6);
    for (int i = 0; i < 20; ++i) {
      Prefetcher::Step step = Prefetcher::begin(prefetcher, random_ids(random, 200, 8));
      for (const int64_t layer : {0, 1}) {
        step.wait(layer);
        EXPECT(holds_the_rows(step, layer, file.example));
      }
    }
  }
}

void tables_outlive_what_mapped_them() {
  const File file("outlive");
  MappedTables mapped = map_table_file(file.path);
  mapped.file = nullptr;
  EXPECT(file.is_held_by(mapped));
}

void processes_share_one_copy_and_none_needs_another() {
  const File file("shared");
  int ready[2];
  EXPECT(::pipe(ready) == 0);
  const auto map_and_wait = [&] {
    const MappedTables mapped = map_table_file(file.path, {.populate = true});
    const std::byte* data = mapped.file->data();
    const bool good = file.is_held_by(mapped);
    if (::write(ready[1], &data, sizeof data) != sizeof data) return false;
    while (good) ::pause();
    return false;
  };
  const pid_t children[] = {start(map_and_wait), start(map_and_wait)};
  const MappedTables mapped = map_table_file(file.path, {.populate = true});
  const std::byte* data[2];
  for (const std::byte*& at : data) EXPECT(::read(ready[0], &at, sizeof at) == sizeof at);
  const int64_t size = in_smaps(::getpid(), mapped.file->data(), "Rss");
  EXPECT(size * 1024 >= mapped.file->file().size());
  // A third each, and nothing of its own.
  EXPECT(in_smaps(::getpid(), mapped.file->data(), "Pss") <= size / 3 + 8);
  EXPECT(in_smaps(::getpid(), mapped.file->data(), "Private_Dirty") == 0);
  EXPECT(in_smaps(::getpid(), mapped.file->data(), "Private_Clean") == 0);
  for (const pid_t child : children) {
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
  }
  EXPECT(file.is_held_by(mapped) && mapped.file->guarded());
  EXPECT(in_smaps(::getpid(), mapped.file->data(), "Pss") == size);  // they left nothing behind
  ::close(ready[0]);
  ::close(ready[1]);
}

void a_file_that_is_replaced_stays_with_who_maps_it() {
  const File file("replace");
  const MappedTables mapped = map_table_file(file.path);
  const Example other = make_example(200, 60, 96, 32, 9);
  const TableData tables[] = {other.data()};
  const auto before = std::chrono::steady_clock::now();
  write_table_file(file.path, tables);
  EXPECT(std::chrono::steady_clock::now() - before < std::chrono::seconds(20));  // held by nobody
  EXPECT(file.is_held_by(mapped));
  EXPECT(mapped.file->guarded() && !mapped.file->copied());
  EXPECT(map_table_file(file.path).tables.size() == 1);
}

// In a process of its own: a guard that fails is a SIGBUS.
void a_file_that_is_cut_short_or_overwritten_stays_as_it_was() {
  const File file("guard");
  for (const bool cut : {true, false}) {
    File copy("guarded");
    EXPECT(passed(start([&] {
      const MappedTables mapped = map_table_file(copy.path, {.populate = cut});
      EXPECT(mapped.file->guarded());
      std::atomic<bool> stop{false};
      bool always = true;
      std::thread reader([&] {
        while (!stop) always &= copy.is_held_by(mapped);
      });
      const pid_t other = start([&] {
        if (cut) {
          std::filesystem::resize_file(copy.path, 0);
        } else {
          std::ofstream(copy.path, std::ios::in | std::ios::binary) << std::string(100'000, 'x');
        }
        return true;
      });
      EXPECT(passed(other));
      EXPECT(mapped.file->copied() && mapped.file->guarded());
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      stop = true;
      reader.join();
      EXPECT(always);
      return true;
    })));
    EXPECT(std::filesystem::exists(copy.path));
  }
}

void what_cannot_be_guarded_says_so() {
  const File file("unguarded");
  EXPECT(!map_table_file(file.path, {.guard = false}).file->guarded());
  {
    const int writer =
        ::open(file.path.c_str(), O_RDWR | O_CLOEXEC);  // no lease while that is open
    const MappedTables mapped = map_table_file(file.path);
    EXPECT(!mapped.file->guarded() && file.is_held_by(mapped));
    ::close(writer);
  }
  const MappedTables mapped = map_table_file(file.path);
  EXPECT(mapped.file->guarded());
  EXPECT(passed(start([&] { return !mapped.file->guarded() && file.is_held_by(mapped); })));
  EXPECT(mapped.file->guarded());
}

void who_lets_go_holds_up_no_writer() {
  const File file("freed");
  map_table_file(file.path);
  const auto before = std::chrono::steady_clock::now();
  std::filesystem::resize_file(file.path, 0);
  EXPECT(std::chrono::steady_clock::now() - before < std::chrono::seconds(20));
}

void what_is_no_table_file_is_refused() {
  const std::string path = temporary_path("foreign");
  std::ofstream(path).close();
  EXPECT(EXPECT_THROWS(Error, map_table_file(path)) == "expected a table file, got 0 bytes");
  std::ofstream(path) << std::string(10'000, '{');
  EXPECT(EXPECT_THROWS(Error, map_table_file(path)).find("no table file") != std::string::npos);
  std::filesystem::remove(path);
  EXPECT(EXPECT_THROWS(Error, map_table_file(path)).find("cannot open") == 0);
}

}  // namespace

int main() {
  RUN(mapped_tables_are_the_files);
  RUN(tables_outlive_what_mapped_them);
  RUN(processes_share_one_copy_and_none_needs_another);
  RUN(a_file_that_is_replaced_stays_with_who_maps_it);
  RUN(a_file_that_is_cut_short_or_overwritten_stays_as_it_was);
  RUN(what_cannot_be_guarded_says_so);
  RUN(who_lets_go_holds_up_no_writer);
  RUN(what_is_no_table_file_is_refused);
  return check::failures == 0 ? 0 : 1;
}
