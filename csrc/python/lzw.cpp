// The LZW counter. l3ext/allocation.py is its public face.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>  // std::optional
#include <pybind11/stl/filesystem.h>
#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "lzw/counter.hpp"
#include "lzw/grant.hpp"
#include "python/bindings.hpp"
#include "python/tensor_arg.hpp"

namespace py = pybind11;

namespace l3ext::python {
namespace {

lzw::Parse parse_named(const std::string& name) {
  if (name == "paper") return lzw::Parse::kPaper;
  if (name == "lzw") return lzw::Parse::kLzw;
  throw Error(ErrorCode::kValue,
              concat("parse: expected \"paper\" or \"lzw\", got \"", name, "\""));
}

// A counter that several Python threads may hold: each call has it alone and works without the GIL.
class SharedCounter {
 public:
  explicit SharedCounter(lzw::Counter counter)
      : counter_(std::make_unique<lzw::Counter>(std::move(counter))) {}
  ~SharedCounter() {
    if (lost()) [[maybe_unused]]
      auto* left = counter_.release();
  }
  SharedCounter(const SharedCounter&) = delete;
  SharedCounter& operator=(const SharedCounter&) = delete;

  // f(counter) with the counter held and the GIL released.
  template <typename F>
  auto with(F&& f) {
    check_usable();
    py::gil_scoped_release nogil;
    const Hold hold(*this);
    return f(*counter_);
  }

  // f(counter, other's counter) with both held, in an order that cannot deadlock.
  template <typename F>
  void with(SharedCounter& other, F&& f) {
    if (&other == this) return with([&](lzw::Counter& counter) { f(counter, counter); });
    check_usable();
    other.check_usable();
    py::gil_scoped_release nogil;
    const bool first = std::less<>()(this, &other);
    const Hold one(first ? *this : other), two(first ? other : *this);
    f(*counter_, *other.counter_);
  }

 private:
  // A child of fork() got the counter out of the hands of a thread that it does not have: it is in
  // the midst of a change, and nobody will give it back.
  bool lost() const {
    const pid_t holder = holder_.load();
    return holder != 0 && holder != ::getpid();
  }

  void check_usable() const {
    if (lost()) {
      throw Error(ErrorCode::kRuntime,
                  concat("LZWCounter: in use by a thread of process ", holder_.load(),
                         " when fork() made process ", ::getpid(),
                         ", where it is of no use: fork before or after the call, or load a saved "
                         "counter in this process"));
    }
    // Only a signal handler that runs inside this thread's own call comes here twice.
    if (owner_.load() == std::this_thread::get_id()) {
      throw Error(ErrorCode::kRuntime,
                  "LZWCounter: in use by the call that this signal handler "
                  "interrupted");
    }
  }

  // A lock that knows its process: of a mutex nobody can tell whether its holder is still there.
  class Hold {
   public:
    explicit Hold(SharedCounter& shared) : shared_(shared) {
      const pid_t process = ::getpid();
      for (pid_t holder = 0; !shared.holder_.compare_exchange_weak(holder, process); holder = 0) {
        if (holder != 0) shared.holder_.wait(holder);
      }
      shared.owner_ = std::this_thread::get_id();
    }
    ~Hold() {
      shared_.owner_ = std::thread::id();
      shared_.holder_ = 0;
      shared_.holder_.notify_one();
    }
    Hold(const Hold&) = delete;
    Hold& operator=(const Hold&) = delete;

   private:
    SharedCounter& shared_;
  };

  std::unique_ptr<lzw::Counter> counter_;
  std::atomic<pid_t> holder_ = 0;       // the process whose thread has it; 0: nobody
  std::atomic<std::thread::id> owner_;  // that thread
};

template <typename T>
std::span<const T> vector_of(const TensorView& tensor) {
  return {tensor.as<const T>(), static_cast<size_t>(tensor.shape[0])};
}

void check_vector(const TensorView& tensor, const char* argument) {
  check_host(tensor, argument);
  check_shape(tensor, argument, {-1});
  check_contiguous(tensor, argument);
}

void update(SharedCounter& shared, const TensorArg& tokens, const TensorArg& offsets,
            int num_threads) {
  check_vector(tokens.view(), "tokens");
  check_vector(offsets.view(), "offsets");
  check_dtype(offsets.view(), "offsets", DType::kInt64);
  dispatch_integer(tokens->dtype, "tokens", [&](auto tag) {
    using Token = typename decltype(tag)::type;
    shared.with([&](lzw::Counter& counter) {
      counter.update(vector_of<Token>(tokens.view()), vector_of<int64_t>(offsets.view()),
                     interrupted, num_threads);
    });
  });
}

void merge(SharedCounter& shared, SharedCounter& other) {
  shared.with(other, [](lzw::Counter& counter, const lzw::Counter& others) {
    counter.merge(others, interrupted);
  });
}

// Codewords [begin, end) as a list of (tuple of ids, count).
py::list codewords(SharedCounter& shared, int64_t begin, int64_t end) {
  std::vector<std::pair<std::vector<int64_t>, int64_t>> part;
  shared.with([&](lzw::Counter& counter) {
    L3EXT_CHECK(begin >= 0 && begin <= end && end <= counter.num_codewords(),
                "codewords: expected 0 <= begin <= end <= ", counter.num_codewords(), ", got ",
                begin, " and ", end);
    for (auto id = static_cast<uint32_t>(begin); id < end; ++id) {
      part.emplace_back(counter.codeword(id), counter.counts()[id]);
    }
  });
  py::list list;
  for (const auto& [tokens, count] : part) {
    py::tuple codeword(tokens.size());
    for (size_t i = 0; i < tokens.size(); ++i) codeword[i] = tokens[i];
    list.append(py::make_tuple(std::move(codeword), count));
  }
  return list;
}

void copy_frequency(SharedCounter& shared, const TensorArg& out) {
  check_vector(out.view(), "out");
  check_dtype(out.view(), "out", DType::kInt64);
  check_writable(out.view(), "out");
  shared.with([&](lzw::Counter& counter) {
    const std::span<const int64_t> frequency = counter.frequency();
    check_shape(out.view(), "out", {counter.vocab_size()});
    std::memcpy(out->as<int64_t>(), frequency.data(), frequency.size_bytes());
  });
}

void grant(SharedCounter& shared, int64_t total_rows, int64_t max_rows, const TensorArg& out) {
  check_vector(out.view(), "out");
  check_dtype(out.view(), "out", DType::kInt32);
  check_writable(out.view(), "out");
  shared.with([&](lzw::Counter& counter) {
    check_shape(out.view(), "out", {counter.vocab_size()});
    const auto rows = lzw::grant_rows(counter, total_rows, max_rows, interrupted);
    std::memcpy(out->as<int32_t>(), rows.data(), rows.size() * sizeof(int32_t));
  });
}

}  // namespace

void bind_lzw(py::module_& module) {
  using lzw::Counter;
  py::class_<SharedCounter>(module, "LZWCounter")
      .def(py::init([](int64_t vocab_size, const std::string& parse,
                       std::optional<int64_t> max_codewords) {
             return std::make_unique<SharedCounter>(
                 Counter(vocab_size, parse_named(parse), max_codewords));
           }),
           py::arg("vocab_size"), py::arg("parse"), py::arg("max_codewords"))
      .def_static(
          "load",
          [](const std::filesystem::path& path) {
            py::gil_scoped_release nogil;
            return std::make_unique<SharedCounter>(Counter::load(path));
          },
          py::arg("path"))
      .def(
          "save",
          [](SharedCounter& shared, const std::filesystem::path& path) {
            shared.with([&](Counter& counter) { counter.save(path); });
          },
          py::arg("path"))
      .def("update", update, py::arg("tokens"), py::arg("offsets"), py::arg("num_threads") = 1)
      .def("merge", merge, py::arg("other"))
      .def("codewords", codewords, py::arg("begin"), py::arg("end"))
      .def("copy_frequency", copy_frequency, py::arg("out"))
      .def("grant", grant, py::arg("total_rows"), py::arg("max_rows"), py::arg("out"))
      .def_property_readonly("parse",
                             [](SharedCounter& shared) {
                               return shared.with([](Counter& counter) {
                                 return counter.parse() == lzw::Parse::kPaper ? "paper" : "lzw";
                               });
                             })
      .def_property_readonly("max_codewords",
                             [](SharedCounter& shared) {
                               return shared.with([](Counter& c) { return c.max_codewords(); });
                             })
      .def_property_readonly("vocab_size",
                             [](SharedCounter& shared) {
                               return shared.with([](Counter& c) { return c.vocab_size(); });
                             })
      .def_property_readonly("num_tokens",
                             [](SharedCounter& shared) {
                               return shared.with([](Counter& c) { return c.num_tokens(); });
                             })
      .def_property_readonly("num_codewords",
                             [](SharedCounter& shared) {
                               return shared.with([](Counter& c) { return c.num_codewords(); });
                             })
      .def_property_readonly("nbytes", [](SharedCounter& shared) {
        return shared.with([](Counter& c) { return c.nbytes(); });
      });
}

}  // namespace l3ext::python
