/* Gram matrices of stored rows, rowsᵀ rows; a part of native_lanes.c, compiled for each number of LANES.
 *
 * Rows are float32, float16 or int8 and become float32, times a factor each, as they are packed: a block of GRAM x GRAM
 * entries stays in the second-level cache while all rows pass by, GRAM_STEPS of them at a time, in panels of
 * PANEL columns. An entry is a sum over the steps in registers and then over their groups, in order: its bits depend on
 * its two columns alone, not on blocks or threads.
 */

#define PANEL (LANES * ACROSS)

/* sums[m][c] += sum_t left[t][m] right[t][c] for a register tile, ROWS x PANEL entries of panels. */
INLINE void VARIANT(gram_tile)(float *sums, const float *left, const float *right, int64_t steps) {
  floats g[ROWS][ACROSS];
  UNROLL for (int m = 0; m < ROWS; m++)
    UNROLL for (int n = 0; n < ACROSS; n++) g[m][n] = (floats){0};
  for (int64_t t = 0; t < steps; t++, left += PANEL, right += PANEL) {
    floats x[ACROSS];
    UNROLL for (int n = 0; n < ACROSS; n++) x[n] = *(const floats *)(right + n * LANES);
    UNROLL for (int m = 0; m < ROWS; m++)
      UNROLL for (int n = 0; n < ACROSS; n++) g[m][n] += left[m] * x[n];
  }
  UNROLL for (int m = 0; m < ROWS; m++)
    UNROLL for (int n = 0; n < ACROSS; n++) *(floats *)(sums + m * GRAM + n * LANES) += g[m][n];
}

/* to[panel][t][PANEL] = factor[t] rows[t] of rows without gaps, filled up with zeros; panels are GRAM_STEPS apart. */
INLINE void VARIANT(gram_pack)(float *to, const char *rows, const float *factor, int64_t steps, int64_t width,
                               const int type) {
  const int size = type == INT8 ? 1 : type == FLOAT16 ? 2 : 4;
  for (int64_t t = 0; t < steps; t++, rows += width * size) {
    const floats by = (floats){0} + (factor ? factor[t] : 1);
    for (int64_t c = 0; c < width; c += PANEL)
      UNROLL for (int n = 0; n < PANEL; n += LANES) {
        floats *const into = (floats *)(to + c * GRAM_STEPS + t * PANEL + n);
        if (c + n + LANES <= width) {
          *into = VARIANT(widen)(rows + (c + n) * size, type) * by;
        } else {
          char rest[4 * LANES] = {0};
          if (c + n < width) memcpy(rest, rows + (c + n) * size, (size_t)((width - c - n) * size));
          *into = VARIANT(widen)(rest, type) * by;
        }
      }
  }
}

INLINE void VARIANT(gram_block)(float *out, int64_t out_stride, const char *left, int64_t high, const char *right,
                                int64_t wide, const float *factor, int64_t n, float *work, const int type) {
  const int size = type == INT8 ? 1 : type == FLOAT16 ? 2 : 4;
  const int diagonal = left == right;
  float *const sums = work, *const lefts = sums + GRAM * GRAM, *const rights = lefts + (diagonal ? 0 : GRAM * GRAM_STEPS);
  memset(sums, 0, GRAM * GRAM * sizeof *sums);
  for (int64_t t = 0, steps; t < n; t += steps) {
    steps = smaller(n - t, GRAM_STEPS);
    VARIANT(gram_pack)(lefts, left + t * high * size, factor ? factor + t : factor, steps, high, type);
    if (!diagonal) VARIANT(gram_pack)(rights, right + t * wide * size, factor ? factor + t : factor, steps, wide, type);
    for (int64_t c = 0; c < wide; c += PANEL)
      for (int64_t r = 0; r < (diagonal ? smaller(high, c + PANEL) : high); r += ROWS)
        VARIANT(gram_tile)(sums + r * GRAM + c, lefts + r / PANEL * PANEL * GRAM_STEPS + r % PANEL,
                           rights + c * GRAM_STEPS, steps);
  }
  for (int64_t r = 0; r < high; r++) memcpy(out + r * out_stride, sums + r * GRAM, (size_t)wide * sizeof *sums);
}

/* out[r][c] = sum_t factor[t]^2 left[t][r] right[t][c] of n rows with at most GRAM columns, without gaps; where left and
 * right are one, only for r <= c. Work space is GRAM (GRAM + 2 GRAM_STEPS) numbers, aligned.
 */
static void VARIANT(sp_gram)(float *out, int64_t out_stride, const void *left, int64_t high, const void *right,
                             int64_t wide, const float *factor, int64_t n, int type, float *work) {
#define BLOCK_OF(type) VARIANT(gram_block)(out, out_stride, left, high, right, wide, factor, n, work, type)
  if (type == INT8)
    BLOCK_OF(INT8);
  else if (type == FLOAT16)
    BLOCK_OF(FLOAT16);
  else
    BLOCK_OF(FLOAT32);
#undef BLOCK_OF
}

#undef PANEL
