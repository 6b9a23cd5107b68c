// Checks, the choice between this kernel and the framework's matmuls, and the grouping of rows per delta.
#include "ops/lowrank.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/check.h"
#include "core/workers.h"

namespace xpatch {
namespace {

constexpr int64_t kMinBlockRows = 16, kMaxBlockRows = 128;  // rows grouped together
constexpr int64_t kChunkRanks = 16;                         // ranks of one delta held at once
constexpr double kSerialWork = 1 << 17;  // multiply-adds below which waking threads costs more than it saves

bool offsets_are_right(const Lowrank& op) {
  if (op.offsets[0] != 0 || op.offsets[op.G] != op.R) return false;
  for (int64_t g = 0; g < op.G; ++g) {
    if (op.offsets[g] > op.offsets[g + 1]) return false;
  }
  return true;
}

// Calls found(g) for every selected delta, in ascending order.
template <typename Found>
inline void for_selected(const uint8_t* line, int64_t G, const Found& found) {
  int64_t g = 0;
  for (; g + 8 <= G; g += 8) {
    uint64_t eight;
    std::memcpy(&eight, line + g, 8);
    if (eight == 0) continue;
    for (int64_t i = g; i < g + 8; ++i) {
      if (line[i] != 0) found(i);
    }
  }
  for (; g < G; ++g) {
    if (line[g] != 0) found(g);
  }
}

// What all rows together selected: (row, delta) pairs, and their ranks.
struct Selected {
  int64_t pairs = 0, ranks = 0;
};

Selected count(const Lowrank& op) {
  Selected all;
  for (int64_t line = 0; line * op.repeat < op.M; ++line) {
    Selected here;
    for_selected(op.rows + line * op.G, op.G, [&](int64_t g) {
      ++here.pairs;
      here.ranks += op.offsets[g + 1] - op.offsets[g];
    });
    all.pairs += here.pairs * op.repeat;
    all.ranks += here.ranks * op.repeat;
  }
  return all;
}

// What a selected rank, and a (row, delta) pair whatever its ranks, cost here; one multiply-add of the framework's
// matmul over all ranks costs 1. Measured against MKL limited to the same instruction set (portable: not limited, as
// there is nothing to limit it to), on one thread, D = V = 768, deltas of rank 1, 4 and 16, 1 to 1024 rows.
struct Cost {
  double rank, pair;
};

Cost cost() {
  switch (isa_in_use()) {
    case Isa::avx512:
    case Isa::avx512vnni:
      return {0.6, 1.25};
    case Isa::avx2:
    case Isa::avx2vnni:
      return {1.0, 1.7};
    default:
      return {3.0, 2.5};
  }
}

bool too_dense(const Lowrank& op, const Selected& selected) {
  const Cost each = cost();
  const double here = each.rank * static_cast<double>(selected.ranks) + each.pair * static_cast<double>(selected.pairs);
  return here > static_cast<double>(op.M) * static_cast<double>(op.R);
}

// The deltas that a block of rows selected, each with its rows.
class Groups {
 public:
  // Reserves what any block of `rows` rows can need, so that `assign` allocates nothing.
  Groups(const Lowrank& op, int64_t rows, int64_t pairs) {
    starts_.reserve(static_cast<size_t>(op.G + 1));
    next_.reserve(static_cast<size_t>(op.G + 1));
    used_.reserve(static_cast<size_t>(op.G));
    rows_.reserve(static_cast<size_t>(std::min(pairs, rows * op.G)));
  }

  void assign(const Lowrank& op, int64_t row0, int64_t rows) {
    starts_.assign(static_cast<size_t>(op.G + 1), 0);
    for (int64_t row = 0; row < rows; ++row) {
      for_selected(line(op, row0 + row), op.G, [&](int64_t g) { ++starts_[static_cast<size_t>(g + 1)]; });
    }
    used_.clear();
    for (int64_t g = 0; g < op.G; ++g) {
      if (starts_[static_cast<size_t>(g + 1)] != 0 && op.offsets[g + 1] > op.offsets[g]) used_.push_back(g);
      starts_[static_cast<size_t>(g + 1)] += starts_[static_cast<size_t>(g)];
    }
    rows_.resize(static_cast<size_t>(starts_.back()));
    next_.assign(starts_.begin(), starts_.end());
    for (int64_t row = 0; row < rows; ++row) {
      for_selected(line(op, row0 + row), op.G,
                   [&](int64_t g) { rows_[static_cast<size_t>(next_[static_cast<size_t>(g)]++)] = row; });
    }
  }

  const std::vector<int64_t>& used() const { return used_; }
  int64_t count(int64_t g) const { return starts_[static_cast<size_t>(g + 1)] - starts_[static_cast<size_t>(g)]; }
  const int64_t* rows(int64_t g) const { return rows_.data() + starts_[static_cast<size_t>(g)]; }

 private:
  static const uint8_t* line(const Lowrank& op, int64_t row) { return op.rows + row / op.repeat * op.G; }

  std::vector<int64_t> starts_, next_, rows_, used_;
};

// A worker's memory. What a 16-bit dtype needs widened is here too.
struct Scratch {
  Groups groups;
  std::vector<const float*> x_rows;
  std::vector<float*> out_rows;
  std::vector<float> h, x, out, down, up;

  Scratch(const Lowrank& op, int64_t block, int64_t pairs)
      : groups(op, block, pairs),
        x_rows(static_cast<size_t>(block)),
        out_rows(static_cast<size_t>(block)),
        h(static_cast<size_t>(block * kChunkRanks)) {
    if (op.dtype == DType::fp32) return;
    x.resize(static_cast<size_t>(block * op.D));
    out.resize(static_cast<size_t>(block * op.V));
    down.resize(static_cast<size_t>(kChunkRanks * op.D));
    up.resize(static_cast<size_t>(kChunkRanks * op.V));
  }
};

struct Matrix {
  const float* data;
  int64_t stride;
};

Matrix as_fp32(const void* matrix, DType dtype, int64_t stride, int64_t first, int64_t rows, int64_t width,
               std::vector<float>& copy) {
  const char* start = static_cast<const char*>(matrix) + first * stride * size_of(dtype);
  if (dtype == DType::fp32) return {reinterpret_cast<const float*>(start), stride};
  for (int64_t row = 0; row < rows; ++row) {
    widen(start + row * stride * size_of(dtype), dtype, width, copy.data() + row * width);
  }
  return {copy.data(), width};
}

void run_block(const Lowrank& op, int64_t row0, int64_t rows, Scratch& scratch) {
  const LowrankKernels& kernel = XPATCH_KERNELS(lowrank_kernels);
  const bool wide = op.dtype == DType::fp32;
  float* out = wide ? static_cast<float*>(op.out) + row0 * op.V : scratch.out.data();
  std::fill(out, out + rows * op.V, 0.0f);
  scratch.groups.assign(op, row0, rows);
  const Matrix x = scratch.groups.used().empty() ? Matrix{nullptr, 0}
                                                 : as_fp32(op.x, op.dtype, op.x_stride, row0, rows, op.D, scratch.x);

  for (const int64_t g : scratch.groups.used()) {
    const int64_t count = scratch.groups.count(g);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t row = scratch.groups.rows(g)[i];
      scratch.x_rows[static_cast<size_t>(i)] = x.data + row * x.stride;
      scratch.out_rows[static_cast<size_t>(i)] = out + row * op.V;
    }
    for (int64_t rank = op.offsets[g]; rank < op.offsets[g + 1]; rank += kChunkRanks) {
      const int64_t ranks = std::min(kChunkRanks, op.offsets[g + 1] - rank);
      const Matrix down = as_fp32(op.down, op.dtype, op.down_stride, rank, ranks, op.D, scratch.down);
      const Matrix up = as_fp32(op.up, op.dtype, op.up_stride, rank, ranks, op.V, scratch.up);
      kernel.down(scratch.x_rows.data(), count, down.data, down.stride, ranks, op.D, scratch.h.data());
      kernel.up(scratch.h.data(), count, up.data, up.stride, ranks, op.V, scratch.out_rows.data());
    }
  }
  if (!wide) narrow(out, rows * op.V, op.dtype, static_cast<char*>(op.out) + row0 * op.V * size_of(op.dtype));
}

}  // namespace

void check(const Lowrank& op) {
  XPATCH_CHECK(op.M >= 0 && op.D >= 0 && op.R >= 0 && op.V >= 0 && op.G >= 0,
               "lowrank: sizes must not be negative, found M=" << op.M << " D=" << op.D << " R=" << op.R
                                                               << " V=" << op.V << " G=" << op.G);
  XPATCH_CHECK(op.repeat >= 1 && op.M % op.repeat == 0,
               "lowrank: repeat must be at least 1 and divide M=" << op.M << ", found " << op.repeat);
  XPATCH_CHECK(op.M <= 1 || op.x_stride >= op.D,
               "lowrank: x row stride must be at least D=" << op.D << ", found " << op.x_stride);
  XPATCH_CHECK(op.R <= 1 || op.down_stride >= op.D,
               "lowrank: down row stride must be at least D=" << op.D << ", found " << op.down_stride);
  XPATCH_CHECK(op.R <= 1 || op.up_stride >= op.V,
               "lowrank: up row stride must be at least V=" << op.V << ", found " << op.up_stride);
  XPATCH_CHECK(op.x != nullptr || op.M * op.D == 0, "lowrank: x is a null pointer");
  XPATCH_CHECK(op.down != nullptr || op.R * op.D == 0, "lowrank: down is a null pointer");
  XPATCH_CHECK(op.up != nullptr || op.R * op.V == 0, "lowrank: up is a null pointer");
  XPATCH_CHECK(op.offsets != nullptr, "lowrank: offsets is a null pointer");
  XPATCH_CHECK(op.rows != nullptr || op.M * op.G == 0, "lowrank: rows is a null pointer");
  XPATCH_CHECK(op.out != nullptr || op.M * op.V == 0, "lowrank: out is a null pointer");
}

bool lowrank(const Lowrank& op, int threads) {
  check(op);
  XPATCH_CHECK(threads >= 1, "lowrank: threads must be at least 1, found " << threads);
  if (!offsets_are_right(op)) return false;
  if (op.M == 0 || op.V == 0) return true;
  const Selected selected = count(op);
  if (too_dense(op, selected)) return false;

  const double work = static_cast<double>(selected.ranks) * static_cast<double>(op.D + op.V);
  if (work < kSerialWork) threads = 1;
  // Every sum runs over the ranks in ascending order wherever a block begins, so blocks may follow the thread count.
  const int64_t block = std::max(kMinBlockRows, std::min(kMaxBlockRows, blocks(op.M, 2 * int64_t{threads})));
  const int64_t tasks = blocks(op.M, block);
  const int workers = static_cast<int>(std::min<int64_t>(threads, tasks));
  std::vector<Scratch> scratch;
  scratch.reserve(static_cast<size_t>(workers));
  for (int worker = 0; worker < workers; ++worker) scratch.emplace_back(op, std::min(block, op.M), selected.pairs);
  share_out(tasks, workers, [&](int64_t task, int64_t worker) {
    run_block(op, task * block, std::min(block, op.M - task * block), scratch[static_cast<size_t>(worker)]);
  });
  return true;
}

#if !defined(XPATCH_HAS_CUDA)
void lowrank_cuda(const Lowrank&, void*) {
  throw Error("lowrank: this build has no CUDA kernels (build option XPATCH_CUDA)");
}
#endif

}  // namespace xpatch
