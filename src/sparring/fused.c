/* What a decoder layer of Llama's kind does between its products: norms, rotations of positions, gates and sums.

   Compiled by native.py for a model's heads of WIDTH numbers. What products read and write is bfloat16 where HALF is
   defined and float32 elsewhere; what goes from layer to layer, norms' weights and all sums are float32. A token is
   computed from its own numbers only; gradients of weights are summed by blocks of BLOCK tokens. */

#include "lanes.h"

#define BLOCK 64
/* Numbers from which on threads are worth waiting for. */
#define MANY 32768
#define PRAGMA(text) _Pragma(#text)
#define PARALLEL(numbers) PRAGMA(omp parallel for schedule(static) if ((numbers) > MANY))
#define SIDE (WIDTH / 2)

/* x [count, width], to which `more` is added where it is not NULL, into `sum`; to weight · x / its root mean square, and
   one over that, `scale` [count]. */
void norm(const float *x, const number *more, const float *weight, float *sum, number *out, float *scale, int64_t count,
          int64_t width, float eps) {
    PARALLEL(count * width)
    for (int64_t i = 0; i < count; i++) {
        const float *from = x + i * width;
        lanes squares = {0};
        for (int64_t d = 0; d < width; d += 16) {
            lanes y = some(from + d, width - d);
            if (more) {
                y += wide(more + i * width + d, width - d);
                put(y, sum + i * width + d, width - d);
            }
            squares += y * y;
        }
        if (more) from = sum + i * width;
        float r = scale[i] = 1.0f / sqrtf(total(squares) / width + eps);
        for (int64_t d = 0; d < width; d += 16) {
            lanes y = some(from + d, width - d) * r * some(weight + d, width - d);
            narrow(y, out + i * width + d, width - d);
        }
    }
}

/* The gradient of what `norm` read, of that of what it made; `rest` [count, width] is added. Also what it made, again,
   and by blocks of tokens the gradient of the weights, [blocks, width]; and, where `half` is not NULL, the gradient in the
   products' precision. */
void norm_back(const float *x, const float *weight, const float *scale, const number *grad, const float *rest, float *to,
               number *half, number *out, float *of_weight, int64_t count, int64_t width) {
    PARALLEL(count * width)
    for (int64_t block = 0; block < (count + BLOCK - 1) / BLOCK; block++) {
        float *own = of_weight + block * width;
        memset(own, 0, width * sizeof *own);
        int64_t end = (block + 1) * BLOCK < count ? (block + 1) * BLOCK : count;
        for (int64_t i = block * BLOCK; i < end; i++) {
            int64_t at = i * width;
            float r = scale[i];
            lanes dot = {0};
            for (int64_t d = 0; d < width; d += 16) {
                lanes y = some(x + at + d, width - d) * r, w = some(weight + d, width - d);
                lanes g = wide(grad + at + d, width - d);
                narrow(y * w, out + at + d, width - d);
                put(some(own + d, width - d) + g * y, own + d, width - d);
                dot += g * w * y;
            }
            float slope = total(dot) / width;
            for (int64_t d = 0; d < width; d += 16) {
                lanes y = some(x + at + d, width - d) * r, w = some(weight + d, width - d);
                lanes g = wide(grad + at + d, width - d) * w;
                lanes made = some(rest + at + d, width - d) + (g - slope * y) * r;
                put(made, to + at + d, width - d);
                if (half) narrow(made, half + at + d, width - d);
            }
        }
    }
}

/* A head's numbers turned by its token's angles, or, with `back`, the gradient of that. */
INLINE void turn(const number *from, number *to, const float *cos, const float *sin, const int back) {
    EACH(d, (SIDE + 15) / 16) {
        int at = 16 * d, n = SIDE - at;
        lanes a = wide(from + at, n), b = wide(from + SIDE + at, n);
        lanes c = some(cos + at, n), e = some(cos + SIDE + at, n), s = some(sin + at, n), z = some(sin + SIDE + at, n);
        narrow(back ? a * c + b * z : a * c - b * s, to + at, n);
        narrow(back ? b * e - a * s : b * e + a * z, to + SIDE + at, n);
    }
}

/* The first `heads` heads of tokens' numbers [count, stride], in place, by cos and sin [count, WIDTH]. */
void rotate(number *x, const float *cos, const float *sin, int64_t count, int64_t stride, int64_t heads) {
    PARALLEL(count * heads * WIDTH)
    for (int64_t i = 0; i < count; i++)
        for (int64_t h = 0; h < heads; h++) {
            number *own = x + i * stride + h * WIDTH;
            turn(own, own, cos + i * WIDTH, sin + i * WIDTH, 0);
        }
}

/* Gradients of queries [count, heads, WIDTH] and of keys and values [count, groups, WIDTH] to those of what was rotated,
   side by side. */
void rotate_back(const number *query, const number *key, const number *value, const float *cos, const float *sin,
                 number *to, int64_t count, int64_t heads, int64_t groups) {
    int64_t stride = (heads + 2 * groups) * WIDTH;
    PARALLEL(count * stride)
    for (int64_t i = 0; i < count; i++) {
        number *own = to + i * stride;
        const float *c = cos + i * WIDTH, *s = sin + i * WIDTH;
        for (int64_t h = 0; h < heads; h++, own += WIDTH) turn(query + (i * heads + h) * WIDTH, own, c, s, 1);
        for (int64_t h = 0; h < groups; h++, own += WIDTH) turn(key + (i * groups + h) * WIDTH, own, c, s, 1);
        memcpy(own, value + i * groups * WIDTH, groups * WIDTH * sizeof *own);
    }
}

/* Gates and what they let through, side by side [count, 2 · width], to silu(gate) · through. */
void gate(const number *both, number *out, int64_t count, int64_t width) {
    PARALLEL(count * width)
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < width; d += 16) {
            const number *own = both + 2 * i * width + d;
            lanes x = wide(own, width - d);
            narrow(x * sigmoid(x) * wide(own + width, width - d), out + i * width + d, width - d);
        }
}

/* The gradient of both, of that of what `gate` made; and what it made, again. */
void gate_back(const number *both, const number *grad, number *of_both, number *out, int64_t count, int64_t width) {
    PARALLEL(count * width)
    for (int64_t i = 0; i < count; i++)
        for (int64_t d = 0; d < width; d += 16) {
            int64_t at = 2 * i * width + d, left = width - d;
            lanes x = wide(both + at, left), through = wide(both + at + width, left), g = wide(grad + i * width + d, left);
            lanes s = sigmoid(x), open = x * s;
            narrow(open * through, out + i * width + d, left);
            narrow(g * through * s * (1.0f + x - open), of_both + at, left);
            narrow(g * open, of_both + at + width, left);
        }
}

/* x + more, `count` numbers. */
void add(const float *x, const number *more, float *to, int64_t count) {
    PARALLEL(count)
    for (int64_t i = 0; i < count; i += 16) {
        int left = count - i < 16 ? count - i : 16;
        put(some(x + i, left) + wide(more + i, left), to + i, left);
    }
}

/* Sums over tokens of x [count, width], whose rows are `stride` apart, by blocks of them: [blocks, width]. */
void sum(const number *x, float *to, int64_t count, int64_t width, int64_t stride) {
    PARALLEL(count * width)
    for (int64_t block = 0; block < (count + BLOCK - 1) / BLOCK; block++) {
        float *own = to + block * width;
        memset(own, 0, width * sizeof *own);
        int64_t end = (block + 1) * BLOCK < count ? (block + 1) * BLOCK : count;
        for (int64_t i = block * BLOCK; i < end; i++)
            for (int64_t d = 0; d < width; d += 16)
                put(some(own + d, width - d) + wide(x + i * stride + d, width - d), own + d, width - d);
    }
}
