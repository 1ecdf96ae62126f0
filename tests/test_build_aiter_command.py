"""What `python -m jax_dsv4.build_aiter` says to what it cannot do; tests/gfx950 has what it can."""

from __future__ import annotations

from pathlib import Path

import pytest

from jax_dsv4 import build_aiter


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "/nowhere has no csrc/kernels/mla/metadata.cu: --source must be an AITER source tree"),
        (["--heads", "16"], "/nowhere has no aiter/ops/triton/"),
        (["--heads", "16", "0"], "--heads must be at least 1, got 0"),
        (["--heads", "16", "--block-sizes", "64", "64", "2"], "--block-sizes must be one or two sizes of at least 1, got 64 64 2"),
        (["--heads", "16", "--block-sizes", "0"], "--block-sizes must be one or two sizes of at least 1, got 0"),
        (["--heads", "16", "--scale", "nan"], "--scale must be positive and finite, got nan"),
    ],
)
def test_errors(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["build_aiter", "--source", "/nowhere", "--compiler", "/bin/true", *arguments])
    with pytest.raises(SystemExit) as stopped:
        build_aiter.main()
    assert message in f"{stopped.value.code}{capsys.readouterr().err}"


def test_a_cache_directory_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line, with its name."""
    source, blocked = tmp_path / "aiter", tmp_path / "file"
    blocked.write_text("")
    (source / "csrc/kernels/mla").mkdir(parents=True)
    (source / "csrc/kernels/mla/metadata.cu").write_text("aiter_tensor_t")
    monkeypatch.setenv("JAX_DSV4_CACHE_DIR", str(blocked / "cache"))
    monkeypatch.setattr("sys.argv", ["build_aiter", "--source", str(source), "--compiler", "/bin/true"])
    with pytest.raises(SystemExit) as stopped:
        build_aiter.main()
    assert str(stopped.value.code).startswith(f"{blocked}/cache")
    assert str(stopped.value.code).endswith(": Not a directory")


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(build_aiter, "run", interrupt)
    monkeypatch.setattr("sys.argv", ["build_aiter", "--source", "/nowhere"])
    with pytest.raises(SystemExit) as stopped:
        build_aiter.main()
    assert (stopped.value.code, capsys.readouterr().err) == (130, "python -m jax_dsv4.build_aiter: interrupted\n")
