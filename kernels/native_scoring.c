/* Inner products of queries with stored rows, and the search for the best; a part of native_lanes.c, compiled for each
 * number of LANES.
 *
 * Rows are float32, float16 or int8 and become float32 in registers, or packed codes (native_nibbles.c). An inner product is LANES interleaved sums over
 * the columns in order, folded at the end: its bits depend on its own row and query alone, not on tiles or threads.
 */

#define bytes VARIANT(bytes)
#define halves VARIANT(halves)
#define shorts VARIANT(shorts)
#define integers VARIANT(integers)
typedef int8_t bytes __attribute__((vector_size(LANES)));
typedef int16_t shorts __attribute__((vector_size(2 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));

/* LANES entries of a row. Without an instruction for it, half precision is its bits moved to their places in a float,
 * times 2^112; and GCC makes several instructions of a portable conversion from int8.
 */
INLINE floats VARIANT(widen)(const char *from, int type) {
#if LANES == 16
  if (type == INT8) return (floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)from)));
  if (type == FLOAT16) return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif LANES == 8
  if (type == INT8) return (floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)from)));
#endif
  if (type == INT8) {
    bytes b;
    memcpy(&b, from, sizeof b);
    return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(b, shorts), integers), floats);
  }
  if (type == FLOAT16) {
    halves h;
    memcpy(&h, from, sizeof h);
    const words w = __builtin_convertvector(h, words), size = (w & 0x7FFFu) << 13, sign = (w & 0x8000u) << 16;
    const floats scaled = (floats)size * 0x1p112f;
    return (floats)((words)scaled | sign | ((words)(size >= 0x0F800000u) & 0x7F800000u)); /* infinite and NaN too */
  }
  return *(const floats_u *)from;
}

INLINE float VARIANT(fold)(floats sums) {
  four part[LANES / 4];
  memcpy(part, &sums, sizeof part);
  UNROLL for (int width = LANES / 8; width; width /= 2)
    UNROLL for (int l = 0; l < width; l++) part[l] += part[l + width];
  return (part[0][0] + part[0][2]) + (part[0][1] + part[0][3]);
}

/* sums[r][q] += queries[q] . rows[r] over columns [0, count) for a register tile, lane by lane. Meanwhile what lies at
 * `ahead` is fetched, a line of each row for a line that is read.
 */
INLINE void VARIANT(score_tile)(floats sums[SCORE_ROWS][SCORE_QUERIES], const float *queries, int64_t query_stride,
                                const char *const row[SCORE_ROWS], const char *const ahead[SCORE_ROWS], int64_t count,
                                const int wide, const int type) {
  const int size = type == INT8 ? 1 : type == FLOAT16 ? 2 : 4, line = 64 / size;
  floats own[SCORE_ROWS][SCORE_QUERIES];
  UNROLL for (int r = 0; r < SCORE_ROWS; r++)
    UNROLL for (int q = 0; q < wide; q++) own[r][q] = sums[r][q];
#define STEP(at)                                                                                         \
  {                                                                                                      \
    floats x[SCORE_ROWS];                                                                                \
    UNROLL for (int r = 0; r < SCORE_ROWS; r++) x[r] = VARIANT(widen)(row[r] + (at) * size, type);       \
    UNROLL for (int q = 0; q < wide; q++) {                                                              \
      const floats y = *(const floats_u *)(queries + q * query_stride + (at));                           \
      UNROLL for (int r = 0; r < SCORE_ROWS; r++) own[r][q] += x[r] * y;                                 \
    }                                                                                                    \
  }
  int64_t c = 0;
  for (; c + line <= count; c += line) {
    UNROLL for (int r = 0; r < SCORE_ROWS; r++) __builtin_prefetch(ahead[r] + c * size);
    UNROLL for (int v = 0; v < line; v += LANES) STEP(c + v)
  }
  for (; c + LANES <= count; c += LANES) STEP(c)
#undef STEP
  if (c < count) { /* the rest, filled up with zeros */
    UNROLL for (int q = 0; q < wide; q++) {
      floats y = {0};
      memcpy(&y, queries + q * query_stride + c, (size_t)(count - c) * sizeof(float));
      UNROLL for (int r = 0; r < SCORE_ROWS; r++) {
        char rest[4 * LANES] = {0};
        memcpy(rest, row[r] + c * size, (size_t)((count - c) * size));
        own[r][q] += VARIANT(widen)(rest, type) * y;
      }
    }
  }
  UNROLL for (int r = 0; r < SCORE_ROWS; r++)
    UNROLL for (int q = 0; q < wide; q++) sums[r][q] = own[r][q];
}

/* Some rows stay in the first-level cache, a piece of columns at a time, until all queries have met them; the next piece
 * is fetched at the same time, in shares.
 */
INLINE void VARIANT(score_rows)(float *out, int64_t out_stride, const float *queries, int64_t query_stride,
                                int64_t count, const char *rows, int64_t row_stride, const float *scale, int64_t n,
                                int64_t dim, const int type) {
  const int size = type == INT8 ? 1 : type == FLOAT16 ? 2 : 4;
  const int64_t tiles = (count + SCORE_QUERIES - 1) / SCORE_QUERIES;
  for (int64_t r = 0; r < n; r += SCORE_ROWS) {
    const int64_t high = smaller(n - r, SCORE_ROWS);
    floats sums[SCORE_FEW / SCORE_QUERIES][SCORE_ROWS][SCORE_QUERIES];
    memset(sums, 0, (size_t)tiles * sizeof *sums);
    for (int64_t c = 0; c < dim; c += SCORE_COLUMNS) {
      const int64_t some = smaller(dim - c, SCORE_COLUMNS);
      for (int64_t t = 0; t < tiles; t++) {
        const char *row[SCORE_ROWS], *ahead[SCORE_ROWS];
        for (int i = 0; i < SCORE_ROWS; i++) {
          row[i] = rows + (r + smaller(i, high - 1)) * row_stride + c * size;
          ahead[i] = row[i];
          if (i % tiles != t) continue;
          if (c + SCORE_COLUMNS < dim)
            ahead[i] += SCORE_COLUMNS * size;
          else if (r + SCORE_ROWS + i < n)
            ahead[i] += SCORE_ROWS * row_stride - c * size;
        }
        const float *y = queries + t * SCORE_QUERIES * query_stride + c;
        const int64_t wide = count - t * SCORE_QUERIES;
        if (wide >= SCORE_QUERIES)
          VARIANT(score_tile)(sums[t], y, query_stride, row, ahead, some, SCORE_QUERIES, type);
        else if (wide == 1)
          VARIANT(score_tile)(sums[t], y, query_stride, row, ahead, some, 1, type);
        else if (wide == 2)
          VARIANT(score_tile)(sums[t], y, query_stride, row, ahead, some, 2, type);
        else
          VARIANT(score_tile)(sums[t], y, query_stride, row, ahead, some, 3, type);
      }
    }
    for (int64_t q = 0; q < count; q++)
      for (int64_t i = 0; i < high; i++) {
        const float score = VARIANT(fold)(sums[q / SCORE_QUERIES][i][q % SCORE_QUERIES]);
        out[q * out_stride + r + i] = scale ? score * scale[r + i] : score;
      }
  }
}

/* out[q][r] = scale[r] queries[q] . rows[r]; for at most SCORE_FEW queries; strides of out and
 * queries in numbers, of rows in bytes. Of packed codes dim is
 * the bytes of a row, and queries are what sp_nibbles makes of them.
 */
static void VARIANT(sp_score)(float *out, int64_t out_stride, const float *queries, int64_t query_stride,
                              int64_t count, const void *rows, int64_t row_stride, const float *scale, int64_t n,
                              int64_t dim, int type) {
#define ROWS_OF(type) \
  VARIANT(score_rows)(out, out_stride, queries, query_stride, count, rows, row_stride, scale, n, dim, type)
  if (type == CODES)
    VARIANT(score_nibbles)(out, out_stride, queries, query_stride, count, rows, row_stride, scale, n, dim);
  else if (type == INT8)
    ROWS_OF(INT8);
  else if (type == FLOAT16)
    ROWS_OF(FLOAT16);
  else
    ROWS_OF(FLOAT32);
#undef ROWS_OF
}

/* Offers sign * scores[q][r] * scale[r] of rows first + r. Returns the first row with NaN for a score, or -1.
 * Written so that NaN, which is not less than anything, is seen like a good score.
 */
static int64_t VARIANT(keep)(const best *kept, const float *scores, int64_t stride, const float *scale, int64_t queries,
                             int64_t n, int64_t first, float sign) {
  int64_t bad = INT64_MAX;
  for (int64_t q = 0; q < queries; q++, scores += stride) {
    int64_t r = 0;
    while (r < n) {
      const int64_t end = smaller(n, r + 4 * LANES);
      if (end == r + 4 * LANES) {
        const floats limit = (floats){0} + kept->threshold[q];
        words less = ~(words){0};
        UNROLL for (int v = 0; v < 4; v++) {
          floats score = *(const floats_u *)(scores + r + v * LANES) * sign;
          if (scale) score *= *(const floats_u *)(scale + r + v * LANES);
          less &= (words)(score < limit);
        }
        uint64_t part[LANES / 2];
        memcpy(part, &less, sizeof part);
        UNROLL for (int width = LANES / 4; width; width /= 2)
          UNROLL for (int l = 0; l < width; l++) part[l] &= part[l + width];
        if (part[0] == UINT64_MAX) {
          r = end;
          continue;
        }
      }
      for (; r < end; r++) {
        const float score = scale ? scores[r] * sign * scale[r] : scores[r] * sign;
        if (score < kept->threshold[q]) continue;
        if (score != score)
          bad = smaller(bad, first + r);
        else
          offer(kept, q, score, first + r);
      }
    }
  }
  return bad == INT64_MAX ? -1 : bad;
}

static void VARIANT(sp_keep)(float *value, int64_t *row, int64_t *filled, float *threshold, int64_t keep,
                             const float *scores, int64_t stride, const float *scale, int64_t queries, int64_t n,
                             int64_t first, float sign, int64_t *bad) {
  const best kept = {value, row, filled, threshold, keep};
  *bad = VARIANT(keep)(&kept, scores, stride, scale, queries, n, first, sign);
}

/* sp_score and sp_keep in one, for at most SCORE_FEW queries: scores live in the first-level cache only. */
static void VARIANT(sp_best)(float *value, int64_t *row, int64_t *filled, float *threshold, int64_t keep,
                             const float *queries, int64_t query_stride, int64_t count, const void *rows,
                             int64_t row_stride, const float *scale, int64_t n, int64_t dim, int type, int64_t first,
                             float sign, int64_t *bad) {
  const best kept = {value, row, filled, threshold, keep};
  float scores[SCORE_FEW * SCORE_CHUNK];
  *bad = -1;
  for (int64_t r = 0; r < n; r += SCORE_CHUNK) {
    const int64_t some = smaller(n - r, SCORE_CHUNK);
    VARIANT(sp_score)(scores, SCORE_CHUNK, queries, query_stride, count, (const char *)rows + r * row_stride, row_stride,
                      scale ? scale + r : NULL, some, dim, type);
    const int64_t found = VARIANT(keep)(&kept, scores, SCORE_CHUNK, NULL, count, some, first + r, sign);
    if (found >= 0 && *bad < 0) *bad = found;
  }
}

#undef bytes
#undef halves
#undef shorts
#undef integers
