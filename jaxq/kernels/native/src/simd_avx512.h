// AVX-512 (F, BW, DQ, VL, VNNI): vectors of 64 bytes. See simd_scalar.h for what each function means.
#pragma once

struct Simd {
  static constexpr int kBytes = 64, kFloats = 16, kTable = 16, kBatch = 4, kRows = 4, kIntegerRows = 2, kTokens = 8, kFew = 16;
  static constexpr int kAdds = 4;
  static constexpr int64_t kIntegerTokens[3] = {512, 8, 2};
  using V = __m512i;
  using F = __m512;

  static V load(const void* p) { return _mm512_loadu_si512(p); }
  static V broadcast16(const void* p) { return _mm512_broadcast_i32x4(_mm_loadu_si128(static_cast<const __m128i*>(p))); }
  static V set8(int v) { return _mm512_set1_epi8(static_cast<char>(v)); }
  static V set16(int v) { return _mm512_set1_epi16(static_cast<short>(v)); }
  static V zero() { return _mm512_setzero_si512(); }
  static V both(V a, V b) { return _mm512_and_si512(a, b); }
  static V either(V a, V b) { return _mm512_or_si512(a, b); }
  static V right16(V a, int n) { return _mm512_srli_epi16(a, static_cast<unsigned>(n)); }
  static V left16(V a, int n) { return _mm512_slli_epi16(a, static_cast<unsigned>(n)); }
  static V left32(V a, int n) { return _mm512_slli_epi32(a, static_cast<unsigned>(n)); }
  static V right32(V a, int n) { return _mm512_srli_epi32(a, static_cast<unsigned>(n)); }
  static F lookup(F table, V index) { return _mm512_permutexvar_ps(index, table); }
  static V add16(V a, V b) { return _mm512_add_epi16(a, b); }
  static V sub16(V a, V b) { return _mm512_sub_epi16(a, b); }
  static V add32(V a, V b) { return _mm512_add_epi32(a, b); }
  static V sub32(V a, V b) { return _mm512_sub_epi32(a, b); }
  static V set32(int32_t v) { return _mm512_set1_epi32(v); }
  static V pick(V table, V index) { return _mm512_shuffle_epi8(table, index); }
  static V low8(V a, V b) { return _mm512_unpacklo_epi8(a, b); }
  static V high8(V a, V b) { return _mm512_unpackhi_epi8(a, b); }
  static V low16(V a, V b) { return _mm512_unpacklo_epi16(a, b); }
  static V high16(V a, V b) { return _mm512_unpackhi_epi16(a, b); }

  static V dot(V sum, V u, V s) { return _mm512_dpbusd_epi32(sum, u, s); }
  static V dot_result(V sum) { return sum; }

  static F as_float(V a) { return _mm512_castsi512_ps(a); }
  static F to_float(V a) { return _mm512_cvtepi32_ps(a); }
  static F loadf(const float* p) { return _mm512_loadu_ps(p); }
  template <int n>
  static F table(const float* p) { return repeated<n>(p); }
  static void storef(float* p, F a) { _mm512_storeu_ps(p, a); }
  static F setf(float v) { return _mm512_set1_ps(v); }
  static F zerof() { return _mm512_setzero_ps(); }
  static F addf(F a, F b) { return _mm512_add_ps(a, b); }
  static F subf(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mulf(F a, F b) { return _mm512_mul_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F add_bits(F sum, F scale, uint32_t bits) {
    return _mm512_mask_add_ps(sum, static_cast<__mmask16>(bits), sum, scale);
  }
  static float sum(F a) { return _mm512_reduce_add_ps(a); }
  static void interleave(F a, F b, F* low, F* high) {
    const V first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    *low = _mm512_permutex2var_ps(a, first, b), *high = _mm512_permutex2var_ps(a, add32(first, set32(8)), b);
  }
#if defined(JAXQ_ISA_AVX512BF16)
  // Of bfloat16 a vector has 32: n numbers again and again, and in a product the sums of neighbours.
  static V loadf(const BFloat* p) { return load(p); }
  template <int n>
  static V table(const BFloat* p) {
    const __m128i* at = reinterpret_cast<const __m128i*>(p);
    if (n == 16) return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return n == 8 ? _mm512_broadcast_i32x4(_mm_loadu_si128(at)) : _mm512_broadcastq_epi64(_mm_loadl_epi64(at));
  }
  static V lookup(V table, V index) { return _mm512_permutexvar_epi16(index, table); }
  static F fma(V a, V b, F c) { return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b); }
  static void storef(BFloat* p, F a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(a)); }
  // The first elements of n vectors one after the other, then the second ones, and so on; n is 4, 8 or 16. Vectors are
  // interleaved again and again, each time those whose numbers differ in the highest bit that is left.
  template <int n>
  static void transpose(const F* v, BFloat* to) {
    alignas(64) static constexpr uint16_t kOrder[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                        8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
    const V low = load(kOrder), high = add16(low, set16(16));
    const auto rounded = [](F a) { return _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(a)); };
    V t[n / 2], next[n / 2];
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) t[i] = _mm512_permutex2var_epi16(rounded(v[i]), low, rounded(v[i + n / 2]));
#pragma GCC unroll 3
    for (int stage = 1; stage < n / 2; stage *= 2) {
#pragma GCC unroll 4
      for (int i = 0; i < n / 4; ++i) {
        next[2 * i] = _mm512_permutex2var_epi16(t[i], low, t[i + n / 4]);
        next[2 * i + 1] = _mm512_permutex2var_epi16(t[i], high, t[i + n / 4]);
      }
#pragma GCC unroll 8
      for (int i = 0; i < n / 2; ++i) t[i] = next[i];
    }
#pragma GCC unroll 8
    for (int i = 0; i < n / 2; ++i) _mm512_storeu_si512(to + 32 * i, t[i]);
  }
#endif

  // Only declared: vectors hold tables of 16 floats.
  static void byte_planes(const float* p, V* planes);

  static F bytes_to_float(const uint8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  }
  static F scales(const float* p) { return _mm512_loadu_ps(p); }
  static F scales(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F scales(const BFloat* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  template <int n>
  static F repeated(const float* p) {
    if (n == 16) return _mm512_loadu_ps(p);
    if (n == 8) return _mm512_broadcast_f32x8(_mm256_loadu_ps(p));
    if (n == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(p));
    return _mm512_castsi512_ps(_mm512_broadcastq_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  }
  template <int n>
  static F repeated(const Half* p) { return _mm512_cvtph_ps(repeated16<n>(p)); }
  template <int n>
  static F repeated(const BFloat* p) { return widen(repeated16<n>(p)); }
  static F lane_scales(const float* p) {
    __m512 a = _mm512_castps128_ps512(_mm_loadu_ps(p));
    a = _mm512_insertf32x4(a, _mm_loadu_ps(p + 16), 1);
    a = _mm512_insertf32x4(a, _mm_loadu_ps(p + 32), 2);
    return _mm512_insertf32x4(a, _mm_loadu_ps(p + 48), 3);
  }
  static F lane_scales(const Half* p) { return _mm512_cvtph_ps(fours(p)); }
  static F lane_scales(const BFloat* p) { return widen(fours(p)); }
  static void lane_store(float* p, F a) {
    _mm_storeu_ps(p, _mm512_castps512_ps128(a));
    _mm_storeu_ps(p + 16, _mm512_extractf32x4_ps(a, 1));
    _mm_storeu_ps(p + 32, _mm512_extractf32x4_ps(a, 2));
    _mm_storeu_ps(p + 48, _mm512_extractf32x4_ps(a, 3));
  }

 private:
  static F widen(__m256i a) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(a), 16)); }
  template <int n>
  static __m256i repeated16(const void* p) {
    const __m128i* at = static_cast<const __m128i*>(p);
    if (n == 16) return _mm256_loadu_si256(static_cast<const __m256i*>(p));
    if (n == 8) return _mm256_broadcastsi128_si256(_mm_loadu_si128(at));
    if (n == 4) return _mm256_broadcastq_epi64(_mm_loadl_epi64(at));
    return _mm256_broadcastd_epi32(_mm_loadu_si32(at));
  }
  template <class T>
  static __m256i fours(const T* p) {
    const __m128i low = _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)),
                                           _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 16)));
    const __m128i high = _mm_unpacklo_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 32)),
                                            _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 48)));
    return _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
  }
};
