/* Focal loss and its gradient over a grid of float32 logits: one pass, no temporaries.
 *
 * Every location is computed by the same sequence of operations wherever it lies and however many
 * threads run: contraction is off, fused operations are spelled out, and each row is summed over its
 * classes in order. So equal inputs give equal bits.
 */

#include <math.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#define MAX_CELLS 8192 /* cells of a task at most: their sums stay in the first-level cache */
#define LANES 16       /* sums kept side by side where the classes of a cell lie side by side */
#define MAX_THREADS 64
#define IGNORED (-2)
/* A call left in a loop keeps the compiler from computing cells side by side, and after a few uses it
 * leaves calls unless told. */
#define INLINE static inline __attribute__((always_inline))

typedef struct {
    const float *logits;      /* [batch, classes, cells], by the strides below */
    const int32_t *labels;    /* [batch, cells]: a class, -1 for background, IGNORED to take no part */
    float *gradient;          /* like logits, or NULL */
    float *rows;              /* [batch, cells]: the loss of each location */
    int64_t batch, classes, cells;
    int64_t logits_batch_stride, logits_class_stride, logits_cell_stride;
    int64_t gradient_batch_stride, gradient_class_stride, gradient_cell_stride;
    int64_t cells_of_task;    /* at most MAX_CELLS */
    double negative_weight, positive_weight;
    const double *scale;      /* what the gradient is multiplied by; only read with a gradient */
    int32_t gamma;            /* 0..4 */
} focal_problem;

/* Numbers named `x` and `x_low` stand for x + x_low: a float, and what rounding took from it. */

/* e^-a for a >= 0 (Cody and Waite); 0 where it would be subnormal. */
INLINE float exp_of_minus(float a, float *low) {
    float x = a > 87.0f ? -87.0f : -a;
    float k = rintf(x * 1.44269504f);
    float r = fmaf(k, -0.693145751953125f, x);
    r = fmaf(k, -1.42860677e-6f, r);
    float q = 0.000198909911f;
    q = fmaf(q, r, 0.00139336498f);
    q = fmaf(q, r, 0.00833331048f);
    q = fmaf(q, r, 0.0416664667f);
    q = fmaf(q, r, 0.166666672f);
    q = fmaf(q, r, 0.5f);
    float less_one = fmaf(r * r, q, r);
    float power = 1.0f + less_one;
    float power_low = (1.0f - power) + less_one;
    int32_t bits = ((int32_t)k + 127) << 23;
    float two_to_k;
    memcpy(&two_to_k, &bits, sizeof two_to_k);
    two_to_k = a > 87.0f ? 0.0f : two_to_k;
    *low = power_low * two_to_k;
    return power * two_to_k;
}

/* log(1 + e) for e in 0..1: e times a polynomial, so that small e keep their digits. */
INLINE float log_of_one_plus(float e) {
    float q = -0.00317605701f;
    q = fmaf(q, e, 0.0195425265f);
    q = fmaf(q, e, -0.0563736111f);
    q = fmaf(q, e, 0.105436236f);
    q = fmaf(q, e, -0.152696669f);
    q = fmaf(q, e, 0.196632743f);
    q = fmaf(q, e, -0.249516159f);
    q = fmaf(q, e, 0.333297104f);
    q = fmaf(q, e, -0.499998927f);
    return fmaf(e * q, e, e);
}

INLINE void multiply(float *power, float *power_low, float p, float p_low) {
    float product = *power * p;
    float left_out = fmaf(*power, p, -product);
    *power_low = fmaf(*power, p_low, fmaf(*power_low, p, left_out));
    *power = product;
}

/* p^gamma for gamma in 0..4, by multiplications, which lose less than a logarithm would. Not a loop:
 * the compiler would not unroll it in time to compute cells side by side. */
INLINE float power_of(float p, float p_low, int gamma, float *low) {
    float power = 1.0f;
    *low = 0.0f;
    if (gamma > 0) multiply(&power, low, p, p_low);
    if (gamma > 1) multiply(&power, low, p, p_low);
    if (gamma > 2) multiply(&power, low, p, p_low);
    if (gamma > 3) multiply(&power, low, p, p_low);
    return power;
}

/* f(z) = sigmoid(z)^gamma * softplus(z), and its derivative.
 *
 * What rounding takes from e, from 1 / (1 + e) and from the power is carried along: each enters the
 * result more than once, and their errors would add up. */
INLINE float focal_terms(float z, int gamma, float *slope) {
    float e_low, e = exp_of_minus(fabsf(z), &e_low);
    float guess = 1.0f / (1.0f + e);
    /* A step of Newton's, with e itself: 1 + e was rounded. */
    float step = guess * fmaf(-guess, e_low, fmaf(-guess, e, 1.0f - guess));
    float large = guess + step;
    float large_low = (guess - large) + step;
    float small = e * large;
    float small_low = fmaf(e, large, -small) + fmaf(e_low, large, e * large_low);
    float softplus = log_of_one_plus(e) + (z > 0.0f ? z : 0.0f);
    float p = z >= 0.0f ? large : small;
    float p_low = z >= 0.0f ? large_low : small_low;
    float q = z >= 0.0f ? small : large;
    float power_low, power = power_of(p, p_low, gamma, &power_low);
    float share = fmaf((float)gamma * q, softplus, p);
    *slope = fmaf(share, power, share * power_low);
    return fmaf(softplus, power, softplus * power_low);
}

/* Cells side by side in memory: classes one after the other, each over all cells. */
INLINE void cells_together(
    const focal_problem *p, int64_t image, int64_t cell, int64_t count, int gamma, int with_gradient)
{
    const int32_t *restrict labels = p->labels + image * p->cells + cell;
    float *restrict rows = p->rows + image * p->cells + cell;
    const float negative = p->negative_weight, positive = p->positive_weight;
    const double negative_slope = with_gradient ? p->negative_weight * *p->scale : 0;
    const double positive_slope = with_gradient ? -p->positive_weight * *p->scale : 0; /* by x, which is -z */
    const float negative_high = negative_slope, negative_low = negative_slope - negative_high;
    const float positive_high = positive_slope, positive_low = positive_slope - positive_high;
    float sums[MAX_CELLS];
    for (int64_t s = 0; s < count; s++) sums[s] = 0.0f;
    for (int64_t c = 0; c < p->classes; c++) {
        const float *restrict x = p->logits + image * p->logits_batch_stride + c * p->logits_class_stride + cell;
        float *restrict g =
            with_gradient ? p->gradient + image * p->gradient_batch_stride + c * p->gradient_class_stride + cell : 0;
        for (int64_t s = 0; s < count; s++) {
            int own = labels[s] == (int32_t)c;
            float slope, loss = focal_terms(own ? -x[s] : x[s], gamma, &slope);
            sums[s] += (own ? positive : negative) * loss;
            if (with_gradient) {
                float high = own ? positive_high : negative_high;
                float low = own ? positive_low : negative_low;
                float scaled = fmaf(slope, high, slope * low);
                g[s] = labels[s] > IGNORED ? scaled : 0.0f;
            }
        }
    }
    for (int64_t s = 0; s < count; s++) rows[s] = labels[s] > IGNORED ? sums[s] : 0.0f;
}

/* Classes side by side in memory: cells one after the other, each over all classes. */
INLINE void classes_together(
    const focal_problem *p, int64_t image, int64_t cell, int64_t count, int gamma, int with_gradient)
{
    const float negative = p->negative_weight, positive = p->positive_weight;
    const double negative_slope = with_gradient ? p->negative_weight * *p->scale : 0;
    const double positive_slope = with_gradient ? -p->positive_weight * *p->scale : 0; /* by x, which is -z */
    const float negative_high = negative_slope, negative_low = negative_slope - negative_high;
    const float positive_high = positive_slope, positive_low = positive_slope - positive_high;
    for (int64_t s = cell; s < cell + count; s++) {
        int32_t label = p->labels[image * p->cells + s];
        const float *restrict x = p->logits + image * p->logits_batch_stride + s * p->logits_cell_stride;
        float *restrict g =
            with_gradient ? p->gradient + image * p->gradient_batch_stride + s * p->gradient_cell_stride : 0;
        float sums[LANES] = {0};
        for (int64_t first = 0; first < p->classes; first += LANES) {
            int64_t lanes = p->classes - first < LANES ? p->classes - first : LANES;
            for (int64_t lane = 0; lane < lanes; lane++) {
                int64_t c = first + lane;
                int own = label == (int32_t)c;
                float slope, loss = focal_terms(own ? -x[c] : x[c], gamma, &slope);
                sums[lane] += (own ? positive : negative) * loss;
                if (with_gradient) {
                    float high = own ? positive_high : negative_high;
                    float low = own ? positive_low : negative_low;
                    float scaled = fmaf(slope, high, slope * low);
                    g[c] = label > IGNORED ? scaled : 0.0f;
                }
            }
        }
        float sum = 0.0f;
        for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
        p->rows[image * p->cells + s] = label > IGNORED ? sum : 0.0f;
    }
}

INLINE void task_of_gamma(
    const focal_problem *p, int64_t image, int64_t cell, int64_t count, int gamma)
{
    if (p->logits_cell_stride == 1) {
        if (p->gradient) cells_together(p, image, cell, count, gamma, 1);
        else cells_together(p, image, cell, count, gamma, 0);
    } else {
        if (p->gradient) classes_together(p, image, cell, count, gamma, 1);
        else classes_together(p, image, cell, count, gamma, 0);
    }
}

typedef struct {
    const focal_problem *problem;
    atomic_int_fast64_t next_task;
} focal_work;

static void *take_tasks(void *argument) {
    focal_work *work = argument;
    const focal_problem *p = work->problem;
    int64_t tasks_of_image = (p->cells + p->cells_of_task - 1) / p->cells_of_task;
#if defined(__SSE__)
    /* Subnormal numbers cost a hundred times as much, and mean nothing in a loss. */
    unsigned int mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
#endif
    for (;;) {
        int64_t task = atomic_fetch_add(&work->next_task, 1);
        if (task >= p->batch * tasks_of_image) break;
        int64_t image = task / tasks_of_image, cell = task % tasks_of_image * p->cells_of_task;
        int64_t count = p->cells - cell < p->cells_of_task ? p->cells - cell : p->cells_of_task;
        switch (p->gamma) { /* each with a constant of its own to be compiled for */
            case 0: task_of_gamma(p, image, cell, count, 0); break;
            case 1: task_of_gamma(p, image, cell, count, 1); break;
            case 2: task_of_gamma(p, image, cell, count, 2); break;
            case 3: task_of_gamma(p, image, cell, count, 3); break;
            default: task_of_gamma(p, image, cell, count, 4);
        }
    }
#if defined(__SSE__)
    _mm_setcsr(mode);
#endif
    return 0;
}

/* Evaluates a problem with the calling thread and up to `threads - 1` more.
 *
 * Threads are made for the call: there is no pool to spin, to starve, or to be lost in a fork. */
void lossd_focal(const focal_problem *problem, int threads) {
    focal_work work = {.problem = problem, .next_task = 0};
    pthread_t helpers[MAX_THREADS];
    int made = 0;
    while (made < threads - 1 && made < MAX_THREADS && !pthread_create(&helpers[made], 0, take_tasks, &work)) made++;
    take_tasks(&work);
    while (made) pthread_join(helpers[--made], 0);
}
