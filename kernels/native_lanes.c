/* Sixteen examples at once, one to a vector lane; a part of native.c.
 *
 * Interleaved, a coordinate is added to its column by one load, xor, add and store of a vector for all sixteen. So the
 * sums of a call have the shape (k, 16) while they grow, and sp_gather_lanes adds them to the examples' own rows.
 */

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
    const int64_t width = smaller(count - e, LANES);
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
    const int64_t width = smaller(count - done, PIECE);
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
    const int64_t width = smaller(k - c, LANES);
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
