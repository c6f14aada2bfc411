/* Focal loss and its gradient over grids of logits: one pass, no temporaries beyond the first-level cache.
 *
 * Every logit is computed by the same sequence of operations wherever it lies and however many threads
 * run: contraction is off, fused operations are spelled out, each row is summed over its classes in
 * order, and tasks are cut without regard to threads. So equal inputs give equal bits.
 */

#include <stdlib.h>

#include "arithmetic.h"
#include "tasks.h"

#define BLOCK 64           /* logits of a line that are computed together: more would flood the store buffer */
#define AHEAD 512          /* how many logits later those are computed that are fetched */
#define CACHE_LINE 64
#define CELLS_OF_TASK 2048
#define LANES 8            /* sums side by side where a line is one cell's */
#define IGNORED (-2)
#define FEW 4              /* below one cell in so many, cells that take part are picked out */

/* Types of labels. Below 2^31, as labels are, the wider unsigned ones read like the signed. */
enum { INT8, UINT8, INT16, UINT16, INT32, INT64 };

typedef struct {
    const void *logits;     /* [batch, classes, cells], by the strides below */
    void *gradient;         /* like logits, or NULL */
    const void *labels;     /* [batch, cells]: a class, or negative without an object */
    const uint8_t *ignored; /* [batch, cells]: what is no background either, or NULL */
    float *rows;            /* [batch, cells]: the loss of each cell, or NULL */
    int64_t batch, classes, cells;
    int64_t logits_batch_stride, logits_class_stride, logits_cell_stride;
    int64_t gradient_batch_stride, gradient_class_stride, gradient_cell_stride;
    int64_t labels_batch_stride, ignored_batch_stride;
    double scale;           /* what the gradient is multiplied by */
    int32_t logits_type, gradient_type;
    int32_t labels_type;
    int32_t background;     /* whether a cell without an object is a negative of every class */
} focal_grid;

_Static_assert(sizeof(focal_grid) == 152, "packed so by losses/native/focal.py");

typedef struct {
    double negative_weight, positive_weight;
    int32_t gamma; /* 0..4 */
} focal_constants;

/* x^gamma for gamma in 0..4, by multiplications, which lose less than a logarithm would. */
INLINE float power_of(float x, int gamma) {
    float square = x * x;
    return gamma == 0 ? 1.0f : gamma == 1 ? x : gamma == 2 ? square : gamma == 3 ? square * x : square * square;
}

/* f(z) = sigmoid(z)^gamma * softplus(z), and its derivative times a factor, from e = exp(-|z|).
 *
 * The derivative is a multiple of (1 / (1 + e))^(gamma + 1), and for negative z nearly one of e^(gamma + 1),
 * so that what rounding takes from these two would add up. It is gathered, relative to the result, and put
 * back at the end. */
INLINE float focal_terms(float z, float e, float e_rest, int gamma, factor by, float *slope) {
    int negative = z < 0.0f;
    float large = 1.0f / (1.0f + e);
    float small = e * large;
    float large_rest = fmaf(-small, e_rest, fmaf(-large, e, 1.0f - large));
    float p = negative ? small : large, q = negative ? large : small;
    float softplus = log_of_one_plus(e) + (negative ? 0.0f : z); /* NaN is not negative, and stays */
    float power = power_of(large, gamma) * (negative ? power_of(e, gamma) : 1.0f);
    float share = fmaf((float)gamma * q, softplus, p);
    float rounded = power * share * by.rounded;
    float rest = fmaf((float)(gamma + 1), large_rest + (negative ? e_rest : 0.0f), by.rest);
    *slope = fmaf(rounded, rest, rounded);
    return softplus * power;
}

/* The largest bits of |z| that were met, at each place of a block: NaN and infinity are beyond LARGEST. */
typedef struct {
    int32_t bits[BLOCK];
} magnitudes;

#define LARGEST 0x7f7fffff /* bits of the largest finite float */

INLINE void look_at(magnitudes *seen, const float *z, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        int32_t bits;
        memcpy(&bits, &z[i], sizeof bits);
        bits &= 0x7fffffff;
        seen->bits[i] = bits > seen->bits[i] ? bits : seen->bits[i];
    }
}

INLINE int any_stray(const magnitudes *seen) {
    int stray = 0;
    for (int i = 0; i < BLOCK; i++) stray |= seen->bits[i] > LARGEST;
    return stray;
}

/* Computes the losses of up to BLOCK logits taken for negatives of weight 1, and their slopes times a
 * factor unless `slopes` is NULL. */
typedef void line_function(const float *restrict z, int64_t n, float *restrict losses, float *restrict slopes, factor by);

/* In two passes over the block: in one, each step waits for the one before, and the processor cannot look
 * far enough ahead to find other work. */
INLINE void line_of_negatives(
    const float *restrict z, int64_t n, int gamma, float *restrict losses, float *restrict slopes, factor by)
{
    float e[BLOCK], e_rest[BLOCK];
    for (int64_t i = 0; i < n; i++) e[i] = exp_of_minus(fabsf(z[i]), &e_rest[i]);
    for (int64_t i = 0; i < n; i++) {
        float slope;
        losses[i] = focal_terms(z[i], e[i], e_rest[i], gamma, by, &slope);
        if (slopes) slopes[i] = slope;
    }
}

/* Each gamma has a function of its own, with a constant to be compiled for. */
#define LINE_FUNCTION(gamma)                                                                                    \
    static void line_##gamma(const float *restrict z, int64_t n, float *restrict losses, float *restrict slopes, \
                             factor by)                                                                          \
    {                                                                                                            \
        if (slopes) line_of_negatives(z, n, gamma, losses, slopes, by);                                          \
        else line_of_negatives(z, n, gamma, losses, 0, by);                                                      \
    }
LINE_FUNCTION(0)
LINE_FUNCTION(1)
LINE_FUNCTION(2)
LINE_FUNCTION(3)
LINE_FUNCTION(4)
static line_function *const line_functions[] = {line_0, line_1, line_2, line_3, line_4};

/* The cells of a task. Those that are computed are numbered 0..count-1: all of them, or where few take
 * part only those, and then `places` says where they lie. */
typedef struct {
    const focal_grid *grid;
    line_function *compute;
    const char *logits; /* of the task's first cell */
    char *gradient;
    int64_t cells, count, idle_count;
    magnitudes seen;
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
static void line_of_task(
    focal_task *t, const char *logits, int64_t stride, char *gradient, int64_t gradient_stride,
    const int32_t *places, int64_t n, float *losses, factor by)
{
    const focal_grid *g = t->grid;
    float read[BLOCK], slopes[BLOCK];
    int read_in_place = g->logits_type == FLOAT32 && stride == 1 && !places;
    int write_in_place = gradient && g->gradient_type == FLOAT32 && gradient_stride == 1 && !places;
    if (!read_in_place) read_line(logits, g->logits_type, stride, places, n, read);
    const float *z = read_in_place ? (const float *)logits : read;
    look_at(&t->seen, z, n);
    t->compute(z, n, losses, write_in_place ? (float *)gradient : gradient ? slopes : 0, by);
    if (gradient && !write_in_place) write_line(gradient, g->gradient_type, gradient_stride, places, n, slopes);
}

/* Fetches the block of logits that is computed some blocks later, and makes room for its gradient. The
 * processor foresees a line by itself, but no further than to the end of a page, of which a line has two. */
INLINE void fetch_ahead(const focal_task *t, int64_t class, int64_t cell) {
    const focal_grid *g = t->grid;
    if (cell >= t->count) class++, cell -= t->count;
    if (class >= g->classes || cell >= t->count || t->places) return;
    const char *logits = logits_at(t, class, cell), *gradient = t->gradient ? gradient_at(t, class, cell) : 0;
    for (int64_t at = 0; at < BLOCK * size_of(g->logits_type); at += CACHE_LINE) __builtin_prefetch(logits + at, 0);
    for (int64_t at = 0; gradient && at < BLOCK * size_of(g->gradient_type); at += CACHE_LINE)
        __builtin_prefetch(gradient + at, 1);
}

/* All classes of the task's cells, each class in lines over the cells. */
static void lines_of_cells(focal_task *t, factor by) {
    const focal_grid *g = t->grid;
    float losses[BLOCK];
    for (int64_t c = 0; c < g->classes; c++) {
        for (int64_t first = 0; first < t->count; first += BLOCK) {
            int64_t n = t->count - first < BLOCK ? t->count - first : BLOCK;
            int64_t cell = t->places ? 0 : first;
            if (g->logits_cell_stride == 1) fetch_ahead(t, c, first + AHEAD);
            int32_t class = c; /* as wide as a label, so that they compare side by side */
            line_of_task(
                t, logits_at(t, c, cell), g->logits_cell_stride, t->gradient ? gradient_at(t, c, cell) : 0,
                g->gradient_cell_stride, t->places ? t->places + first : 0, n, losses, by);
            for (int64_t i = 0; i < n; i++) t->sums[first + i] += t->labels[first + i] == class ? 0.0f : losses[i];
        }
    }
}

/* The same, each cell in lines over its classes. */
static void lines_of_classes(focal_task *t, factor by) {
    const focal_grid *g = t->grid;
    float losses[BLOCK];
    for (int64_t i = 0; i < t->count; i++) {
        int64_t cell = t->places ? t->places[i] : i;
        float lanes[LANES] = {0};
        for (int64_t first = 0; first < g->classes; first += BLOCK) {
            int64_t n = g->classes - first < BLOCK ? g->classes - first : BLOCK;
            line_of_task(
                t, logits_at(t, first, cell), g->logits_class_stride,
                t->gradient ? gradient_at(t, first, cell) : 0, g->gradient_class_stride, 0, n, losses, by);
            if (t->labels[i] >= first && t->labels[i] < first + n) losses[t->labels[i] - first] = 0.0f;
            for (int64_t j = n; j % LANES; j++) losses[j] = 0.0f;
            for (int64_t j = 0; j < n; j += LANES)
                for (int lane = 0; lane < LANES; lane++) lanes[lane] += losses[j + lane];
        }
        for (int lane = 0; lane < LANES; lane++) t->sums[i] += lanes[lane];
    }
}

/* The logit of each cell's own class: the loss of a positive with logit x is that of a negative with -x. */
static void own_classes(focal_task *t, factor by) {
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
        t->compute(z, n, losses, slopes, by);
        for (int64_t i = 0; i < n; i++) {
            int32_t label = t->labels[first + i];
            int64_t cell = t->places ? t->places[first + i] : first + i;
            t->own[first + i] = label >= 0 ? losses[i] : 0.0f;
            if (label >= 0 && t->gradient) set_number_at(gradient_at(t, label, cell), g->gradient_type, 0, slopes[i]);
        }
    }
}

INLINE int32_t label_at(const void *labels, int type, int64_t at) {
    switch (type) {
        case INT8: return ((const int8_t *)labels)[at];
        case UINT8: return ((const uint8_t *)labels)[at];
        case INT16: return ((const int16_t *)labels)[at];
        case UINT16: return ((const uint16_t *)labels)[at];
        case INT32: return ((const int32_t *)labels)[at];
        default: return ((const int64_t *)labels)[at];
    }
}

/* Reads the labels of the task's cells, and decides which of them to compute. */
static void choose_cells(focal_task *t, int64_t image, int64_t cell) {
    const focal_grid *g = t->grid;
    const uint8_t *ignored = g->ignored ? g->ignored + image * g->ignored_batch_stride + cell : 0;
    int32_t *idle = t->sorted + t->cells;
    t->idle_count = 0;
    for (int64_t s = 0; s < t->cells; s++) {
        int32_t label = label_at(g->labels, g->labels_type, image * g->labels_batch_stride + cell + s);
        int background = g->background && !(ignored && ignored[s]);
        t->labels[s] = label >= 0 ? label : background ? -1 : IGNORED;
        if (t->labels[s] == IGNORED) idle[-++t->idle_count] = s;
        else t->sorted[s - t->idle_count] = s;
    }
    t->idle = idle - t->idle_count;
    int few = (t->cells - t->idle_count) * FEW < t->cells;
    t->places = few ? t->sorted : 0;
    t->count = few ? t->cells - t->idle_count : t->cells;
    for (int64_t i = 0; few && i < t->count; i++) t->labels[i] = t->labels[t->sorted[i]];
}

/* Zeros in the gradient of every cell that takes no part, where all were computed. */
static void clear_idle_cells(const focal_task *t) {
    const focal_grid *g = t->grid;
    for (int64_t c = 0; c < g->classes; c++)
        for (int64_t i = 0; i < t->idle_count; i++)
            set_number_at(gradient_at(t, c, t->idle[i]), g->gradient_type, 0, 0.0f);
}

/* Zeros in the gradient of all cells, line by line, where few will be computed. */
static void clear_all_cells(const focal_task *t) {
    const focal_grid *g = t->grid;
    int64_t size = size_of(g->gradient_type);
    if (g->gradient_cell_stride == 1)
        for (int64_t c = 0; c < g->classes; c++) memset(gradient_at(t, c, 0), 0, t->cells * size);
    else if (g->gradient_class_stride == 1)
        for (int64_t s = 0; s < t->cells; s++) memset(gradient_at(t, 0, s), 0, g->classes * size);
    else clear_idle_cells(t);
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

/* Looks at every logit of the task, for those that are not computed. */
static void look_at_all(focal_task *t) {
    const focal_grid *g = t->grid;
    float z[BLOCK];
    for (int64_t c = 0; c < g->classes; c++) {
        for (int64_t first = 0; first < t->cells; first += BLOCK) {
            int64_t n = t->cells - first < BLOCK ? t->cells - first : BLOCK;
            read_line(logits_at(t, c, first), g->logits_type, g->logits_cell_stride, 0, n, z);
            look_at(&t->seen, z, n);
        }
    }
}

typedef struct {
    double loss;
    int stray;
} focal_found;

/* Computes the cells of an image from `cell` on, as many as make a task. */
static focal_found compute_task(
    const focal_grid *g, const focal_constants *constants, int64_t image, int64_t cell)
{
    focal_task t;
    t.grid = g;
    t.compute = line_functions[constants->gamma];
    t.cells = g->cells - cell < CELLS_OF_TASK ? g->cells - cell : CELLS_OF_TASK;
    t.logits = (const char *)g->logits
             + (image * g->logits_batch_stride + cell * g->logits_cell_stride) * size_of(g->logits_type);
    t.gradient = 0;
    if (g->gradient)
        t.gradient = (char *)g->gradient
                   + (image * g->gradient_batch_stride + cell * g->gradient_cell_stride) * size_of(g->gradient_type);
    memset(&t.seen, 0, sizeof t.seen);
    choose_cells(&t, image, cell);
    for (int64_t i = 0; i < t.count; i++) t.sums[i] = 0.0f;
    factor negative = factor_of(constants->negative_weight * g->scale);
    factor positive = factor_of(-constants->positive_weight * g->scale); /* by -x */
    if (t.gradient && t.places) clear_all_cells(&t);
    if (g->logits_class_stride == 1 && g->logits_cell_stride != 1) lines_of_classes(&t, negative);
    else lines_of_cells(&t, negative);
    own_classes(&t, positive);
    if (t.gradient && !t.places) clear_idle_cells(&t);
    if (t.places) look_at_all(&t);
    float *rows = g->rows ? g->rows + image * g->cells + cell : 0;
    return (focal_found){finish_rows(&t, constants, rows), any_stray(&t.seen)};
}

typedef struct {
    const focal_grid *grids;
    const focal_constants *constants;
    focal_found *found; /* by each task */
} focal_work;

static int64_t tasks_of_image(const focal_grid *g) { return (g->cells + CELLS_OF_TASK - 1) / CELLS_OF_TASK; }

static int64_t tasks_of_grid(const focal_grid *g) { return g->batch * tasks_of_image(g); }

static void run_focal_task(void *argument, int64_t task) {
    const focal_work *work = argument;
    const focal_grid *g = work->grids;
    focal_found *found = work->found + task;
    for (; task >= tasks_of_grid(g); g++) task -= tasks_of_grid(g);
    int64_t part = task % tasks_of_image(g);
    *found = compute_task(g, work->constants, task / tasks_of_image(g), part * CELLS_OF_TASK);
}

/* Evaluates grids with at most so many threads, and writes the loss of each; returns whether a logit is NaN or
 * infinite, or -1 without memory. */
int lossd_focal(
    const focal_grid *grids, int32_t count, const focal_constants *constants, int32_t threads, double *losses
) {
    int64_t tasks = 0;
    int stray = 0;
    for (int32_t i = 0; i < count; i++) tasks += tasks_of_grid(&grids[i]);
    focal_found *found = malloc((tasks + 1) * sizeof *found), *next = found;
    if (!found) return -1;
    focal_work work = {.grids = grids, .constants = constants, .found = found};
    run_tasks(run_focal_task, &work, tasks, threads);
    for (int32_t i = 0; i < count; i++) {
        losses[i] = 0.0;
        for (int64_t task = tasks_of_grid(&grids[i]); task; task--, next++) {
            losses[i] += next->loss;
            stray |= next->stray;
        }
    }
    free(found);
    return stray;
}

/* Returns how many of so many labels are of an object, or -1 if one is neither a class nor -1. Not for
 * unsigned labels of 32 bits and more. */
int64_t lossd_count_objects(const void *labels, int32_t type, int64_t count, int64_t classes) {
    int64_t objects = 0, outside = 0;
#define COUNT(kind)                                                  \
    for (int64_t i = 0; i < count; i++) {                            \
        int64_t label = ((const kind *)labels)[i];                   \
        objects += label >= 0, outside |= (label < -1) | (label >= classes); \
    }
    switch (type) {
        case INT8: COUNT(int8_t) break;
        case UINT8: COUNT(uint8_t) break;
        case INT16: COUNT(int16_t) break;
        case UINT16: COUNT(uint16_t) break;
        case INT32: COUNT(int32_t) break;
        default: COUNT(int64_t)
    }
    return outside ? -1 : objects;
}
