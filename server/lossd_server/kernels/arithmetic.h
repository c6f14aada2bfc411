/* Exponentials and logarithms in float32 that keep what rounding takes, and numbers of every type that is read. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

/* A call left in a loop keeps the compiler from computing numbers side by side, and after a few uses it
 * leaves calls unless told. */
#define INLINE static inline __attribute__((always_inline))

enum { FLOAT32, FLOAT16, BFLOAT16, FLOAT64 };

/* e^-a for a >= 0 (Cody and Waite), as if a were at most 87: smaller results would be subnormal. NaN is
 * taken for 87 too, or its bits would spoil the exponent. `rest` is what rounding took from the result,
 * relative to it. */
INLINE float exp_of_minus(float a, float *rest) {
    a = a < 87.0f ? a : 87.0f;
    /* Beside 1.5 * 2^23 there is no room for a fraction: the last bits are the nearest whole number. */
    float shifted = fmaf(a, -1.44269504f, 12582912.0f);
    float k = shifted - 12582912.0f;
    float r = fmaf(k, -0.693145751953125f, -a);
    r = fmaf(k, -1.42860677e-6f, r);
    float r2 = r * r;
    float q0 = fmaf(0.166666672f, r, 0.5f);
    float q2 = fmaf(0.00833331048f, r, 0.0416664667f);
    float q4 = fmaf(0.000198909911f, r, 0.00139336498f);
    float less_one = fmaf(r2, fmaf(fmaf(q4, r2, q2), r2, q0), r);
    float power = 1.0f + less_one;
    *rest = (1.0f - power) + less_one;
    uint32_t bits, exponent;
    memcpy(&bits, &power, sizeof bits);
    memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 23;
    memcpy(&power, &bits, sizeof power);
    return power;
}

/* The same in float64, to 1e-14: for what is subtracted from a number close to it. NaN stays, as long as
 * it was a float: its last bits are zero. */
INLINE double wide_exp_of_minus(double a) {
    a = 700.0 < a ? 700.0 : a; /* in this order */
    double shifted = fma(a, -1.4426950408889634, 6755399441055744.0); /* 1.5 * 2^52 */
    double k = shifted - 6755399441055744.0;
    double r = fma(k, -0.69314718055994529, -a);
    double r2 = r * r;
    double q0 = fma(1.0 / 6, r, 0.5);
    double q2 = fma(1.0 / 120, r, 1.0 / 24);
    double q4 = fma(1.0 / 5040, r, 1.0 / 720);
    double q6 = fma(1.0 / 362880, r, 1.0 / 40320);
    double q8 = fma(1.0 / 39916800, r, 1.0 / 3628800);
    double power = 1.0 + fma(fma(fma(fma(fma(q8, r2, q6), r2, q4), r2, q2), r2, q0), r2, r);
    uint64_t bits, exponent;
    memcpy(&bits, &power, sizeof bits);
    memcpy(&exponent, &shifted, sizeof exponent);
    bits += exponent << 52;
    memcpy(&power, &bits, sizeof power);
    return power;
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

/* log x for x in 0..1; finite for 0. Its error is that of a float near 1. */
INLINE float log_of(float x) {
    int32_t bits;
    memcpy(&bits, &x, sizeof bits);
    int32_t exponent = (bits >> 23) - 127;
    bits = (bits & 0x007fffff) | 0x3f800000;
    float mantissa;
    memcpy(&mantissa, &bits, sizeof mantissa);
    return fmaf(exponent, 0.693147182f, log_of_one_plus(mantissa - 1.0f));
}

/* A double as a float, and what rounding took from that, relative to it. */
typedef struct {
    float rounded, rest;
} factor;

INLINE factor factor_of(double value) {
    float rounded = value;
    return (factor){rounded, rounded != 0.0f ? (value - rounded) / rounded : 0.0f};
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

INLINE int64_t size_of(int type) { return type == FLOAT64 ? 8 : type == FLOAT32 ? 4 : 2; }

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
