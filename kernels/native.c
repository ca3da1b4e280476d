/* The fast paths of the sparse and the dense sign matrix for CPUs; the modules sparse.py and rademacher.py define both.
 *
 * Nothing here allocates or shares state: threads may call every function at once on different outputs. Loaded with
 * ctypes, which releases the interpreter's lock, so Python's own headers serve the build alone.
 */
#include <Python.h>
#include <stdint.h>
#include <string.h>

#if !defined(__GNUC__)
#error "vector extensions of GCC or Clang are needed; without them the torch backend serves"
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif
#define INLINE static inline __attribute__((always_inline))

#define LANES 16
#define UNROLL _Pragma("GCC unroll 16")
#define TABLE 4096 /* entries of a column table; fits the first-level cache beside the data */

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef floats floats_u __attribute__((aligned(4), may_alias)); /* the same at any address */
typedef words words_u __attribute__((aligned(4), may_alias));

#define NEGATIVE 0x80000000u
#define TAG_SIGN 0x5349474Eu
#define TAG_PERM 0x5045524Du

EXPORT const int sp_version = 1; /* of the functions' signatures: a library of another version is not used */
EXPORT int sp_highest_level = 2; /* tests lower it to reach the code for other processors */

/* The vector code is compiled for each instruction set and chosen when it runs. */
#if defined(__x86_64__) && !defined(__APPLE__)
#define X86 1
#define WIDE __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define MIDDLE __attribute__((target("avx2,fma")))
EXPORT int sp_level(void) { /* 2: AVX-512, 1: AVX2, 0: neither */
  __builtin_cpu_init();
  if (sp_highest_level > 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return 2;
  return sp_highest_level > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
#define DISPATCH_TO(name, wide, other, parameters, arguments)          \
  WIDE static void name##_wide parameters { wide arguments; }          \
  MIDDLE static void name##_middle parameters { other arguments; }     \
  static void name##_plain parameters { other arguments; }             \
  EXPORT void name parameters {                                        \
    const int l = sp_level();                                          \
    (l == 2 ? name##_wide : l ? name##_middle : name##_plain) arguments; \
  }
#else
EXPORT int sp_level(void) { return 0; }
#define DISPATCH_TO(name, wide, other, parameters, arguments) \
  EXPORT void name parameters { other arguments; }
#endif
#define DISPATCH(name, parameters, arguments) DISPATCH_TO(name, name##_body, name##_body, parameters, arguments)

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* Philox4x32-10 (Salmon et al. 2011), key = the two halves of the seed. */
INLINE void philox(uint64_t x01, uint32_t x2, uint32_t x3, uint64_t seed, uint32_t w[4]) {
  uint32_t c0 = (uint32_t)x01, c1 = (uint32_t)(x01 >> 32), c2 = x2, c3 = x3;
  uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
  for (int round = 0; round < 10; round++) {
    uint64_t p0 = (uint64_t)0xD2511F53u * c0, p1 = (uint64_t)0xCD9E8D57u * c2;
    c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
    c1 = (uint32_t)p1;
    c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
    c3 = (uint32_t)p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  w[0] = c0, w[1] = c1, w[2] = c2, w[3] = c3;
}

/* The sparse map: which matrix, and the permutation of the block that was looked at last. */
typedef struct {
  uint64_t seed, block;
  uint32_t k, copy, multiplier, shift;
} map;

INLINE map open_map(uint64_t seed, uint32_t k, uint32_t copy) {
  map m = {seed, UINT64_MAX, k, copy, 0, 0};
  return m;
}

static void permute(map *m, uint64_t block) {
  uint32_t w[4], a, b, rest;
  if (m->block == block) return;
  for (uint32_t attempt = 0;; attempt++) {
    philox(block, m->copy | attempt << 16, TAG_PERM, m->seed, w);
    m->multiplier = (uint32_t)((w[0] | (uint64_t)w[1] << 32) % m->k);
    for (a = m->k, b = m->multiplier; b; a = b, b = rest) rest = a % b;
    if (a == 1) break;
  }
  m->shift = (uint32_t)((w[2] | (uint64_t)w[3] << 32) % m->k);
  m->block = block;
}

/* Columns of count coordinates within one block, sixteen at a time: the next sixteen are one modular addition away. */
INLINE void columns(const map *m, uint32_t *table, uint64_t position, int64_t count) {
  const uint32_t k = m->k;
  const uint64_t a = m->multiplier;
  uint32_t first = (uint32_t)((a * position + m->shift) % k), lane[LANES];
  const uint32_t step = (uint32_t)(a * LANES % k);
  for (int l = 0; l < LANES; l++) {
    lane[l] = first;
    first += (uint32_t)a; /* k < 2^31: no overflow */
    if (first >= k) first -= k;
  }
  words current, less, wraps;
  memcpy(&current, lane, sizeof current);
  int64_t p = 0;
  for (; p + LANES <= count; p += LANES) {
    *(words_u *)(table + p) = current;
    current += step;
    less = current - k;
    wraps = (words)(current >= k);
    current = (less & wraps) | (current & ~wraps);
  }
  memcpy(table + p, &current, (size_t)(count - p) * sizeof *table);
}

/* Sets bit 31 of the entries whose sign is negative. */
INLINE void signs(const map *m, uint32_t *table, uint64_t start, int64_t count) {
  static const words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const uint64_t end = start + (uint64_t)count;
  for (uint64_t group = start / 128; group * 128 < end; group++) {
    uint32_t w[4];
    philox(group, m->copy, TAG_SIGN, m->seed, w);
    for (int h = 0; h < 128 / LANES; h++) {
      const uint64_t i = group * 128 + (uint64_t)(h * LANES);
      const uint32_t bits = w[h / 2] >> (h % 2 * LANES);
      if (i >= start && i + LANES <= end) {
        *(words_u *)(table + (i - start)) |= ((words){0} + bits) >> lane << 31;
      } else {
        for (uint32_t l = 0; l < LANES; l++)
          if (i + l >= start && i + l < end) table[i + l - start] |= bits >> l << 31;
      }
    }
  }
}

/* Table of the coordinates [start, start + count): column, and NEGATIVE where the sign is -1. */
INLINE void fill(map *m, uint32_t *table, uint64_t start, int64_t count) {
  for (int64_t done = 0, run; done < count; done += run) {
    const uint64_t i = start + (uint64_t)done, position = i % m->k;
    run = count - done;
    if ((uint64_t)run > m->k - position) run = (int64_t)(m->k - position);
    permute(m, i / m->k);
    columns(m, table + done, position, run);
  }
  signs(m, table, start, count);
}

INLINE void sp_table_body(uint32_t *table, uint64_t start, int64_t count, uint64_t seed, uint32_t k, uint32_t copy) {
  map m = open_map(seed, k, copy);
  fill(&m, table, start, count);
}
DISPATCH(sp_table, (uint32_t * table, uint64_t start, int64_t count, uint64_t seed, uint32_t k, uint32_t copy),
         (table, start, count, seed, k, copy))

/* out[count][columns] = the signs of a dense matrix, 1 or -1. */
INLINE void sp_signs_body(float *out, uint64_t start, int64_t count, int64_t columns, uint64_t seed, uint32_t tag) {
  static const words lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const words one = (words){0} + 0x3F800000u; /* the bits of 1.0f */
  for (int64_t r = 0; r < count; r++, out += columns) {
    for (int64_t c = 0; c < columns; c += 128) {
      uint32_t w[4];
      words expanded[128 / LANES];
      philox(start + (uint64_t)r, (uint32_t)(c / 128), tag, seed, w);
      for (int h = 0; h < 128 / LANES; h++)
        expanded[h] = (((words){0} + (w[h / 2] >> (h % 2 * LANES))) >> lane << 31) | one;
      memcpy(out + c, expanded, (size_t)(smaller(columns - c, 128)) * sizeof *out);
    }
  }
}
DISPATCH(sp_signs, (float *out, uint64_t start, int64_t count, int64_t columns, uint64_t seed, uint32_t tag),
         (out, start, count, columns, seed, tag))

/* y[column] += sign scale g for coordinates of one block. As no two of them meet, loads may pass stores. */
INLINE void scatter(float *y, const float *g, const uint32_t *table, int64_t count, float scale) {
  int64_t p = 0;
  for (; p + LANES <= count; p += LANES) {
    float value[LANES];
    const words entry = *(const words_u *)(table + p);
    *(words_u *)value = (words)(*(const floats_u *)(g + p) * scale) ^ (entry & NEGATIVE);
    for (int h = 0; h < LANES; h += 8) {
      float sum[8];
      UNROLL for (int x = 0; x < 8; x++) sum[x] = y[table[p + h + x] & ~NEGATIVE] + value[h + x];
      UNROLL for (int x = 0; x < 8; x++) y[table[p + h + x] & ~NEGATIVE] = sum[x];
    }
  }
  for (; p < count; p++) y[table[p] & ~NEGATIVE] += table[p] & NEGATIVE ? -(g[p] * scale) : g[p] * scale;
}

/* out[b] += scale R[:, start : start + count] rows[b] for all b, with one of the copies that m stands for. */
INLINE void add_rows(float *out, int64_t out_stride, const float *rows, int64_t row_stride, int64_t batch, int64_t count,
                     uint64_t start, map *m, float scale) {
  uint32_t table[TABLE];
  for (int64_t done = 0, run; done < count; done += run) {
    const uint64_t i = start + (uint64_t)done, rest = m->k - i % m->k;
    run = smaller(count - done, TABLE);
    if ((uint64_t)run > rest) run = (int64_t)rest;
    fill(m, table, i, run);
    for (int64_t b = 0; b < batch; b++)
      scatter(out + b * out_stride, rows + b * row_stride + done, table, run, scale);
  }
}

/* The same with all copies, one row after the other: for few rows and for short ones. */
INLINE void sp_add_rows_body(float *out, int64_t out_stride, const float *rows, int64_t row_stride, int64_t batch,
                             int64_t count, uint64_t start, uint64_t seed, uint32_t k, uint32_t nnz, float scale) {
  for (uint32_t copy = 0; copy < nnz; copy++) {
    map m = open_map(seed, k, copy);
    add_rows(out, out_stride, rows, row_stride, batch, count, start, &m, scale);
  }
}
DISPATCH(sp_add_rows,
         (float *out, int64_t out_stride, const float *rows, int64_t row_stride, int64_t batch, int64_t count,
          uint64_t start, uint64_t seed, uint32_t k, uint32_t nnz, float scale),
         (out, out_stride, rows, row_stride, batch, count, start, seed, k, nnz, scale))

/* out[example[r]] += scale R[:, start[r] : start[r] + count] rows[r] for the rows whose example is in [first, last). */
INLINE void sp_add_at_body(float *out, int64_t out_stride, const float *rows, int64_t row_stride, int64_t number,
                           int64_t count, const int64_t *example, const int64_t *start, int64_t first, int64_t last,
                           uint64_t seed, uint32_t k, uint32_t nnz, float scale) {
  for (uint32_t copy = 0; copy < nnz; copy++) {
    map m = open_map(seed, k, copy);
    for (int64_t r = 0; r < number; r++)
      if (example[r] >= first && example[r] < last)
        add_rows(out + example[r] * out_stride, 0, rows + r * row_stride, 0, 1, count, (uint64_t)start[r], &m, scale);
  }
}
DISPATCH(sp_add_at,
         (float *out, int64_t out_stride, const float *rows, int64_t row_stride, int64_t number, int64_t count,
          const int64_t *example, const int64_t *start, int64_t first, int64_t last, uint64_t seed, uint32_t k,
          uint32_t nnz, float scale),
         (out, out_stride, rows, row_stride, number, count, example, start, first, last, seed, k, nnz, scale))

#include "native_lanes.c"

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = -1};
PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
