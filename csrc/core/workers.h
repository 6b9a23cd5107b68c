// Tasks that need scratch memory: a fixed number of workers, each with its own, take the tasks one after another.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "core/parallel.h"

namespace xpatch {

inline int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Calls task(i, worker) once for every i in [0, tasks), with worker in [0, workers); one worker runs one task at a
// time. Otherwise as parallel_for.
template <typename Task>
void share_out(int64_t tasks, int workers, const Task& task) {
  std::atomic<int64_t> next{0};
  parallel_for(std::min<int64_t>(tasks, workers), workers, [&](int64_t worker) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(i, worker);
  });
}

}  // namespace xpatch
