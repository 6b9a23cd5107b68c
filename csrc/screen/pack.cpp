// Packing keys, and reading packed keys back.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>

#include "core/check.h"
#include "core/parallel.h"
#include "screen/screen.h"

namespace xpatch {
namespace {

// What stands before the groups. Both ends are this program: the bytes never leave the process.
struct Header {
  char magic[8];
  int64_t N, D, count, steps, stride;
  int32_t activation;
  int32_t reserved;
  int64_t bytes;
};
static_assert(sizeof(Header) == 64, "one cache line");
constexpr char kMagic[8] = {'x', 'p', 'k', 'e', 'y', 's', '1', '\0'};

constexpr double kUnit = 0x1.0p-24;  // half an ulp of 1 in fp32
constexpr int64_t kConstBytes = 3 * kGroup * sizeof(float);

int64_t groups_of(int64_t N) { return (N + kGroup - 1) / kGroup; }
int64_t steps_of(int64_t D) { return (D + 3) / 4; }
int64_t stride_of(int64_t D) { return steps_of(D) * kStepBytes + kConstBytes; }

// The smallest fp32 number that is not below `value`.
float round_up(double value) {
  if (value < -static_cast<double>(std::numeric_limits<float>::max())) return -std::numeric_limits<float>::max();
  float rounded = static_cast<float>(value);
  if (static_cast<double>(rounded) < value) rounded = std::nextafter(rounded, std::numeric_limits<float>::infinity());
  return rounded;
}

// a, b and c of one key (screen.h); PROOF.md, section 3, numbers every term.
void bounds_of(const int8_t* bytes, const RowBound& key, float bias, float cut, int64_t D, float* consts) {
  float &a = consts[0], &b = consts[kGroup], &c = consts[2 * kGroup];
  if (key.odd || !std::isfinite(bias)) {
    a = b = 0.0f;
    c = std::numeric_limits<float>::infinity();
    return;
  }
  int32_t squares = 0;  // at most 127^2 * 32 768
  for (int64_t d = 0; d < D; ++d) squares += static_cast<int32_t>(bytes[d]) * bytes[d];
  const double whole = std::sqrt(static_cast<double>(squares)), norm = key.norm;
  const double rounding = (static_cast<double>(D) + 128.0) * kUnit;
  a = round_up(whole * (1.0 + 16.0 * kUnit));
  b = round_up((key.error + rounding * (norm + whole)) * (1.0 + 16.0 * kUnit));
  const double offset = (static_cast<double>(bias) - static_cast<double>(cut)) * key.scale;
  const double slack = 32.0 * kUnit * (std::fabs(offset) + std::fabs(static_cast<double>(bias)) * key.scale);
  c = round_up(offset + slack);
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

int64_t packed_bytes(int64_t N, int64_t D) {
  return static_cast<int64_t>(sizeof(Header)) + groups_of(N) * stride_of(D);
}

void pack_keys(const void* keys, int64_t keys_stride, const void* bias, DType dtype, int64_t N, int64_t D,
               Activation activation, uint8_t* packed, int threads) {
  XPATCH_CHECK(can_screen(activation, D), "pack_keys: these keys cannot be screened: expected 1 <= D <= "
                                              << kMaxScreenedWidth << " and an activation with a cut-off; found D=" << D
                                              << ", activation code " << static_cast<int>(activation));
  XPATCH_CHECK(N >= 0, "pack_keys: N must not be negative, found " << N);
  XPATCH_CHECK(N <= 1 || keys_stride >= D,
               "pack_keys: keys row stride must be at least D=" << D << ", found " << keys_stride);
  XPATCH_CHECK((keys != nullptr && bias != nullptr) || N == 0, "pack_keys: keys or bias is a null pointer");
  XPATCH_CHECK(packed != nullptr, "pack_keys: packed is a null pointer");
  XPATCH_CHECK(threads >= 1, "pack_keys: threads must be at least 1, found " << threads);
  Header header = {};
  std::memcpy(header.magic, kMagic, sizeof kMagic);
  header.N = N;
  header.D = D;
  header.count = groups_of(N);
  header.steps = steps_of(D);
  header.stride = stride_of(D);
  header.activation = static_cast<int32_t>(activation);
  header.bytes = packed_bytes(N, D);
  std::memcpy(packed, &header, sizeof header);

  const ScreenKernels& kernels = XPATCH_KERNELS(screen_kernels);
  const float cut = cut_off(activation);
  const int64_t width = 4 * header.steps;
  parallel_for(header.count, N * D < (1 << 16) ? 1 : threads, [&](int64_t g) {
    uint8_t* group = packed + sizeof(Header) + g * header.stride;
    // Heap and not stack: D is the caller's. One allocation a group of 16 keys does not show.
    const std::unique_ptr<float[]> key(new float[static_cast<size_t>(2 * D)]);
    const std::unique_ptr<int8_t[]> bytes(new int8_t[static_cast<size_t>(width)]);
    float consts[3 * kGroup];
    std::memset(group, 128, static_cast<size_t>(header.steps * kStepBytes));
    for (int64_t i = 0; i < kGroup; ++i) {
      const int64_t n = g * kGroup + i;
      if (n >= N) {
        consts[i] = consts[kGroup + i] = 0.0f;
        consts[2 * kGroup + i] = -std::numeric_limits<float>::max();
        continue;
      }
      widen(static_cast<const char*>(keys) + n * keys_stride * size_of(dtype), dtype, D, key.get());
      float own_bias;
      widen(static_cast<const char*>(bias) + n * size_of(dtype), dtype, 1, &own_bias);
      RowBound bound;
      kernels.quantise(key.get(), D, key.get() + D, bytes.get(), &bound);
      bounds_of(bytes.get(), bound, own_bias, cut, D, consts + i);
      for (int64_t s = 0; s < header.steps; ++s) {
        uint32_t four;
        std::memcpy(&four, bytes.get() + 4 * s, sizeof four);
        four ^= 0x80808080u;  // adds 128 to each byte
        std::memcpy(group + s * kStepBytes + 4 * i, &four, sizeof four);
      }
    }
    std::memcpy(group + header.steps * kStepBytes, consts, sizeof consts);
  });
}

PackedKeys read_packed(const uint8_t* packed, int64_t bytes, int64_t N, int64_t D, Activation activation) {
  XPATCH_CHECK(packed != nullptr && bytes >= static_cast<int64_t>(sizeof(Header)),
               "packed keys: expected at least " << sizeof(Header) << " bytes, found " << bytes);
  Header header;
  std::memcpy(&header, packed, sizeof header);
  XPATCH_CHECK(std::memcmp(header.magic, kMagic, sizeof kMagic) == 0,
               "packed keys: these bytes were not written by pack_keys");
  XPATCH_CHECK(header.N == N && header.D == D && header.activation == static_cast<int32_t>(activation),
               "packed keys: expected N=" << N << " D=" << D << " activation code " << static_cast<int>(activation)
                                          << "; found N=" << header.N << " D=" << header.D << " activation code "
                                          << header.activation << "; pack the keys that are served");
  XPATCH_CHECK(can_screen(activation, D) && N >= 0 && header.count == groups_of(N) && header.steps == steps_of(D) &&
                   header.stride == stride_of(D) && header.bytes == packed_bytes(N, D) && bytes == header.bytes,
               "packed keys: expected " << packed_bytes(N, D) << " bytes, found " << bytes << " (" << header.bytes
                                        << " by their header)");
  PackedKeys view;
  view.groups = packed + sizeof(Header);
  view.N = N;
  view.D = D;
  view.count = header.count;
  view.steps = header.steps;
  view.stride = header.stride;
  view.activation = activation;
  return view;
}

}  // namespace xpatch
