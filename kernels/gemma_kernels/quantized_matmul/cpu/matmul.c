// Activations times a quantised matrix in tiles (form.py), as targets of XLA's foreign functions:
//     y[R, O] = x[R, I] @ w[O, I].T
//
// Plain C: no Python, no C++. The layout lets every machine read the matrix once and in order, with 8
// of its rows in the lanes of a vector; what differs between machines are the few lines before each
// `#include "tiles.h"`. Which set of instructions runs is asked of the processor, once.
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _WIN32
#include <windows.h>
#define EXPORT __declspec(dllexport)
#else
#include <sched.h>
#include <time.h>
#define EXPORT __attribute__((visibility("default")))
#endif
#include "xla_ffi.h"

#define INLINE __attribute__((always_inline)) static inline
enum { AHEAD = 2048, BLOCK = 64 };  // bytes to fetch ahead; rows of activations that caches hold

typedef float v8f __attribute__((vector_size(32)));
typedef int v8i __attribute__((vector_size(32)));
typedef uint8_t v32 __attribute__((vector_size(32)));
typedef uint16_t v16u __attribute__((vector_size(32)));
typedef int8_t v8c __attribute__((vector_size(8)));
// In memory, wherever they begin.
#define ANYWHERE aligned(1), may_alias
typedef float v8f_at __attribute__((vector_size(32), ANYWHERE));
typedef uint8_t v32_at __attribute__((vector_size(32), ANYWHERE));
typedef uint16_t v8h_at __attribute__((vector_size(16), ANYWHERE));
typedef int8_t v8c_at __attribute__((vector_size(8), ANYWHERE));

typedef struct {
  const void* data;  // NULL: none
  int type;
} Factors;

typedef struct {
  long R, O, I, tiles, blocks, groups;  // tiles: 8 rows of the matrix; blocks: 32 columns of one
  int bits, bias, group, int8;          // bias: what 4-bit codes are larger by; -1: see `values`
  const float *x, *values;              // values: what 4-bit codes stand for
  const uint8_t* codes;
  Factors scale, offset;
  float* y;
  // If int8, activations rounded (see round_row): codes, a unit per 32, and what products begin with,
  // -bias * sum of codes, and unit * sum of codes, both for each part of 32 that has its own scale.
  int8_t* rounded;
  float *units, *sums;
  int* begins;
  int parts;
} Product;

typedef struct {
  void (*float_products)(const Product*, long first, long end);  // tiles
  void (*int8_products)(const Product*, long first, long end);
  void (*round_row)(const Product*, long row);
} Instructions;

static const float zeros[4];
static const float ramp[24] = {-8, -7, -6, -5, -4, -3, -2, -1, 0,  1,  2,  3,
                               4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15};

INLINE int four_bytes(const int8_t* x) {
  int out;
  memcpy(&out, x, 4);
  return out;
}

// ---- Any machine, in C alone ----
#define NAME(x) x##_plain
#define FLOAT NAME
#define LANES 8
#define ROWS 4
#define FLOAT_ROWS 2
#define BIAS8 0
#define vec v8f
INLINE v8f from_half_plain(const uint16_t* p) {
  v8f out;
  for (int r = 0; r < 8; r++) {
    const int exponent = p[r] >> 10 & 31, digits = (p[r] & 1023) | (exponent ? 1024 : 0);
    const int power = ((exponent ? exponent : 1) + 102) << 23;  // 2 ** (exponent - 25)
    float unit;
    memcpy(&unit, &power, 4);
    const float size = exponent == 31 ? (p[r] & 1023 ? NAN : INFINITY) : digits * unit;
    out[r] = p[r] & 0x8000 ? -size : size;
  }
  return out;
}
INLINE v8f widen_plain(const uint8_t* p) {
  return __builtin_convertvector(*(const v8c_at*)p, v8f);
}
INLINE v8f nibbles_plain(const uint8_t* codes, int high, const Product* p) {
  v8f out;
  for (int i = 0; i < 8; i++) out[i] = p->values[high ? codes[i] >> 4 : codes[i] & 15];
  return out;
}
INLINE v8f quad_plain(const float* x) {
  return (v8f){x[0], x[1], x[2], x[3], x[0], x[1], x[2], x[3]};
}
INLINE v8f spread_plain(v8f v, int h) {
  const float a = v[2 * h], b = v[2 * h + 1];
  return (v8f){a, a, a, a, b, b, b, b};
}
INLINE v32 unpack_plain(v32 codes) { return codes; }
INLINE void dots_plain(v8i* acc, const v32* u, const int8_t* x, int N, int quads, int bits) {
  (void)bits;
  for (int n = 0; n < N; n++, x += 32)
    for (int q = 0; q < quads; q++)
      for (int r = 0; r < 8; r++)
        for (int c = 0; c < 4; c++) acc[n][r] += (int8_t)u[q][4 * r + c] * x[4 * q + c];
}
#include "tiles.h"

// ---- Sets of instructions: functions between WITH(...) and END may use them ----
#define QUOTED(x) #x
#ifdef __clang__
#define WITH(set) _Pragma(QUOTED(clang attribute push(__attribute__((target(set))), apply_to = function)))
#define END _Pragma("clang attribute pop")
#else
#define WITH(set) _Pragma("GCC push_options") _Pragma(QUOTED(GCC target(set)))
#define END _Pragma("GCC pop_options")
#endif

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>

// ---- AVX2: products of bytes in pairs, which fit 16 bits if one factor is below 129 ----
WITH("avx2,fma,f16c")
#define NAME(x) x##_avx2
#define FLOAT NAME
#define LANES 8
#define ROWS 4
#define FLOAT_ROWS 2
#define BIAS8 0
#define vec v8f
INLINE v8f from_half_avx2(const uint16_t* p) { return (v8f)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
INLINE v8f widen_avx2(const uint8_t* p) {
  return (v8f)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
INLINE v8f nibbles_avx2(const uint8_t* codes, int high, const Product* p) {
  __m256i i = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)codes));
  i = high ? _mm256_srli_epi32(i, 4) : _mm256_and_si256(i, _mm256_set1_epi32(15));
  if (p->bias >= 0) return (v8f)_mm256_cvtepi32_ps(_mm256_sub_epi32(i, _mm256_set1_epi32(p->bias)));
  const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p->values), i);
  const __m256 above = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p->values + 8), i);
  return (v8f)_mm256_blendv_ps(low, above, _mm256_castsi256_ps(_mm256_slli_epi32(i, 28)));
}
INLINE v8f quad_avx2(const float* x) { return (v8f)_mm256_broadcast_ps((const __m128*)x); }
INLINE v8f spread_avx2(v8f v, int h) {
  const __m256i lanes = _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1);
  return (v8f)_mm256_permutevar8x32_ps((__m256)v, _mm256_add_epi32(lanes, _mm256_set1_epi32(2 * h)));
}
INLINE v32 unpack_avx2(v32 codes) { return codes; }
INLINE void dots_avx2(v8i* acc, const v32* u, const int8_t* x, int N, int quads, int bits) {
  const __m256i one = _mm256_set1_epi16(1);
  for (int n = 0; n < N; n++, x += 32) {
    __m256i pairs = _mm256_setzero_si256(), sum = (__m256i)acc[n];
    for (int q = 0; q < quads; q++) {
      const __m256i w = (__m256i)u[q], v = _mm256_set1_epi32(four_bytes(x + 4 * q));
      if (bits == 4) {
        pairs = _mm256_add_epi16(pairs, _mm256_maddubs_epi16(w, v));
        continue;
      }
      const __m256i size = _mm256_sign_epi8(w, w), signs = _mm256_sign_epi8(v, w);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(size, signs), one));
    }
    acc[n] = (v8i)(bits == 4 ? _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, one)) : sum);
  }
}
#include "tiles.h"
END

// ---- AVX-VNNI: four products of bytes and their sum at once; one factor has no sign ----
WITH("avx2,fma,f16c,avxvnni")
#define NAME(x) x##_avxvnni
#define FLOAT(x) x##_avx2
#define ROWS 4
#define BIAS8 128
#define from_half_avxvnni from_half_avx2
INLINE v32 unpack_avxvnni(v32 codes) { return codes ^ 128; }
INLINE void dots_avxvnni(v8i* acc, const v32* u, const int8_t* x, int N, int quads, int bits) {
  (void)bits;
  for (int q = 0; q < quads; q++)
    for (int n = 0; n < N; n++)
      acc[n] = (v8i)_mm256_dpbusd_avx_epi32((__m256i)acc[n], (__m256i)u[q], _mm256_set1_epi32(four_bytes(x + 32 * n + 4 * q)));
}
#include "tiles.h"
END

// ---- AVX-512: twice the lanes, twice the registers ----
#define AVX512 "avx2,fma,f16c,avx512f,avx512bw,avx512dq,avx512vl"
typedef float v16f __attribute__((vector_size(64)));
WITH(AVX512)
#define NAME(x) x##_avx512
#define FLOAT NAME
#define LANES 16
#define ROWS 8
#define FLOAT_ROWS 8
#define BIAS8 0
#define vec v16f
#define from_half_avx512 from_half_avx2
#define unpack_avx512 unpack_avx2
#define dots_avx512 dots_avx2
INLINE v16f widen_avx512(const uint8_t* p) {
  return (v16f)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
INLINE v16f nibbles_avx512(const uint8_t* codes, int high, const Product* p) {
  __m512i i = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)codes));
  if (high) i = _mm512_srli_epi32(i, 4);
  return (v16f)_mm512_permutexvar_ps(i, _mm512_loadu_ps(p->values));  // by the lowest 4 bits
}
INLINE v16f quad_avx512(const float* x) { return (v16f)_mm512_broadcast_f32x4(_mm_loadu_ps(x)); }
INLINE v16f spread_avx512(v8f v, int h) {
  const __m512i lanes = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return (v16f)_mm512_permutexvar_ps(_mm512_add_epi32(lanes, _mm512_set1_epi32(4 * h)),
                                     _mm512_castps256_ps512((__m256)v));
}
#include "tiles.h"
END

// ---- AVX-512 with VNNI ----
WITH(AVX512 ",avx512vnni")
#define NAME(x) x##_vnni
#define FLOAT(x) x##_avx512
#define ROWS 8
#define BIAS8 128
#define from_half_vnni from_half_avx2
INLINE v32 unpack_vnni(v32 codes) { return codes ^ 128; }
INLINE void dots_vnni(v8i* acc, const v32* u, const int8_t* x, int N, int quads, int bits) {
  (void)bits;
  for (int q = 0; q < quads; q++)
    for (int n = 0; n < N; n++)
      acc[n] = (v8i)_mm256_dpbusd_epi32((__m256i)acc[n], (__m256i)u[q], _mm256_set1_epi32(four_bytes(x + 32 * n + 4 * q)));
}
#include "tiles.h"
END

enum { AVX2 = 1, AVX_VNNI = 2, AVX_512 = 4, VNNI = 8 };
static int machine(void) {
  unsigned a, b, c, d, low, high, found = 0;
  const unsigned needed = bit_FMA | bit_F16C | bit_OSXSAVE;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & needed) != needed) return 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));  // registers that the system keeps
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (low & 6) != 6 || !(b & bit_AVX2)) return 0;
  found = AVX2;
  const unsigned wide = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  if ((low & 0xe6) == 0xe6 && (b & wide) == wide) found |= AVX_512 | (c & bit_AVX512VNNI ? VNNI : 0);
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && a & 1 << 4) found |= AVX_VNNI;
  return found;
}

#elif defined(__aarch64__)
#include <arm_neon.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif

// ---- ARM: four products of bytes and their sum at once ----
#ifdef __clang__
WITH("dotprod")
#else
WITH("+dotprod")
#endif
#define NAME(x) x##_dotprod
#define FLOAT(x) x##_plain
#define ROWS 4
#define BIAS8 0
#define from_half_dotprod from_half_plain
#define unpack_dotprod unpack_plain
INLINE void dots_dotprod(v8i* acc, const v32* u, const int8_t* x, int N, int quads, int bits) {
  (void)bits;
  for (int n = 0; n < N; n++, x += 32) {
    int32x4_t sums[2];
    memcpy(sums, &acc[n], 32);
    for (int q = 0; q < quads; q++) {
      int8x16_t codes[2];
      memcpy(codes, &u[q], 32);
      const int8x16_t v = vreinterpretq_s8_s32(vdupq_n_s32(four_bytes(x + 4 * q)));
      for (int i = 0; i < 2; i++) sums[i] = vdotq_s32(sums[i], codes[i], v);
    }
    memcpy(&acc[n], sums, 32);
  }
}
#include "tiles.h"
END

enum { DOTPROD = 1 };
static int machine(void) {
#ifdef __linux__
  return getauxval(AT_HWCAP) & 1 << 20 ? DOTPROD : 0;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
  return DOTPROD;  // all that Apple has made
#else
  return 0;
#endif
}

#else
static int machine(void) { return 0; }
#endif

// ---- Which instructions run ----
static const struct {
  const char* name;
  int needs;
  const Instructions* use;
} CHOICES[] = {
#if defined(__x86_64__)
    {"vnni", VNNI, &instructions_vnni},
    {"avx512", AVX_512, &instructions_avx512},
    {"avxvnni", AVX_VNNI, &instructions_avxvnni},
    {"avx2", AVX2, &instructions_avx2},
#elif defined(__aarch64__)
    {"dotprod", DOTPROD, &instructions_dotprod},
#endif
    {"plain", 0, &instructions_plain},
};
enum { CHOICE_COUNT = sizeof CHOICES / sizeof *CHOICES };
static int chosen = -1;

static int choice(void) {
  int c = __atomic_load_n(&chosen, __ATOMIC_RELAXED);
  if (c >= 0) return c;
  const int has = machine();
  for (c = 0; (CHOICES[c].needs & has) != CHOICES[c].needs;) c++;
  __atomic_store_n(&chosen, c, __ATOMIC_RELAXED);
  return c;
}

// The name of the instructions in use; those asked for first, if there are any and the machine has
// them. NULL: it has not.
EXPORT const char* gemma_quantized_matmul_instructions(const char* wanted) {
  if (wanted && !strcmp(wanted, "auto")) __atomic_store_n(&chosen, -1, __ATOMIC_RELAXED);
  else if (wanted) {
    const int has = machine();
    for (int c = 0; c < CHOICE_COUNT; c++)
      if (!strcmp(wanted, CHOICES[c].name) && (CHOICES[c].needs & has) == CHOICES[c].needs) {
        __atomic_store_n(&chosen, c, __ATOMIC_RELAXED);
        return CHOICES[c].name;
      }
    return NULL;
  }
  return CHOICES[choice()].name;
}

// ---- Threads: XLA's own. The caller works too, and waits for nobody who has not begun ----
typedef struct {
  const Product* product;  // the caller's: read by none who comes late
  const Instructions* use;
  int rounding;           // of rows; else products of tiles
  long count, step, chunks;
  long next, done, users;  // chunks taken, chunks finished, threads that may look here: atomic
} Work;

static void release(Work* w) {
  if (__atomic_sub_fetch(&w->users, 1, __ATOMIC_ACQ_REL) == 0) free(w);
}

static void help(Work* w) {
  long chunk, finished = 0;
  while ((chunk = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED)) < w->chunks) {
    const long first = chunk * w->step, end = first + w->step < w->count ? first + w->step : w->count;
    if (w->rounding) {
      for (long m = first; m < end; m++) w->use->round_row(w->product, m);
    } else
      (w->product->int8 ? w->use->int8_products : w->use->float_products)(w->product, first, end);
    finished++;
  }
  if (finished) __atomic_add_fetch(&w->done, finished, __ATOMIC_RELEASE);
}

static void help_and_release(void* work) {
  help(work);
  release(work);
}

// For those who began and have not finished: a few cycles; then, as somebody else seems to have the core
// of one of them, the core that waits is given to others too, and at last the wait is a sleep.
static void wait_a_turn(int turn) {
#if defined(__x86_64__)
  if (turn < 200) {
    __builtin_ia32_pause();
    return;
  }
#endif
#ifdef _WIN32
  SwitchToThread();
#else
  const struct timespec moment = {0, 20000};
  if (turn < 400) sched_yield();
  else nanosleep(&moment, NULL);
#endif
}

// Does `count` rows or tiles in chunks of at least `least` on as many threads as there are.
static int together(XLA_FFI_CallFrame* f, const Product* p, const Instructions* use, int rounding, long count,
                    long least) {
  Work* w = calloc(1, sizeof *w);
  if (!w) return 0;
  int64_t threads = 1;
  XLA_FFI_ThreadPool_NumThreads_Args asked = {XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, NULL, f->ctx,
                                              &threads};
  XLA_FFI_Error* error = f->api->XLA_FFI_ThreadPool_NumThreads(&asked);
  if (error) threads = 1;
  long step = threads > 1 ? count / (threads * 16) : count;
  if (step < least) step = least;
  *w = (Work){p, use, rounding, count, step, (count + step - 1) / step, 0, 0, 1};
  long helpers = (threads < w->chunks ? threads : w->chunks) - 1;
  if (helpers > 0) __atomic_add_fetch(&w->users, helpers, __ATOMIC_RELAXED);
  for (long i = 0; i < helpers; i++) {
    XLA_FFI_ThreadPool_Schedule_Args task = {XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, NULL, f->ctx,
                                             help_and_release, w};
    if (!error) error = f->api->XLA_FFI_ThreadPool_Schedule(&task);
    if (error) release(w);
  }
  if (error) {  // no threads: the caller does everything
    XLA_FFI_Error_Destroy_Args gone = {XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, NULL, error};
    f->api->XLA_FFI_Error_Destroy(&gone);
  }
  help(w);
  for (int turn = 0; __atomic_load_n(&w->done, __ATOMIC_ACQUIRE) < w->chunks; turn++) wait_a_turn(turn);
  release(w);
  return 1;
}

// ---- The target: operands, their checks, the call ----
static XLA_FFI_Error* failure(XLA_FFI_CallFrame* f, XLA_FFI_Error_Code code, const char* message) {
  XLA_FFI_Error_Create_Args args = {XLA_FFI_Error_Create_Args_STRUCT_SIZE, NULL, message, code};
  return f->api->XLA_FFI_Error_Create(&args);
}

static int is(const XLA_FFI_Buffer* b, int type, int rank) { return (int)b->dtype == type && b->rank == rank; }

// [O / 8, groups, 8] of one of the three types, or those of a stack of matrices.
static int factors(const XLA_FFI_Buffer* b, const Product* p, long layers, long layer, Factors* out) {
  const int type = b->dtype, wide = type == XLA_FFI_DataType_F32 ? 4 : 2, stacked = layers > 0;
  if (type != XLA_FFI_DataType_F16 && type != XLA_FFI_DataType_F32 && type != XLA_FFI_DataType_BF16) return 0;
  *out = (Factors){(const char*)b->data + layer * p->tiles * p->groups * 8 * wide, type};
  const int64_t* dims = b->dims + stacked;
  if (b->rank != 3 + stacked || (stacked && b->dims[0] != layers)) return 0;
  return dims[0] == p->tiles && dims[1] == p->groups && dims[2] == 8;
}

// What is wrong with the operands x, codes, scale, offset, table, layer and the result y; NULL: nothing.
// What is not there has no elements. With a layer the matrix is one of a stack.
static const char* read(XLA_FFI_CallFrame* f, Product* p) {
  if (f->args.size != 6 || f->rets.size != 1) return "expected 6 operands and one result";
  XLA_FFI_Buffer **args = (XLA_FFI_Buffer**)f->args.args, *y = f->rets.rets[0];
  const XLA_FFI_Buffer *x = args[0], *codes = args[1], *scale = args[2], *offset = args[3], *table = args[4];
  const int stacked = args[5]->rank == 0;
  if (!is(x, XLA_FFI_DataType_F32, 2) || !is(y, XLA_FFI_DataType_F32, 2)) return "x and y are float32 matrices";
  if (codes->rank != 5 + stacked) return "codes are not tiles";
  const int64_t* dims = codes->dims + stacked;
  if (dims[3] != 8 || dims[4] != 4) return "codes are not tiles";
  p->bits = dims[2];
  if (codes->dtype != XLA_FFI_DataType_S8 && !(codes->dtype == XLA_FFI_DataType_U8 && p->bits == 4))
    return "codes are int8, or uint8 of 4 bits";
  if (p->bits != 4 && p->bits != 8) return "codes have 4 or 8 bits";
  p->R = x->dims[0], p->I = x->dims[1], p->O = y->dims[1], p->tiles = dims[0], p->blocks = dims[1];
  if (p->blocks * 32 != p->I || p->tiles * 8 != p->O || y->dims[0] != p->R) return "shapes do not fit together";
  p->groups = scale->rank == 3 + stacked ? scale->dims[1 + stacked] : 0;
  if (p->groups < 1 || p->I % p->groups || p->I / p->groups % 16) return "groups are not a multiple of 16";
  p->group = p->I / p->groups;
  const long layers = stacked ? codes->dims[0] : 0;
  if (stacked && !is(args[5], XLA_FFI_DataType_S32, 0)) return "a layer is int32";
  const long layer = stacked && layers ? *(const int32_t*)args[5]->data : 0;
  if (stacked && (layer < 0 || layer >= layers)) return "there is no such layer";
  if (!factors(scale, p, layers, layer, &p->scale)) return "scale does not fit the codes";
  if (offset->rank > 1 && !factors(offset, p, layers, layer, &p->offset)) return "offset does not fit the codes";
  p->bias = codes->dtype == XLA_FFI_DataType_S8 ? 8 : 0;
  p->values = ramp + 8 - p->bias;
  if (table->rank != 1 || table->dims[0]) {
    if (!is(table, XLA_FFI_DataType_F32, 1) || table->dims[0] != 16 || p->bits != 4 || p->int8)
      return "a table is float32 [16], for 4-bit codes and float32 activations";
    p->values = table->data, p->bias = -1;
  }
  p->x = x->data, p->y = y->data;
  p->codes = (const uint8_t*)codes->data + layer * p->tiles * p->blocks * p->bits * 32;
  return NULL;
}

static XLA_FFI_Error* product(XLA_FFI_CallFrame* f, int int8) {
  if (f->extension_start && f->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata* m = ((XLA_FFI_Metadata_Extension*)f->extension_start)->metadata;
    // What is used here is the same in all minor versions from 0.3 to 0.5 (jaxlib 0.10 to 0.12).
    const int same = f->api && f->api->api_version.major_version == XLA_FFI_API_MAJOR;
    m->api_version.major_version = XLA_FFI_API_MAJOR;
    m->api_version.minor_version = same ? f->api->api_version.minor_version : XLA_FFI_API_MINOR;
    return NULL;
  }
  if (f->stage != XLA_FFI_ExecutionStage_EXECUTE) return NULL;
  Product p = {.int8 = int8};
  const char* wrong = read(f, &p);
  if (wrong) return failure(f, XLA_FFI_Error_Code_INVALID_ARGUMENT, wrong);
  if (!p.R || !p.O) return NULL;
  const Instructions* use = CHOICES[choice()].use;
  char* memory = NULL;
  if (int8) {
    const size_t blocks = p.R * p.blocks, parts = p.parts = p.group % 32 ? 2 : 1;
    if (!(memory = malloc(blocks * (36 + 8 * parts))))
      return failure(f, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "no memory for rounded activations");
    p.units = (float*)memory, p.sums = p.units + blocks, p.begins = (int*)(p.sums + blocks * parts);
    p.rounded = (int8_t*)(p.begins + blocks * parts);
  }
  const long row = p.I * 8 * (p.R < 4 ? p.R : p.R * 2);  // about the time of a tile's products
  int done = !int8 || together(f, &p, use, 1, p.R, 65536 / p.I + 1);
  done = done && together(f, &p, use, 0, p.tiles, 65536 / row + 1);
  free(memory);
  return done ? NULL : failure(f, XLA_FFI_Error_Code_RESOURCE_EXHAUSTED, "no memory for a product");
}

EXPORT XLA_FFI_Error* gemma_quantized_matmul_float(XLA_FFI_CallFrame* f) { return product(f, 0); }
EXPORT XLA_FFI_Error* gemma_quantized_matmul_int8(XLA_FFI_CallFrame* f) { return product(f, 1); }
