/* The column loop and the search for ranges on uniform grids, in single precision with the roundings of the torch code beside it. */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { TILE = 32, LANES = 32, MOST = 4096 }; /* rows coded together; partial sums of an error; columns of a group */

static inline float held(float v, int stored)
{
    /* 0 float32, 1 bfloat16, 2 float16: to nearest, ties to even. */
    union { float f; uint32_t u; } x = {v};
    if (stored == 1) {
        uint32_t rounded = (x.u + 0x7FFFu + ((x.u >> 16) & 1)) & 0xFFFF0000u;
        x.u = (x.u & 0x7FFFFFFFu) > 0x7F800000u ? x.u : rounded;
        return x.f;
    }
    uint32_t rounded = (x.u + 0xFFFu + ((x.u >> 13) & 1)) & 0xFFFFE000u;
    float size = fabsf(v);
    float small = copysignf((size + 0.75f) - 0.75f, v); /* multiples of 2^-24 */
    x.u = rounded;
    float normal = fabsf(x.f) > 65504.0f ? copysignf(INFINITY, v) : x.f;
    float out = size < 6.103515625e-05f ? small : normal;
    return v != v ? v : out;
}

/* Codes columns start ... until - 1 and makes up for their errors in the columns up to stop.
 * rest, codes: (columns, rows); factor: (columns, columns); scale, zero: (groups, rows); group: of columns start, start + 1, ...;
 * errors: (columns from origin on, rows), divided by the factor's diagonal; scratch: (stop - start) * TILE. Rows first ... last - 1. */
void code_uniform(float *restrict rest, const float *restrict factor, const float *restrict scale, const float *restrict zero,
                  const int32_t *restrict group, uint8_t *restrict codes, float *restrict errors, int64_t columns, int64_t rows, int64_t first,
                  int64_t last, int64_t start, int64_t until, int64_t stop, int64_t origin, float top, int stored, float *restrict scratch)
{
    for (int64_t at = first; at < last; at += TILE) {
        int64_t here = last - at < TILE ? last - at : TILE;
        for (int64_t c = start; c < stop; c++) {
            float *to = scratch + (c - start) * TILE;
            memcpy(to, rest + c * rows + at, sizeof(float) * (size_t)here);
            for (int64_t r = here; r < TILE; r++)
                to[r] = 0;
        }
        for (int64_t c = start; c < until; c++) {
            const float *row = factor + c * columns;
            float *now = scratch + (c - start) * TILE;
            float s[TILE], z[TILE], code[TILE], error[TILE], diagonal = row[c];
            int64_t from = group[c - start] * rows + at;
            for (int64_t r = 0; r < TILE; r++)
                s[r] = 1, z[r] = 0;
            memcpy(s, scale + from, sizeof(float) * (size_t)here);
            memcpy(z, zero + from, sizeof(float) * (size_t)here);
            for (int r = 0; r < TILE; r++) {
                float v = rintf(now[r] / s[r]) + z[r];
                v = v < 0 ? 0 : v;
                code[r] = v > top ? top : v;
                error[r] = (code[r] - z[r]) * s[r];
            }
            if (stored)
                for (int r = 0; r < TILE; r++)
                    error[r] = held(error[r], stored);
            for (int r = 0; r < TILE; r++)
                error[r] = (now[r] - error[r]) / diagonal;
            for (int64_t r = 0; r < here; r++)
                codes[c * rows + at + r] = (uint8_t)code[r];
            memcpy(errors + (c - origin) * rows + at, error, sizeof(float) * (size_t)here);
            for (int64_t j = c + 1; j < stop; j++) {
                float *next = scratch + (j - start) * TILE, f = row[j];
                for (int r = 0; r < TILE; r++)
                    next[r] -= f * error[r];
            }
        }
        for (int64_t c = start; c < stop; c++)
            memcpy(rest + c * rows + at, scratch + (c - start) * TILE, sizeof(float) * (size_t)here);
    }
}

static inline float closer(float r, float square)
{
    float r2 = r * r;
    return r * (1.2f - 0.2f * (square * r2) * (r2 * r));
}

/* size^2.4 for size^2: size^2 (size^2)^(1/5), the root from its reciprocal by Newton's method. */
static inline float to_the_2_4(float square)
{
    square = square < 1e-30f ? 1e-30f : square;
    union { float f; int32_t i; } root = {square};
    root.i = (int32_t)(1.27795e9f - 0.2f * (float)root.i); /* within 3.3 % */
    float r = closer(closer(closer(root.f, square), square), square), r2 = r * r;
    return square * ((square * r2) * r2);
}

/* Adds |error|^2.4 of rounding LANES weights to nearest. */
static void add_errors(const float *restrict w, float scale, float zero, float top, float *restrict sum)
{
    for (int l = 0; l < LANES; l++) {
        float v = rintf(w[l] / scale) + zero;
        v = v < 0 ? 0 : v;
        v = v > top ? top : v;
        float d = (v - zero) * scale - w[l];
        sum[l] += to_the_2_4(d * d);
    }
}

/* For every group of `size` neighbouring weights the first of `steps` ranges under which rounding to nearest costs least, in sums of
 * |error|^2.4. weight: (groups, size); scale, zero: (steps, groups); best: (groups,). Groups first ... last - 1. Returns 1 if groups are too long. */
int least_range(const float *restrict weight, const float *restrict scale, const float *restrict zero, int32_t *restrict best, int64_t groups,
                int64_t size, int64_t first, int64_t last, int64_t steps, float top)
{
    if (size > MOST)
        return 1;
    float w[MOST];
    int64_t padded = (size + LANES - 1) / LANES * LANES;
    memset(w, 0, sizeof(w)); /* what is beyond the end is zero, which every range holds */
    for (int64_t g = first; g < last; g++) {
        memcpy(w, weight + g * size, sizeof(float) * (size_t)size);
        float least = INFINITY;
        best[g] = 0;
        for (int64_t i = 0; i < steps; i++) {
            float s = scale[i * groups + g], z = zero[i * groups + g], sum[LANES] = {0}, total = 0;
            for (int64_t k = 0; k < padded && !(total > least);) {
                int64_t end = k + 2 * LANES < padded ? k + 2 * LANES : padded;
                for (; k < end; k += LANES)
                    add_errors(w + k, s, z, top, sum);
                total = 0;
                for (int l = 0; l < LANES; l++)
                    total += sum[l];
            }
            if (total < least) {
                least = total;
                best[g] = (int32_t)i;
            }
        }
    }
    return 0;
}
