// NEON (AArch64): vectors of 16 bytes. See simd_scalar.h for what each function means.
//
// One register, not several as one vector: every look-up is one byte in 16 (tbl of one register is one operation on all
// cores, of four it is four on most), and these kernels are bound by vector operations, two a cycle on small cores and four
// on large ones, not by the loads that wider vectors would share.
//
// Of tables of any size the bytes are looked up and interleaved: 3 operations for 4 weights of float32, 2 of halves and of
// bfloat16. A look-up of whole floats has to make an index of four bytes from each code first: 4 operations with a table of 4
// floats, 5 with one of 8 (tbl of two registers) and 7 with one of 16 (of four).
#pragma once

#define JAXQ_NEON

struct Simd {
  // Of 32 registers 16 are sums, as many as four multiply-adds a cycle that take four cycles keep in flight (kBatch); sums of
  // integers go four rows at a time for the same reason. No number here is measured: those of tokens come from counting the
  // vector operations of the loops, and several tokens are decoded for as long as that happens once (kFew).
  static constexpr int kBytes = 16, kFloats = 4, kTable = 0, kBatch = 4, kRows = 1, kIntegerRows = 4, kTokens = 4, kFew = 4;
  // Compilers for Macs take dot products for granted: both sets have them there.
#if defined(__ARM_FEATURE_DOTPROD)
  // 32-bit sums of four products: what three bytes leave of 31 bits once the upper two are put together.
  static constexpr int kAdds = 1024;
  static constexpr int64_t kIntegerTokens[3] = {512, 64, 16};
#else
  // 16-bit sums of two products of at most 15 * 128.
  static constexpr int kAdds = 8;
  static constexpr int64_t kIntegerTokens[3] = {512, 8, 4};
#endif
  using V = uint8x16_t;
  using F = float32x4_t;

  static V load(const void* p) { return vld1q_u8(static_cast<const uint8_t*>(p)); }
  static V broadcast16(const void* p) { return load(p); }
  static V set8(int v) { return vdupq_n_u8(static_cast<uint8_t>(v)); }
  static V set16(int v) { return bytes(vdupq_n_u16(static_cast<uint16_t>(v))); }
  static V set32(int32_t v) { return bytes(vdupq_n_u32(static_cast<uint32_t>(v))); }
  static V zero() { return vdupq_n_u8(0); }
  static V both(V a, V b) { return vandq_u8(a, b); }
  static V either(V a, V b) { return vorrq_u8(a, b); }
  // Operators: intrinsics want places of shifts that are constant before anything is inlined.
  static V right8(V a, int n) { return a >> vdupq_n_u8(static_cast<uint8_t>(n)); }
  static V right16(V a, int n) { return bytes(u16(a) >> vdupq_n_u16(static_cast<uint16_t>(n))); }
  static V left16(V a, int n) { return bytes(u16(a) << vdupq_n_u16(static_cast<uint16_t>(n))); }
  static V left32(V a, int n) { return bytes(u32(a) << vdupq_n_u32(static_cast<uint32_t>(n))); }
  static V add16(V a, V b) { return bytes(vaddq_u16(u16(a), u16(b))); }
  static V sub16(V a, V b) { return bytes(vsubq_u16(u16(a), u16(b))); }
  static V add32(V a, V b) { return bytes(vaddq_u32(u32(a), u32(b))); }
  static V sub32(V a, V b) { return bytes(vsubq_u32(u32(a), u32(b))); }
  static V pick(V table, V index) { return vqtbl1q_u8(table, index); }
  static V low8(V a, V b) { return vzip1q_u8(a, b); }
  static V high8(V a, V b) { return vzip2q_u8(a, b); }
  static V low16(V a, V b) { return bytes(vzip1q_u16(u16(a), u16(b))); }
  static V high16(V a, V b) { return bytes(vzip2q_u16(u16(a), u16(b))); }
  // 16-bit sums, and the lower or upper bytes added to them.
  static V add_low8(V sum, V a) { return bytes(vaddw_u8(u16(sum), vget_low_u8(a))); }
  static V add_high8(V sum, V a) { return bytes(vaddw_high_u8(u16(sum), a)); }

  // Codes are below 16: as signed bytes they are the same.
  static V dot(V sum, V u, V s) {
    const int8x16_t a = vreinterpretq_s8_u8(u), b = vreinterpretq_s8_u8(s);
#if defined(__ARM_FEATURE_DOTPROD)
    return vreinterpretq_u8_s32(vdotq_s32(vreinterpretq_s32_u8(sum), a, b));
#else
    const int16x8_t low = vmlal_s8(vreinterpretq_s16_u8(sum), vget_low_s8(a), vget_low_s8(b));
    return vreinterpretq_u8_s16(vmlal_high_s8(low, a, b));
#endif
  }
  static V dot_result(V sum) {
#if defined(__ARM_FEATURE_DOTPROD)
    return sum;
#else
    return vreinterpretq_u8_s32(vpaddlq_s16(vreinterpretq_s16_u8(sum)));
#endif
  }

  static F as_float(V a) { return vreinterpretq_f32_u8(a); }
  static F to_float(V a) { return vcvtq_f32_s32(vreinterpretq_s32_u8(a)); }
  // The lower or upper four halves as floats.
  static F low_halves(V a) { return vcvt_f32_f16(vget_low_f16(vreinterpretq_f16_u8(a))); }
  static F high_halves(V a) { return vcvt_high_f32_f16(vreinterpretq_f16_u8(a)); }
  static F loadf(const float* p) { return vld1q_f32(p); }
  static void storef(float* p, F a) { vst1q_f32(p, a); }
  static F setf(float v) { return vdupq_n_f32(v); }
  static F zerof() { return setf(0.0f); }
  static F addf(F a, F b) { return vaddq_f32(a, b); }
  static F subf(F a, F b) { return vsubq_f32(a, b); }
  static F mulf(F a, F b) { return vmulq_f32(a, b); }
  static F fma(F a, F b, F c) { return vfmaq_f32(c, a, b); }
  // Only declared: what tables of kTable entries would need.
  static F lookup(F table, V index);
  static V right32(V a, int n);
  template <int n, class T>
  static F table(const T* p);
  template <int n, class T>
  static F repeated(const T* p);
  static F add_bits(F sum, F scale, uint32_t bits) {
    const uint32x4_t places = {1, 2, 4, 8};
    const uint32x4_t set = vtstq_u32(vdupq_n_u32(bits), places);
    return vaddq_f32(sum, vreinterpretq_f32_u32(vandq_u32(set, vreinterpretq_u32_f32(scale))));
  }
  static float sum(F a) { return vaddvq_f32(a); }
  static void interleave(F a, F b, F* low, F* high) { *low = vzip1q_f32(a, b), *high = vzip2q_f32(a, b); }

  static void byte_planes(const float* p, V* planes) {
    const uint8x16x4_t bytes = vld4q_u8(reinterpret_cast<const uint8_t*>(p));
    for (int b = 0; b < 4; ++b) planes[b] = bytes.val[3 - b];
  }

  static F bytes_to_float(const uint8_t* p) {
    uint32_t four;
    __builtin_memcpy(&four, p, 4);
    const uint8x8_t narrow = vreinterpret_u8_u32(vdup_n_u32(four));
    return vcvtq_f32_u32(vmovl_u16(vget_low_u16(vmovl_u8(narrow))));
  }
  static F scales(const float* p) { return loadf(p); }
  static F scales(const Half* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
  static F scales(const BFloat* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(&p->bits), 16)); }
  template <class T>
  static F lane_scales(const T* p) { return scales(p); }
  static void lane_store(float* p, F a) { storef(p, a); }

 private:
  static uint16x8_t u16(V a) { return vreinterpretq_u16_u8(a); }
  static uint32x4_t u32(V a) { return vreinterpretq_u32_u8(a); }
  static V bytes(uint16x8_t a) { return vreinterpretq_u8_u16(a); }
  static V bytes(uint32x4_t a) { return vreinterpretq_u8_u32(a); }
};
