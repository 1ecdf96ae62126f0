"""The form that tokamax's sparse_mla takes, beside tokamax's own reference, on the arguments and with the tolerance of its own tests."""

from __future__ import annotations

import pytest

pytest.importorskip("tokamax", reason="no tokamax here: pip install tokamax==0.0.17, for Python 3.12 and later")

import jax
from tokamax._src.ops.sparse_mla import api, test_base

from jax_dsv4 import adapters


@pytest.mark.parametrize(("topk", "pad_tokens"), [(128, False), (512, True)])
def test_sparse_mla(topk, pad_tokens):
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):  # tokamax's own code is of neither
        arguments, tokens = test_base.make_inputs(batch_size=6, topk=topk, pad_tokens=pad_tokens)
        got = api.sparse_mla(*arguments, implementation=adapters.tokamax_sparse_mla)
        test_base.assert_matches_reference(got, arguments, tokens)
