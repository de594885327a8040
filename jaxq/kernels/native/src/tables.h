// Weighted k-means of one-dimensional points, exactly: D_m[j] = min over i <= j of D_{m-1}[i] + cost(i, j], whose best
// i never falls as j grows, so that the answer for the middle j bounds the search for all others (Wu 1991).
// Included once by each translation unit of one instruction set.
#pragma once

namespace {

// What is wide enough when nearly all of the spread is explained, and differences of running sums would be noise.
#if defined(__SIZEOF_FLOAT128__)
using Wide = __float128;
#else
using Wide = long double;
#endif

// Below this part of all squares, costs in double have too few digits left.
constexpr double kExplained = 1e-8;

using D4 = double __attribute__((vector_size(32)));
using I4 = int64_t __attribute__((vector_size(32)));

// Running sums (points + 1) of importance, its products with the points, and with their squares.
template <class T>
struct Running {
  T* weight;
  T* first;
  T* second;
};

template <class T>
inline T cost(const Running<T>& run, int64_t i, int64_t j) {
  const T weight = run.weight[j] - run.weight[i], first = run.first[j] - run.first[i];
  const T spread = run.second[j] - run.second[i] - first * first / (weight > 0 ? weight : T(1));
  return weight > 0 && spread > 0 ? spread : T(0);
}

// The least before[i] + cost(i, j] for i in [low, high], and the first i that has it.
template <class T>
inline int64_t best_split(const Running<T>& run, const T* before, int64_t j, int64_t low, int64_t high, T* least) {
  int64_t place = low;
  T best = before[low] + cost(run, low, j);
  for (int64_t i = low + 1; i <= high; ++i) {
    const T trial = before[i] + cost(run, i, j);
    if (trial < best) best = trial, place = i;
  }
  *least = best;
  return place;
}

inline D4 four(const double* from) {
  D4 out;
  __builtin_memcpy(&out, from, sizeof(out));
  return out;
}

template <>
inline int64_t best_split<double>(const Running<double>& run, const double* before, int64_t j, int64_t low, int64_t high,
                                  double* least) {
  int64_t place = low;
  double best = before[low] + cost(run, low, j);
  int64_t i = low + 1;
  if (high - low >= 8) {
    const D4 none = {0, 0, 0, 0}, one = none + 1.0;
    const D4 weight_j = none + run.weight[j], first_j = none + run.first[j], second_j = none + run.second[j];
    D4 least4 = none + best;
    I4 place4 = {low, low, low, low}, at = {i, i + 1, i + 2, i + 3};
    for (; i + 3 <= high; i += 4, at += 4) {
      const D4 weight = weight_j - four(run.weight + i), first = first_j - four(run.first + i);
      const D4 spread = second_j - four(run.second + i) - first * first / (weight > none ? weight : one);
      const D4 positive = spread > none ? spread : none;
      const D4 trial = four(before + i) + (weight > none ? positive : none);
      const I4 less = trial < least4;
      least4 = less ? trial : least4;
      place4 = less ? at : place4;
    }
    best = least4[0], place = place4[0];
    for (int lane = 1; lane < 4; ++lane)
      if (least4[lane] < best || (least4[lane] == best && place4[lane] < place)) best = least4[lane], place = place4[lane];
  }
  for (; i <= high; ++i) {
    const double trial = before[i] + cost(run, i, j);
    if (trial < best) best = trial, place = i;
  }
  *least = best;
  return place;
}

// after[j] and split[j] for j in [begin, end], whose splits lie in [low, high].
template <class T>
void layer(const Running<T>& run, const T* before, T* after, int32_t* split, int64_t begin, int64_t end, int64_t low,
           int64_t high) {
  while (begin <= end) {
    const int64_t j = begin + (end - begin) / 2;
    const int64_t found = best_split<T>(run, before, j, low, high < j ? high : j, after + j);
    split[j] = static_cast<int32_t>(found);
    layer(run, before, after, split, begin, j - 1, low, found);
    begin = j + 1, low = found;
  }
}

// The cuts (entries + 1) of the cheapest partition into `entries` segments, of which some may be empty; its cost.
template <class T>
T best_cuts(const Running<T>& run, int64_t points, int64_t entries, T* before, T* after, int32_t* splits, int64_t* cuts) {
  cuts[0] = 0, cuts[entries] = points;
  if (entries == 1) return cost(run, int64_t{0}, points);
  for (int64_t j = 0; j <= points; ++j) before[j] = cost(run, int64_t{0}, j);
  for (int64_t m = 2; m < entries; ++m) {
    layer<T>(run, before, after, splits + (m - 2) * (points + 1), 0, points, 0, points);
    T* other = before;
    before = after, after = other;
  }
  T total;
  cuts[entries - 1] = best_split<T>(run, before, points, 0, points, &total);
  for (int64_t m = entries - 1; m >= 2; --m) cuts[m - 1] = splits[(m - 2) * (points + 1) + cuts[m]];
  return total;
}

template <class T>
Running<T> running(const double* x, const double* f, int64_t points, T* memory) {
  const Running<T> run{memory, memory + points + 1, memory + 2 * (points + 1)};
  run.weight[0] = run.first[0] = run.second[0] = 0;
  for (int64_t i = 0; i < points; ++i) {
    const T weight = f[i], first = weight * x[i];
    run.weight[i + 1] = run.weight[i] + weight;
    run.first[i + 1] = run.first[i] + first;
    run.second[i + 1] = run.second[i] + first * x[i];
  }
  return run;
}

// Keys in the upper halves, sorted byte by byte; the result is where the function says.
inline uint64_t* sorted(uint64_t* from, uint64_t* to, int64_t count) {
  for (int shift = 32; shift < 64; shift += 8) {
    int64_t place[257] = {0};
    for (int64_t i = 0; i < count; ++i) ++place[((from[i] >> shift) & 255) + 1];
    for (int byte = 0; byte < 256; ++byte) place[byte + 1] += place[byte];
    for (int64_t i = 0; i < count; ++i) to[place[(from[i] >> shift) & 255]++] = from[i];
    uint64_t* other = from;
    from = to, to = other;
  }
  return from;
}

// Bits of floats in an order that is theirs as whole numbers.
inline uint32_t ordered_bits(float value) {
  uint32_t bits;
  value = value == 0 ? 0.0f : value;
  __builtin_memcpy(&bits, &value, sizeof(bits));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

void table_of(const float* w, const float* f, int64_t points, int64_t entries, float* table, char* memory) {
  // In the order of `table_scratch`.
  Wide* wide = reinterpret_cast<Wide*>(memory);
  double* x = reinterpret_cast<double*>(wide + 5 * (points + 1));
  double* importance = x + points;
  uint64_t* keys = reinterpret_cast<uint64_t*>(importance + points);
  int64_t* cuts = reinterpret_cast<int64_t*>(keys + 2 * points);
  int32_t* splits = reinterpret_cast<int32_t*>(cuts + entries + 1);

  float top = 0;
  for (int64_t i = 0; i < points; ++i) {
    keys[i] = static_cast<uint64_t>(ordered_bits(w[i])) << 32 | static_cast<uint32_t>(i);
    top = f[i] > top ? f[i] : top;
  }
  const uint64_t* order = sorted(keys, keys + points, points);
  const auto value = [&](int64_t i) { return static_cast<double>(w[static_cast<uint32_t>(order[i])]); };
  const double centre = 0.5 * value(0) + 0.5 * value(points - 1);
  int64_t distinct = 1;
  for (int64_t i = 0; i < points; ++i) {
    x[i] = value(i) - centre;
    const double part = top > 0 ? static_cast<double>(f[static_cast<uint32_t>(order[i])]) / top : 1.0;
    importance[i] = part >= kNegligible ? part : 0.0;
    distinct += i > 0 && x[i] != x[i - 1];
  }
  if (distinct <= entries) {
    // Surplus entries come first.
    int64_t at = entries - distinct;
    for (int64_t a = 0; a <= at; ++a) table[a] = static_cast<float>(value(0));
    for (int64_t i = 1; i < points; ++i)
      if (x[i] != x[i - 1]) table[++at] = static_cast<float>(value(i));
    return;
  }
  double* narrow = reinterpret_cast<double*>(wide);
  const int64_t room = points + 1;
  const Running<double> run = running(x, importance, points, narrow);
  const double all = run.second[points];
  const double total = best_cuts(run, points, entries, narrow + 3 * room, narrow + 4 * room, splits, cuts);
  if (!(total >= kExplained * all))
    best_cuts(running(x, importance, points, wide), points, entries, wide + 3 * room, wide + 4 * room, splits, cuts);
  for (int64_t a = 0; a < entries; ++a) {
    const int64_t begin = cuts[a], end = cuts[a + 1];
    const double low = x[begin < points ? begin : points - 1];
    double weight = 0, shift = 0;
    for (int64_t i = begin; i < end; ++i) {
      weight += importance[i];
      shift += importance[i] * (x[i] - low);
    }
    // Without importance any place among the points will do.
    double mean = weight > 0 ? low + shift / weight : low;
    if (weight > 0 && mean > x[end - 1]) mean = x[end - 1];
    table[a] = static_cast<float>(mean + centre);
  }
}

void tables(const float* w, const float* f, int64_t points, int64_t entries, int64_t begin, int64_t end, float* out,
            float* scratch) {
  for (int64_t row = begin; row < end; ++row)
    table_of(w + row * points, f + row * points, points, entries, out + row * entries, reinterpret_cast<char*>(scratch));
}

}  // namespace
