// The products, for any `Simd`. Included once by each translation unit of one instruction set.
#pragma once

// Shifts by a run's place must be constants, and arrays of vectors registers. Plain C++ gains nothing from it.
#if defined(JAXQ_ISA_SCALAR)
#define JAXQ_UNROLL(n)
#else
#define JAXQ_PRAGMA(text) _Pragma(#text)
#define JAXQ_UNROLL(n) JAXQ_PRAGMA(GCC unroll n)
#endif

namespace {

using V = Simd::V;
using F = Simd::F;
constexpr int kParts = static_cast<int>(kRun / Simd::kBytes);  // vectors in a run

// ---- codes ----

// The codes of vector `part` of run `run` of a block, one in each byte. `run` is known when this is compiled.
template <int kBits>
inline V codes_of(const uint8_t* block, int run, int part) {
  constexpr int kNarrow = kBits == 3 ? 2 : kBits;
  constexpr int kRunsInLine = 8 / kNarrow;
  const uint8_t* line = block + (run / kRunsInLine) * kRun + part * Simd::kBytes;
  const int shift = (run % kRunsInLine) * kNarrow;
  const V low = Simd::both(Simd::right16(Simd::load(line), shift), Simd::set8((1 << kNarrow) - 1));
  if (kBits != 3) return low;
  const V bits = Simd::load(block + 2 * kRun + part * Simd::kBytes);
  const V high = run >= 2 ? Simd::right16(bits, run - 2) : Simd::left16(bits, 2 - run);
  return Simd::either(low, Simd::both(high, Simd::set8(4)));
}

// Decoded vectors come as four of floats; vector q holds inputs 16 * lane + 4 * q + (0 to 3).
void order(const float* x, int64_t tokens, int64_t inputs, int64_t padded, float* out) {
  constexpr int kLanes = Simd::kBytes / 16;
  for (int64_t token = 0; token < tokens; ++token) {
    const float* from = x + token * inputs;
    float* to = out + token * padded;
    for (int64_t start = 0; start < padded; start += Simd::kBytes)
      for (int q = 0; q < 4; ++q)
        for (int lane = 0; lane < kLanes; ++lane)
          for (int i = 0; i < 4; ++i) {
            const int64_t input = start + 16 * lane + 4 * q + i;
            to[start + q * Simd::kFloats + 4 * lane + i] = input < inputs ? from[input] : 0.0f;
          }
  }
}

// Leading bytes of a float32 that numbers of a type use: half precision has 11 significant bits.
template <class T>
constexpr int kBytesOf = 4;
template <>
constexpr int kBytesOf<Half> = 3;
template <>
constexpr int kBytesOf<BFloat> = 2;

// Values of codes from a table of at most 16 numbers, looked up byte by byte: exact.
template <class T>
struct TableValues {
  static constexpr int kBytesOfValue = kBytesOf<T>;
  V planes[kBytesOfValue];

  void row(const T* values, int entries) {
    // Codes never exceed the entries; the rest is filled so that nothing is left undefined.
    T all[16];
    for (int i = 0; i < 16; ++i) all[i] = values[i & (entries - 1)];
    float wide[16];
    for (int i = 0; i < 16; i += Simd::kFloats) Simd::storef(wide + i, Simd::scales(all + i));
    // By bytes, the most significant first.
    uint8_t bytes[16 * kBytesOfValue];
    for (int i = 0; i < 16; ++i) {
      uint32_t word;
      __builtin_memcpy(&word, wide + i, 4);
      for (int p = 0; p < kBytesOfValue; ++p) bytes[16 * p + i] = static_cast<uint8_t>(word >> (24 - 8 * p));
    }
    for (int p = 0; p < kBytesOfValue; ++p) planes[p] = Simd::broadcast16(bytes + 16 * p);
  }
  void start(int64_t) {}
  void next() {}
  void operator()(V codes, F out[4]) const {
    const V zero = Simd::zero();
    const V b3 = Simd::pick(planes[0], codes), b2 = Simd::pick(planes[1], codes);
    const V b1 = kBytesOfValue > 2 ? Simd::pick(planes[kBytesOfValue > 2 ? 2 : 0], codes) : zero;
    const V b0 = kBytesOfValue > 3 ? Simd::pick(planes[kBytesOfValue > 3 ? 3 : 0], codes) : zero;
    const V upper_low = Simd::low8(b2, b3), upper_high = Simd::high8(b2, b3);
    const V lower_low = kBytesOfValue > 2 ? Simd::low8(b0, b1) : zero;
    const V lower_high = kBytesOfValue > 2 ? Simd::high8(b0, b1) : zero;
    out[0] = Simd::as_float(Simd::low16(lower_low, upper_low));
    out[1] = Simd::as_float(Simd::high16(lower_low, upper_low));
    out[2] = Simd::as_float(Simd::low16(lower_high, upper_high));
    out[3] = Simd::as_float(Simd::high16(lower_high, upper_high));
  }
};

// (code - zero) * scale of each group. A code becomes a float by standing below the exponent of 2^23.
struct GridValues {
  const float* scales;
  const float* zeros;
  int64_t group_runs, groups;
  int64_t group, left;
  F scale, zero;

  void start(int64_t run) {
    group = run / group_runs;
    left = (group + 1) * group_runs - run;
    enter();
  }
  // After each run. What lies beyond the last group stays in it.
  void next() {
    if (--left) return;
    left = group_runs;
    ++group;
    enter();
  }
  void enter() {
    const int64_t at = group < groups ? group : groups - 1;
    scale = Simd::setf(scales[at]);
    zero = Simd::setf(8388608.0f + zeros[at]);
  }
  void operator()(V codes, F out[4]) const {
    const V none = Simd::zero(), exponent = Simd::set16(0x4B00);
    const V low = Simd::low8(codes, none), high = Simd::high8(codes, none);
    const V words[4] = {Simd::low16(low, exponent), Simd::high16(low, exponent), Simd::low16(high, exponent),
                        Simd::high16(high, exponent)};
    for (int q = 0; q < 4; ++q) out[q] = Simd::mulf(Simd::subf(Simd::as_float(words[q]), zero), scale);
  }
};

template <class T>
inline void widen_scales(const T* scale, const uint8_t* zero, int64_t padded, float* scales, float* zeros) {
  for (int64_t g = 0; g < padded; g += Simd::kFloats) {
    Simd::storef(scales + g, Simd::scales(scale + g));
    Simd::storef(zeros + g, Simd::bytes_to_float(zero + g));
  }
}

inline void grid_row(const Grid& grid, int64_t row, float* scales, float* zeros) {
  const int64_t at = row * grid.padded_groups;
  const uint8_t* zero = grid.zero + at;
  switch (grid.type) {
    case kFloat32: return widen_scales(static_cast<const float*>(grid.scale) + at, zero, grid.padded_groups, scales, zeros);
    case kFloat16: return widen_scales(static_cast<const Half*>(grid.scale) + at, zero, grid.padded_groups, scales, zeros);
    case kBFloat16: return widen_scales(static_cast<const BFloat*>(grid.scale) + at, zero, grid.padded_groups, scales, zeros);
  }
}

// One row with one token: values go from the registers of the decoder to those of the product.
template <int kBits, class Values>
inline float row_product(const uint8_t* codes, int64_t blocks, Values values, const float* x) {
  constexpr int kRuns = static_cast<int>(runs_in_block(kBits));
  F sums[4] = {Simd::zerof(), Simd::zerof(), Simd::zerof(), Simd::zerof()};
  values.start(0);
  for (int64_t block = 0; block < blocks; ++block) {
    const uint8_t* at = codes + block * bytes_in_block(kBits);
JAXQ_UNROLL(8)
    for (int run = 0; run < kRuns; ++run) {
JAXQ_UNROLL(4)
      for (int part = 0; part < kParts; ++part) {
        F w[4];
        values(codes_of<kBits>(at, run, part), w);
JAXQ_UNROLL(4)
        for (int q = 0; q < 4; ++q) sums[q] = Simd::fma(w[q], Simd::loadf(x + q * Simd::kFloats), sums[q]);
        x += Simd::kBytes;
      }
      values.next();
    }
  }
  return Simd::sum(Simd::addf(Simd::addf(sums[0], sums[1]), Simd::addf(sums[2], sums[3])));
}

template <int kBits, class Values>
inline void decode(const uint8_t* codes, int64_t first, int64_t last, Values values, float* out) {
  constexpr int kRuns = static_cast<int>(runs_in_block(kBits));
  values.start(first * kRuns);
  for (int64_t block = first; block < last; ++block) {
    const uint8_t* at = codes + block * bytes_in_block(kBits);
JAXQ_UNROLL(8)
    for (int run = 0; run < kRuns; ++run) {
JAXQ_UNROLL(4)
      for (int part = 0; part < kParts; ++part) {
        F w[4];
        values(codes_of<kBits>(at, run, part), w);
JAXQ_UNROLL(4)
        for (int q = 0; q < 4; ++q) Simd::storef(out + q * Simd::kFloats, w[q]);
        out += Simd::kBytes;
      }
      values.next();
    }
  }
}

// y[token, row] += w[row] . x[token] for kRowsAtOnce rows and kTokens tokens.
template <int kTokens>
inline void product_block(const float* w, int64_t width, const float* x, int64_t x_stride, float* y, int64_t y_stride,
                          int64_t rows) {
  F sums[kRowsAtOnce][kTokens];
  for (int r = 0; r < kRowsAtOnce; ++r)
    for (int t = 0; t < kTokens; ++t) sums[r][t] = Simd::zerof();
  for (int64_t k = 0; k < width; k += Simd::kFloats) {
    F rows_of[kRowsAtOnce];
JAXQ_UNROLL(4)
    for (int r = 0; r < kRowsAtOnce; ++r) rows_of[r] = Simd::loadf(w + r * kSlabStride + k);
JAXQ_UNROLL(4)
    for (int t = 0; t < kTokens; ++t) {
      const F v = Simd::loadf(x + t * x_stride + k);
JAXQ_UNROLL(4)
      for (int r = 0; r < kRowsAtOnce; ++r) sums[r][t] = Simd::fma(rows_of[r], v, sums[r][t]);
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int t = 0; t < kTokens; ++t) y[t * y_stride + r] += Simd::sum(sums[r][t]);
}

inline void product_tokens(const float* w, int64_t width, const float* x, int64_t x_stride, float* y, int64_t y_stride,
                           int64_t rows, int64_t tokens) {
  int64_t t = 0;
  for (; t + Simd::kBatch <= tokens; t += Simd::kBatch)
    product_block<Simd::kBatch>(w, width, x + t * x_stride, x_stride, y + t * y_stride, y_stride, rows);
  for (; t + 2 <= tokens; t += 2)
    product_block<2>(w, width, x + t * x_stride, x_stride, y + t * y_stride, y_stride, rows);
  for (; t < tokens; ++t)
    product_block<1>(w, width, x + t * x_stride, x_stride, y + t * y_stride, y_stride, rows);
}

// `values_of(row)` gives the decoder of a row.
template <int kBits, class ValuesOf>
inline void decoded_products(const Codes& c, ValuesOf values_of, const float* x, int64_t begin, int64_t end, float* slab) {
  constexpr int64_t kRuns = runs_in_block(kBits);
  const int64_t padded = c.blocks * kRuns * kRun;
  if (c.tokens == 1) {
    for (int64_t row = begin; row < end; ++row)
      c.y[row] = row_product<kBits>(c.codes + row * c.row_bytes, c.blocks, values_of(row), x);
    return;
  }
  constexpr int64_t kBlocks = kSlab / (kRuns * kRun);
  for (int64_t row = begin; row < end; row += kRowsAtOnce) {
    const int64_t rows = end - row < kRowsAtOnce ? end - row : kRowsAtOnce;
    for (int64_t token = 0; token < c.tokens; ++token)
      for (int64_t r = 0; r < rows; ++r) c.y[token * c.rows + row + r] = 0.0f;
    for (int64_t first = 0; first < c.blocks; first += kBlocks) {
      const int64_t last = first + kBlocks < c.blocks ? first + kBlocks : c.blocks;
      const int64_t width = (last - first) * kRuns * kRun;
      for (int64_t r = 0; r < kRowsAtOnce; ++r) {
        // Rows beyond the last are computed from it and thrown away.
        const int64_t from = row + (r < rows ? r : rows - 1);
        decode<kBits>(c.codes + from * c.row_bytes, first, last, values_of(from), slab + r * kSlabStride);
      }
      product_tokens(slab, width, x + first * kRuns * kRun, padded, c.y + row, c.rows, rows, c.tokens);
    }
  }
}

template <int kBits, class T>
void lookup_of(const Codes& c, const Table& table, const float* x, int64_t begin, int64_t end, float* scratch) {
  constexpr int kEntries = 1 << kBits;
  const auto values_of = [&](int64_t row) {
    TableValues<T> values;
    values.row(static_cast<const T*>(table.values) + row * kEntries, kEntries);
    return values;
  };
  decoded_products<kBits>(c, values_of, x, begin, end, scratch);
}

template <int kBits>
void lookup_bits(const Codes& c, const Table& table, const float* x, int64_t begin, int64_t end, float* scratch) {
  switch (table.type) {
    case kFloat32: return lookup_of<kBits, float>(c, table, x, begin, end, scratch);
    case kFloat16: return lookup_of<kBits, Half>(c, table, x, begin, end, scratch);
    case kBFloat16: return lookup_of<kBits, BFloat>(c, table, x, begin, end, scratch);
  }
}

void lookup(const Codes& c, const Table& table, const float* x, int64_t begin, int64_t end, float* scratch) {
  switch (c.bits) {
    case 1: return lookup_bits<1>(c, table, x, begin, end, scratch);
    case 2: return lookup_bits<2>(c, table, x, begin, end, scratch);
    case 3: return lookup_bits<3>(c, table, x, begin, end, scratch);
    case 4: return lookup_bits<4>(c, table, x, begin, end, scratch);
  }
}

template <int kBits>
void grid_of(const Codes& c, const Grid& grid, const float* x, int64_t begin, int64_t end, float* scratch) {
  float* scales = scratch + kRowsAtOnce * kSlabStride;
  float* zeros = scales + grid.padded_groups;
  const auto values_of = [&](int64_t row) {
    grid_row(grid, row, scales, zeros);
    return GridValues{scales, zeros, grid.group_runs, grid.groups, 0, 0, Simd::zerof(), Simd::zerof()};
  };
  decoded_products<kBits>(c, values_of, x, begin, end, scratch);
}

void grid(const Codes& c, const Grid& grid, const float* x, int64_t begin, int64_t end, float* scratch) {
  switch (c.bits) {
    case 1: return grid_of<1>(c, grid, x, begin, end, scratch);
    case 2: return grid_of<2>(c, grid, x, begin, end, scratch);
    case 3: return grid_of<3>(c, grid, x, begin, end, scratch);
    case 4: return grid_of<4>(c, grid, x, begin, end, scratch);
  }
}

// ---- integer products of uniform grids ----

template <int kDigits>
inline F digits_to_float(const V sums[kDigits]) {
  V total = Simd::dot_result(sums[0]);
  if (kDigits > 1) total = Simd::add32(total, Simd::left32(Simd::dot_result(sums[kDigits > 1 ? 1 : 0]), 8));
  if (kDigits > 2) total = Simd::add32(total, Simd::left32(Simd::dot_result(sums[kDigits > 2 ? 2 : 0]), 16));
  return Simd::to_float(total);
}

// One row: sum over groups of scale * unit * (codes . digits). `factors` holds scale * unit.
template <int kBits, int kDigits>
inline float integer_row(const uint8_t* codes, int64_t blocks, const int8_t* digits, int64_t padded, const float* factors,
                         int64_t group_runs, int64_t groups) {
  constexpr int kRuns = static_cast<int>(runs_in_block(kBits));
  // 16-bit sums of two products take four additions, and so do 32-bit ones once shifted by two bytes.
  constexpr int kLimit = kParts >= 4 ? 1 : 4 / kParts;
  F sum = Simd::zerof();
  V sums[kDigits];
  for (int p = 0; p < kDigits; ++p) sums[p] = Simd::zero();
  int64_t group = 0, left = group_runs;
  int held = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const uint8_t* at = codes + block * bytes_in_block(kBits);
JAXQ_UNROLL(8)
    for (int run = 0; run < kRuns; ++run) {
JAXQ_UNROLL(4)
      for (int part = 0; part < kParts; ++part) {
        const V c = codes_of<kBits>(at, run, part);
JAXQ_UNROLL(3)
        for (int p = 0; p < kDigits; ++p)
          sums[p] = Simd::dot(sums[p], c, Simd::load(digits + p * padded + part * Simd::kBytes));
      }
      digits += kRun;
      ++held;
      --left;
      if (left == 0 || held == kLimit) {
        sum = Simd::fma(digits_to_float<kDigits>(sums), Simd::setf(factors[group]), sum);
        for (int p = 0; p < kDigits; ++p) sums[p] = Simd::zero();
        held = 0;
        if (left == 0) {
          left = group_runs;
          // Padding beyond the last group is multiplied by digits of zero.
          group = group + 1 < groups ? group + 1 : group;
        }
      }
    }
  }
  return Simd::sum(Simd::fma(digits_to_float<kDigits>(sums), Simd::setf(factors[group]), sum));
}

template <int kBits, int kDigits>
void integer_of(const Codes& c, const Grid& grid, const Digits& x, int64_t begin, int64_t end, float* scratch) {
  const int64_t padded = c.blocks * runs_in_block(kBits) * kRun, groups = grid.padded_groups;
  float* scales = scratch;
  float* zeros = scales + groups;
  float* factors = zeros + groups;
  for (int64_t row = begin; row < end; ++row) {
    grid_row(grid, row, scales, zeros);
    for (int64_t token = 0; token < c.tokens; ++token) {
      const float* unit = x.unit + token * groups;
      const float* sum = x.sum + token * groups;
      F correction = Simd::zerof();
      for (int64_t g = 0; g < groups; g += Simd::kFloats) {
        const F scale = Simd::loadf(scales + g);
        Simd::storef(factors + g, Simd::mulf(scale, Simd::loadf(unit + g)));
        correction = Simd::fma(Simd::mulf(scale, Simd::loadf(zeros + g)), Simd::loadf(sum + g), correction);
      }
      const int8_t* digits = x.bytes + token * kDigits * padded;
      c.y[token * c.rows + row] = integer_row<kBits, kDigits>(c.codes + row * c.row_bytes, c.blocks, digits, padded,
                                                             factors, grid.group_runs, grid.groups) -
                                  Simd::sum(correction);
    }
  }
}

template <int kBits>
void integer_bits(const Codes& c, const Grid& grid, const Digits& x, int64_t begin, int64_t end, float* scratch) {
  if (x.count == 1) return integer_of<kBits, 1>(c, grid, x, begin, end, scratch);
  if (x.count == 2) return integer_of<kBits, 2>(c, grid, x, begin, end, scratch);
  return integer_of<kBits, 3>(c, grid, x, begin, end, scratch);
}

void integer(const Codes& c, const Grid& grid, const Digits& x, int64_t begin, int64_t end, float* scratch) {
  switch (c.bits) {
    case 1: return integer_bits<1>(c, grid, x, begin, end, scratch);
    case 2: return integer_bits<2>(c, grid, x, begin, end, scratch);
    case 3: return integer_bits<3>(c, grid, x, begin, end, scratch);
    case 4: return integer_bits<4>(c, grid, x, begin, end, scratch);
  }
}

// ---- activations as integers ----

inline int32_t nearest_integer(float v) { return static_cast<int32_t>(v + (v < 0.0f ? -0.5f : 0.5f)); }

// A unit of which `most` make up `top`, and its reciprocal, which is 0 where there is nothing to divide.
inline float unit_of(float top, float most, float* inverse) {
  // Not so small that its reciprocal overflows, or its product with a scale underflows: activations are rounded to
  // multiples of this at the finest.
  constexpr float kSmallest = 1.0e-28f;
  const bool finite = top <= 3.4028235e38f;
  const float unit = top / most > kSmallest ? top / most : kSmallest;
  *inverse = finite && top > 0.0f ? 1.0f / unit : 0.0f;
  // Infinite and undefined activations must not vanish.
  return finite ? unit : __builtin_nanf("");
}

inline float greater(float a, float b) { return a > b || a != a ? a : b; }

// Digits of base 256 from -128 to 127, for the groups [begin, end) of all tokens' groups.
void digits(const float* x, int64_t inputs, int64_t padded, const Grid& grid, int count, int64_t begin, int64_t end,
            int8_t* bytes, float* units, float* sums) {
  const float most = count == 1 ? 127.0f : count == 2 ? 127.0f * 256 : 127.0f * 65536;
  const int64_t size = grid.group_runs * kRun;
  for (int64_t job = begin; job < end; ++job) {
    const int64_t token = job / grid.groups, group = job % grid.groups;
    const float* from = x + token * inputs;
    int8_t* to = bytes + token * count * padded;
    const int64_t first = group * size, stop = first + size < inputs ? first + size : inputs;
    float top = 0.0f;
    for (int64_t k = first; k < stop; ++k) top = greater(__builtin_fabsf(from[k]), top);
    float inverse;
    const float unit = unit_of(top, most, &inverse);
    int64_t sum = 0;
    if (inverse > 0.0f) {
      for (int64_t k = first; k < stop; ++k) {
        int32_t v = nearest_integer(from[k] * inverse);
        sum += v;
        for (int p = 0; p < count; ++p) {
          const int8_t digit = static_cast<int8_t>(v & 255);
          to[p * padded + k] = digit;
          v = (v - digit) >> 8;
        }
      }
    }
    units[token * grid.padded_groups + group] = unit;
    sums[token * grid.padded_groups + group] = static_cast<float>(sum) * unit;
  }
}

// The tables of `Sums`, for the groups [begin, end) of all tokens' groups.
void subset_sums(const float* x, int64_t inputs, const Planes& p, int count, int64_t begin, int64_t end, uint8_t* tables,
                 float* units, float* sums) {
  const float most = count == 1 ? 127.0f : count == 2 ? 32760.0f : 8388600.0f;
  const int32_t bias = 1 << (8 * count - 1);
  for (int64_t job = begin; job < end; ++job) {
    const int64_t token = job / p.groups, group = job % p.groups;
    const float* from = x + token * inputs;
    const int64_t first = group * p.group_pairs * 2;
    const int64_t stop = group + 1 < p.groups ? first + p.group_pairs * 2 : p.pairs * 2;
    float top = 0.0f, sum = 0.0f;
    for (int64_t quad = first; quad < stop; ++quad) {
      float above = 0.0f, below = 0.0f, some = 0.0f;
      for (int64_t k = quad * 4; k < quad * 4 + 4 && k < inputs; ++k) {
        above += from[k] > 0.0f ? from[k] : 0.0f;
        below -= from[k] < 0.0f ? from[k] : 0.0f;
        some += from[k];
      }
      top = greater(some != some ? some : above, greater(below, top));
      sum += some;
    }
    float inverse;
    units[job] = unit_of(top, most, &inverse);
    sums[job] = sum;
    for (int64_t quad = first; quad < stop; ++quad) {
      float v[4];
      for (int i = 0; i < 4; ++i) v[i] = inverse > 0.0f && quad * 4 + i < inputs ? from[quad * 4 + i] * inverse : 0.0f;
      int32_t total[16];
      if (count == 1) {
        // Each sum rounded once; with more bytes rounding the terms costs nothing that matters.
        float exact[16] = {0.0f};
        for (int i = 0; i < 4; ++i)
          for (int s = 0; s < 1 << i; ++s) exact[(1 << i) + s] = exact[s] + v[i];
        for (int s = 0; s < 16; ++s) total[s] = nearest_integer(exact[s]) + bias;
      } else {
        total[0] = bias;
        for (int i = 0; i < 4; ++i) {
          const int32_t term = nearest_integer(v[i]);
          for (int s = 0; s < 1 << i; ++s) total[(1 << i) + s] = total[s] + term;
        }
      }
      uint8_t* to = tables + (token * p.pairs * 2 + quad) * count * 16;
      for (int b = 0; b < count; ++b)
        for (int s = 0; s < 16; ++s) to[16 * b + s] = static_cast<uint8_t>(total[s] >> (8 * b));
    }
  }
}

// ---- bit planes: sums of four activations looked up by four bits ----

// Sums of looked-up bytes, 16 bits wide: of all bytes with the odd ones 256 times, and of the odd ones.
struct ByteSums {
  V all, odd;

  void add(V bytes) {
    all = Simd::add16(all, bytes);
    odd = Simd::add16(odd, Simd::right16(bytes, 8));
  }
  // As 32-bit numbers in the order of `order`: vector q holds bytes 16 * lane + 4 * q + (0 to 3).
  void widen(V out[4]) const {
    const V even = Simd::sub16(all, Simd::left16(odd, 8)), zero = Simd::zero();
    const V low = Simd::low16(even, odd), high = Simd::high16(even, odd);
    out[0] = Simd::low16(low, zero);
    out[1] = Simd::high16(low, zero);
    out[2] = Simd::low16(high, zero);
    out[3] = Simd::high16(high, zero);
  }
};

// Sums of 16 bits hold 257 bytes: that many quads, and fewer than 2^31 / 2^24 when three bytes make a number.
constexpr int64_t kPairsAtOnce = 32;

template <int kCount>
inline void plane_sums(const uint8_t* lines, const uint8_t* tables, int64_t pairs, F out[4]) {
  const V nibble = Simd::set8(15);
  ByteSums sums[kCount];
  for (int p = 0; p < kCount; ++p) sums[p] = ByteSums{Simd::zero(), Simd::zero()};
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const V line = Simd::load(lines + pair * kTile);
    const V low = Simd::both(line, nibble), high = Simd::both(Simd::right16(line, 4), nibble);
    const uint8_t* at = tables + pair * 2 * kCount * 16;
JAXQ_UNROLL(3)
    for (int p = 0; p < kCount; ++p) {
      sums[p].add(Simd::pick(Simd::broadcast16(at + 16 * p), low));
      sums[p].add(Simd::pick(Simd::broadcast16(at + 16 * (kCount + p)), high));
    }
  }
  V total[4];
  sums[0].widen(total);
JAXQ_UNROLL(3)
  for (int p = 1; p < kCount; ++p) {
    V more[4];
    sums[p].widen(more);
    for (int q = 0; q < 4; ++q) total[q] = Simd::add32(total[q], Simd::left32(more[q], 8 * p));
  }
  // Every table was raised by half its range.
  const V bias = Simd::set32(static_cast<int32_t>(static_cast<uint32_t>(2 * pairs) << (8 * kCount - 1)));
  for (int q = 0; q < 4; ++q) out[q] = Simd::to_float(Simd::sub32(total[q], bias));
}

template <int kCount, class T>
void planes_of(const Planes& p, const Sums& x, int64_t begin, int64_t end) {
  const int64_t quads = 2 * p.pairs;
  const T* scales = static_cast<const T*>(p.scale);
  for (int64_t tile = begin; tile < end; ++tile) {
    const uint8_t* lines = p.lines + tile * p.bits * p.pairs * kTile;
    const T* tile_scales = scales + tile * p.groups * (p.bits + 1) * kTile;
    const int64_t row = tile * kTile, rows = p.rows - row < kTile ? p.rows - row : kTile;
    for (int64_t token = 0; token < p.tokens; ++token) {
      float result[kTile];
      const uint8_t* tables = x.tables + token * quads * kCount * 16;
      for (int part = 0; part < kParts; ++part) {
        F y[4] = {Simd::zerof(), Simd::zerof(), Simd::zerof(), Simd::zerof()};
        const int64_t at = part * Simd::kBytes;
        for (int64_t g = 0; g < p.groups; ++g) {
          const T* group_scales = tile_scales + g * (p.bits + 1) * kTile + at;
          const F sum = Simd::setf(x.sum[token * p.groups + g]), unit = Simd::setf(x.unit[token * p.groups + g]);
          const int64_t stop = (g + 1) * p.group_pairs < p.pairs ? (g + 1) * p.group_pairs : p.pairs;
          for (int j = 0; j < p.bits; ++j) {
            F products[4] = {Simd::zerof(), Simd::zerof(), Simd::zerof(), Simd::zerof()};
            for (int64_t first = g * p.group_pairs; first < stop; first += kPairsAtOnce) {
              const int64_t pairs = stop - first < kPairsAtOnce ? stop - first : kPairsAtOnce;
              F some[4];
              plane_sums<kCount>(lines + (j * p.pairs + first) * kTile + at, tables + first * 2 * kCount * 16, pairs, some);
              for (int q = 0; q < 4; ++q) products[q] = Simd::addf(products[q], some[q]);
            }
            for (int q = 0; q < 4; ++q) {
              const F scale = Simd::mulf(Simd::lane_scales(group_scales + j * kTile + 4 * q), unit);
              y[q] = Simd::fma(products[q], scale, y[q]);
            }
          }
          for (int q = 0; q < 4; ++q)
            y[q] = Simd::fma(Simd::lane_scales(group_scales + p.bits * kTile + 4 * q), sum, y[q]);
        }
        for (int q = 0; q < 4; ++q) Simd::lane_store(result + at + 4 * q, y[q]);
      }
      for (int64_t r = 0; r < rows; ++r) p.y[token * p.rows + row + r] = result[r];
    }
  }
}

template <class T>
void planes_count(const Planes& p, const Sums& x, int64_t begin, int64_t end) {
  if (x.count == 1) return planes_of<1, T>(p, x, begin, end);
  if (x.count == 2) return planes_of<2, T>(p, x, begin, end);
  return planes_of<3, T>(p, x, begin, end);
}

void planes(const Planes& p, const Sums& x, int64_t begin, int64_t end) {
  switch (p.type) {
    case kFloat32: return planes_count<float>(p, x, begin, end);
    case kFloat16: return planes_count<Half>(p, x, begin, end);
    case kBFloat16: return planes_count<BFloat>(p, x, begin, end);
  }
}

// `pairs` bytes of one row, at a distance of a tile, to eight floats each. `scales` are at the same distance.
inline void decode_planes(const uint8_t* bytes, int64_t plane_stride, int bits, int64_t pairs, const float* scales, float* out) {
  F levels[9];
  for (int j = 0; j <= bits; ++j) levels[j] = Simd::setf(scales[j * kTile]);
  // A wide vector takes the bytes of two pairs; a last single one is followed by what the next group overwrites, or
  // by the room between rows.
  constexpr int kStep = Simd::kFloats > 8 ? Simd::kFloats / 8 : 1;
  for (int64_t pair = 0; pair < pairs; pair += kStep) {
    for (int at = 0; at < 8 * kStep; at += Simd::kFloats) {
      F sum = levels[bits];
      for (int j = 0; j < bits; ++j) {
        const uint8_t* from = bytes + j * plane_stride + pair * kTile;
        uint32_t word = from[0];
        if (kStep > 1 && pair + 1 < pairs) word |= static_cast<uint32_t>(from[kTile]) << 8;
        sum = Simd::add_bits(sum, levels[j], word >> at);
      }
      Simd::storef(out + pair * 8 + at, sum);
    }
  }
}

// Many tokens: a tile is decoded, a slab of inputs at a time, and multiplied as floats.
template <class T>
void planes_dense_of(const Planes& p, const float* x, int64_t inputs, int64_t begin, int64_t end, float* slab) {
  const T* scales = static_cast<const T*>(p.scale);
  for (int64_t tile = begin; tile < end; ++tile) {
    const uint8_t* lines = p.lines + tile * p.bits * p.pairs * kTile;
    const int64_t row = tile * kTile, rows = p.rows - row < kTile ? p.rows - row : kTile;
    for (int64_t token = 0; token < p.tokens; ++token)
      for (int64_t r = 0; r < rows; ++r) p.y[token * p.rows + row + r] = 0.0f;
    constexpr int64_t kPairs = kSlab / 8;
    for (int64_t first = 0; first < p.pairs; first += kPairs) {
      const int64_t last = first + kPairs < p.pairs ? first + kPairs : p.pairs;
      for (int64_t pair = first; pair < last;) {
        // The part of one group that lies in this slab.
        const int64_t g = pair / p.group_pairs, end_of_group = (g + 1) * p.group_pairs;
        const int64_t stop = end_of_group < last ? end_of_group : last;
        const T* group = scales + (tile * p.groups + g) * (p.bits + 1) * kTile;
        float wide[9][kTile];
        for (int j = 0; j <= p.bits; ++j)
          for (int64_t part = 0; part < kTile; part += Simd::kFloats)
            Simd::storef(wide[j] + part, Simd::scales(group + j * kTile + part));
        for (int64_t r = 0; r < rows; ++r)
          decode_planes(lines + pair * kTile + r, p.pairs * kTile, p.bits, stop - pair, wide[0] + r, slab + r * kSlabStride + (pair - first) * 8);
        pair = stop;
      }
      // Beyond the last input there are no activations to read.
      const int64_t start = first * 8;
      const int64_t width = (last * 8 < inputs ? last * 8 : inputs) - start, whole = width - width % Simd::kFloats;
      for (int64_t r = 0; r < rows; r += kRowsAtOnce) {
        const int64_t some = rows - r < kRowsAtOnce ? rows - r : kRowsAtOnce;
        product_tokens(slab + r * kSlabStride, whole, x + start, inputs, p.y + row + r, p.rows, some, p.tokens);
        for (int64_t token = 0; token < p.tokens; ++token)
          for (int64_t s = r; s < r + some; ++s)
            for (int64_t k = whole; k < width; ++k)
              p.y[token * p.rows + row + s] += slab[s * kSlabStride + k] * x[token * inputs + start + k];
      }
    }
  }
}

void planes_dense(const Planes& p, const float* x, int64_t inputs, int64_t begin, int64_t end, float* slab) {
  switch (p.type) {
    case kFloat32: return planes_dense_of<float>(p, x, inputs, begin, end, slab);
    case kFloat16: return planes_dense_of<Half>(p, x, inputs, begin, end, slab);
    case kBFloat16: return planes_dense_of<BFloat>(p, x, inputs, begin, end, slab);
  }
}

}  // namespace
