/* The best scores of each query while rows stream by; a part of native.c.
 *
 * A query's best are a heap whose root is the worst of them. Of two scores the higher is better, and of equal ones that
 * of the lower row. This order is total, so what is kept depends neither on the order of arrival nor on threads.
 */

typedef struct {
  float *value;     /* (queries, keep) */
  int64_t *row;     /* (queries, keep) */
  int64_t *filled;  /* (queries): how many of keep are there */
  float *threshold; /* (queries): lower scores are of no interest, which rises once a heap is full */
  int64_t keep;
} best;

INLINE int better(float a, int64_t row_a, float b, int64_t row_b) { return a > b || (a == b && row_a < row_b); }

/* Offers a score that is not below the threshold. */
static void offer(const best *kept, int64_t query, float score, int64_t row) {
  float *value = kept->value + query * kept->keep;
  int64_t *where = kept->row + query * kept->keep, count = kept->filled[query], at;
  if (count < kept->keep) { /* up from a new leaf */
    at = count++;
    kept->filled[query] = count;
    for (int64_t parent; at > 0; at = parent) {
      parent = (at - 1) / 2;
      if (!better(value[parent], where[parent], score, row)) break;
      value[at] = value[parent], where[at] = where[parent];
    }
  } else { /* down from the root, which leaves */
    if (!better(score, row, value[0], where[0])) return;
    at = 0;
    for (int64_t child; (child = 2 * at + 1) < count; at = child) {
      if (child + 1 < count && better(value[child], where[child], value[child + 1], where[child + 1])) child++;
      if (!better(score, row, value[child], where[child])) break;
      value[at] = value[child], where[at] = where[child];
    }
  }
  value[at] = score, where[at] = row;
  if (count == kept->keep && value[0] > kept->threshold[query]) kept->threshold[query] = value[0];
}

/* Offers all that is kept elsewhere. */
EXPORT void sp_merge(float *value, int64_t *row, int64_t *filled, float *threshold, int64_t keep, int64_t queries,
                     const float *other, const int64_t *other_row, const int64_t *other_filled, int64_t other_keep) {
  const best kept = {value, row, filled, threshold, keep};
  for (int64_t q = 0; q < queries; q++)
    for (int64_t i = 0; i < other_filled[q]; i++)
      if (other[q * other_keep + i] >= threshold[q])
        offer(&kept, q, other[q * other_keep + i], other_row[q * other_keep + i]);
}
