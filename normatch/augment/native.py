"""Batches by `ops.augment_views`: of images in the device's memory, or streamed there.

`steps` is a `StepViews` (`normatch.training.loader`). Batches are (B + 2U, 3, H, W) views and (B + U,) or (B + 2U,)
rows of the training set, on the device.
"""

import queue
import threading
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from normatch import ops

_AHEAD = 64  # steps that are drawn, and copied to the device, at once


def draws_on_device(draw: Callable, start: int, stop: int, device: torch.device) -> Iterator[Tensor]:
    """draw(step, count) -> (count, ...) int64. Yields each step's draws, on the device."""
    step, ahead = start, 1  # the first step does not wait for the draws of the next 63
    while step < stop:
        count = min(ahead, stop - step)
        draws = torch.from_numpy(draw(step, count))
        if device.type == "cuda":
            draws = draws.pin_memory().to(device, non_blocking=True)
        yield from draws
        step += count
        ahead = min(_AHEAD, 2 * ahead)


def resident(steps, start: int, stop: int, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """All images stay in the device's memory. A step is one op, and every 64th also copies 2 MB of draws."""
    images = _as_tensor(steps.dataset.train_x).to(device)
    for draws in draws_on_device(steps.draws_ahead, start, stop, device):
        yield _augment(steps, images, draws, dtype), draws[:, 0]


def _augment(steps, images: Tensor, draws: Tensor, dtype: torch.dtype) -> Tensor:
    data = steps.dataset
    return ops.augment_views(images, draws, steps.policy, steps.seed, data.mean, data.std, dtype, data.flip)


def _as_tensor(images: np.ndarray) -> Tensor:
    """The same memory as a tensor, even if NumPy holds it read-only: nobody writes to it."""
    if images.flags.writeable:
        return torch.from_numpy(images)
    view = images.view()
    try:
        view.flags.writeable = True
    except ValueError:  # the memory itself is read-only
        return torch.from_numpy(images.copy())
    return torch.from_numpy(view)


def beside(batches: Iterator, device: torch.device) -> Iterator:
    """The same batches, each made on a separate stream while the GPU works on the one before."""
    side = torch.cuda.Stream(device)

    def make():
        # The side stream reuses the memory of freed batches: only after the steps queued so far have read them.
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            return next(batches, None)

    following = make()
    while (batch := following) is not None:
        torch.cuda.current_stream(device).wait_stream(side)
        following = make()
        yield batch


def streamed(
    steps, start: int, stop: int, device: torch.device, dtype: torch.dtype, done: threading.Event, ahead: int = 3
) -> Iterator[tuple[Tensor, Tensor]]:
    """A thread gathers the images of the next steps in pinned buffers; copies to the device overlap its work.

    Setting `done` ends the thread.
    """
    cuda = device.type == "cuda"
    images, first = steps.dataset.train_x, steps.num_labeled  # unlabeled row
    distinct = first + steps.num_unlabeled
    images = _as_tensor(images) if isinstance(images, np.ndarray) else images
    free, filled = queue.Queue(), queue.Queue()
    for _ in range(ahead):
        free.put((torch.empty((distinct, *images.shape[1:]), dtype=torch.uint8, pin_memory=cuda), None))

    def fill():
        """Free buffers -> filled ones with their draws and rows; None or an error at the end."""
        try:
            for step in range(start, stop):
                buffer, copied = free.get()
                if done.is_set():
                    return
                if copied is not None:
                    copied.synchronize()  # the device has read the buffer
                draws = torch.from_numpy(steps.draws(step))
                rows = draws[:distinct, 0].clone()
                if isinstance(images, Tensor):
                    torch.index_select(images, 0, rows, out=buffer)
                else:
                    buffer.numpy()[:] = images[rows.numpy()]
                draws[:distinct, 0] = torch.arange(distinct)
                draws[distinct:, 0] = torch.arange(first, distinct)  # strong views are of the weak views' images
                filled.put((buffer, *(t.pin_memory() if cuda else t for t in (draws, rows))))
            filled.put(None)
        except BaseException as error:  # raised where the batch is asked for
            filled.put(error)

    thread = threading.Thread(target=fill, name="normatch-images", daemon=True)
    thread.start()
    side = torch.cuda.Stream(device) if cuda else None
    try:
        while (item := filled.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            buffer, draws, rows = item
            copied, staged = None, buffer
            if cuda:
                with torch.cuda.stream(side):
                    staged = buffer.to(device, non_blocking=True)
                    copied = side.record_event()
                torch.cuda.current_stream(device).wait_event(copied)
                staged.record_stream(torch.cuda.current_stream(device))
            views = _augment(steps, staged, draws.to(device, non_blocking=True), dtype)
            free.put((buffer, copied))
            yield views, rows.to(device, non_blocking=True)
    finally:
        done.set()
        free.put((None, None))  # wakes the thread if it waits
        thread.join(timeout=10)
