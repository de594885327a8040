// Products of codes with activations that are integers of one to three bytes. Included once by each translation unit
// of one instruction set.
#pragma once

namespace {

// ---- integer products of uniform grids ----

template <int kDigits>
inline F digits_to_float(const V sums[kDigits]) {
  // More than four additions, shifted by two bytes, exceed 32 bits.
  if constexpr (kDigits > 2 && Simd::kAdds > 4) {
    const V upper = Simd::add32(Simd::dot_result(sums[1]), Simd::left32(Simd::dot_result(sums[2]), 8));
    return Simd::fma(Simd::to_float(upper), Simd::setf(256.0f), Simd::to_float(Simd::dot_result(sums[0])));
  }
  V total = Simd::dot_result(sums[0]);
  if (kDigits > 1) total = Simd::add32(total, Simd::left32(Simd::dot_result(sums[kDigits > 1 ? 1 : 0]), 8));
  if (kDigits > 2) total = Simd::add32(total, Simd::left32(Simd::dot_result(sums[kDigits > 2 ? 2 : 0]), 16));
  return Simd::to_float(total);
}

// y[token, row] = sum over groups of scale * unit * (codes . digits), less zero * scale * (sum of the activations), for
// kRows rows and kTokens tokens. `scales` holds scales, then zero points, of each row.
template <int kBits, int kDigits, int kRows, int kTokens>
JAXQ_APART void integer_rows(const Codes& c, const Grid& grid, const Digits& x, int64_t row, int64_t token, const float* scales) {
  constexpr int kRuns = static_cast<int>(runs_in_block(kBits)), kLines = static_cast<int>(bytes_in_block(kBits) / 64);
  constexpr int kLimit = kParts >= Simd::kAdds ? 1 : Simd::kAdds / kParts;
  const int64_t padded = c.blocks * kRuns * kRun, stride = grid.padded_groups;
  const float* units = x.unit + token * stride;
  F sums[kRows][kTokens];
  each<kRows>([&](auto r) JAXQ_INLINE {
    const float* scale = scales + 2 * r.value * stride;
    each<kTokens>([&](auto t) JAXQ_INLINE {
      F sum = Simd::zerof();
      for (int64_t g = 0; g < stride; g += Simd::kFloats) {
        const F raised = Simd::mulf(Simd::loadf(scale + g), Simd::loadf(scale + stride + g));
        sum = Simd::fma(raised, Simd::loadf(x.sum + (token + t.value) * stride + g), sum);
      }
      sums[r.value][t.value] = Simd::subf(Simd::zerof(), sum);
    });
  });
  V held[kRows][kTokens][kDigits];
  const auto clear = [&]() JAXQ_INLINE {
    each<kRows>([&](auto r) JAXQ_INLINE {
      each<kTokens>([&](auto t) JAXQ_INLINE {
        each<kDigits>([&](auto p) JAXQ_INLINE { held[r.value][t.value][p.value] = Simd::zero(); });
      });
    });
  };
  clear();
  Groups groups{grid.group_runs, grid.groups};
  groups.start(0);
  int runs = 0;
  const uint8_t* at = c.codes + row * c.row_bytes;
  const int8_t* digits = x.bytes + token * kDigits * padded;
  for (int64_t block = 0; block < c.blocks; ++block) {
    each<kRows>([&](auto r) JAXQ_INLINE {
      each<kLines>([&](auto line) JAXQ_INLINE { __builtin_prefetch(at + r.value * c.row_bytes + line.value * 64 + kAhead); });
    });
    each<kRuns>([&](auto run) JAXQ_INLINE {
JAXQ_UNROLL(2)
      for (int part = 0; part < kParts; ++part) {
        V codes[kRows];
        each<kRows>([&](auto r) JAXQ_INLINE { codes[r.value] = codes_of<kBits>(at + r.value * c.row_bytes, run.value, part); });
        each<kTokens>([&](auto t) JAXQ_INLINE {
          each<kDigits>([&](auto p) JAXQ_INLINE {
            const V v = Simd::load(digits + (t.value * kDigits + p.value) * padded + part * Simd::kBytes);
            each<kRows>([&](auto r) JAXQ_INLINE {
              V& sum = held[r.value][t.value][p.value];
              sum = Simd::dot(sum, codes[r.value], v);
            });
          });
        });
      }
      digits += kRun;
      ++runs;
      // Padding beyond the last group is multiplied by digits of zero.
      const int64_t group = groups.at();
      if (groups.next() || runs == kLimit) {
        each<kRows>([&](auto r) JAXQ_INLINE {
          const F scale = Simd::setf(scales[2 * r.value * stride + group]);
          each<kTokens>([&](auto t) JAXQ_INLINE {
            F& sum = sums[r.value][t.value];
            const F factor = Simd::mulf(scale, Simd::setf(units[t.value * stride + group]));
            sum = Simd::fma(digits_to_float<kDigits>(held[r.value][t.value]), factor, sum);
          });
        });
        clear();
        runs = 0;
      }
    });
    at += bytes_in_block(kBits);
  }
  const int64_t group = groups.at();
  each<kRows>([&](auto r) JAXQ_INLINE {
    const F scale = Simd::setf(scales[2 * r.value * stride + group]);
    each<kTokens>([&](auto t) JAXQ_INLINE {
      const F factor = Simd::mulf(scale, Simd::setf(units[t.value * stride + group]));
      c.y[(token + t.value) * c.rows + row + r.value] =
          Simd::sum(Simd::fma(digits_to_float<kDigits>(held[r.value][t.value]), factor, sums[r.value][t.value]));
    });
  });
}

template <int kBits, int kDigits>
void integer_of(const Codes& c, const Grid& grid, const Digits& x, int64_t begin, int64_t end, float* scratch) {
  // Sums and what they are made of stay in registers.
  constexpr int kRows = Simd::kIntegerRows, kTokens = kDigits == 1 ? Simd::kTokens / 2 : 1;
  const auto rows_of = [&](int64_t row, auto rows) {
    for (int r = 0; r < rows.value; ++r) {
      float* scales = scratch + 2 * r * grid.padded_groups;
      grid_row(grid, row + r, scales, scales + grid.padded_groups);
    }
    int64_t t = 0;
    for (; t + kTokens <= c.tokens; t += kTokens)
      integer_rows<kBits, kDigits, rows.value, kTokens>(c, grid, x, row, t, scratch);
    if constexpr (kTokens > 1)
      for (; t < c.tokens; ++t) integer_rows<kBits, kDigits, rows.value, 1>(c, grid, x, row, t, scratch);
  };
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows) rows_of(row, Int<kRows>{});
  for (; row < end; ++row) rows_of(row, Int<1>{});
}

template <int kBits>
void integer_bits(const Codes& c, const Grid& grid, const Digits& x, int64_t begin, int64_t end, float* scratch) {
  if (x.count == 1) return integer_of<kBits, 1>(c, grid, x, begin, end, scratch);
  if (x.count == 2) return integer_of<kBits, 2>(c, grid, x, begin, end, scratch);
  return integer_of<kBits, 3>(c, grid, x, begin, end, scratch);
}

void integer(const Codes& c, const Grid& grid, const Digits& x, int64_t begin, int64_t end, float* scratch) {
  by_bits(c.bits, [&](auto bits) { integer_bits<bits.value>(c, grid, x, begin, end, scratch); });
}

// ---- activations as integers ----

JAXQ_INLINE inline int32_t nearest_integer(float v) { return static_cast<int32_t>(v + (v < 0.0f ? -0.5f : 0.5f)); }

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

// Digits of base 256 of numbers, rounded; their sum.
template <int kCount>
JAXQ_VECTORIZED int64_t split(const float* from, int64_t numbers, float inverse, int64_t padded, int8_t* to) {
  int64_t sum = 0;
  for (int64_t k = 0; k < numbers; ++k) {
    int32_t v = nearest_integer(from[k] * inverse);
    sum += v;
    for (int p = 0; p < kCount; ++p) {
      const int8_t digit = static_cast<int8_t>(v & 255);
      to[p * padded + k] = digit;
      v = (v - digit) >> 8;
    }
  }
  return sum;
}

// Digits of base 256 from -128 to 127, for the groups [begin, end) of all tokens' groups.
[[maybe_unused]] JAXQ_VECTORIZED void digits(const float* x, int64_t inputs, int64_t padded, const Grid& grid, int count, int64_t begin, int64_t end,
            int8_t* bytes, float* units, float* sums) {
  const float most = count == 1 ? 127.0f : count == 2 ? 127.0f * 256 : 127.0f * 65536;
  const int64_t size = grid.group_runs * kRun;
  for (int64_t job = begin; job < end; ++job) {
    const int64_t token = job / grid.groups, group = job % grid.groups;
    const float* from = x + token * inputs;
    int8_t* to = bytes + token * count * padded;
    const int64_t first = group * size, stop = first + size < inputs ? first + size : inputs;
    // As integers magnitudes have the order that they have as numbers, and what is undefined comes last.
    uint32_t bits = 0;
    for (int64_t k = first; k < stop; ++k) {
      uint32_t magnitude;
      __builtin_memcpy(&magnitude, from + k, 4);
      magnitude &= 0x7fffffffu;
      bits = magnitude > bits ? magnitude : bits;
    }
    float top;
    __builtin_memcpy(&top, &bits, 4);
    float inverse;
    const float unit = unit_of(top, most, &inverse);
    int64_t sum = 0;
    if (inverse > 0.0f) {
      switch (count) {
        case 1: sum = split<1>(from + first, stop - first, inverse, padded, to + first); break;
        case 2: sum = split<2>(from + first, stop - first, inverse, padded, to + first); break;
        case 3: sum = split<3>(from + first, stop - first, inverse, padded, to + first); break;
      }
    }
    units[token * grid.padded_groups + group] = unit;
    sums[token * grid.padded_groups + group] = static_cast<float>(sum) * unit;
  }
}

}  // namespace
