// Checks, and the two passes of the CPU path.
//
// A row is inside only if some key has it within its radius. The first pass looks for such candidates and gives a key
// up as soon as its distance is above its radius, which is after a few elements for nearly all keys; most rows have
// none and are done. For the others the second pass finds the nearest key, giving keys up above the nearest candidate.
//
// Where the keys come packed and are many, the first pass screens them in int8 (screen/screen.h) and looks only at
// those that may have the row within their radius.
#include "ops/ball.h"

#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "core/check.h"
#include "core/workers.h"
#include "screen/screen.h"

namespace xpatch {
namespace {

constexpr int64_t kPanelRows = 256;  // rows held at once
constexpr int64_t kBlockKeys = 256;  // keys one task compares with all rows of the panel
constexpr int64_t kBlockGroups = kBlockKeys / kGroup;
constexpr int64_t kRowsAtOnce = 16;       // rows rounded together
constexpr int64_t kScreenFromKeys = 256;  // measured
constexpr int64_t kKeptAtMost = 8;        // where more than one pair in so many is kept, screening does not pay
constexpr double kSerialWork = 1 << 17;

struct Matrix {
  const float* data;
  int64_t stride;
};

Matrix as_fp32(const void* matrix, DType dtype, int64_t stride, int64_t first, int64_t rows, int64_t width,
               float* copy) {
  const char* start = static_cast<const char*>(matrix) + first * stride * size_of(dtype);
  if (dtype == DType::fp32) return {reinterpret_cast<const float*>(start), stride};
  for (int64_t row = 0; row < rows; ++row) {
    widen(start + row * stride * size_of(dtype), dtype, width, copy + row * width);
  }
  return {copy, width};
}

// The nearest key of all blocks, which are in ascending order; of equal distances the first.
Nearest first_nearest(const Nearest* found, int64_t count) {
  Nearest best;
  for (int64_t i = 0; i < count; ++i) {
    if (found[i].key >= 0 && (best.key < 0 || found[i].distance < best.distance)) best = found[i];
  }
  return best;
}

// Calls compare(row, keys of a block, first key, keys, result) for the given rows and all blocks of keys, and leaves
// each row's nearest result in `best`.
template <typename Compare>
void for_all_keys(const Ball& op, const std::vector<int64_t>& rows, int threads, std::vector<float>& keys_copy,
                  std::vector<Nearest>& found, std::vector<Nearest>& best, const Compare& compare) {
  const int64_t key_blocks = blocks(op.K, kBlockKeys);
  const int workers = static_cast<int>(std::min<int64_t>(threads, key_blocks));
  share_out(key_blocks, workers, [&](int64_t block, int64_t worker) {
    const int64_t first = block * kBlockKeys, count = std::min(kBlockKeys, op.K - first);
    const Matrix keys =
        as_fp32(op.keys, op.dtype, op.keys_stride, first, count, op.D, keys_copy.data() + worker * kBlockKeys * op.D);
    for (const int64_t row : rows) {
      found[static_cast<size_t>(row * key_blocks + block)] = compare(row, keys, first, count);
    }
  });
  for (const int64_t row : rows) {
    best[static_cast<size_t>(row)] = first_nearest(found.data() + row * key_blocks, key_blocks);
  }
}

bool screening_pays(const Ball& op) { return op.K >= kScreenFromKeys; }

// A panel's rows as bytes, and the first pass by screening.
class Screen {
 public:
  Screen(const Ball& op, const std::vector<float>& radii, int64_t panel, int threads)
      : op_(op), radii_(radii), threads_(threads), packed_(read_packed_balls(op.packed, op.packed_bytes, op.K, op.D)) {
    bytes_.resize(static_cast<size_t>(panel * packed_.full.width()));
    bounds_.resize(static_cast<size_t>(panel));
  }

  // As BallKernels::within over all keys.
  void within(const Matrix& x, int64_t rows, std::vector<Nearest>& found, std::vector<Nearest>& best) {
    round(x, rows);
    const int64_t key_blocks = blocks(op_.K, kBlockKeys);
    parallel_for(key_blocks, threads_, [&](int64_t block) {
      const int64_t group = block * kBlockGroups, groups = std::min(kBlockGroups, packed_.count - group);
      Stage stage = packed_.full;
      stage.groups += group * stage.stride;
      uint16_t masks[kBlockGroups * kPanelRows];
      for (int64_t row = 0; row < rows; ++row) found[static_cast<size_t>(row * key_blocks + block)] = Nearest();
      if (kept_.load(std::memory_order_relaxed) > looked_at_.load(std::memory_order_relaxed) / kKeptAtMost) {
        return plain(x, rows, block, found);
      }
      const int64_t kept = screener_.screen(bytes_.data(), bounds_.data(), rows, stage, groups, masks);
      looked_at_.fetch_add(rows * groups * kGroup, std::memory_order_relaxed);
      if (kept == 0) return;
      kept_.fetch_add(kept, std::memory_order_relaxed);
      if (kept > rows * groups * kGroup / kKeptAtMost) return plain(x, rows, block, found);
      std::vector<float> copy(static_cast<size_t>(op_.dtype == DType::fp32 ? 0 : op_.D));
      for (int64_t g = 0; g < groups; ++g) {
        const uint16_t* mask = masks + g * rows;
        uint32_t any = 0;
        for (int64_t row = 0; row < rows; ++row) any |= mask[row];
        for (int64_t i = 0; any >> i != 0; ++i) {
          const int64_t k = (group + g) * kGroup + i;
          if ((any >> i & 1) == 0 || k >= op_.K) continue;
          const Matrix key = as_fp32(op_.keys, op_.dtype, op_.keys_stride, k, 1, op_.D, copy.data());
          for (int64_t row = 0; row < rows; ++row) {
            if ((mask[row] >> i & 1) == 0) continue;
            const Nearest here = kernels_.within(x.data + row * x.stride, key.data, key.stride, &radii_[k], 1, op_.D);
            Nearest& nearest = found[static_cast<size_t>(row * key_blocks + block)];
            if (here.key < 0 || (nearest.key >= 0 && nearest.distance <= here.distance)) continue;
            nearest = {here.distance, k};
          }
        }
      }
    });
    for (int64_t row = 0; row < rows; ++row) {
      best[static_cast<size_t>(row)] = first_nearest(found.data() + row * key_blocks, key_blocks);
    }
  }

 private:
  void round(const Matrix& x, int64_t rows) {
    parallel_for(blocks(rows, kRowsAtOnce), rows * op_.D < (1 << 15) ? 1 : threads_, [&](int64_t block) {
      std::vector<float> work(static_cast<size_t>(op_.D));
      for (int64_t row = block * kRowsAtOnce; row < std::min(rows, (block + 1) * kRowsAtOnce); ++row) {
        const float* here = x.data + row * x.stride;
        RowBound& bound = bounds_[static_cast<size_t>(row)];
        screener_.quantise(here, op_.D, work.data(), bytes_.data() + row * packed_.full.width(), &bound);
        if (!bound.odd) bound.rest = ball_rest(kernels_.squares(here, op_.D), bound.scale, op_.D);
      }
    });
  }

  // One block of keys without screening, which has the same results.
  void plain(const Matrix& x, int64_t rows, int64_t block, std::vector<Nearest>& found) const {
    const int64_t first = block * kBlockKeys, count = std::min(kBlockKeys, op_.K - first);
    std::vector<float> copy(static_cast<size_t>(op_.dtype == DType::fp32 ? 0 : count * op_.D));
    const Matrix keys = as_fp32(op_.keys, op_.dtype, op_.keys_stride, first, count, op_.D, copy.data());
    for (int64_t row = 0; row < rows; ++row) {
      Nearest here =
          kernels_.within(x.data + row * x.stride, keys.data, keys.stride, radii_.data() + first, count, op_.D);
      if (here.key >= 0) here.key += first;
      found[static_cast<size_t>(row * blocks(op_.K, kBlockKeys) + block)] = here;
    }
  }

  const Ball& op_;
  const std::vector<float>& radii_;
  const int threads_;
  const PackedKeys packed_;
  const ScreenKernels& screener_ = XPATCH_KERNELS(screen_kernels);
  const BallKernels& kernels_ = XPATCH_KERNELS(ball_kernels);
  std::vector<int8_t> bytes_;
  std::vector<RowBound> bounds_;
  std::atomic<int64_t> looked_at_{0}, kept_{0};  // pairs
};

}  // namespace

void check(const Ball& op) {
  XPATCH_CHECK(op.M >= 0 && op.D >= 0 && op.K >= 0,
               "ball: sizes must not be negative, found M=" << op.M << " D=" << op.D << " K=" << op.K);
  XPATCH_CHECK(op.M <= 1 || op.x_stride >= op.D,
               "ball: x row stride must be at least D=" << op.D << ", found " << op.x_stride);
  XPATCH_CHECK(op.K <= 1 || op.keys_stride >= op.D,
               "ball: keys row stride must be at least D=" << op.D << ", found " << op.keys_stride);
  XPATCH_CHECK(op.x != nullptr || op.M * op.D == 0, "ball: x is a null pointer");
  XPATCH_CHECK(op.keys != nullptr || op.K * op.D == 0, "ball: keys is a null pointer");
  XPATCH_CHECK(op.radii != nullptr || op.K == 0, "ball: radii is a null pointer");
  XPATCH_CHECK(op.out != nullptr || op.M == 0, "ball: out is a null pointer");
}

void ball(const Ball& op, int threads) {
  check(op);
  XPATCH_CHECK(threads >= 1, "ball: threads must be at least 1, found " << threads);
  std::fill(op.out, op.out + op.M, uint8_t{0});
  if (op.M == 0 || op.K == 0) return;
  if (static_cast<double>(op.M) * static_cast<double>(op.K) * static_cast<double>(op.D) < kSerialWork) threads = 1;

  const BallKernels& kernel = XPATCH_KERNELS(ball_kernels);
  const bool wide = op.dtype == DType::fp32;
  const int64_t panel = std::min(op.M, kPanelRows), key_blocks = blocks(op.K, kBlockKeys);
  std::vector<float> radii(static_cast<size_t>(op.K));
  widen(op.radii, op.dtype, op.K, radii.data());
  std::vector<float> x_copy(static_cast<size_t>(wide ? 0 : panel * op.D));
  std::vector<float> keys_copy(
      static_cast<size_t>(wide ? 0 : std::min<int64_t>(threads, key_blocks) * kBlockKeys * op.D));
  std::vector<Nearest> found(static_cast<size_t>(panel * key_blocks)), best(static_cast<size_t>(panel));
  std::vector<int64_t> rows;
  std::optional<Screen> screen;
  if (op.packed != nullptr && (op.always_screen || screening_pays(op))) screen.emplace(op, radii, panel, threads);

  for (int64_t row0 = 0; row0 < op.M; row0 += panel) {
    const int64_t count = std::min(panel, op.M - row0);
    const Matrix x = as_fp32(op.x, op.dtype, op.x_stride, row0, count, op.D, x_copy.data());
    rows.clear();
    if (screen) {
      screen->within(x, count, found, best);
    } else {
      for (int64_t row = 0; row < count; ++row) rows.push_back(row);
      for_all_keys(
          op, rows, threads, keys_copy, found, best, [&](int64_t row, const Matrix& keys, int64_t first, int64_t some) {
            Nearest here =
                kernel.within(x.data + row * x.stride, keys.data, keys.stride, radii.data() + first, some, op.D);
            if (here.key >= 0) here.key += first;
            return here;
          });
      rows.clear();
    }
    std::vector<float> bounds(static_cast<size_t>(count));
    for (int64_t row = 0; row < count; ++row) {
      if (best[static_cast<size_t>(row)].key < 0) continue;
      bounds[static_cast<size_t>(row)] = best[static_cast<size_t>(row)].distance;
      rows.push_back(row);
    }
    if (rows.empty()) continue;
    for_all_keys(op, rows, threads, keys_copy, found, best,
                 [&](int64_t row, const Matrix& keys, int64_t first, int64_t some) {
                   Nearest here = kernel.nearest(x.data + row * x.stride, keys.data, keys.stride, some, op.D,
                                                 bounds[static_cast<size_t>(row)]);
                   if (here.key >= 0) here.key += first;
                   return here;
                 });
    for (const int64_t row : rows) {
      const Nearest& nearest = best[static_cast<size_t>(row)];
      op.out[row0 + row] = nearest.distance <= radii[static_cast<size_t>(nearest.key)];
    }
  }
}

#if !defined(XPATCH_HAS_CUDA)
void ball_cuda(const Ball&, void*) { throw Error("ball: this build has no CUDA kernels (build option XPATCH_CUDA)"); }
#endif

}  // namespace xpatch
