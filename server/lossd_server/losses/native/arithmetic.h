/* Arithmetic that keeps what rounding takes, and numbers of the three types that are read as float32. */

#include <math.h>
#include <stdint.h>
#include <string.h>

/* A call left in a loop keeps the compiler from computing logits side by side, and after a few uses it
 * leaves calls unless told. */
#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32, FLOAT16, BFLOAT16 };

/* Numbers named `x` and `x_low` stand for x + x_low: a float, and what rounding took from it. */

/* e^-a for a >= 0 (Cody and Waite), as if a were at most 87: smaller results would be subnormal. */
INLINE float exp_of_minus(float a, float *low) {
    a = 87.0f < a ? 87.0f : a; /* in this order NaN stays */
    float k = rintf(a * -1.44269504f);
    float r = fmaf(k, -0.693145751953125f, -a);
    r = fmaf(k, -1.42860677e-6f, r);
    float r2 = r * r;
    float q0 = fmaf(0.166666672f, r, 0.5f);
    float q2 = fmaf(0.00833331048f, r, 0.0416664667f);
    float q4 = fmaf(0.000198909911f, r, 0.00139336498f);
    float less_one = fmaf(r2, fmaf(fmaf(q4, r2, q2), r2, q0), r);
    float power = 1.0f + less_one;
    float power_low = (1.0f - power) + less_one;
    int32_t bits = ((int32_t)k + 127) << 23;
    float two_to_k;
    memcpy(&two_to_k, &bits, sizeof two_to_k);
    *low = power_low * two_to_k;
    return power * two_to_k;
}

/* log(1 + e) for e in 0..1: e times a polynomial, so that small e keep their digits. */
INLINE float log_of_one_plus(float e) {
    float e2 = e * e, e4 = e2 * e2;
    float q0 = fmaf(0.333297104f, e, -0.499998927f);
    float q2 = fmaf(0.196632743f, e, -0.249516159f);
    float q4 = fmaf(0.105436236f, e, -0.152696669f);
    float q6 = fmaf(0.0195425265f, e, -0.0563736111f);
    float q = fmaf(fmaf(-0.00317605701f, e4, fmaf(q6, e2, q4)), e4, fmaf(q2, e2, q0));
    return fmaf(e2, q, e);
}

/* A factor in two floats, which lose nothing of a double that matters here. */
typedef struct {
    float high, low;
} factor;

INLINE factor factor_of(double value) {
    float high = value;
    return (factor){high, value - high};
}

INLINE float of_bfloat16(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint16_t to_bfloat16(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return value != value ? 0x7fc0 : rounded;
}

INLINE int64_t size_of(int type) { return type == FLOAT32 ? 4 : 2; }

INLINE float number_at(const void *from, int type, int64_t at) {
    return type == FLOAT32 ? ((const float *)from)[at]
         : type == FLOAT16 ? (float)((const _Float16 *)from)[at]
                           : of_bfloat16(((const uint16_t *)from)[at]);
}

INLINE void set_number_at(void *to, int type, int64_t at, float value) {
    if (type == FLOAT32) ((float *)to)[at] = value;
    else if (type == FLOAT16) ((_Float16 *)to)[at] = (_Float16)value;
    else ((uint16_t *)to)[at] = to_bfloat16(value);
}

/* Reads n numbers `stride` apart, or those at `places` if given. */
INLINE void read_line(
    const void *from, int type, int64_t stride, const int32_t *places, int64_t n, float *restrict to)
{
    if (places) for (int64_t i = 0; i < n; i++) to[i] = number_at(from, type, places[i] * stride);
    else if (stride != 1) for (int64_t i = 0; i < n; i++) to[i] = number_at(from, type, i * stride);
    else if (type == FLOAT16) for (int64_t i = 0; i < n; i++) to[i] = number_at(from, FLOAT16, i);
    else if (type == BFLOAT16) for (int64_t i = 0; i < n; i++) to[i] = number_at(from, BFLOAT16, i);
    else memcpy(to, from, n * sizeof *to);
}

INLINE void write_line(
    void *to, int type, int64_t stride, const int32_t *places, int64_t n, const float *restrict from)
{
    if (places) for (int64_t i = 0; i < n; i++) set_number_at(to, type, places[i] * stride, from[i]);
    else if (stride != 1) for (int64_t i = 0; i < n; i++) set_number_at(to, type, i * stride, from[i]);
    else if (type == FLOAT16) for (int64_t i = 0; i < n; i++) set_number_at(to, FLOAT16, i, from[i]);
    else if (type == BFLOAT16) for (int64_t i = 0; i < n; i++) set_number_at(to, BFLOAT16, i, from[i]);
    else memcpy(to, from, n * sizeof *from);
}
