"""One block of fp8_ds_mla worked out by hand: 2 slots, a stride of 1184 (16 bytes more than 2 * 584).

bytes 0 to 575     slot 0: 448 e4m3, 64 bfloat16 (little-endian)
      576 to 1151  slot 1
      1152 to 1159 slot 0: 7 ue8m0 and a pad byte
      1160 to 1167 slot 1
      1168 to 1183 padding

e4m3 is S EEEE MMM with bias 7: 1 = 0 0111 000 = 0x38, 448 = 1.75 * 2^8 = 0 1111 110 = 0x7e; below 2^-6 a code counts 2^-9.
A tile's scale is 2^k, k the smallest with amax <= 448 * 2^k, stored as k + 127; amax counts as 1e-4 at least.
"""

from __future__ import annotations

import numpy as np

BLOCK_SIZE, STRIDE = 2, 1184
INF, NAN = float("inf"), float("nan")

# tile -> (scale byte, [(number, its code, the value read back)]); the tile's other numbers are 0, whose code is 0.
SLOT_0 = [
    # amax = 448: k = 0.
    (127, [(448.0, 0x7E, 448.0), (-448.0, 0xFE, -448.0), (1.0, 0x38, 1.0), (-1.5, 0xBC, -1.5), (2.0**-9, 0x01, 2.0**-9),
           # Ties go to the even code: 2^-10 to 0, 3 * 2^-10 to 2; 17 to 16 = 0 1011 000, 19 to 20 = 0 1011 010.
           (2.0**-10, 0x00, 0.0), (3 * 2.0**-10, 0x02, 2.0**-8), (17.0, 0x58, 16.0), (19.0, 0x5A, 20.0)]),
    # amax = 449 does not fit 448: k = 1. 449 / 2 = 224.5 is nearest 224 = 1.75 * 2^7 = 0 1110 110; 1 / 2 = 0 0110 000.
    (128, [(449.0, 0x76, 448.0), (1.0, 0x30, 1.0)]),
    # amax = 0 counts as 1e-4 = 1.63 * 2^-14: k = -14 - 8 = -22 (1.63 <= 1.75). Zero keeps its sign.
    (105, [(0.0, 0x00, 0.0), (-0.0, 0x80, -0.0)]),
    # amax = 2^-13: k = -13 - 8 = -21; 2^-13 * 2^21 = 2^8 = 0 1111 000.
    (106, [(2.0**-13, 0x78, 2.0**-13)]),
    # amax = 14 = 448 * 2^-5: k = -5 exactly; 7 * 2^5 = 224.
    (122, [(14.0, 0x7E, 14.0), (-7.0, 0xF6, -7.0)]),
    # An infinity takes the largest finite scale, 2^127, and saturates: 448 * 2^127 is beyond float32. 1 * 2^-127 is 0.
    (254, [(INF, 0x7E, 448 * 2.0**127), (-INF, 0xFE, -448 * 2.0**127), (1.0, 0x00, 0.0)]),
    # NaN does not count towards amax = 2: k = 1 - 8 = -7; 2 * 2^7 = 256.
    (120, [(NAN, 0x7F, NAN), (2.0, 0x78, 2.0)]),
]  # fmt: skip
# (number, bfloat16's bytes low and high, the value read back). 1 + 2^-8 lies between 0x3f80 and 0x3f81, 1 + 3 * 2^-8 between 0x3f81
# and 0x3f82: both go to the even one.
ROPE_0 = [
    (1.0, (0x80, 0x3F), 1.0), (-2.0, (0x00, 0xC0), -2.0), (1 + 2.0**-8, (0x80, 0x3F), 1.0), (1 + 3 * 2.0**-8, (0x82, 0x3F), 1 + 2.0**-6),
    (INF, (0x80, 0x7F), INF), (NAN, (0xC0, 0x7F), NAN),
]  # fmt: skip


def latents() -> np.ndarray:
    """float32 [2, 512]. Slot 1 is zeros but for 3 (the first nope number) and 0.5 (the last rope number)."""
    rows = np.zeros((2, 512), np.float32)
    for tile, (_, numbers) in enumerate(SLOT_0):
        rows[0, 64 * tile : 64 * tile + len(numbers)] = [number for number, _, _ in numbers]
    rows[0, 448 : 448 + len(ROPE_0)] = [number for number, _, _ in ROPE_0]
    rows[1, 0], rows[1, 511] = 3.0, 0.5
    return rows


def values() -> np.ndarray:
    """float64 [2, 512]: what the bytes stand for."""
    rows = latents().astype(np.float64)
    for tile, (_, numbers) in enumerate(SLOT_0):
        rows[0, 64 * tile : 64 * tile + len(numbers)] = [value for _, _, value in numbers]
    rows[0, 448 : 448 + len(ROPE_0)] = [value for _, _, value in ROPE_0]
    return rows


def packed(padding: int = 0) -> np.ndarray:
    """uint8 [1, 1184]."""
    block = np.zeros(STRIDE, np.uint8)
    for tile, (scale, numbers) in enumerate(SLOT_0):
        block[64 * tile : 64 * tile + len(numbers)] = [code for _, code, _ in numbers]
        block[1152 + tile] = scale
    block[448 : 448 + 2 * len(ROPE_0)] = [byte for _, low_high, _ in ROPE_0 for byte in low_high]
    # 3 = 1.5 * 2: k = 1 - 8 = -7 (1.5 <= 1.75), and 3 * 2^7 = 384 = 1.5 * 2^8 = 0 1111 100. 0.5 is 0x3f00.
    block[576], block[1160] = 0x7C, 120
    block[1161:1167] = 105
    block[1151] = 0x3F
    block[1168:] = padding
    return block[None]
