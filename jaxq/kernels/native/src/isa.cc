// One instruction set: compiled with -DJAXQ_ISA_... and the flags that go with it.
#include "kernels.h"

#if defined(JAXQ_ISA_AVX512BF16) || defined(JAXQ_ISA_AVX512) || defined(JAXQ_ISA_AVX2)
#include <immintrin.h>
#elif defined(JAXQ_ISA_NEONDOT) || defined(JAXQ_ISA_NEON)
#include <arm_neon.h>
#else
#include <cmath>
#include <cstring>
#endif

namespace jaxq {
namespace {

#if defined(JAXQ_ISA_AVX512BF16)
#include "simd_avx512.h"
#elif defined(JAXQ_ISA_AVX512)
#define JAXQ_TABLE kAvx512
#include "simd_avx512.h"
#elif defined(JAXQ_ISA_AVX2)
#define JAXQ_TABLE kAvx2
#include "simd_avx2.h"
#elif defined(JAXQ_ISA_NEONDOT)
#include "simd_neon.h"
#elif defined(JAXQ_ISA_NEON)
#define JAXQ_TABLE kNeon
#include "simd_neon.h"
#else
#define JAXQ_TABLE kScalar
#include "simd_scalar.h"
#endif

}  // namespace

#include "values.h"

// Of products of bfloat16, and of integers by dot products, that is all: the rest is what the set without them has.
#if defined(JAXQ_ISA_AVX512BF16)
#include "codes.h"
extern const Floating<BFloat> kAvx512BFloats;
const Floating<BFloat> kAvx512BFloats = {order<BFloat>, lookup<BFloat>, grid<BFloat>, levels<BFloat>};
#else
#include "integer.h"
constexpr Integer kInteger = {{0, Simd::kIntegerTokens[0], Simd::kIntegerTokens[1], Simd::kIntegerTokens[2]}, integer};

#if defined(JAXQ_ISA_NEONDOT)
extern const Integer kNeonDot;
const Integer kNeonDot = kInteger;
#else
#include "codes.h"
#include "planes.h"
#include "tables.h"

extern const Kernels JAXQ_TABLE;
const Kernels JAXQ_TABLE = {{order<float>, lookup<float>, grid<float>, levels<float>},
                            kInteger, digits, subset_sums, planes, planes_dense, tables, nullptr};
#endif
#endif

}  // namespace jaxq
