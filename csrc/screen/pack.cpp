// Packing keys, and reading packed keys back.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "core/check.h"
#include "core/pages.h"
#include "core/parallel.h"
#include "screen/screen.h"

namespace xpatch {
namespace {

// What stands before the groups. Both ends are this program: the bytes never leave the process.
struct Header {
  char magic[8];
  int64_t N, D, rank;
  int32_t activation;
  float skew;
  int64_t bytes;
  int64_t reserved[2];
};
static_assert(sizeof(Header) == 64, "one cache line");
constexpr char kMagic[8] = {'x', 'p', 'k', 'e', 'y', 's', '1', '\0'};

constexpr double kUnit = 0x1.0p-24;  // half an ulp of 1 in fp32
constexpr int64_t kConsts = 4 * kGroup;
constexpr double kSkewAtMost = 0.01;
constexpr int64_t kMaxRank = 1024;
constexpr float kMostBias = 0x1.0p126f;
constexpr int32_t kBalls = -1;  // stands in the header where keys of neurons have their activation

int64_t groups_of(int64_t N) { return (N + kGroup - 1) / kGroup; }

// Where things lie: header, basis, groups of the coarse stage, groups of the full stage; all at multiples of 64.
struct Layout {
  int64_t basis = 0, coarse = 0, full = 0, bytes = 0;
  Stage coarse_stage, full_stage;

  Layout(int64_t N, int64_t D, int64_t rank) {
    coarse_stage = stage_of(rank);
    full_stage = stage_of(D);
    basis = sizeof(Header);
    coarse = basis + (rank + kPanel - 1) / kPanel * kPanel * D * static_cast<int64_t>(sizeof(float));
    full = coarse + (rank > 0 ? groups_of(N) * coarse_stage.stride : 0);
    bytes = full + groups_of(N) * full_stage.stride;
  }

  static Stage stage_of(int64_t width) {
    Stage stage;
    stage.steps = (width + 3) / 4;
    stage.stride = stage.steps * kStepBytes + kConsts * static_cast<int64_t>(sizeof(float));
    return stage;
  }
};

// The smallest fp32 number that is not below `value`, but -max for what is below that.
float round_up(double value) {
  if (value < -static_cast<double>(std::numeric_limits<float>::max())) return -std::numeric_limits<float>::max();
  float rounded = static_cast<float>(value);
  if (static_cast<double>(rounded) < value) rounded = std::nextafter(rounded, std::numeric_limits<float>::infinity());
  return rounded;
}

// a, b, c and e of one key (screen.h); PROOF.md, section 3, has every term. `slip`: further rounding, as a share of
// the product of the norms (section 6).
void bounds_of(const int8_t* bytes, const RowBound& key, float bias, float cut, int64_t D, int64_t width, double slip,
               float* consts) {
  float &a = consts[0], &b = consts[kGroup], &c = consts[2 * kGroup], &e = consts[3 * kGroup];
  // A score that overflows to -inf is 0 after relu, but NaN after the others (PROOF.md, section 4).
  const bool vast = cut != 0.0f && std::fabs(bias) > kMostBias;
  if (key.odd || vast || !std::isfinite(bias)) {
    a = b = e = 0.0f;
    c = std::numeric_limits<float>::infinity();
    return;
  }
  int32_t squares = 0;  // at most 127^2 * 32 768
  for (int64_t d = 0; d < width; ++d) squares += static_cast<int32_t>(bytes[d]) * bytes[d];
  const double whole = std::sqrt(static_cast<double>(squares)), norm = key.norm;
  const double rounding = (static_cast<double>(width) + 128.0) * kUnit;
  a = round_up(whole * (1.0 + 32.0 * kUnit));
  b = round_up((key.error + rounding * (norm + whole) + slip * norm) * (1.0 + 32.0 * kUnit));
  e = round_up(static_cast<double>(key.rest) * (1.0 + 32.0 * kUnit));
  const double offset = (static_cast<double>(bias) - static_cast<double>(cut)) * key.scale;
  // The fp32 sum may take the bias in anywhere: it is rounded as often as the products are.
  const double summed = (static_cast<double>(D) + 128.0) * kUnit * std::fabs(static_cast<double>(bias)) * key.scale;
  const double slack = 32.0 * kUnit * std::fabs(offset) + summed;
  c = round_up(offset + slack);
}

// >= the norm of basis basis^T - I
double skew_of(const float* basis, int64_t rank, int64_t D) {
  double squares = 0.0;
  for (int64_t i = 0; i < rank; ++i) {
    for (int64_t j = 0; j <= i; ++j) {
      double product = 0.0;
      for (int64_t d = 0; d < D; ++d) product += static_cast<double>(basis[i * D + d]) * basis[j * D + d];
      const double off = i == j ? product - 1.0 : product;
      squares += (i == j ? 1.0 : 2.0) * off * off;
    }
  }
  return std::sqrt(squares) * (1.0 + 1e-6) + 1e-12;
}

// Writes the bytes of one key into its lane of a group.
void put_key(const int8_t* bytes, int64_t steps, int64_t lane, uint8_t* group) {
  for (int64_t s = 0; s < steps; ++s) {
    uint32_t four;
    std::memcpy(&four, bytes + 4 * s, sizeof four);
    four ^= 0x80808080u;  // adds 128 to each byte
    std::memcpy(group + s * kStepBytes + 4 * lane, &four, sizeof four);
  }
}

void begin_group(const Stage& stage, uint8_t* group, float* consts) {
  std::memset(group, 128, static_cast<size_t>(stage.steps * kStepBytes));
  for (int64_t i = 0; i < kConsts; ++i) {
    consts[i] = i / kGroup == 2 ? -std::numeric_limits<float>::max() : 0.0f;  // what lanes beyond N keep
  }
}

// What both kinds of packed keys share; `kind` is the activation's code or kBalls.
PackedKeys read(const uint8_t* packed, int64_t bytes, int64_t N, int64_t D, int32_t kind) {
  XPATCH_CHECK(packed != nullptr && bytes >= static_cast<int64_t>(sizeof(Header)),
               "packed keys: expected at least " << sizeof(Header) << " bytes, found " << bytes);
  Header header;
  std::memcpy(&header, packed, sizeof header);
  XPATCH_CHECK(std::memcmp(header.magic, kMagic, sizeof kMagic) == 0,
               "packed keys: these bytes were not written by pack_keys or pack_balls");
  XPATCH_CHECK(header.N == N && header.D == D && header.activation == kind,
               "packed keys: expected N=" << N << " D=" << D << " activation code " << kind << "; found N=" << header.N
                                          << " D=" << header.D << " activation code " << header.activation << " ("
                                          << kBalls << ": balls); pack the keys that are served");
  XPATCH_CHECK(D >= 1 && D <= kMaxScreenedWidth && N >= 0 && header.rank >= 0 && header.rank <= std::min(D, kMaxRank) &&
                   header.skew >= 0.0f && header.skew <= static_cast<float>(kSkewAtMost) * 1.01f,
               "packed keys: the header is damaged (rank " << header.rank << ", skew " << header.skew << ")");
  const Layout layout(N, D, header.rank);
  XPATCH_CHECK(header.bytes == layout.bytes && bytes == layout.bytes,
               "packed keys: expected " << layout.bytes << " bytes, found " << bytes << " (" << header.bytes
                                        << " by their header)");
  PackedKeys view;
  view.N = N;
  view.D = D;
  view.count = groups_of(N);
  view.full = layout.full_stage;
  view.full.groups = packed + layout.full;
  if (header.rank > 0) {
    view.coarse = layout.coarse_stage;
    view.coarse.groups = packed + layout.coarse;
    view.basis = reinterpret_cast<const float*>(packed + layout.basis);
    view.rank = header.rank;
    view.skew = header.skew;
  }
  return view;
}

}  // namespace

float cut_off(Activation activation) {
  switch (activation) {
    case Activation::relu:
      return 0.0f;
    case Activation::gelu:
      return -5.543f;
    case Activation::gelu_tanh:
      return -5.158f;
    case Activation::silu:
      return -88.723f;
    default:
      return -std::numeric_limits<float>::infinity();
  }
}

bool can_screen(Activation activation, int64_t D) {
  return activation != Activation::identity && D >= 1 && D <= kMaxScreenedWidth;
}

int64_t packed_bytes(int64_t N, int64_t D, int64_t rank) { return Layout(N, D, rank).bytes; }

void pack_keys(const void* keys, int64_t keys_stride, const void* bias, DType dtype, int64_t N, int64_t D,
               Activation activation, const float* basis, int64_t rank, uint8_t* packed, int threads) {
  XPATCH_CHECK(can_screen(activation, D), "pack_keys: these keys cannot be screened: expected 1 <= D <= "
                                              << kMaxScreenedWidth << " and an activation with a cut-off; found D=" << D
                                              << ", activation code " << static_cast<int>(activation));
  XPATCH_CHECK(N >= 0, "pack_keys: N must not be negative, found " << N);
  XPATCH_CHECK(N <= 1 || keys_stride >= D,
               "pack_keys: keys row stride must be at least D=" << D << ", found " << keys_stride);
  XPATCH_CHECK((keys != nullptr && bias != nullptr) || N == 0, "pack_keys: keys or bias is a null pointer");
  XPATCH_CHECK(packed != nullptr, "pack_keys: packed is a null pointer");
  XPATCH_CHECK(threads >= 1, "pack_keys: threads must be at least 1, found " << threads);
  XPATCH_CHECK(
      rank >= 0 && rank <= std::min(D, kMaxRank) && (rank == 0) == (basis == nullptr),
      "pack_keys: expected a basis of at most " << std::min(D, kMaxRank) << " directions, found rank " << rank);
  const Layout layout(N, D, rank);
  ask_for_large_pages(packed, layout.bytes);
  Header header = {};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.N = N;
  header.D = D;
  header.rank = rank;
  header.activation = static_cast<int32_t>(activation);
  header.bytes = layout.bytes;
  if (rank > 0) {
    const double skew = skew_of(basis, rank, D);
    XPATCH_CHECK(skew <= kSkewAtMost, "pack_keys: the basis is not orthonormal: expected |basis basis^T - I| <= "
                                          << kSkewAtMost << ", found " << skew);
    header.skew = round_up(skew);
    float* panels = reinterpret_cast<float*>(packed + layout.basis);
    std::fill(panels, reinterpret_cast<float*>(packed + layout.coarse), 0.0f);
    for (int64_t i = 0; i < rank; ++i) {
      for (int64_t d = 0; d < D; ++d) panels[(i / kPanel * D + d) * kPanel + i % kPanel] = basis[i * D + d];
    }
  }
  std::memcpy(packed, &header, sizeof header);

  const ScreenKernels& kernels = XPATCH_KERNELS(screen_kernels);
  const float cut = cut_off(activation);
  const Stage &full = layout.full_stage, &coarse = layout.coarse_stage;
  // Rounding of the projections on both sides, of inverting basis basis^T, and of the fp32 score (PROOF.md, section 6).
  const double slip = 2.1 * 1.01 * (static_cast<double>(D) + 8.0) * kUnit * std::sqrt(static_cast<double>(rank)) +
                      1.03 * header.skew + (static_cast<double>(D) + 16.0) * kUnit;
  parallel_for(groups_of(N), N * D < (1 << 16) ? 1 : threads, [&](int64_t g) {
    // Heap and not stack: D is the caller's. One allocation a group of 16 keys does not show.
    const std::unique_ptr<float[]> floats(new float[static_cast<size_t>(kGroup * (D + rank) + D)]);
    const std::unique_ptr<int8_t[]> bytes(new int8_t[static_cast<size_t>(full.width())]);
    float *copies = floats.get(), *projected = copies + kGroup * D, *work = projected + kGroup * rank;
    const float* rows[kGroup];
    float biases[kGroup], consts[kConsts];
    const int64_t first = g * kGroup, count = std::min(kGroup, N - first);
    for (int64_t i = 0; i < count; ++i) {
      rows[i] = copies + i * D;
      widen(static_cast<const char*>(keys) + (first + i) * keys_stride * size_of(dtype), dtype, D, copies + i * D);
    }
    widen(static_cast<const char*>(bias) + first * size_of(dtype), dtype, count, biases);

    uint8_t* group = packed + layout.full + g * full.stride;
    begin_group(full, group, consts);
    for (int64_t i = 0; i < count; ++i) {
      RowBound bound;
      kernels.quantise(rows[i], D, work, bytes.get(), &bound);
      bounds_of(bytes.get(), bound, biases[i], cut, D, D, 0.0, consts + i);
      put_key(bytes.get(), full.steps, i, group);
    }
    std::memcpy(group + full.steps * kStepBytes, consts, sizeof consts);
    if (rank == 0) return;

    group = packed + layout.coarse + g * coarse.stride;
    begin_group(coarse, group, consts);
    kernels.project(rows, count, D, reinterpret_cast<const float*>(packed + layout.basis), rank, projected);
    for (int64_t i = 0; i < count; ++i) {
      RowBound bound;
      kernels.coarsen(rows[i], D, projected + i * rank, rank, header.skew, work, bytes.get(), &bound);
      bounds_of(bytes.get(), bound, biases[i], cut, D, rank, slip, consts + i);
      put_key(bytes.get(), coarse.steps, i, group);
    }
    std::memcpy(group + coarse.steps * kStepBytes, consts, sizeof consts);
  });
}

PackedKeys read_packed(const uint8_t* packed, int64_t bytes, int64_t N, int64_t D, Activation activation) {
  XPATCH_CHECK(can_screen(activation, D), "packed keys: these keys cannot be screened: D="
                                              << D << ", activation code " << static_cast<int>(activation));
  PackedKeys view = read(packed, bytes, N, D, static_cast<int32_t>(activation));
  view.activation = activation;
  return view;
}

// --- Balls ---------------------------------------------------------------------------------------------------------
//
// |x - k| <= R is x.k + (R^2 - |k|^2) / 2 - |x|^2 / 2 >= 0: a score with a bias of the key's and one of the row's. The
// bytes bound x.k from above as for neurons (a and b), c the key's bias, e * rest the row's, all in both scales.
//
// R is above the radius r, for the kernel compares fp32 distances. Its squared distance is at least (1 - (D + 4) u) of
// the exact one less D 2^-125 (what underflow may take), the root another 1 - u; with
//     R^2 = r^2 (1 + 2 (D + 32) u) + D 2^-124
// an exact distance above R gives an fp32 distance above r: (1 + 2 (D + 32) u) (1 - (D + 4) u) > (1 + 2 u)^2 while
// D u <= 2^-9, which kMaxScreenedWidth grants.
//
// The row's bias is negative, so both of its factors are rounded towards zero. The four roundings of the final sum are
// relative to |S|, |c scale|, |rest e| and the rest: b, c and a hold slack for theirs, and the 16 u taken off e cover
// those of rest e. Largest and least coordinates of what can be screened (screen_cpu.cpp) keep every product finite:
// |rest e| < 2^125, and above 2^-83 unless the row is 0, so that flushing to zero is far below that slack.

void pack_balls(const void* keys, int64_t keys_stride, const void* radii, DType dtype, int64_t K, int64_t D,
                uint8_t* packed, int threads) {
  XPATCH_CHECK(D >= 1 && D <= kMaxScreenedWidth,
               "pack_balls: expected 1 <= D <= " << kMaxScreenedWidth << ", found D=" << D);
  XPATCH_CHECK(K >= 0, "pack_balls: K must not be negative, found " << K);
  XPATCH_CHECK(K <= 1 || keys_stride >= D,
               "pack_balls: keys row stride must be at least D=" << D << ", found " << keys_stride);
  XPATCH_CHECK((keys != nullptr && radii != nullptr) || K == 0, "pack_balls: keys or radii is a null pointer");
  XPATCH_CHECK(packed != nullptr, "pack_balls: packed is a null pointer");
  XPATCH_CHECK(threads >= 1, "pack_balls: threads must be at least 1, found " << threads);
  const Layout layout(K, D, 0);
  ask_for_large_pages(packed, layout.bytes);
  Header header = {};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.N = K;
  header.D = D;
  header.activation = kBalls;
  header.bytes = layout.bytes;
  std::memcpy(packed, &header, sizeof header);

  const ScreenKernels& kernels = XPATCH_KERNELS(screen_kernels);
  const Stage& stage = layout.full_stage;
  const double width = static_cast<double>(D);
  parallel_for(groups_of(K), K * D < (1 << 16) ? 1 : threads, [&](int64_t g) {
    const std::unique_ptr<float[]> floats(new float[static_cast<size_t>(2 * D)]);
    const std::unique_ptr<int8_t[]> bytes(new int8_t[static_cast<size_t>(stage.width())]);
    float *key = floats.get(), *work = key + D;
    float consts[kConsts];
    uint8_t* group = packed + layout.full + g * stage.stride;
    begin_group(stage, group, consts);
    for (int64_t i = 0; i < std::min(kGroup, K - g * kGroup); ++i) {
      const int64_t k = g * kGroup + i;
      widen(static_cast<const char*>(keys) + k * keys_stride * size_of(dtype), dtype, D, key);
      float radius;
      widen(static_cast<const char*>(radii) + k * size_of(dtype), dtype, 1, &radius);
      double squares = 0.0;
      for (int64_t d = 0; d < D; ++d) squares += static_cast<double>(key[d]) * key[d];
      squares *= 1.0 - (width + 16.0) * 0x1.0p-53;
      const double reach = static_cast<double>(radius) * radius * (1.0 + 2.0 * (width + 32.0) * kUnit);
      const double bias = (reach + width * 0x1.0p-124 - squares) / 2.0;
      RowBound bound;
      kernels.quantise(key, D, work, bytes.get(), &bound);
      // Not finite, also for a radius that is: it survives always.
      const bool fits = bias <= static_cast<double>(kMostBias);
      bounds_of(bytes.get(), bound, fits ? round_up(bias) : std::numeric_limits<float>::infinity(), 0.0f, D, D, 0.0,
                consts + i);
      if (std::isfinite(consts[2 * kGroup + i])) {
        consts[3 * kGroup + i] = static_cast<float>(static_cast<double>(bound.scale) * (1.0 - 16.0 * kUnit));
      }
      put_key(bytes.get(), stage.steps, i, group);
    }
    std::memcpy(group + stage.steps * kStepBytes, consts, sizeof consts);
  });
}

PackedKeys read_packed_balls(const uint8_t* packed, int64_t bytes, int64_t K, int64_t D) {
  return read(packed, bytes, K, D, kBalls);
}

float ball_rest(float squares, float scale, int64_t D) {
  const double least = static_cast<double>(squares) * (1.0 - (static_cast<double>(D) + 16.0) * kUnit);
  return static_cast<float>(-0.5 * least * static_cast<double>(scale) * (1.0 - 2.0 * kUnit));
}

}  // namespace xpatch
