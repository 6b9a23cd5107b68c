// Large pages for large buffers.
#pragma once

#include <cstdint>

namespace xpatch {

// Asks the system to back a fresh buffer, where it is large, with large pages: reading it end to end then misses the
// TLB less often. A wish: where it cannot be granted nothing happens.
void ask_for_large_pages(void* start, int64_t bytes);

}  // namespace xpatch
