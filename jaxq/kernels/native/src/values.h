// Codes and their values: what all products of codes share. Included once by each translation unit of one instruction set.
#pragma once

// Shifts by a run's place must be constants, and arrays of vectors registers. Plain C++ gains nothing from it.
#if defined(JAXQ_ISA_SCALAR)
#define JAXQ_UNROLL(n)
#define JAXQ_INLINE
#else
#define JAXQ_PRAGMA(text) _Pragma(#text)
#define JAXQ_UNROLL(n) JAXQ_PRAGMA(GCC unroll n)
#define JAXQ_INLINE __attribute__((always_inline))
#endif
// Compiled once, not into each caller.
#define JAXQ_APART __attribute__((noinline))
// Plain loops into vectors, which GCC does not do everywhere: for some others it takes more registers than there are.
#if defined(__clang__)
#define JAXQ_VECTORIZED
#else
#define JAXQ_VECTORIZED __attribute__((optimize("O3")))
#endif

namespace {

using V = Simd::V;
using F = Simd::F;
constexpr int kParts = static_cast<int>(kRun / Simd::kBytes);  // vectors in a run

// A number known when this is compiled.
template <int k>
struct Int {
  static constexpr int value = k;
};

// body(Int<0>), ..., body(Int<n - 1>), without a loop: arrays that only these index become registers early on.
template <int n, class Body>
JAXQ_INLINE inline void each(const Body& body) {
  if constexpr (n > 0) {
    each<n - 1>(body);
    body(Int<n - 1>{});
  }
}

// body(Int<bits>) for the kLeast to 4 bits of a code.
template <int kLeast = 1, class Body>
inline void by_bits(int bits, const Body& body) {
  switch (bits) {
    case 1:
      if constexpr (kLeast == 1) body(Int<1>{});
      return;
    case 2: return body(Int<2>{});
    case 3: return body(Int<3>{});
    case 4: return body(Int<4>{});
  }
}

// Bytes of codes that are fetched ahead: some rows, whatever their length.
constexpr int64_t kAhead = 12288;

// kBits bits of each byte, from place `at` on.
template <int kBits>
inline V field(V bytes, int at) {
#if defined(JAXQ_NEON)
  if (at + kBits == 8) return Simd::right8(bytes, at);
#endif
  return Simd::both(Simd::right16(bytes, at), Simd::set8((1 << kBits) - 1));
}

// The codes of vector `part` of run `run` of a block, one in each byte. `run` is known when this is compiled. Loose
// ones have other bits above their own.
template <int kBits, bool kLoose = false>
inline V codes_of(const uint8_t* block, int run, int part) {
  constexpr int kNarrow = kBits == 3 ? 2 : kBits;
  constexpr int kRunsInLine = 8 / kNarrow;
  const uint8_t* line = block + (run / kRunsInLine) * kRun + part * Simd::kBytes;
  const int place = (run % kRunsInLine) * kNarrow;
  if (kBits != 3) return kLoose ? Simd::right16(Simd::load(line), place) : field<kNarrow>(Simd::load(line), place);
  const V bits = Simd::load(block + 2 * kRun + part * Simd::kBytes);
  const V high = run >= 2 ? Simd::right16(bits, run - 2) : Simd::left16(bits, 2 - run);
  return Simd::either(field<2>(Simd::load(line), place), Simd::both(high, Simd::set8(kLoose ? ~3 : 4)));
}

// Whether a vector of floats holds the value of every code, and is the way to look it up.
template <int kBits>
constexpr bool kFits = (1 << kBits) <= Simd::kTable;

// A vector of numbers of type X, and how many of them a vector of codes stands for.
template <class X>
using Vector = decltype(Simd::loadf(static_cast<const X*>(nullptr)));
template <class X>
constexpr int kVectors = sizeof(X);

// Vector q of the values of a vector of codes holds inputs kVectors * i + q where a vector of numbers is the table, and
// 16 * lane + 4 * q + (0 to 3) where values are made in lanes.
template <class X>
JAXQ_VECTORIZED void order(const X* x, int64_t tokens, int64_t inputs, int64_t padded, int bits, X* out) {
  const bool lanes = 1 << bits > Simd::kTable;
  constexpr int kEach = Simd::kBytes / kVectors<X>;
  for (int64_t token = 0; token < tokens; ++token) {
    const X* from = x + token * inputs;
    X* to = out + token * padded;
    for (int64_t start = 0; start < padded; start += Simd::kBytes, to += Simd::kBytes) {
      const X* some = from + start;
      X last[Simd::kBytes];
      if (start + Simd::kBytes > inputs) {
        for (int i = 0; i < Simd::kBytes; ++i) last[i] = start + i < inputs ? some[i] : X{};
        some = last;
      }
      for (int q = 0; q < kVectors<X>; ++q)
        for (int i = 0; i < kEach; ++i) to[q * kEach + i] = some[lanes ? i / 4 * 16 + 4 * q + i % 4 : kVectors<X> * i + q];
    }
  }
}

// ---- values of codes: `start` before the first run, `next` after each, and a call for each vector of codes, which
// gives something whose element q is a vector of numbers ----

// Looked up when it is asked for: there are not registers enough for four vectors of several rows.
template <class X>
struct Found {
  Vector<X> table;
  V codes;
  Vector<X> operator[](int q) const { return Simd::lookup(table, q ? Simd::right32(codes, 8 * q) : codes); }
};

struct Four {
  F v[4];
  F operator[](int q) const { return v[q]; }
};

// Leading bytes of a float32 that numbers of a type use: half precision has 11 significant bits.
template <class T>
constexpr int kBytesOf = 4;
template <>
constexpr int kBytesOf<Half> = 3;
template <>
constexpr int kBytesOf<BFloat> = 2;

// A table of 16 numbers by bytes, for vectors that do not hold as many floats: exact too.
template <class T>
struct BytePlanes {
  static constexpr int kBytesOfValue = kBytesOf<T>;
  V planes[kBytesOfValue];

  explicit BytePlanes(const T* values, int entries) {
    // Codes never exceed the entries; the rest is filled so that nothing is left undefined.
    T all[16];
    if (entries < 16) {
      for (int i = 0; i < 16; ++i) all[i] = values[i & (entries - 1)];
      values = all;
    }
    float wide[16];
    for (int i = 0; i < 16; i += Simd::kFloats) Simd::storef(wide + i, Simd::scales(values + i));
    V bytes[4];
    Simd::byte_planes(wide, bytes);
    for (int p = 0; p < kBytesOfValue; ++p) planes[p] = bytes[p];
  }
  Four operator()(V codes) const {
    const V zero = Simd::zero();
    const V b3 = Simd::pick(planes[0], codes), b2 = Simd::pick(planes[1], codes);
    const V b1 = kBytesOfValue > 2 ? Simd::pick(planes[kBytesOfValue > 2 ? 2 : 0], codes) : zero;
    const V b0 = kBytesOfValue > 3 ? Simd::pick(planes[kBytesOfValue > 3 ? 3 : 0], codes) : zero;
    const V upper_low = Simd::low8(b2, b3), upper_high = Simd::high8(b2, b3);
    const V lower_low = kBytesOfValue > 2 ? Simd::low8(b0, b1) : zero;
    const V lower_high = kBytesOfValue > 2 ? Simd::high8(b0, b1) : zero;
    return Four{{Simd::as_float(Simd::low16(lower_low, upper_low)), Simd::as_float(Simd::high16(lower_low, upper_low)),
                 Simd::as_float(Simd::low16(lower_high, upper_high)), Simd::as_float(Simd::high16(lower_high, upper_high))}};
  }
};

#if defined(JAXQ_NEON)
// Halves are widened by one instruction, and then have only two bytes to look up.
template <>
struct BytePlanes<Half> {
  V upper, lower;

  explicit BytePlanes(const Half* values, int entries) {
    uint8_t bytes[2][16];
    for (int i = 0; i < 16; ++i) {
      const uint16_t word = values[i & (entries - 1)].bits;
      bytes[0][i] = static_cast<uint8_t>(word >> 8), bytes[1][i] = static_cast<uint8_t>(word);
    }
    upper = Simd::load(bytes[0]), lower = Simd::load(bytes[1]);
  }
  Four operator()(V codes) const {
    const V b1 = Simd::pick(upper, codes), b0 = Simd::pick(lower, codes);
    const V low = Simd::low8(b0, b1), high = Simd::high8(b0, b1);
    return Four{{Simd::low_halves(low), Simd::high_halves(low), Simd::low_halves(high), Simd::high_halves(high)}};
  }
};
#endif

// Where a row's groups begin. What lies beyond the last group stays in it.
struct Groups {
  int64_t runs, count;
  int64_t group = 0, left = 0;

  void start(int64_t run) {
    group = run / runs;
    left = (group + 1) * runs - run;
  }
  // Whether a group begins after this run.
  bool next() {
    if (--left) return false;
    left = runs;
    ++group;
    return true;
  }
  int64_t at() const { return group < count ? group : count - 1; }
};

// The tables of kRows rows for each group, where tables fit vectors, which they fill as they are loaded.
template <int kBits, int kRows, class X>
class TableDecoder {
 public:
  static constexpr bool kLoose = true, kScaled = false;

  TableDecoder(const X* tables, int64_t row_stride, int64_t stride, Groups groups)
      : tables_(tables), row_stride_(row_stride), stride_(stride), groups_(groups) {}
  JAXQ_INLINE void start(int64_t run) {
    groups_.start(run);
    enter();
  }
  JAXQ_INLINE void next() {
    if (groups_.next()) enter();
  }
  template <class R>
  JAXQ_INLINE Found<X> operator()(R r, V codes) const { return {table_[r.value], codes}; }

 private:
  JAXQ_INLINE void enter() {
    const X* at = tables_ + groups_.at() * stride_;
    each<kRows>([&](auto r) JAXQ_INLINE { table_[r.value] = Simd::template table<1 << kBits>(at + r.value * row_stride_); });
  }

  const X* tables_;
  int64_t row_stride_, stride_;  // from one row to the next, from one group to the next
  Groups groups_;
  Vector<X> table_[kRows];
};

// Decoders as they are handed to functions, where vectors would go through memory.
template <int kBits, int kRows, class X>
struct TableValues {
  const X* tables;
  int64_t row_stride, stride;
  Groups groups;
  JAXQ_INLINE TableDecoder<kBits, kRows, X> decoder() const { return {tables, row_stride, stride, groups}; }
};

// The integers from -255 to 15, which bfloat16 holds exactly: codes less a zero point begin at the negative zero point.
struct Ramp {
  BFloat at[271];

  constexpr Ramp() : at() {
    for (int i = 0; i < 271; ++i) {
      const int n = i < 255 ? 255 - i : i - 255;
      int exponent = 0;
      while (n >> exponent > 1) ++exponent;
      at[i].bits = static_cast<uint16_t>(n == 0 ? 0 : (i < 255 ? 0x8000 : 0) | (127 + exponent) << 7 | ((n << 7 >> exponent) & 127));
    }
  }
};
constexpr Ramp kRamp;

// Codes less their zero point, of kRows rows. Sums of a group are scaled afterwards, as floats.
template <int kBits, int kRows, class X>
class ScaledDecoder {
 public:
  static constexpr bool kLoose = true, kScaled = true;

  ScaledDecoder(const float* scales, const uint8_t* zeros, int64_t stride, Groups groups)
      : scales_(scales), zeros_(zeros), stride_(stride), groups_(groups) {}
  JAXQ_INLINE void start(int64_t run) {
    groups_.start(run);
    enter();
  }
  JAXQ_INLINE void next() {
    if (groups_.next()) enter();
  }
  // Whether the run is the last of its group.
  JAXQ_INLINE bool last() const { return groups_.left == 1; }
  template <class R>
  JAXQ_INLINE F scale(R r) const { return Simd::setf(scales_[r.value * stride_ + groups_.at()]); }
  template <class R>
  JAXQ_INLINE Found<X> operator()(R r, V codes) const { return {table_[r.value], codes}; }

 private:
  JAXQ_INLINE void enter() {
    each<kRows>([&](auto r) JAXQ_INLINE {
      const X* from = kRamp.at + 255 - zeros_[r.value * stride_ + groups_.at()];
      table_[r.value] = Simd::template table<1 << kBits>(from);
    });
  }

  const float* scales_;  // (kRows, stride)
  const uint8_t* zeros_;  // (kRows, stride)
  int64_t stride_;
  Groups groups_;
  Vector<X> table_[kRows];
};

template <int kBits, int kRows, class X>
struct ScaledValues {
  const float* scales;
  const uint8_t* zeros;
  int64_t stride;
  Groups groups;
  JAXQ_INLINE ScaledDecoder<kBits, kRows, X> decoder() const { return {scales, zeros, stride, groups}; }
};

// One table by bytes.
template <class T>
struct ByteValues {
  static constexpr bool kLoose = false, kScaled = false;
  BytePlanes<T> table;

  ByteValues decoder() const { return *this; }
  void start(int64_t) {}
  void next() {}
  template <class R>
  JAXQ_INLINE Four operator()(R, V codes) const { return table(codes); }
};

template <class T>
inline ByteValues<T> by_bytes(const T* values, int entries) { return {BytePlanes<T>(values, entries)}; }

// (code - zero) * scale: a code becomes a float by standing below the exponent of 2^23.
struct GridValues {
  static constexpr bool kLoose = false, kScaled = false;
  const float* scales;
  const float* zeros;
  Groups groups;
  F scale, zero;

  JAXQ_INLINE GridValues decoder() const { return *this; }
  JAXQ_INLINE void start(int64_t run) {
    groups.start(run);
    enter();
  }
  JAXQ_INLINE void next() {
    if (groups.next()) enter();
  }
  JAXQ_INLINE void enter() {
    scale = Simd::setf(scales[groups.at()]);
    zero = Simd::setf(8388608.0f + zeros[groups.at()]);
  }
  template <class R>
  JAXQ_INLINE Four operator()(R, V codes) const {
    const V none = Simd::zero(), exponent = Simd::set16(0x4B00);
    const V low = Simd::low8(codes, none), high = Simd::high8(codes, none);
    const V words[4] = {Simd::low16(low, exponent), Simd::high16(low, exponent), Simd::low16(high, exponent),
                        Simd::high16(high, exponent)};
    Four out;
    each<4>([&](auto q) JAXQ_INLINE {
      out.v[q.value] = Simd::mulf(Simd::subf(Simd::as_float(words[q.value]), zero), scale);
    });
    return out;
  }
};

// The tables of one row's groups, by bytes, for vectors that do not hold them.
template <int kBits>
struct GroupByteValues {
  static constexpr bool kLoose = false, kScaled = false;
  const float* tables;  // (groups, 2^bits)
  Groups groups;
  BytePlanes<float> table{tables, 1 << kBits};

  GroupByteValues decoder() const { return *this; }
  JAXQ_INLINE void start(int64_t run) {
    groups.start(run);
    enter();
  }
  JAXQ_INLINE void next() {
    if (groups.next()) enter();
  }
  JAXQ_APART void enter() { table = BytePlanes<float>(tables + (groups.at() << kBits), 1 << kBits); }
  template <class R>
  JAXQ_INLINE Four operator()(R, V codes) const { return table(codes); }
};

template <class T>
inline void widen(const void* from, int64_t start, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += Simd::kFloats) Simd::storef(to + i, Simd::scales(static_cast<const T*>(from) + start + i));
}

// `count` numbers from number `start` on, as floats; whole vectors.
inline void widen(const void* from, ScaleType type, int64_t start, int64_t count, float* to) {
  switch (type) {
    case kFloat32: return widen<float>(from, start, count, to);
    case kFloat16: return widen<Half>(from, start, count, to);
    case kBFloat16: return widen<BFloat>(from, start, count, to);
  }
}

inline void grid_row(const Grid& grid, int64_t row, float* scales, float* zeros) {
  const int64_t at = row * grid.padded_groups;
  widen(grid.scale, grid.type, at, grid.padded_groups, scales);
  for (int64_t g = 0; g < grid.padded_groups; g += Simd::kFloats) Simd::storef(zeros + g, Simd::bytes_to_float(grid.zero + at + g));
}

// ---- tables that fit a vector, where element i is that of code i % 2^bits: an index may have any bits above those of
// its code ----

template <int kBits, int kMask = (1 << kBits) - 1>
alignas(64) constexpr float kCodes[16] = {0, 1 & kMask, 2 & kMask, 3 & kMask, 4 & kMask, 5 & kMask, 6 & kMask, 7 & kMask,
    8 & kMask, 9 & kMask, 10 & kMask, 11 & kMask, 12 & kMask, 13 & kMask, 14 & kMask, 15 & kMask};

// Some groups of a row.
struct Range {
  int64_t begin, end;
};

template <int kBits>
inline F table_of(const Table& table, int64_t row, int64_t group) {
  constexpr int kEntries = 1 << kBits;
  const int64_t at = (row * table.groups + group) * kEntries;
  switch (table.type) {
    case kFloat32: return Simd::repeated<kEntries>(static_cast<const float*>(table.values) + at);
    case kFloat16: return Simd::repeated<kEntries>(static_cast<const Half*>(table.values) + at);
    case kBFloat16: return Simd::repeated<kEntries>(static_cast<const BFloat*>(table.values) + at);
  }
  return Simd::zerof();
}

template <class T, class X>
inline void group_tables_of(const T* values, int64_t begin, int64_t end, int64_t count, X* to) {
  for (int64_t i = begin; i < end; i += Simd::kFloats) {
    // Whole vectors, the last one again from where it ends.
    const int64_t at = i + Simd::kFloats <= count ? i : count - Simd::kFloats;
    Simd::storef(to + at, Simd::scales(values + at));
  }
}

// The tables of some groups of a row, of which all have at least as many numbers as a vector.
template <int kBits, class X>
inline void group_tables(const Table& table, int64_t row, Range range, X* to) {
  const int64_t count = table.groups << kBits, begin = range.begin << kBits, end = range.end << kBits;
  const auto of = [&](const auto* values) { group_tables_of(values + row * count, begin, end, count, to); };
  switch (table.type) {
    case kFloat32: return of(static_cast<const float*>(table.values));
    case kFloat16: return of(static_cast<const Half*>(table.values));
    case kBFloat16: return of(static_cast<const BFloat*>(table.values));
  }
}

template <int kBits>
inline F grid_table(const float* scales, const float* zeros, int64_t group) {
  return Simd::mulf(Simd::subf(Simd::loadf(kCodes<kBits>), Simd::setf(zeros[group])), Simd::setf(scales[group]));
}

template <int kBits>
inline Range groups_in(const Groups& groups, int64_t first, int64_t last) {
  constexpr int64_t kRuns = runs_in_block(kBits);
  const int64_t begin = first * kRuns / groups.runs, end = ceil_div(last * kRuns, groups.runs);
  return {begin < groups.count ? begin : groups.count - 1, end < groups.count ? end : groups.count};
}

// The first elements of n vectors one after the other, then the second ones, and so on; n is a power of two. All of them in
// a row are cut in half and interleaved, again and again.
template <int n>
JAXQ_INLINE inline void transpose(const F* v, float* to) {
  F now[n], next[n];
  each<n>([&](auto i) JAXQ_INLINE { now[i.value] = v[i.value]; });
  each<(n > 1) + (n > 2) + (n > 4) + (n > 8)>([&](auto) JAXQ_INLINE {
    each<n / 2>([&](auto i) JAXQ_INLINE {
      Simd::interleave(now[i.value], now[i.value + n / 2], &next[2 * i.value], &next[2 * i.value + 1]);
    });
    each<n>([&](auto i) JAXQ_INLINE { now[i.value] = next[i.value]; });
  });
  each<n>([&](auto i) JAXQ_INLINE { Simd::storef(to + i.value * Simd::kFloats, now[i.value]); });
}
#if defined(JAXQ_ISA_AVX512BF16)
template <int n>
JAXQ_INLINE inline void transpose(const F* v, BFloat* to) { Simd::transpose<n>(v, to); }
#endif

template <int kBits, class T, class X>
JAXQ_APART void level_tables_of(const T* scales, int64_t stride, Range range, X* to) {
  for (int64_t group = range.begin & -Simd::kFloats; group < range.end; group += Simd::kFloats) {
    F sums[1 << kBits];
    sums[0] = Simd::scales(scales + kBits * stride + group);
    each<kBits>([&](auto j) JAXQ_INLINE {
      const F scale = Simd::scales(scales + j.value * stride + group);
      each<(1 << j.value)>([&](auto code) JAXQ_INLINE { sums[(1 << j.value) + code.value] = Simd::addf(sums[code.value], scale); });
    });
    transpose<1 << kBits>(sums, to + (group << kBits));
  }
}

// The tables of some groups of a row of levels, one after the other; as many groups at a time as a vector has floats.
template <int kBits, class X>
inline void level_tables(const Levels& levels, int64_t row, Range range, X* to) {
  const int64_t stride = levels.padded_groups, at = row * (kBits + 1) * stride;
  switch (levels.type) {
    case kFloat32: return level_tables_of<kBits>(static_cast<const float*>(levels.scale) + at, stride, range, to);
    case kFloat16: return level_tables_of<kBits>(static_cast<const Half*>(levels.scale) + at, stride, range, to);
    case kBFloat16: return level_tables_of<kBits>(static_cast<const BFloat*>(levels.scale) + at, stride, range, to);
  }
}

}  // namespace
