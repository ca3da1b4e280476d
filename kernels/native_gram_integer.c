/* Gram matrices of int8 rows by products of whole numbers, two rows at a time: with the instructions for it (AVX-512
 * VNNI) twice as fast as float32. A part of native.c.
 *
 * Of INTEGER_STEPS rows t, the largest factor being F, the one side is the codes c_t, the other one what these are times
 * their factor, round(255 (f_t / F)^2 c_t): at most 2^15, so that their products' sums fit 32 bits and are exact. In
 * float32 such a sum is F^2 / 255 times itself, and the groups' are added in order: as with floats an entry's bits
 * depend on its two columns alone. An entry of the other side errs by at most 1/2, of up to 32,385.
 */

#define PANEL 64 /* columns: ROWS x PANEL sums fit the registers */
enum { PAIRS = INTEGER_STEPS / 2, WIDE = 16 };

/* to[panel][pair][PANEL] = two rows' codes side by side, times a factor each where there are any, rounded. */
static inline void pack_pairs(int32_t *to, const int8_t *rows, const float *by, int64_t steps, int64_t width) {
  for (int64_t t = 0; t < steps; t += 2, rows += 2 * width)
    for (int64_t c = 0; c < width; c += WIDE) {
      __m512i entry[2];
      for (int half = 0; half < 2; half++) {
        const __mmask16 there = t + half < steps ? (__mmask16)((1u << smaller(width - c, WIDE)) - 1) : 0;
        entry[half] = _mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(there, rows + half * width + c));
        if (by)
          entry[half] = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(entry[half]), _mm512_set1_ps(by[t + half])));
      }
      const __m512i low = _mm512_and_si512(entry[0], _mm512_set1_epi32(0xFFFF)), high = _mm512_slli_epi32(entry[1], 16);
      _mm512_store_si512(to + c / PANEL * PANEL * PAIRS + t / 2 * PANEL + c % PANEL, _mm512_or_si512(low, high));
    }
}

/* sums[m][c] += first (second sum_t left[t][m] right[t][c]) for a register tile, ROWS x PANEL entries of panels. */
static inline void integer_tile(float *sums, const int32_t *left, const int32_t *right, int64_t pairs, float first,
                                float second) {
  __m512i g[ROWS][PANEL / WIDE];
  UNROLL for (int m = 0; m < ROWS; m++)
    UNROLL for (int n = 0; n < PANEL / WIDE; n++) g[m][n] = _mm512_setzero_si512();
  for (int64_t t = 0; t < pairs; t++, left += PANEL, right += PANEL) {
    __m512i x[PANEL / WIDE];
    UNROLL for (int n = 0; n < PANEL / WIDE; n++) x[n] = _mm512_load_si512(right + n * WIDE);
    UNROLL for (int m = 0; m < ROWS; m++) {
      const __m512i both = _mm512_set1_epi32(left[m]);
      UNROLL for (int n = 0; n < PANEL / WIDE; n++) g[m][n] = _mm512_dpwssd_epi32(g[m][n], both, x[n]);
    }
  }
  UNROLL for (int m = 0; m < ROWS; m++)
    UNROLL for (int n = 0; n < PANEL / WIDE; n++) {
      float *const at = sums + m * GRAM + n * WIDE;
      const __m512 part = _mm512_mul_ps(_mm512_cvtepi32_ps(g[m][n]), _mm512_set1_ps(second));
      _mm512_store_ps(at, _mm512_fmadd_ps(part, _mm512_set1_ps(first), _mm512_load_ps(at)));
    }
}

/* As sp_gram, of int8 rows, and added to out; factors are finite. Work space is GRAM (GRAM + INTEGER_STEPS) numbers,
 * aligned.
 */
static void gram_integer(float *out, int64_t out_stride, const int8_t *left, int64_t high, const int8_t *right,
                         int64_t wide, const float *factor, int64_t n, float *work) {
  float *const sums = work;
  int32_t *const lefts = (int32_t *)(sums + GRAM * GRAM), *const rights = lefts + GRAM * PAIRS;
  memset(sums, 0, GRAM * (GRAM + INTEGER_STEPS) * sizeof *sums);
  for (int64_t r = 0; r < high; r++) memcpy(sums + r * GRAM, out + r * out_stride, (size_t)wide * sizeof *sums);
  for (int64_t t = 0, steps; t < n; t += steps) {
    float by[INTEGER_STEPS], largest = factor ? 0 : 1;
    steps = smaller(n - t, INTEGER_STEPS);
    if (factor)
      for (int64_t s = 0; s < steps; s++) largest = __builtin_fmaxf(largest, __builtin_fabsf(factor[t + s]));
    if (largest == 0) continue;
    for (int64_t s = 0; s < INTEGER_STEPS; s++) {
      const float part = s >= steps ? 0 : factor ? factor[t + s] / largest : 1;
      by[s] = part * part * 255;
    }
    pack_pairs(lefts, left + t * high, NULL, steps, high);
    pack_pairs(rights, right + t * wide, by, steps, wide);
    for (int64_t c = 0; c < wide; c += PANEL)
      for (int64_t r = 0; r < (left == right ? smaller(high, c + PANEL) : high); r += ROWS)
        integer_tile(sums + r * GRAM + c, lefts + r / PANEL * PANEL * PAIRS + r % PANEL, rights + c * PAIRS,
                     (steps + 1) / 2, largest, largest / 255);
  }
  for (int64_t r = 0; r < high; r++) memcpy(out + r * out_stride, sums + r * GRAM, (size_t)wide * sizeof *sums);
}

#undef PANEL
