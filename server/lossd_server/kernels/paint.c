/* FCOS targets: boxes painted over the cells that they can reach, the last one on top.
 *
 * Distances are rounded to the boxes' own type after every operation, so that they are those that numpy
 * would give: what rounding a float64 result to float32 makes of one operation on float32 is exact.
 */

#include <math.h>
#include <stdint.h>

typedef struct {
    const double *corners; /* [boxes, 4]: x1 y1 x2 y2, in the order of painting */
    const int64_t *images; /* [boxes]: which image each box is of */
    const int64_t *labels, *indices; /* [boxes]: its class, and its place among the boxes of its image */
    const int64_t *strides, *heights, *widths, *starts; /* of each level; starts in the row of locations */
    const double *lower, *upper; /* [levels]: the range of the farthest side */
    int32_t *canvas;       /* [batch, locations]: the box on top, or -1 */
    int64_t boxes, levels, locations;
    double offset;         /* where a location lies in its cell, in strides */
    double least_extent;   /* floor of what centerness divides by */
    int32_t narrow;        /* whether the boxes are float32, and not float64 */
    int32_t lower_included, upper_included;
} paint_job;

typedef struct {
    int64_t first, last; /* cells, both included; none if last < first */
} cell_range;

static inline double rounded(const paint_job *j, double value) { return j->narrow ? (float)value : value; }

static inline double point_of(const paint_job *j, int64_t cell, int64_t stride) {
    return rounded(j, (cell + j->offset) * stride);
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

static int too_small(const paint_job *j, const double *box, int64_t level) {
    return fmax(box[2] - box[0], box[3] - box[1]) * (1 + 1e-6) < j->lower[level];
}

static cell_range columns_of(const paint_job *j, const double *box, int64_t level) {
    return reachable(j, box[0], box[2], j->upper[level], j->strides[level], j->widths[level]);
}

static cell_range rows_of(const paint_job *j, const double *box, int64_t level) {
    return reachable(j, box[1], box[3], j->upper[level], j->strides[level], j->heights[level]);
}

static int in_range(const paint_job *j, double farthest, int64_t level) {
    double lower = j->lower[level], upper = j->upper[level];
    return (j->lower_included ? farthest >= lower : farthest > lower)
        && (j->upper_included ? farthest <= upper : farthest < upper);
}

static void paint_box(const paint_job *j, int64_t box, int64_t level) {
    const double *sides = j->corners + 4 * box;
    int64_t stride = j->strides[level];
    cell_range rows = rows_of(j, sides, level), columns = columns_of(j, sides, level);
    int32_t *image = j->canvas + j->images[box] * j->locations + j->starts[level];
    for (int64_t row = rows.first; row <= rows.last; row++) {
        double y = point_of(j, row, stride);
        double top = rounded(j, y - sides[1]), bottom = rounded(j, sides[3] - y);
        if (!(fmin(top, bottom) > 0)) continue;
        int32_t *line = image + row * j->widths[level];
        for (int64_t column = columns.first; column <= columns.last; column++) {
            double x = point_of(j, column, stride);
            double left = rounded(j, x - sides[0]), right = rounded(j, sides[2] - x);
            double farthest = fmax(fmax(left, right), fmax(top, bottom));
            if (fmin(left, right) > 0 && in_range(j, farthest, level)) line[column] = box;
        }
    }
}

/* Returns how many pairs of box and cell there are to look at. */
static int64_t count_pairs(const paint_job *j) {
    double pairs = 0; /* exact as far as it matters, and beyond that too large all the same */
    for (int64_t box = 0; box < j->boxes; box++) {
        const double *sides = j->corners + 4 * box;
        for (int64_t level = 0; level < j->levels; level++)
            if (!too_small(j, sides, level))
                pairs += (double)length(rows_of(j, sides, level)) * length(columns_of(j, sides, level));
    }
    return fmin(pairs, 9e18);
}

/* Paints every box, and returns how many locations have one on top; if there are more pairs to look at than
 * `most`, nothing is painted, and the complement of their number is returned. */
int64_t lossd_paint(const paint_job *j, int64_t batch, int64_t most) {
    int64_t positives = 0, pairs = count_pairs(j);
    if (pairs > most) return ~pairs;
    for (int64_t at = 0; at < batch * j->locations; at++) j->canvas[at] = -1;
    for (int64_t box = 0; box < j->boxes; box++)
        for (int64_t level = 0; level < j->levels; level++)
            if (!too_small(j, j->corners + 4 * box, level)) paint_box(j, box, level);
    for (int64_t at = 0; at < batch * j->locations; at++) positives += j->canvas[at] >= 0;
    return positives;
}

static double share(const paint_job *j, double a, double b) {
    return rounded(j, fmin(a, b) / fmax(fmax(a, b), rounded(j, j->least_extent)));
}

/* Where the positives of a canvas go, in the order of images and locations; `count` of each. */
typedef struct {
    int64_t *images, *locations, *labels;
    int32_t *cells; /* [count, 4]: image, level, row, column */
    int32_t *matched; /* its box among those of its image */
    float *ltrb; /* [count, 4] */
    float *centerness;
    int64_t *level_counts; /* [levels], in place of `count`: how many lie on each */
} positives;

static int all_free(const int32_t *eight) {
    int32_t all = -1;
    for (int at = 0; at < 8; at++) all &= eight[at];
    return all == -1;
}

/* Reads the positives off a canvas. */
void lossd_positives(const paint_job *j, int64_t batch, const positives *to) {
    int64_t at = 0;
    for (int64_t level = 0; level < j->levels; level++) to->level_counts[level] = 0;
    for (int64_t image = 0; image < batch; image++) {
        for (int64_t level = 0; level < j->levels; level++) {
            int64_t stride = j->strides[level], width = j->widths[level], cells = width * j->heights[level];
            const int32_t *canvas = j->canvas + image * j->locations + j->starts[level];
            int64_t row = 0, line = 0; /* which begins at that cell */
            for (int64_t cell = 0; cell < cells; cell++) {
                /* Most cells are nobody's, and -1 is all ones. */
                while (cell + 8 <= cells && all_free(canvas + cell)) cell += 8;
                if (cell == cells || canvas[cell] < 0) continue;
                while (line + width <= cell) row++, line += width;
                int64_t column = cell - line;
                const double *sides = j->corners + 4 * (int64_t)canvas[cell];
                double x = point_of(j, column, stride), y = point_of(j, row, stride);
                double left = rounded(j, x - sides[0]), top = rounded(j, y - sides[1]);
                double right = rounded(j, sides[2] - x), bottom = rounded(j, sides[3] - y);
                double product = rounded(j, share(j, left, right) * share(j, top, bottom));
                to->images[at] = image;
                to->locations[at] = j->starts[level] + cell;
                to->labels[at] = j->labels[canvas[cell]];
                to->matched[at] = j->indices[canvas[cell]];
                to->cells[4 * at] = image;
                to->cells[4 * at + 1] = level;
                to->cells[4 * at + 2] = row;
                to->cells[4 * at + 3] = column;
                to->ltrb[4 * at] = left;
                to->ltrb[4 * at + 1] = top;
                to->ltrb[4 * at + 2] = right;
                to->ltrb[4 * at + 3] = bottom;
                to->centerness[at] = rounded(j, sqrt(product));
                to->level_counts[level]++;
                at++;
            }
        }
    }
}
