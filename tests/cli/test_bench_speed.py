"""`xpatch bench kernel` and `xpatch bench latency`: options reach the benchmark, tables and files are what people and machines read."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def drawn(drawn_cases: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The real benchmarks on drawn patches of small width, which are there at once."""
    from xpatch.benchmarks import kernel, model_latency

    monkeypatch.setattr(kernel, "run", functools.partial(kernel.run, cases=drawn_cases, width=32, repeats=15))
    monkeypatch.setattr(model_latency, "run", functools.partial(model_latency.run, cases=drawn_cases, repeats=15))


@pytest.mark.parametrize("command", ["kernel", "latency"])
def test_help_has_an_example(run: Callable[..., Any], command: str) -> None:
    result = run("bench", command, "--help")
    assert result.code == 0 and f"Example: xpatch bench {command}" in result.out


@pytest.mark.usefixtures("drawn")
def test_kernel_writes_a_file_and_prints_rows_and_goals(run: Callable[..., Any], tmp_path: Path) -> None:
    out = tmp_path / "kernel.json"
    words = (
        "--n",
        "30,60",
        "--m",
        "1,4",
        "--patches",
        "default,adversarial",
        "--threads",
        1,
        "--seed",
        3,
        "--json",
        out,
    )
    result = run("bench", "kernel", *words)
    assert result.code == 0, result.err
    assert result.err == ""  # no bar where nobody watches
    assert "adversarial" in result.out and "Goals" in result.out and str(out) in result.out.replace("\n", "")
    found = json.loads(out.read_text(encoding="utf-8"))
    assert {(row["patches"], row["n"], row["m"], row["threads"]) for row in found["rows"]} == {
        (kind, n, m, 1) for kind in ("default", "adversarial") for n in (30, 60) for m in (1, 4)
    }
    assert found["header"]["seeds"] == [3]


@pytest.mark.usefixtures("drawn")
def test_kernel_stretch_leaves_a_chart(run: Callable[..., Any], tmp_path: Path) -> None:
    result = run("bench", "kernel", "--stretch", "--n", "10,100", "--m", "1", "--json", tmp_path / "stretch.json")
    assert result.code == 0, result.err
    assert (tmp_path / "stretch.svg").read_text(encoding="utf-8").startswith("<svg")


@pytest.mark.usefixtures("drawn")
def test_latency_of_a_folder(run: Callable[..., Any], any_model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    words = ("--model", any_model_folder, "--patches", 500, "--batch", "8", "--tokens", "6", "--json", out)
    result = run("bench", "latency", *words)
    assert result.code == 0, result.err
    assert str(out) in result.out.replace("\n", "")
    row = json.loads(out.read_text(encoding="utf-8"))["rows"][0]
    assert (row["model"], row["batch"], row["tokens"], row["patches"]) == (str(any_model_folder), 8, 6, 500)
    assert row["moved"] > 100 * row["max_logit_diff"]


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("kernel", ("--n", "0"), "--n"),
        ("kernel", ("--m", "1,x"), "--m"),
        ("kernel", ("--patches", "best"), "kinds are default"),
        ("kernel", ("--quick", "--stretch"), "two grids"),
        ("latency", ("--batch", ","), "--batch"),
        ("latency", ("--patches", "0"), "--patches"),
        ("latency", ("--model", "no-such-model"), "does not exist"),
        ("latency", ("--backend", "jax"), "backends are torch, ort, both"),
    ],
)
def test_refuses_bad_options(
    run: Callable[..., Any], tmp_path: Path, command: str, words: tuple[str, ...], said: str
) -> None:
    result = run("bench", command, *words, "--json", tmp_path / "out.json")
    assert result.code == 2 and said in result.err
    assert list(tmp_path.iterdir()) == []


def test_latency_refuses_a_model_without_a_head_it_times(run: Callable[..., Any], tmp_path: Path) -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "masked")
    result = run("bench", "latency", "--model", tmp_path / "masked", "--json", tmp_path / "out.json")
    assert result.code == 2 and "found BertForMaskedLM" in result.err
