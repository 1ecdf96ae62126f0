"""One slot of each of DeepSeek-V4.1's layouts, worked out by hand; the numbers that are not named are 0.

mxfp8_528: a code is e4m3, S EEEE MMM with bias 7; a scale 2^k for 32 numbers is stored as k + 127, k the smallest with amax <= 448 * 2^k;
amax counts as 1e-4 at least. nvfp4_288: a code is e2m1, S EE M: 0, .5, 1, 1.5, 2, 3, 4, 6; a scale for 16 numbers is the e4m3 nearest
amax / 6, and 2^-9 at least.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class Example(NamedTuple):
    # number -> (latent, its code, the value read back); tile -> scale byte; what every other code and scale is.
    numbers: dict[int, tuple[float, int, float]]
    scales: dict[int, int]
    other_scale: int
    scale_bytes: int
    pack: Callable[[np.ndarray], np.ndarray]  # codes [512] to bytes

    def latents(self) -> np.ndarray:
        """float32 [1, 512]."""
        row = np.zeros((1, 512), np.float32)
        for at, (latent, _, _) in self.numbers.items():
            row[0, at] = latent
        return row

    def values(self) -> np.ndarray:
        """float32 [1, 512]: what the bytes stand for."""
        row = np.zeros((1, 512), np.float32)
        for at, (_, _, value) in self.numbers.items():
            row[0, at] = value
        return row

    def slot(self) -> np.ndarray:
        """uint8 [bytes of a slot]: numbers, then scales."""
        codes, scales = np.zeros(512, np.uint8), np.full(self.scale_bytes, self.other_scale, np.uint8)
        for at, (_, code, _) in self.numbers.items():
            codes[at] = code
        for at, byte in self.scales.items():
            scales[at] = byte
        return np.concatenate([self.pack(codes), scales])


MXFP8 = Example(
    {
        # amax = 1: 1 <= 448 * 2^-8 = 1.75. times 2^8: 256 = 0 1111 000, 128, and 77, which lies between 76 and 80.
        0: (1.0, 0x78, 1.0), 1: (-0.5, 0xF0, -0.5), 2: (0.30078125, 0x6A, 0.3125),
        # amax = 448: k = 0. Ties go to the even code: 17 to 16, 19 to 20.
        32: (448.0, 0x7E, 448.0), 33: (17.0, 0x58, 16.0), 34: (19.0, 0x5A, 20.0),
        # amax = 450 does not fit 448: k = 1, 225 is nearest 224. 2^-9 is the smallest code times 2; half of it is a tie with 0.
        64: (450.0, 0x76, 448.0), 65: (2.0**-8, 0x01, 2.0**-8), 66: (2.0**-9, 0x00, 0.0), 67: (-(2.0**-9), 0x80, -0.0),
        # NaN and an infinity each make all of their 32 numbers NaN.
        **{i: (float("nan") if i == 100 else 1.0, 0x7F, float("nan")) for i in range(96, 128)},
        **{i: (-float("inf") if i == 130 else 1.0, 0x7F, float("nan")) for i in range(128, 160)},
        511: (-3.0, 0xFC, -3.0),
    },
    {0: 0x77, 1: 0x7F, 2: 0x80, 3: 0xFF, 4: 0xFF, 15: 0x78},
    0x69, 16, lambda codes: codes,
)  # fmt: skip

NVFP4 = Example(
    {
        # amax = 6: scale 1. Ties go to the even code: 2.5 to 2, 5 to 4, .25 to 0, .75 to 1, 3.5 to 4. Zero keeps its sign.
        0: (6.0, 7, 6.0), 1: (-1.5, 0xB, -1.5), 2: (2.5, 4, 2.0), 3: (5.0, 6, 4.0), 4: (0.25, 0, 0.0), 5: (-0.25, 8, -0.0),
        6: (0.75, 2, 1.0), 7: (3.5, 6, 4.0),
        # amax = 1: 1 / 6 is nearest .171875 = 11 / 64 = 1.375 * 2^-3 = 0 0100 011.
        16: (1.0, 7, 1.03125), 17: (-0.5, 0xD, -0.515625),
        # 3008 / 6 is beyond e4m3's 448: 6 * 448. So is an infinity. -0.5 and all that is less than a quarter of 448 become 0.
        32: (3008.0, 7, 2688.0),
        48: (-float("inf"), 0xF, -2688.0), 49: (112.0, 0, 0.0), 50: (113.0, 1, 224.0), 51: (-0.5, 8, -0.0),
        # NaN has no code: the scale is NaN.
        **{i: (float("nan") if i == 70 else -1.0, 0, float("nan")) for i in range(64, 80)},
        # The smallest scale, 2^-9: 2^-7 / 2^-9 = 4.
        511: (2.0**-7, 6, 2.0**-7),
    },
    {0: 0x38, 1: 0x23, 2: 0x7E, 3: 0x7E, 4: 0x7F, 31: 0x01},
    0x01, 32, lambda codes: codes[::2] | codes[1::2] << 4,
)  # fmt: skip

EXAMPLES = {"mxfp8_528": MXFP8, "nvfp4_288": NVFP4}
