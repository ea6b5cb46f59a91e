"""Functions that generated loops call: raw memory access, and conversions of floats to bits."""

# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202, ARG001 - numba compiles these; they are not Python functions

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_HALF, _FLOAT, _DOUBLE = ir.HalfType(), ir.FloatType(), ir.DoubleType()


@intrinsic
def pointer(typing, address):
    """Convert an address to a pointer."""

    def code(context, builder, signature, args):
        return builder.inttoptr(args[0], _I8.as_pointer())

    return types.voidptr(types.int64), code


@intrinsic
def copy_bytes(typing, target, source, count):
    """Copy bytes from one address to another."""

    def code(context, builder, signature, args):
        to, since = (builder.inttoptr(each, _I8.as_pointer()) for each in args[:2])
        cgutils.raw_memcpy(builder, to, since, args[2], 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


@intrinsic
def bits32(typing, value):
    """The bits of a float32."""

    def code(context, builder, signature, args):
        return builder.bitcast(args[0], _I32)

    return types.int32(types.float32), code


@intrinsic
def float32_of(typing, bits):
    """The float32 with these bits."""

    def code(context, builder, signature, args):
        return builder.bitcast(args[0], _FLOAT)

    return types.float32(types.int32), code


@intrinsic
def bits64(typing, value):
    """The bits of a float64."""

    def code(context, builder, signature, args):
        return builder.bitcast(args[0], _I64)

    return types.int64(types.float64), code


@intrinsic
def float64_of(typing, bits):
    """The float64 with these bits."""

    def code(context, builder, signature, args):
        return builder.bitcast(args[0], _DOUBLE)

    return types.float64(types.int64), code


@intrinsic
def from_bfloat16(typing, bits):
    """Convert the bits of a bfloat16 to a float32."""

    def code(context, builder, signature, args):
        wide = builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16))
        return builder.bitcast(wide, _FLOAT)

    return types.float32(types.uint16), code


@intrinsic
def from_float16(typing, bits):
    """Convert the bits of a float16 to a float32."""

    def code(context, builder, signature, args):
        return builder.fpext(builder.bitcast(args[0], _HALF), _FLOAT)

    return types.float32(types.uint16), code


@intrinsic
def round_float16(typing, value):
    """Round to the nearest float16, as a float32."""

    def code(context, builder, signature, args):
        return builder.fpext(builder.fptrunc(args[0], _HALF), _FLOAT)

    return types.float32(types.float32), code


@njit(inline="always")
def round_bfloat16(value):
    """Round to the nearest bfloat16, as a float32."""
    bits = bits32(value)
    if (bits & np.int32(0x7FFFFFFF)) > np.int32(0x7F800000):
        return value
    rounded = bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))
    return float32_of(np.int32(rounded & np.int32(-65536)))


@njit(inline="always")
def ordered32(value):
    """Map a float32 to an integer with the same order; NaN is beyond all numbers."""
    bits = bits32(value)
    return np.int32(bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))


@njit(inline="always")
def value32(ordered):
    """The inverse of ``ordered32``."""
    return float32_of(np.int32(ordered ^ ((ordered >> np.int32(31)) & np.int32(0x7FFFFFFF))))


@njit(inline="always")
def ordered64(value):
    """Like ``ordered32``, for a float64."""
    bits = bits64(value)
    return bits ^ ((bits >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF))


@njit(inline="always")
def value64(ordered):
    """The inverse of ``ordered64``."""
    return float64_of(ordered ^ ((ordered >> np.int64(63)) & np.int64(0x7FFFFFFFFFFFFFFF)))


@njit(inline="always")
def fast_log2_32(value):
    """log₂ of a positive float32, to 3e-7: the exponent plus a polynomial of the fraction."""
    bits = bits32(value)
    m = float32_of(np.int32((bits & np.int32(0x7FFFFF)) | np.int32(0x3F800000))) - np.float32(1)
    q = np.float32(-0.0795568972826004) + m * np.float32(0.015529675409197807)
    q = np.float32(-0.32590124011039734) + m * (np.float32(0.19429320096969604) + m * q)
    q = np.float32(-0.7205854058265686) + m * (np.float32(0.4735531508922577) + m * q)
    q = m * (np.float32(1.442667841911316) + m * q)
    log = np.float32(np.int32((bits >> np.int32(23)) - np.int32(127))) + q
    return log if bits != np.int32(0) else np.float32(-np.inf)


@njit(inline="always")
def fast_log2_64(value):
    """Like ``fast_log2_32``, for a float64."""
    bits = bits64(value)
    fraction = (bits & np.int64(0xFFFFFFFFFFFFF)) | np.int64(0x3FF0000000000000)
    m = float64_of(fraction) - 1.0
    q = -0.0795568972826004 + m * 0.015529675409197807
    q = -0.32590124011039734 + m * (0.19429320096969604 + m * q)
    q = -0.7205854058265686 + m * (0.4735531508922577 + m * q)
    log = np.float64((bits >> np.int64(52)) - np.int64(1023)) + m * (1.442667841911316 + m * q)
    return log if bits != np.int64(0) else -np.inf


@njit(inline="always")
def ulp(value, eps, smallest):
    """Distance from a non-negative float64 to the next number of a dtype with this ``eps``."""
    power = float64_of(bits64(value) & np.int64(0x7FF0000000000000))
    step = power * eps
    return max(smallest, step)


@njit(nogil=True, error_model="numpy", cache=True)
def gather(addresses, runs, size, targets):
    """Copy the check sample of each tensor; ``runs`` has (runs, run length, stride) per tensor."""
    for t in range(len(addresses)):
        count, run, stride = runs[t, 0], runs[t, 1] * size[t], runs[t, 2] * size[t]
        for r in range(count):  # ten times as fast as a loop over bytes
            copy_bytes(targets[t] + r * run, addresses[t] + r * stride, run)
