/* The log-prob of one token per row of logits, and its gradient.

   Compiled by native.py; logits are bfloat16 where HALF is defined and float32 elsewhere. A row is read twice while it is
   in the cache; exponentials are summed in float32, 1,024 at a time, and those sums in float64. */

#include "lanes.h"

#define BLOCK 1024

/* Sixteen logits from `at` on; `other` behind the end. */
INLINE lanes some(const number *row, int64_t at, int64_t size, float other) {
    int64_t left = size - at;
#ifdef HALF
    halves x = {0};
    memcpy(&x, row + at, (left < 16 ? left : 16) * sizeof *row);
    lanes wide = (lanes)(__builtin_convertvector(x, words) << 16);
#else
    lanes wide = {0};
    memcpy(&wide, row + at, (left < 16 ? left : 16) * sizeof *row);
#endif
    if (left < 16)
        for (int i = left; i < 16; i++) wide[i] = other;
    return wide;
}

/* logits [rows, size] and a token each to its log-prob, the largest logit and the sum of exponentials relative to it. */
void forward(const number *logits, const int64_t *tokens, float *out, float *tops, float *sums, int64_t rows,
             int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const number *row = logits + r * size;
        lanes most = {0};
        most -= INFINITY;
        for (int64_t at = 0; at < size; at += 16) {
            lanes x = some(row, at, size, -INFINITY);
            most = choose(x > most, x, most);
        }
        float top = most[0];
        for (int i = 1; i < 16; i++) top = most[i] > top ? most[i] : top;
        double sum = 0;
        for (int64_t block = 0; block < size; block += BLOCK) {
            lanes part = {0};
            int64_t end = block + BLOCK < size ? block + BLOCK : size;
            for (int64_t at = block; at < end; at += 16) part += power((some(row, at, size, -INFINITY) - top) * LOG2E);
            float total = 0;
            for (int i = 0; i < 16; i++) total += part[i];
            sum += total;
        }
        tops[r] = top, sums[r] = sum;
        out[r] = (float)(widen(row[tokens[r]]) - top - log(sum));
    }
}

/* The gradient of the logits, of that of the log-probs. */
void backward(const number *logits, const int64_t *tokens, const float *tops, const float *sums, const float *grad,
              number *out, int64_t rows, int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const number *row = logits + r * size;
        number *to = out + r * size;
        float share = -grad[r] / sums[r];
        for (int64_t at = 0; at < size; at += 16)
            narrow(power((some(row, at, size, 0) - tops[r]) * LOG2E) * share, to + at, size - at < 16 ? size - at : 16);
        int64_t token = tokens[r], at = token / 16 * 16;
        lanes near = power((some(row, at, size, 0) - tops[r]) * LOG2E) * share;
        near[token - at] += grad[r];
        narrow(near, to + at, size - at < 16 ? size - at : 16);
    }
}
