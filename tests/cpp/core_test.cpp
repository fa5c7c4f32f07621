#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>

#include "check.hpp"
#include "core/atomic_file.hpp"
#include "core/checksum.hpp"
#include "core/cpu_features.hpp"
#include "core/error.hpp"
#include "core/scratch.hpp"

using l3ext::Error;

namespace {

std::string temporary_path(const char* name) {
  return (std::filesystem::temp_directory_path() / l3ext::concat(name, ".", ::getpid())).string();
}

void crc32c_matches_the_published_check_value() {
  // The check value of CRC-32C for the nine digits, from the catalogue of CRC algorithms.
  EXPECT(l3ext::crc32c("123456789", 9) == 0xE3069283u);
  EXPECT(l3ext::crc32c("56789", 5, l3ext::crc32c("1234", 4)) == 0xE3069283u);
  EXPECT(l3ext::crc32c("", 0) == 0u);
}

void atomic_file_keeps_the_old_content_until_commit() {
  const std::string path = temporary_path("atomic");
  {
    l3ext::AtomicFile file(path);
    file.write("old", 3);
    file.commit();
  }
  {
    l3ext::AtomicFile file(path);
    file.write("new", 3);  // no commit
  }
  std::string content;
  std::ifstream(path) >> content;
  EXPECT(content == "old");
  int entries = 0;
  const auto name = std::filesystem::path(path).filename().string();
  for (const auto& entry :
       std::filesystem::directory_iterator(std::filesystem::path(path).parent_path())) {
    entries += entry.path().filename().string().starts_with(name);
  }
  EXPECT(entries == 1);  // the abandoned temporary file is gone
  std::filesystem::remove(path);
}

void atomic_file_names_the_path_it_cannot_write() {
  const std::string message =
      EXPECT_THROWS(Error, l3ext::AtomicFile("/nonexistent-directory/file"));
  EXPECT(message.find("cannot create") != std::string::npos);
}

void atomic_files_of_one_path_do_not_meet() {
  const std::string path = temporary_path("twice");
  l3ext::AtomicFile first(path);
  l3ext::AtomicFile second(path);
  second.write("second", 6);
  first.write("1st", 3);
  first.commit();
  std::string content;
  std::ifstream(path) >> content;
  EXPECT(content == "1st");
  second.commit();
  std::ifstream(path) >> content;
  EXPECT(content == "second");
  std::filesystem::remove(path);
}

void an_atomic_file_takes_no_device_s_place() {
  const std::string path = temporary_path("pipe");
  ::mkfifo(path.c_str(), 0666);
  std::string message = EXPECT_THROWS(Error, l3ext::AtomicFile{path});
  EXPECT(message.find("special file") != std::string::npos);
  EXPECT(std::filesystem::is_fifo(path));
  std::filesystem::remove(path);
  message = EXPECT_THROWS(Error, l3ext::AtomicFile{std::filesystem::temp_directory_path()});
  EXPECT(message.find("directory") != std::string::npos);
  message = EXPECT_THROWS(Error, l3ext::AtomicFile(""));
  EXPECT(message.find("path: ") != std::string::npos);
}

// Of files that may not grow the system says the like as of disks that are full.
void a_full_disk_is_an_error_and_not_a_short_file() {
  rlimit before;
  ::getrlimit(RLIMIT_FSIZE, &before);
  const rlimit none = {0, before.rlim_max};
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  ::setrlimit(RLIMIT_FSIZE, &none);
  {
    l3ext::AtomicFile file(temporary_path("full"));
    const std::string message = EXPECT_THROWS(Error, file.write("x", 1));
    EXPECT(message.find("the old file stays") != std::string::npos);
  }
  ::setrlimit(RLIMIT_FSIZE, &before);
  std::signal(SIGXFSZ, handler);
}

void an_instruction_set_holds_all_before_it() {
  for (const l3ext::CpuIsa isa : l3ext::kCpuIsas) {
    EXPECT(l3ext::cpu_runs(isa) == (isa <= l3ext::best_cpu_isa()));
  }
  EXPECT(l3ext::cpu_runs(l3ext::active_cpu_isa()));
}

void scratch_is_kept_until_it_must_grow() {
  l3ext::Scratch scratch;
  std::byte* small = scratch.get(100);
  std::memset(small, 1, 100);
  EXPECT(reinterpret_cast<uintptr_t>(small) % l3ext::Carver::kAlignment == 0);
  EXPECT(scratch.get(0) == small && scratch.get(4096) == small);
  constexpr size_t kLarge = size_t{3} << 20;
  std::memset(scratch.get(kLarge), 2, kLarge);
  EXPECT(scratch.get(100)[kLarge - 1] == std::byte{2});
  scratch.release();
  std::memset(scratch.get(100), 3, 100);
}

}  // namespace

int main() {
  RUN(crc32c_matches_the_published_check_value);
  RUN(atomic_file_keeps_the_old_content_until_commit);
  RUN(atomic_file_names_the_path_it_cannot_write);
  RUN(atomic_files_of_one_path_do_not_meet);
  RUN(an_atomic_file_takes_no_device_s_place);
  RUN(a_full_disk_is_an_error_and_not_a_short_file);
  RUN(an_instruction_set_holds_all_before_it);
  RUN(scratch_is_kept_until_it_must_grow);
  return check::failures == 0 ? 0 : 1;
}
