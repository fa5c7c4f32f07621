// Ranges of a file by every engine, with and without O_DIRECT: what the file holds comes back
// whatever the system does, and what cannot be read is an error that says why.
#include "runtime/file_table.hpp"

#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.hpp"
#include "faulty_queue.hpp"

using namespace l3ext;
using namespace examples;

namespace {

constexpr int64_t kBase = 4096;           // of the table in the file
constexpr int64_t kTableBytes = 300'123;  // ends within a page
constexpr int64_t kMostBytes = 20'000;    // of one read
constexpr int64_t kSlot = (kMostBytes + 4095) / 4096 * 4096 + TableSource::kScratchMargin;

// A file of random bytes, removed at the end.
struct File {
  explicit File(const char* name)
      : path((std::filesystem::temp_directory_path() / concat("l3ext_", name, ".", ::getpid()))
                 .string()),
        bytes(kBase + kTableBytes) {
    std::minstd_rand random(1);
    for (char& byte : bytes) byte = static_cast<char>(random());
    std::ofstream(path, std::ios::binary).write(bytes.data(), std::ssize(bytes));
  }
  ~File() { std::filesystem::remove(path); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  bool holds(const std::byte* data, int64_t begin, int64_t count) const {
    return std::memcmp(data, bytes.data() + kBase + begin, static_cast<size_t>(count)) == 0;
  }

  std::string path;
  std::vector<char> bytes;
};

struct Slots {
  explicit Slots(int64_t count)
      : memory(static_cast<std::byte*>(std::aligned_alloc(4096, count * kSlot)), std::free) {}
  std::byte* operator[](int64_t i) const { return memory.get() + i * kSlot; }
  std::unique_ptr<std::byte, void (*)(void*)> memory;
};

struct Mode {
  IoEngine engine;
  DirectIo direct_io;
};
std::vector<Mode> modes() {
  std::vector<Mode> result;
  for (const DirectIo direct_io : {DirectIo::kAuto, DirectIo::kOff}) {
    result.push_back({IoEngine::kPread, direct_io});
    if (why_no_uring().empty()) result.push_back({IoEngine::kUring, direct_io});
  }
  return result;
}

std::shared_ptr<const FileReader> open(const File& file, const Mode& mode) {
  return std::make_shared<FileReader>(file.path, mode.direct_io, mode.engine);
}

// Reads random ranges with as many on their way as the reader takes.
void read_random_ranges(TableReader& reader, const File& file, unsigned seed, int count) {
  std::minstd_rand random(seed);
  const Slots slots(reader.depth());
  std::vector<Read> reads(static_cast<size_t>(reader.depth()));  // by slot
  const auto submit = [&](int64_t slot) {
    Read& read = reads[slot];
    read.bytes = 1 + static_cast<int64_t>(random() % kMostBytes);
    read.begin = static_cast<int64_t>(random() % (kTableBytes - read.bytes + 1));
    if (random() % 8 == 0) read.begin = kTableBytes - read.bytes;  // up to the file's last byte
    read.scratch = slots[slot];
    read.tag = slot;
    reader.submit(read);
  };
  int submitted = 0, completed = 0;
  for (int64_t slot = 0; slot < reader.depth() && submitted < count; ++slot, ++submitted) {
    submit(slot);
  }
  for (; completed < submitted; ++completed) {
    const ReadResult result = reader.complete();
    const Read read = reads[result.tag];
    EXPECT(!result.error && file.holds(result.data, read.begin, read.bytes));
    EXPECT(result.data >= read.scratch);
    EXPECT(result.data + read.bytes <= read.scratch + read.bytes + TableSource::kScratchMargin);
    if (submitted < count) submit(result.tag), ++submitted;
  }
}

// Runs in a child process; true if `test` returned true.
bool in_a_child(const std::function<bool()>& test) {
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child == 0) {
    check::failures = 0;
    bool passed = false;
    try {
      passed = test();
    } catch (const std::exception& error) {
      std::fprintf(stderr, "in the child: %s\n", error.what());
    }
    ::_exit(passed ? 0 : 1);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

// From here on, this system call fails in this process.
void forbid(unsigned call) {
  sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, call, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  const sock_fprog program = {std::size(filter), filter};
  EXPECT(::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0);
  EXPECT(::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0);
}
constexpr unsigned kUringSetup = 425, kUringEnter = 426;  // on every architecture but Alpha

// First of all tests: a process asks the kernel for io_uring once.
void where_the_kernel_forbids_io_uring_pread_reads() {
  const File file("forbidden");
  for (const unsigned call : {kUringSetup, kUringEnter})
    EXPECT(in_a_child([&] {
      forbid(call);
      EXPECT(!why_no_uring().empty());
      const auto reader = open(file, {IoEngine::kAuto, DirectIo::kAuto});
      EXPECT(!reader->uring());
      read_random_ranges(*FileTable(reader, kBase).make_reader(8), file, 2, 100);
      const std::string message =
          EXPECT_THROWS(Error, open(file, {IoEngine::kUring, DirectIo::kAuto}));
      EXPECT(message == concat("io_engine: expected a system with io_uring, got \"", why_no_uring(),
                               "\"; pread and auto read without it"));
      return check::failures == 0;
    }));
}

void every_engine_reads_what_the_file_holds() {
  const File file("engines");
  for (const Mode& mode : modes()) {
    const auto reader = open(file, mode);
    EXPECT(reader->uring() == (mode.engine == IoEngine::kUring));
    FileTable table(reader, kBase);
    for (const int depth : {1, 2, 3, 7, 16, 64}) {
      const auto reads = table.make_reader(depth);
      EXPECT(reads->depth() == depth);
      read_random_ranges(*reads, file, static_cast<unsigned>(depth), 200);
    }
  }
}

void several_threads_read_one_file() {
  const File file("threads");
  for (const Mode& mode : modes()) {
    FileTable table(open(file, mode), kBase);
    std::vector<std::thread> threads;
    for (unsigned i = 0; i < 4; ++i) {
      threads.emplace_back(
          [&, i] { read_random_ranges(*table.make_reader(4), file, 100 + i, 200); });
    }
    for (std::thread& thread : threads) thread.join();
  }
}

void short_interrupted_and_late_reads_are_made_good() {
  const File file("unkind");
  for (const Mode& mode : modes()) {
    for (const int depth : {1, 4, 32}) {
      const auto opened = open(file, mode);
      const FaultyQueue::Faults faults = {.seed = static_cast<unsigned>(depth),
                                          .shorten = true,
                                          .interrupt = true,
                                          .longest_delay = std::chrono::microseconds(50)};
      FileTableReader reader(opened, kBase, depth,
                             std::make_unique<FaultyQueue>(opened->make_queue(depth), faults));
      read_random_ranges(reader, file, 7, 300);
    }
  }
}

void a_read_that_fails_says_where_and_why_and_spoils_no_other() {
  const File file("failing");
  for (const Mode& mode : modes()) {
    const auto opened = open(file, mode);
    const FaultyQueue::Faults faults = {.failing = {kBase + 100'000}};
    FileTableReader reader(opened, kBase, 8,
                           std::make_unique<FaultyQueue>(opened->make_queue(8), faults));
    const Slots slots(8);
    for (int round = 0; round < 3; ++round) {
      for (int64_t i = 0; i < 8; ++i) reader.submit({i * 25'000, 1000, slots[i], i});
      for (int64_t i = 0; i < 8; ++i) {
        const ReadResult result = reader.complete();
        if (result.tag != 4) {
          EXPECT(!result.error && file.holds(result.data, result.tag * 25'000, 1000));
          continue;
        }
        try {
          EXPECT(result.error != nullptr);
          std::rethrow_exception(result.error);
        } catch (const Error& error) {
          EXPECT(error.code() == ErrorCode::kIo && error.path() == file.path);
          EXPECT(error.system_errno() == EIO);
          EXPECT(std::string(error.what()) ==
                 "cannot read 1000 bytes at offset 104096: Input/output error");
        }
      }
    }
  }
}

void a_file_cut_short_is_an_error_of_the_reads_beyond() {
  for (const Mode& mode : modes()) {
    const File file("cut");
    FileTable table(open(file, mode), kBase);
    const auto reader = table.make_reader(3);
    std::filesystem::resize_file(file.path, 100'000);
    const Slots slots(3);
    const int64_t begins[] = {0, 100'000 - kBase - 500, 250'000};  // before, across, beyond
    for (int64_t i = 0; i < 3; ++i) reader->submit({begins[i], 1000, slots[i], i});
    for (int i = 0; i < 3; ++i) {
      const ReadResult result = reader->complete();
      EXPECT((result.error == nullptr) == (result.tag == 0));
      if (!result.error) continue;
      const std::string message = EXPECT_THROWS(Error, std::rethrow_exception(result.error));
      EXPECT(message == concat("expected 1000 bytes at offset ", kBase + begins[result.tag],
                               ", but the file is 100000 bytes long; it had ", kBase + kTableBytes,
                               " when it was opened"));
    }
  }
}

void a_file_that_was_replaced_is_still_read_as_it_was() {
  for (const Mode& mode : modes()) {
    const File file("replaced");
    FileTable table(open(file, mode), kBase);
    const std::string other = file.path + ".new";
    std::ofstream(other) << "something else";
    std::filesystem::rename(other, file.path);
    read_random_ranges(*table.make_reader(4), file, 3, 50);
  }
}

void what_is_no_readable_file_is_refused() {
  const File file("refused");
  const Mode mode = {IoEngine::kAuto, DirectIo::kAuto};
  const auto refusal = [&](const std::string& path) {
    return EXPECT_THROWS(Error, FileReader(path, mode.direct_io, mode.engine));
  };
  EXPECT(refusal(file.path + ".none") == "cannot open: No such file or directory");
  EXPECT(refusal(std::filesystem::temp_directory_path().string()) ==
         "expected a regular file, got a directory or a special file");
  const std::string fifo = file.path + ".fifo";
  EXPECT(::mkfifo(fifo.c_str(), 0600) == 0);
  EXPECT(refusal(fifo) == "expected a regular file, got a directory or a special file");
  std::filesystem::remove(fifo);
  ::chmod(file.path.c_str(), 0);
  EXPECT(in_a_child([&] {
    if (::geteuid() == 0) EXPECT(::seteuid(65534) == 0);  // root may read anything
    EXPECT(refusal(file.path) == "cannot open: Permission denied");
    return check::failures == 0;
  }));
}

// Of a file system that has no O_DIRECT; where it is asked for, that is an error that says what
// else.
void direct_io_that_cannot_be_had() {
  const std::string path = "/proc/version";
  EXPECT(!FileReader(path, DirectIo::kAuto, IoEngine::kPread).direct());
  EXPECT(EXPECT_THROWS(Error, FileReader(path, DirectIo::kOn, IoEngine::kPread)) ==
         "direct_io: expected a file system that allows O_DIRECT, got one that does not; off and "
         "auto read through the page cache");
}

void a_path_is_bytes() {
  const File file("bytes");
  const std::string path = file.path + "-\xff\xfe";  // not UTF-8
  std::filesystem::rename(file.path, path);
  const FileReader reader(path, DirectIo::kAuto, IoEngine::kAuto);
  EXPECT(reader.path() == path);
  std::filesystem::rename(path, file.path);
}

// Descriptors are the one thing of which a test can make the kernel run out.
void where_no_ring_is_left_pread_reads_and_says_so() {
  if (!why_no_uring().empty()) return;
  const File file("exhausted");
  EXPECT(in_a_child([&] {
    const auto reader = open(file, {IoEngine::kAuto, DirectIo::kAuto});
    const auto required = open(file, {IoEngine::kUring, DirectIo::kAuto});
    EXPECT(reader->uring());
    const rlimit none = {0, 0};
    EXPECT(::setrlimit(RLIMIT_NOFILE, &none) == 0);
    read_random_ranges(*FileTable(reader, kBase).make_reader(8), file, 4, 100);
    EXPECT(!reader->uring());
    const std::string message = EXPECT_THROWS(Error, required->make_queue(8));
    EXPECT(message.find("io_uring_setup: ") == 0);
    return check::failures == 0;
  }));
}

// As of a server that opens its files first and locks itself up then.
void where_io_uring_is_forbidden_later_pread_reads() {
  if (!why_no_uring().empty()) return;
  const File file("sandbox");
  EXPECT(in_a_child([&] {
    FileTable table(open(file, {IoEngine::kUring, DirectIo::kAuto}), kBase);
    const auto reader = table.make_reader(4);
    read_random_ranges(*reader, file, 5, 100);
    forbid(kUringEnter);
    read_random_ranges(*reader, file, 6, 100);
    return check::failures == 0;
  }));
}

void a_reader_that_goes_waits_for_its_reads() {
  // Large reads, so that the first is complete well before the last.
  constexpr int64_t kReads = 16, kBytes = 1 << 20;
  const File file("going");
  std::filesystem::resize_file(file.path, kBase + kReads * kBytes);
  const std::unique_ptr<std::byte, void (*)(void*)> memory(
      static_cast<std::byte*>(
          std::aligned_alloc(4096, kReads * (kBytes + TableSource::kScratchMargin))),
      std::free);
  const auto slot = [&](int64_t i) {
    return memory.get() + i * (kBytes + TableSource::kScratchMargin);
  };
  for (const Mode& mode : modes()) {
    FileTable table(open(file, mode), kBase);
    {
      const auto reader = table.make_reader(kReads);
      for (int64_t i = 0; i < kReads; ++i) reader->submit({i * kBytes, kBytes, slot(i), i});
      reader->complete();
    }
    for (int64_t i = 0; i < kReads; ++i) std::memset(slot(i), 0x11, kBytes);
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    bool quiet = true;
    for (int64_t i = 0; i < kReads; ++i) {
      quiet &= std::count(slot(i), slot(i) + kBytes, std::byte{0x11}) == kBytes;
    }
    EXPECT(quiet);
  }
}

void a_child_lets_go_of_its_parents_reader() {
  const File file("fork");
  for (const Mode& mode : modes()) {
    FileTable table(open(file, mode), kBase);
    auto reader = table.make_reader(4);
    const Slots slots(4);
    for (int64_t i = 0; i < 4; ++i) reader->submit({i * 1000, 1000, slots[i], i});
    ReadResult result = reader->complete();  // the others are on their way
    EXPECT(file.holds(result.data, result.tag * 1000, 1000));
    EXPECT(in_a_child([&] {
      reader.reset();
      if (mode.engine == IoEngine::kPread) {  // whose threads the child does not have
        const std::string message = EXPECT_THROWS(Error, table.make_reader(4));
        EXPECT(message.find("through fork()") != std::string::npos);
      }
      return check::failures == 0;
    }));
    for (int i = 0; i < 3; ++i) {
      result = reader->complete();
      EXPECT(!result.error && file.holds(result.data, result.tag * 1000, 1000));
    }
    read_random_ranges(*reader, file, 5, 50);
  }
}

// Signals reach the thread that waits for a read: EINTR of the real calls.
void signals_do_not_disturb_reads() {
  const File file("signals");
  struct sigaction action{}, before{};
  action.sa_handler = [](int) {};
  ::sigaction(SIGUSR1, &action, &before);
  for (const Mode& mode : modes()) {
    FileTable table(open(file, mode), kBase);
    const pthread_t self = pthread_self();
    std::atomic<bool> stop{false};
    std::thread disturber([&] {
      while (!stop) {
        pthread_kill(self, SIGUSR1);
        std::this_thread::sleep_for(std::chrono::microseconds(20));
      }
    });
    read_random_ranges(*table.make_reader(4), file, 6, 500);
    stop = true;
    disturber.join();
  }
  ::sigaction(SIGUSR1, &before, nullptr);
}

}  // namespace

int main() {
  RUN(where_the_kernel_forbids_io_uring_pread_reads);
  RUN(every_engine_reads_what_the_file_holds);
  RUN(several_threads_read_one_file);
  RUN(short_interrupted_and_late_reads_are_made_good);
  RUN(a_read_that_fails_says_where_and_why_and_spoils_no_other);
  RUN(a_file_cut_short_is_an_error_of_the_reads_beyond);
  RUN(a_file_that_was_replaced_is_still_read_as_it_was);
  RUN(what_is_no_readable_file_is_refused);
  RUN(direct_io_that_cannot_be_had);
  RUN(a_path_is_bytes);
  RUN(where_no_ring_is_left_pread_reads_and_says_so);
  RUN(where_io_uring_is_forbidden_later_pread_reads);
  RUN(a_reader_that_goes_waits_for_its_reads);
  RUN(a_child_lets_go_of_its_parents_reader);
  RUN(signals_do_not_disturb_reads);
  return check::failures == 0 ? 0 : 1;
}
