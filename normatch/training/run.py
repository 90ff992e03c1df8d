"""The run folder: configuration, environment, split, metrics, checkpoints, summary."""

import contextlib
import json
import os
import platform
import shutil
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch
import yaml

from .. import __version__, ops
from ..config import FREE_KEYS, Config
from ..errors import UserError
from ..methods import distributed
from ..published.checkpoints import load_checkpoint


class Run:
    """One run folder. An existing one is refused, unless it is resumed or `overwrite` is set.

    Of several processes that train together, only rank 0 writes.
    """

    def __init__(self, config: Config):
        self.folder, self.keep = config.folder, config.keep
        self.source = None  # the checkpoints folder of another run, if this one resumes from it
        self.damaged = []  # checkpoints of this run that cannot be read
        self.writes = distributed.rank() == 0
        self.tensorboard = None

    @property
    def last(self) -> Path:
        return self.folder / "checkpoints" / "last.pt"

    @property
    def earlier(self) -> list[Path]:
        """The checkpoints before the last one, newest first, in case the last one is damaged."""
        names = ["previous.pt", *(f"previous-{i}.pt" for i in range(2, self.keep))]
        return [self.last.with_name(name) for name in names]

    @property
    def best(self) -> Path:
        return self.folder / "checkpoints" / "best.pt"

    def checkpoint_to_resume(self, config: Config) -> dict | None:
        """The checkpoint that `config.resume` asks for, or None for a fresh start; refuses an existing folder."""
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"{self.folder} is a file, not a folder for a run")
        occupied = self.folder.exists() and any(self.folder.iterdir())
        if config.overwrite and occupied and not (self.folder / "config.yaml").is_file():
            raise UserError(f"{self.folder} is not a run folder, and --overwrite replaces nothing else")
        state, resumable = None, config.resume == "auto"
        if resumable:  # None if the run was stopped before its first checkpoint, or never started
            state = self._newest_checkpoint(config)
            resumable = state is not None or self._nothing_to_lose()
        elif config.resume:
            state = load_checkpoint(config.resume)
            given = Path(config.resume).resolve()
            checkpoints = given / "checkpoints" if given.is_dir() else given.parent
            resumable = checkpoints == self.last.parent.resolve()
            self.source = None if resumable else checkpoints
        if state is not None:
            check_same_run(state["config"], config)
        if occupied and not resumable and not config.overwrite:
            way = "it has no checkpoint to go on from:" if config.resume == "auto" else "go on with --resume auto,"
            raise UserError(
                f"the run folder {self.folder} exists: {way} replace it with --overwrite, or give another --out"
            )
        return state

    def _nothing_to_lose(self) -> bool:
        """Whether nothing is lost by starting afresh in this folder, which holds no readable checkpoint."""
        if not self.last.parent.is_dir():  # which `open` makes first
            files = ("config.yaml", "env.json", "split.npz", "metrics.jsonl", "summary.json")
            return not any((self.folder / name).exists() for name in files)
        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        # A line after an evaluation: that evaluation had saved a checkpoint.
        return not (self.folder / "summary.json").exists() and not any('"kind": "eval"' in line for line in lines[:-1])

    def _newest_checkpoint(self, config: Config) -> dict | None:
        """The last checkpoint, or with a warning an earlier one if it is damaged; None if there is none.

        Also the one before, or none where a run has only one, where that is of the last step, but the run was killed
        before it wrote its summary: the same bits come out again.
        """
        first = ended = None
        for path in (self.last, *self.earlier):
            if path.exists():
                try:
                    state = load_checkpoint(path)
                except UserError as error:
                    first = first or error
                    self.damaged.append(path)
                    continue
                if state["step"] >= config.steps and not (self.folder / "summary.json").exists():
                    ended = ended or state
                    continue
                if first:
                    print(f"normatch: {first}; going on from {path}, step {state['step']}", file=sys.stderr)
                return state
        if first and not ended:
            raise first
        return None if config.steps <= config.eval_every and not first else ended

    def save(self, state: dict, improved: bool):
        """Write the last checkpoint, keep earlier ones, and if it `improved` write the best one too."""
        if not self.writes:
            return
        if improved:  # first: else a crash in between leaves a last.pt that claims a best.pt it never wrote
            save_checkpoint(self.best, state)
        for older, newer in zip(self.earlier[::-1], [*self.earlier[-2::-1], self.last], strict=True):
            if newer.exists():
                link = older.with_suffix(".new")
                link.unlink(missing_ok=True)
                try:
                    os.link(newer, link)  # a hard link, so that there is a last.pt at every moment
                except OSError:  # a file system without hard links
                    shutil.copyfile(newer, link)
                os.replace(link, older)
        save_checkpoint(self.last, state)

    def open(self, config: Config, device: torch.device, resumed_from: int):
        """Make the folder, or on resume cut its metrics back to step `resumed_from`."""
        if not self.writes:
            return
        try:
            if config.overwrite and (self.source or not resumed_from) and self.folder.exists():
                shutil.rmtree(self.folder)
            self.last.parent.mkdir(parents=True, exist_ok=True)
            for unfinished in (*self.folder.glob("*.new"), *self.last.parent.glob("*.new")):
                unfinished.unlink()  # left by a process that was killed while writing
            for path in self.damaged:  # else `save` would keep it in place of the one that this run resumes from
                if path.exists():
                    os.replace(path, path.with_suffix(".damaged"))
            if self.source and (self.source / "best.pt").is_file():
                shutil.copyfile(self.source / "best.pt", self.best)
        except OSError as error:
            raise UserError(f"the run folder {self.folder} cannot be made: {error}") from None
        write_text(self.folder / "config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False))
        write_text(self.folder / "env.json", json.dumps(environment(device), indent=2) + "\n")

        metrics = self.folder / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        kept = [line for line in lines if _step(line) <= resumed_from]
        write_text(metrics, "".join(line + "\n" for line in kept))
        self.metrics = metrics.open("a")
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import

        self.tensorboard = SummaryWriter(self.folder / "tb", purge_step=resumed_from + 1 if resumed_from else None)

    def log(self, step: int, kind: str, values: dict):
        """One line of metrics.jsonl, and the same values in TensorBoard under `kind/`."""
        if not self.writes:
            return
        self.metrics.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        self.metrics.flush()
        for name, value in values.items():
            self.tensorboard.add_scalar(f"{kind}/{name}", value, step)

    def save_split(self, split):
        if self.writes:
            split.save(self.folder / "split.npz")

    def write_summary(self, summary: dict):
        if not self.writes:
            return
        write_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")

    def close(self):
        if self.tensorboard is not None:
            for file in (self.metrics, self.tensorboard):
                try:
                    file.close()
                except OSError as error:  # of a full disk, which must not hide what ended the run
                    print(f"normatch: the last figures of {self.folder} are not written: {error}", file=sys.stderr)


@contextlib.contextmanager
def replacing(path: Path):
    """A binary file that replaces `path` once it is complete and flushed to disk."""
    new = path.with_suffix(".new")
    try:
        with new.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except Exception:
        new.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str):
    """Replace the file's text atomically. Raises `UserError`."""
    try:
        with replacing(path) as file:
            file.write(text.encode())
    except OSError as error:
        raise UserError(f"{path} could not be written, what was there is kept: {error}") from None


def save_checkpoint(path: Path, state: dict):
    """Replace the checkpoint atomically. Raises `UserError`, and keeps the previous one."""
    try:
        with replacing(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch's writer wraps the system's error
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise UserError(f"the checkpoint {path} could not be written, the one before it is kept: {reason}") from None


def check_same_run(saved: dict, config: Config, run: str = "the checkpoint"):
    """Raise `UserError` where the saved configuration and this one would not make the same weights.

    `run`: what the saved one is of, for the message.
    """
    wanted = config.model_dump()
    if saved["method"] != config.method:
        raise UserError(f"{run} is of method {saved['method']!r}, this run is of {config.method!r}")
    saved = {**type(config).model_construct().model_dump(), **saved}  # of a version with fewer keys
    different = [k for k in wanted if k not in FREE_KEYS and saved.get(k) != wanted[k]]
    if different:
        k = different[0]
        more = f" (and {', '.join(different[1:])})" if different[1:] else ""
        raise UserError(f"{run} was made with {k}={saved.get(k)!r}, this run has {k}={wanted[k]!r}{more}")


def environment(device: torch.device) -> dict:
    """Versions and hardware, for `env.json`."""
    backend, reason = ops.backend()
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "normatch": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "ops_backend": f"{backend}: {reason}",
        "command": sys.argv,
    }


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return str(device)


def _step(line: str) -> int:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # the line that a crash cut short
        return sys.maxsize
