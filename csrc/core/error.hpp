// The one error type. Every message says what was expected, what came, and which argument.
#pragma once

#include <exception>
#include <locale>
#include <sstream>
#include <string>
#include <utility>

namespace l3ext {

// Where an error maps to at the edges: Python's ValueError, TypeError, OSError, RuntimeError.
enum class ErrorCode {
  kValue,        // an argument's value, shape or size
  kType,         // an argument's dtype or device
  kIo,           // a file: path() and system_errno() say which and why
  kRuntime,      // the machine: memory, threads, device
  kInterrupted,  // the caller's interrupt hook asked to stop; state is as before the call
};

// Concatenates anything streamable: L3EXT_CHECK(v >= V, "total_rows: expected at least ", V, ", got
// ", v). Not by the program's locale, which may write 1.234 for 1234: files hold such texts.
template <typename... Args>
std::string concat(const Args&... args) {
  std::ostringstream stream;
  stream.imbue(std::locale::classic());
  stream.exceptions(std::ios::badbit);  // without memory, nothing instead of half a path
  (stream << ... << args);
  return std::move(stream).str();
}

class Error : public std::exception {
 public:
  Error(ErrorCode code, std::string message) : code_(code), message_(std::move(message)) {}
  // A file error. `system_errno` may be 0 where the content, not the system, is at fault.
  static Error io(std::string path, int system_errno, std::string message) {
    Error error(ErrorCode::kIo, std::move(message));
    error.path_ = std::move(path);
    error.errno_ = system_errno;
    return error;
  }

  const char* what() const noexcept override { return message_.c_str(); }
  ErrorCode code() const noexcept { return code_; }
  const std::string& path() const noexcept { return path_; }
  int system_errno() const noexcept { return errno_; }

 private:
  ErrorCode code_;
  std::string message_;
  std::string path_;
  int errno_ = 0;
};

}  // namespace l3ext

// Throws Error(kValue, ...) unless the condition holds; the same in debug and release builds.
#define L3EXT_CHECK(condition, ...)                                                   \
  do {                                                                                \
    if (!(condition)) [[unlikely]] {                                                  \
      throw ::l3ext::Error(::l3ext::ErrorCode::kValue, ::l3ext::concat(__VA_ARGS__)); \
    }                                                                                 \
  } while (false)
