// What simd_neon.h takes from the header of this name, in plain C++, for processors that have no NEON: its logic is then
// compiled and run everywhere. No substitute for a run on the instructions themselves.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define JAXQ_LANES(name, type, bytes) typedef type name __attribute__((vector_size(bytes)))
JAXQ_LANES(uint8x8_t, uint8_t, 8);
JAXQ_LANES(uint8x16_t, uint8_t, 16);
JAXQ_LANES(int8x8_t, int8_t, 8);
JAXQ_LANES(int8x16_t, int8_t, 16);
JAXQ_LANES(uint16x4_t, uint16_t, 8);
JAXQ_LANES(uint16x8_t, uint16_t, 16);
JAXQ_LANES(int16x8_t, int16_t, 16);
JAXQ_LANES(uint32x2_t, uint32_t, 8);
JAXQ_LANES(uint32x4_t, uint32_t, 16);
JAXQ_LANES(int32x4_t, int32_t, 16);
JAXQ_LANES(float32x4_t, float, 16);
#undef JAXQ_LANES
struct uint8x16x4_t {
  uint8x16_t val[4];
};
struct float16x4_t {
  uint16_t bits[4];
};
struct float16x8_t {
  uint16_t bits[8];
};

namespace arm {

template <class To, class From>
inline To cast(const From& from, int offset = 0) {
  To to;
  std::memcpy(&to, reinterpret_cast<const char*>(&from) + offset, sizeof(To));
  return to;
}
// Each element of `a` from `first` on, as element of a wider type.
template <class To, class From>
inline To wider(From a, int first = 0) {
  To to{};
  for (unsigned i = 0; i < sizeof(to) / sizeof(to[0]); ++i) to[i] = a[first + i];
  return to;
}
template <class T>
inline T zip(T a, T b, int first) {
  T to{};
  for (unsigned i = 0; i < sizeof(T) / sizeof(to[0]) / 2; ++i) to[2 * i] = a[first + i], to[2 * i + 1] = b[first + i];
  return to;
}
inline float from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float size = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(static_cast<float>(fraction), -24);
  return bits >> 15 ? -size : size;
}
inline float32x4_t from_halves(const uint16_t* bits) {
  return float32x4_t{from_half(bits[0]), from_half(bits[1]), from_half(bits[2]), from_half(bits[3])};
}

}  // namespace arm

inline uint8x16_t vld1q_u8(const uint8_t* p) { uint8x16_t a; std::memcpy(&a, p, 16); return a; }
inline uint16x4_t vld1_u16(const uint16_t* p) { uint16x4_t a; std::memcpy(&a, p, 8); return a; }
inline float32x4_t vld1q_f32(const float* p) { float32x4_t a; std::memcpy(&a, p, 16); return a; }
inline void vst1q_f32(float* p, float32x4_t a) { std::memcpy(p, &a, 16); }
inline uint8x16_t vdupq_n_u8(uint8_t v) { return uint8x16_t{} + v; }
inline uint16x8_t vdupq_n_u16(uint16_t v) { return uint16x8_t{} + v; }
inline uint32x4_t vdupq_n_u32(uint32_t v) { return uint32x4_t{} + v; }
inline uint32x2_t vdup_n_u32(uint32_t v) { return uint32x2_t{} + v; }
inline float32x4_t vdupq_n_f32(float v) { return float32x4_t{v, v, v, v}; }

inline int8x16_t vreinterpretq_s8_u8(uint8x16_t a) { return (int8x16_t)a; }
inline uint16x8_t vreinterpretq_u16_u8(uint8x16_t a) { return (uint16x8_t)a; }
inline int16x8_t vreinterpretq_s16_u8(uint8x16_t a) { return (int16x8_t)a; }
inline uint32x4_t vreinterpretq_u32_u8(uint8x16_t a) { return (uint32x4_t)a; }
inline int32x4_t vreinterpretq_s32_u8(uint8x16_t a) { return (int32x4_t)a; }
inline float32x4_t vreinterpretq_f32_u8(uint8x16_t a) { return (float32x4_t)a; }
inline uint8x16_t vreinterpretq_u8_u16(uint16x8_t a) { return (uint8x16_t)a; }
inline uint8x16_t vreinterpretq_u8_s16(int16x8_t a) { return (uint8x16_t)a; }
inline uint8x16_t vreinterpretq_u8_u32(uint32x4_t a) { return (uint8x16_t)a; }
inline uint8x16_t vreinterpretq_u8_s32(int32x4_t a) { return (uint8x16_t)a; }
inline uint32x4_t vreinterpretq_u32_f32(float32x4_t a) { return (uint32x4_t)a; }
inline float32x4_t vreinterpretq_f32_u32(uint32x4_t a) { return (float32x4_t)a; }
inline uint8x8_t vreinterpret_u8_u32(uint32x2_t a) { return (uint8x8_t)a; }
inline float16x4_t vreinterpret_f16_u16(uint16x4_t a) { return arm::cast<float16x4_t>(a); }
inline float16x8_t vreinterpretq_f16_u8(uint8x16_t a) { return arm::cast<float16x8_t>(a); }
inline uint8x8_t vget_low_u8(uint8x16_t a) { return arm::cast<uint8x8_t>(a); }
inline int8x8_t vget_low_s8(int8x16_t a) { return arm::cast<int8x8_t>(a); }
inline uint16x4_t vget_low_u16(uint16x8_t a) { return arm::cast<uint16x4_t>(a); }
inline float16x4_t vget_low_f16(float16x8_t a) { return arm::cast<float16x4_t>(a); }

inline uint8x16_t vandq_u8(uint8x16_t a, uint8x16_t b) { return a & b; }
inline uint8x16_t vorrq_u8(uint8x16_t a, uint8x16_t b) { return a | b; }
inline uint32x4_t vandq_u32(uint32x4_t a, uint32x4_t b) { return a & b; }
inline uint16x8_t vaddq_u16(uint16x8_t a, uint16x8_t b) { return a + b; }
inline uint16x8_t vsubq_u16(uint16x8_t a, uint16x8_t b) { return a - b; }
inline uint32x4_t vaddq_u32(uint32x4_t a, uint32x4_t b) { return a + b; }
inline uint32x4_t vsubq_u32(uint32x4_t a, uint32x4_t b) { return a - b; }
inline uint32x4_t vtstq_u32(uint32x4_t a, uint32x4_t b) { return (uint32x4_t)((a & b) != 0); }
inline float32x4_t vaddq_f32(float32x4_t a, float32x4_t b) { return a + b; }
inline float32x4_t vsubq_f32(float32x4_t a, float32x4_t b) { return a - b; }
inline float32x4_t vmulq_f32(float32x4_t a, float32x4_t b) { return a * b; }
inline float32x4_t vfmaq_f32(float32x4_t c, float32x4_t a, float32x4_t b) { return a * b + c; }
inline float vaddvq_f32(float32x4_t a) { return (a[0] + a[1]) + (a[2] + a[3]); }

inline uint8x16_t vqtbl1q_u8(uint8x16_t table, uint8x16_t index) {
  uint8x16_t to{};
  for (int i = 0; i < 16; ++i) to[i] = index[i] < 16 ? table[index[i]] : 0;
  return to;
}
inline uint8x16x4_t vld4q_u8(const uint8_t* p) {
  uint8x16x4_t to{};
  for (int i = 0; i < 64; ++i) to.val[i % 4][i / 4] = p[i];
  return to;
}
inline uint8x16_t vzip1q_u8(uint8x16_t a, uint8x16_t b) { return arm::zip(a, b, 0); }
inline uint8x16_t vzip2q_u8(uint8x16_t a, uint8x16_t b) { return arm::zip(a, b, 8); }
inline uint16x8_t vzip1q_u16(uint16x8_t a, uint16x8_t b) { return arm::zip(a, b, 0); }
inline uint16x8_t vzip2q_u16(uint16x8_t a, uint16x8_t b) { return arm::zip(a, b, 4); }
inline float32x4_t vzip1q_f32(float32x4_t a, float32x4_t b) { return arm::zip(a, b, 0); }
inline float32x4_t vzip2q_f32(float32x4_t a, float32x4_t b) { return arm::zip(a, b, 2); }
inline uint16x8_t vmovl_u8(uint8x8_t a) { return arm::wider<uint16x8_t>(a); }
inline uint32x4_t vmovl_u16(uint16x4_t a) { return arm::wider<uint32x4_t>(a); }
inline uint32x4_t vshll_n_u16(uint16x4_t a, int n) { return arm::wider<uint32x4_t>(a) << n; }
inline uint16x8_t vaddw_u8(uint16x8_t sum, uint8x8_t a) { return sum + arm::wider<uint16x8_t>(a); }
inline uint16x8_t vaddw_high_u8(uint16x8_t sum, uint8x16_t a) { return sum + arm::wider<uint16x8_t>(a, 8); }
inline int16x8_t vmlal_s8(int16x8_t sum, int8x8_t a, int8x8_t b) {
  return sum + arm::wider<int16x8_t>(a) * arm::wider<int16x8_t>(b);
}
inline int16x8_t vmlal_high_s8(int16x8_t sum, int8x16_t a, int8x16_t b) {
  return sum + arm::wider<int16x8_t>(a, 8) * arm::wider<int16x8_t>(b, 8);
}
inline int32x4_t vpaddlq_s16(int16x8_t a) {
  int32x4_t to{};
  for (int i = 0; i < 4; ++i) to[i] = a[2 * i] + a[2 * i + 1];
  return to;
}
inline int32x4_t vdotq_s32(int32x4_t sum, int8x16_t a, int8x16_t b) {
  for (int i = 0; i < 16; ++i) sum[i / 4] += a[i] * b[i];
  return sum;
}
inline float32x4_t vcvtq_f32_s32(int32x4_t a) { return arm::wider<float32x4_t>(a); }
inline float32x4_t vcvtq_f32_u32(uint32x4_t a) { return arm::wider<float32x4_t>(a); }
inline float32x4_t vcvt_f32_f16(float16x4_t a) { return arm::from_halves(a.bits); }
inline float32x4_t vcvt_high_f32_f16(float16x8_t a) { return arm::from_halves(a.bits + 4); }
