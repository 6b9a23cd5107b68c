#include <atomic>
#include <chrono>

#include "core/parallel.h"
#include "screen/screen.h"

namespace xpatch {

double int8_peak(int threads) {
  const ScreenKernels& kernels = XPATCH_KERNELS(screen_kernels);
  constexpr int64_t kRounds = 1 << 16, kParts = 64;
  double best = 0.0;
  for (int attempt = 0; attempt < 5; ++attempt) {
    std::atomic<int64_t> work{0};
    std::atomic<int32_t> kept{0};  // so that no compiler leaves the work out
    const auto start = std::chrono::steady_clock::now();
    parallel_for(kParts * threads, threads, [&](int64_t) {
      int32_t sink = 0;
      work += kernels.peak(kRounds, &sink);
      kept += sink;
    });
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    const double rate = static_cast<double>(work.load()) / took.count();
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace xpatch
