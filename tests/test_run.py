"""The run folder: what it keeps when writing fails or a process is killed, and what a run goes on from."""

import pytest
import torch

from normatch.config import make_config
from normatch.errors import UserError
from normatch.published.checkpoints import FORMAT
from normatch.training.run import Run, check_same_run, write_text


def tiny(out, **keys):
    keys = {"steps": 10, "eval_every": 10, "backbone": "wrn-10-1", "device": "cpu", **keys}
    return make_config(out=str(out), **keys)


def test_a_damaged_checkpoint_never_takes_the_place_of_a_good_one(tmp_path, monkeypatch):
    config = tiny(tmp_path / "run", steps=30, resume="auto")
    state = {"format": FORMAT, "normatch": "", "config": config.model_dump(), "model": {}, "ema": {}}
    run = Run(config)
    run.open(config, torch.device("cpu"), 0)
    for step in (10, 20):
        run.save({**state, "step": step}, improved=True)
    run.close()
    run.last.write_bytes(b"hello")

    run = Run(config)
    assert run.checkpoint_to_resume(config)["step"] == 10
    run.open(config, torch.device("cpu"), 10)
    monkeypatch.setattr(torch, "save", lambda state, file: file.write(b"x") / 0)
    with pytest.raises(ZeroDivisionError):  # as if the process had died there
        run.save({**state, "step": 20}, improved=False)
    run.close()
    assert Run(config).checkpoint_to_resume(config)["step"] == 10
    assert run.last.with_suffix(".damaged").read_bytes() == b"hello"  # it may have been the disk, for a moment


def test_what_a_run_folder_holds_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    config = tiny(tmp_path / "run", resume="auto")
    run = Run(config)
    run.open(config, torch.device("cpu"), 0)
    run.log(5, "train", {"loss": 1.0})
    run.close()
    before = {path.name: path.read_bytes() for path in run.folder.glob("*.*")}

    def full(number):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("normatch.training.run.os.fsync", full)
    for text in ("config.yaml", "env.json", "metrics.jsonl", "summary.json"):
        with pytest.raises(UserError, match=f"{text} could not be written.*No space left"):
            write_text(run.folder / text, "new")
    with pytest.raises(UserError, match="could not be written"):
        run.open(config, torch.device("cpu"), 5)
    assert {path.name: path.read_bytes() for path in run.folder.glob("*.*")} == before


def test_a_checkpoint_of_a_version_with_fewer_keys_is_gone_on_from(tmp_path):
    config = tiny(tmp_path / "run")
    saved = config.model_dump()
    del saved["lambda_u"]
    check_same_run(saved, config)
    with pytest.raises(UserError, match=r"lambda_u=1\.0, this run has lambda_u=2\.0"):
        check_same_run(saved, config.model_copy(update={"lambda_u": 2.0}))


def test_a_run_killed_before_its_summary_repeats_its_last_stretch(tmp_path):
    config = tiny(tmp_path / "run", steps=20, resume="auto")
    run = Run(config)
    run.open(config, torch.device("cpu"), 0)
    for step in (10, 20):
        state = {"format": FORMAT, "normatch": "", "config": config.model_dump(), "model": {}, "ema": {}, "step": step}
        run.save(state, improved=False)
    assert Run(config).checkpoint_to_resume(config)["step"] == 10
    run.write_summary({})
    run.close()
    assert Run(config).checkpoint_to_resume(config)["step"] == 20
    (run.folder / "summary.json").unlink()
    run.earlier[0].unlink()
    assert Run(config).checkpoint_to_resume(config)["step"] == 20, "its checkpoints are of more than this one"
    single = config.model_copy(update={"eval_every": 20})
    assert Run(single).checkpoint_to_resume(single) is None


def test_resume_auto_starts_afresh_only_where_nothing_is_lost(tmp_path):
    config = tiny(tmp_path / "run", resume="auto")
    run, metrics = Run(config), tmp_path / "run" / "metrics.jsonl"
    run.open(config, torch.device("cpu"), 0)
    for kind, step in (("train", 5), ("eval", 5)):  # and killed before the checkpoint
        run.log(step, kind, {})
        assert Run(config).checkpoint_to_resume(config) is None
    before = metrics.read_text()
    for name, content in (("metrics.jsonl", before + before), ("summary.json", "{}")):  # its checkpoints were deleted
        (tmp_path / "run" / name).write_text(content)
        with pytest.raises(UserError, match="no checkpoint to go on from"):
            Run(config).checkpoint_to_resume(config)
        metrics.write_text(before)
    run.close()

    other = tiny(tmp_path / "other", resume="auto")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "log.txt").write_text("of the scheduler")
    assert Run(other).checkpoint_to_resume(other) is None
    (tmp_path / "other" / "config.yaml").write_text("mine: true")
    with pytest.raises(UserError, match="no checkpoint to go on from"):
        Run(other).checkpoint_to_resume(other)
