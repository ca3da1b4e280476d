/* Rank-one products of many parameters at once, column by column; a part of native_lanes.c, compiled for each number of
 * LANES.
 *
 * PANEL examples are interleaved, whose numbers are a line of the caches. Every coordinate of a rank-one gradient is the product of two entries of the factors,
 * so a list, sorted by column, of pairs of entries gives each column's sum in registers: nothing is scattered, and each
 * sum is written once. Signs are part of the list: it points at an entry or at its negative.
 */

#define ACROSS_PANEL (PANEL / LANES) /* vectors of an entry */

/* A factor's entries of PANEL examples, of which `there` exist, as vectors; and their negatives behind them. */
INLINE void VARIANT(panel_of)(floats *to, const float *from, int64_t stride, int64_t there, int64_t count, int negatives) {
  for (int64_t part = 0; part < ACROSS_PANEL; part++) {
    const int64_t left = there - part * LANES, lanes = left < 0 ? 0 : smaller(left, LANES);
    VARIANT(interleave)(to + part, 1, ACROSS_PANEL, lanes ? from + part * LANES * stride : from, stride, (int)lanes, count);
  }
  if (negatives)
    for (int64_t e = 0; e < count * ACROSS_PANEL; e++) to[count * ACROSS_PANEL + e] = -to[e];
}

/* The sums of one column: pairs come in fours, whose upper halves and lower halves are entries. */
INLINE void VARIANT(sum_pairs)(floats *sum, const floats *entries, const uint32_t *pair, const uint32_t *end) {
  floats even[ACROSS_PANEL], odd[ACROSS_PANEL];
  UNROLL for (int p = 0; p < ACROSS_PANEL; p++) even[p] = odd[p] = (floats){0};
  for (; pair < end; pair += 4)
    UNROLL for (int n = 0; n < 4; n += 2)
      UNROLL for (int p = 0; p < ACROSS_PANEL; p++) {
        even[p] += entries[(pair[n] >> 16) * ACROSS_PANEL + p] * entries[(pair[n] & 0xFFFF) * ACROSS_PANEL + p];
        odd[p] += entries[(pair[n + 1] >> 16) * ACROSS_PANEL + p] * entries[(pair[n + 1] & 0xFFFF) * ACROSS_PANEL + p];
      }
  UNROLL for (int p = 0; p < ACROSS_PANEL; p++) sum[p * PANEL_COLUMNS] = even[p] + odd[p];
}

/* to[l][x] += lane l of v[x]. */
INLINE void VARIANT(add_turned)(float *to, int64_t stride, const floats *from, int64_t lanes, int64_t width) {
  floats v[LANES];
  UNROLL for (int x = 0; x < LANES; x++) v[x] = from[x];
  VARIANT(transpose)(v);
  for (int64_t l = 0; l < lanes; l++, to += stride)
    if (width == LANES)
      *(floats_u *)to += v[l];
    else
      for (int64_t x = 0; x < width; x++) to[x] += v[l][x];
}

/* out[b][c] += the sum over pairs starts[c] to starts[c + 1] of products of two entries of example b, for the examples
 * [first, last). Entry 0 is zero, 1 is one and 2 its negative; then come the factors' in their order, factors[f][b] of
 * counts[f] numbers, of strides[f] from example to example, the first `doubled` of them with their negatives. work has
 * room for PANEL times so many numbers. */
static void VARIANT(sp_products)(float *out, int64_t out_stride, void *work, const float *const *factors,
                                 const int64_t *strides, const int64_t *counts, int64_t number, int64_t doubled,
                                 int64_t first, int64_t last, const uint32_t *pairs, const uint32_t *starts,
                                 int64_t k) {
  floats *const entries = work;
  for (int64_t p = 0; p < ACROSS_PANEL; p++) {
    entries[p] = (floats){0};
    entries[ACROSS_PANEL + p] = (floats){0} + 1;
    entries[2 * ACROSS_PANEL + p] = (floats){0} - 1;
  }
  for (int64_t b = first; b < last; b += PANEL) {
    const int64_t there = smaller(PANEL, last - b);
    floats *to = entries + 3 * ACROSS_PANEL;
    for (int64_t f = 0; f < number; f++) {
      VARIANT(panel_of)(to, factors[f] + b * strides[f], strides[f], there, counts[f], f < doubled);
      to += counts[f] * ACROSS_PANEL << (f < doubled);
    }
    for (int64_t c = 0; c < k; c += PANEL_COLUMNS) {
      float *const row = out + b * out_stride + c;
      const int64_t width = smaller(PANEL_COLUMNS, k - c), rounded = (width + LANES - 1) / LANES * LANES;
      floats sums[PANEL_COLUMNS * ACROSS_PANEL]; /* [vector][column] */
      for (int64_t x = 0; x < rounded; x++) {
        const int64_t column = c + smaller(x, width - 1);
        VARIANT(sum_pairs)(sums + x, entries, pairs + starts[column], pairs + starts[column + 1]);
        if (x % PANEL < there) /* the columns that follow: a line of one example */
          __builtin_prefetch(row + x % PANEL * out_stride + PANEL_COLUMNS + x / PANEL * PANEL, 1, 2);
      }
      for (int64_t l = 0; l < there; l += LANES)
        for (int64_t x = 0; x < width; x += LANES)
          VARIANT(add_turned)(row + l * out_stride + x, out_stride, sums + l / LANES * PANEL_COLUMNS + x,
                              smaller(LANES, there - l), smaller(LANES, width - x));
    }
  }
}

#undef ACROSS_PANEL
