/* The fast paths of the sparse and the dense sign matrix for CPUs; the modules sparse.py and rademacher.py define both.
 *
 * Up to sixteen examples are interleaved, one to a vector lane, so that adding a coordinate to its column is one load,
 * xor, add and store of a vector for all of them. Nothing here allocates, and every function is free of shared state:
 * threads may call any of them at once on different outputs. Loaded with ctypes, which releases the interpreter's lock.
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
      memcpy(out + c, expanded, (size_t)(columns - c < 128 ? columns - c : 128) * sizeof *out);
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

/* out[b] += scale R[:, start : start + count] rows[b], one row after the other: for few rows and for short ones. */
INLINE void sp_add_rows_body(float *out, int64_t out_stride, const float *rows, int64_t row_stride, int64_t batch,
                             int64_t count, uint64_t start, uint64_t seed, uint32_t k, uint32_t nnz, float scale) {
  uint32_t table[TABLE];
  for (uint32_t copy = 0; copy < nnz; copy++) {
    map m = open_map(seed, k, copy);
    for (int64_t done = 0, run; done < count; done += run) {
      const uint64_t i = start + (uint64_t)done;
      run = count - done < TABLE ? count - done : TABLE;
      if ((uint64_t)run > k - i % k) run = (int64_t)(k - i % k);
      fill(&m, table, i, run);
      for (int64_t b = 0; b < batch; b++)
        scatter(out + b * out_stride, rows + b * row_stride + done, table, run, scale);
    }
  }
}
DISPATCH(sp_add_rows,
         (float *out, int64_t out_stride, const float *rows, int64_t row_stride, int64_t batch, int64_t count,
          uint64_t start, uint64_t seed, uint32_t k, uint32_t nnz, float scale),
         (out, out_stride, rows, row_stride, batch, count, start, seed, k, nnz, scale))

/* Transposes sixteen vectors in place: four rounds of exchanging halves of pairs. */
#if defined(__clang__) || __GNUC__ >= 12
#define EXCHANGE(s, ...)                                                             \
  UNROLL for (int r = 0; r < LANES; r++)                                             \
    if (!(r & s)) {                                                                  \
      const floats a = v[r], b = v[r + s];                                           \
      v[r] = __builtin_shufflevector(a, b, __VA_ARGS__);                             \
      v[r + s] = EXCHANGE_HIGH##s;                                                   \
    }
#define EXCHANGE_HIGH1 __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)
#define EXCHANGE_HIGH2 __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define EXCHANGE_HIGH4 __builtin_shufflevector(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
#define EXCHANGE_HIGH8 __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
INLINE void transpose(floats v[LANES]) {
  EXCHANGE(1, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30)
  EXCHANGE(2, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29)
  EXCHANGE(4, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27)
  EXCHANGE(8, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23)
}
#else
INLINE void transpose(floats v[LANES]) {
  for (int r = 0; r < LANES; r++)
    for (int c = 0; c < r; c++) {
      const float kept = v[r][c];
      v[r][c] = v[c][r];
      v[c][r] = kept;
    }
}
#endif

/* Element e of example l goes to lane l of to[(e / group) * stride + e % group]; lanes without an example get zero. */
INLINE void interleave(floats *to, int64_t group, int64_t stride, const float *from, int64_t lane_stride, int lanes,
                       int64_t count) {
  for (int64_t e = 0; e < count; e += LANES) {
    const int64_t width = count - e < LANES ? count - e : LANES;
    floats v[LANES];
    if (width == LANES && lanes == LANES) {
      UNROLL for (int l = 0; l < LANES; l++) v[l] = *(const floats_u *)(from + l * lane_stride + e);
    } else {
      float edge[LANES][LANES] = {{0}};
      for (int l = 0; l < lanes; l++) memcpy(edge[l], from + l * lane_stride + e, (size_t)width * sizeof(float));
      UNROLL for (int l = 0; l < LANES; l++) v[l] = *(const floats_u *)edge[l];
    }
    transpose(v);
    if (width == LANES) {
      UNROLL for (int x = 0; x < LANES; x++) to[(e + x) / group * stride + (e + x) % group] = v[x];
    } else {
      floats edge[LANES];
      UNROLL for (int x = 0; x < LANES; x++) edge[x] = v[x];
      for (int64_t x = 0; x < width; x++) to[(e + x) / group * stride + (e + x) % group] = edge[x];
    }
  }
}

INLINE void add_lanes(floats *y, const floats *value, uint32_t entry) {
  words bits = (words)*value;
  bits ^= (words){0} + (entry & NEGATIVE);
  y[entry & ~NEGATIVE] += (floats)bits;
}

/* sums[k] = R[:, start : start + count] of up to sixteen rows, interleaved. */
INLINE void sp_add_lanes_body(floats *sums, const float *rows, int64_t row_stride, int lanes, int64_t count,
                              uint64_t start, uint64_t seed, uint32_t k, uint32_t nnz) {
  enum { PIECE = 512 };
  floats piece[PIECE];
  uint32_t table[PIECE];
  memset(sums, 0, (size_t)k * sizeof *sums);
  for (int64_t done = 0; done < count; done += PIECE) {
    const int64_t width = count - done < PIECE ? count - done : PIECE;
    interleave(piece, 1, 1, rows + done, row_stride, lanes, width);
    for (uint32_t copy = 0; copy < nnz; copy++) {
      map m = open_map(seed, k, copy);
      fill(&m, table, start + (uint64_t)done, width);
      for (int64_t p = 0; p < width; p++) add_lanes(sums, &piece[p], table[p]);
    }
  }
}
DISPATCH(sp_add_lanes,
         (floats * sums, const float *rows, int64_t row_stride, int lanes, int64_t count, uint64_t start, uint64_t seed,
          uint32_t k, uint32_t nnz),
         (sums, rows, row_stride, lanes, count, start, seed, k, nnz))

/* out[l][c] += scale (the sum over parts of sums[part][c]) for the examples l < lanes; parts in their order. */
INLINE void sp_gather_lanes_body(float *out, int64_t out_stride, const floats *sums, int64_t parts, int lanes,
                                 int64_t k, float scale) {
  for (int64_t c = 0; c < k; c += LANES) {
    const int64_t width = k - c < LANES ? k - c : LANES;
    floats v[LANES];
    for (int64_t x = 0; x < LANES; x++) {
      v[x] = (floats){0};
      for (int64_t p = 0; x < width && p < parts; p++) v[x] += sums[p * k + c + x];
    }
    transpose(v);
    for (int l = 0; l < lanes; l++) {
      float *o = out + l * out_stride + c;
      if (width == LANES)
        *(floats_u *)o += v[l] * scale;
      else
        for (int64_t x = 0; x < width; x++) o[x] += v[l][x] * scale;
    }
  }
}
DISPATCH(sp_gather_lanes,
         (float *out, int64_t out_stride, const floats *sums, int64_t parts, int lanes, int64_t k, float scale),
         (out, out_stride, sums, parts, lanes, k, scale))

/* One register tile of sum_t left_t (x) right_t: size x size coordinates, each for sixteen examples, then to columns. */
INLINE void outer_tile(floats *sums, const floats *left, const floats *right, int64_t steps, const uint32_t *table,
                       int64_t row, int64_t copy_stride, uint32_t nnz, int high, int wide, const int size) {
  floats g[4][4];
  UNROLL for (int m = 0; m < size; m++)
    UNROLL for (int n = 0; n < size; n++) g[m][n] = left[m] * right[n];
  for (int64_t t = 1; t < steps; t++) {
    left += size, right += size;
    UNROLL for (int m = 0; m < size; m++)
      UNROLL for (int n = 0; n < size; n++) g[m][n] += left[m] * right[n];
  }
  if (high == size && wide == size) {
    for (uint32_t copy = 0; copy < nnz; copy++, table += copy_stride)
      UNROLL for (int m = 0; m < size; m++)
        UNROLL for (int n = 0; n < size; n++) add_lanes(sums, &g[m][n], table[m * row + n]);
    return;
  }
  floats edge[4][4]; /* a copy, so that the tile above stays in registers */
  UNROLL for (int m = 0; m < size; m++)
    UNROLL for (int n = 0; n < size; n++) edge[m][n] = g[m][n];
  for (uint32_t copy = 0; copy < nnz; copy++, table += copy_stride)
    for (int m = 0; m < high; m++)
      for (int n = 0; n < wide; n++) add_lanes(sums, &edge[m][n], table[m * row + n]);
}

enum {
  STEPS = 32,          /* of t at once */
  LEFT_WORK = 8192,    /* vectors of work space: a strip of left, interleaved */
  RIGHT_WORK = 4096,   /* and of right */
  MAP_COPIES = 64,     /* the largest nnz */
  ENTRIES = 4 * TABLE, /* 4 rows of at most RIGHT_WORK columns */
};
EXPORT const int64_t sp_outer_work = LEFT_WORK + RIGHT_WORK, sp_outer_copies = MAP_COPIES;

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* sums[k] = R vec(sum_t left[b][t] (x) right[b][t]) for up to sixteen examples b and o x i coordinates from start on.
 * Strips of left and chunks of right are interleaved into panels of `size` coordinates by steps; every panel of left
 * meets every panel of right while that stays in the second-level cache. No gradient is written to memory. */
INLINE void outer_body(floats *sums, floats *work, const float *left, int64_t left_b, int64_t left_t, const float *right,
                       int64_t right_b, int64_t right_t, int lanes, int64_t steps, int64_t o, int64_t i, uint64_t start,
                       uint64_t seed, uint32_t k, uint32_t nnz, const int size) {
  uint32_t table[ENTRIES];
  map maps[MAP_COPIES];
  floats *const panels = work, *const chunk = work + LEFT_WORK;
  const int64_t depth = smaller(steps, STEPS), strip = LEFT_WORK / depth / 4 * 4;
  const int64_t across = smaller(i, smaller(RIGHT_WORK / depth, TABLE / nnz) / 4 * 4);
  const int64_t down = across * nnz * 8 > TABLE ? 4 : TABLE / (across * nnz) / 4 * 4; /* rows of one table */
  for (uint32_t copy = 0; copy < nnz; copy++) maps[copy] = open_map(seed, k, copy);
  memset(sums, 0, (size_t)k * sizeof *sums);
  for (int64_t o0 = 0; o0 < o; o0 += strip) {
    const int64_t height = smaller(strip, o - o0);
    for (int64_t t0 = 0; t0 < steps; t0 += depth) {
      const int64_t ts = smaller(depth, steps - t0);
      for (int64_t t = 0; t < ts; t++)
        interleave(panels + t * size, size, ts * size, left + (t0 + t) * left_t + o0, left_b, lanes, height);
      for (int64_t i0 = 0; i0 < i; i0 += across) {
        const int64_t width = smaller(across, i - i0);
        for (int64_t t = 0; t < ts; t++)
          interleave(chunk + t * size, size, ts * size, right + (t0 + t) * right_t + i0, right_b, lanes, width);
        for (int64_t a = 0; a < height; a += down) {
          const int64_t rows = smaller(down, height - a);
          const uint64_t first = start + (uint64_t)((o0 + a) * i + i0);
          for (uint32_t copy = 0; copy < nnz; copy++) {
            uint32_t *entries = table + copy * down * across;
            if (width == i)
              fill(&maps[copy], entries, first, rows * i);
            else
              for (int64_t r = 0; r < rows; r++)
                fill(&maps[copy], entries + r * width, first + (uint64_t)(r * i), width);
          }
          for (int64_t r = 0; r < rows; r += size)
            for (int64_t c = 0; c < width; c += size)
              outer_tile(sums, panels + (a + r) * ts, chunk + c * ts, ts, table + r * width + c, width, down * across,
                         nnz, (int)smaller(size, rows - r), (int)smaller(size, width - c), size);
        }
      }
    }
  }
}
#define OUTER                                                                                                        \
  (floats * sums, floats * work, const float *left, int64_t left_b, int64_t left_t, const float *right, int64_t right_b, \
   int64_t right_t, int lanes, int64_t steps, int64_t o, int64_t i, uint64_t start, uint64_t seed, uint32_t k,           \
   uint32_t nnz)
#define OUTER_ARGUMENTS \
  sums, work, left, left_b, left_t, right, right_b, right_t, lanes, steps, o, i, start, seed, k, nnz
/* Sixteen accumulators of sixteen lanes fit the registers of AVX-512 alone. */
INLINE void outer_large OUTER { outer_body(OUTER_ARGUMENTS, 4); }
INLINE void outer_small OUTER { outer_body(OUTER_ARGUMENTS, 2); }
DISPATCH_TO(sp_outer_lanes, outer_large, outer_small, OUTER, (OUTER_ARGUMENTS))

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, .m_name = "_native", .m_size = -1};
PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&module); }
