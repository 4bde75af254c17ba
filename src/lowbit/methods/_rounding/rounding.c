/* Soft rounding between two codes and a step of Adam on it, each in one pass over memory.
 *
 * weight = (code - zero + way * h(nu)) * scale - offset, h(nu) = clamp(1.2 / (1 + exp(-nu)) - 0.1, 0, 1), a row of weights having one
 * zero, scale and offset. Rows are shared out among threads; a row is computed the same way whoever does it, so results do not
 * depend on their number. Weights and gradients are float32, or bfloat16 as the upper halves of float32. */
#include <math.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

enum { MOST_THREADS = 64, STRETCH = 1024, LANES = 16 };

typedef struct {
    float *nu, *first, *second; /* first, second: Adam's moments */
    const uint8_t *code;
    const int8_t *way;
    const float *zero, *scale, *offset; /* by row; offset may be NULL */
    const void *gradient;
    void *out;
    float *sums; /* by row: sum of gradient * position, sum of gradient */
    int64_t length;
    int32_t half; /* gradient or out is bfloat16 */
    float size, root, beta1, beta2, epsilon;
} job;

static inline float from_bits(uint32_t bits)
{
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t bits_of(float x)
{
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

/* 1 / (1 + exp(-nu)). exp by 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; relative error below 2e-7. Beyond +-87 the result is
 * 1, or next to nothing, as it should be. */
static inline float sigmoid(float nu)
{
    float x = nu < -87.0f ? 87.0f : nu > 87.0f ? -87.0f : -nu;
    float n = floorf(x * 1.44269504f + 0.5f);
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return 1.0f / (1.0f + p * from_bits((uint32_t)((int32_t)n + 127) << 23));
}

static inline float rectified(float sigma)
{
    float h = 1.2f * sigma - 0.1f;
    return h < 0.0f ? 0.0f : h > 1.0f ? 1.0f : h;
}

static inline uint16_t rounded(float x) /* to bfloat16, ties to even */
{
    uint32_t bits = bits_of(x);
    return x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

static void soften(const job *j, int64_t from, int64_t to)
{
    for (int64_t row = from; row < to; row++) {
        int64_t at = row * j->length;
        const float *nu = j->nu + at;
        const uint8_t *code = j->code + at;
        const int8_t *way = j->way + at;
        float zero = j->zero[row], scale = j->scale[row], offset = j->offset ? j->offset[row] : 0.0f;
        if (j->half) {
            uint16_t *out = (uint16_t *)j->out + at;
            for (int64_t i = 0; i < j->length; i++)
                out[i] = rounded(((float)code[i] - zero + (float)way[i] * rectified(sigmoid(nu[i]))) * scale - offset);
        } else {
            float *out = (float *)j->out + at;
            for (int64_t i = 0; i < j->length; i++)
                out[i] = ((float)code[i] - zero + (float)way[i] * rectified(sigmoid(nu[i]))) * scale - offset;
        }
    }
}

/* The sum of x, in an order that vectors of any width keep. */
static float total(const float *x, int64_t count)
{
    float lanes[LANES] = {0}, sum = 0.0f;
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES)
        for (int k = 0; k < LANES; k++)
            lanes[k] += x[i + k];
    for (; i < count; i++)
        sum += x[i];
    for (int k = 0; k < LANES; k++)
        sum += lanes[k];
    return sum;
}

/* sigma(nu) and h(nu) for a stretch. On their own, or compilers would turn the clamp and the test whether it holds into branches. */
__attribute__((noinline)) static void bend(int64_t count, const float *restrict nu, float *restrict sigma, float *restrict h)
{
    for (int64_t i = 0; i < count; i++) {
        sigma[i] = sigmoid(nu[i]);
        h[i] = rectified(sigma[i]);
    }
}

/* Not inlined: the compiler then knows that nothing overlaps. Writes each weight's share of the gradient by the scale over h. */
__attribute__((noinline)) static void move(
    int64_t count, const float *restrict gradient, const uint8_t *restrict code, const int8_t *restrict way, float zero, float scale,
    float size, float root, float keep1, float beta2, float keep2, float epsilon,
    float *restrict nu, float *restrict first, float *restrict second, const float *restrict sigma, float *restrict h)
{
    for (int64_t i = 0; i < count; i++) {
        float g = gradient[i], w = (float)way[i];
        float by_nu = g * scale * w * (1.2f * sigma[i] * (1.0f - sigma[i]));
        by_nu = (h[i] > 0.0f) & (h[i] < 1.0f) ? by_nu : 0.0f;
        float m = first[i] + (by_nu - first[i]) * keep1;
        float s = second[i] * beta2 + by_nu * by_nu * keep2;
        h[i] = g * ((float)code[i] - zero + w * h[i]);
        first[i] = m;
        second[i] = s;
        nu[i] -= size * m / (sqrtf(s) * root + epsilon);
    }
}

static void widen(const uint16_t *restrict half, float *restrict wide, int64_t count)
{
    for (int64_t i = 0; i < count; i++)
        wide[i] = from_bits((uint32_t)half[i] << 16);
}

static void descend(const job *j, int64_t from, int64_t to)
{
    float wide[STRETCH], sigma[STRETCH], h[STRETCH];
    for (int64_t row = from; row < to; row++) {
        float *sums = j->sums + 2 * row;
        sums[0] = sums[1] = 0.0f;
        for (int64_t start = 0; start < j->length; start += STRETCH) {
            int64_t at = row * j->length + start, left = j->length - start, count = left < STRETCH ? left : STRETCH;
            const float *gradient = wide;
            if (j->half)
                widen((const uint16_t *)j->gradient + at, wide, count);
            else
                gradient = (const float *)j->gradient + at;
            bend(count, j->nu + at, sigma, h);
            move(count, gradient, j->code + at, j->way + at, j->zero[row], j->scale[row], j->size, j->root, 1.0f - j->beta1, j->beta2,
                 1.0f - j->beta2, j->epsilon, j->nu + at, j->first + at, j->second + at, sigma, h);
            sums[0] += total(h, count);
            sums[1] += total(gradient, count);
        }
    }
}

typedef void work(const job *, int64_t, int64_t);

/* Entries of the OpenMP runtime the program already runs, or NULLs. Its idle threads spin for a while before they sleep, so threads
 * of our own would compete with them for the processors. */
typedef struct {
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel */
    int (*number)(void);                                            /* omp_get_thread_num */
    int (*count)(void);                                             /* omp_get_num_threads */
} team;

typedef struct {
    work *what;
    const job *of;
    const team *by;
    int64_t rows, part, parts;
} share;

static void *do_share(void *given)
{
    const share *s = given;
    s->what(s->of, s->rows * s->part / s->parts, s->rows * (s->part + 1) / s->parts);
    return NULL;
}

static void do_part(void *given)
{
    share s = *(const share *)given;
    s.part = s.by->number();
    s.parts = s.by->count();
    do_share(&s);
}

/* A thread that cannot be had is no failure: its share is done here. */
static void in_threads(share all)
{
    share shares[MOST_THREADS];
    pthread_t ids[MOST_THREADS];
    int running[MOST_THREADS];
    for (int64_t i = 0; i < all.parts; i++) {
        shares[i] = all;
        shares[i].part = i;
        running[i] = i && !pthread_create(&ids[i], NULL, do_share, &shares[i]);
    }
    for (int64_t i = 0; i < all.parts; i++)
        if (!running[i])
            do_share(&shares[i]);
    for (int64_t i = 0; i < all.parts; i++)
        if (running[i])
            pthread_join(ids[i], NULL);
}

static void shared_out(work *what, const job *of, int64_t rows, int64_t threads, const team *by)
{
    int64_t most = rows < MOST_THREADS ? rows : MOST_THREADS;
    share all = {what, of, by, rows, 0, threads < most ? threads : most};
    if (all.parts <= 1)
        what(of, 0, rows);
    else if (by->parallel)
        by->parallel(do_part, &all, (unsigned)all.parts, 0);
    else
        in_threads(all);
}

void rounding_weights(const job *j, int64_t rows, int64_t threads, const team *by) { shared_out(soften, j, rows, threads, by); }

void rounding_descend(const job *j, int64_t rows, int64_t threads, const team *by) { shared_out(descend, j, rows, threads, by); }
