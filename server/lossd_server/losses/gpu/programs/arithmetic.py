"""Arithmetic that keeps what rounding takes; `native/arithmetic.h` for the GPU.

Numbers named `x` and `x_low` stand for x + x_low: a float32, and what rounding took from it. Nothing
here is fused but what says so: the launches switch contraction off.
"""

import os

import torch
import triton
import triton.language as tl

_HAS_PTX = tl.constexpr(torch.version.hip is None and os.environ.get("TRITON_INTERPRET") != "1")


@triton.jit
def minus(x):
    """-x, which costs nothing; the language's own is 0 - x, which is an addition."""
    return x * -1.0


@triton.jit
def reciprocal(x):
    """1 / x to the last place or so; the language's own division also looks after subnormal numbers."""
    if _HAS_PTX:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def power_of_two(x):
    """2^x, good to 2 units in the last place: the processor's own."""
    if _HAS_PTX:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def exp_of_minus(a):
    """e^-a for a >= 0, as if a were at most 87: smaller results would be subnormal.

    What rounding takes from a / log 2 is made up for: it would cost as many digits as a has.
    """
    a = tl.minimum(a, 87.0, propagate_nan=tl.PropagateNan.ALL)
    exponent = a * -1.44269504
    left_out = tl.fma(a, -1.44269504, minus(exponent))
    left_out = tl.fma(a, -1.92596299e-8, left_out)
    power = power_of_two(exponent)
    return tl.fma(power, left_out * 0.693147182, power)


@triton.jit
def log_of_one_plus(e):
    """log(1 + e) for e in 0..1: e times a polynomial, so that small e keep their digits."""
    e2 = e * e
    e4 = e2 * e2
    q0 = tl.fma(e, 0.333297104, -0.499998927)
    q2 = tl.fma(e, 0.196632743, -0.249516159)
    q4 = tl.fma(e, 0.105436236, -0.152696669)
    q6 = tl.fma(e, 0.0195425265, -0.0563736111)
    q = tl.fma(tl.fma(e4, -0.00317605701, tl.fma(q6, e2, q4)), e4, tl.fma(q2, e2, q0))
    return tl.fma(e2, q, e)


@triton.jit
def multiply(power, power_low, p, p_low):
    """(power + power_low) · (p + p_low)."""
    product = power * p
    left_out = tl.fma(power, p, minus(product))
    return product, tl.fma(power, p_low, tl.fma(power_low, p, left_out))


@triton.jit
def power_of(p, p_low, gamma):
    """p^gamma: by multiplication for 0..4, which lose less than a logarithm would, else in float64."""
    power = tl.full(p.shape, 1.0, tl.float32)
    power_low = tl.zeros(p.shape, tl.float32)
    whole = gamma.to(tl.int32)
    if (gamma == whole) & (whole <= 4):
        for _ in range(whole):
            power, power_low = multiply(power, power_low, p, p_low)
    else:
        wide = tl.exp(gamma * tl.log(p.to(tl.float64) + p_low))
        power = wide.to(tl.float32)
        power_low = (wide - power).to(tl.float32)
    return power, power_low


@triton.jit
def focal_terms(z, gamma, SQUARE: tl.constexpr):
    """f(z) = sigmoid(z)^gamma · softplus(z), and its derivative, from e = exp(-|z|); gamma is 2 if SQUARE.

    What rounding takes from the power, and what 1 / (1 + e) lacks, is carried along: each enters the
    result more than once, and their errors would add up.
    """
    e = exp_of_minus(tl.abs(z))
    large = reciprocal(1.0 + e)
    # It should be large · (1 + lack): 1 + e was rounded, and the division is approximate.
    lack = tl.fma(minus(large), e, 1.0 - large)
    small = e * large
    small_low = tl.fma(e, large, minus(small))
    softplus = log_of_one_plus(e) + tl.maximum(z, 0.0)
    positive = z >= 0.0
    p = tl.where(positive, large, small)
    p_low = tl.where(positive, 0.0, small_low)
    q = tl.where(positive, small, large)
    if SQUARE:
        gamma_of_slope = 2.0
        power, power_low = multiply(p, p_low, p, p_low)
    else:
        gamma_of_slope = gamma.to(tl.float32)
        power, power_low = power_of(p, p_low, gamma)
    share = tl.fma(gamma_of_slope * q, softplus, p)
    # p and q are multiples of large: the power lacks gamma times as much, the share once.
    power_low = tl.fma(gamma_of_slope * lack, power, power_low)
    loss = tl.fma(softplus, power, softplus * power_low)
    return loss, tl.fma(share, power, share * tl.fma(lack, power, power_low))
