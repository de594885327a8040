// One instruction set: compiled with -DJAXQ_ISA_... and the flags that go with it.
#include "kernels.h"

#if defined(JAXQ_ISA_AVX512BF16) || defined(JAXQ_ISA_AVX512) || defined(JAXQ_ISA_AVX2)
#include <immintrin.h>
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
#else
#define JAXQ_TABLE kScalar
#include "simd_scalar.h"
#endif

}  // namespace

#include "values.h"
#include "codes.h"

// Of products of bfloat16 that is all: the rest is what AVX-512 has without them.
#if defined(JAXQ_ISA_AVX512BF16)
extern const Floating<BFloat> kAvx512BFloats;
const Floating<BFloat> kAvx512BFloats = {order<BFloat>, lookup<BFloat>, grid<BFloat>, levels<BFloat>};
#else
#include "integer.h"
#include "planes.h"
#include "tables.h"

extern const Kernels JAXQ_TABLE;
const Kernels JAXQ_TABLE = {{0, Simd::kIntegerTokens[0], Simd::kIntegerTokens[1], Simd::kIntegerTokens[2]},
                            {order<float>, lookup<float>, grid<float>, levels<float>},
                            digits, subset_sums, integer, planes, planes_dense, tables, nullptr};
#endif

}  // namespace jaxq
