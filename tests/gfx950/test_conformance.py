"""AITER's kernels on the software GPU, held to what every backend is held to: in their own layouts, to their own precision."""

from typing import ClassVar

import numpy as np
import pytest
from aiter_kernel import BF16, FP8
from calls import expected
from conformance import NativeConformance, named, plan_of


class TestBF16(NativeConformance):
    implementation = "aiter"
    layout = "aiter_bf16"
    fuses = False
    guarded = ()  # the kernels do not look whether a token's items fit together
    out_tolerance: ClassVar = dict.fromkeys(("bfloat16", "float32"), BF16.out)
    lse_tolerance = BF16.lse
    reruns = 3  # a second each
    garbled = ("heads16",)

    @pytest.fixture(autouse=True)
    def on_software(self, hsa, request):
        """With garbage in a plan, over the bridge: there every buffer is an allocation of its own, and XLA's workspaces are not."""
        request.getfixturevalue("bridge" if request.function.__name__ == "test_garbage_plan" else "rocm")

    def refusal(self, case):
        if "ci" not in case.tags:
            return "FlashMLA's grid takes minutes a case on the software GPU; keys, heads and cuts are as in the smaller cases"
        if any(scope is not None and scope.layout != "fp8_ds_mla" for scope in (case.swa, case.extra)):
            return "in its own layout the case is another one"

    def answer(self, p):
        return expected(p.q, [s for s in (p.swa, p.extra) if s is not None], p.attn_sink, p.scale)

    def test_tokens_are_split(self, own_planner):
        """Among the cases are partial results to merge, of both scopes."""
        plan = plan_of(self.make(named("few_long_tokens")), self.implementation)
        assert all(np.diff(work.reduce_indptr).any() for work in plan.work)


class TestFP8(TestBF16):
    layout = "aiter_fp8"
    out_tolerance: ClassVar = dict.fromkeys(("bfloat16", "float32"), FP8.out)
    lse_tolerance = FP8.lse
