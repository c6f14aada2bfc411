/* FCOS targets: boxes painted over the cells that they can reach, the last one on top. Distances are computed in
 * the boxes' own type, and so are those that numpy would give. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>

typedef struct {
    const void *boxes;     /* [count, 4]: x1 y1 x2 y2, float32 or float64 */
    const int64_t *labels; /* [count] */
    const uint8_t *crowd;  /* [count]: whether it is a crowd region, which is not painted; or null */
    int64_t count;
    int64_t narrow;        /* whether the boxes are float32 */
} image_objects;
_Static_assert(sizeof(image_objects) == 40, "packed so by targets/native_painting.py");

typedef struct {
    const image_objects *images; /* [batch] */
    const int64_t *strides, *heights, *widths, *starts; /* of each level; starts in the row of locations */
    const double *wide_ends, *narrow_ends; /* [2, levels]: the range of the farthest side, for boxes of either type */
    int32_t *canvas;       /* [batch, locations]: the box on top among those of its image, or -1 */
    int64_t batch, levels, locations;
    double offset;         /* where a location lies in its cell, in strides */
    double least_extent;   /* floor of what centerness divides by */
    int32_t lower_included, upper_included;
} paint_job;
_Static_assert(sizeof(paint_job) == 112, "packed so by targets/native_painting.py");

typedef struct {
    double size;
    int64_t box;
} sized_box;

typedef struct {
    int64_t first, last; /* cells, both included; none if last < first */
} cell_range;

static inline double side_of(const image_objects *i, int64_t box, int side) {
    int64_t at = 4 * box + side;
    return i->narrow ? ((const float *)i->boxes)[at] : ((const double *)i->boxes)[at];
}

static double lower_of(const paint_job *j, const image_objects *i, int64_t level) {
    return (i->narrow ? j->narrow_ends : j->wide_ends)[level];
}

static double upper_of(const paint_job *j, const image_objects *i, int64_t level) {
    return (i->narrow ? j->narrow_ends : j->wide_ends)[j->levels + level];
}

/* The cells along one axis that a box from `low` to `high` can take: a location that is closer than `upper`
 * to every side is within that distance of the opposite sides. Rounding outwards to whole cells covers the
 * rounding of distances. */
static cell_range reachable(const paint_job *j, double low, double high, double upper, int64_t stride, int64_t cells) {
    double first = floor(fmax(low, high - upper) / stride - j->offset);
    double last = ceil(fmin(high, low + upper) / stride - j->offset);
    return (cell_range){first > 0 ? fmin(first, cells) : 0, last < cells - 1 ? fmax(last, -1) : cells - 1};
}

static int64_t length(cell_range range) { return range.last < range.first ? 0 : range.last - range.first + 1; }

static int too_small(const paint_job *j, const image_objects *i, int64_t box, int64_t level) {
    double width = side_of(i, box, 2) - side_of(i, box, 0), height = side_of(i, box, 3) - side_of(i, box, 1);
    return fmax(width, height) * (1 + 1e-6) < lower_of(j, i, level);
}

static cell_range columns_of(const paint_job *j, const image_objects *i, int64_t box, int64_t level) {
    double low = side_of(i, box, 0), high = side_of(i, box, 2), upper = upper_of(j, i, level);
    return reachable(j, low, high, upper, j->strides[level], j->widths[level]);
}

static cell_range rows_of(const paint_job *j, const image_objects *i, int64_t box, int64_t level) {
    double low = side_of(i, box, 1), high = side_of(i, box, 3), upper = upper_of(j, i, level);
    return reachable(j, low, high, upper, j->strides[level], j->heights[level]);
}

/* Returns how many pairs of box and cell there are to look at. */
static int64_t count_pairs(const paint_job *j) {
    double pairs = 0; /* exact as far as it matters, and beyond that too large all the same */
    for (const image_objects *i = j->images; i < j->images + j->batch; i++)
        for (int64_t box = 0; box < i->count; box++)
            for (int64_t level = 0; level < j->levels; level++)
                if (!(i->crowd && i->crowd[box]) && !too_small(j, i, box, level))
                    pairs += (double)length(rows_of(j, i, box, level)) * length(columns_of(j, i, box, level));
    return fmin(pairs, 9e18);
}

static int from_last_choice(const void *a, const void *b) {
    const sized_box *one = a, *other = b;
    if (one->size != other->size) return one->size < other->size ? 1 : -1;
    return one->box < other->box ? 1 : -1;
}

/* Where the positives of a canvas go, in the order of images and locations; `count` of each. */
typedef struct {
    int64_t *labels;
    int32_t *cells; /* [count, 4]: image, level, row, column */
    int32_t *matched; /* its box among those of its image */
    float *ltrb; /* [count, 4] */
    float *centerness;
    int64_t *level_counts; /* [levels], in place of `count`: how many lie on each */
} positives;
_Static_assert(sizeof(positives) == 48, "packed so by targets/native_painting.py");

#define REAL float
#define NAME(function) function##_float32
#define SQUARE_ROOT sqrtf
#include "paint_boxes.h"
#undef REAL
#undef NAME
#undef SQUARE_ROOT

#define REAL double
#define NAME(function) function##_float64
#define SQUARE_ROOT sqrt
#include "paint_boxes.h"
#undef REAL
#undef NAME
#undef SQUARE_ROOT

/* Writes the boxes to paint from last to first choice: the smallest area, then the first, is on top. */
static int64_t in_paint_order(const image_objects *i, sized_box *order) {
    int64_t count = 0;
    for (int64_t box = 0; box < i->count; box++) {
        if (i->crowd && i->crowd[box]) continue;
        double size = i->narrow ? size_of_float32(i, box) : size_of_float64(i, box);
        /* Infinity times 0: a box that no location lies in, wherever it comes. */
        order[count++] = (sized_box){isnan(size) ? INFINITY : size, box};
    }
    qsort(order, count, sizeof *order, from_last_choice);
    return count;
}

/* Paints every box, and returns how many locations have one on top; if there are more pairs to look at than
 * `most`, nothing is painted, and the complement of their number is returned; INT64_MIN without memory. */
int64_t lossd_paint(const paint_job *j, int64_t most) {
    int64_t positives = 0, largest = 0, pairs = count_pairs(j);
    if (pairs > most) return ~pairs;
    for (int64_t image = 0; image < j->batch; image++)
        if (j->images[image].count > largest) largest = j->images[image].count;
    sized_box *order = malloc((largest + 1) * sizeof *order);
    if (!order) return INT64_MIN;
    for (int64_t at = 0; at < j->batch * j->locations; at++) j->canvas[at] = -1;
    for (int64_t image = 0; image < j->batch; image++) {
        const image_objects *i = j->images + image;
        int32_t *canvas = j->canvas + image * j->locations;
        int64_t count = in_paint_order(i, order);
        for (int64_t at = 0; at < count; at++)
            for (int64_t level = 0; level < j->levels; level++)
                if (!too_small(j, i, order[at].box, level))
                    (i->narrow ? paint_box_float32 : paint_box_float64)(
                        j, i, order[at].box, level, canvas + j->starts[level]
                    );
    }
    free(order);
    for (int64_t at = 0; at < j->batch * j->locations; at++) positives += j->canvas[at] >= 0;
    return positives;
}

static int all_free(const int32_t *eight) {
    int32_t all = -1;
    for (int at = 0; at < 8; at++) all &= eight[at];
    return all == -1;
}

/* Reads the positives off a canvas. */
void lossd_positives(const paint_job *j, const positives *to) {
    int64_t at = 0;
    for (int64_t level = 0; level < j->levels; level++) to->level_counts[level] = 0;
    for (int64_t image = 0; image < j->batch; image++) {
        const image_objects *i = j->images + image;
        for (int64_t level = 0; level < j->levels; level++) {
            int64_t stride = j->strides[level], width = j->widths[level], cells = width * j->heights[level];
            const int32_t *canvas = j->canvas + image * j->locations + j->starts[level];
            int64_t row = 0, line = 0; /* which begins at that cell */
            for (int64_t cell = 0; cell < cells; cell++) {
                /* Most cells are nobody's, and -1 is all ones. */
                while (cell + 8 <= cells && all_free(canvas + cell)) cell += 8;
                if (cell == cells || canvas[cell] < 0) continue;
                while (line + width <= cell) row++, line += width;
                int64_t box = canvas[cell];
                to->labels[at] = i->labels[box];
                to->matched[at] = box;
                int32_t *where = to->cells + 4 * at;
                where[0] = image, where[1] = level, where[2] = row, where[3] = cell - line;
                (i->narrow ? measure_float32 : measure_float64)(j, i, box, stride, where, to, at);
                to->level_counts[level]++;
                at++;
            }
        }
    }
}

typedef enum { XYXY, XYWH, CXCYWH } box_format;

static int is_label(const void *labels, int32_t type, int64_t at, int64_t classes, int64_t *label) {
    switch (type) {
        case 0: *label = ((const int8_t *)labels)[at]; break;
        case 1: *label = ((const uint8_t *)labels)[at]; break;
        case 2: *label = ((const int16_t *)labels)[at]; break;
        case 3: *label = ((const uint16_t *)labels)[at]; break;
        case 4: *label = ((const int32_t *)labels)[at]; break;
        default: *label = ((const int64_t *)labels)[at];
    }
    return *label >= 0 && *label < classes;
}

/* Copies the objects of an image in the painter's terms, and returns whether they are in order: finite,
 * upright, and of a class. */
int32_t lossd_read_objects(
    const float *given, int32_t format, const void *labels, int32_t labels_type, int64_t count, int64_t classes,
    float *boxes, int64_t *to
) {
    int good = 1;
    for (int64_t box = 0; box < count; box++) {
        const float *in = given + 4 * box;
        float *out = boxes + 4 * box;
        for (int axis = 0; axis < 2; axis++) {
            float first = in[axis], second = in[axis + 2], half = second / 2;
            out[axis] = format == CXCYWH ? first - half : first;
            out[axis + 2] = format == XYXY ? second : first + (format == XYWH ? second : half);
            good &= isfinite(first) && isfinite(second) && isfinite(out[axis]) && isfinite(out[axis + 2]);
            good &= out[axis] <= out[axis + 2];
        }
        good &= is_label(labels, labels_type, box, classes, to + box);
    }
    return good;
}
