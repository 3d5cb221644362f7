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
#define TURNS ((SIDE + 15) / 16)

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

/* A head's numbers, those that are turned by cosines and sines of one angle in one lane; zeros behind SIDE. */
struct head {
    lanes low[TURNS], high[TURNS];
};

INLINE void take(const number *from, struct head *x) {
    EACH(d, TURNS) x->low[d] = wide(from + 16 * d, SIDE - 16 * d), x->high[d] = wide(from + SIDE + 16 * d, SIDE - 16 * d);
}

INLINE void give(const struct head *x, number *to) {
    EACH(d, TURNS) narrow(x->low[d], to + 16 * d, SIDE - 16 * d), narrow(x->high[d], to + SIDE + 16 * d, SIDE - 16 * d);
}

/* By a token's cos and sin [WIDTH], or, with `back`, the gradient of that. */
INLINE void turn(struct head *x, const float *cos, const float *sin, const int back) {
    EACH(d, TURNS) {
        int at = 16 * d, n = SIDE - at;
        lanes a = x->low[d], b = x->high[d];
        lanes c = some(cos + at, n), e = some(cos + SIDE + at, n), s = some(sin + at, n), z = some(sin + SIDE + at, n);
        x->low[d] = back ? a * c + b * z : a * c - b * s;
        x->high[d] = back ? b * e - a * s : b * e + a * z;
    }
}

/* The sum of products of two heads' numbers. */
INLINE float dot(const struct head *x, const struct head *y) {
    lanes sum = {0};
    EACH(d, TURNS) sum += x->low[d] * y->low[d] + x->high[d] * y->high[d];
    return total(sum);
}

/* To weight · x / its root mean square, where there is a weight [WIDTH]. */
INLINE void normed(struct head *x, const float *weight, float eps) {
    if (!weight) return;
    float r = 1.0f / sqrtf(dot(x, x) / WIDTH + eps);
    EACH(d, TURNS) {
        x->low[d] *= r * some(weight + 16 * d, SIDE - 16 * d);
        x->high[d] *= r * some(weight + SIDE + 16 * d, SIDE - 16 * d);
    }
}

/* Of the gradient of what `normed` made of x that of x; the weight's is added to `of_weight`. */
INLINE void normed_back(struct head *grad, const number *from, const float *weight, float eps, float *of_weight) {
    if (!weight) return;
    struct head x;
    take(from, &x);
    float r = 1.0f / sqrtf(dot(&x, &x) / WIDTH + eps);
    EACH(d, TURNS) {
        int at = 16 * d, n = SIDE - at;
        x.low[d] *= r, x.high[d] *= r;
        put(some(of_weight + at, n) + grad->low[d] * x.low[d], of_weight + at, n);
        put(some(of_weight + SIDE + at, n) + grad->high[d] * x.high[d], of_weight + SIDE + at, n);
        grad->low[d] *= some(weight + at, n), grad->high[d] *= some(weight + SIDE + at, n);
    }
    float slope = dot(grad, &x) / WIDTH;
    EACH(d, TURNS) grad->low[d] = (grad->low[d] - slope * x.low[d]) * r, grad->high[d] = (grad->high[d] - slope * x.high[d]) * r;
}

/* The first heads of tokens' numbers, `stride` from token to token: `heads` of queries and `groups` of keys, by cos and sin
   [count, WIDTH]. With norms' weights of queries and of keys, which may be NULL. To `to`, which may be where they are. */
void rotate(const number *x, const float *cos, const float *sin, const float *query, const float *key, number *to,
            int64_t count, int64_t stride, int64_t to_stride, int64_t heads, int64_t groups, float eps) {
    PARALLEL(count * (heads + groups) * WIDTH)
    for (int64_t i = 0; i < count; i++)
        for (int64_t h = 0; h < heads + groups; h++) {
            struct head own;
            take(x + i * stride + h * WIDTH, &own);
            normed(&own, h < heads ? query : key, eps);
            turn(&own, cos + i * WIDTH, sin + i * WIDTH, 0);
            give(&own, to + i * to_stride + h * WIDTH);
        }
}

/* Gradients of queries [count, heads, WIDTH] and of keys and values [count, groups, WIDTH] to those of what was rotated, `x`,
   side by side; by blocks of tokens those of the norms' weights, [blocks, 2, WIDTH]. */
void rotate_back(const number *of_query, const number *of_key, const number *of_value, const float *cos, const float *sin,
                 const number *x, const float *query, const float *key, number *to, float *of_weights, int64_t count,
                 int64_t heads, int64_t groups, float eps) {
    int64_t stride = (heads + 2 * groups) * WIDTH;
    PARALLEL(count * stride)
    for (int64_t block = 0; block < (count + BLOCK - 1) / BLOCK; block++) {
        float none[1], *sums = query ? of_weights + block * 2 * WIDTH : none;
        if (query) memset(sums, 0, 2 * WIDTH * sizeof *sums);
        int64_t end = (block + 1) * BLOCK < count ? (block + 1) * BLOCK : count;
        for (int64_t i = block * BLOCK; i < end; i++) {
            for (int64_t h = 0; h < heads + groups; h++) {
                const int asks = h < heads;
                struct head own;
                take(asks ? of_query + (i * heads + h) * WIDTH : of_key + (i * groups + h - heads) * WIDTH, &own);
                turn(&own, cos + i * WIDTH, sin + i * WIDTH, 1);
                normed_back(&own, x + i * stride + h * WIDTH, asks ? query : key, eps, asks || !query ? sums : sums + WIDTH);
                give(&own, to + i * stride + h * WIDTH);
            }
            memcpy(to + i * stride + (heads + groups) * WIDTH, of_value + i * groups * WIDTH, groups * WIDTH * sizeof *to);
        }
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
