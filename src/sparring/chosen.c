/* The log-prob of one token per row of logits, and its gradient.

   Compiled by native.py; logits are bfloat16 where HALF is defined and float32 elsewhere. A row is read twice while it is
   in the cache; exponentials are summed in float32, 1,024 at a time, and those sums in float64. */

#include "lanes.h"

#define BLOCK 1024

/* `count` logits, at most sixteen, and `other` behind them; a constant count is one instruction. */
INLINE lanes filled(const number *from, int count, float other) {
#ifdef HALF
    halves x = {0};
    memcpy(&x, from, count * sizeof *from);
    lanes wide = (lanes)(__builtin_convertvector(x, words) << 16);
#else
    lanes wide = {0};
    memcpy(&wide, from, count * sizeof *from);
#endif
    for (int i = count; i < 16; i++) wide[i] = other;
    return wide;
}

/* logits [rows, size] and a token each to its log-prob, the largest logit and the sum of exponentials relative to it. */
void forward(const number *logits, const int64_t *tokens, float *out, float *tops, float *sums, int64_t rows,
             int64_t size) {
#pragma omp parallel for schedule(static)
    for (int64_t r = 0; r < rows; r++) {
        const number *row = logits + r * size;
        int64_t whole = size / 16 * 16;
        lanes most = filled(row + whole, size - whole, -INFINITY);
        for (int64_t at = 0; at < whole; at += 16) {
            lanes x = filled(row + at, 16, 0);
            most = choose(x > most, x, most);
        }
        float top = most[0];
        for (int i = 1; i < 16; i++) top = most[i] > top ? most[i] : top;
        lanes part = power((filled(row + whole, size - whole, -INFINITY) - top) * LOG2E);
        double sum = total(part);
        for (int64_t block = 0; block < whole; block += BLOCK) {
            int64_t end = block + BLOCK < whole ? block + BLOCK : whole;
            part = (lanes){0};
            for (int64_t at = block; at < end; at += 16) part += power((filled(row + at, 16, 0) - top) * LOG2E);
            sum += total(part);
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
        float share = -grad[r] / sums[r], top = tops[r];
        int64_t whole = size / 16 * 16, token = tokens[r], near = token / 16 * 16;
        for (int64_t at = 0; at < whole; at += 16)
            narrow(power((filled(row + at, 16, 0) - top) * LOG2E) * share, to + at, 16);
        if (whole < size) narrow(power((filled(row + whole, size - whole, 0) - top) * LOG2E) * share, to + whole, size - whole);
        int count = size - near < 16 ? size - near : 16;
        lanes own = power((filled(row + near, count, 0) - top) * LOG2E) * share;
        own[token - near] += grad[r];
        narrow(own, to + near, count);
    }
}
