// Compares NEON with plain C++: the functions of the vector type, and the kernels. Says what differs, and ends with 1 then.
// With the argument "dot" integer products by dot products too.
#include <arm_neon.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels.h"

namespace jaxq {
namespace scalar {
#include "simd_scalar.h"
}
namespace neon {
#include "simd_neon.h"
}
}  // namespace jaxq

using namespace jaxq;

namespace {

using Bytes = std::vector<uint8_t>;
using Floats = std::vector<float>;

std::mt19937 random_bits(1);
int failures = 0, checks = 0;

int below(int n) { return static_cast<int>(random_bits() % static_cast<unsigned>(n)); }
Bytes random_bytes(int64_t count, int most = 255) {
  Bytes out(count);
  for (auto& byte : out) byte = static_cast<uint8_t>(below(most + 1));
  return out;
}
Floats random_floats(int64_t count) {
  std::normal_distribution<float> normal;
  Floats out(count);
  for (auto& value : out) value = normal(random_bits);
  return out;
}
// Numbers of a type, of either sign and several exponents; among halves some subnormal ones.
Bytes random_scales(int64_t count, ScaleType type) {
  Bytes out(count * (type == kFloat32 ? 4 : 2));
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t half = static_cast<uint16_t>(below(2) << 15 | below(16) << 10 | below(1024));
    const uint16_t narrow = static_cast<uint16_t>(below(2) << 15 | (120 + below(8)) << 7 | below(128));
    const uint32_t wide = static_cast<uint32_t>(narrow) << 16 | static_cast<uint32_t>(below(65536));
    if (type == kFloat32) std::memcpy(out.data() + 4 * i, &wide, 4);
    if (type == kFloat16) std::memcpy(out.data() + 2 * i, &half, 2);
    if (type == kBFloat16) std::memcpy(out.data() + 2 * i, &narrow, 2);
  }
  return out;
}

void check(bool same, const std::string& what) {
  ++checks;
  if (!same && ++failures <= 20) std::printf("differs: %s\n", what.c_str());
}
// Sums of the same numbers in another order.
void close(const Floats& a, const Floats& b, const std::string& what) {
  float top = 0, most = 0;
  bool finite = a.size() == b.size();
  for (size_t i = 0; finite && i < a.size(); ++i) {
    finite = std::isfinite(a[i]) && std::isfinite(b[i]);
    top = std::max(top, std::fabs(a[i])), most = std::max(most, std::fabs(a[i] - b[i]));
  }
  check(finite && top > 0 && most <= 3e-6f * top, what + " by " + std::to_string(most / top));
}

// ---- the vector type ----

struct Records {
  std::vector<std::string> names;
  std::vector<Bytes> values;

  template <class T>
  void add(const char* name, const T& value) {
    Bytes bytes(sizeof(T));
    std::memcpy(bytes.data(), &value, sizeof(T));
    names.push_back(name), values.push_back(bytes);
  }
};

// Numbers are small integers, so that no sum is rounded.
template <class Simd>
Records records(const Bytes& some, const Floats& numbers) {
  Records out;
  const uint8_t *p = some.data(), *q = p + 16;
  const auto a = Simd::load(p), b = Simd::load(q), codes = Simd::both(b, Simd::set8(15));
  const auto x = Simd::loadf(numbers.data()), y = Simd::loadf(numbers.data() + 4), z = Simd::loadf(numbers.data() + 8);
  out.add("load", a), out.add("broadcast16", Simd::broadcast16(p)), out.add("zero", Simd::zero());
  out.add("set8", Simd::set8(p[0])), out.add("set16", Simd::set16(257 * p[0] - 9)), out.add("set32", Simd::set32(p[0] - 70000));
  out.add("both", Simd::both(a, b)), out.add("either", Simd::either(a, b));
  for (int n = 0; n < 16; ++n) out.add("right16", Simd::right16(a, n)), out.add("left16", Simd::left16(a, n));
  for (int n = 0; n < 32; ++n) out.add("left32", Simd::left32(a, n));
  out.add("add16", Simd::add16(a, b)), out.add("sub16", Simd::sub16(a, b));
  out.add("add32", Simd::add32(a, b)), out.add("sub32", Simd::sub32(a, b));
  out.add("pick", Simd::pick(a, codes));
  out.add("low8", Simd::low8(a, b)), out.add("high8", Simd::high8(a, b));
  out.add("low16", Simd::low16(a, b)), out.add("high16", Simd::high16(a, b));
  auto sums = Simd::zero();
  for (int i = 0; i < 4; ++i) sums = Simd::dot(sums, codes, Simd::load(p + 16 * i));
  int32_t four[4];
  sums = Simd::dot_result(sums);
  std::memcpy(four, &sums, 16);
  out.add("dot", four[0] + four[1] + four[2] + four[3]);
  out.add("as_float", Simd::as_float(Simd::both(a, Simd::set8(63)))), out.add("to_float", Simd::to_float(a));
  out.add("setf", Simd::setf(numbers[0])), out.add("zerof", Simd::zerof());
  out.add("addf", Simd::addf(x, y)), out.add("subf", Simd::subf(x, y)), out.add("mulf", Simd::mulf(x, y));
  out.add("fma", Simd::fma(x, y, z)), out.add("add_bits", Simd::add_bits(x, y, p[0])), out.add("sum", Simd::sum(x));
  std::decay_t<decltype(x)> low = x, high = x;
  Simd::interleave(x, y, &low, &high);
  out.add("interleave", low), out.add("interleave", high);
  out.add("bytes_to_float", Simd::bytes_to_float(p));
  std::decay_t<decltype(a)> planes[4];
  Floats sixteen(numbers);
  sixteen.resize(16, 1.5f);
  Simd::byte_planes(sixteen.data(), planes);
  for (const auto& plane : planes) out.add("byte_planes", plane);
  float stored[4];
  Simd::storef(stored, y);
  out.add("storef", stored);
  Simd::lane_store(stored, z);
  out.add("lane_store", stored);
  return out;
}

template <class Simd>
void record_scales(Records& out, const Bytes& floats, const Bytes& halves, const Bytes& narrow) {
  const auto of = [&](const auto* p) {
    out.add("scales", Simd::scales(p)), out.add("lane_scales", Simd::lane_scales(p));
  };
  of(reinterpret_cast<const float*>(floats.data()));
  of(reinterpret_cast<const Half*>(halves.data()));
  of(reinterpret_cast<const BFloat*>(narrow.data()));
}

void check_vectors() {
  for (int trial = 0; trial < 200; ++trial) {
    const Bytes some = random_bytes(64);
    Floats numbers(12);
    for (auto& number : numbers) number = static_cast<float>(below(513) - 256);
    const Bytes floats = random_scales(4, kFloat32), halves = random_scales(4, kFloat16), narrow = random_scales(4, kBFloat16);
    Records a = records<scalar::Simd>(some, numbers), b = records<neon::Simd>(some, numbers);
    record_scales<scalar::Simd>(a, floats, halves, narrow), record_scales<neon::Simd>(b, floats, halves, narrow);
    for (size_t i = 0; i < a.values.size(); ++i) check(a.values[i] == b.values[i], a.names[i]);
  }
}

// ---- the kernels ----

constexpr int64_t kInputs = 1100, kRows = 19, kGroupRuns = 2, kGroups = 9, kPadded = 16;
constexpr ScaleType kTypes[] = {kFloat32, kFloat16, kBFloat16};

struct Shape {
  int bits;
  int64_t tokens, blocks, padded, row_bytes;

  Shape(int bits, int64_t tokens, int64_t inputs)
      : bits(bits), tokens(tokens), blocks(ceil_div(inputs, runs_in_block(bits) * kRun)),
        padded(blocks * runs_in_block(bits) * kRun), row_bytes(blocks * bytes_in_block(bits)) {}
  Codes codes(const Bytes& of, Floats& y) const { return {of.data(), row_bytes, bits, blocks, kRows, tokens, y.data()}; }
};

template <class Product>
Floats floating(const Kernels& k, const Shape& s, const Bytes& codes, const Floats& x, const Product& product) {
  Floats ordered(s.tokens * s.padded), y(s.tokens * kRows), scratch(code_scratch(kPadded, 6));
  k.floats.order(x.data(), s.tokens, kInputs, s.padded, s.bits, ordered.data());
  product(k.floats, s.codes(codes, y), ordered.data(), scratch.data());
  return y;
}

void check_floats(const Kernels& k, int bits, int64_t tokens, ScaleType type) {
  const Shape s(bits, tokens, kInputs);
  const std::string of = " of " + std::to_string(bits) + " bits, " + std::to_string(tokens) + " tokens, type " + std::to_string(type);
  const Bytes codes = random_bytes(kRows * s.row_bytes), table = random_scales(kRows * kGroups << bits, type);
  const Bytes scale = random_scales(kRows * (bits + 1) * kPadded, type), zero = random_bytes(kRows * kPadded, (1 << bits) - 1);
  const Floats x = random_floats(tokens * kInputs);
  const auto both = [&](const char* name, const auto& product) {
    close(floating(kScalar, s, codes, x, product), floating(k, s, codes, x, product), name + of);
  };
  both("lookup", [&](const auto& f, const Codes& c, const float* ordered, float* scratch) {
    f.lookup(c, Table{table.data(), type, 1, s.padded / kRun}, ordered, 0, kRows, scratch);
  });
  both("lookup in groups", [&](const auto& f, const Codes& c, const float* ordered, float* scratch) {
    f.lookup(c, Table{table.data(), type, kGroups, kGroupRuns}, ordered, 0, kRows, scratch);
  });
  both("grid", [&](const auto& f, const Codes& c, const float* ordered, float* scratch) {
    f.grid(c, Grid{scale.data(), type, zero.data(), kPadded, kGroups, kGroupRuns}, ordered, 0, kRows, scratch);
  });
  both("levels", [&](const auto& f, const Codes& c, const float* ordered, float* scratch) {
    f.levels(c, Levels{scale.data(), type, kPadded, kGroups, kGroupRuns}, ordered, 0, kRows, scratch);
  });
}

void check_integers(const Kernels& k, int bits, int64_t tokens, int count) {
  const Shape s(bits, tokens, kInputs);
  const std::string of = " of " + std::to_string(bits) + " bits, " + std::to_string(tokens) + " tokens, digits " + std::to_string(count);
  const Bytes codes = random_bytes(kRows * s.row_bytes), scale = random_scales(kRows * kPadded, kFloat32);
  const Bytes zero = random_bytes(kRows * kPadded, (1 << bits) - 1);
  const Grid grid{scale.data(), kFloat32, zero.data(), kPadded, kGroups, kGroupRuns};
  const Floats x = random_floats(tokens * kInputs);
  std::vector<int8_t> digits[2];
  Floats units[2], sums[2];
  const Kernels* sets[] = {&kScalar, &k};
  for (int i = 0; i < 2; ++i) {
    digits[i].resize(tokens * count * s.padded), units[i].resize(tokens * kPadded), sums[i].resize(tokens * kPadded);
    sets[i]->digits(x.data(), kInputs, s.padded, grid, count, 0, tokens * kGroups, digits[i].data(), units[i].data(), sums[i].data());
  }
  check(digits[0] == digits[1] && units[0] == units[1] && sums[0] == sums[1], "digits" + of);
  Floats y[2];
  for (int i = 0; i < 2; ++i) {
    Floats scratch(code_scratch(kPadded, 2));
    y[i].resize(tokens * kRows);
    sets[i]->integer.product(s.codes(codes, y[i]), grid, {digits[0].data(), units[0].data(), sums[0].data(), count}, 0, kRows, scratch.data());
  }
  close(y[0], y[1], "integer" + of);
}

// The greatest sums that there are, over a group that does not end.
void check_limits(const Kernels& k, int count, uint8_t digit) {
  constexpr int64_t kMany = 40000;
  const Shape s(4, 1, kMany);
  const Bytes codes(kRows * s.row_bytes, 255), zero(kRows * kPadded), digits(count * s.padded, digit);
  const Floats scale(kRows * kPadded, 1.0f), units(kPadded, 1.0f), sums(kPadded);
  const Grid grid{scale.data(), kFloat32, zero.data(), kPadded, 1, s.padded / kRun};
  Floats y(kRows), scratch(code_scratch(kPadded, 2));
  k.integer.product(s.codes(codes, y), grid, {reinterpret_cast<const int8_t*>(digits.data()), units.data(), sums.data(), count}, 0,
                    kRows, scratch.data());
  const double value = static_cast<int8_t>(digit) * (count == 1 ? 1.0 : count == 2 ? 257.0 : 65793.0);
  close(Floats(kRows, static_cast<float>(15.0 * value * static_cast<double>(s.padded))), y, "limits of digits " + std::to_string(count));
}

void check_planes(const Kernels& k, int bits, int64_t tokens, int count, ScaleType type, bool grouped) {
  const std::string of = " of " + std::to_string(bits) + " bits, bytes " + std::to_string(count) + ", type " + std::to_string(type);
  const int64_t rows = 100, tiles = 2, pairs = ceil_div(kInputs, 8), group_pairs = grouped ? 16 : pairs;
  const int64_t groups = ceil_div(pairs, group_pairs);
  const Bytes lines = random_bytes(tiles * bits * pairs * kTile), scale = random_scales(tiles * groups * (bits + 1) * kTile, type);
  const Floats x = random_floats(tokens * kInputs);
  Planes p{lines.data(), scale.data(), type, bits, pairs, group_pairs, groups, rows, tokens, nullptr};
  Bytes tables[2];
  Floats units[2], sums[2], y[2], dense[2];
  const Kernels* sets[] = {&kScalar, &k};
  for (int i = 0; i < 2; ++i) {
    tables[i].resize(tokens * pairs * 2 * count * 16), units[i].resize(tokens * groups), sums[i].resize(tokens * groups);
    sets[i]->subset_sums(x.data(), kInputs, p, count, 0, tokens * groups, tables[i].data(), units[i].data(), sums[i].data());
  }
  check(tables[0] == tables[1] && units[0] == units[1] && sums[0] == sums[1], "subset_sums" + of);
  for (int i = 0; i < 2; ++i) {
    y[i].resize(tokens * rows), dense[i].resize(tokens * rows);
    p.y = y[i].data();
    sets[i]->planes(p, {tables[0].data(), units[0].data(), sums[0].data(), count}, 0, tiles);
    p.y = dense[i].data();
    Floats scratch(kPlaneScratch);
    sets[i]->planes_dense(p, x.data(), kInputs, 0, tiles, scratch.data());
  }
  close(y[0], y[1], "planes" + of);
  close(dense[0], dense[1], "planes_dense" + of);
}

void check_tables(const Kernels& k, int64_t entries) {
  const int64_t rows = 3, points = 257;
  const Floats w = random_floats(rows * points);
  Floats f = random_floats(rows * points), out[2];
  for (auto& weight : f) weight *= weight;
  const Kernels* sets[] = {&kScalar, &k};
  for (int i = 0; i < 2; ++i) {
    out[i].resize(rows * entries);
    // As aligned as `Buffer` of entry.cc is.
    std::vector<long double> scratch(ceil_div(table_scratch(points, entries) * 4, sizeof(long double)));
    sets[i]->tables(w.data(), f.data(), points, entries, 0, rows, out[i].data(), reinterpret_cast<float*>(scratch.data()));
  }
  close(out[0], out[1], "tables");
}

}  // namespace

int main(int argc, char** argv) {
  std::vector<Kernels> sets = {kNeon};
  if (argc > 1 && std::string(argv[1]) == "dot") sets.push_back(kNeon), sets.back().integer = kNeonDot;
  check_vectors();
  for (int bits = 1; bits <= 4; ++bits)
    for (const int64_t tokens : {1, 2, 3, 4, 7})
      for (const ScaleType type : kTypes) check_floats(kNeon, bits, tokens, type);
  for (const Kernels& k : sets)
    for (int count = 1; count <= 3; ++count) {
      for (int bits = 1; bits <= 4; ++bits)
        for (const int64_t tokens : {1, 3}) check_integers(k, bits, tokens, count);
      for (const int digit : {-128, 127}) check_limits(k, count, static_cast<uint8_t>(digit));
    }
  for (int count = 1; count <= 3; ++count)
    for (const ScaleType type : kTypes) check_planes(kNeon, count + 1, 3, count, type, type != kFloat32);
  for (const int64_t entries : {2, 8, 16}) check_tables(kNeon, entries);
  std::printf("%d of %d checks failed\n", failures, checks);
  return failures != 0;
}
