// What every instruction set implements, and how weights lie in memory. No standard library here: these files are
// compiled once for each instruction set, and an inline function of the library must not come from the wrong one.
//
// Codes of b = 1 to 4 bits, row by row (a row is an output). A run is 64 consecutive inputs, one in each byte of a
// 64-byte line. A block is the least number of whole runs that fill whole lines:
//   b = 4: 2 runs in 1 line    b = 2: 4 runs in 1 line    b = 1: 8 runs in 1 line
//   b = 3: 8 runs in 3 lines, the low two bits in the first two as for b = 2, the high bit in the third
// Run r of a line has its bits at place r * (bits in that line). Rows end with a whole block; what lies beyond the
// last input meets activations of zero.
//
// Planes of one bit, in tiles of 64 rows: a line holds a byte for each row, its low nibble the bits of inputs 8c to
// 8c + 3, its high nibble those of 8c + 4 to 8c + 7. Lines are ordered (tile, plane, c).
#pragma once
#include <cstdint>

namespace jaxq {

// The types of scales, offsets and tables.
enum ScaleType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };

// Numbers as they are stored, which vector instructions convert.
struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

// Codes of fewer bits are multiplied by floats even where there are products of X: not worth their compilation. Inline, or
// Clang has several definitions to link.
template <class X>
inline constexpr int kLeastBits = 1;
template <>
inline constexpr int kLeastBits<BFloat> = 2;

constexpr int64_t kRun = 64;
constexpr int64_t kTile = 64;
// Groups of a row are stored up to a multiple of this, so that whole vectors of scales can be read.
constexpr int64_t kGroupPad = 16;

// Static: the linker must not share a function between instruction sets.
static constexpr int64_t runs_in_block(int bits) { return bits == 4 ? 2 : bits == 2 ? 4 : 8; }
static constexpr int64_t bytes_in_block(int bits) { return bits == 3 ? 192 : 64; }
static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A matrix of codes, its activations and its result. Activations were prepared by `order` or `digits`.
struct Codes {
  const uint8_t* codes;   // (rows, row_bytes)
  int64_t row_bytes;
  int bits;
  int64_t blocks;         // of each row
  int64_t rows;           // outputs in all: the stride of y
  int64_t tokens;
  float* y;               // (tokens, rows)
};

struct Table {
  const void* values;     // (rows, groups, 2^bits)
  ScaleType type;
  int64_t groups;
  int64_t group_runs;     // runs that share a table
};

struct Grid {
  const void* scale;      // (rows, padded groups)
  ScaleType type;
  const uint8_t* zero;    // (rows, padded groups)
  int64_t padded_groups;
  int64_t groups;
  int64_t group_runs;     // runs that share a scale
};

// The value of a code: an offset, and a scale for each of its bits that is set.
struct Levels {
  const void* scale;      // (rows, bits + 1, padded groups), the offset last
  ScaleType type;
  int64_t padded_groups;
  int64_t groups;
  int64_t group_runs;
};

// Activations as integers: x = sum_p 256^p digit_p * unit of the group.
struct Digits {
  const int8_t* bytes;    // (tokens, count, padded inputs)
  const float* unit;      // (tokens, padded groups)
  const float* sum;       // (tokens, padded groups): of the rounded activations
  int count;              // 1 to 3
};

struct Planes {
  const uint8_t* lines;   // (tiles, bits, pairs, 64)
  const void* scale;      // (tiles, groups, bits + 1, 64), the offset last
  ScaleType type;
  int bits;
  int64_t pairs;          // of quads: inputs / 8, rounded up
  int64_t group_pairs;
  int64_t groups;
  int64_t rows, tokens;
  float* y;               // (tokens, rows)
};

// For each quad of activations the 16 sums of its subsets, as unsigned integers of `count` bytes with a bias.
struct Sums {
  const uint8_t* tables;  // (tokens, quads, count, 16)
  const float* unit;      // (tokens, groups)
  const float* sum;       // (tokens, groups): of the activations
  int count;              // 1 to 3
};

// Floating products of codes with activations of type X, float or BFloat. Rows are handed out in [begin, end); `scratch` has
// `code_scratch` floats.
template <class X>
struct Floating {
  // Activations in the order in which decoded vectors come: (tokens, inputs) to (tokens, padded).
  void (*order)(const X* x, int64_t tokens, int64_t inputs, int64_t padded, int bits, X* out);
  void (*lookup)(const Codes&, const Table&, const X* ordered, int64_t begin, int64_t end, float* scratch);
  void (*grid)(const Codes&, const Grid&, const X* ordered, int64_t begin, int64_t end, float* scratch);
  void (*levels)(const Codes&, const Levels&, const X* ordered, int64_t begin, int64_t end, float* scratch);
};

// Integer products of codes with digits.
struct Integer {
  // Tokens up to which products of so many digits are faster than floating ones.
  int64_t tokens[4];
  void (*product)(const Codes&, const Grid&, const Digits&, int64_t begin, int64_t end, float* scratch);
};

// Rows are handed out in [begin, end); for planes these are tiles. `scratch` has `code_scratch` or `kPlaneScratch` floats.
struct Kernels {
  Floating<float> floats;
  Integer integer;
  void (*digits)(const float* x, int64_t inputs, int64_t padded, const Grid&, int count, int64_t begin, int64_t end,
                 int8_t* bytes, float* units, float* sums);
  void (*subset_sums)(const float* x, int64_t inputs, const Planes&, int count, int64_t begin, int64_t end,
                      uint8_t* tables, float* units, float* sums);
  void (*planes)(const Planes&, const Sums&, int64_t begin, int64_t end);
  void (*planes_dense)(const Planes&, const float* x, int64_t inputs, int64_t begin, int64_t end, float* scratch);
  // Tables (rows, entries) for rows of points and their importance; `scratch` has `table_scratch` floats.
  void (*tables)(const float* w, const float* f, int64_t points, int64_t entries, int64_t begin, int64_t end, float* out,
                 float* scratch);
  // Null where the processor has no products of bfloat16; activations of that type then become floats.
  const Floating<BFloat>* bfloats;
};

// Importance below this part of a row's greatest counts as none.
constexpr double kNegligible = 1e-30;

// Five wide running sums, points and importance in double, keys twice, cuts, and a split for each layer but two.
static inline int64_t table_scratch(int64_t points, int64_t entries) {
  return 4 * 5 * (points + 1) + 4 * points + 4 * points + 2 * (entries + 1) + entries * (points + 1);
}

// Inputs decoded at a time when there are several tokens: four rows of floats stay in the first cache. Decoded rows stand
// further apart than that: a wide vector may write beyond its row, and rows at powers of two would share cache lines.
constexpr int64_t kSlab = 1024;
constexpr int64_t kSlabStride = kSlab + 16;
constexpr int64_t kRowsAtOnce = 4;
constexpr int64_t kPlaneScratch = kTile * kSlabStride;
// Decoded rows, and for each so many numbers a group, and tables of at most 16.
static inline int64_t code_scratch(int64_t padded_groups, int numbers) {
  return kRowsAtOnce * (kSlabStride + (numbers + 16) * padded_groups);
}

extern const Kernels kScalar;
extern const Kernels kAvx2;
extern const Kernels kAvx512;
extern const Floating<BFloat> kAvx512BFloats;
extern const Kernels kNeon;
extern const Integer kNeonDot;

}  // namespace jaxq
