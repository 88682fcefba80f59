"""Sizes that keep a CPU at memory speed, its sums exact, and its temporaries small."""

__all__ = ["BATCH", "BLOCK", "PIECE", "ROW", "SMALL", "TRUSTED"]

# Temporaries of a step stay below 2 MiB whatever the size of a tensor: the sizes here see to it.

# Elements per float32 partial norm. A row adds 64 values into each of 8 lanes, which bounds its
# rounding error below 1e-6 for any values; whole tensors drift by 1e-2 at 1e8 elements.
ROW = 512
# Float32 elements read at a time: 0.4 MiB of row norms.
PIECE = 1 << 24
# Half precision elements converted at a time, into 1.9 MiB; smaller blocks cost dispatch.
BLOCK = 30 << 14
# Elements concatenated, or taken in float64, at a time: temporaries stay at 1 MiB.
BATCH = 1 << 17
# Tensors with fewer elements are concatenated first: their cost is dispatch, not arithmetic.
SMALL = 1 << 14
# Float32 squares lose digits below this sum and overflow above; both are then done in float64.
TRUSTED = 1e-18
