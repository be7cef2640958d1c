// Element types and the conversions of 16-bit and 8-bit floats on the host. GCC 12 has no
// <stdfloat>, so bf16, f16 and fp8 are ours; kernels use the device's own conversions.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>

// Functions shared by host code and CUDA kernels.
#if defined(__CUDACC__)
#define NI_HD __host__ __device__
#else
#define NI_HD
#endif

namespace ni {

// fp8_e4m3 (OCP 8-bit floating point, finite: no infinities) is a type of KV caches only.
enum class DType : uint8_t { f32, bf16, f16, i32, i64, fp8_e4m3 };

inline constexpr size_t dtype_size(DType t) {
  switch (t) {
    case DType::bf16:
    case DType::f16:
      return 2;
    case DType::i64:
      return 8;
    case DType::fp8_e4m3:
      return 1;
    default:
      return 4;
  }
}

inline constexpr const char* dtype_name(DType t) {
  switch (t) {
    case DType::f32:
      return "float32";
    case DType::bf16:
      return "bfloat16";
    case DType::f16:
      return "float16";
    case DType::i32:
      return "int32";
    case DType::fp8_e4m3:
      return "fp8_e4m3";
    default:
      return "int64";
  }
}

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
// e4m3 in the variant without infinities (OCP 8-bit floating point): 1 sign, 4 exponent bits with a
// bias of 7, 3 mantissa bits; the largest number is 448, all ones below the sign is NaN.
struct fp8 {
  uint8_t bits;
};

inline float to_float(float v) {
  return v;
}

inline float to_float(bf16 v) {
  return std::bit_cast<float>(static_cast<uint32_t>(v.bits) << 16);
}

// IEEE 754 binary16 -> binary32; exact, subnormals included.
inline float to_float(f16 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x8000u) << 16;
  const uint32_t exponent = (v.bits >> 10) & 0x1fu;
  const uint32_t mantissa = v.bits & 0x3ffu;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
  }
  const uint32_t out_exponent = exponent == 31 ? 255u : exponent + 112u;
  return std::bit_cast<float>(sign | (out_exponent << 23) | (mantissa << 13));
}

// Round to nearest, ties to even; NaN stays NaN.
inline bf16 to_bf16(float v) {
  const uint32_t u = std::bit_cast<uint32_t>(v);
  if ((u & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((u >> 16) | 0x40u)};
  return {static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16)};
}

inline f16 to_f16(float v) {
  const uint32_t u = std::bit_cast<uint32_t>(v);
  const auto sign = static_cast<uint16_t>((u >> 16) & 0x8000u);
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};   // NaN
  if (a >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds to infinity
  if (a < 0x38800000u) {  // subnormal result: adding 0.5 leaves round(|v| * 2^24) in the low bits
    const uint32_t shifted = std::bit_cast<uint32_t>(std::bit_cast<float>(a) + 0.5f);
    return {static_cast<uint16_t>(sign | (shifted - 0x3f000000u))};
  }
  const uint32_t odd = (a >> 13) & 1u;
  return {static_cast<uint16_t>(sign | ((a - 0x38000000u + 0xfffu + odd) >> 13))};
}

inline float to_float(fp8 v) {
  const uint32_t sign = static_cast<uint32_t>(v.bits & 0x80u) << 24;
  const uint32_t magnitude = v.bits & 0x7fu;
  if (magnitude == 0x7fu) return std::bit_cast<float>(sign | 0x7fc00000u);  // NaN
  if (magnitude < 8u) {  // zero or subnormal: magnitude * 2^-9
    const float m = static_cast<float>(magnitude) * 0.001953125f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(m) | sign);
  }
  return std::bit_cast<float>(sign | ((magnitude << 20) + (120u << 23)));
}

// Round to nearest, ties to even; beyond 448, infinities included, it saturates; NaN stays NaN.
inline fp8 to_fp8(float v) {
  const uint32_t u = std::bit_cast<uint32_t>(v);
  const auto sign = static_cast<uint8_t>((u >> 24) & 0x80u);
  const uint32_t a = u & 0x7fffffffu;
  if (a > 0x7f800000u) return {0x7f};
  if (a >= 0x43e00000u) return {static_cast<uint8_t>(sign | 0x7eu)};
  if (a < 0x3c800000u) {  // below 2^-6: adding 2^14 leaves round(|v| * 2^9) in the low bits
    const uint32_t shifted = std::bit_cast<uint32_t>(std::bit_cast<float>(a) + 16384.0f);
    return {static_cast<uint8_t>(sign | (shifted - 0x46800000u))};
  }
  const uint32_t odd = (a >> 20) & 1u;
  return {static_cast<uint8_t>(sign | ((a - (120u << 23) + 0x7ffffu + odd) >> 20))};
}

}  // namespace ni
