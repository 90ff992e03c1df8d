"""`normatch bench kernels` measures every op, after checking that all providers agree, with a loss's gradients."""

import json

import pytest
import torch

from normatch import ops
from normatch.bench import kernels, measure
from normatch.cli import main


def test_every_op_and_direction_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "keep_memory", lambda: None)  # for the tests after this one
    arguments = ["bench", "kernels", "--quick", "--no-compile", "--rounds", "1", "--device", "cpu"]
    assert main([*arguments, "--only", "2d forward", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "into memory new from the system" in out
    result = json.loads((tmp_path / "kernels.json").read_text())
    assert (tmp_path / "kernels.png").stat().st_size > 1000
    assert {record["provider"] for record in result["records"]} == {"published", "closed", "normatch"}
    ours = [record for record in result["records"] if record["provider"] == "normatch"]
    assert [record["operations"] for record in ours] == [1] * len(ours)
    assert {case.op for case in kernels.cases(quick=True)} == {
        "affine_coupling", "coupling2d", "logdet", "gmm_log_prob", "flow_head",
    }  # fmt: skip


def test_a_provider_that_is_wrong_is_not_measured():
    case = next(case for case in kernels.cases(quick=True) if case.op == "logdet")
    case.providers["normatch"] = lambda log_scale: log_scale.sum(1) + 1
    with pytest.raises(RuntimeError, match="normatch is wrong"):
        measure.compare(case, "cpu", 1, leave_out=("closed_compiled",))


def wrong_in(*outputs):
    """The coupling, with an error of 10 % in these outputs and their gradients."""

    def op(*inputs):
        return [1.1 * value if i in outputs else value for i, value in enumerate(ops.affine_coupling(*inputs))]

    return op


@pytest.mark.parametrize(("direction", "op"), [("forward", wrong_in(1)), ("backward", wrong_in(1))])
def test_every_output_and_gradient_must_agree(direction, op):
    case = next(c for c in kernels.cases(quick=True) if c.op == "affine_coupling" and c.direction == direction)
    case.providers["normatch"] = op
    with pytest.raises(RuntimeError, match="normatch is wrong"):
        measure.check_agreement(case, "normatch", case.inputs("cpu"))


@pytest.mark.parametrize("op", ["gmm_log_prob", "flow_head"])
def test_training_is_timed_with_the_gradients_of_the_loss(op):
    case = next(case for case in kernels.cases(quick=True) if case.op == op and case.direction == "training")
    inputs = [value.requires_grad_() for value in case.inputs("cpu")]
    outputs = measure.outputs_of(case.providers["closed"](*inputs))
    want = torch.autograd.grad(case.loss(*outputs), inputs)
    got = measure.make_call(case.providers["closed"], inputs, "training", case.loss)()
    for value, exact in zip(got, want, strict=True):
        torch.testing.assert_close(value, exact)


def test_a_loss_against_a_stored_run_fails(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(kernels, "keep_memory", lambda: None)
    arguments = ["bench", "kernels", "--quick", "--no-compile", "--rounds", "1", "--device", "cpu"]
    arguments += ["--only", "logdet forward 512x64 float32"]
    assert main([*arguments, "--out", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "kernels.json").read_text())
    for factor, status in ((1e-3, 0), (1e3, 1)):
        records = [{**record, "percent_of_copy": factor * record["percent_of_copy"]} for record in stored["records"]]
        (tmp_path / "before.json").write_text(json.dumps({**stored, "records": records}))
        assert main([*arguments, "--compare", str(tmp_path / "before.json")]) == status
        assert ("LOST" in capsys.readouterr().out) == bool(status)


@pytest.mark.parametrize("case", kernels.cases(quick=True), ids=lambda case: case.name)
def test_providers_agree(case):
    torch.manual_seed(0)
    inputs = case.inputs("cpu")
    for name in case.providers:
        if "compiled" not in name:
            measure.check_agreement(case, name, inputs)
