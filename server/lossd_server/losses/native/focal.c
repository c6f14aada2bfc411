/* Focal loss and its gradient over grids of logits: one pass, no temporaries beyond the first-level cache.
 *
 * Every logit is computed by the same sequence of operations wherever it lies and however many threads
 * run: contraction is off, fused operations are spelled out, each row is summed over its classes in
 * order, and tasks are cut without regard to threads. So equal inputs give equal bits.
 */

#include <pthread.h>
#include <stdatomic.h>
#if defined(__SSE__)
#include <xmmintrin.h>
#endif

#include "arithmetic.h"

#define BLOCK 512          /* logits of a line that are computed together */
#define CELLS_OF_TASK 1024 /* native/focal.py counts tasks by the same number */
#define LANES 8            /* sums side by side where a line is one cell's */
#define MAX_THREADS 64
#define IGNORED (-2)
#define FEW 4              /* below one cell in so many, cells that take part are picked out */

typedef struct {
    const void *logits;     /* [batch, classes, cells], by the strides below */
    void *gradient;         /* like logits, or NULL */
    const int64_t *labels;  /* [batch, cells]: a class, or negative without an object */
    const uint8_t *ignored; /* [batch, cells]: what is no background either, or NULL */
    float *rows;            /* [batch, cells]: the loss of each cell, or NULL */
    double *sums;           /* of each task */
    int64_t batch, classes, cells;
    int64_t logits_batch_stride, logits_class_stride, logits_cell_stride;
    int64_t gradient_batch_stride, gradient_class_stride, gradient_cell_stride;
    int64_t labels_batch_stride, ignored_batch_stride;
    const double *scale;    /* what the gradient is multiplied by; only read with a gradient */
    int32_t logits_type, gradient_type;
    int32_t background;     /* whether a cell without an object is a negative of every class */
} focal_grid;

typedef struct {
    double negative_weight, positive_weight;
    int32_t gamma; /* 0..4 */
} focal_constants;

INLINE void multiply(float *power, float *power_low, float p, float p_low) {
    float product = *power * p;
    float left_out = fmaf(*power, p, -product);
    *power_low = fmaf(*power, p_low, fmaf(*power_low, p, left_out));
    *power = product;
}

/* p^gamma for gamma in 0..4, by multiplications, which lose less than a logarithm would. Not a loop:
 * the compiler would not unroll it in time to compute logits side by side. */
INLINE float power_of(float p, float p_low, int gamma, float *low) {
    float power = gamma ? p : 1.0f;
    *low = gamma ? p_low : 0.0f;
    if (gamma > 1) multiply(&power, low, p, p_low);
    if (gamma > 2) multiply(&power, low, p, p_low);
    if (gamma > 3) multiply(&power, low, p, p_low);
    return power;
}

/* f(z) = sigmoid(z)^gamma * softplus(z), and its derivative, from e = exp(-|z|).
 *
 * What rounding takes from e, from 1 / (1 + e) and from the power is carried along: each enters the
 * result more than once, and their errors would add up. */
INLINE float focal_terms(float z, float e, float e_low, int gamma, float *slope) {
    float large = 1.0f / (1.0f + e);
    /* A step of Newton's, with e itself: 1 + e was rounded. */
    float large_low = large * fmaf(-large, e_low, fmaf(-large, e, 1.0f - large));
    float small = e * large;
    float small_low = fmaf(e, large_low, fmaf(e_low, large, fmaf(e, large, -small)));
    float softplus = log_of_one_plus(e) + (z > 0.0f ? z : 0.0f);
    float p = z >= 0.0f ? large : small;
    float p_low = z >= 0.0f ? large_low : small_low;
    float q = z >= 0.0f ? small : large;
    float power_low, power = power_of(p, p_low, gamma, &power_low);
    float share = fmaf((float)gamma * q, softplus, p);
    *slope = fmaf(share, power, share * power_low);
    return fmaf(softplus, power, softplus * power_low);
}

/* The losses of up to BLOCK logits taken for negatives of weight 1, and their slopes times a factor.
 *
 * In two passes over the block: in one, each step waits for the one before, and the processor cannot
 * look far enough ahead to find other work. */
INLINE void line_of_negatives(
    const float *restrict z, int64_t n, int gamma, float *restrict losses, float *restrict slopes, factor by)
{
    float e[BLOCK], e_low[BLOCK];
    for (int64_t i = 0; i < n; i++) e[i] = exp_of_minus(fabsf(z[i]), &e_low[i]);
    for (int64_t i = 0; i < n; i++) {
        float slope;
        losses[i] = focal_terms(z[i], e[i], e_low[i], gamma, &slope);
        if (slopes) slopes[i] = fmaf(slope, by.high, slope * by.low);
    }
}

/* The cells of a task. Those that are computed are numbered 0..count-1: all of them, or where few take
 * part only those, and then `places` says where they lie. */
typedef struct {
    const focal_grid *grid;
    const char *logits; /* of the task's first cell */
    char *gradient;
    int64_t cells, count, idle_count;
    const int32_t *places;         /* NULL for all cells */
    int32_t labels[CELLS_OF_TASK]; /* of what is computed: a class, -1 or IGNORED */
    int32_t sorted[CELLS_OF_TASK]; /* first the cells that take part, in order, then the idle ones */
    const int32_t *idle;
    float sums[CELLS_OF_TASK];     /* over all classes but the cell's own, unweighted */
    float own[CELLS_OF_TASK];      /* loss of the cell's own class, unweighted */
} focal_task;

INLINE const char *logits_at(const focal_task *t, int64_t class, int64_t cell) {
    const focal_grid *g = t->grid;
    return t->logits + (class * g->logits_class_stride + cell * g->logits_cell_stride) * size_of(g->logits_type);
}

INLINE char *gradient_at(const focal_task *t, int64_t class, int64_t cell) {
    const focal_grid *g = t->grid;
    return t->gradient
         + (class * g->gradient_class_stride + cell * g->gradient_cell_stride) * size_of(g->gradient_type);
}

/* Computes one line of logits, read and written where they lie if they are side by side in float32. */
INLINE void line_of_task(
    const char *logits, int type, int64_t stride, char *gradient, int gradient_type, int64_t gradient_stride,
    const int32_t *places, int64_t n, int gamma, float *losses, factor by)
{
    float read[BLOCK], slopes[BLOCK];
    int read_in_place = type == FLOAT32 && stride == 1 && !places;
    int write_in_place = gradient_type == FLOAT32 && gradient_stride == 1 && !places;
    if (!read_in_place) read_line(logits, type, stride, places, n, read);
    const float *z = read_in_place ? (const float *)logits : read;
    if (!gradient) {
        line_of_negatives(z, n, gamma, losses, 0, by);
    } else {
        line_of_negatives(z, n, gamma, losses, write_in_place ? (float *)gradient : slopes, by);
        if (!write_in_place) write_line(gradient, gradient_type, gradient_stride, places, n, slopes);
    }
}

/* All classes of the task's cells, each class in lines over the cells. */
INLINE void lines_of_cells(focal_task *t, int gamma, factor by) {
    const focal_grid *g = t->grid;
    float losses[BLOCK];
    for (int64_t c = 0; c < g->classes; c++) {
        for (int64_t first = 0; first < t->count; first += BLOCK) {
            int64_t n = t->count - first < BLOCK ? t->count - first : BLOCK;
            int64_t cell = t->places ? 0 : first;
            int32_t class = c; /* as wide as a label, so that they compare side by side */
            line_of_task(
                logits_at(t, c, cell), g->logits_type, g->logits_cell_stride,
                t->gradient ? gradient_at(t, c, cell) : 0, g->gradient_type, g->gradient_cell_stride,
                t->places ? t->places + first : 0, n, gamma, losses, by);
            for (int64_t i = 0; i < n; i++) t->sums[first + i] += t->labels[first + i] == class ? 0.0f : losses[i];
        }
    }
}

/* The same, each cell in lines over its classes. */
INLINE void lines_of_classes(focal_task *t, int gamma, factor by) {
    const focal_grid *g = t->grid;
    float losses[BLOCK];
    for (int64_t i = 0; i < t->count; i++) {
        int64_t cell = t->places ? t->places[i] : i;
        float lanes[LANES] = {0};
        for (int64_t first = 0; first < g->classes; first += BLOCK) {
            int64_t n = g->classes - first < BLOCK ? g->classes - first : BLOCK;
            line_of_task(
                logits_at(t, first, cell), g->logits_type, g->logits_class_stride,
                t->gradient ? gradient_at(t, first, cell) : 0, g->gradient_type, g->gradient_class_stride,
                0, n, gamma, losses, by);
            if (t->labels[i] >= first && t->labels[i] < first + n) losses[t->labels[i] - first] = 0.0f;
            for (int64_t j = n; j % LANES; j++) losses[j] = 0.0f;
            for (int64_t j = 0; j < n; j += LANES)
                for (int lane = 0; lane < LANES; lane++) lanes[lane] += losses[j + lane];
        }
        for (int lane = 0; lane < LANES; lane++) t->sums[i] += lanes[lane];
    }
}

/* The logit of each cell's own class: the loss of a positive with logit x is that of a negative with -x. */
INLINE void own_classes(focal_task *t, int gamma, factor by) {
    const focal_grid *g = t->grid;
    float z[BLOCK], losses[BLOCK], slopes[BLOCK];
    for (int64_t first = 0; first < t->count; first += BLOCK) {
        int64_t n = t->count - first < BLOCK ? t->count - first : BLOCK;
        for (int64_t i = 0; i < n; i++) {
            int32_t label = t->labels[first + i];
            int64_t cell = t->places ? t->places[first + i] : first + i;
            z[i] = 0.0f;
            if (label >= 0) z[i] = -number_at(logits_at(t, label, cell), g->logits_type, 0);
        }
        line_of_negatives(z, n, gamma, losses, slopes, by);
        for (int64_t i = 0; i < n; i++) {
            int32_t label = t->labels[first + i];
            int64_t cell = t->places ? t->places[first + i] : first + i;
            t->own[first + i] = label >= 0 ? losses[i] : 0.0f;
            if (label >= 0 && t->gradient) set_number_at(gradient_at(t, label, cell), g->gradient_type, 0, slopes[i]);
        }
    }
}

/* Reads the labels of the task's cells, and decides which of them to compute. */
static void choose_cells(focal_task *t, int64_t image, int64_t cell) {
    const focal_grid *g = t->grid;
    const int64_t *labels = g->labels + image * g->labels_batch_stride + cell;
    const uint8_t *ignored = g->ignored ? g->ignored + image * g->ignored_batch_stride + cell : 0;
    int32_t *idle = t->sorted + t->cells;
    t->idle_count = 0;
    for (int64_t s = 0; s < t->cells; s++) {
        int background = g->background && !(ignored && ignored[s]);
        t->labels[s] = labels[s] >= 0 ? labels[s] : background ? -1 : IGNORED;
        if (t->labels[s] == IGNORED) idle[-++t->idle_count] = s;
        else t->sorted[s - t->idle_count] = s;
    }
    t->idle = idle - t->idle_count;
    int few = (t->cells - t->idle_count) * FEW < t->cells;
    t->places = few ? t->sorted : 0;
    t->count = few ? t->cells - t->idle_count : t->cells;
    for (int64_t i = 0; few && i < t->count; i++) t->labels[i] = t->labels[t->sorted[i]];
}

/* Zeros in the gradient of every cell that takes no part, whether or not it was computed. */
static void clear_idle_cells(const focal_task *t) {
    const focal_grid *g = t->grid;
    for (int64_t c = 0; c < g->classes; c++)
        for (int64_t i = 0; i < t->idle_count; i++)
            set_number_at(gradient_at(t, c, t->idle[i]), g->gradient_type, 0, 0.0f);
}

/* Weighs and adds up the sums of the task's cells, and returns their total. */
static double finish_rows(const focal_task *t, const focal_constants *constants, float *rows) {
    double total = 0;
    if (rows && t->places) memset(rows, 0, t->cells * sizeof *rows);
    for (int64_t i = 0; i < t->count; i++) {
        double row = constants->negative_weight * t->sums[i] + constants->positive_weight * t->own[i];
        if (t->labels[i] == IGNORED) row = 0;
        if (rows) rows[t->places ? t->places[i] : i] = row;
        total += row;
    }
    return total;
}

INLINE void lines_of_gamma(focal_task *t, int gamma, factor negative, factor positive) {
    const focal_grid *g = t->grid;
    if (g->logits_class_stride == 1 && g->logits_cell_stride != 1) lines_of_classes(t, gamma, negative);
    else lines_of_cells(t, gamma, negative);
    own_classes(t, gamma, positive);
}

/* Computes the cells of an image from `cell` on, as many as make a task, and returns their loss. */
static double compute_task(const focal_grid *g, const focal_constants *constants, int64_t image, int64_t cell) {
    focal_task t;
    t.grid = g;
    t.cells = g->cells - cell < CELLS_OF_TASK ? g->cells - cell : CELLS_OF_TASK;
    t.logits = (const char *)g->logits
             + (image * g->logits_batch_stride + cell * g->logits_cell_stride) * size_of(g->logits_type);
    t.gradient = 0;
    if (g->gradient)
        t.gradient = (char *)g->gradient
                   + (image * g->gradient_batch_stride + cell * g->gradient_cell_stride) * size_of(g->gradient_type);
    choose_cells(&t, image, cell);
    for (int64_t i = 0; i < t.count; i++) t.sums[i] = 0.0f;
    double scale = g->gradient ? *g->scale : 0;
    factor negative = factor_of(constants->negative_weight * scale);
    factor positive = factor_of(-constants->positive_weight * scale); /* by -x */
    switch (constants->gamma) { /* each with a constant of its own to be compiled for */
        case 0: lines_of_gamma(&t, 0, negative, positive); break;
        case 1: lines_of_gamma(&t, 1, negative, positive); break;
        case 2: lines_of_gamma(&t, 2, negative, positive); break;
        case 3: lines_of_gamma(&t, 3, negative, positive); break;
        default: lines_of_gamma(&t, 4, negative, positive);
    }
    if (t.gradient) clear_idle_cells(&t);
    return finish_rows(&t, constants, g->rows ? g->rows + image * g->cells + cell : 0);
}

typedef struct {
    const focal_grid *grids;
    int32_t count;
    const focal_constants *constants;
    atomic_int_fast64_t next_task;
} focal_work;

static int64_t tasks_of_image(const focal_grid *g) { return (g->cells + CELLS_OF_TASK - 1) / CELLS_OF_TASK; }

static void *take_tasks(void *argument) {
    focal_work *work = argument;
#if defined(__SSE__)
    /* Subnormal numbers cost a hundred times as much, and mean nothing in a loss. */
    unsigned int mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);
#endif
    const focal_grid *g = work->grids, *end = g + work->count;
    int64_t first = 0; /* of the tasks of this grid */
    for (int64_t task = atomic_fetch_add(&work->next_task, 1);; task = atomic_fetch_add(&work->next_task, 1)) {
        for (; g < end && task - first >= g->batch * tasks_of_image(g); g++) first += g->batch * tasks_of_image(g);
        if (g == end) break;
        int64_t image = (task - first) / tasks_of_image(g), part = (task - first) % tasks_of_image(g);
        g->sums[task - first] = compute_task(g, work->constants, image, part * CELLS_OF_TASK);
    }
#if defined(__SSE__)
    _mm_setcsr(mode);
#endif
    return 0;
}

/* Evaluates grids with the calling thread and up to `threads - 1` more.
 *
 * Threads are made for the call: there is no pool to spin, to starve, or to be lost in a fork. */
void lossd_focal(const focal_grid *grids, int32_t count, const focal_constants *constants, int32_t threads) {
    focal_work work = {.grids = grids, .count = count, .constants = constants, .next_task = 0};
    pthread_t helpers[MAX_THREADS];
    int made = 0;
    while (made < threads - 1 && made < MAX_THREADS && !pthread_create(&helpers[made], 0, take_tasks, &work)) made++;
    take_tasks(&work);
    while (made) pthread_join(helpers[--made], 0);
}
