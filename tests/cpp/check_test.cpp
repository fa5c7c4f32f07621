// What the tests themselves stand on.
#include "check.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <string>

namespace {

// What a child says with its stdout a pipe, as in a log, before it ends without a word.
std::string said_by_a_killed_program() {
  int ends[2] = {};
  if (::pipe(ends) != 0) return "no pipe";
  const pid_t child = ::fork();
  if (child == 0) {
    ::dup2(ends[1], STDOUT_FILENO);
    check::run("a test", [] {});
    ::_exit(0);  // flushes nothing
  }
  ::close(ends[1]);
  std::string said;
  char part[64];
  for (ssize_t count = 0; (count = ::read(ends[0], part, sizeof(part))) > 0;) {
    said.append(part, static_cast<size_t>(count));
  }
  ::close(ends[0]);
  ::waitpid(child, nullptr, 0);
  return said;
}

void what_has_run_is_said_at_once() { EXPECT(said_by_a_killed_program() == "ok     a test\n"); }

}  // namespace

int main() {
  RUN(what_has_run_is_said_at_once);
  return check::failures == 0 ? 0 : 1;
}
