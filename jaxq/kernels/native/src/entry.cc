// What XLA calls: checks shapes, prepares activations, hands rows out to threads.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using namespace jaxq;

namespace {

std::atomic<int> g_threads{0};
std::atomic<const Kernels*> g_kernels{nullptr};

const Kernels* by_name(const std::string& name) {
  if (name == "scalar") return &kScalar;
#if defined(JAXQ_HAS_AVX2)
  if (name == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &kAvx2;
#endif
#if defined(JAXQ_HAS_AVX512)
  if (name == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni"))
    return &kAvx512;
#endif
#if defined(JAXQ_HAS_NEON)
  if (name == "neon") return &kNeon;
#endif
  return nullptr;
}

const Kernels& kernels() {
  const Kernels* chosen = g_kernels.load();
  if (chosen) return *chosen;
  for (const char* name : {"avx512", "avx2", "neon", "scalar"})
    if ((chosen = by_name(name))) break;
  g_kernels.store(chosen);
  return *chosen;
}

// Calls work(begin, end) on parts of [0, count) until all is done. The caller works too and waits only for parts that
// somebody has begun: a pool whose threads all wait here would otherwise never run the rest.
template <class Work>
void parallel(ffi::ThreadPool& pool, int64_t count, int64_t least, const Work& work) {
  const int64_t set = g_threads.load(), have = std::max<int64_t>(1, pool.num_threads());
  const int64_t threads = set > 0 ? std::min(set, have) : have;
  // Several parts for each thread even out what else the machine does.
  const int64_t size = std::max(least, ceil_div(ceil_div(count, threads * 4), least) * least);
  const int64_t parts = ceil_div(count, size);
  if (threads == 1 || parts <= 1) {
    if (count > 0) work(0, count);
    return;
  }
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  const auto take = [state, parts, size, count, &work] {
    for (int64_t part; (part = state->next.fetch_add(1)) < parts;) {
      work(part * size, std::min(count, (part + 1) * size));
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  for (int64_t helper = 1; helper < std::min(threads, parts); ++helper) pool.Schedule(std::function<void()>(take));
  take();
  while (state->done.load(std::memory_order_acquire) < parts) std::this_thread::yield();
}

int64_t product(ffi::Span<const int64_t> dims, size_t from, size_t to) {
  int64_t total = 1;
  for (size_t i = from; i < to; ++i) total *= dims[i];
  return total;
}

// Leading axes that jax.vmap added: of size 1 in an operand that they do not concern.
class Batch {
 public:
  Batch(ffi::Span<const int64_t> out, ffi::Span<const int64_t> x, ffi::Span<const int64_t> weights, size_t trailing) {
    const size_t lead = out.size() - 2;
    tokens = out[lead];
    const int64_t all = product(out, 0, lead);
    if (product(weights, 0, weights.size() - trailing) == 1 && product(x, 0, lead) == all) {
      // One matrix: every batch is more tokens.
      tokens *= all;
      return;
    }
    sizes_.assign(out.begin(), out.begin() + lead);
    x_.assign(x.begin(), x.begin() + lead);
    weights_.assign(weights.begin(), weights.begin() + (weights.size() - trailing));
    count = all;
  }
  int64_t x(int64_t batch) const { return place(batch, x_); }
  int64_t weights(int64_t batch) const { return place(batch, weights_); }

  int64_t count = 1;
  int64_t tokens;

 private:
  int64_t place(int64_t batch, const std::vector<int64_t>& own) const {
    int64_t at = 0, stride = 1;
    for (size_t axis = own.size(); axis-- > 0;) {
      const int64_t index = batch % sizes_[axis];
      batch /= sizes_[axis];
      if (own[axis] > 1) at += index * stride;
      stride *= own[axis];
    }
    return at;
  }
  std::vector<int64_t> sizes_, x_, weights_;
};

template <class T>
std::unique_ptr<T[]> make(int64_t count) {
  return std::unique_ptr<T[]>(new T[std::max<int64_t>(count, 1)]);
}

ffi::Error wrong(const char* what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, std::string("jaxq: ") + what); }

bool scale_type(ffi::DataType type, ScaleType* out, int64_t* bytes) {
  switch (type) {
    case ffi::DataType::F32: *out = kFloat32; *bytes = 4; return true;
    case ffi::DataType::F16: *out = kFloat16; *bytes = 2; return true;
    case ffi::DataType::BF16: *out = kBFloat16; *bytes = 2; return true;
    default: return false;
  }
}

// Rows of several tokens are computed four at a time.
constexpr int64_t kLeastRows = 16;

ffi::Error codebook(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> codes, ffi::Buffer<ffi::F32> table,
                    ffi::ResultBuffer<ffi::F32> y, int32_t bits, int32_t bytes) {
  const auto out = y->dimensions(), in = x.dimensions(), w = codes.dimensions();
  if (bits < 1 || bits > 4) return wrong("codes have 1 to 4 bits");
  const Batch batch(out, in, w, 2);
  const int64_t rows = w[w.size() - 2], row_bytes = w[w.size() - 1], inputs = in[in.size() - 1];
  const int64_t blocks = row_bytes / bytes_in_block(bits), padded = blocks * runs_in_block(bits) * kRun;
  if (padded < inputs || out[out.size() - 1] != rows) return wrong("shapes do not fit");
  const Kernels& k = kernels();
  auto ordered = make<float>(batch.tokens * padded);
  for (int64_t b = 0; b < batch.count; ++b) {
    const float* from = x.typed_data() + batch.x(b) * batch.tokens * inputs;
    parallel(pool, batch.tokens, 4, [&](int64_t begin, int64_t end) {
      k.order(from + begin * inputs, end - begin, inputs, padded, ordered.get() + begin * padded);
    });
    const int64_t at = batch.weights(b) * rows;
    const Codes c{codes.typed_data() + at * row_bytes, row_bytes, bits, blocks, rows, batch.tokens,
                  y->typed_data() + b * batch.tokens * rows};
    const Table t{table.typed_data() + (at << bits), bytes};
    parallel(pool, rows, kLeastRows, [&](int64_t begin, int64_t end) {
      auto scratch = make<float>(scratch_floats(0));
      k.lookup(c, t, ordered.get(), begin, end, scratch.get());
    });
  }
  return ffi::Error::Success();
}

ffi::Error uniform(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> codes, ffi::AnyBuffer scale,
                   ffi::Buffer<ffi::U8> zero, ffi::ResultBuffer<ffi::F32> y, int32_t bits, int64_t group_size,
                   int32_t digits, int64_t integer_tokens) {
  const auto out = y->dimensions(), in = x.dimensions(), w = codes.dimensions(), s = scale.dimensions();
  if (bits < 1 || bits > 4) return wrong("codes have 1 to 4 bits");
  if (digits < 1 || digits > 3) return wrong("activations have 1 to 3 digits");
  const Batch batch(out, in, w, 2);
  const int64_t rows = w[w.size() - 2], row_bytes = w[w.size() - 1], inputs = in[in.size() - 1];
  const int64_t blocks = row_bytes / bytes_in_block(bits), padded = blocks * runs_in_block(bits) * kRun;
  Grid grid{};
  int64_t scale_bytes = 0;
  grid.padded_groups = s[s.size() - 1];
  grid.groups = ceil_div(inputs, group_size);
  // One group may end anywhere; several end with whole runs.
  grid.group_runs = ceil_div(grid.groups == 1 ? padded : group_size, kRun);
  if (!scale_type(scale.element_type(), &grid.type, &scale_bytes)) return wrong("scales of an unknown type");
  if (padded < inputs || out[out.size() - 1] != rows || grid.padded_groups % kGroupPad != 0 ||
      grid.groups > grid.padded_groups || (grid.groups > 1 && group_size % kRun != 0))
    return wrong("shapes do not fit");
  const Kernels& k = kernels();
  const bool integer = batch.tokens <= integer_tokens;
  const int64_t groups = batch.tokens * grid.padded_groups;
  auto ordered = make<float>(integer ? 0 : batch.tokens * padded);
  std::vector<int8_t> bytes(integer ? batch.tokens * digits * padded : 0);
  std::vector<float> units(integer ? groups : 0), sums(integer ? groups : 0);
  for (int64_t b = 0; b < batch.count; ++b) {
    const int64_t at = batch.weights(b) * rows;
    const float* from = x.typed_data() + batch.x(b) * batch.tokens * inputs;
    grid.scale = static_cast<const char*>(scale.untyped_data()) + at * grid.padded_groups * scale_bytes;
    grid.zero = zero.typed_data() + at * grid.padded_groups;
    const Codes c{codes.typed_data() + at * row_bytes, row_bytes, bits, blocks, rows, batch.tokens,
                  y->typed_data() + b * batch.tokens * rows};
    if (integer) {
      std::fill(bytes.begin(), bytes.end(), static_cast<int8_t>(0));
      parallel(pool, batch.tokens * grid.groups, 32, [&](int64_t begin, int64_t end) {
        k.digits(from, inputs, padded, grid, digits, begin, end, bytes.data(), units.data(), sums.data());
      });
    } else {
      parallel(pool, batch.tokens, 4, [&](int64_t begin, int64_t end) {
        k.order(from + begin * inputs, end - begin, inputs, padded, ordered.get() + begin * padded);
      });
    }
    const Digits d{bytes.data(), units.data(), sums.data(), digits};
    parallel(pool, rows, kLeastRows, [&](int64_t begin, int64_t end) {
      auto scratch = make<float>(scratch_floats(2 * grid.padded_groups));
      if (integer) {
        k.integer(c, grid, d, begin, end, scratch.get());
      } else {
        k.grid(c, grid, ordered.get(), begin, end, scratch.get());
      }
    });
  }
  return ffi::Error::Success();
}

ffi::Error bitplane(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::U8> lines, ffi::AnyBuffer scale,
                    ffi::ResultBuffer<ffi::F32> y, int64_t group_size, int32_t digits, int64_t table_tokens) {
  const auto out = y->dimensions(), in = x.dimensions(), w = lines.dimensions(), s = scale.dimensions();
  if (digits < 1 || digits > 3) return wrong("activations have 1 to 3 digits");
  const Batch batch(out, in, w, 4);
  const size_t d = w.size();
  Planes p{};
  const int64_t tiles = w[d - 4], inputs = in[in.size() - 1];
  int64_t scale_bytes = 0;
  p.bits = static_cast<int>(w[d - 3]);
  p.pairs = w[d - 2];
  p.groups = s[s.size() - 3];
  p.group_pairs = ceil_div(p.groups == 1 ? p.pairs * 8 : group_size, 8);
  p.rows = out[out.size() - 1];
  p.tokens = batch.tokens;
  if (!scale_type(scale.element_type(), &p.type, &scale_bytes)) return wrong("scales of an unknown type");
  if (p.bits < 1 || p.bits > 8 || w[d - 1] != kTile || tiles != ceil_div(p.rows, kTile) || p.pairs * 8 < inputs ||
      p.groups != ceil_div(p.pairs, p.group_pairs) || (p.groups > 1 && group_size % 8 != 0))
    return wrong("shapes do not fit");
  const Kernels& k = kernels();
  const bool tabled = batch.tokens <= table_tokens;
  std::vector<uint8_t> tables(tabled ? batch.tokens * p.pairs * 2 * digits * 16 : 0);
  std::vector<float> units(tabled ? batch.tokens * p.groups : 0), sums(units.size());
  for (int64_t b = 0; b < batch.count; ++b) {
    const int64_t at = batch.weights(b);
    const float* from = x.typed_data() + batch.x(b) * batch.tokens * inputs;
    p.lines = lines.typed_data() + at * tiles * p.bits * p.pairs * kTile;
    p.scale = static_cast<const char*>(scale.untyped_data()) + at * tiles * p.groups * (p.bits + 1) * kTile * scale_bytes;
    p.y = y->typed_data() + b * batch.tokens * p.rows;
    if (!tabled) {
      parallel(pool, tiles, 1, [&](int64_t begin, int64_t end) {
        auto scratch = make<float>(scratch_floats(0));
        k.planes_dense(p, from, inputs, begin, end, scratch.get());
      });
      continue;
    }
    parallel(pool, batch.tokens * p.groups, 4, [&](int64_t begin, int64_t end) {
      k.subset_sums(from, inputs, p, digits, begin, end, tables.data(), units.data(), sums.data());
    });
    const Sums t{tables.data(), units.data(), sums.data(), digits};
    parallel(pool, tiles, 1, [&](int64_t begin, int64_t end) { k.planes(p, t, begin, end); });
  }
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxq_codebook, codebook,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("bits")
                                  .Attr<int32_t>("bytes"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxq_uniform, uniform,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("bits")
                                  .Attr<int64_t>("group_size")
                                  .Attr<int32_t>("digits")
                                  .Attr<int64_t>("integer_tokens"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxq_bitplane, bitplane,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("group_size")
                                  .Attr<int32_t>("digits")
                                  .Attr<int64_t>("table_tokens"));

// Chooses the number of threads (0: all of XLA's) and the instruction set (empty: the best); false if it cannot run.
extern "C" bool jaxq_configure(int threads, const char* isa) {
  const Kernels* chosen = *isa ? by_name(isa) : nullptr;
  if (*isa && !chosen) return false;
  g_threads.store(threads);
  g_kernels.store(chosen);
  return true;
}

extern "C" const char* jaxq_isa() {
  const Kernels* now = &kernels();
#if defined(JAXQ_HAS_AVX2)
  if (now == &kAvx2) return "avx2";
#endif
#if defined(JAXQ_HAS_AVX512)
  if (now == &kAvx512) return "avx512";
#endif
#if defined(JAXQ_HAS_NEON)
  if (now == &kNeon) return "neon";
#endif
  return now == &kScalar ? "scalar" : "";
}
