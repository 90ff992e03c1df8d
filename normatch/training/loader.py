"""The batches of a run: steps -> batches. Nothing is drawn anywhere else.

What each step sees is a function of the step's number alone (`StepDraws`, `StepViews`); `make_batches` is what a
training loop calls. The views come from one of three backends:

    native   the op `ops.augment_views`, in this process (`normatch.augment.native`)
    dali     an NVIDIA DALI pipeline (`normatch.augment.dali`)
    pil      Pillow in worker processes, the reference of the other two (`normatch.augment.pillow`)

`auto` takes the native op if it has a kernel for the device, else DALI if it is installed and the device is a GPU, else
Pillow.
"""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from normatch import ops
from normatch.augment import dali, native
from normatch.augment.draws import View
from normatch.augment.pillow import pillow_batches
from normatch.augment.policy import find_policy
from normatch.data import LABELED, UNLABELED, Dataset, Split, sample_order
from normatch.errors import UserError

BACKENDS = ("auto", "native", "dali", "pil")


class StepDraws:
    """The B labeled and U = uratio * B unlabeled rows of `split` that each step sees: a function of the step alone.

    `ranks` processes share a batch: process `rank` gets every ranks-th row of it, starting at rank; num_labeled and
    num_unlabeled are its shares of B and U. Raises UserError for a batch larger than the data set.
    """

    def __init__(
        self, dataset: Dataset, split: Split, seed: int, batch_size: int, uratio: int, rank: int = 0, ranks: int = 1
    ):
        if batch_size < 1 or uratio < 0:
            raise UserError(f"batch_size {batch_size} must be at least 1, uratio {uratio} at least 0")
        if batch_size % ranks:
            raise UserError(f"batch_size {batch_size} is not divisible by the {ranks} processes that share it")
        total, pool = len(dataset.train_labels), len(split.unlabeled)
        rows = "rows" if dataset.is_table else "images"
        if batch_size > total:
            raise UserError(f"batch_size {batch_size} is larger than {dataset.name} with its {total} training {rows}")
        if uratio * batch_size > pool:
            raise UserError(
                f"uratio {uratio} x batch_size {batch_size} is {uratio * batch_size} {rows}, more than the "
                f"pool of {pool} unlabeled ones: take a smaller batch_size or uratio"
            )
        self.dataset, self.split, self.seed = dataset, split, seed
        self.batch_size, self.uratio = batch_size, uratio
        self.rank, self.ranks = rank, ranks
        self.num_labeled = batch_size // ranks
        self.num_unlabeled = uratio * self.num_labeled

    def draw(self, stream: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """-> (n,), (n,) int64: a step's rows of the training set, and how often each was drawn before."""
        rows, visits = self.draw_ahead(stream, step, 1)
        return rows[0], visits[0]

    def draw_ahead(self, stream: int, step: int, steps: int) -> tuple[np.ndarray, np.ndarray]:
        """-> (steps, n), (steps, n) int64: the same for `steps` steps from `step` on, at little more cost."""
        pool = self.split.labeled if stream == LABELED else self.split.unlabeled
        count = self.batch_size * (1 if stream == LABELED else self.uratio)
        places = np.arange(step * count, (step + steps) * count)
        order = sample_order(len(pool), self.seed, stream, step * count, steps * count)
        both = pool[order], places // len(pool)
        return tuple(values.reshape(steps, count)[:, self.rank :: self.ranks] for values in both)


class StepViews(StepDraws):
    """StepDraws of images with views of them: B labeled weak, U unlabeled weak, and U strong views of the same images.

    A step's views are the same in any process and after any resume. With uratio = 0 there are only the first B.
    """

    def __init__(self, dataset: Dataset, split: Split, policy: str, seed: int, batch_size: int, uratio: int, **ranks):
        super().__init__(dataset, split, seed, batch_size, uratio, **ranks)
        self.policy = find_policy(policy)

    def draws(self, step: int) -> np.ndarray:
        """-> (B + 2U, 4) int64: a step's views as `ops.augment_views` takes them, labeled, weak and strong in turn."""
        return self.draws_ahead(step, 1)[0]

    def draws_ahead(self, step: int, steps: int) -> np.ndarray:
        """-> (steps, B + 2U, 4) int64: the same for `steps` steps from `step` on."""
        kinds = [(*self.draw_ahead(LABELED, step, steps), View.LABELED_WEAK)]
        if self.uratio:
            unlabeled = self.draw_ahead(UNLABELED, step, steps)
            kinds += [(*unlabeled, View.UNLABELED_WEAK), (*unlabeled, View.UNLABELED_STRONG)]
        parts = [np.stack([index, index, visit, np.full_like(index, view)], 2) for index, visit, view in kinds]
        return np.concatenate(parts, axis=1)


def choose_backend(name: str, device: torch.device | str) -> tuple[str, str]:
    """name: a backend or auto -> (native, dali or pil; why). Raises UserError for a backend that is not available."""
    device = torch.device(device)
    if name not in BACKENDS:
        raise UserError(f"augment_backend may be {', '.join(BACKENDS)}, not '{name}'")
    has_native = device.type in ops.kernels()["augment_views"]
    no_native = f"no native kernel for {device.type}: {ops.backend()[1]}"
    if name == "native" and not has_native:
        raise UserError(f"augment_backend native is not there ({no_native}); pil needs no kernel")
    if name == "dali" and dali.missing():
        raise UserError(f"augment_backend dali is not there: {dali.missing()}")
    if name != "auto":
        return name, "as asked for"
    if has_native:
        return "native", f"auto: the {ops.backend()[0]} op has a kernel for {device.type}"
    if device.type == "cuda" and not dali.missing():
        return "dali", f"auto: {no_native}, but DALI is installed"
    return "pil", f"auto: {no_native}"


class Batches:
    """An iterator over a run's batches, each a dict of tensors on the device:

        images   (B + 2U, 3, H, W)  normalized, channels-last: labeled, unlabeled weak and unlabeled strong views
        y        (B,) int64         labels of the labeled images
        u_y      (U,) int64         labels of the unlabeled images, -1 if unknown: for diagnostics only
        u_index  (U,) int64         their rows in the training set

    Without views `images` are the B + U samples as they are. `backend` names what makes the batches and `reason` says
    why; `close()` ends what runs in the background.
    """

    def __init__(self, batches: Iterator[dict[str, Tensor]], backend: str, reason: str, close=None):
        self.backend, self.reason = backend, reason
        self._batches, self._close = batches, close

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, Tensor]:
        return next(self._batches)

    def close(self) -> None:
        if self._close:
            self._close()
        close = getattr(self._batches, "close", None)  # of a generator: runs its finally blocks
        if close:
            close()


def make_batches(
    views: StepViews,
    start: int,
    stop: int,
    backend: str | tuple[str, str] = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    num_workers: int | None = None,
    resident: bool | None = None,
) -> Batches:
    """The batches of steps start to stop - 1 of `views`, on `device`.

    backend: a name, or the result of `choose_backend`. num_workers: of pil (default: 4 with a GPU, else 0).
    resident: whether the native backend keeps all training images in the device's memory; default: if they take at
    most half of what is free. Otherwise a thread brings each batch's images, from memory or from image files, through
    pinned buffers.
    """
    device = torch.device(device)
    name, reason = choose_backend(backend, device) if isinstance(backend, str) else backend
    if name == "pil":
        workers = (4 if device.type == "cuda" else 0) if num_workers is None else num_workers
        made = pillow_batches(views, start, stop, device, dtype, workers)
        return Batches(_labeled(made, views, device), name, reason)
    if name == "dali":
        return Batches(_labeled(dali.dali_batches(views, start, stop, device, dtype), views, device), name, reason)
    images = views.dataset.train_x
    in_memory = isinstance(images, np.ndarray)
    if resident is None:
        resident = in_memory and (device.type == "cpu" or _fits(images.nbytes, device))
    if resident:
        batches = _labeled(native.resident(views, start, stop, device, dtype), views, device)
        return Batches(native.beside(batches, device) if device.type == "cuda" else batches, name, reason)
    done = threading.Event()
    batches = _labeled(native.streamed(views, start, stop, device, dtype, done), views, device)
    origin = "" if in_memory else " from their files"
    return Batches(batches, name, f"{reason}; images stream{origin} through pinned buffers", done.set)


def _fits(size: int, device: torch.device) -> bool:
    free, _ = torch.cuda.mem_get_info(device)
    return size <= free // 2


def row_batches(
    draws: StepDraws,
    x: Tensor,
    start: int,
    stop: int,
    device: torch.device | str,
    standardize: Callable[[Tensor], Tensor] | None = None,
) -> Batches:
    """The batches of steps start to stop - 1 without views.

    x: (n, ...) the training samples. standardize: samples -> the model's input; by default x is that already.
    """
    device = torch.device(device)
    streams = (LABELED, UNLABELED) if draws.uratio else (LABELED,)

    def ahead(step: int, steps: int) -> np.ndarray:
        return np.concatenate([draws.draw_ahead(stream, step, steps)[0] for stream in streams], axis=1)

    def samples():
        on_device = x.to(device)
        for rows in native.draws_on_device(ahead, start, stop, device):
            yield on_device[rows] if standardize is None else standardize(on_device[rows]), rows

    return Batches(_labeled(samples(), draws, device), "none", "samples as they are, no views")


def _labeled(samples: Iterator[tuple[Tensor, Tensor]], draws: StepDraws, device: torch.device):
    """(images, their rows) of each step -> the dicts that `Batches` describes. Rows of strong views may be left out."""
    labels = torch.from_numpy(draws.dataset.train_labels).to(device)
    distinct = draws.num_labeled + draws.num_unlabeled

    def batch(sample: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        images, rows = sample
        y = labels[rows[:distinct]]
        return {
            "images": images,
            "y": y[: draws.num_labeled],
            "u_y": y[draws.num_labeled :],
            "u_index": rows[draws.num_labeled : distinct],
        }

    try:
        yield from map(batch, samples)  # a loop's variables would keep each batch alive while the next is made
    finally:
        samples.close()
