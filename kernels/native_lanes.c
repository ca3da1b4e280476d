/* The vector code; a part of native.c, which includes it once for each number of LANES.
 *
 * LANES examples are interleaved, one to a vector lane: a coordinate is then added to its column by one load, xor, add
 * and store of a vector for all of them. The sums of a call have the shape (k, LANES) while they grow, and
 * sp_gather_lanes adds them to the examples' own rows.
 */

#define floats VARIANT(floats)
#define words VARIANT(words)
#define floats_u VARIANT(floats_u)
#define words_u VARIANT(words_u)
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef floats floats_u __attribute__((aligned(4), may_alias)); /* the same at any address */
typedef words words_u __attribute__((aligned(4), may_alias));

static const uint32_t VARIANT(iota)[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* Columns of count coordinates within one block, LANES at a time: the next ones are one modular addition away. */
static void VARIANT(columns)(const map *m, uint32_t *table, uint64_t position, int64_t count) {
  const uint32_t k = m->k;
  const uint64_t a = m->multiplier;
  const uint32_t step = (uint32_t)(a * LANES % k);
  uint32_t first = (uint32_t)((a * position + m->shift) % k), lane[LANES];
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

/* Bits h LANES to (h + 1) LANES of 128 as bit 31 of LANES words; the other bits are zero. */
INLINE words VARIANT(top_bits)(const uint32_t w[4], int h) {
  const words bits = (words){0} + (w[h * LANES / 32] >> (h * LANES % 32));
  return bits >> *(const words_u *)VARIANT(iota) << 31;
}

/* Sets bit 31 of the entries whose sign is negative. */
static void VARIANT(signs)(const map *m, uint32_t *table, uint64_t start, int64_t count) {
  const uint64_t end = start + (uint64_t)count;
  for (uint64_t group = start / 128; group * 128 < end; group++) {
    uint32_t w[4];
    philox(group, m->copy, TAG_SIGN, m->of->seed, w);
    for (int h = 0; h < 128 / LANES; h++) {
      const uint64_t i = group * 128 + (uint64_t)(h * LANES);
      if (i >= start && i + LANES <= end) {
        *(words_u *)(table + (i - start)) |= VARIANT(top_bits)(w, h);
      } else {
        const uint32_t bits = w[h * LANES / 32] >> (h * LANES % 32);
        for (uint32_t l = 0; l < LANES; l++)
          if (i + l >= start && i + l < end) table[i + l - start] |= bits >> l << 31;
      }
    }
  }
}

/* The table of a tensor map, row by row. */
static void VARIANT(fill_tensor)(const spec *of, uint32_t *table, uint64_t start, int64_t count) {
  for (int64_t done = 0, run; done < count; done += run) {
    const uint64_t at = start + (uint64_t)done - of->base, c = at % of->width;
    const uint32_t row = of->left[at / of->width], column = row & ~NEGATIVE, sign = row & NEGATIVE, *right = of->right + c;
    run = smaller(count - done, (int64_t)(of->width - c));
    for (int64_t p = 0; p < run; p++) {
      const uint32_t sum = (right[p] & ~NEGATIVE) + column, less = sum - of->k;
      table[done + p] = (sum < of->k ? sum : less) | ((right[p] & NEGATIVE) ^ sign);
    }
  }
}

/* Table of the coordinates [start, start + count): column, and NEGATIVE where the sign is -1. */
static void VARIANT(fill)(map *m, uint32_t *table, uint64_t start, int64_t count) {
  if (m->of->left) {
    VARIANT(fill_tensor)(m->of, table, start, count);
    return;
  }
  for (int64_t done = 0, run; done < count; done += run) {
    const uint64_t i = start + (uint64_t)done, position = i % m->k;
    run = smaller(count - done, (int64_t)(m->k - position));
    permute(m, i / m->k);
    VARIANT(columns)(m, table + done, position, run);
  }
  VARIANT(signs)(m, table, start, count);
}

static void VARIANT(sp_table)(uint32_t *table, uint64_t start, int64_t count, const spec *of, uint32_t copy) {
  map m = open_map(of, copy);
  VARIANT(fill)(&m, table, start, count);
}

/* out[count][columns] = the signs of a dense matrix, 1 or -1. */
static void VARIANT(sp_signs)(float *out, uint64_t start, int64_t count, int64_t columns, uint64_t seed, uint32_t tag) {
  for (int64_t r = 0; r < count; r++, out += columns) {
    for (int64_t c = 0; c < columns; c += 128) {
      uint32_t w[4];
      words expanded[128 / LANES];
      philox(start + (uint64_t)r, (uint32_t)(c / 128), tag, seed, w);
      for (int h = 0; h < 128 / LANES; h++) expanded[h] = VARIANT(top_bits)(w, h) | 0x3F800000u; /* bits of 1.0f */
      memcpy(out + c, expanded, (size_t)smaller(columns - c, 128) * sizeof *out);
    }
  }
}

/* y[column] += sign scale g for coordinates with columns of their own. As no two of them meet, loads may pass stores. */
INLINE void VARIANT(scatter)(float *y, const float *g, const uint32_t *table, int64_t count, float scale) {
  enum { RUN = 16 };
  int64_t p = 0;
  for (; p + RUN <= count; p += RUN) {
    float value[RUN];
    UNROLL for (int h = 0; h < RUN; h += LANES)
      *(words_u *)(value + h) =
          (words)(*(const floats_u *)(g + p + h) * scale) ^ (*(const words_u *)(table + p + h) & NEGATIVE);
    for (int h = 0; h < RUN; h += 8) {
      float sum[8];
      UNROLL for (int x = 0; x < 8; x++) sum[x] = y[table[p + h + x] & ~NEGATIVE] + value[h + x];
      UNROLL for (int x = 0; x < 8; x++) y[table[p + h + x] & ~NEGATIVE] = sum[x];
    }
  }
  for (; p < count; p++) y[table[p] & ~NEGATIVE] += table[p] & NEGATIVE ? -(g[p] * scale) : g[p] * scale;
}

/* out[b] += scale R[:, start : start + count] rows[b] for all b, with one of the copies that m stands for. */
static void VARIANT(add_rows)(float *out, int64_t out_stride, const float *rows, int64_t row_stride, int64_t batch,
                              int64_t count, uint64_t start, map *m, float scale) {
  uint32_t table[TABLE];
  for (int64_t done = 0, run; done < count; done += run) {
    const uint64_t i = start + (uint64_t)done;
    run = smaller(smaller(count - done, TABLE), apart(m, i));
    VARIANT(fill)(m, table, i, run);
    for (int64_t b = 0; b < batch; b++)
      VARIANT(scatter)(out + b * out_stride, rows + b * row_stride + done, table, run, scale);
  }
}

/* The same with all copies, one row after the other: for few rows and for short ones. */
static void VARIANT(sp_add_rows)(float *out, int64_t out_stride, const float *rows, int64_t row_stride, int64_t batch,
                                 int64_t count, uint64_t start, const spec *of, float scale) {
  for (uint32_t copy = 0; copy < of->nnz; copy++) {
    map m = open_map(of, copy);
    VARIANT(add_rows)(out, out_stride, rows, row_stride, batch, count, start, &m, scale);
  }
}

/* out[example[r]] += scale R[:, start[r] : start[r] + count] rows[r] for the rows whose example is in [first, last). */
static void VARIANT(sp_add_at)(float *out, int64_t out_stride, const float *rows, int64_t row_stride, int64_t number,
                               int64_t count, const int64_t *example, const int64_t *start, int64_t first,
                               int64_t last, const spec *of, float scale) {
  for (uint32_t copy = 0; copy < of->nnz; copy++) {
    map m = open_map(of, copy);
    for (int64_t r = 0; r < number; r++)
      if (example[r] >= first && example[r] < last)
        VARIANT(add_rows)(out + example[r] * out_stride, 0, rows + r * row_stride, 0, 1, count, (uint64_t)start[r], &m,
                          scale);
  }
}

/* Transposes LANES vectors in place: rounds of exchanging parts of pairs that are `distance` apart. */
#define EXCHANGE(distance, low, high)                            \
  UNROLL for (int r = 0; r < LANES; r++) if (!(r & (distance))) { \
    const floats a = v[r], b = v[r + (distance)];                \
    v[r] = SHUFFLE low;                                          \
    v[r + (distance)] = SHUFFLE high;                            \
  }
#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(...) __builtin_shuffle(a, b, (words){__VA_ARGS__})
#endif
INLINE void VARIANT(transpose)(floats v[LANES]) {
#if LANES == 4
  EXCHANGE(1, (0, 4, 2, 6), (1, 5, 3, 7))
  EXCHANGE(2, (0, 1, 4, 5), (2, 3, 6, 7))
#elif LANES == 8
  EXCHANGE(1, (0, 8, 2, 10, 4, 12, 6, 14), (1, 9, 3, 11, 5, 13, 7, 15))
  EXCHANGE(2, (0, 1, 8, 9, 4, 5, 12, 13), (2, 3, 10, 11, 6, 7, 14, 15))
  EXCHANGE(4, (0, 1, 2, 3, 8, 9, 10, 11), (4, 5, 6, 7, 12, 13, 14, 15))
#else
  EXCHANGE(1, (0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
           (1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
  EXCHANGE(2, (0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
           (2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
  EXCHANGE(4, (0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
           (4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
  EXCHANGE(8, (0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
           (8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
#endif
}
#undef EXCHANGE
#undef SHUFFLE

/* Element e of example l goes to lane l of to[(e / group) * stride + e % group]; lanes without an example get zero. */
INLINE void VARIANT(interleave)(floats *to, int64_t group, int64_t stride, const float *from, int64_t lane_stride,
                                int lanes, int64_t count) {
  for (int64_t e = 0; e < count; e += LANES) {
    const int64_t width = smaller(count - e, LANES);
    floats v[LANES];
    if (width == LANES && lanes == LANES) {
      UNROLL for (int l = 0; l < LANES; l++) v[l] = *(const floats_u *)(from + l * lane_stride + e);
    } else {
      float edge[LANES][LANES] = {{0}};
      for (int l = 0; l < lanes; l++) memcpy(edge[l], from + l * lane_stride + e, (size_t)width * sizeof(float));
      UNROLL for (int l = 0; l < LANES; l++) v[l] = *(const floats_u *)edge[l];
    }
    VARIANT(transpose)(v);
    if (width == LANES) {
      UNROLL for (int x = 0; x < LANES; x++) to[(e + x) / group * stride + (e + x) % group] = v[x];
    } else {
      floats edge[LANES];
      UNROLL for (int x = 0; x < LANES; x++) edge[x] = v[x];
      for (int64_t x = 0; x < width; x++) to[(e + x) / group * stride + (e + x) % group] = edge[x];
    }
  }
}

INLINE void VARIANT(add_vector)(floats *y, const floats *value, uint32_t entry) {
  words bits = (words)*value;
  bits ^= (words){0} + (entry & NEGATIVE);
  y[entry & ~NEGATIVE] += (floats)bits;
}

/* Adds LANES coordinates of LANES rows, which begin at from + at[l]: the signs while the rows lie as they were given, one
 * operation a row, and then the transposition, so that the interleaved numbers never leave the registers. */
INLINE void VARIANT(add_square)(floats *sums, const float *from, const int64_t at[LANES], const uint32_t *table) {
  const words negative = *(const words_u *)table & NEGATIVE;
  floats v[LANES];
  UNROLL for (int l = 0; l < LANES; l++) v[l] = (floats)(*(const words_u *)(from + at[l]) ^ negative);
  VARIANT(transpose)(v);
  UNROLL for (int x = 0; x < LANES; x++) sums[table[x] & ~NEGATIVE] += v[x];
}

/* Adds whole squares of a piece and returns how many coordinates these are. The piece that follows is asked for on the
 * way: the memory of many rows that are far apart is not foreseen by the processor. */
INLINE int64_t VARIANT(add_squares)(floats *sums, const float *from, const int64_t at[LANES], const uint32_t *table,
                                    int64_t width, int64_t next) {
  enum { LINE = 16 }; /* numbers that come from memory at once */
  int64_t p = 0;
  for (; p + LANES <= width; p += LANES) {
    if (next && p % LINE == 0)
      UNROLL for (int l = 0; l < LANES; l++) __builtin_prefetch(from + at[l] + p + next, 0, 2);
    VARIANT(add_square)(sums, from + p, at, table + p);
  }
  return p;
}

/* sums[k] = R[:, start : start + count] of up to LANES rows, interleaved. Lanes without an example sum what others do. */
static void VARIANT(sp_add_lanes)(void *out, const float *rows, int64_t row_stride, int lanes, int64_t count,
                                  uint64_t start, const spec *of) {
  floats *sums = out, piece[PIECE];
  uint32_t table[PIECE];
  int64_t at[LANES];
  map first = open_map(of, 0);
  const uint32_t k = of->k, nnz = of->nnz;
  for (int l = 0; l < LANES; l++) at[l] = l < lanes ? l * row_stride : 0;
  memset(sums, 0, (size_t)k * sizeof *sums);
  for (int64_t done = 0; done < count; done += PIECE) {
    const int64_t width = smaller(count - done, PIECE), next = count - done >= 2 * PIECE ? PIECE : 0;
    int64_t p = 0; /* of the piece, that are added */
    if (nnz == 1) {
      VARIANT(fill)(&first, table, start + (uint64_t)done, width);
      p = VARIANT(add_squares)(sums, rows + done, at, table, width, next);
    }
    if (p == width) continue;
    VARIANT(interleave)(piece, 1, 1, rows + done + p, row_stride, lanes, width - p);
    for (uint32_t copy = 0; copy < nnz; copy++) {
      map m = open_map(of, copy);
      VARIANT(fill)(&m, table, start + (uint64_t)(done + p), width - p);
      for (int64_t x = 0; x < width - p; x++) VARIANT(add_vector)(sums, &piece[x], table[x]);
    }
  }
}

/* One register tile of sum_t left_t (x) right_t, ROWS x ACROSS coordinates for LANES examples, added to its columns;
 * scale, if not null, points at the entry of its first coordinate, and rows of it are scale_row apart. */
INLINE void VARIANT(outer_tile)(floats *sums, const floats *left, const floats *right, int64_t steps,
                                const uint32_t *table, int64_t row, int64_t copy_stride, uint32_t nnz, int64_t high,
                                int64_t wide, const float *scale, int64_t scale_row) {
  floats g[ROWS][ACROSS];
  UNROLL for (int m = 0; m < ROWS; m++)
    UNROLL for (int n = 0; n < ACROSS; n++) g[m][n] = left[m] * right[n];
  for (int64_t t = 1; t < steps; t++) {
    left += ROWS, right += ACROSS;
    UNROLL for (int m = 0; m < ROWS; m++)
      UNROLL for (int n = 0; n < ACROSS; n++) g[m][n] += left[m] * right[n];
  }
  if (high >= ROWS && wide >= ACROSS) {
    if (scale)
      UNROLL for (int m = 0; m < ROWS; m++)
        UNROLL for (int n = 0; n < ACROSS; n++) g[m][n] *= scale[m * scale_row + n];
    for (uint32_t copy = 0; copy < nnz; copy++, table += copy_stride)
      UNROLL for (int m = 0; m < ROWS; m++)
        UNROLL for (int n = 0; n < ACROSS; n++) VARIANT(add_vector)(sums, &g[m][n], table[m * row + n]);
    return;
  }
  floats edge[ROWS][ACROSS]; /* a copy, so that the tile above stays in registers */
  UNROLL for (int m = 0; m < ROWS; m++)
    UNROLL for (int n = 0; n < ACROSS; n++) edge[m][n] = g[m][n];
  if (scale)
    for (int m = 0; m < smaller(high, ROWS); m++)
      for (int n = 0; n < smaller(wide, ACROSS); n++) edge[m][n] *= scale[m * scale_row + n];
  for (uint32_t copy = 0; copy < nnz; copy++, table += copy_stride)
    for (int m = 0; m < smaller(high, ROWS); m++)
      for (int n = 0; n < smaller(wide, ACROSS); n++) VARIANT(add_vector)(sums, &edge[m][n], table[m * row + n]);
}

/* sums[k] = R vec(sum_t left[b][t] (x) right[b][t]) for up to LANES examples b and o x i coordinates from start on,
 * each coordinate times its entry of scale, unless that is null.
 * Strips of left and chunks of right are interleaved into panels, ROWS or ACROSS coordinates by steps; every panel of
 * left meets every panel of right while that stays in the second-level cache. No gradient is written to memory. */
static void VARIANT(sp_outer_lanes)(void *out, void *work, const float *left, int64_t left_b, int64_t left_t,
                                    const float *right, int64_t right_b, int64_t right_t, int lanes, int64_t steps,
                                    int64_t o, int64_t i, uint64_t start, const spec *of, const float *scale) {
  const uint32_t k = of->k, nnz = of->nnz;
  uint32_t table[ROWS * TABLE];
  map maps[OUTER_COPIES];
  floats *const sums = out, *const panels = work, *const chunk = panels + LEFT_WORK;
  const int64_t depth = smaller(steps, STEPS), strip = LEFT_WORK / depth / ROWS * ROWS;
  const int64_t across = smaller(i, smaller(RIGHT_WORK / depth, TABLE / nnz) / ACROSS * ACROSS);
  const int64_t entries = across * nnz, down = entries * 2 * ROWS > TABLE ? ROWS : TABLE / entries / ROWS * ROWS;
  for (uint32_t copy = 0; copy < nnz; copy++) maps[copy] = open_map(of, copy);
  memset(sums, 0, (size_t)k * sizeof *sums);
  for (int64_t o0 = 0; o0 < o; o0 += strip) {
    const int64_t height = smaller(strip, o - o0);
    for (int64_t t0 = 0; t0 < steps; t0 += depth) {
      const int64_t ts = smaller(depth, steps - t0);
      for (int64_t t = 0; t < ts; t++)
        VARIANT(interleave)(panels + t * ROWS, ROWS, ts * ROWS, left + (t0 + t) * left_t + o0, left_b, lanes, height);
      for (int64_t i0 = 0; i0 < i; i0 += across) {
        const int64_t width = smaller(across, i - i0);
        for (int64_t t = 0; t < ts; t++)
          VARIANT(interleave)(chunk + t * ACROSS, ACROSS, ts * ACROSS, right + (t0 + t) * right_t + i0, right_b, lanes,
                              width);
        for (int64_t a = 0; a < height; a += down) {
          const int64_t rows = smaller(down, height - a);
          const uint64_t first = start + (uint64_t)((o0 + a) * i + i0);
          for (uint32_t copy = 0; copy < nnz; copy++) {
            uint32_t *to = table + copy * down * across;
            if (width == i)
              VARIANT(fill)(&maps[copy], to, first, rows * i);
            else
              for (int64_t r = 0; r < rows; r++)
                VARIANT(fill)(&maps[copy], to + r * width, first + (uint64_t)(r * i), width);
          }
          for (int64_t r = 0; r < rows; r += ROWS)
            for (int64_t c = 0; c < width; c += ACROSS)
              VARIANT(outer_tile)(sums, panels + (a + r) * ts, chunk + c * ts, ts, table + r * width + c, width,
                                  down * across, nnz, rows - r, width - c,
                                  scale ? scale + (o0 + a + r) * i + i0 + c : scale, i);
        }
      }
    }
  }
}

/* out[l][c] += scale (the sum over parts of sums[part][c]) for the examples l < lanes; parts in their order. */
static void VARIANT(sp_gather_lanes)(float *out, int64_t out_stride, const void *from, int64_t parts, int lanes,
                                     int64_t k, float scale) {
  const floats *sums = from;
  for (int64_t c = 0; c < k; c += LANES) {
    const int64_t width = smaller(k - c, LANES);
    floats v[LANES];
    for (int64_t x = 0; x < LANES; x++) {
      v[x] = (floats){0};
      for (int64_t p = 0; x < width && p < parts; p++) v[x] += sums[p * k + c + x];
    }
    VARIANT(transpose)(v);
    for (int l = 0; l < lanes; l++) {
      float *to = out + l * out_stride + c;
      const floats scaled = v[l] * scale;
      if (width == LANES)
        *(floats_u *)to += scaled;
      else
        for (int64_t x = 0; x < width; x++) to[x] += scaled[x];
    }
  }
}

#include "native_products.c"
#include "native_windows.c"
#include "native_transforms.c"
#include "native_spectral.c"
#include "native_nibbles.c"
#include "native_scoring.c"
#include "native_gram.c"
#include "native_codes.c"

#undef floats
#undef words
#undef floats_u
#undef words_u
