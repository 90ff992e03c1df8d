"""`normatch bench step`: the formulations agree, and the record holds all of them and every part of the step."""

import json

import pytest
import torch

from normatch.bench import step as bench
from normatch.cli import make_parser

COMMAND = "bench step --dataset digits --backbone wrn-10-1 --batch_size 2 --uratio 1"


def run(*words):
    words = [*COMMAND.split(), *words]
    options = make_parser(words[:2]).parse_args([*words, "--device", "cpu", "--rounds", "1", "--no-compile"])
    return options.run(options)


@pytest.mark.parametrize("method", ["normatch", "fixmatch"])
def test_the_record_holds_every_formulation_and_part(tmp_path, capsys, method):
    assert run("--method", method, "--out", str(tmp_path)) == 0
    record = json.loads((tmp_path / "step.json").read_text())
    flow = {"closed form"} if method == "normatch" else set()
    assert record["seconds"].keys() == {"published", "normatch", "backbone"} | flow
    assert record["times_published"] == record["seconds"]["published"] / record["seconds"]["normatch"]
    parts = {"data", "backbone forward", "backbone backward", "loss, both ways", "SGD", "average", "metrics"}
    assert record["parts"].keys() == parts | ({"flow head, both ways", "AdamW of the flow"} if flow else set())
    assert all(seconds >= 0 for seconds in record["parts"].values())
    assert "x faster" in capsys.readouterr().out


def shifted(flow, x, forward=bench.PublishedFlow.forward):
    return forward(flow, x + 0.1)


@pytest.mark.parametrize(
    ("target", "name", "planted"),
    [(bench.PublishedFlow, "forward", shifted), (torch.optim.SGD, "step", lambda optimizer: None)],
    ids=["another flow", "no optimizer"],
)
def test_a_formulation_that_computes_something_else_is_refused(monkeypatch, target, name, planted):
    monkeypatch.setattr(target, name, planted)
    with pytest.raises(RuntimeError, match="do not agree"):
        run()
