// Checks, choice of kernel, and the blocking of the CPU path.
#include "ops/patch_ffn.h"

#include <algorithm>
#include <atomic>
#include <memory>

#include "core/check.h"
#include "core/parallel.h"
#include "screen/screen.h"

namespace xpatch {
namespace {

// Work is cut the same way whatever the number of threads. A block of rows and a block of keys stay in the L2 cache.
constexpr int64_t kPanelRows = 4096;  // rows whose bytes are held at once
constexpr int64_t kRowsAtOnce = 32;   // rows rounded together
constexpr int64_t kBlockRows = 192;
constexpr int64_t kBlockGroups = 32;  // more where rows are few, see block_groups()
constexpr size_t kKeysAhead = 2;      // survivors whose keys are asked for in advance
constexpr int64_t kBlockColumns = 256;
constexpr int64_t kValuesAtOnce = 32;     // value rows widened at once
constexpr int64_t kSerialWork = 1 << 20;  // multiply-adds below which waking threads costs more than it saves
constexpr int64_t kSmallWork =
    1 << 22;  // below this the call never gives up: a row's bits then do not depend on others
constexpr int64_t kSampledRows = 16, kSampledGroups = 16, kFewGroups = 8;

int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

template <typename T>
std::unique_ptr<T[]> allocate(int64_t count) {
  return std::unique_ptr<T[]>(new T[static_cast<size_t>(std::max<int64_t>(count, 1))]);
}

// What one neuron gives one row: never 0, NaN is possible.
struct Hit {
  int64_t neuron;
  int32_t row;  // within its block
  float h;
};

// The share of survivors above which dense matmuls are quicker. A survivor reads its key and value rows alone; a dense
// matmul reads each once for all rows, so the more rows, the better it gets. Measured, as is the next one.
double dense_above(int64_t M) { return M <= 2 ? 0.6 : M <= 8 ? 0.35 : 0.2; }

// The share of survivors above which the full stage pays beside the coarse one.
double full_above(int64_t M) { return M <= 2 ? 0.02 : 0.006; }

float fp32_at(const void* matrix, DType dtype, int64_t index) {
  float value;
  widen(static_cast<const char*>(matrix) + index * size_of(dtype), dtype, 1, &value);
  return value;
}

class Call {
 public:
  Call(const PatchFfn& op, const PackedKeys& packed, bool always, bool want_fired, int threads)
      : op_(op),
        packed_(packed),
        always_(always || op.M * op.N * (op.D + op.V) < kSmallWork),
        want_fired_(want_fired),
        threads_(op.M * op.N * op.D < kSerialWork ? 1 : threads),
        limit_(dense_above(op.M) * static_cast<double>(op.M) * static_cast<double>(op.N)) {}

  PatchFfnResult run() {
    const int64_t panel = std::min(op_.M, kPanelRows);
    bytes_ = allocate<int8_t>(panel * packed_.full.width());
    bounds_ = allocate<RowBound>(panel);
    rows_ = allocate<const float*>(panel);
    if (op_.dtype != DType::fp32 || op_.mask_inner != nullptr) copies_ = allocate<float>(panel * op_.D);
    for (int64_t row0 = 0; row0 < op_.M; row0 += panel) {
      const int64_t rows = std::min(panel, op_.M - row0);
      enter(row0, rows);
      if (row0 == 0 && !choose(rows)) return too_many();
      round(rows);
      if (!screen(rows)) return too_many();
      leave(row0, rows);
    }
    result_.survivors = survivors_;
    return std::move(result_);
  }

 private:
  // Rows [row0, row0 + rows), widened and masked.
  void enter(int64_t row0, int64_t rows) {
    for (int64_t m = 0; copies_ == nullptr && m < rows; ++m) {
      rows_[m] = static_cast<const float*>(op_.x) + (row0 + m) * op_.x_stride;
    }
    if (copies_ == nullptr) return;
    parallel_for(blocks(rows, kRowsAtOnce), rows * op_.D < (1 << 15) ? 1 : threads_, [&](int64_t block) {
      const int64_t end = std::min(rows, (block + 1) * kRowsAtOnce);
      for (int64_t m = block * kRowsAtOnce; m < end; ++m) {
        float* copy = copies_.get() + m * op_.D;
        widen(static_cast<const char*>(op_.x) + (row0 + m) * op_.x_stride * size_of(op_.dtype), op_.dtype, op_.D, copy);
        if (op_.mask_inner != nullptr) times_mask(op_.mask_inner, row0 + m, op_.D, 0, op_.D, copy);
        rows_[m] = copy;
      }
    });
  }

  // Rounds `count` rows, kRowsAtOnce at most, for the stage in use.
  void round(const int64_t* index, int64_t count) {
    const float* rows[kRowsAtOnce];
    for (int64_t i = 0; i < count; ++i) rows[i] = rows_[index[i]];
    const auto work = allocate<float>(op_.D);
    const auto projected = allocate<float>(coarse_ ? count * packed_.rank : 0);
    if (coarse_) screener_.project(rows, count, op_.D, packed_.basis, packed_.rank, projected.get());
    for (int64_t i = 0; i < count; ++i) {
      int8_t* bytes = bytes_.get() + index[i] * stage().width();
      RowBound* bound = &bounds_[index[i]];
      if (coarse_) {
        screener_.coarsen(rows[i], op_.D, projected.get() + i * packed_.rank, packed_.rank, packed_.skew, work.get(),
                          bytes, bound);
      } else {
        screener_.quantise(rows[i], op_.D, work.get(), bytes, bound);
      }
    }
  }

  // Rounds the rows of a panel but for those that are.
  void round(int64_t rows) {
    const auto rest = allocate<int64_t>(rows);
    int64_t count = 0, next = 0;
    for (int64_t m = 0; m < rows; ++m) {
      if (next < rounded_ && sampled_[next] == m) {
        ++next;
      } else {
        rest[count++] = m;
      }
    }
    parallel_for(blocks(count, kRowsAtOnce), rows * op_.D < (1 << 15) ? 1 : threads_, [&](int64_t block) {
      round(rest.get() + block * kRowsAtOnce, std::min(kRowsAtOnce, count - block * kRowsAtOnce));
    });
    rounded_ = 0;
  }

  const Stage& stage() const { return coarse_ ? packed_.coarse : packed_.full; }

  // The stage to use, by a look at a few rows and groups; false where neither pays.
  bool choose(int64_t rows) {
    const int64_t groups = op_.M <= 8 ? kFewGroups : kSampledGroups;
    coarse_ = packed_.basis != nullptr;
    if (coarse_ && sampled_share(rows, groups) > full_above(op_.M)) {
      coarse_ = false;
      rounded_ = 0;
    }
    result_.coarse = coarse_;
    // Twice the share: a sample is small, and the whole call stops by itself at its limit.
    return coarse_ || always_ || sampled_share(rows, groups) <= std::min(2.0 * dense_above(op_.M), 0.9);
  }

  // Rounds a few rows on the way.
  double sampled_share(int64_t rows, int64_t groups) {
    const int64_t some_rows = std::min(std::max<int64_t>(rows / 8, 1), kSampledRows);  // an eighth at most
    const int64_t some_groups = std::min({std::max<int64_t>(packed_.count / 8, 1), groups, packed_.count});
    for (int64_t j = 0; j < some_rows; ++j) sampled_[j] = j * rows / some_rows;
    round(sampled_, some_rows);
    rounded_ = some_rows;
    int64_t found = 0;
    for (int64_t j = 0; j < some_rows; ++j) {
      for (int64_t i = 0; i < some_groups; ++i) {
        Stage one = stage();
        one.groups += i * packed_.count / some_groups * one.stride;
        uint16_t mask;
        found += screener_.screen(bytes_.get() + sampled_[j] * one.width(), &bounds_[sampled_[j]], 1, one, 1, &mask);
      }
    }
    return static_cast<double>(found) / static_cast<double>(std::max<int64_t>(some_groups * some_rows * kGroup, 1));
  }

  // Few rows use no block of keys twice: then blocks are as large as the masks allow, so that the survivors of one,
  // whose keys lie anywhere in memory, are enough to ask for some while others are computed.
  int64_t block_groups(int64_t rows) const {
    const int64_t most = kBlockGroups * kBlockRows / std::min(rows, kBlockRows);
    return std::min(most, std::max(kBlockGroups, packed_.count / 16));
  }

  // False when it gave up.
  bool screen(int64_t rows) {
    row_blocks_ = blocks(rows, kBlockRows);
    block_groups_ = block_groups(rows);
    const int64_t key_blocks = blocks(packed_.count, block_groups_);
    hits_.clear();
    hits_.resize(static_cast<size_t>(row_blocks_ * key_blocks));
    std::atomic<bool> stop{false};
    parallel_for(row_blocks_ * key_blocks, threads_, [&](int64_t task) {
      if (stop.load(std::memory_order_relaxed)) return;
      const int64_t row = task % row_blocks_ * kBlockRows, group = task / row_blocks_ * block_groups_;
      const int64_t block_rows = std::min(kBlockRows, rows - row);
      const int64_t block_groups = std::min(block_groups_, packed_.count - group);
      uint16_t masks[kBlockGroups * kBlockRows];
      Stage here = stage();
      here.groups += group * here.stride;
      int64_t found =
          screener_.screen(bytes_.get() + row * here.width(), &bounds_[row], block_rows, here, block_groups, masks);
      // A row that cannot be screened keeps every lane of the last group, those beyond N too.
      const int64_t beyond = (group + block_groups) * kGroup - op_.N;
      for (int64_t m = 0; beyond > 0 && m < block_rows; ++m) {
        uint16_t& last = masks[(block_groups - 1) * block_rows + m];
        for (int more = last >> (kGroup - beyond); more != 0; more &= more - 1) --found;
        last = static_cast<uint16_t>(last & (0xFFFF >> beyond));
      }
      if (found == 0) return;
      const int64_t total = survivors_.fetch_add(found, std::memory_order_relaxed) + found;
      if (!always_ && static_cast<double>(total) > limit_) {
        stop.store(true, std::memory_order_relaxed);
        return;
      }
      compute(masks, row, block_rows, group, block_groups, found, hits_[static_cast<size_t>(task)]);
    });
    result_.pairs += rows * op_.N;
    return !stop.load();
  }

  // The survivors of a block in fp32, key by key, so that a key is read once for all its rows.
  void compute(const uint16_t* masks, int64_t row, int64_t rows, int64_t group, int64_t groups, int64_t found,
               std::vector<Hit>& hits) const {
    std::vector<int64_t> survivors;  // in ascending order
    for (int64_t g = 0; g < groups; ++g) {
      uint32_t any = 0;
      for (int64_t m = 0; m < rows; ++m) any |= masks[g * rows + m];
      for (int64_t i = 0; any >> i != 0; ++i) {
        const int64_t neuron = (group + g) * kGroup + i;
        if ((any >> i & 1) != 0 && neuron < op_.N) survivors.push_back(neuron);
      }
    }
    const auto copy = op_.dtype == DType::fp32 ? nullptr : allocate<float>(op_.D);
    const float* chosen[kBlockRows];
    int32_t index[kBlockRows];
    float h[kBlockRows];
    hits.reserve(static_cast<size_t>(found));
    for (size_t next = 0; next < survivors.size(); ++next) {
      const int64_t neuron = survivors[next];
      if (next + kKeysAhead < survivors.size()) ask_for(key_at(survivors[next + kKeysAhead]));
      const uint16_t* mask = masks + (neuron / kGroup - group) * rows;
      int64_t count = 0;
      for (int64_t m = 0; m < rows; ++m) {
        if ((mask[m] >> (neuron % kGroup) & 1) == 0) continue;
        chosen[count] = rows_[row + m];
        index[count++] = static_cast<int32_t>(m);
      }
      const float* key = reinterpret_cast<const float*>(key_at(neuron));
      if (copy != nullptr) {
        widen(key_at(neuron), op_.dtype, op_.D, copy.get());
        key = copy.get();
      }
      kernels_.scores(chosen, count, key, fp32_at(op_.bias, op_.dtype, neuron), op_.D, op_.activation, h);
      for (int64_t k = 0; k < count; ++k) {
        if (h[k] != 0.0f) hits.push_back({neuron, index[k], h[k]});  // NaN is not equal to 0
      }
    }
  }

  const char* key_at(int64_t neuron) const {
    return static_cast<const char*>(op_.keys) + neuron * op_.keys_stride * size_of(op_.dtype);
  }

  void ask_for(const char* key) const {
#if defined(__GNUC__)
    for (int64_t i = 0; i < op_.D * size_of(op_.dtype); i += 64) __builtin_prefetch(key + i, 0, 2);
#else
    static_cast<void>(key);
#endif
  }

  // Adds the values of what fired.
  void leave(int64_t row0, int64_t rows) {
    const int64_t key_blocks = blocks(packed_.count, block_groups_);
    std::vector<std::vector<int64_t>> fired(static_cast<size_t>(row_blocks_));
    const int64_t column_blocks = rows >= 8 || op_.V == 0 ? 1 : blocks(op_.V, kBlockColumns);
    const int64_t columns = column_blocks == 1 ? op_.V : kBlockColumns;
    parallel_for(row_blocks_ * column_blocks, threads_, [&](int64_t task) {
      const int64_t block = task % row_blocks_, column = task / row_blocks_ * columns;
      const int64_t block_rows = std::min(kBlockRows, rows - block * kBlockRows);
      // Hits lie by key block, then by key: sorting them stably by row leaves each row's neurons in ascending order.
      int64_t first[kBlockRows + 1] = {};
      for (int64_t k = 0; k < key_blocks; ++k) {
        for (const Hit& hit : hits_[static_cast<size_t>(k * row_blocks_ + block)]) ++first[hit.row + 1];
      }
      for (int64_t m = 0; m < block_rows; ++m) first[m + 1] += first[m];
      const int64_t total = first[block_rows];
      const auto neurons = allocate<int64_t>(total);
      const auto weights = allocate<float>(total);
      int64_t next[kBlockRows];
      std::copy(first, first + block_rows, next);
      for (int64_t k = 0; k < key_blocks; ++k) {
        for (const Hit& hit : hits_[static_cast<size_t>(k * row_blocks_ + block)]) {
          const int64_t at = next[hit.row]++;
          neurons[at] = hit.neuron;
          weights[at] = hit.h;
        }
      }
      const auto values = allocate<const float*>(total);
      for (int64_t m = 0; m < block_rows; ++m) {
        const int64_t row = row0 + block * kBlockRows + m, count = first[m + 1] - first[m];
        add_values(row, neurons.get() + first[m], weights.get() + first[m], values.get(), count, column,
                   std::min(columns, op_.V - column));
        for (int64_t i = first[m]; want_fired_ && column == 0 && i < first[m + 1]; ++i) {
          if (!(weights[i] > 0.0f)) continue;
          fired[static_cast<size_t>(block)].push_back(row);
          fired[static_cast<size_t>(block)].push_back(neurons[i]);
        }
      }
    });
    for (const auto& pairs : fired) result_.fired.insert(result_.fired.end(), pairs.begin(), pairs.end());
  }

  // out[row, column : column + columns]
  void add_values(int64_t row, const int64_t* neurons, const float* weights, const float** values, int64_t count,
                  int64_t column, int64_t columns) const {
    const bool wide = op_.dtype == DType::fp32;
    char* target = static_cast<char*>(op_.out) + (row * op_.V + column) * size_of(op_.dtype);
    if (count == 0) {
      std::fill(target, target + columns * size_of(op_.dtype), 0);
      return;
    }
    const char* start = static_cast<const char*>(op_.values) + column * size_of(op_.dtype);
    const auto sum_copy = wide ? nullptr : allocate<float>(columns);
    float* sums = wide ? reinterpret_cast<float*>(target) : sum_copy.get();
    if (wide) {
      for (int64_t i = 0; i < count; ++i) {
        values[i] = reinterpret_cast<const float*>(start) + neurons[i] * op_.values_stride;
      }
      kernels_.mix(weights, values, count, columns, false, sums);
    } else {
      const auto copy = allocate<float>(kValuesAtOnce * columns);
      for (int64_t i = 0; i < count; i += kValuesAtOnce) {
        const int64_t some = std::min(kValuesAtOnce, count - i);
        for (int64_t j = 0; j < some; ++j) {
          widen(start + neurons[i + j] * op_.values_stride * size_of(op_.dtype), op_.dtype, columns,
                copy.get() + j * columns);
          values[j] = copy.get() + j * columns;
        }
        kernels_.mix(weights + i, values, some, columns, i > 0, sums);
      }
    }
    if (op_.mask_outer != nullptr) times_mask(op_.mask_outer, row, op_.V, column, columns, sums);
    if (!wide) narrow(sums, columns, op_.dtype, target);
  }

  // row[columns] *= mask[language[m], column : column + columns], a mask of `width` columns
  void times_mask(const void* mask, int64_t m, int64_t width, int64_t column, int64_t columns, float* row) const {
    const int64_t first = op_.language[m] * width + column;
    for (int64_t i = 0; i < columns; ++i) row[i] *= fp32_at(mask, op_.dtype, first + i);
  }

  PatchFfnResult too_many() {
    PatchFfnResult result;
    result.too_many = true;
    result.pairs = op_.M * op_.N;
    result.survivors = survivors_;
    return result;
  }

  const PatchFfn& op_;
  const PackedKeys& packed_;
  const bool always_, want_fired_;
  const int threads_;
  const double limit_;
  const ScreenKernels& screener_ = XPATCH_KERNELS(screen_kernels);
  const PatchFfnKernels& kernels_ = XPATCH_KERNELS(patch_ffn_kernels);
  bool coarse_ = false;
  int64_t row_blocks_ = 0, block_groups_ = 0;
  std::unique_ptr<int8_t[]> bytes_;
  std::unique_ptr<RowBound[]> bounds_;
  std::unique_ptr<const float*[]> rows_;
  int64_t sampled_[kSampledRows];  // in ascending order
  int64_t rounded_ = 0;            // how many of them are rounded for the stage in use
  std::unique_ptr<float[]> copies_;
  std::vector<std::vector<Hit>> hits_;  // [key block][row block]
  std::atomic<int64_t> survivors_{0};
  PatchFfnResult result_;
};

}  // namespace

void check(const PatchFfn& op) {
  XPATCH_CHECK(
      op.M >= 0 && op.D >= 0 && op.N >= 0 && op.V >= 0,
      "patch_ffn: sizes must not be negative, found M=" << op.M << " D=" << op.D << " N=" << op.N << " V=" << op.V);
  XPATCH_CHECK(op.M <= 1 || op.x_stride >= op.D,
               "patch_ffn: x row stride must be at least D=" << op.D << ", found " << op.x_stride);
  XPATCH_CHECK(op.N <= 1 || op.keys_stride >= op.D,
               "patch_ffn: keys row stride must be at least D=" << op.D << ", found " << op.keys_stride);
  XPATCH_CHECK(op.N <= 1 || op.values_stride >= op.V,
               "patch_ffn: values row stride must be at least V=" << op.V << ", found " << op.values_stride);
  XPATCH_CHECK(op.x != nullptr || op.M * op.D == 0, "patch_ffn: x is a null pointer");
  XPATCH_CHECK(op.keys != nullptr || op.N * op.D == 0, "patch_ffn: keys is a null pointer");
  XPATCH_CHECK(op.bias != nullptr || op.N == 0, "patch_ffn: bias is a null pointer");
  XPATCH_CHECK(op.values != nullptr || op.N * op.V == 0, "patch_ffn: values is a null pointer");
  XPATCH_CHECK(op.out != nullptr || op.M * op.V == 0, "patch_ffn: out is a null pointer");
  const bool masked = op.mask_inner != nullptr || op.mask_outer != nullptr;
  XPATCH_CHECK(!masked || op.language != nullptr || op.M == 0, "patch_ffn: language is a null pointer beside masks");
}

PatchFfnResult patch_ffn(const PatchFfn& op, const uint8_t* packed, int64_t packed_bytes, bool always, bool want_fired,
                         int threads) {
  check(op);
  XPATCH_CHECK(threads >= 1, "patch_ffn: threads must be at least 1, found " << threads);
  const PackedKeys keys = read_packed(packed, packed_bytes, op.N, op.D, op.activation);
  if (op.mask_inner != nullptr || op.mask_outer != nullptr) {
    for (int64_t m = 0; m < op.M; ++m) {
      XPATCH_CHECK(op.language[m] >= 0 && op.language[m] < op.L,
                   "patch_ffn: language of row " << m << " must be in [0, " << op.L << "), found " << op.language[m]);
    }
  }
  if (op.M == 0) return {};
  return Call(op, keys, always, want_fired, threads).run();
}

#if !defined(XPATCH_HAS_CUDA)
void patch_ffn_cuda(const PatchFfn&, void*) {
  throw Error("patch_ffn: this build has no CUDA kernels (build option XPATCH_CUDA)");
}

int64_t patch_ffn_cuda_workspace(const PatchFfn&) { return 0; }
#endif

}  // namespace xpatch
