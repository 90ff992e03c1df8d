"""The resume certificate: what it certifies, and that it can fail."""

import json

import pytest

from normatch.config import make_config
from normatch.errors import UserError
from normatch.tools import verify


@pytest.fixture
def config(tmp_path):
    keys = {"backbone": "wrn-10-1", "steps": 12, "batch_size": 8, "uratio": 1, "eval_every": 2, "device": "cpu"}
    return make_config(out=str(tmp_path / "verify"), **keys)


def test_a_killed_run_is_certified(config, tmp_path):
    certificate = verify.verify_resume(config, kills=3)
    assert certificate == json.loads((tmp_path / "verify" / "certificate.json").read_text())
    assert certificate["bit_equal"] and certificate["steps"] == 12 and certificate["kills"] >= 1


def test_a_difference_of_one_bit_is_found(config, monkeypatch):
    load = verify.load_checkpoint

    def load_with_a_flipped_bit(path):
        state = load(path)
        if "killed" in str(path) and path.name == "last.pt":
            weight = state["model"]["classifier.fc.weight"]
            weight.view(-1)[0] += weight.view(-1)[0].abs() * 1.2e-7
        return state

    monkeypatch.setattr(verify, "load_checkpoint", load_with_a_flipped_bit)
    with pytest.raises(UserError, match="model"):
        verify.verify_resume(config, kills=1)


def test_an_existing_folder_is_kept(config, tmp_path):
    (tmp_path / "verify").mkdir()
    with pytest.raises(UserError, match="--overwrite"):
        verify.verify_resume(config, kills=1)
    with pytest.raises(UserError, match="replaces nothing else"):
        verify.verify_resume(config.model_copy(update={"overwrite": True}), kills=1)
    assert (tmp_path / "verify").is_dir()
