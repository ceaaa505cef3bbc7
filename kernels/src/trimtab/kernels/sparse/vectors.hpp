// What the CPU kernels share: vectors, which are the compiler's own, as wide as the set of
// instructions that a source is compiled for; the types of tensors; and powers of two.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int ROWS = 4;     // rows of a register tile
#if defined(__AVX512F__)
constexpr int WIDTH = 16;
constexpr int VECTORS = 4;  // vectors of a register tile
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
constexpr int VECTORS = 2;
#else
constexpr int WIDTH = 4;
constexpr int VECTORS = 4;
#endif
constexpr float MASKED = -3e38f;

typedef float vfloat __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef int32_t vint __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline float widen(fp16 x) {
  _Float16 half;
  std::memcpy(&half, &x.bits, 2);
  return float(half);
}
inline vfloat load(const float* p) { return *reinterpret_cast<const vfloat*>(p); }
inline void store(float* p, vfloat x) { *reinterpret_cast<vfloat*>(p) = x; }

// 2^f for -1/2 <= f <= 1/2. Error below 2e-7.
inline vfloat exp2_of_fraction(vfloat f) {
  vfloat p = 1.535336188319500e-4f * f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  return p * f + 1.0f;
}

// The nearest whole number of x, and what x is off by.
inline vfloat whole_part(vfloat x, vint& n) {
  const vfloat magic = vfloat{} + 12582912.0f;
  const vfloat shifted = x + magic;
  n = (vint)shifted - (vint)magic;
  return x - (shifted - magic);
}

}  // namespace

extern "C" {

// Whether this machine has the instructions that this file was compiled for.
__attribute__((visibility("default"))) int trimtab_supported() {
#if defined(__AVX512BF16__)
  return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw");
#elif defined(__AVX512F__)
  return __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return 1;
#endif
}

}  // extern "C"
