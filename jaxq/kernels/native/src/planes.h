// Products with planes of one bit. Included once by each translation unit of one instruction set.
#pragma once

namespace {

inline float greater(float a, float b) { return a > b || a != a ? a : b; }

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

// Sums of looked-up bytes, 16 bits wide.
#if defined(JAXQ_NEON)
struct ByteSums {
  V low, high;

  void add(V bytes) {
    low = Simd::add_low8(low, bytes);
    high = Simd::add_high8(high, bytes);
  }
  void widen(V out[4]) const {
    const V zero = Simd::zero();
    out[0] = Simd::low16(low, zero);
    out[1] = Simd::high16(low, zero);
    out[2] = Simd::low16(high, zero);
    out[3] = Simd::high16(high, zero);
  }
};
#else
// Of all bytes with the odd ones 256 times, and of the odd ones.
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
#endif

// Sums of 16 bits hold 257 bytes: that many quads, and fewer than 2^31 / 2^24 when three bytes make a number.
constexpr int64_t kPairsAtOnce = 32;

template <int kCount>
inline void plane_sums(const uint8_t* lines, const uint8_t* tables, int64_t pairs, F out[4]) {
  ByteSums sums[kCount];
  for (int p = 0; p < kCount; ++p) sums[p] = ByteSums{Simd::zero(), Simd::zero()};
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const V line = Simd::load(lines + pair * kTile);
    const V low = field<4>(line, 0), high = field<4>(line, 4);
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
      F sums[kParts][4];
      for (int part = 0; part < kParts; ++part)
        for (int q = 0; q < 4; ++q) sums[part][q] = Simd::zerof();
      for (int64_t g = 0; g < p.groups; ++g) {
        const F sum = Simd::setf(x.sum[token * p.groups + g]), unit = Simd::setf(x.unit[token * p.groups + g]);
        const int64_t stop = (g + 1) * p.group_pairs < p.pairs ? (g + 1) * p.group_pairs : p.pairs;
        // All parts of a group's lines while the first cache holds them.
        for (int part = 0; part < kParts; ++part) {
          F* y = sums[part];
          const int64_t at = part * Simd::kBytes;
          const T* group_scales = tile_scales + g * (p.bits + 1) * kTile + at;
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
      }
      for (int part = 0; part < kParts; ++part)
        for (int q = 0; q < 4; ++q) Simd::lane_store(result + part * Simd::kBytes + 4 * q, sums[part][q]);
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
