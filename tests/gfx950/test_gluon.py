"""AITER's Gluon kernel on the software GPU, compiled from an AITER source tree, through the handlers that we ship."""

from typing import ClassVar

import gluon
import pytest
from compare import OUT_BF16
from conformance import Conformance


class TestGluon(Conformance):
    implementation = "aiter_gluon"
    log2_magnitude = -3  # the softmax's weights are bf16, as FlashMLA's are
    out_tolerance: ClassVar = {"bfloat16": OUT_BF16}
    reruns = 3  # a second each

    @pytest.fixture(autouse=True)
    def on_software(self, on_gluon):
        """Every access of every kernel is checked there."""

    def refusal(self, case):
        if case.dtype != "bfloat16":
            return "it takes q in bfloat16"
        scopes = [s for s in (case.swa, case.extra) if s is not None]
        if any(s.layout != "fp8_ds_mla" for s in scopes):
            return "it reads layout fp8_ds_mla"
        if any(s.stride_extra_bytes % 2 for s in scopes):
            return "it needs an even block stride"
        if "ci" not in case.tags:
            return "FlashMLA's grid takes minutes a case on the software GPU"
        return None

    def run(self, p, fused=None, plan=None):
        gluon.compile_for(p.q, [s for s in (p.swa, p.extra) if s is not None], p.scale, fused is not False)
        return super().run(p, fused, plan)
