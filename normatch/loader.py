"""The batches of a run: everything a training step needs, as a function of the step's number alone.

`make_batches` is all that a training loop calls. What computes the views is a backend:

    native   the op `ops.augment_views`, in this process, on images that stay in the memory of the host or the device,
             or that a thread brings there
    dali     an NVIDIA DALI pipeline with the same parameters (`normatch.dali`)
    pil      Pillow in worker processes, the oracle of the other two

`auto` takes the native op wherever it has a kernel for the device, else DALI where it is installed and the device is
a GPU, else Pillow.
"""

import gc
import queue
import sys
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from . import ops
from .augment import View, draw_parameters, find_policy, strong_views, weak_views
from .data import LABELED, UNLABELED, Dataset, Split, sample_order, standardize
from .errors import UserError

BACKENDS = ("auto", "native", "dali", "pil")


class StepDraws:
    """Which B labelled and U = uratio * B unlabelled rows of `split` each step sees: a function of the step alone.

    Of `ranks` processes that share a batch, number `rank` gets every ranks-th row of it, counted from rank.
    Raises UserError where the batch is larger than what there is.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: Split,
        seed: int,
        batch_size: int,
        uratio: int,
        rank: int = 0,
        ranks: int = 1,
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
                f"pool of {pool} unlabelled ones: take a smaller batch_size or uratio"
            )
        self.dataset, self.split, self.seed = dataset, split, seed
        self.batch_size, self.uratio = batch_size, uratio
        self.rank, self.ranks = rank, ranks

    def draw(self, stream: int, step: int):
        """-> (n,), (n,) int64: a step's rows of the training set, and how often each was drawn before."""
        rows, visits = self.draw_ahead(stream, step, 1)
        return rows[0], visits[0]

    def draw_ahead(self, stream: int, step: int, steps: int):
        """-> (steps, n), (steps, n) int64: the same for `steps` steps from `step` on, for little more."""
        pool = self.split.labeled if stream == LABELED else self.split.unlabeled
        count = self.batch_size * (1 if stream == LABELED else self.uratio)
        places = np.arange(step * count, (step + steps) * count)
        order = sample_order(len(pool), self.seed, stream, step * count, steps * count)
        both = pool[order], places // len(pool)
        return tuple(values.reshape(steps, count)[:, self.rank :: self.ranks] for values in both)


class StepViews(StepDraws, torch.utils.data.Dataset):
    """step -> the step's batch, B labelled and U = uratio * B unlabelled images, as a dict of CPU tensors:

        x         (B, H, W, 3) uint8   weak views of labelled images
        y         (B,) int64           their labels
        u_weak    (U, H, W, 3) uint8   weak views of unlabelled images
        u_strong  (U, H, W, 3) uint8   strong views of the same images
        u_index   (U,) int64           where they are in the training set
        u_y       (U,) int64           their labels, -1 where unknown: for diagnostics only

    With uratio = 0 (supervised) only x and y. A step's batch is the same in any process and after any resume.
    """

    def __init__(self, dataset: Dataset, split: Split, policy: str, seed: int, batch_size: int, uratio: int, **ranks):
        super().__init__(dataset, split, seed, batch_size, uratio, **ranks)
        self.policy = find_policy(policy)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        labels = self.dataset.train_labels
        index, visit = self.draw(LABELED, step)
        batch = {"x": self._views(index, visit, View.LABELED_WEAK), "y": labels[index]}
        if self.uratio:
            index, visit = self.draw(UNLABELED, step)
            batch["u_weak"] = self._views(index, visit, View.UNLABELED_WEAK)
            batch["u_strong"] = self._views(index, visit, View.UNLABELED_STRONG)
            batch["u_index"], batch["u_y"] = index, labels[index]
        return {key: torch.from_numpy(value) for key, value in batch.items()}

    def draws(self, step: int):
        """-> (B + 2U, 4) int64: what `ops.augment_views` is to make of a step, in the order x, u_weak, u_strong."""
        return self.draws_ahead(step, 1)[0]

    def draws_ahead(self, step: int, steps: int):
        """-> (steps, B + 2U, 4) int64: the same for `steps` steps from `step` on."""
        kinds = [(*self.draw_ahead(LABELED, step, steps), View.LABELED_WEAK)]
        if self.uratio:
            unlabeled = self.draw_ahead(UNLABELED, step, steps)
            kinds += [(*unlabeled, View.UNLABELED_WEAK), (*unlabeled, View.UNLABELED_STRONG)]
        parts = [np.stack([index, index, visit, np.full_like(index, view)], 2) for index, visit, view in kinds]
        return np.concatenate(parts, axis=1)

    def _views(self, index, visit, view: View):
        images = self.dataset.train_x[index]
        _, height, width, _ = images.shape
        strong = view == View.UNLABELED_STRONG
        parameters = draw_parameters(
            self.policy, self.seed, visit, index, view, height, width, strong, flip=self.dataset.flip
        )
        if strong:
            return strong_views(images, parameters, self.policy)
        return weak_views(images, parameters, self.policy.padding)


def make_loader(views: StepViews, start: int, stop: int, num_workers: int = 0, pin_memory: bool = False) -> DataLoader:
    """-> the batches of steps start, start + 1, ..., stop - 1, in order. To resume is to start further on."""
    # Forked workers share the images, where others would each hold a copy; but fork is safe on Linux only.
    fork = "fork" if num_workers and sys.platform == "linux" else None
    return DataLoader(
        views,
        batch_size=None,  # an item is a whole batch
        sampler=range(start, stop),
        num_workers=num_workers,
        pin_memory=pin_memory,
        multiprocessing_context=fork,
        generator=torch.Generator(),  # its seed is of no use here: leave the global generator alone
        worker_init_fn=_freeze,
    )


def _freeze(worker: int) -> None:
    """Keeps a forked worker from collecting, and so copying, what it shares with the trainer."""
    gc.freeze()


# ---- Backends


def choose_backend(name: str, device: torch.device | str) -> tuple[str, str]:
    """A backend or auto -> (native, dali or pil; why). Raises UserError where what is asked for is not there."""
    from . import dali  # knows whether DALI is there

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

        images   (B + 2U, 3, H, W)  normalised, channels-last: x, u_weak and u_strong in turn
        y        (B,) int64         labels of x
        u_y      (U,) int64         labels of the unlabelled images, -1 where unknown: for diagnostics only
        u_index  (U,) int64         where they are in the training set

    `backend` names what makes them, `reason` says why that one, and `close()` ends what runs in the background.
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
        close = getattr(self._batches, "close", None)  # of a generator: leaves its finally blocks
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
    """The batches of steps start to stop - 1 of `views`, on `device`, by the backend asked for.

    backend: a name, or what `choose_backend` made of it. num_workers is for pil alone (default: 4 with a GPU, else 0).
    resident: whether the native backend keeps all training images in the device's memory; default: where they take at
    most half of what is free. Otherwise each batch's images come through pinned buffers, filled ahead by a thread: from
    the host's memory, or from image files.
    """
    device = torch.device(device)
    name, reason = choose_backend(backend, device) if isinstance(backend, str) else backend
    if name == "pil":
        workers = (4 if device.type == "cuda" else 0) if num_workers is None else num_workers
        return Batches(_by_pillow(views, start, stop, device, dtype, workers), name, reason)
    if name == "dali":
        from .dali import dali_batches

        return Batches(dali_batches(views, start, stop, device, dtype), name, reason)
    images = views.dataset.train_x
    in_memory = isinstance(images, np.ndarray)
    if resident is None:
        resident = in_memory and (device.type == "cpu" or _fits(images.nbytes, device))
    if resident:
        batches = _resident(views, start, stop, device, dtype)
        return Batches(_beside(batches, device) if device.type == "cuda" else batches, name, reason)
    stop_thread = threading.Event()
    batches = _streamed(views, start, stop, device, dtype, stop_thread)
    origin = "" if in_memory else " from their files"
    return Batches(batches, name, f"{reason}; images stream{origin} through pinned buffers", stop_thread.set)


def _fits(size: int, device: torch.device) -> bool:
    free, _ = torch.cuda.mem_get_info(device)
    return size <= free // 2


def _by_pillow(views, start, stop, device, dtype, workers):
    pin = device.type == "cuda"
    mean, std = (torch.tensor(v, device=device) for v in (views.dataset.mean, views.dataset.std))
    for batch in _plain_errors(make_loader(views, start, stop, workers, pin_memory=pin)):
        batch = {key: value.to(device, non_blocking=True) for key, value in batch.items()}
        images = torch.cat([batch[key] for key in ("x", "u_weak", "u_strong") if key in batch])
        none = batch["y"][:0]
        yield {
            "images": standardize(images, mean, std, dtype),
            "y": batch["y"],
            "u_y": batch.get("u_y", none),
            "u_index": batch.get("u_index", none),
        }


def _plain_errors(batches):
    """A worker's UserError comes with its traceback: its last line is the message. A worker that dies leaves none."""
    try:
        yield from batches
    except UserError as error:
        message = str(error).strip().splitlines()[-1]
        raise UserError(message.removeprefix(f"{UserError.__module__}.UserError: ")) from None
    except (RuntimeError, ConnectionError, EOFError) as error:
        if isinstance(error, RuntimeError) and not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(
            "a process that makes the views has died, perhaps for want of memory: take fewer --num_workers (0: none)"
        ) from error


def _shared(images: np.ndarray) -> Tensor:
    """The same memory as a tensor, also where numpy holds it read-only; nobody writes to it."""
    if images.flags.writeable:
        return torch.from_numpy(images)
    view = images.view()
    try:
        view.flags.writeable = True
    except ValueError:  # memory that really is read-only
        return torch.from_numpy(images.copy())
    return torch.from_numpy(view)


_AHEAD = 64  # steps whose counters are drawn, and brought to the device, at once


def _resident(views: StepViews, start: int, stop: int, device: torch.device, dtype: torch.dtype):
    """All images in the device's memory, once. A step is one op, and every 64th a copy of 2 MB of counters."""
    dataset = views.dataset
    images = _shared(dataset.train_x).to(device)
    labels = torch.from_numpy(dataset.train_labels).to(device)
    b = views.batch_size // views.ranks
    u = b * views.uratio
    step = start
    ahead = 1  # the first step must not wait for the counters of the next 63
    while step < stop:
        count = min(ahead, stop - step)
        counters = torch.from_numpy(views.draws_ahead(step, count))
        if device.type == "cuda":
            counters = counters.pin_memory().to(device, non_blocking=True)
        for draws in counters:
            yield {
                "images": ops.augment_views(
                    images, draws, views.policy, views.seed, dataset.mean, dataset.std, dtype, dataset.flip
                ),
                "y": labels[draws[:b, 0]],
                "u_y": labels[draws[b : b + u, 0]],
                "u_index": draws[b : b + u, 0],
            }
        step += count
        ahead = min(_AHEAD, 2 * ahead)


def _beside(batches: Iterator[dict[str, Tensor]], device: torch.device):
    """The same batches, each made on a stream of its own while the GPU works on the one before."""
    side = torch.cuda.Stream(device)

    def make():
        # The side stream takes up memory of batches that were let go of: after the steps queued so far have read them.
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            return next(batches, None)

    following = make()
    while (batch := following) is not None:
        torch.cuda.current_stream(device).wait_stream(side)
        following = make()
        yield batch


def row_batches(
    draws: StepDraws, x: Tensor, prepare: Callable[[Tensor], Tensor], start: int, stop: int, device: str | torch.device
) -> Batches:
    """The batches of steps start to stop - 1, of samples as they are.

    x: (n, ...) the training samples.   prepare: what makes the model's input of B + U of them, the batch's `images`.
    """
    return Batches(_rows(draws, x, prepare, start, stop, torch.device(device)), "none", "samples as they are, no views")


def _rows(draws: StepDraws, x: Tensor, prepare: Callable, start: int, stop: int, device: torch.device):
    x, labels = x.to(device), torch.from_numpy(draws.dataset.train_labels).to(device)
    b = draws.batch_size // draws.ranks
    streams = (LABELED, UNLABELED) if draws.uratio else (LABELED,)
    for first in range(start, stop, _AHEAD):
        count = min(_AHEAD, stop - first)
        ahead = np.concatenate([draws.draw_ahead(stream, first, count)[0] for stream in streams], axis=1)
        counters = torch.from_numpy(ahead)
        if device.type == "cuda":
            counters = counters.pin_memory().to(device, non_blocking=True)
        for rows in counters:
            y = labels[rows]
            yield {"images": prepare(x[rows]), "y": y[:b], "u_y": y[b:], "u_index": rows[b:]}


def _streamed(views: StepViews, start: int, stop: int, device: torch.device, dtype: torch.dtype, done, ahead: int = 3):
    """A thread gathers the images of the next steps in pinned buffers; copies to the device run beside its work."""
    dataset = views.dataset
    b = views.batch_size // views.ranks
    u = b * views.uratio
    cuda = device.type == "cuda"
    source = dataset.train_x
    if isinstance(source, np.ndarray):
        source = _shared(source)
    shape = (b + u, *source.shape[1:])
    buffers = [torch.empty(shape, dtype=torch.uint8, pin_memory=cuda) for _ in range(ahead)]
    free, filled = queue.Queue(), queue.Queue()
    for buffer in buffers:
        free.put((buffer, None))

    def fill():
        try:
            for step in range(start, stop):
                buffer, copied = free.get()
                if done.is_set():
                    return
                if copied is not None:
                    copied.synchronize()  # the device has read what the buffer held
                draws = torch.from_numpy(views.draws(step))
                if isinstance(source, Tensor):
                    torch.index_select(source, 0, draws[: b + u, 0], out=buffer)
                else:
                    buffer.numpy()[:] = source[draws[: b + u, 0].numpy()]
                index = draws[:, 0].clone()
                draws[: b + u, 0] = torch.arange(b + u)
                draws[b + u :, 0] = torch.arange(b, b + u)  # strong views are of the weak views' images
                filled.put((buffer, *(t.pin_memory() if cuda else t for t in (draws, index))))
            filled.put(None)
        except BaseException as error:  # raised where the batch is asked for
            filled.put(error)

    thread = threading.Thread(target=fill, name="normatch-images", daemon=True)
    thread.start()
    labels = torch.from_numpy(dataset.train_labels).to(device)
    side = torch.cuda.Stream(device) if cuda else None
    try:
        while (item := filled.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            buffer, draws, index = item
            copied = None
            if cuda:
                with torch.cuda.stream(side):
                    staged = buffer.to(device, non_blocking=True)
                    copied = side.record_event()
                torch.cuda.current_stream(device).wait_event(copied)
                staged.record_stream(torch.cuda.current_stream(device))
            else:
                staged = buffer
            images = ops.augment_views(
                staged, draws.to(device, non_blocking=True), views.policy, views.seed, dataset.mean, dataset.std,
                dtype, dataset.flip,
            )  # fmt: skip
            free.put((buffer, copied))
            index = index.to(device, non_blocking=True)
            yield {
                "images": images,
                "y": labels[index[:b]],
                "u_y": labels[index[b : b + u]],
                "u_index": index[b : b + u],
            }
    finally:
        done.set()
        free.put((buffers[0], None))  # wakes the thread where it waits
        thread.join(timeout=10)
