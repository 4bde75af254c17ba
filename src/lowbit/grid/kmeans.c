/* One-dimensional K-means on sorted values.
 *
 * With prefix sums the cost of putting values a ... b-1 into one cluster takes constant time, and the best last cut moves right
 * as the end moves right, so each layer of the dynamic program is solved by divide and conquer. Cuts are allowed at all ranks
 * (the global optimum) or at some, dense in the tails, after which Lloyd steps move them to where they belong. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef struct {
    const double *mass, *first, *second; /* prefix sums of weight, weight * x, weight * x^2 over the sorted values */
    const double *inverse;               /* 1 / n, for values of weight one; NULL with weights */
    const int32_t *rank;                 /* where cuts are allowed, ascending, from 0 to n */
    const double *before;                /* least cost of the layer below at each cut */
    double *cost;
    int32_t *from;
} layer;

static inline double spread(const layer *l, int32_t a, int32_t b)
{
    int32_t i = l->rank[a], j = l->rank[b];
    if (i == j)
        return 0;
    double s = l->first[j] - l->first[i];
    double inverse = l->inverse ? l->inverse[j - i] : 1 / (l->mass[j] - l->mass[i]);
    double c = l->second[j] - l->second[i] - s * s * inverse;
    return c > 0 ? c : 0;
}

static void solve(const layer *l, int32_t low, int32_t high, int32_t from, int32_t to)
{
    while (low <= high) {
        int32_t mid = (low + high) / 2, last = to < mid ? to : mid, best = from;
        double least = 1e300;
        for (int32_t a = from; a <= last; a++) {
            double c = l->before[a] + spread(l, a, mid);
            if (c < least) {
                least = c;
                best = a;
            }
        }
        l->cost[mid] = least;
        l->from[mid] = best;
        solve(l, low, mid - 1, from, best);
        low = mid + 1;
        from = best;
    }
}

static int32_t tail_dense(int32_t n, int32_t cuts, int32_t *rank)
{
    int32_t count = 0;
    for (int32_t m = 0; m <= cuts; m++) {
        double u = (double)m / cuts, v = u <= 0.5 ? u : 1 - u;
        double r = 0.5 * (2 * v) * (2 * v) * (2 * v) * n;
        int32_t at = (int32_t)(r + 0.5);
        if (at < m && u <= 0.5)
            at = m; /* the outermost values one by one */
        if (u > 0.5) {
            if (at < cuts - m)
                at = cuts - m;
            at = n - at;
        }
        if (at > n)
            at = n;
        if (at < 0)
            at = 0;
        if (!count || at > rank[count - 1])
            rank[count++] = at;
    }
    return count;
}

/* The number of different values, if it is at most k; those in levels. Else k + 1. */
static int distinct(const float *x, int32_t n, int k, float *levels)
{
    int count = 1;
    levels[0] = x[0];
    for (int32_t i = 1; i < n; i++)
        if (x[i] != x[i - 1]) {
            if (count == k)
                return k + 1;
            levels[count++] = x[i];
        }
    return count;
}

/* How many of the ascending x are <= limit, searched outwards from a guess: cuts move little from step to step. */
static int32_t not_above(const float *x, int32_t n, float limit, int32_t guess)
{
    int32_t low = guess, high = guess, stride = 1;
    while (low > 0 && x[low - 1] > limit) {
        high = low - 1;
        low = low > stride ? low - stride : 0;
        stride *= 2;
    }
    stride = 1;
    while (high < n && x[high] <= limit) {
        low = high + 1;
        high = n - high > stride ? high + stride : n;
        stride *= 2;
    }
    while (low < high) {
        int32_t mid = low + (high - low) / 2;
        if (x[mid] <= limit)
            low = mid + 1;
        else
            high = mid;
    }
    return low;
}

static double cluster(const layer *l, const int32_t *cut, int k, double *center)
{
    double total = 0;
    for (int c = 0; c < k; c++) {
        double mass = l->mass[cut[c + 1]] - l->mass[cut[c]], s = l->first[cut[c + 1]] - l->first[cut[c]];
        if (mass > 0) {
            center[c] = s / mass;
            total += l->second[cut[c + 1]] - l->second[cut[c]] - s * s / mass;
        }
    }
    return total > 0 ? total : 0;
}

/* x: (problems, n) ascending; weight: the same shape, positive, or NULL for ones. cuts: 0 for every rank.
 * levels: (problems, k) ascending; sse: (problems,), or NULL. Returns 0, 1 if memory ran out, 2 if a value is not finite. */
int kmeans_sorted(const float *x, const float *weight, int64_t problems, int32_t n, int k, int32_t cuts, int lloyd, float *levels, double *sse)
{
    int32_t most = cuts > 0 && cuts < n ? cuts : n;
    double *mass = malloc(sizeof(double) * ((size_t)n + 1) * 4);
    int32_t *rank = malloc(sizeof(int32_t) * ((size_t)most + 2) * ((size_t)k + 1));
    double *cost = malloc(sizeof(double) * ((size_t)most + 2) * 2);
    double *center = malloc(sizeof(double) * (size_t)k);
    int32_t *cut = malloc(sizeof(int32_t) * 2 * ((size_t)k + 1)), *moved = cut + k + 1;
    int failed = !mass || !rank || !cost || !center || !cut;
    if (!failed) {
        double *first = mass + n + 1, *second = first + n + 1, *inverse = second + n + 1;
        inverse[0] = 0;
        for (int32_t i = 1; i <= n; i++)
            inverse[i] = 1.0 / i;
        for (int32_t i = 0; i <= n; i++)
            mass[i] = i;
        int32_t *from = rank + most + 2;
        int32_t ends = 0;
        if (most == n) {
            for (int32_t i = 0; i <= n; i++)
                rank[i] = i;
            ends = n + 1;
        } else
            ends = tail_dense(n, most, rank);
        for (int64_t p = 0; p < problems; p++) {
            const float *row = x + p * n, *w = weight ? weight + p * n : NULL;
            float *out = levels + p * k;
            if (!isfinite(row[0]) || !isfinite(row[n - 1])) { /* sorted: what is not finite lies at an end */
                failed = 2;
                break;
            }
            int found = distinct(row, n, k, out);
            if (found <= k) {
                for (int c = found; c < k; c++)
                    out[c] = out[found - 1];
                if (sse)
                    sse[p] = 0;
                continue;
            }
            double shift = row[n / 2], a = 0, b = 0, whole = 0; /* sums of squares lose nothing to a common offset */
            mass[0] = first[0] = second[0] = 0;
            if (w)
                for (int32_t i = 0; i < n; i++) {
                    double v = row[i] - shift, m = w[i];
                    mass[i + 1] = whole += m;
                    first[i + 1] = a += m * v;
                    second[i + 1] = b += m * v * v;
                }
            else
                for (int32_t i = 0; i < n; i++) {
                    double v = row[i] - shift;
                    first[i + 1] = a += v;
                    second[i + 1] = b += v * v;
                }
            layer l = {mass, first, second, w ? NULL : inverse, rank, cost, cost + most + 2, from};
            double *below = cost, *here = cost + most + 2;
            l.before = below;
            for (int32_t b = 0; b < ends; b++)
                below[b] = spread(&l, 0, b);
            for (int t = 1; t < k; t++) {
                l.before = below;
                l.cost = here;
                l.from = from + (size_t)(t - 1) * (most + 2);
                solve(&l, t == k - 1 ? ends - 1 : 0, ends - 1, 0, ends - 1);
                double *swap = below;
                below = here;
                here = swap;
            }
            int32_t at = ends - 1;
            cut[k] = n;
            for (int t = k - 1; t >= 1; t--) {
                at = from[(size_t)(t - 1) * (most + 2) + at];
                cut[t] = rank[at];
            }
            cut[0] = 0;
            for (int c = 0; c < k; c++)
                center[c] = row[cut[c] < n ? cut[c] : n - 1] - shift;
            double error = cluster(&l, cut, k, center);
            for (int step = 0; step < lloyd; step++) {
                moved[0] = 0;
                moved[k] = n;
                for (int c = 1; c < k; c++)
                    moved[c] = not_above(row, n, (float)(0.5 * (center[c - 1] + center[c]) + shift), cut[c]);
                if (!memcmp(moved, cut, sizeof(int32_t) * ((size_t)k + 1)))
                    break;
                memcpy(cut, moved, sizeof(int32_t) * ((size_t)k + 1));
                error = cluster(&l, cut, k, center);
            }
            for (int c = 0; c < k; c++)
                out[c] = (float)(center[c] + shift);
            if (sse)
                sse[p] = error;
        }
    }
    free(mass);
    free(rank);
    free(cost);
    free(center);
    free(cut);
    return failed;
}

/* x: (problems, n); sorted: the same shape, ascending in every row, NaN at the ends. Returns 0, or 1 if memory ran out.
 * Radix sort of the bit patterns: as integers, with the sign bit flipped (and all bits of negative numbers), they lie in the
 * order of the numbers. */
int sort_rows(const float *x, int64_t problems, int32_t n, float *sorted)
{
    enum { DIGIT = 11, BINS = 1 << DIGIT };
    uint32_t *a = malloc(sizeof(uint32_t) * ((size_t)n * 2 + 3 * BINS)), *b = a + n, *count = b + n;
    if (!a)
        return 1;
    for (int64_t p = 0; p < problems; p++) {
        memcpy(a, x + p * n, sizeof(uint32_t) * (size_t)n);
        memset(count, 0, sizeof(uint32_t) * 3 * BINS);
        for (int32_t i = 0; i < n; i++) {
            uint32_t v = a[i] ^ ((uint32_t)((int32_t)a[i] >> 31) | 0x80000000u);
            a[i] = v;
            count[v & (BINS - 1)]++;
            count[BINS + (v >> DIGIT & (BINS - 1))]++;
            count[2 * BINS + (v >> 2 * DIGIT)]++;
        }
        for (int pass = 0; pass < 3; pass++) {
            uint32_t *at = count + pass * BINS, sum = 0;
            for (int bin = 0; bin < BINS; bin++) {
                uint32_t here = at[bin];
                at[bin] = sum;
                sum += here;
            }
            for (int32_t i = 0; i < n; i++)
                b[at[a[i] >> pass * DIGIT & (BINS - 1)]++] = a[i];
            uint32_t *swap = a;
            a = b;
            b = swap;
        }
        uint32_t *out = (uint32_t *)(sorted + p * n);
        for (int32_t i = 0; i < n; i++)
            out[i] = a[i] ^ ((uint32_t)((int32_t)~a[i] >> 31) | 0x80000000u);
    }
    free(a < b ? a : b);
    return 0;
}
