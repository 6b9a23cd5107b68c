// A small persistent thread pool.
#pragma once

#include <cstdint>
#include <functional>

namespace xpatch {

// Calls task(i) for every i in [0, tasks), each exactly once, on the calling thread and up to `threads - 1` others, and
// returns when all are done. Which thread runs which task is not fixed, so tasks must not depend on each other. What
// the first of them throws is thrown here, once the others have stopped; tasks not begun by then are left out. When
// another caller holds the pool, or after a failed thread start, the work runs on fewer threads. Safe after fork: a
// child starts a pool of its own.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& task);

}  // namespace xpatch
