// What XLA calls: checks shapes, prepares activations, hands rows out to threads.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#if defined(JAXQ_HAS_AVX2) || defined(JAXQ_HAS_AVX512)
#include <cpuid.h>
#endif
#if defined(JAXQ_HAS_NEONDOT) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(JAXQ_HAS_NEONDOT) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

#include "kernels.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using namespace jaxq;

namespace {

std::atomic<int> g_threads{0};
std::atomic<const Kernels*> g_kernels{nullptr};

#if defined(JAXQ_HAS_AVX2) || defined(JAXQ_HAS_AVX512)
// Not every compiler lets __builtin_cpu_supports ask for it.
bool converts_half() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

#if defined(JAXQ_HAS_AVX512BF16)
bool multiplies_bfloat() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & 1u << 5);
}

const Kernels& with_bfloats() {
  static const Kernels all = [] {
    Kernels kernels = kAvx512;
    kernels.bfloats = &kAvx512BFloats;
    return kernels;
  }();
  return all;
}
#endif

#if defined(JAXQ_HAS_NEONDOT)
bool has_dot_products() {
#if defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP, which old headers lack
  return getauxval(AT_HWCAP) & kDotProducts;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return sysctlbyname("hw.optional.arm.FEAT_DotProd", &has, &size, nullptr, 0) == 0 && has;
#else
  return false;
#endif
}

const Kernels& with_dot_products() {
  static const Kernels all = [] {
    Kernels kernels = kNeon;
    kernels.integer = kNeonDot;
    return kernels;
  }();
  return all;
}
#endif

// The best first.
constexpr const char* kSets[] = {"avx512bf16", "avx512", "avx2", "neondot", "neon", "scalar"};

const Kernels* by_name(const std::string& name) {
  if (name == "scalar") return &kScalar;
#if defined(JAXQ_HAS_AVX2)
  if (name == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && converts_half()) return &kAvx2;
#endif
#if defined(JAXQ_HAS_AVX512)
  if (name == "avx512" && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni") &&
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && converts_half())
    return &kAvx512;
#endif
#if defined(JAXQ_HAS_AVX512BF16)
  if (name == "avx512bf16" && by_name("avx512") && multiplies_bfloat()) return &with_bfloats();
#endif
#if defined(JAXQ_HAS_NEON)
  if (name == "neon") return &kNeon;
#endif
#if defined(JAXQ_HAS_NEONDOT)
  if (name == "neondot" && by_name("neon") && has_dot_products()) return &with_dot_products();
#endif
  return nullptr;
}

const Kernels& kernels() {
  const Kernels* chosen = g_kernels.load();
  if (chosen) return *chosen;
  const Kernels* best = nullptr;
  for (const char* name : kSets)
    if ((best = by_name(name))) break;
  // Unless somebody has chosen another meanwhile.
  g_kernels.compare_exchange_strong(chosen, best);
  return chosen ? *chosen : *best;
}

// Uninitialized memory that begins with a cache line, so that vectors do not straddle two.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) : memory_(new char[static_cast<size_t>(count) * sizeof(T) + kLine]) {
    const auto at = reinterpret_cast<uintptr_t>(memory_.get());
    data_ = reinterpret_cast<T*>((at + kLine - 1) / kLine * kLine);
  }
  T* get() const { return data_; }

 private:
  static constexpr size_t kLine = 64;
  std::unique_ptr<char[]> memory_;
  T* data_;
};

// Parts of [0, count) that several threads take from.
class Job {
 public:
  Job(int64_t workers, int64_t parts, int64_t size, int64_t count, int64_t scratch_floats,
      std::function<void(int64_t, int64_t, float*)> work)
      : parts_(parts), size_(size), count_(count), stride_(ceil_div(scratch_floats, 16) * 16), work_(std::move(work)),
        scratch_(workers * stride_) {}
  // Takes parts until none is left. At most `workers` threads may call this.
  void take() {
    float* scratch = scratch_.get() + worker_.fetch_add(1) * stride_;
    for (int64_t part; (part = next_.fetch_add(1)) < parts_;) {
      work_(part * size_, std::min(count_, (part + 1) * size_), scratch);
      done_.fetch_add(1, std::memory_order_release);
    }
  }
  bool done() const { return done_.load(std::memory_order_acquire) >= parts_; }

 private:
  const int64_t parts_, size_, count_, stride_;
  const std::function<void(int64_t, int64_t, float*)> work_;
  Buffer<float> scratch_;
  std::atomic<int64_t> worker_{0}, next_{0}, done_{0};
};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  // Most of these processors ignore `yield`.
  __asm__ __volatile__("isb" ::: "memory");
#endif
}

// Where threads that have helped wait a moment for the next job. A product of a small matrix takes as long as it takes
// to wake a thread, and in a decoding step the next one follows within microseconds.
class Waiting {
 public:
  // Gives the job to waiting threads; how many of `helpers` are still wanted.
  int64_t offer(const std::shared_ptr<Job>& job, int64_t helpers) {
    std::lock_guard<std::mutex> lock(mutex_);
    const int64_t given = std::min(helpers, idle_ - claimed_);
    if (given > 0) {
      // A job whose threads have not come yet is finished by its own caller.
      job_ = job;
      claimed_ = given;
      version_.fetch_add(1, std::memory_order_release);
    }
    return helpers - std::max<int64_t>(given, 0);
  }
  // Helps with what is offered until nothing has been for a while.
  void help() {
    int64_t seen = enter();
    for (auto since = Clock::now(); Clock::now() - since < kPatience;) {
      for (int i = 0; i < 16 && version_.load(std::memory_order_acquire) == seen; ++i) pause();
      if (version_.load(std::memory_order_acquire) == seen) continue;
      if (const std::shared_ptr<Job> job = accept(&seen)) {
        job->take();
        seen = enter();
        since = Clock::now();
      }
    }
    std::lock_guard<std::mutex> lock(mutex_);
    --idle_;
    claimed_ = std::min(claimed_, idle_);
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr auto kPatience = std::chrono::microseconds(50);

  int64_t enter() {
    std::lock_guard<std::mutex> lock(mutex_);
    ++idle_;
    return version_.load();
  }
  std::shared_ptr<Job> accept(int64_t* seen) {
    std::lock_guard<std::mutex> lock(mutex_);
    *seen = version_.load();
    if (claimed_ <= 0) return nullptr;
    --claimed_;
    --idle_;
    return claimed_ ? job_ : std::move(job_);
  }

  std::mutex mutex_;
  std::atomic<int64_t> version_{0};
  std::shared_ptr<Job> job_;
  int64_t idle_ = 0, claimed_ = 0;
};

// One for all products: whatever comes next, threads wait where it is offered. Not destroyed when the process ends, since
// threads of XLA may still wait in it.
Waiting& waiting() {
  static Waiting& one = *new Waiting;
  return one;
}

// Calls work(begin, end, scratch) on parts of [0, count), which begin at multiples of `least`, until all is done. The
// caller works too and waits only for parts that somebody has begun: a pool whose threads all wait here would otherwise
// never run the rest. `work` must not throw: others still use it then.
template <class Work>
void parallel(ffi::ThreadPool& pool, int64_t count, int64_t least, int64_t scratch_floats, const Work& work) {
  if (count <= 0) return;
  const int64_t set = g_threads.load(), have = std::max<int64_t>(1, pool.num_threads());
  const int64_t threads = set > 0 ? std::min(set, have) : have;
  // Several parts for each thread even out what else the machine does.
  const int64_t size = std::max(least, ceil_div(ceil_div(count, threads * 4), least) * least);
  const int64_t parts = ceil_div(count, size), workers = std::min(threads, parts);
  if (workers == 1) return work(0, count, Buffer<float>(scratch_floats).get());
  const auto job = std::make_shared<Job>(workers, parts, size, count, scratch_floats, std::cref(work));
  for (int64_t wanted = waiting().offer(job, workers - 1); wanted > 0; --wanted)
    pool.Schedule([job] {
      job->take();
      waiting().help();
    });
  job->take();
  // What is left takes microseconds, unless the machine has put the thread that does it aside.
  for (int turns = 0; !job->done(); ++turns) turns < 4096 ? pause() : std::this_thread::yield();
}

using Dims = ffi::Span<const int64_t>;

int64_t last(Dims dims, size_t from_end) { return dims[dims.size() - from_end]; }

// Leading axes that jax.vmap added to the result (batch..., tokens, outputs): of size 1 in an operand that they do not
// concern. Operands are numbered as they come.
class Batch {
 public:
  explicit Batch(Dims out) : sizes_(out.begin(), out.end() - 2), tokens(last(out, 2)) {
    for (const int64_t size : sizes_) count *= size;
  }
  // Whether an operand of so many axes of its own fits.
  bool takes(Dims dims, size_t own) {
    if (dims.size() != sizes_.size() + own) return false;
    std::vector<int64_t> lead(dims.begin(), dims.begin() + sizes_.size());
    for (size_t axis = 0; axis < lead.size(); ++axis)
      if (lead[axis] != 1 && lead[axis] != sizes_[axis]) return false;
    operands_.push_back(std::move(lead));
    return true;
  }
  // Where operand 0, the activations, has all the batches and the others have one, every batch is more tokens.
  void join() {
    for (size_t operand = 0; operand < operands_.size(); ++operand)
      for (size_t axis = 0; axis < sizes_.size(); ++axis)
        if (operands_[operand][axis] != (operand == 0 ? sizes_[axis] : 1)) return;
    tokens *= count;
    count = 1;
    sizes_.clear();
    for (auto& lead : operands_) lead.clear();
  }
  // The place of batch number `batch` in an operand.
  int64_t at(size_t operand, int64_t batch) const {
    const std::vector<int64_t>& lead = operands_[operand];
    int64_t place = 0, stride = 1;
    for (size_t axis = lead.size(); axis-- > 0;) {
      const int64_t index = batch % sizes_[axis];
      batch /= sizes_[axis];
      if (lead[axis] > 1) place += index * stride;
      stride *= lead[axis];
    }
    return place;
  }

 private:
  std::vector<int64_t> sizes_;
  std::vector<std::vector<int64_t>> operands_;

 public:
  int64_t tokens, count = 1;
};

ffi::Error wrong(const char* what) { return ffi::Error(ffi::ErrorCode::kInvalidArgument, std::string("jaxq: ") + what); }

// For the handlers' try blocks: no exception may leave a function that XLA calls.
ffi::Error no_memory() { return ffi::Error(ffi::ErrorCode::kResourceExhausted, "jaxq: no memory for a product"); }

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

// What codes and their activations have in common, if the shapes fit.
struct CodesShape {
  int64_t rows, row_bytes, inputs, blocks, padded;

  bool fits(Dims out, Dims in, Dims codes, int32_t bits) {
    rows = last(codes, 2), row_bytes = last(codes, 1), inputs = last(in, 1);
    blocks = row_bytes / bytes_in_block(bits), padded = blocks * runs_in_block(bits) * kRun;
    return row_bytes % bytes_in_block(bits) == 0 && padded >= inputs && last(in, 2) == last(out, 2) && last(out, 1) == rows;
  }
  // How many groups there are and how many runs each has, if they fit.
  bool groups(int64_t size, int64_t* count, int64_t* runs) const {
    *count = std::max<int64_t>(1, ceil_div(inputs, size));
    // One group may end anywhere; several end with whole runs.
    *runs = *count == 1 ? std::max<int64_t>(1, padded / kRun) : size / kRun;
    return *count == 1 || size % kRun == 0;
  }
  bool groups(int64_t size, int64_t padded_groups, int64_t* count, int64_t* runs) const {
    return groups(size, count, runs) && padded_groups % kGroupPad == 0 && *count <= padded_groups;
  }
};

// Activations as they come: floats, or bfloat16 where that is what they may be rounded to.
using Activations = ffi::AnyBuffer;

bool fits_type(const Activations& x) {
  return x.element_type() == ffi::DataType::F32 || x.element_type() == ffi::DataType::BF16;
}

bool rounded(const Activations& x) { return x.element_type() == ffi::DataType::BF16; }

// Whether there are products of codes with activations in bfloat16; if not, these become floats.
bool has_product(const Kernels& k, const Activations& x, int bits) {
  return rounded(x) && k.bfloats && bits >= kLeastBits<BFloat>;
}

// Activations as floats.
class Widened {
 public:
  explicit Widened(const Activations& x)
      : memory_(rounded(x) ? x.element_count() : 0),
        floats(rounded(x) ? memory_.get() : static_cast<const float*>(x.untyped_data())) {
    if (!rounded(x)) return;
    const uint16_t* from = static_cast<const uint16_t*>(x.untyped_data());
    for (size_t i = 0; i < x.element_count(); ++i) {
      const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
      std::memcpy(memory_.get() + i, &bits, sizeof bits);
    }
  }

 private:
  Buffer<float> memory_;

 public:
  const float* const floats;
};

// Products of codes with activations in floating point, of any kind of values.
class Products {
 public:
  Products(ffi::ThreadPool& pool, const Batch& batch, const CodesShape& shape, const ffi::Buffer<ffi::U8>& codes, int bits,
           float* y)
      : pool_(pool), batch_(batch), shape_(shape), codes_(codes), bits_(bits), y_(y) {}

  Codes codes(int64_t b) const {
    return {codes_.typed_data() + batch_.at(1, b) * shape_.rows * shape_.row_bytes, shape_.row_bytes, bits_, shape_.blocks,
            shape_.rows, batch_.tokens, y_ + b * batch_.tokens * shape_.rows};
  }

  // For each batch number b work(b, kernels, codes, ordered activations, begin, end, scratch) on parts of the rows, by
  // kernels for the type of the activations, or for floats where there are none for it.
  template <class Work>
  void run(const Kernels& k, const Activations& x, int64_t scratch_floats, const Work& work) {
    if (has_product(k, x, bits_)) {
      run(*k.bfloats, static_cast<const BFloat*>(x.untyped_data()), scratch_floats, work);
    } else {
      run(k.floats, Widened(x).floats, scratch_floats, work);
    }
  }

 private:
  template <class X, class Work>
  void run(const Floating<X>& k, const X* x, int64_t scratch_floats, const Work& work) {
    const int64_t inputs = shape_.inputs, padded = shape_.padded;
    Buffer<X> ordered(batch_.tokens * padded);
    for (int64_t b = 0; b < batch_.count; ++b) {
      const X* from = x + batch_.at(0, b) * batch_.tokens * inputs;
      parallel(pool_, batch_.tokens, 4, 0, [&](int64_t begin, int64_t end, float*) {
        k.order(from + begin * inputs, end - begin, inputs, padded, bits_, ordered.get() + begin * padded);
      });
      const Codes c = codes(b);
      parallel(pool_, shape_.rows, kLeastRows, scratch_floats, [&](int64_t begin, int64_t end, float* scratch) {
        work(b, k, c, ordered.get(), begin, end, scratch);
      });
    }
  }

  ffi::ThreadPool& pool_;
  const Batch& batch_;
  const CodesShape& shape_;
  const ffi::Buffer<ffi::U8>& codes_;
  const int bits_;
  float* const y_;
};

ffi::Error codebook(ffi::ThreadPool pool, Activations x, ffi::Buffer<ffi::U8> codes, ffi::AnyBuffer table,
                    ffi::ResultBuffer<ffi::F32> y, int32_t bits, int64_t group_size) try {
  const Dims out = y->dimensions(), in = x.dimensions(), w = codes.dimensions(), t = table.dimensions();
  if (bits < 1 || bits > 4) return wrong("codes have 1 to 4 bits");
  CodesShape shape;
  Table of{};
  int64_t bytes = 0;
  if (!fits_type(x) || !scale_type(table.element_type(), &of.type, &bytes)) return wrong("operands of an unknown type");
  if (out.size() < 2 || group_size < 1) return wrong("shapes do not fit");
  Batch batch(out);
  if (!batch.takes(in, 2) || !batch.takes(w, 2) || !batch.takes(t, 2) || !shape.fits(out, in, w, bits) ||
      last(t, 2) != shape.rows)
    return wrong("shapes do not fit");
  batch.join();
  if (!shape.groups(group_size, &of.groups, &of.group_runs) || last(t, 1) != of.groups << bits)
    return wrong("groups do not fit");
  const char* tables = static_cast<const char*>(table.untyped_data());
  Products(pool, batch, shape, codes, bits, y->typed_data())
      .run(kernels(), x, code_scratch(of.groups, 0),
           [&](int64_t b, const auto& k, const Codes& c, const auto* ordered, auto... rest) {
             Table own = of;
             own.values = tables + ((batch.at(2, b) * c.rows * of.groups) << bits) * bytes;
             k.lookup(c, own, ordered, rest...);
           });
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return no_memory();
}

ffi::Error uniform(ffi::ThreadPool pool, Activations x, ffi::Buffer<ffi::U8> codes, ffi::AnyBuffer scale,
                   ffi::Buffer<ffi::U8> zero, ffi::ResultBuffer<ffi::F32> y, int32_t bits, int64_t group_size,
                   int32_t digits) try {
  const Dims out = y->dimensions(), in = x.dimensions(), w = codes.dimensions(), s = scale.dimensions(),
             z = zero.dimensions();
  if (bits < 1 || bits > 4) return wrong("codes have 1 to 4 bits");
  if (digits < 1 || digits > 3) return wrong("activations have 1 to 3 digits");
  CodesShape shape;
  Grid grid{};
  int64_t bytes = 0;
  if (!fits_type(x) || !scale_type(scale.element_type(), &grid.type, &bytes)) return wrong("operands of an unknown type");
  if (out.size() < 2 || group_size < 1) return wrong("shapes do not fit");
  Batch batch(out);
  if (!batch.takes(in, 2) || !batch.takes(w, 2) || !batch.takes(s, 2) || !batch.takes(z, 2) ||
      !shape.fits(out, in, w, bits) || last(s, 2) != shape.rows || last(z, 2) != shape.rows || last(z, 1) != last(s, 1))
    return wrong("shapes do not fit");
  batch.join();
  grid.padded_groups = last(s, 1);
  if (!shape.groups(group_size, grid.padded_groups, &grid.groups, &grid.group_runs)) return wrong("groups do not fit");
  const auto grid_of = [&](int64_t b) {
    Grid of = grid;
    of.scale = static_cast<const char*>(scale.untyped_data()) + batch.at(2, b) * shape.rows * grid.padded_groups * bytes;
    of.zero = zero.typed_data() + batch.at(3, b) * shape.rows * grid.padded_groups;
    return of;
  };
  const Kernels& k = kernels();
  const int64_t scratch_floats = code_scratch(grid.padded_groups, 2);
  Products products(pool, batch, shape, codes, bits, y->typed_data());
  if (batch.tokens > k.integer.tokens[digits] || has_product(k, x, bits)) {
    products.run(k, x, scratch_floats, [&](int64_t b, const auto& of, const Codes& c, const auto* ordered, auto... rest) {
      of.grid(c, grid_of(b), ordered, rest...);
    });
    return ffi::Error::Success();
  }
  const int64_t groups = batch.tokens * grid.padded_groups, digit_bytes = batch.tokens * digits * shape.padded;
  const Widened wide(x);
  Buffer<float> units(groups), sums(groups);
  Buffer<int8_t> digits_of(digit_bytes);
  for (int64_t b = 0; b < batch.count; ++b) {
    const float* from = wide.floats + batch.at(0, b) * batch.tokens * shape.inputs;
    const Grid of = grid_of(b);
    // What lies beyond the last input and the last group counts for nothing.
    std::memset(digits_of.get(), 0, digit_bytes);
    std::fill_n(units.get(), groups, 0.0f);
    std::fill_n(sums.get(), groups, 0.0f);
    parallel(pool, batch.tokens * grid.groups, 32, 0, [&](int64_t begin, int64_t end, float*) {
      k.digits(from, shape.inputs, shape.padded, of, digits, begin, end, digits_of.get(), units.get(), sums.get());
    });
    const Digits d{digits_of.get(), units.get(), sums.get(), digits};
    const Codes c = products.codes(b);
    parallel(pool, shape.rows, kLeastRows, scratch_floats, [&](int64_t begin, int64_t end, float* scratch) {
      k.integer.product(c, of, d, begin, end, scratch);
    });
  }
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return no_memory();
}

ffi::Error levels(ffi::ThreadPool pool, Activations x, ffi::Buffer<ffi::U8> codes, ffi::AnyBuffer scale,
                  ffi::ResultBuffer<ffi::F32> y, int32_t bits, int64_t group_size) try {
  const Dims out = y->dimensions(), in = x.dimensions(), w = codes.dimensions(), s = scale.dimensions();
  if (bits < 1 || bits > 4) return wrong("codes have 1 to 4 bits");
  CodesShape shape;
  Levels levels{};
  int64_t bytes = 0;
  if (!fits_type(x) || !scale_type(scale.element_type(), &levels.type, &bytes)) return wrong("operands of an unknown type");
  if (out.size() < 2 || group_size < 1) return wrong("shapes do not fit");
  Batch batch(out);
  if (!batch.takes(in, 2) || !batch.takes(w, 2) || !batch.takes(s, 3) || !shape.fits(out, in, w, bits) ||
      last(s, 3) != shape.rows || last(s, 2) != bits + 1)
    return wrong("shapes do not fit");
  batch.join();
  levels.padded_groups = last(s, 1);
  if (!shape.groups(group_size, levels.padded_groups, &levels.groups, &levels.group_runs)) return wrong("groups do not fit");
  const char* scales = static_cast<const char*>(scale.untyped_data());
  Products(pool, batch, shape, codes, bits, y->typed_data())
      .run(kernels(), x, code_scratch(levels.padded_groups, 0),
           [&](int64_t b, const auto& k, const Codes& c, const auto* ordered, auto... rest) {
             Levels of = levels;
             of.scale = scales + batch.at(2, b) * c.rows * (bits + 1) * levels.padded_groups * bytes;
             k.levels(c, of, ordered, rest...);
           });
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return no_memory();
}

ffi::Error bitplane(ffi::ThreadPool pool, Activations x, ffi::Buffer<ffi::U8> lines, ffi::AnyBuffer scale,
                    ffi::ResultBuffer<ffi::F32> y, int64_t group_size, int32_t digits, int64_t table_tokens) try {
  const Dims out = y->dimensions(), in = x.dimensions(), w = lines.dimensions(), s = scale.dimensions();
  if (digits < 1 || digits > 3) return wrong("activations have 1 to 3 digits");
  Planes p{};
  int64_t bytes = 0;
  if (!fits_type(x) || !scale_type(scale.element_type(), &p.type, &bytes)) return wrong("operands of an unknown type");
  if (out.size() < 2 || group_size < 1) return wrong("shapes do not fit");
  Batch batch(out);
  if (!batch.takes(in, 2) || !batch.takes(w, 4) || !batch.takes(s, 4)) return wrong("shapes do not fit");
  const int64_t tiles = last(w, 4), inputs = last(in, 1);
  p.bits = static_cast<int>(last(w, 3));
  p.pairs = last(w, 2);
  p.groups = last(s, 3);
  p.group_pairs = p.groups == 1 ? std::max<int64_t>(1, p.pairs) : group_size / 8;
  p.rows = last(out, 1);
  if (p.bits < 1 || p.bits > 8 || last(w, 1) != kTile || last(s, 1) != kTile || last(s, 2) != p.bits + 1 ||
      last(s, 4) != tiles || tiles != ceil_div(p.rows, kTile) || last(in, 2) != last(out, 2) || p.pairs * 8 < inputs)
    return wrong("shapes do not fit");
  if (p.groups < 1 || (p.groups > 1 && (group_size % 8 != 0 || p.groups != ceil_div(p.pairs, p.group_pairs))))
    return wrong("groups do not fit");
  batch.join();
  p.tokens = batch.tokens;
  const Kernels& k = kernels();
  const bool tabled = batch.tokens <= table_tokens;
  const int64_t groups = tabled ? batch.tokens * p.groups : 0;
  Buffer<uint8_t> tables(tabled ? batch.tokens * p.pairs * 2 * digits * 16 : 0);
  Buffer<float> units(groups), sums(groups);
  const Widened wide(x);
  for (int64_t b = 0; b < batch.count; ++b) {
    const float* from = wide.floats + batch.at(0, b) * batch.tokens * inputs;
    p.lines = lines.typed_data() + batch.at(1, b) * tiles * p.bits * p.pairs * kTile;
    p.scale = static_cast<const char*>(scale.untyped_data()) + batch.at(2, b) * tiles * p.groups * (p.bits + 1) * kTile * bytes;
    p.y = y->typed_data() + b * batch.tokens * p.rows;
    if (!tabled) {
      parallel(pool, tiles, 1, kPlaneScratch, [&](int64_t begin, int64_t end, float* scratch) {
        k.planes_dense(p, from, inputs, begin, end, scratch);
      });
      continue;
    }
    parallel(pool, groups, 4, 0, [&](int64_t begin, int64_t end, float*) {
      k.subset_sums(from, inputs, p, digits, begin, end, tables.get(), units.get(), sums.get());
    });
    const Sums t{tables.get(), units.get(), sums.get(), digits};
    parallel(pool, tiles, 1, 0, [&](int64_t begin, int64_t end, float*) { k.planes(p, t, begin, end); });
  }
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return no_memory();
}

ffi::Error tables(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> w, ffi::Buffer<ffi::F32> f, ffi::ResultBuffer<ffi::F32> table) try {
  const Dims of = w.dimensions(), out = table->dimensions(), importance = f.dimensions();
  if (of.size() < 1 || out.size() != of.size() || importance.size() != of.size()) return wrong("shapes do not fit");
  int64_t rows = 1;
  for (size_t axis = 0; axis + 1 < of.size(); ++axis) {
    rows *= of[axis];
    if (out[axis] != of[axis] || importance[axis] != of[axis]) return wrong("shapes do not fit");
  }
  const int64_t points = last(of, 1), entries = last(out, 1);
  if (last(importance, 1) != points || points < 1 || points >= int64_t{1} << 31 || entries < 1)
    return wrong("shapes do not fit");
  const Kernels& k = kernels();
  parallel(pool, rows, 1, table_scratch(points, entries), [&](int64_t begin, int64_t end, float* scratch) {
    k.tables(w.typed_data(), f.typed_data(), points, entries, begin, end, table->typed_data(), scratch);
  });
  return ffi::Error::Success();
} catch (const std::bad_alloc&) {
  return no_memory();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxq_tables, tables,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxq_codebook, codebook,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Activations>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("bits")
                                  .Attr<int64_t>("group_size"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxq_uniform, uniform,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Activations>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("bits")
                                  .Attr<int64_t>("group_size")
                                  .Attr<int32_t>("digits"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxq_levels, levels,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Activations>()
                                  .Arg<ffi::Buffer<ffi::U8>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int32_t>("bits")
                                  .Attr<int64_t>("group_size"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxq_bitplane, bitplane,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Activations>()
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
  for (const char* name : kSets)
    if (by_name(name) == now) return name;
  return "";
}
