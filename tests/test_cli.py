"""The command line: what it prints, and that every mistake gets one line and a non-zero status."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import normatch
from normatch.cli import _config, _spell_check, main, make_parser
from normatch.config import known_keys, make_config, method_class, preset_text, presets
from normatch.data import Split, load_dataset
from normatch.published.flags import PUBLISHED

QUICK = ["--backbone", "wrn-10-1", "--steps", "4", "--batch_size", "8", "--uratio", "1", "--num_workers", "0"]
QUICK += ["--device", "cpu"]
SUPERVISED = [word for word in QUICK if word not in ("--uratio", "1")]  # it has no unlabeled images


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", *QUICK, "--eval_every", "2", "--log_every", "2", "--out", str(out)]) == 0
    return out


def configured(arguments):
    """The configuration that a command line of `train` asks for."""
    return _config(make_parser(arguments).parse_args(_spell_check(arguments)))


def refused(capsys, arguments, *said, started=False):
    """Run a command that must fail: one line on standard error (after others if it `started`), none on output."""
    capsys.readouterr()
    assert main([str(a) for a in arguments]) != 0
    captured = capsys.readouterr()
    *before, message = captured.err.splitlines()
    assert captured.out == "" and message.startswith("normatch: ") and "Traceback" not in captured.err
    assert started or not before, "a mistake gets one line"
    for text in said:
        assert str(text) in message
    return captured


def test_train_prints_the_configuration_and_the_result(tmp_path, capsys):
    assert main(["train", *QUICK, "--method", "fixmatch", "--out", str(tmp_path / "run")]) == 0
    captured = capsys.readouterr()
    assert "method: fixmatch" in captured.err and "steps: 4" in captured.err
    assert "test accuracy" in captured.out and str(tmp_path / "run") in captured.out
    assert "step 4/4" in captured.err and "views/s" in captured.err and "ETA" in captured.err


@pytest.mark.parametrize("method", ["fixmatch", "supervised"])
def test_all_labels(tmp_path, capsys, method):
    """Supervised, and with consistency on the same images: every label that there is."""
    out = tmp_path / "run"
    quick = SUPERVISED if method == "supervised" else QUICK
    assert main(["train", *quick, "--method", method, "--num_labels", "0", "--out", str(out)]) == 0
    assert "all labels" in capsys.readouterr().out
    split = Split.load(out / "split.npz")
    everything = list(range(len(load_dataset("digits").train_labels)))
    assert split.labeled.tolist() == split.unlabeled.tolist() == everything


def test_no_progress_is_quiet(tmp_path, capsys):
    assert main(["train", *QUICK, "--no-progress", "--out", str(tmp_path / "run")]) == 0
    assert "views/s" not in capsys.readouterr().err


def test_command_line_beats_file_beats_preset(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("steps: 3\nseed: 5\nmu: 1\n")
    out = tmp_path / "run"
    arguments = ["train", "digits", *QUICK, "--config", str(tmp_path / "c.yaml"), "--num-labeled", "20"]
    assert main([*arguments, "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["seed"], summary["num_labels"]) == (4, 5, 20)


def test_eval(run_folder, capsys):
    capsys.readouterr()
    assert main(["eval", str(run_folder), "--device", "cpu", "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["test_accuracy"] == json.loads((run_folder / "summary.json").read_text())["test_accuracy"]
    assert main(["eval", str(run_folder / "checkpoints" / "best.pt")]) == 0
    assert "test_accuracy_flow" in capsys.readouterr().out


def test_predict(run_folder, tmp_path, capsys):
    dataset = load_dataset("digits")
    for i in range(3):
        Image.fromarray(dataset.test_x[i]).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("not an image, and not looked at in a folder")
    capsys.readouterr()
    assert main(["predict", str(run_folder), str(tmp_path), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = normatch.load(run_folder).predict(dataset.test_x[:3]).tolist()
    assert [int(r["class"]) for r in rows] == expected
    assert [r["image"] for r in rows] == [str(tmp_path / f"{i}.png") for i in range(3)]
    assert main(["predict", str(run_folder), str(tmp_path / "0.png")]) == 0
    assert capsys.readouterr().out.split("\t")[1] == str(expected[0])


def test_predict_goes_on_after_a_file_that_is_no_image(run_folder, tmp_path, capsys):
    for name in ("a.png", "c.png"):
        Image.fromarray(load_dataset("digits").test_x[0]).save(tmp_path / name)
    (tmp_path / "b.png").write_text("not an image")
    capsys.readouterr()
    assert main(["predict", str(run_folder), str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert [line.split("\t")[0] for line in captured.out.splitlines()] == [str(tmp_path / f"{n}.png") for n in "ac"]
    assert len(captured.err.splitlines()) == 1 and str(tmp_path / "b.png") in captured.err


def test_predict_resizes_and_converts(run_folder, tmp_path, capsys):
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (50, 70), dtype=np.uint8)).save(tmp_path / "gray.png")
    Image.fromarray(rng.integers(0, 255, (9, 8, 4), dtype=np.uint8)).save(tmp_path / "alpha.png")
    assert main(["predict", str(run_folder), str(tmp_path)]) == 0


def test_info(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for text in (normatch.__version__, torch.__version__, "DALI"):
        assert text in out


def test_flags_that_say_nothing_here_take_their_value_along(capsys):
    published = ["train", "--gpu-id", "0", "--nesterov", "digits", "--world-size", "-1", "--rank=0", "--expand-labels"]
    with pytest.warns(UserWarning) as said:
        config = configured(published)
    assert config == make_config("digits") and len(said) == 1
    assert "not needed here: gpu_id, nesterov, world_size, rank, expand_labels" in str(said[0].message)


def test_help_of_train_names_keys_and_published_aliases(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert "--num_labels" in out and "--num_labeled" in out and "cifar10-40" in out


def test_presets_are_listed_and_printed(capsys):
    assert main(["presets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [re.split(r" {2,}", line) for line in lines]
    assert sorted(row[0] for row in rows) == sorted(presets()) and max(map(len, lines)) <= 120
    for name, method, dataset, comment in rows:
        assert (method, dataset) == (presets()[name]["method"], presets()[name]["dataset"])
        assert preset_text(name).startswith(f"# {comment}\n") and comment.endswith(".")
        assert re.search(r"published|Ours", comment), "the first line says where the recipe is from"
    seen = [row[2] for row in rows]
    assert all(seen[i] == seen[i - 1] or seen[i] not in seen[:i] for i in range(1, len(seen))), "grouped by data set"
    assert main(["presets", "moons"]) == 0
    assert capsys.readouterr().out == preset_text("moons")
    refused(capsys, ["presets", "moon"], "moons")


def test_unknown_key_names_the_nearest(capsys):
    refused(capsys, ["train", "--num_lables", "40"], "num_labels")
    refused(capsys, ["train", "--weight-decya=1"], "weight_decay")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--method", "fixmatch", "--means", "circle"], "means belongs to flowgmm: method fixmatch has no such key"),
        (["--method", "fixmatch", "--third_voter", "flow"], "third_voter belongs to normatch"),
        (["moons", "--backbone", "resnet50"], "backbone belongs to normatch, fixmatch and supervised"),
        (["moons", "--augment", "kekmodel"], "augment is for images: moons is a table"),
        (["--pretrained", "x"], "pretrained belongs to flowgmm and scnf: method normatch"),
        (["--flow", "glow"], "flow belongs to flowgmm and scnf: method normatch"),
        (["--method", "supervised", "--lambda_u", "3"], "method supervised has no such key"),
        (["--backbone", "wrn-10-1", "--sync_bn"], "sync_bn is for training in several processes"),
        (["--dataset", "moons", "--method", "fixmatch"], "moons is a table"),
    ],
)
def test_what_the_method_cannot_use_is_never_ignored(capsys, tmp_path, arguments, said):
    refused(capsys, ["train", *arguments, "--out", tmp_path / "r"], said)
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("words", [["--method", "flowgmm"], ["--method=flowgmm"], ["moons"]])
def test_help_shows_the_keys_of_the_method_alone(capsys, words):
    with pytest.raises(SystemExit) as end:
        main(["train", *words, "--help"])
    assert end.value.code == 0
    shown = set(re.findall(r"--(\w+)", capsys.readouterr().out))
    ours = set(method_class("flowgmm").Keys.model_fields)
    assert ours <= shown and not (set(known_keys()) - ours) & shown and not (PUBLISHED - {"config"}) & shown


def test_wrong_type(capsys):
    refused(capsys, ["train", "--steps", "many"], "steps", "integer", "many")
    refused(capsys, ["train", "--lr"], "--lr")


def test_unknown_method_preset_command(capsys):
    refused(capsys, ["train", "--method", "fixmach"], "method", "fixmatch")
    refused(capsys, ["train", "cifr10-40"], "cifar10-40")
    refused(capsys, ["trian"], "train")
    refused(capsys, [], "COMMAND")


def test_label_count(capsys, tmp_path):
    refused(capsys, ["train", *QUICK, "--num_labels", "45", "--out", tmp_path / "r"], "45", "40")
    refused(capsys, ["train", *QUICK, "--num_labels", "50000", "--out", tmp_path / "r"], "50000")
    assert not (tmp_path / "r").exists()


def test_missing_data_folder(capsys, tmp_path):
    folder = tmp_path / "nothing"
    refused(capsys, ["train", "cifar10-40", "--data_dir", folder, "--out", tmp_path / "r"], folder, "--download")


def test_data_set_of_a_later_version(capsys, tmp_path):
    refused(capsys, ["train", "imagenet-13000", "--out", tmp_path / "r"], "imagenet", "not there yet")


def test_batch_larger_than_the_set(capsys, tmp_path):
    refused(capsys, ["train", *QUICK, "--batch_size", "2000", "--out", tmp_path / "r"], "batch_size", "2000")
    refused(capsys, ["train", *QUICK, "--uratio", "900", "--out", tmp_path / "r"], "uratio", "900")


def test_existing_run_folder_is_refused_and_kept(capsys, run_folder):
    before = {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()}
    refused(capsys, ["train", *QUICK, "--out", run_folder], run_folder, "--resume", "--overwrite")
    assert {p: p.read_bytes() for p in run_folder.rglob("*") if p.is_file()} == before


def test_a_finished_run_is_not_resumed(capsys, run_folder):
    arguments = ["train", *QUICK, "--eval_every", "2", "--log_every", "2", "--out", run_folder, "--resume", "auto"]
    refused(capsys, arguments, "finished")


def test_overwrite_replaces_the_folder(run_folder, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(run_folder, out)
    (out / "leftover").write_text("old")
    assert main(["train", *QUICK, "--out", str(out), "--overwrite"]) == 0
    assert not (out / "leftover").exists() and (out / "summary.json").exists()


def test_bad_input_does_not_cost_the_old_run_even_with_overwrite(capsys, run_folder):
    refused(capsys, ["train", *QUICK, "--num_labels", "45", "--out", run_folder, "--overwrite"], "45")
    assert (run_folder / "summary.json").exists()


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "other"])
def test_unreadable_checkpoint(capsys, run_folder, tmp_path, damage):
    path = tmp_path / "checkpoint.pt"
    whole = (run_folder / "checkpoints" / "last.pt").read_bytes()
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b"", "text": b"hello", "other": b""}[damage])
    if damage == "other":
        torch.save({"weights": torch.zeros(3)}, path)
    for command in (
        ["eval", path],
        ["predict", path, path],
        ["train", *QUICK, "--resume", path, "--out", tmp_path / "r"],
    ):
        refused(capsys, command, path)


def test_a_pickle_that_runs_code_is_refused(capsys, tmp_path):
    class Malicious:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    torch.save({"config": Malicious()}, tmp_path / "bad.pt")
    refused(capsys, ["eval", tmp_path / "bad.pt"], "bad.pt")
    assert not (tmp_path / "owned").exists()


def test_missing_checkpoint(capsys, tmp_path):
    refused(capsys, ["eval", tmp_path / "none"], tmp_path / "none")


def test_checkpoint_of_another_method_or_setting(capsys, run_folder, tmp_path):
    resume = ["--resume", run_folder, "--out", tmp_path / "r"]
    refused(capsys, ["train", *QUICK, "--method", "fixmatch", *resume], "normatch", "fixmatch")
    refused(capsys, ["train", *QUICK, "--lr", "0.5", *resume], "lr")


def test_an_edited_policy_is_noticed(capsys, tmp_path):
    policy, out = tmp_path / "mine.yaml", tmp_path / "run"
    policy.write_text("base: kekmodel\nprobability: 0.7\n")
    keys = [*QUICK, "--augment", policy, "--eval_every", "2", "--out", out]
    assert main(["train", *map(str, keys)]) == 0
    for name in ("last.pt", "best.pt"):  # as if it had been stopped at step 2
        (out / "checkpoints" / name).unlink()
    (out / "summary.json").unlink()
    policy.write_text("base: kekmodel\nprobability: 0.9\n")
    refused(capsys, ["train", *keys, "--resume", "auto"], policy, "probability was 0.7, is 0.9")
    policy.write_text("base: kekmodel\nprobability: 0.7\n")
    assert main(["train", *map(str, keys), "--resume", "auto"]) == 0


def test_an_image_that_is_not_one(capsys, run_folder, tmp_path):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name in ("text.png", "empty.png", "folder", "missing.png"):
        refused(capsys, ["predict", run_folder, tmp_path / name], name)


def test_nan_loss_stops_and_keeps_the_last_good_checkpoint(capsys, tmp_path, monkeypatch):
    from normatch.methods.supervised import Supervised

    forward = Supervised.forward

    def explodes(self, batch, step):
        loss, metrics = forward(self, batch, step)
        return loss / (step < 5), metrics  # infinite from step 5 on

    monkeypatch.setattr(Supervised, "forward", explodes)
    out = tmp_path / "run"
    arguments = [*SUPERVISED, "--steps", "20", "--eval_every", "4", "--log_every", "2", "--method", "supervised"]
    arguments += ["--out", out]
    refused(capsys, ["train", *arguments], "NaN", "last.pt", started=True)
    state = torch.load(out / "checkpoints" / "last.pt", weights_only=True)
    assert state["step"] == 4 and all(torch.isfinite(v).all() for v in state["model"].values())


def test_weights_that_are_not_numbers_are_never_saved(capsys, tmp_path):
    out = tmp_path / "run"
    arguments = ["train", *QUICK, "--lr", "1e30", "--out", out]
    refused(capsys, [*arguments, "--eval_every", "1", "--steps", "6"], "NaN or infinite", started=True)
    for path in out.rglob("*.pt"):
        state = torch.load(path, weights_only=True)
        assert all(torch.isfinite(v).all() for v in state["model"].values())
    refused(capsys, [*arguments, "--steps", "6", "--overwrite"], "NaN or infinite", started=True)


def test_overwrite_replaces_nothing_but_runs(capsys, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    refused(capsys, ["train", *QUICK, "--out", tmp_path, "--overwrite"], "not a run folder")
    refused(capsys, ["train", *QUICK, "--out", tmp_path / "thesis.txt", "--overwrite"], "thesis.txt")
    refused(capsys, ["train", *QUICK, "--out", "", "--overwrite"], "--out")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_resuming_into_another_run_is_refused(capsys, run_folder, tmp_path):
    other = tmp_path / "other"
    assert main(["train", *QUICK, "--out", str(other)]) == 0
    before = {p: p.read_bytes() for p in other.rglob("*") if p.is_file()}
    keys = ["--eval_every", "2", "--log_every", "2", "--resume", run_folder / "checkpoints" / "previous.pt"]
    refused(capsys, ["train", *QUICK, *keys, "--out", other], other, "--overwrite")
    assert {p: p.read_bytes() for p in other.rglob("*") if p.is_file()} == before


def test_predict_sees_files_as_training_does(run_folder, tmp_path):
    values = np.linspace(0, 65535, 40 * 50).reshape(40, 50).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    from normatch.data.folders import fit, read_image

    model = normatch.load(run_folder)
    array = fit(read_image(tmp_path / "deep.png"), 32)
    assert torch.equal(model.predict_proba([tmp_path / "deep.png"]), model.predict_proba(array[None]))


def test_unusable_device(capsys, tmp_path):
    refused(capsys, ["train", *QUICK[:-1], "gpu", "--out", tmp_path / "r"], "gpu")


def test_module_and_exit_status_of_the_process(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "normatch", "train", "--num_lables", "4"], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 1 and run.stdout == "" and len(run.stderr.splitlines()) == 1
