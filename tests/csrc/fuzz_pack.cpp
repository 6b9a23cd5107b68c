// Fuzzing of the key packer and of what reads its bytes. Every input is decoded into sizes, a dtype, strides and keys,
// which are packed; the packed bytes, then mutated ones, are given to read_packed and patch_ffn. Nothing may crash, and
// whole packed keys must give the bits of computing every neuron.
//
// `LLVMFuzzerTestOneInput` is what libFuzzer and its like call. Without them (XPATCH_FUZZ_ENGINE not defined) a main of
// this file's own feeds random bytes: fuzz_pack [count] [seed].
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/check.h"
#include "core/isa.h"
#include "ops/patch_ffn.h"
#include "screen/screen.h"
#include "testing.h"

namespace {

using testing::DType;
using xpatch::Activation;

// Reads an input to its end, and zeros from there.
class Source {
 public:
  Source(const uint8_t* data, size_t size) : data_(data), left_(size) {}

  uint32_t number(uint32_t below) {
    uint32_t value = 0;
    bytes(&value, 2);
    return value % below;
  }

  void bytes(void* target, size_t count) {
    const size_t some = std::min(count, left_);
    if (count > 0) std::memset(target, 0, count);
    if (some > 0) std::memcpy(target, data_, some);
    data_ += some;
    left_ -= some;
  }

 private:
  const uint8_t* data_;
  size_t left_;
};

// Numbers of ordinary size, or the input's own bits.
std::vector<char> numbers(Source& source, int64_t count, DType dtype, bool ordinary) {
  std::vector<char> data(static_cast<size_t>(count * xpatch::size_of(dtype)));
  source.bytes(data.data(), data.size());
  for (int64_t i = 0; ordinary && i < count; ++i) {
    uint8_t byte;
    std::memcpy(&byte, data.data() + i * xpatch::size_of(dtype), 1);
    const float value = (static_cast<float>(byte) - 128.0f) / 64.0f;
    xpatch::narrow(&value, 1, dtype, data.data() + i * xpatch::size_of(dtype));
  }
  return data;
}

bool same(const std::vector<char>& one, const std::vector<char>& two, DType dtype) {
  const auto count = static_cast<int64_t>(one.size()) / xpatch::size_of(dtype);
  for (int64_t i = 0; i < count; ++i) {
    float a, b;
    xpatch::widen(one.data() + i * xpatch::size_of(dtype), dtype, 1, &a);
    xpatch::widen(two.data() + i * xpatch::size_of(dtype), dtype, 1, &b);
    if (std::memcmp(&a, &b, sizeof a) != 0 && !(std::isnan(a) && std::isnan(b))) return false;
  }
  return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Source source(data, size);
  const auto dtype = static_cast<DType>(source.number(3));
  const auto activation = static_cast<Activation>(source.number(5));
  const int64_t N = source.number(50), D = source.number(80), M = source.number(4), V = source.number(4);
  const int64_t gap = source.number(3), rank = source.number(4) == 0 ? source.number(12) : 0;
  const bool ordinary = source.number(2) == 0;
  const int64_t stride = D + gap;
  const std::vector<char> keys = numbers(source, N * stride, dtype, ordinary),
                          bias = numbers(source, N, dtype, ordinary);
  const std::vector<char> x = numbers(source, M * stride, dtype, ordinary),
                          values = numbers(source, N * V, dtype, true);
  std::vector<float> basis(static_cast<size_t>(rank * D));  // orthonormal, or what the input says
  source.bytes(basis.data(), basis.size() * sizeof(float));
  if (source.number(4) != 0) {
    std::fill(basis.begin(), basis.end(), 0.0f);
    for (int64_t i = 0; i < std::min(rank, D); ++i) basis[static_cast<size_t>(i * D + i)] = 1.0f;
  }

  std::vector<uint8_t> packed(static_cast<size_t>(xpatch::packed_bytes(N, D, rank)));
  try {
    xpatch::pack_keys(keys.data(), stride, bias.data(), dtype, N, D, activation, rank > 0 ? basis.data() : nullptr,
                      rank, packed.data(), 1);
  } catch (const xpatch::Error&) {
    const bool along_axes = rank <= D && (D > 0 || rank == 0);
    EXPECT(!xpatch::can_screen(activation, D) || rank > 0 || !along_axes);
    return 0;
  }
  const auto bytes = static_cast<int64_t>(packed.size());
  xpatch::read_packed(packed.data(), bytes, N, D, activation);

  xpatch::PatchFfn op;
  std::vector<char> out(static_cast<size_t>(M * V * xpatch::size_of(dtype))), whole = out;
  op.x = x.data(), op.keys = keys.data(), op.bias = bias.data(), op.values = values.data(), op.out = out.data();
  op.M = M, op.D = D, op.N = N, op.V = V;
  op.x_stride = op.keys_stride = stride, op.values_stride = V;
  op.dtype = dtype;
  op.activation = activation;
  const auto found = xpatch::patch_ffn(op, packed.data(), bytes, true, true, 1);
  EXPECT(found.survivors <= found.pairs);

  std::vector<char> infinite = bias;
  const float infinity = std::numeric_limits<float>::infinity();
  for (int64_t n = 0; n < N; ++n) xpatch::narrow(&infinity, 1, dtype, infinite.data() + n * xpatch::size_of(dtype));
  std::vector<uint8_t> keeps_all(static_cast<size_t>(xpatch::packed_bytes(N, D, 0)));
  xpatch::pack_keys(keys.data(), stride, infinite.data(), dtype, N, D, activation, nullptr, 0, keeps_all.data(), 1);
  op.out = whole.data();
  const auto all = xpatch::patch_ffn(op, keeps_all.data(), static_cast<int64_t>(keeps_all.size()), true, true, 1);
  EXPECT(same(out, whole, dtype) && found.fired == all.fired);

  // Damaged bytes are refused, or screen something else; they are never read beyond their end.
  for (int round = 0; round < 8; ++round) {
    std::vector<uint8_t> damaged = packed;
    const uint32_t kind = source.number(3);
    if (kind == 0) damaged.resize(source.number(static_cast<uint32_t>(damaged.size()) + 1));
    if (kind == 1) damaged.resize(damaged.size() + source.number(100));
    const uint32_t flips = source.number(5), reach = round % 2 == 0 ? 64 : 0x7FFF;  // the header, or anything
    for (uint32_t i = 0; i < flips && !damaged.empty(); ++i) {
      const auto at = source.number(std::min(static_cast<uint32_t>(damaged.size()), reach));
      damaged[at] = static_cast<uint8_t>(source.number(256));
    }
    damaged.shrink_to_fit();
    try {
      xpatch::patch_ffn(op, damaged.data(), static_cast<int64_t>(damaged.size()), true, true, 1);
    } catch (const xpatch::Error&) {
    }
  }
  return 0;
}

#if !defined(XPATCH_FUZZ_ENGINE)
int main(int argc, char** argv) {
  const long count = argc > 1 ? std::atol(argv[1]) : 1000;
  std::mt19937 generator(argc > 2 ? static_cast<uint32_t>(std::atol(argv[2])) : 0u);
  for (long i = 0; i < count; ++i) {
    std::vector<uint8_t> input(generator() % 3000);
    for (auto& byte : input) byte = static_cast<uint8_t>(generator());
    LLVMFuzzerTestOneInput(input.data(), input.size());
  }
  std::printf("%ld inputs, %s\n", count, xpatch::isa_name(xpatch::isa_in_use()));
}
#endif
