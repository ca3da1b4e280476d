/* Inner products of queries with packed codes of a few bits; a part of native_lanes.c, compiled for each number of LANES.
 *
 * Half a byte stands for 4 / bits numbers of a row. Of each half byte a query has the 16 sums that these can make with
 * it (sp_nibbles), so that an inner product is one look-up and one addition a half byte, whatever the bits: a vector has
 * the half bytes of LANES rows, and looks them up in registers. The sums over a line of LINE bytes are added in order,
 * so that a score has the same bits for every number of LANES, tile and thread.
 */

enum { VARIANT(NIBBLE_ROWS) = NIBBLE_VECTORS * LANES };

/* sums[v] += entries of a table of 16 for half a byte of each row's word. */
#if LANES == 8
/* A look-up of bytes is several times as fast here as one of floats: a table is four planes (sp_nibbles), of the lowest
 * bytes of its entries, and so on, and codes[b] has byte b of the words of all rows. */
INLINE void VARIANT(add_entries)(floats sums[NIBBLE_VECTORS], const words codes[NIBBLE_VECTORS], const float *table,
                                 int byte, const int half) {
  const words at = (codes[byte] >> (4 * half)) & 0x0F0F0F0Fu;
  __m256i plane[4];
  UNROLL for (int p = 0; p < 4; p++)
    plane[p] = _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *)table + p)), (__m256i)at);
  const __m256i low = _mm256_unpacklo_epi8(plane[0], plane[1]), high = _mm256_unpackhi_epi8(plane[0], plane[1]);
  const __m256i low_top = _mm256_unpacklo_epi8(plane[2], plane[3]), high_top = _mm256_unpackhi_epi8(plane[2], plane[3]);
  sums[0] += (floats)_mm256_unpacklo_epi16(low, low_top);
  sums[1] += (floats)_mm256_unpackhi_epi16(low, low_top);
  sums[2] += (floats)_mm256_unpacklo_epi16(high, high_top);
  sums[3] += (floats)_mm256_unpackhi_epi16(high, high_top);
}

/* Words of the rows 8 v to 8 v + 7 as bytes of all rows, in the order that add_entries has them in. */
INLINE void VARIANT(by_bytes)(words codes[NIBBLE_VECTORS]) {
  const __m256i turn = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
  __m256i four[4];
  UNROLL for (int v = 0; v < 4; v++) four[v] = _mm256_shuffle_epi8((__m256i)codes[v], turn);
  const __m256i a = _mm256_unpacklo_epi32(four[0], four[1]), b = _mm256_unpacklo_epi32(four[2], four[3]);
  const __m256i c = _mm256_unpackhi_epi32(four[0], four[1]), d = _mm256_unpackhi_epi32(four[2], four[3]);
  codes[0] = (words)_mm256_unpacklo_epi64(a, b), codes[1] = (words)_mm256_unpackhi_epi64(a, b);
  codes[2] = (words)_mm256_unpacklo_epi64(c, d), codes[3] = (words)_mm256_unpackhi_epi64(c, d);
}
#else
INLINE void VARIANT(add_entries)(floats sums[NIBBLE_VECTORS], const words codes[NIBBLE_VECTORS], const float *table,
                                 int byte, const int half) {
  UNROLL for (int v = 0; v < NIBBLE_VECTORS; v++) {
    const words at = codes[v] >> (8 * byte + 4 * half);
#if LANES == 16
    sums[v] += (floats)_mm512_permutexvar_ps((__m512i)at, _mm512_loadu_ps(table)); /* by the lowest four bits */
#else
    sums[v] += (floats){table[at[0] & 15], table[at[1] & 15], table[at[2] & 15], table[at[3] & 15]};
#endif
  }
}

INLINE void VARIANT(by_bytes)(words codes[NIBBLE_VECTORS]) { (void)codes; }
#endif

/* Words of a line of codes, each of LANES rows beside each other. Meanwhile the line at `ahead` of each row is fetched. */
INLINE void VARIANT(line_up)(words codes[LINE / 4][NIBBLE_VECTORS], const uint8_t *from, int64_t row_stride, int64_t high,
                             int64_t wide, int64_t ahead) {
  uint8_t edge[VARIANT(NIBBLE_ROWS)][LINE];
  const uint8_t *row[VARIANT(NIBBLE_ROWS)];
  for (int r = 0; r < VARIANT(NIBBLE_ROWS); r++) {
    row[r] = from + smaller(r, high - 1) * row_stride;
    __builtin_prefetch(row[r] + ahead);
    if (wide == LINE) continue;
    memset(edge[r], 0, LINE);
    memcpy(edge[r], row[r], (size_t)wide);
    row[r] = edge[r];
  }
  for (int v = 0; v < NIBBLE_VECTORS; v++)
    for (int w = 0; w < LINE / 4; w += LANES) {
      floats square[LANES];
      UNROLL for (int l = 0; l < LANES; l++) square[l] = *(const floats_u *)(row[v * LANES + l] + 4 * w);
      VARIANT(transpose)(square);
      UNROLL for (int l = 0; l < LANES; l++) codes[w + l][v] = (words)square[l];
    }
  for (int w = 0; w < LINE / 4; w++) VARIANT(by_bytes)(codes[w]);
}

/* As sp_score, of rows of width bytes and queries' tables. */
static void VARIANT(score_nibbles)(float *out, int64_t out_stride, const float *tables, int64_t table_stride,
                                   int64_t count, const uint8_t *rows, int64_t row_stride, const float *scale, int64_t n,
                                   int64_t width) {
  for (int64_t r = 0; r < n; r += VARIANT(NIBBLE_ROWS)) {
    const int64_t high = smaller(n - r, VARIANT(NIBBLE_ROWS));
    floats sums[SCORE_FEW][NIBBLE_VECTORS];
    memset(sums, 0, (size_t)count * sizeof *sums);
    for (int64_t c = 0; c < width; c += LINE) {
      const int64_t wide = smaller(width - c, LINE);
      words codes[LINE / 4][NIBBLE_VECTORS];
      VARIANT(line_up)(codes, rows + r * row_stride + c, row_stride, high, wide,
                       c + LINE < width ? LINE : VARIANT(NIBBLE_ROWS) * row_stride - c);
      for (int64_t q = 0; q < count; q++) {
        const float *table = tables + q * table_stride + c * 32;
        floats own[NIBBLE_VECTORS] = {{0}};
        for (int64_t b = 0; b < wide; b++, table += 32) {
          VARIANT(add_entries)(own, codes[b / 4], table, (int)(b % 4), 0);
          VARIANT(add_entries)(own, codes[b / 4], table + 16, (int)(b % 4), 1);
        }
        UNROLL for (int v = 0; v < NIBBLE_VECTORS; v++) sums[q][v] += own[v];
      }
    }
    for (int64_t q = 0; q < count; q++) {
      float score[VARIANT(NIBBLE_ROWS)];
      memcpy(score, sums[q], sizeof score);
      for (int64_t i = 0; i < high; i++) out[q * out_stride + r + i] = scale ? score[i] * scale[r + i] : score[i];
    }
  }
}
