// AVX2, FMA and F16C: vectors of 32 bytes. See simd_scalar.h for what each function means.
#pragma once

struct Simd {
  static constexpr int kBytes = 32, kFloats = 8, kTable = 8, kBatch = 3, kRows = 2, kIntegerRows = 2, kTokens = 4, kFew = 2;
  static constexpr int kAdds = 4;
  static constexpr int64_t kIntegerTokens[3] = {512, 12, 8};
  using V = __m256i;
  using F = __m256;

  static V load(const void* p) { return _mm256_loadu_si256(static_cast<const V*>(p)); }
  static V broadcast16(const void* p) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  static V set8(int v) { return _mm256_set1_epi8(static_cast<char>(v)); }
  static V set16(int v) { return _mm256_set1_epi16(static_cast<short>(v)); }
  static V zero() { return _mm256_setzero_si256(); }
  static V both(V a, V b) { return _mm256_and_si256(a, b); }
  static V either(V a, V b) { return _mm256_or_si256(a, b); }
  static V right16(V a, int n) { return _mm256_srli_epi16(a, n); }
  static V left16(V a, int n) { return _mm256_slli_epi16(a, n); }
  static V left32(V a, int n) { return _mm256_slli_epi32(a, n); }
  static V right32(V a, int n) { return _mm256_srli_epi32(a, n); }
  static F lookup(F table, V index) { return _mm256_permutevar8x32_ps(table, index); }
  static V add16(V a, V b) { return _mm256_add_epi16(a, b); }
  static V sub16(V a, V b) { return _mm256_sub_epi16(a, b); }
  static V add32(V a, V b) { return _mm256_add_epi32(a, b); }
  static V sub32(V a, V b) { return _mm256_sub_epi32(a, b); }
  static V set32(int32_t v) { return _mm256_set1_epi32(v); }
  static V pick(V table, V index) { return _mm256_shuffle_epi8(table, index); }
  static V low8(V a, V b) { return _mm256_unpacklo_epi8(a, b); }
  static V high8(V a, V b) { return _mm256_unpackhi_epi8(a, b); }
  static V low16(V a, V b) { return _mm256_unpacklo_epi16(a, b); }
  static V high16(V a, V b) { return _mm256_unpackhi_epi16(a, b); }

  static V dot(V sum, V u, V s) { return _mm256_add_epi16(sum, _mm256_maddubs_epi16(u, s)); }
  static V dot_result(V sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }

  static F as_float(V a) { return _mm256_castsi256_ps(a); }
  static F to_float(V a) { return _mm256_cvtepi32_ps(a); }
  static F loadf(const float* p) { return _mm256_loadu_ps(p); }
  template <int n>
  static F table(const float* p) { return repeated<n>(p); }
  static void storef(float* p, F a) { _mm256_storeu_ps(p, a); }
  static F setf(float v) { return _mm256_set1_ps(v); }
  static F zerof() { return _mm256_setzero_ps(); }
  static F addf(F a, F b) { return _mm256_add_ps(a, b); }
  static F subf(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mulf(F a, F b) { return _mm256_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F add_bits(F sum, F scale, uint32_t bits) {
    const V places = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const V set = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), places), places);
    return _mm256_add_ps(sum, _mm256_and_ps(_mm256_castsi256_ps(set), scale));
  }
  static float sum(F a) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
  }
  static void interleave(F a, F b, F* low, F* high) {
    const F first = _mm256_unpacklo_ps(a, b), second = _mm256_unpackhi_ps(a, b);
    *low = _mm256_permute2f128_ps(first, second, 0x20), *high = _mm256_permute2f128_ps(first, second, 0x31);
  }

  static void byte_planes(const float* p, V* planes) {
    const __m128i order = _mm_setr_epi8(3, 7, 11, 15, 2, 6, 10, 14, 1, 5, 9, 13, 0, 4, 8, 12);
    const auto some = [&](int i) { return _mm_shuffle_epi8(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 4 * i)), order); };
    const __m128i a = some(0), b = some(1), c = some(2), d = some(3);
    const __m128i low[2] = {_mm_unpacklo_epi32(a, b), _mm_unpacklo_epi32(c, d)};
    const __m128i high[2] = {_mm_unpackhi_epi32(a, b), _mm_unpackhi_epi32(c, d)};
    planes[0] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(low[0], low[1]));
    planes[1] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(low[0], low[1]));
    planes[2] = _mm256_broadcastsi128_si256(_mm_unpacklo_epi64(high[0], high[1]));
    planes[3] = _mm256_broadcastsi128_si256(_mm_unpackhi_epi64(high[0], high[1]));
  }

  static F bytes_to_float(const uint8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  static F scales(const float* p) { return _mm256_loadu_ps(p); }
  static F scales(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F scales(const BFloat* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  template <int n>
  static F repeated(const float* p) {
    if (n == 8) return _mm256_loadu_ps(p);
    if (n == 4) return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
    return _mm256_castsi256_ps(_mm256_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  template <int n>
  static F repeated(const Half* p) { return _mm256_cvtph_ps(repeated16<n>(p)); }
  template <int n>
  static F repeated(const BFloat* p) { return widen(repeated16<n>(p)); }
  static F lane_scales(const float* p) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(p + 16), 1);
  }
  static F lane_scales(const Half* p) { return _mm256_cvtph_ps(fours(p)); }
  static F lane_scales(const BFloat* p) { return widen(fours(p)); }
  static void lane_store(float* p, F a) {
    _mm_storeu_ps(p, _mm256_castps256_ps128(a));
    _mm_storeu_ps(p + 16, _mm256_extractf128_ps(a, 1));
  }

 private:
  static F widen(__m128i a) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(a), 16)); }
  template <int n>
  static __m128i repeated16(const void* p) {
    const __m128i* at = static_cast<const __m128i*>(p);
    if (n == 8) return _mm_loadu_si128(at);
    if (n == 4) return _mm_broadcastq_epi64(_mm_loadl_epi64(at));
    return _mm_broadcastd_epi32(_mm_loadu_si32(at));
  }
  template <class T>
  static __m128i fours(const T* p) {
    return _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)),
                              _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 16)));
  }
};
