/* Losses of single rows, and their gradients: boxes against boxes, and centerness.
 *
 * A row is the few numbers at one cell of a map. They are computed in float64: areas and their differences
 * cancel badly in float32, and so does a probability less its target.
 */

#include <stdlib.h>

#include "arithmetic.h"
#include "tasks.h"

#define BLOCK 64          /* rows that are computed together */
#define ROWS_OF_TASK 4096
#define SIDES 4
#define LANES 8           /* sums side by side */

enum { GIOU, GIOU_OF_LTRB, LOG_IOU_OF_LTRB, CENTERNESS };

typedef struct {
    double losses, extras; /* as in row_block */
} row_sums;

typedef struct {
    const void *preds;     /* [batch, numbers, cells], by the strides below */
    void *gradient;        /* like preds, or NULL; only the cells of rows are written */
    const void *targets;   /* [count, numbers] */
    const int64_t *images; /* [count]: where each row lies; NULL for image 0 */
    const int64_t *cells;  /* [count]: the same; NULL where row i is cell i */
    const double *factors; /* [count]: what the loss of each row is multiplied by, or NULL */
    double *rows;          /* [count]: the loss of each row, or NULL */
    int64_t count;
    int64_t preds_batch_stride, preds_number_stride, preds_cell_stride;
    int64_t gradient_batch_stride, gradient_number_stride, gradient_cell_stride;
    double scale;          /* what the gradient is multiplied by */
    double floor;          /* of areas, and of an IoU under its logarithm */
    int32_t preds_type, gradient_type, targets_type;
} row_group;

_Static_assert(sizeof(row_group) == 144, "packed so by losses/native/rows.py");

/* A block of rows, number by number. */
typedef struct {
    double preds[SIDES][BLOCK], targets[SIDES][BLOCK], slopes[SIDES][BLOCK];
    double losses[BLOCK];
    double extras[BLOCK]; /* 1 for distances with a negative side; the entropy of a centerness target */
} row_block;

/* a's share in the derivative of max(a, b): 1 above, 0 below, and half where they are equal. */
INLINE double share_above(double a, double b) { return a > b ? 1.0 : a < b ? 0.0 : 0.5; }

INLINE double at_least(double floor, double a) { return a < floor ? floor : a; } /* NaN stays */

INLINE double smaller(double a, double b) { return a < b ? a : b; }

INLINE double larger(double a, double b) { return a > b ? a : b; }

/* 1 - GIoU of xyxy boxes (Rezatofighi et al., 2019, alg. 1), union and hull floored. */
INLINE void giou_row(row_block *b, int64_t i, double floor, double sign) {
    double low[2] = {sign * b->preds[0][i], sign * b->preds[1][i]}, high[2] = {b->preds[2][i], b->preds[3][i]};
    double target_low[2] = {sign * b->targets[0][i], sign * b->targets[1][i]};
    double target_high[2] = {b->targets[2][i], b->targets[3][i]};
    double extent[2], overlap[2], inside[2], hull[2];
    for (int axis = 0; axis < 2; axis++) {
        extent[axis] = high[axis] - low[axis];
        overlap[axis] = smaller(high[axis], target_high[axis]) - larger(low[axis], target_low[axis]);
        inside[axis] = overlap[axis] > 0.0 ? overlap[axis] : 0.0;
        hull[axis] = larger(high[axis], target_high[axis]) - smaller(low[axis], target_low[axis]);
    }
    double intersection = inside[0] * inside[1], hull_area = hull[0] * hull[1];
    double target_area = (target_high[0] - target_low[0]) * (target_high[1] - target_low[1]);
    double both = extent[0] * extent[1] + target_area - intersection;
    double by_both = 1.0 / at_least(floor, both), by_hull_area = 1.0 / at_least(floor, hull_area);
    double iou = intersection * by_both, wasted = (hull_area - both) * by_hull_area;
    double slope_area = (both >= floor ? iou * by_both : 0.0) - by_hull_area;
    double slope_intersection = -by_both - slope_area;
    double slope_hull = (1.0 - (hull_area >= floor ? wasted : 0.0)) * by_hull_area;
    b->losses[i] = 1.0 - iou + wasted;
    for (int axis = 0; axis < 2; axis++) {
        int other = 1 - axis;
        double through_area = slope_area * extent[other];
        double through_overlap = overlap[axis] >= 0.0 ? slope_intersection * inside[other] : 0.0;
        double through_hull = slope_hull * hull[other];
        double high_above = share_above(high[axis], target_high[axis]);
        double low_above = share_above(low[axis], target_low[axis]);
        double slope_low = -through_area - through_overlap * low_above - through_hull * (1.0 - low_above);
        b->slopes[axis][i] = sign * slope_low;
        b->slopes[2 + axis][i] = through_area + through_overlap * (1.0 - high_above) + through_hull * high_above;
    }
}

/* -log IoU of distances l, t, r, b from one point, union and IoU floored. The intersection is not: with
 * negative sides on both axes it is a false overlap, and the published source returns it so. */
INLINE void log_iou_row(row_block *b, int64_t i, double floor) {
    double extent[2], overlap[2], target_extent[2];
    for (int axis = 0; axis < 2; axis++) {
        extent[axis] = b->preds[axis][i] + b->preds[2 + axis][i];
        target_extent[axis] = b->targets[axis][i] + b->targets[2 + axis][i];
        overlap[axis] = smaller(b->preds[axis][i], b->targets[axis][i])
                      + smaller(b->preds[2 + axis][i], b->targets[2 + axis][i]);
    }
    double both = extent[0] * extent[1] + target_extent[0] * target_extent[1] - overlap[0] * overlap[1];
    double by_both = 1.0 / at_least(floor, both);
    double iou = overlap[0] * overlap[1] * by_both;
    double slope = iou >= floor ? -1.0 / iou : 0.0;
    double share = both >= floor ? iou * by_both : 0.0;
    b->losses[i] = at_least(floor, iou);
    for (int axis = 0; axis < 2; axis++) {
        int other = 1 - axis;
        double through_extent = -slope * share * extent[other];
        double through_overlap = slope * (by_both + share) * overlap[other];
        for (int side = axis; side < SIDES; side += 2) {
            double below = 1.0 - share_above(b->preds[side][i], b->targets[side][i]);
            b->slopes[side][i] = through_extent + through_overlap * below;
        }
    }
}

/* Cross-entropy of a logit x with a target t in 0..1: `(x > 0 ? 1 - t : -t) x + log(1 + exp(-|x|))`, a sum
 * of what is never negative, so that a confident and correct logit loses no digits. */
INLINE void centerness_row(row_block *b, int64_t i) {
    double x = b->preds[0][i], t = b->targets[0][i], rest = 1.0 - t;
    double e = wide_exp_of_minus(fabs(x)), small = e / (1.0 + e);
    b->losses[i] = (x > 0.0 ? rest : -t) * x + log_of_one_plus(e);
    b->slopes[0][i] = x > 0.0 ? rest - small : small - t;
    b->extras[i] = -(t * log_of(t) + rest * log_of(rest));
}

INLINE void count_negative_sides(row_block *b, int64_t n) {
    for (int64_t i = 0; i < n; i++)
        b->extras[i] = (b->preds[0][i] < 0.0) | (b->preds[1][i] < 0.0) | (b->preds[2][i] < 0.0) | (b->preds[3][i] < 0.0);
}

INLINE void compute_block(row_block *b, int64_t n, int formula, double floor) {
    switch (formula) {
        case GIOU:
            for (int64_t i = 0; i < n; i++) giou_row(b, i, floor, 1.0);
            break;
        case GIOU_OF_LTRB: /* a GIoU does not change when both boxes move together: the point may be 0 */
            for (int64_t i = 0; i < n; i++) giou_row(b, i, floor, -1.0);
            count_negative_sides(b, n);
            break;
        case LOG_IOU_OF_LTRB:
            for (int64_t i = 0; i < n; i++) log_iou_row(b, i, floor);
            for (int64_t i = 0; i < n; i++) b->losses[i] = -log(b->losses[i]);
            count_negative_sides(b, n);
            break;
        default:
            for (int64_t i = 0; i < n; i++) centerness_row(b, i);
    }
}

/* Where the first numbers of the block's rows lie in a map. */
INLINE void find_places(
    const row_group *g, int64_t first, int64_t n, int64_t batch_stride, int64_t cell_stride, int64_t *places)
{
    for (int64_t i = 0; i < n; i++)
        places[i] = (g->images ? g->images[first + i] * batch_stride : 0) + g->cells[first + i] * cell_stride;
}

INLINE void read_block(const row_group *g, int64_t first, int64_t n, int numbers, row_block *b) {
    int64_t places[BLOCK];
    if (g->cells) find_places(g, first, n, g->preds_batch_stride, g->preds_cell_stride, places);
    for (int k = 0; k < numbers; k++) {
        const char *preds = (const char *)g->preds + k * g->preds_number_stride * size_of(g->preds_type);
        float line[BLOCK];
        if (g->cells) for (int64_t i = 0; i < n; i++) line[i] = number_at(preds, g->preds_type, places[i]);
        else read_line(preds + first * g->preds_cell_stride * size_of(g->preds_type), g->preds_type,
                       g->preds_cell_stride, 0, n, line);
        for (int64_t i = 0; i < n; i++) b->preds[k][i] = line[i];
        const char *targets = (const char *)g->targets + (first * numbers + k) * size_of(g->targets_type);
        if (g->targets_type == FLOAT64) {
            for (int64_t i = 0; i < n; i++) b->targets[k][i] = ((const double *)targets)[i * numbers];
        } else {
            read_line(targets, g->targets_type, numbers, 0, n, line);
            for (int64_t i = 0; i < n; i++) b->targets[k][i] = line[i];
        }
    }
}

INLINE void write_block(const row_group *g, int64_t first, int64_t n, int numbers, const row_block *b) {
    int64_t places[BLOCK];
    double factors[BLOCK];
    if (g->cells) find_places(g, first, n, g->gradient_batch_stride, g->gradient_cell_stride, places);
    for (int64_t i = 0; i < n; i++) factors[i] = g->factors ? g->factors[first + i] * g->scale : g->scale;
    for (int k = 0; k < numbers; k++) {
        char *gradient = (char *)g->gradient + k * g->gradient_number_stride * size_of(g->gradient_type);
        float line[BLOCK];
        for (int64_t i = 0; i < n; i++) line[i] = b->slopes[k][i] * factors[i];
        if (g->cells) for (int64_t i = 0; i < n; i++) set_number_at(gradient, g->gradient_type, places[i], line[i]);
        else write_line(gradient + first * g->gradient_cell_stride * size_of(g->gradient_type), g->gradient_type,
                        g->gradient_cell_stride, 0, n, line);
    }
}

/* Sums side by side, then the sums: one order, and no addition that waits for the one before. */
INLINE double sum_of(double *values, int64_t n) {
    double lanes[LANES] = {0};
    for (int64_t i = n; i % LANES; i++) values[i] = 0.0;
    for (int64_t i = 0; i < n; i += LANES)
        for (int lane = 0; lane < LANES; lane++) lanes[lane] += values[i + lane];
    double sum = 0.0;
    for (int lane = 0; lane < LANES; lane++) sum += lanes[lane];
    return sum;
}

/* Computes rows first..last-1 and returns their sums. */
INLINE row_sums compute_rows(const row_group *g, int64_t first, int64_t last, int formula) {
    row_block b;
    row_sums sums = {0.0, 0.0};
    int numbers = formula == CENTERNESS ? 1 : SIDES;
    for (; first < last; first += BLOCK) {
        int64_t n = last - first < BLOCK ? last - first : BLOCK;
        read_block(g, first, n, numbers, &b);
        compute_block(&b, n, formula, g->floor);
        if (g->gradient) write_block(g, first, n, numbers, &b);
        for (int64_t i = 0; g->factors && i < n; i++) {
            b.losses[i] *= g->factors[first + i];
            b.extras[i] *= g->factors[first + i];
        }
        if (g->rows) memcpy(g->rows + first, b.losses, n * sizeof *g->rows);
        sums.losses += sum_of(b.losses, n);
        if (formula != GIOU) sums.extras += sum_of(b.extras, n);
    }
    return sums;
}

typedef struct {
    const row_group *groups;
    int32_t formula;
    row_sums *found; /* by each task */
} row_work;

static int64_t tasks_of_group(const row_group *g) { return (g->count + ROWS_OF_TASK - 1) / ROWS_OF_TASK; }

static void run_row_task(void *argument, int64_t task) {
    const row_work *work = argument;
    const row_group *g = work->groups;
    row_sums *found = work->found + task;
    for (; task >= tasks_of_group(g); g++) task -= tasks_of_group(g);
    int64_t first = task * ROWS_OF_TASK, last = first + ROWS_OF_TASK < g->count ? first + ROWS_OF_TASK : g->count;
    switch (work->formula) { /* each with a formula of its own to be compiled for */
        case GIOU: *found = compute_rows(g, first, last, GIOU); break;
        case GIOU_OF_LTRB: *found = compute_rows(g, first, last, GIOU_OF_LTRB); break;
        case LOG_IOU_OF_LTRB: *found = compute_rows(g, first, last, LOG_IOU_OF_LTRB); break;
        default: *found = compute_rows(g, first, last, CENTERNESS);
    }
}

/* Evaluates groups of rows under one formula with at most so many threads, and writes the sums of each; returns 0,
 * or -1 without memory. */
int lossd_rows(const row_group *groups, int32_t count, int32_t formula, int32_t threads, row_sums *sums) {
    int64_t tasks = 0;
    for (int32_t i = 0; i < count; i++) tasks += tasks_of_group(&groups[i]);
    row_sums *found = malloc((tasks + 1) * sizeof *found), *next = found;
    if (!found) return -1;
    row_work work = {.groups = groups, .formula = formula, .found = found};
    run_tasks(run_row_task, &work, tasks, threads);
    for (int32_t i = 0; i < count; i++) {
        sums[i] = (row_sums){0.0, 0.0};
        for (int64_t task = tasks_of_group(&groups[i]); task; task--, next++) {
            sums[i].losses += next->losses;
            sums[i].extras += next->extras;
        }
    }
    free(found);
    return 0;
}
