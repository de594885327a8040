// Plain C++ of 16-byte vectors: what runs where nothing better does, and what each function means. Wider vectors are
// several such lanes side by side: pick, low8, high8, low16 and high16 stay inside a lane, and functions named lane_
// read or write four floats of each lane at a distance of 16 floats.
#pragma once

struct Simd {
  // Entries of the largest table that `lookup` is for (kTable). By the number of registers: tokens that a product of four
  // decoded rows takes at once (kBatch); rows of codes that are taken at once with one token, by integers too, and tokens
  // with a row or two (kRows, kIntegerRows, kTokens). Measured: tokens up to which rows are decoded in registers (kFew).
  static constexpr int kBytes = 16, kFloats = 4, kTable = 4, kBatch = 2, kRows = 1, kIntegerRows = 1, kTokens = 2, kFew = 2;
  // How often `dot` may add to a sum: 16-bit sums of two products take four additions, and so do 32-bit ones once shifted by
  // two bytes.
  static constexpr int kAdds = 4;
  // Measured: tokens up to which integer products of one, two and three digits are faster than floating ones.
  static constexpr int64_t kIntegerTokens[3] = {16, 12, 8};
  struct V {
    uint8_t b[16];
  };
  struct F {
    float f[4];
  };

  static V load(const void* p) { V v; std::memcpy(v.b, p, 16); return v; }
  static V broadcast16(const void* p) { return load(p); }
  static V set8(int v) { V r; std::memset(r.b, v, 16); return r; }
  static V set16(int v) { return each16(zero(), zero(), [v](uint16_t, uint16_t) { return static_cast<uint16_t>(v); }); }
  static V set32(int32_t v) { return each32(zero(), zero(), [v](uint32_t, uint32_t) { return static_cast<uint32_t>(v); }); }
  static V zero() { return set8(0); }
  static V both(V a, V b) { return each32(a, b, [](uint32_t x, uint32_t y) { return x & y; }); }
  static V either(V a, V b) { return each32(a, b, [](uint32_t x, uint32_t y) { return x | y; }); }
  static V right16(V a, int n) { return each16(a, a, [n](uint16_t x, uint16_t) { return static_cast<uint16_t>(x >> n); }); }
  static V left16(V a, int n) { return each16(a, a, [n](uint16_t x, uint16_t) { return static_cast<uint16_t>(x << n); }); }
  static V left32(V a, int n) { return each32(a, a, [n](uint32_t x, uint32_t) { return x << n; }); }
  static V right32(V a, int n) { return each32(a, a, [n](uint32_t x, uint32_t) { return x >> n; }); }
  // Number `index` of the table, by as many low bits as it takes.
  static F lookup(F table, V index) {
    F r;
    for (int i = 0; i < 4; ++i) r.f[i] = table.f[index.b[4 * i] & 3];
    return r;
  }
  static V add16(V a, V b) { return each16(a, b, [](uint16_t x, uint16_t y) { return static_cast<uint16_t>(x + y); }); }
  static V sub16(V a, V b) { return each16(a, b, [](uint16_t x, uint16_t y) { return static_cast<uint16_t>(x - y); }); }
  static V add32(V a, V b) { return each32(a, b, [](uint32_t x, uint32_t y) { return x + y; }); }
  static V sub32(V a, V b) { return each32(a, b, [](uint32_t x, uint32_t y) { return x - y; }); }
  // Byte `index` of the lane's table; indices are below 16.
  static V pick(V table, V index) { V r; for (int i = 0; i < 16; ++i) r.b[i] = table.b[index.b[i] & 15]; return r; }
  // The low or high halves of two vectors, interleaved.
  static V low8(V a, V b) { V r; for (int i = 0; i < 8; ++i) { r.b[2 * i] = a.b[i]; r.b[2 * i + 1] = b.b[i]; } return r; }
  static V high8(V a, V b) { V r; for (int i = 0; i < 8; ++i) { r.b[2 * i] = a.b[8 + i]; r.b[2 * i + 1] = b.b[8 + i]; } return r; }
  static V low16(V a, V b) { return interleave16(a, b, 0); }
  static V high16(V a, V b) { return interleave16(a, b, 8); }

  // Sums of products of codes and signed bytes: of four each, or in any order that has the same sum. At most kAdds are added
  // before `dot_result` gives 32-bit sums.
  static V dot(V sum, V u, V s) {
    V r;
    for (int i = 0; i < 16; i += 4) {
      int32_t total;
      std::memcpy(&total, sum.b + i, 4);
      for (int j = i; j < i + 4; ++j) total += u.b[j] * static_cast<int8_t>(s.b[j]);
      std::memcpy(r.b + i, &total, 4);
    }
    return r;
  }
  static V dot_result(V sum) { return sum; }

  static F as_float(V a) { F r; std::memcpy(r.f, a.b, 16); return r; }
  static F to_float(V a) {
    int32_t v[4];
    std::memcpy(v, a.b, 16);
    return F{{static_cast<float>(v[0]), static_cast<float>(v[1]), static_cast<float>(v[2]), static_cast<float>(v[3])}};
  }
  static F loadf(const float* p) { return F{{p[0], p[1], p[2], p[3]}}; }
  // n numbers, again and again, as `lookup` takes them.
  template <int n>
  static F table(const float* p) { return repeated<n>(p); }
  static void storef(float* p, F a) { std::memcpy(p, a.f, 16); }
  static F setf(float v) { return F{{v, v, v, v}}; }
  static F zerof() { return setf(0.0f); }
  static F addf(F a, F b) { return each(a, b, [](float x, float y) { return x + y; }); }
  static F subf(F a, F b) { return each(a, b, [](float x, float y) { return x - y; }); }
  static F mulf(F a, F b) { return each(a, b, [](float x, float y) { return x * y; }); }
  static F fma(F a, F b, F c) { return addf(mulf(a, b), c); }
  // Adds `scale` where the bit of an element is set.
  static F add_bits(F sum, F scale, uint32_t bits) {
    for (int i = 0; i < 4; ++i) sum.f[i] += (bits >> i) & 1u ? scale.f[i] : 0.0f;
    return sum;
  }
  static float sum(F a) { return (a.f[0] + a.f[1]) + (a.f[2] + a.f[3]); }
  // The elements of two vectors in turns, as two vectors.
  static void interleave(F a, F b, F* low, F* high) {
    *low = F{{a.f[0], b.f[0], a.f[1], b.f[1]}}, *high = F{{a.f[2], b.f[2], a.f[3], b.f[3]}};
  }

  // The bytes of 16 floats, in all lanes, the most significant ones first.
  static void byte_planes(const float* p, V* planes) {
    for (int i = 0; i < 16; ++i) {
      uint32_t word;
      std::memcpy(&word, p + i, 4);
      for (int b = 0; b < 4; ++b) planes[b].b[i] = static_cast<uint8_t>(word >> (24 - 8 * b));
    }
  }

  static F bytes_to_float(const uint8_t* p) {
    return F{{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]), static_cast<float>(p[3])}};
  }
  template <class T>
  static F scales(const T* p) { return F{{wide(p[0]), wide(p[1]), wide(p[2]), wide(p[3])}}; }
  // n numbers, again and again.
  template <int n, class T>
  static F repeated(const T* p) { return F{{wide(p[0]), wide(p[1]), wide(p[2 % n]), wide(p[3 % n])}}; }
  template <class T>
  static F lane_scales(const T* p) { return scales(p); }
  static void lane_store(float* p, F a) { storef(p, a); }

 private:
  static float wide(float v) { return v; }
  static float wide(BFloat v) {
    const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
    float r;
    std::memcpy(&r, &bits, 4);
    return r;
  }
  static float wide(Half v) {
    const int exponent = (v.bits >> 10) & 31, fraction = v.bits & 1023;
    float r;
    if (exponent == 31) {
      r = fraction ? NAN : INFINITY;
    } else if (exponent == 0) {
      r = std::ldexp(static_cast<float>(fraction), -24);
    } else {
      r = std::ldexp(static_cast<float>(1024 + fraction), exponent - 25);
    }
    return v.bits >> 15 ? -r : r;
  }
  template <class Op>
  static F each(F a, F b, Op op) { return F{{op(a.f[0], b.f[0]), op(a.f[1], b.f[1]), op(a.f[2], b.f[2]), op(a.f[3], b.f[3])}}; }
  template <class T, class Op>
  static V each_of(V a, V b, Op op) {
    T x[16 / sizeof(T)], y[16 / sizeof(T)];
    std::memcpy(x, a.b, 16);
    std::memcpy(y, b.b, 16);
    for (unsigned i = 0; i < 16 / sizeof(T); ++i) x[i] = op(x[i], y[i]);
    V r;
    std::memcpy(r.b, x, 16);
    return r;
  }
  template <class Op>
  static V each16(V a, V b, Op op) { return each_of<uint16_t>(a, b, op); }
  template <class Op>
  static V each32(V a, V b, Op op) { return each_of<uint32_t>(a, b, op); }
  static V interleave16(V a, V b, int from) {
    V r;
    for (int i = 0; i < 4; ++i) {
      std::memcpy(r.b + 4 * i, a.b + from + 2 * i, 2);
      std::memcpy(r.b + 4 * i + 2, b.b + from + 2 * i, 2);
    }
    return r;
  }
};
