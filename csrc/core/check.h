// The one error type of the native core. Messages name the op, the argument, what was expected and what was found.
#pragma once

#include <sstream>
#include <stdexcept>

namespace xpatch {

class Error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

}  // namespace xpatch

// XPATCH_CHECK(D > 0, "patch_ffn: D must be positive, found " << D)
#define XPATCH_CHECK(condition, message)           \
  do {                                             \
    if (!(condition)) {                            \
      std::ostringstream xpatch_message;           \
      xpatch_message << message;                   \
      throw ::xpatch::Error(xpatch_message.str()); \
    }                                              \
  } while (false)
