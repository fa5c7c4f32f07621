// The process that an object was made in. A child of fork() has a copy of every object, but none of
// the threads, and locks in whatever state they were in: of an object that needs either it may let
// go, and nothing else.
#pragma once

#include <sys/types.h>
#include <unistd.h>

#include "core/error.hpp"

namespace l3ext {

class HomeProcess {
 public:
  bool is_here() const { return process_ == ::getpid(); }

  // Throws kRuntime in another process. `object`: what the caller knows it as.
  void check(const char* object) const {
    if (is_here()) return;
    throw Error(ErrorCode::kRuntime,
                concat("this ", object, " belongs to process ", process_, " and came to process ",
                       ::getpid(),
                       " through fork(), which leaves its threads behind: open a "
                       "runtime in this process"));
  }

 private:
  const pid_t process_ = ::getpid();
};

// For a shared_ptr: in a child of fork() leaving the object alone is the only safe end.
struct DeleteAtHome {
  HomeProcess home;

  template <typename T>
  void operator()(T* object) const {
    if (home.is_here()) delete object;
  }
};

}  // namespace l3ext
