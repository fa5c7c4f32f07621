// A test is a function of no arguments; EXPECT records a failure and goes on, so that one run
// shows all of them. main() is RUN_TESTS(a, b, c).
#pragma once

#include <cstdio>
#include <exception>
#include <string>

namespace check {

inline int failures = 0;

inline void expect(bool holds, const char* what, const char* file, int line) {
  if (holds) return;
  ++failures;
  std::fprintf(stderr, "%s:%d: expected %s\n", file, line, what);
}

// The message of the Exception that `f` throws; a failure if it throws nothing.
template <typename Exception, typename F>
std::string message_of(F&& f, const char* file, int line) {
  try {
    f();
  } catch (const Exception& error) {
    return error.what();
  }
  expect(false, "an exception", file, line);
  return {};
}

inline void run(const char* name, void (*test)()) {
  const int before = failures;
  try {
    test();
  } catch (const std::exception& error) {
    ++failures;
    std::fprintf(stderr, "%s: unexpected exception: %s\n", name, error.what());
  }
  std::printf("%s %s\n", failures == before ? "ok    " : "FAILED", name);
  std::fflush(stdout);  // a program that hangs later and is killed shall have said it
}

}  // namespace check

#define EXPECT(condition) \
  ::check::expect(static_cast<bool>(condition), #condition, __FILE__, __LINE__)
#define EXPECT_THROWS(Exception, ...) \
  ::check::message_of<Exception>([&] { __VA_ARGS__; }, __FILE__, __LINE__)
#define RUN(test) ::check::run(#test, test)
