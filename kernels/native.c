/* The fast paths of the sparse and the dense sign matrix and of scoring for CPUs; the modules sparse.py, rademacher.py and
 * scoring.py define them.
 *
 * Nothing here allocates or shares state: threads may call every function at once on different outputs. Loaded with
 * ctypes, which releases the interpreter's lock, so Python's own headers serve the build alone.
 */
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && !defined(__APPLE__)
#include <immintrin.h>
#endif

#if !defined(__GNUC__)
#error "vector extensions of GCC or Clang are needed; without them the torch backend serves"
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#define INLINE static inline __attribute__((always_inline))
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

#define NEGATIVE 0x80000000u
#define TAG_SIGN 0x5349474Eu
#define TAG_PERM 0x5045524Du

enum {
  TABLE = 4096,       /* entries of a table of columns: fits the first-level cache beside the data */
  PIECE = 512,        /* coordinates that are interleaved at once */
  ROWS = 4,           /* of a register tile of an outer product */
  STEPS = 32,         /* of an outer product that are summed in registers */
  LEFT_WORK = 8192,   /* vectors of work space: a strip of left, interleaved */
  RIGHT_WORK = 4096,  /* and of right; together they fit the second-level cache beside the sums */
  WINDOW_STEPS = 128, /* windows of a convolution that are summed in registers */
  WINDOW_TABLE = 1024, /* entries of its table; ROWS panels of the steps share the first-level cache with it */
  PANEL = 16,         /* examples whose entries lie beside each other in rank-one products: a line of the caches */
  PANEL_COLUMNS = 128, /* whose sums are turned at once, and then lie in runs of lines */
  OUTER_COPIES = 64,  /* the largest nnz of an outer product or a convolution */
  SCORE_ROWS = 4,     /* of a register tile of scores */
  SCORE_QUERIES = 4,  /* likewise */
  SCORE_COLUMNS = 256, /* of a piece of rows that stays in the first-level cache */
  SCORE_FEW = 32,     /* queries of sp_score and sp_best at most */
  SCORE_CHUNK = 64,   /* rows whose scores it holds at once */
  LINE = 64,          /* bytes of packed rows that are lined up at once */
  NIBBLE_VECTORS = 4, /* of rows that meet a table while it is in registers */
  GRAM = 192,         /* columns on a side of a block of a Gram matrix: whole panels at every number of LANES */
  GRAM_STEPS = 64,    /* rows whose products are summed in registers; two panels of them fit the first-level cache */
  INTEGER_STEPS = 128, /* likewise, of products of whole numbers, which take half of the room */
  CODES_CHUNK = 256,  /* numbers that are encoded at once */
  CODES_LANES = 16,   /* interleaved sums of a row */
  CODES_NEAR = 16,    /* neighbours that a rotation adds in registers */
  TOGETHER = 4,       /* examples whose sums of spectra stay in the second-level cache */
  NEAR = 1024,        /* points of a transform that stay in the first-level cache beside their sums and twiddles */
};
enum { FLOAT32, FLOAT16, INT8, CODES }; /* types of stored rows */
typedef float four __attribute__((vector_size(16)));

EXPORT const int sp_version = 15; /* of the functions' signatures: a library of another version is not used */
EXPORT const int sp_outer_copies = OUTER_COPIES;
EXPORT const int sp_score_few = SCORE_FEW;
EXPORT const int sp_gram_side = GRAM;
EXPORT const int sp_gram_steps = GRAM_STEPS;
EXPORT const int sp_integer_steps = INTEGER_STEPS;
EXPORT int sp_highest_level = 2; /* tests lower it to reach the code for other processors */

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Philox4x32-10 (Salmon et al. 2011), key = the two halves of the seed. */
INLINE void philox(uint64_t x01, uint32_t x2, uint32_t x3, uint64_t seed, uint32_t w[4]) {
  uint32_t c0 = (uint32_t)x01, c1 = (uint32_t)(x01 >> 32), c2 = x2, c3 = x3;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  w[0] = c0, w[1] = c1, w[2] = c2, w[3] = c3;
}

/* Which matrix: the sparse map of a seed with so many copies, or a tensor map, whose coordinate base + r width + c has
 * the column left[r] + right[c] modulo k and the product of both signs (one copy). NativeMap of native.py. */
typedef struct {
  uint64_t seed, base, width;
  const uint32_t *left, *right; /* column, and NEGATIVE where the sign is -1; null for the sparse map */
  uint32_t k, nnz;
} spec;

/* An outer product sum_t left[b][t] (x) right[b][t] under a map; strides are those from example to example and from step
 * to step. NativeProduct of native.py. */
typedef struct {
  const float *left, *right;
  int64_t left_b, left_t, right_b, right_t, steps, o, i;
  spec of;
} product;

/* One copy of a map, and the permutation of the block of the sparse map that was looked at last. */
typedef struct {
  const spec *of;
  uint64_t block;
  uint32_t k, copy, multiplier, shift;
} map;

INLINE map open_map(const spec *of, uint32_t copy) {
  const map m = {of, UINT64_MAX, of->k, copy, 0, 0};
  return m;
}

static void permute(map *m, uint64_t block) {
  uint32_t w[4], a, b, rest;
  if (m->block == block) return;
  for (uint32_t attempt = 0;; attempt++) {
    philox(block, m->copy | attempt << 16, TAG_PERM, m->of->seed, w);
    m->multiplier = (uint32_t)((w[0] | (uint64_t)w[1] << 32) % m->k);
    for (a = m->k, b = m->multiplier; b; a = b, b = rest) rest = a % b;
    if (a == 1) break;
  }
  m->shift = (uint32_t)((w[2] | (uint64_t)w[3] << 32) % m->k);
  m->block = block;
}

/* How many coordinates from i on have columns of their own. */
INLINE int64_t apart(const map *m, uint64_t i) {
  if (!m->of->left) return (int64_t)(m->k - i % m->k);
  const uint64_t c = (i - m->of->base) % m->of->width;
  return smaller((int64_t)(m->of->width - c), (int64_t)(m->k - c % m->k));
}

#include "native_heap.c"

/* The vector code, once for each width of the processor's registers; the fitting one is chosen when it runs. */
#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define VARIANT(name) JOIN(name##_, LANES)

#define LANES 4
#define ACROSS 2 /* of the tile: ROWS x ACROSS sums fit the registers */
#include "native_lanes.c"
#undef LANES
#undef ACROSS

#if defined(__x86_64__) && !defined(__APPLE__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define LANES 8
#define ACROSS 3
#include "native_lanes.c"
#undef LANES
#undef ACROSS
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
#define LANES 16
#define ACROSS 4
#include "native_lanes.c"
#undef LANES
#undef ACROSS
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,fma")
#endif
#include "native_gram_integer.c"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

EXPORT int sp_level(void) { /* 2: AVX-512, 1: AVX2, 0: neither */
  __builtin_cpu_init();
  if (sp_highest_level > 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 2;
  return sp_highest_level > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

EXPORT int sp_integers(void) { return sp_level() == 2 && __builtin_cpu_supports("avx512vnni"); }

#define DISPATCH(name, parameters, arguments)                    \
  EXPORT void name parameters {                                  \
    const int level = sp_level();                                \
    (level == 2 ? name##_16 : level ? name##_8 : name##_4) arguments; \
  }
#else
EXPORT int sp_level(void) { return 0; }
EXPORT int sp_integers(void) { return 0; } /* whether sp_gram_integer computes anything */
#define gram_integer(...) ((void)0)
#define DISPATCH(name, parameters, arguments) \
  EXPORT void name parameters { name##_4 arguments; }
#endif

EXPORT int sp_lanes(void) { return 4 << sp_level(); } /* examples that are interleaved */

DISPATCH(sp_table, (uint32_t * table, uint64_t start, int64_t count, const spec *of, uint32_t copy),
         (table, start, count, of, copy))
DISPATCH(sp_signs, (float *out, uint64_t start, int64_t count, int64_t columns, uint64_t seed, uint32_t tag),
         (out, start, count, columns, seed, tag))
DISPATCH(sp_add_rows,
         (float *out, int64_t out_stride, const float *rows, int64_t row_stride, int64_t batch, int64_t count,
          uint64_t start, const spec *of, float scale),
         (out, out_stride, rows, row_stride, batch, count, start, of, scale))
DISPATCH(sp_add_at,
         (float *out, int64_t out_stride, const float *rows, int64_t row_stride, int64_t number, int64_t count,
          const int64_t *example, const int64_t *start, int64_t first, int64_t last, const spec *of, float scale),
         (out, out_stride, rows, row_stride, number, count, example, start, first, last, of, scale))
DISPATCH(sp_add_lanes,
         (void *sums, const float *rows, int64_t row_stride, int lanes, int64_t count, uint64_t start, const spec *of),
         (sums, rows, row_stride, lanes, count, start, of))
DISPATCH(sp_outer_lanes,
         (void *sums, void *work, const float *left, int64_t left_b, int64_t left_t, const float *right, int64_t right_b,
          int64_t right_t, int lanes, int64_t steps, int64_t o, int64_t i, uint64_t start, const spec *of,
          const float *scale),
         (sums, work, left, left_b, left_t, right, right_b, right_t, lanes, steps, o, i, start, of, scale))
DISPATCH(sp_products,
         (float *out, int64_t out_stride, void *work, const float *const *factors, const int64_t *strides,
          const int64_t *counts, int64_t number, int64_t doubled, int64_t first, int64_t last, const uint32_t *pairs,
          const uint32_t *starts, int64_t k),
         (out, out_stride, work, factors, strides, counts, number, doubled, first, last, pairs, starts, k))
DISPATCH(sp_windows_lanes,
         (void *sums, void *work, int64_t left_work, int64_t right_work, const float *left, int64_t left_b,
          int64_t left_o, const float *right, int64_t right_b, int64_t plane, const int32_t *taps,
          const int32_t *windows, int lanes, int64_t o, int64_t l, int64_t c, int64_t j, uint64_t start, const spec *of,
          const float *scale),
         (sums, work, left_work, right_work, left, left_b, left_o, right, right_b, plane, taps, windows, lanes, o, l, c,
          j, start, of, scale))
DISPATCH(sp_spectral_table, (float *to, const float *w, int64_t k), (to, w, k))
DISPATCH(sp_spectral_outer,
         (float *sums, float *work, int fresh, const float *left, int64_t left_b, int64_t left_t, const float *right,
          int64_t right_b, int64_t right_t, int64_t first, int64_t last, int64_t steps, int64_t o, int64_t i,
          const spec *of, const float *w),
         (sums, work, fresh, left, left_b, left_t, right, right_b, right_t, first, last, steps, o, i, of, w))
DISPATCH(sp_spectral_windows,
         (float *sums, float *work, int fresh, const float *left, int64_t left_b, int64_t l, const float *right,
          int64_t right_b, int64_t plane, const int32_t *taps, const int32_t *windows, int64_t first, int64_t last,
          int64_t o, int64_t begin, int64_t end, int64_t c, int64_t j, const float *scale, const spec *of,
          const float *w),
         (sums, work, fresh, left, left_b, l, right, right_b, plane, taps, windows, first, last, o, begin, end, c, j,
          scale, of, w))
DISPATCH(sp_finish,
         (float *out, int64_t out_stride, float *sums, float *work, const product *products, int64_t number,
          int64_t first, int64_t last, int64_t k, const float *w),
         (out, out_stride, sums, work, products, number, first, last, k, w))
DISPATCH(sp_gather_lanes,
         (float *out, int64_t out_stride, const void *sums, int64_t parts, int lanes, int64_t k, float scale),
         (out, out_stride, sums, parts, lanes, k, scale))
DISPATCH(sp_score,
         (float *out, int64_t out_stride, const float *queries, int64_t query_stride, int64_t count, const void *rows,
          int64_t row_stride, const float *scale, int64_t n, int64_t dim, int type),
         (out, out_stride, queries, query_stride, count, rows, row_stride, scale, n, dim, type))
DISPATCH(sp_gram,
         (float *out, int64_t out_stride, const void *left, int64_t high, const void *right, int64_t wide,
          const float *factor, int64_t n, int type, float *work),
         (out, out_stride, left, high, right, wide, factor, n, type, work))
EXPORT void sp_gram_integer(float *out, int64_t out_stride, const void *left, int64_t high, const void *right,
                            int64_t wide, const float *factor, int64_t n, float *work) {
  if (sp_integers()) gram_integer(out, out_stride, left, high, right, wide, factor, n, work);
}
DISPATCH(sp_keep,
         (float *value, int64_t *row, int64_t *filled, float *threshold, int64_t keep, const float *scores,
          int64_t stride, const float *scale, int64_t queries, int64_t n, int64_t first, float sign, int64_t *bad),
         (value, row, filled, threshold, keep, scores, stride, scale, queries, n, first, sign, bad))
DISPATCH(sp_best,
         (float *value, int64_t *row, int64_t *filled, float *threshold, int64_t keep, const float *queries,
          int64_t query_stride, int64_t count, const void *rows, int64_t row_stride, const float *scale, int64_t n,
          int64_t dim, int type, int64_t first, float sign, int64_t *bad),
         (value, row, filled, threshold, keep, queries, query_stride, count, rows, row_stride, scale, n, dim, type,
          first, sign, bad))

DISPATCH(sp_rotate,
         (float *out, float *work, const float *rows, int64_t row_stride, int64_t n, int64_t k, const float *signs,
          const int64_t *order, int back),
         (out, work, rows, row_stride, n, k, signs, order, back))
DISPATCH(sp_encode,
         (uint8_t * out, int64_t out_stride, double *length, double *along, const float *rows, int64_t row_stride,
          int64_t n, int64_t k, int bits, const float *edges, const float *levels),
         (out, out_stride, length, along, rows, row_stride, n, k, bits, edges, levels))
DISPATCH(sp_unpack,
         (float *out, int64_t out_stride, const uint8_t *codes, int64_t code_stride, int64_t n, int64_t k, int bits,
          const float *table),
         (out, out_stride, codes, code_stride, n, k, bits, table))

/* For each half byte of packed codes, and each of its 16 values, the sum of the products of the numbers that it holds:
 * out[q] of shape (out_stride / 16, 16), numbers beyond k being 0; with AVX2 alone, as four planes of its bytes. Not
 * VARIANT: its bits are the same at every level.
 */
EXPORT void sp_nibbles(float *out, int64_t out_stride, const float *queries, int64_t query_stride, int64_t count,
                       int64_t k, int bits, const float *levels) {
  const int per = 4 / bits, planes = sp_level() == 1;
  float held[4][16]; /* number j of a half byte */
  for (int j = 0; j < per; j++)
    for (int value = 0; value < 16; value++) held[j][value] = levels[value >> bits * j & ((1 << bits) - 1)];
  for (int64_t q = 0; q < count; q++, out += out_stride, queries += query_stride)
    for (int64_t nibble = 0; nibble < out_stride / 16; nibble++) {
      float sum[16] = {0};
      for (int j = 0; j < per; j++) {
        const int64_t column = nibble * per + j;
        const float x = column < k ? queries[column] : 0;
        for (int value = 0; value < 16; value++) sum[value] += x * held[j][value];
      }
      char *to = (char *)(out + 16 * nibble);
      if (planes)
        for (int i = 0; i < 64; i++) to[i % 4 * 16 + i / 4] = ((const char *)sum)[i];
      else
        memcpy(to, sum, sizeof sum);
    }
}

EXPORT int64_t sp_outer_work(void) { return (int64_t)(LEFT_WORK + RIGHT_WORK) * sp_lanes(); } /* in numbers */

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = -1};
PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
