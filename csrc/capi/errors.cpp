#include "capi/errors.hpp"

#include <algorithm>
#include <exception>
#include <new>
#include <string_view>

#include "core/error.hpp"

namespace l3ext::capi {
namespace {

// An array: saying that memory is out must not need any.
thread_local char error_text[1024] = "";

void append(std::string_view text) {
  const size_t length = std::char_traits<char>::length(error_text);
  const size_t count = std::min(text.size(), sizeof error_text - 1 - length);
  std::copy_n(text.begin(), count, error_text + length);
  error_text[length + count] = '\0';
}

l3ext_status fail(l3ext_status status, std::string_view text) {
  error_text[0] = '\0';
  append(text);
  return status;
}

l3ext_status fail(const Error& error) {
  switch (error.code()) {
    case ErrorCode::kValue:
      return fail(L3EXT_ERROR_VALUE, error.what());
    case ErrorCode::kType:
      return fail(L3EXT_ERROR_TYPE, error.what());
    case ErrorCode::kIo:
      fail(L3EXT_ERROR_IO, error.path());
      if (!error.path().empty()) append(": ");
      append(error.what());
      return L3EXT_ERROR_IO;
    case ErrorCode::kRuntime:
    case ErrorCode::kInterrupted:  // nobody asks for it here
      break;
  }
  return fail(L3EXT_ERROR_RUNTIME, error.what());
}

}  // namespace

l3ext_status report_exception() noexcept {
  try {
    throw;
  } catch (const BadHandle& bad) {
    return fail(L3EXT_ERROR_HANDLE, bad.what());
  } catch (const Error& error) {
    return fail(error);
  } catch (const std::bad_alloc&) {
    return fail(L3EXT_ERROR_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail(L3EXT_ERROR_RUNTIME, error.what());
  } catch (...) {
    return fail(L3EXT_ERROR_RUNTIME, "an exception of unknown type");
  }
}

}  // namespace l3ext::capi

const char* l3ext_error_text(void) { return l3ext::capi::error_text; }

uint32_t l3ext_abi_version(void) { return L3EXT_ABI_VERSION; }
