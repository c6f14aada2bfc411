/* What is computed in the type of an image's boxes, REAL: included by paint.c once for each. */

static inline const REAL *NAME(sides_of)(const image_objects *i, int64_t box) {
    return (const REAL *)i->boxes + 4 * box;
}

static double NAME(size_of)(const image_objects *i, int64_t box) {
    const REAL *sides = NAME(sides_of)(i, box);
    REAL width = sides[2] - sides[0], height = sides[3] - sides[1], size = width * height;
    return size;
}

static inline REAL NAME(larger)(REAL a, REAL b) { return a > b ? a : b; }

static inline REAL NAME(smaller)(REAL a, REAL b) { return a < b ? a : b; }

static inline REAL NAME(point_of)(const paint_job *j, int32_t cell, double stride) {
    return (cell + j->offset) * stride;
}

/* Paints a box over one level, whose canvas is given. */
static void NAME(paint_box)(const paint_job *j, const image_objects *i, int64_t box, int64_t level, int32_t *canvas) {
    const REAL *sides = NAME(sides_of)(i, box);
    REAL x1 = sides[0], y1 = sides[1], x2 = sides[2], y2 = sides[3];
    REAL lower = lower_of(j, i, level), upper = upper_of(j, i, level);
    int lower_included = j->lower_included, upper_included = j->upper_included;
    double stride = j->strides[level];
    cell_range rows = rows_of(j, i, box, level), columns = columns_of(j, i, box, level);
    for (int32_t row = rows.first; row <= rows.last; row++) {
        REAL y = NAME(point_of)(j, row, stride);
        REAL top = y - y1, bottom = y2 - y, down = NAME(larger)(top, bottom);
        if (!(NAME(smaller)(top, bottom) > 0)) continue;
        int32_t *line = canvas + row * j->widths[level];
        for (int32_t column = columns.first; column <= columns.last; column++) {
            REAL x = NAME(point_of)(j, column, stride);
            REAL left = x - x1, right = x2 - x;
            REAL farthest = NAME(larger)(NAME(larger)(left, right), down);
            int above = lower_included ? farthest >= lower : farthest > lower;
            int below = upper_included ? farthest <= upper : farthest < upper;
            line[column] = (NAME(smaller)(left, right) > 0) & above & below ? (int32_t)box : line[column];
        }
    }
}

static inline REAL NAME(share)(REAL a, REAL b, REAL least) {
    return NAME(smaller)(a, b) / NAME(larger)(NAME(larger)(a, b), least);
}

/* Writes the distances and the centerness of a positive, given its image, level, row and column. */
static void NAME(measure)(
    const paint_job *j, const image_objects *i, int64_t box, double stride, const int32_t *where,
    const positives *to, int64_t at
) {
    const REAL *sides = NAME(sides_of)(i, box);
    REAL x = NAME(point_of)(j, where[3], stride), y = NAME(point_of)(j, where[2], stride);
    REAL left = x - sides[0], top = y - sides[1], right = sides[2] - x, bottom = sides[3] - y;
    REAL least = j->least_extent;
    REAL product = NAME(share)(left, right, least) * NAME(share)(top, bottom, least);
    float *ltrb = to->ltrb + 4 * at;
    ltrb[0] = left, ltrb[1] = top, ltrb[2] = right, ltrb[3] = bottom;
    to->centerness[at] = SQUARE_ROOT(product);
}
