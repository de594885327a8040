// Products of codes with activations in floating point. Included once by each translation unit of one instruction set.
#pragma once

namespace {

// ---- few tokens: values go from the registers of the decoder to those of the product ----

// y[token, row] (+)= sum over blocks [first, last) for kRows rows and kTokens tokens.
template <int kBits, int kRows, int kTokens, class Values, class X>
JAXQ_APART void direct(const Codes& c, int64_t row, int64_t token, int64_t first, int64_t last, const Values& from, const X* x,
                   int64_t padded) {
  constexpr int kRuns = static_cast<int>(runs_in_block(kBits)), kLines = static_cast<int>(bytes_in_block(kBits) / 64);
  auto values = from.decoder();
  constexpr bool kLoose = decltype(values)::kLoose, kScaled = decltype(values)::kScaled;
  // Each sum waits for the one before it: enough of them side by side hide that, and so do sums of one group after another.
  constexpr int kWays = kScaled || kRows * kTokens >= 8 ? 1 : kRows * kTokens == 4 ? 2 : 4;
  F sums[kRows][kTokens][kWays];
  const auto clear = [&](F* sum) JAXQ_INLINE { each<kWays>([&](auto way) JAXQ_INLINE { sum[way.value] = Simd::zerof(); }); };
  const auto all = [&](F* sum) JAXQ_INLINE {
    each<kWays - 1>([&](auto way) JAXQ_INLINE { sum[0] = Simd::addf(sum[0], sum[way.value + 1]); });
    return sum[0];
  };
  each<kRows>([&](auto r) JAXQ_INLINE { each<kTokens>([&](auto t) JAXQ_INLINE { clear(sums[r.value][t.value]); }); });
  // Where the sums of a group are scaled, what they add up to.
  F totals[kRows][kTokens];
  each<kRows>([&](auto r) JAXQ_INLINE { each<kTokens>([&](auto t) JAXQ_INLINE { totals[r.value][t.value] = Simd::zerof(); }); });
  const auto close_group = [&]() JAXQ_INLINE {
    if constexpr (kScaled)
      each<kRows>([&](auto r) JAXQ_INLINE {
        const F scale = values.scale(r);
        each<kTokens>([&](auto t) JAXQ_INLINE {
          F* sum = sums[r.value][t.value];
          totals[r.value][t.value] = Simd::fma(all(sum), scale, totals[r.value][t.value]);
          clear(sum);
        });
      });
  };
  values.start(first * kRuns);
  const uint8_t* at = c.codes + row * c.row_bytes + first * bytes_in_block(kBits);
  x += token * padded + first * kRuns * kRun;
  for (int64_t block = first; block < last; ++block) {
    // Of several rows at a time the processor does not see by itself what comes next.
    each<kRows>([&](auto r) JAXQ_INLINE {
      each<kLines>([&](auto line) JAXQ_INLINE { __builtin_prefetch(at + r.value * c.row_bytes + line.value * 64 + kAhead); });
    });
    each<kRuns>([&](auto run) JAXQ_INLINE {
JAXQ_UNROLL(2)
      for (int part = 0; part < kParts; ++part) {
        const auto values_of = [&](auto r) JAXQ_INLINE {
          return values(r, codes_of<kBits, kLoose>(at + r.value * c.row_bytes, run.value, part));
        };
        decltype(values_of(Int<0>{})) found[kRows];
        each<kRows>([&](auto r) JAXQ_INLINE { found[r.value] = values_of(r); });
        each<kVectors<X>>([&](auto q) JAXQ_INLINE {
          Vector<X> w[kRows];
          each<kRows>([&](auto r) JAXQ_INLINE { w[r.value] = found[r.value][q.value]; });
          each<kTokens>([&](auto t) JAXQ_INLINE {
            const auto v = Simd::loadf(x + t.value * padded + q.value * (Simd::kBytes / kVectors<X>));
            each<kRows>([&](auto r) JAXQ_INLINE {
              F& sum = sums[r.value][t.value][q.value % kWays];
              sum = Simd::fma(w[r.value], v, sum);
            });
          });
        });
        x += Simd::kBytes;
      }
      if constexpr (kScaled) {
        if (values.last()) close_group();
      }
      values.next();
    });
    at += bytes_in_block(kBits);
  }
  // The rest of a group that goes on behind the last block.
  close_group();
  each<kTokens>([&](auto t) JAXQ_INLINE {
    each<kRows>([&](auto r) JAXQ_INLINE {
      float* y = c.y + (token + t.value) * c.rows + row + r.value;
      const F sum = kScaled ? totals[r.value][t.value] : all(sums[r.value][t.value]);
      *y = (first ? *y : 0.0f) + Simd::sum(sum);
    });
  });
}

template <int kBits, int kRows, int kTokens, class ValuesOf, class X>
inline void direct_rows(const Codes& c, ValuesOf values_of, const X* x, int64_t padded, int64_t begin, int64_t end,
                        int64_t token, int64_t first, int64_t last) {
  int64_t row = begin;
  for (; row + kRows <= end; row += kRows)
    direct<kBits, kRows, kTokens>(c, row, token, first, last, values_of(row, Int<kRows>{}, first, last), x, padded);
  for (; row < end; ++row)
    for (int t = 0; t < kTokens; ++t)
      direct<kBits, 1, 1>(c, row, token + t, first, last, values_of(row, Int<1>{}, first, last), x, padded);
}

template <int kBits, class ValuesOf, class X>
inline void few_tokens(const Codes& c, ValuesOf values_of, const X* x, int64_t begin, int64_t end) {
  constexpr int64_t kInputs = runs_in_block(kBits) * kRun;
  // Rows whose values are in registers, with as many tokens, so that sums stay there too; and totals, where there are any.
  constexpr int kMost = kFits<kBits> ? Simd::kRows : 1;
  constexpr bool kScaled = decltype(values_of(0, Int<1>{}, 0, 0).decoder())::kScaled;
  constexpr int kTokens = kScaled ? Simd::kTokens / 2 : Simd::kTokens;
  const int64_t padded = c.blocks * kInputs;
  // The activations of several tokens are read again for every row: so many inputs at a time stay in the first cache.
  constexpr int64_t kBlocks = kSlab * 4 / kVectors<X> * (Simd::kTokens / kTokens) / kInputs;
  const int64_t step = c.tokens == 1 ? c.blocks : kBlocks;
  // Without inputs every sum is empty.
  for (int64_t token = 0; c.blocks == 0 && token < c.tokens; ++token)
    for (int64_t row = begin; row < end; ++row) c.y[token * c.rows + row] = 0.0f;
  for (int64_t first = 0; first < c.blocks; first += step) {
    const int64_t last = first + step < c.blocks ? first + step : c.blocks;
    int64_t t = 0;
    for (; t + kTokens <= c.tokens; t += kTokens)
      direct_rows<kBits, (kMost < 2 ? 1 : 2), kTokens>(c, values_of, x, padded, begin, end, t, first, last);
    if constexpr (kTokens > 4)
      for (; t + 4 <= c.tokens; t += 4) direct_rows<kBits, kMost, 4>(c, values_of, x, padded, begin, end, t, first, last);
    // Two tokens of bfloat16 gain too little for the time that it takes to compile them.
    if constexpr (kTokens > 2 && kVectors<X> == 4)
      for (; t + 2 <= c.tokens; t += 2) direct_rows<kBits, kMost, 2>(c, values_of, x, padded, begin, end, t, first, last);
    for (; t < c.tokens; ++t) direct_rows<kBits, kMost, 1>(c, values_of, x, padded, begin, end, t, first, last);
  }
}

// ---- many tokens: rows are decoded into memory, some inputs at a time ----

template <int kBits, class Values>
JAXQ_APART void decode(const uint8_t* codes, int64_t first, int64_t last, const Values& from, float* out) {
  constexpr int kRuns = static_cast<int>(runs_in_block(kBits));
  auto values = from.decoder();
  constexpr bool kLoose = decltype(values)::kLoose;
  values.start(first * kRuns);
  for (int64_t block = first; block < last; ++block) {
    const uint8_t* at = codes + block * bytes_in_block(kBits);
    each<kRuns>([&](auto run) JAXQ_INLINE {
JAXQ_UNROLL(2)
      for (int part = 0; part < kParts; ++part) {
        const auto w = values(Int<0>{}, codes_of<kBits, kLoose>(at, run.value, part));
        each<4>([&](auto q) JAXQ_INLINE { Simd::storef(out + q.value * Simd::kFloats, w[q.value]); });
        out += Simd::kBytes;
      }
      values.next();
    });
  }
}

// y[token, row] += w[row] . x[token] for kRowsAtOnce rows and kTokens tokens.
template <int kTokens>
JAXQ_APART void product_block(const float* w, int64_t width, const float* x, int64_t x_stride, float* y, int64_t y_stride,
                          int64_t rows) {
  F sums[kRowsAtOnce][kTokens];
  // Through `each`: GCC for NEON stores sums that a loop indexes in every turn.
  const auto each_row = [](auto body) JAXQ_INLINE { each<static_cast<int>(kRowsAtOnce)>(body); };
  each_row([&](auto r) JAXQ_INLINE { each<kTokens>([&](auto t) JAXQ_INLINE { sums[r.value][t.value] = Simd::zerof(); }); });
  for (int64_t k = 0; k < width; k += Simd::kFloats) {
    F rows_of[kRowsAtOnce];
    each_row([&](auto r) JAXQ_INLINE { rows_of[r.value] = Simd::loadf(w + r.value * kSlabStride + k); });
    each<kTokens>([&](auto t) JAXQ_INLINE {
      const F v = Simd::loadf(x + t.value * x_stride + k);
      each_row([&](auto r) JAXQ_INLINE { sums[r.value][t.value] = Simd::fma(rows_of[r.value], v, sums[r.value][t.value]); });
    });
  }
  each_row([&](auto r) JAXQ_INLINE {
    if (r.value < rows)
      each<kTokens>([&](auto t) JAXQ_INLINE { y[t.value * y_stride + r.value] += Simd::sum(sums[r.value][t.value]); });
  });
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

// `values_of(row, Int<n>, first, last)` gives what decodes some blocks of n rows; one lives at a time.
template <int kBits, class ValuesOf>
inline void products(const Codes& c, ValuesOf values_of, const BFloat* x, int64_t begin, int64_t end, float*) {
  few_tokens<kBits>(c, values_of, x, begin, end);
}

template <int kBits, class ValuesOf>
inline void products(const Codes& c, ValuesOf values_of, const float* x, int64_t begin, int64_t end, float* slab) {
  if (c.tokens <= Simd::kFew) return few_tokens<kBits>(c, values_of, x, begin, end);
  constexpr int64_t kInputs = runs_in_block(kBits) * kRun, kBlocks = kSlab / kInputs;
  for (int64_t row = begin; row < end; row += kRowsAtOnce) {
    const int64_t rows = end - row < kRowsAtOnce ? end - row : kRowsAtOnce;
    for (int64_t token = 0; token < c.tokens; ++token)
      for (int64_t r = 0; r < rows; ++r) c.y[token * c.rows + row + r] = 0.0f;
    for (int64_t first = 0; first < c.blocks; first += kBlocks) {
      const int64_t last = first + kBlocks < c.blocks ? first + kBlocks : c.blocks;
      for (int64_t r = 0; r < kRowsAtOnce; ++r) {
        // Rows beyond the last are computed from it and thrown away.
        const int64_t from = row + (r < rows ? r : rows - 1);
        decode<kBits>(c.codes + from * c.row_bytes, first, last, values_of(from, Int<1>{}, first, last), slab + r * kSlabStride);
      }
      product_tokens(slab, (last - first) * kInputs, x + first * kInputs, c.blocks * kInputs, c.y + row, c.rows, rows,
                     c.tokens);
    }
  }
}

// What comes behind the decoded rows of `scratch`: tables of several rows, and scales as they are widened.
template <class X = float>
inline X* tables_in(float* scratch) { return reinterpret_cast<X*>(scratch + kRowsAtOnce * kSlabStride); }
inline float* scales_in(float* scratch, int64_t groups) { return tables_in(scratch) + kRowsAtOnce * groups * Simd::kFloats; }

template <int kBits, class X>
void lookup_bits(const Codes& c, const Table& table, const X* x, int64_t begin, int64_t end, float* scratch) {
  const Groups groups{table.group_runs, table.groups};
  constexpr int64_t kEntries = 1 << kBits;
  const int64_t count = table.groups * kEntries;
  X* tables = tables_in<X>(scratch);
  if constexpr (kFits<kBits>) {
    const auto values_of = [&](int64_t row, auto rows, int64_t first, int64_t last) {
      const Range range = groups_in<kBits>(groups, first, last);
      if (count >= Simd::kFloats) {
        for (int r = 0; r < rows.value; ++r) group_tables<kBits>(table, row + r, range, tables + r * count);
        return TableValues<kBits, rows.value, X>{tables, count, kEntries, groups};
      }
      for (int64_t g = range.begin; g < range.end; ++g)
        each<rows.value>([&](auto r) {
          Simd::storef(tables + (g * rows.value + r.value) * Simd::kFloats, table_of<kBits>(table, row + r.value, g));
        });
      return TableValues<kBits, rows.value, X>{tables, Simd::kFloats, rows.value * Simd::kFloats, groups};
    };
    products<kBits>(c, values_of, x, begin, end, scratch);
  } else if (table.groups > 1) {
    const auto values_of = [&](int64_t row, auto, int64_t first, int64_t last) {
      group_tables<kBits>(table, row, groups_in<kBits>(groups, first, last), tables);
      return GroupByteValues<kBits>{tables, groups};
    };
    products<kBits>(c, values_of, x, begin, end, scratch);
  } else {
    const auto of = [&](const auto* values) {
      const auto values_of = [&](int64_t row, auto, int64_t, int64_t) { return by_bytes(values + (row << kBits), 1 << kBits); };
      products<kBits>(c, values_of, x, begin, end, scratch);
    };
    switch (table.type) {
      case kFloat32: return of(static_cast<const float*>(table.values));
      case kFloat16: return of(static_cast<const Half*>(table.values));
      case kBFloat16: return of(static_cast<const BFloat*>(table.values));
    }
  }
}

template <int kBits, class X>
void grid_bits(const Codes& c, const Grid& grid, const X* x, int64_t begin, int64_t end, float* scratch) {
  const int64_t stride = grid.padded_groups;
  const Groups groups{grid.group_runs, grid.groups};
  float* tables = tables_in(scratch);
  float* scales = scales_in(scratch, stride);
  const auto values_of = [&](int64_t row, auto rows, int64_t first, int64_t last) {
    if constexpr (kVectors<X> == 2) {
      for (int r = 0; r < rows.value; ++r) widen(grid.scale, grid.type, (row + r) * stride, stride, scales + r * stride);
      return ScaledValues<kBits, rows.value, X>{scales, grid.zero + row * stride, stride, groups};
    } else if constexpr (kFits<kBits>) {
      const Range range = groups_in<kBits>(groups, first, last);
      for (int r = 0; r < rows.value; ++r) {
        grid_row(grid, row + r, scales, scales + stride);
        for (int64_t g = range.begin; g < range.end; ++g)
          Simd::storef(tables + (g * rows.value + r) * Simd::kFloats, grid_table<kBits>(scales, scales + stride, g));
      }
      return TableValues<kBits, rows.value, X>{tables, Simd::kFloats, rows.value * Simd::kFloats, groups};
    } else {
      grid_row(grid, row, scales, scales + stride);
      return GridValues{scales, scales + stride, groups, {}, {}};
    }
  };
  products<kBits>(c, values_of, x, begin, end, scratch);
}

template <int kBits, class X>
void levels_bits(const Codes& c, const Levels& levels, const X* x, int64_t begin, int64_t end, float* scratch) {
  const int64_t stride = levels.padded_groups;
  constexpr int64_t kEntries = 1 << kBits;
  const Groups groups{levels.group_runs, levels.groups};
  X* tables = tables_in<X>(scratch);
  const auto values_of = [&](int64_t row, auto rows, int64_t first, int64_t last) {
    const Range range = groups_in<kBits>(groups, first, last);
    for (int r = 0; r < rows.value; ++r) level_tables<kBits>(levels, row + r, range, tables + r * stride * kEntries);
    if constexpr (kFits<kBits>)
      return TableValues<kBits, rows.value, X>{tables, stride * kEntries, kEntries, groups};
    else
      return GroupByteValues<kBits>{tables, groups};
  };
  products<kBits>(c, values_of, x, begin, end, scratch);
}

template <class X>
void lookup(const Codes& c, const Table& table, const X* x, int64_t begin, int64_t end, float* scratch) {
  by_bits<kLeastBits<X>>(c.bits, [&](auto bits) { lookup_bits<bits.value>(c, table, x, begin, end, scratch); });
}

template <class X>
void grid(const Codes& c, const Grid& grid, const X* x, int64_t begin, int64_t end, float* scratch) {
  by_bits<kLeastBits<X>>(c.bits, [&](auto bits) { grid_bits<bits.value>(c, grid, x, begin, end, scratch); });
}

template <class X>
void levels(const Codes& c, const Levels& levels, const X* x, int64_t begin, int64_t end, float* scratch) {
  by_bits<kLeastBits<X>>(c.bits, [&](auto bits) { levels_bits<bits.value>(c, levels, x, begin, end, scratch); });
}

}  // namespace
