"""`normatch bench augment` and `normatch bench loader`: views per second of every backend, in one process."""

import gc
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np
import torch

from .. import ops, reference
from ..augment.dali import Views
from ..augment.draws import View
from ..augment.policy import find_policy
from ..data import Dataset, load_images, make_split
from ..errors import UserError
from ..tools.contact_sheet import views_of
from ..tools.tables import aligned
from ..training.loader import StepViews, choose_backend, make_batches
from .measure import medians, seconds, side_by_side, synchronize

BACKENDS = ("native", "dali", "pil")


def augment_arguments(parser) -> None:
    parser.add_argument("--dataset", default="digits", help="the images to make views of (default: digits)")
    parser.add_argument("--data_dir", help="folder that holds the data set")
    parser.add_argument("--augment", default="kekmodel", help="policy (default: kekmodel)")
    parser.add_argument("--backend", action="append", choices=BACKENDS, help="one or more (default: all)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--rounds", type=int, default=15, help="measurements; their median counts (default: 15)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of a table")


def loader_arguments(parser) -> None:
    augment_arguments(parser)
    parser.add_argument("--batch_size", type=int, default=64, help="labeled images per step (default: 64)")
    parser.add_argument("--uratio", type=int, default=7, help="unlabeled images for each of them (default: 7)")
    parser.add_argument("--num_workers", type=int, help="of pil (default: as in training)")
    parser.add_argument("--busy", type=float, default=50.0, help="milliseconds that a step computes (default: 50)")


# ---- augment: the views alone

KINDS = {"weak": (View.UNLABELED_WEAK,), "strong": (View.UNLABELED_STRONG,),
         "step": (View.LABELED_WEAK, *[View.UNLABELED_WEAK] * 7, *[View.UNLABELED_STRONG] * 7)}  # fmt: skip
BATCH = 960


def augment(options) -> int:
    """Microseconds per standardized float32 view of each kind, on one core and on all; checked against Pillow first."""
    dataset = load_images(options.dataset, options.data_dir)
    policy, device = find_policy(options.augment), torch.device(options.device)
    backends = available(options)
    check(dataset, policy, backends, device)
    cores, records = _cores(), []
    for count in sorted({1, len(cores)}):
        for kind in KINDS:
            with limited_to(cores[:count]), ExitStack() as pools:
                makers = {b: maker(b, dataset, policy, kind, count, device, pools) for b in backends}
                calls = {backend: make for backend, (make, _) in makers.items()}
                # DALI prepares views in the background: give it time to finish.
                times = medians(side_by_side(calls, device.type, options.rounds, repeat=1, pause={"dali": 0.2}))
                times = {b: round(1e6 * times[b] / views, 3) for b, (_, views) in makers.items()}
                del makers, calls  # before the pools
            for backend, microseconds in times.items():
                record = {
                    "bench": "augment", "dataset": dataset.name, "policy": options.augment, "kind": kind,
                    "backend": backend, "device": str(device), "cores": count,
                    "us_per_view": microseconds, "views_per_second": round(1e6 / microseconds),
                }  # fmt: skip
                for rival in ("pil", "dali"):
                    if rival in times and backend != rival:
                        record[f"times_{rival}"] = round(times[rival] / microseconds, 2)
                records.append(record)
    _table(options, records, ("cores", "kind", "backend", "us_per_view", "views_per_second", "times_pil", "times_dali"))
    return 0


@contextmanager
def limited_to(cores: list[int]):
    """Within, this process and the threads that it starts run on these cores."""
    threads, before = torch.get_num_threads(), _cores()
    limit = getattr(os, "sched_setaffinity", lambda process, cores: None)
    try:
        torch.set_num_threads(len(cores))
        limit(0, cores)
        yield
    finally:
        torch.set_num_threads(threads)
        limit(0, before)


def _cores() -> list[int]:
    """The cores that this process may use."""
    return sorted(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def make_draws(dataset: Dataset, kind: str, round_: int) -> np.ndarray:
    """-> (BATCH, 4) int64: draws of one batch of a kind, for `ops.augment_views`."""
    rows = np.random.default_rng(round_).integers(0, len(dataset.train_labels), BATCH)
    views = np.resize(np.array([int(v) for v in KINDS[kind]]), BATCH)
    return np.stack([rows, rows, np.full(BATCH, round_), views], 1)


def maker(backend, dataset: Dataset, policy, kind, cores: int, device, pools: ExitStack, dtype=torch.float32):
    """-> a function that makes some views, and how many; `pools` ends the processes that it needs."""
    prepared = [make_draws(dataset, kind, i) for i in range(4)]
    if backend == "dali":
        endless = (prepared[i % 4] for i in range(10**9))
        views = Views(dataset.train_x, policy, 0, BATCH, endless, device, dataset.mean, dataset.std, dataset.flip,
                      num_threads=cores)  # fmt: skip

        def next_batches():
            for _ in range(12):  # of which at most two were made before the clock started
                next(views)[1].to(dtype)

        return next_batches, BATCH * 12
    op, place = (ops.augment_views, device) if backend == "native" else (reference.augment_views, "cpu")
    images, *prepared = (torch.from_numpy(values).to(place) for values in (dataset.train_x, *prepared))

    def make(i: int) -> None:
        op(images, prepared[i % 4], policy, 0, dataset.mean, dataset.std, dtype, dataset.flip)

    if backend == "native":
        return lambda: list(map(make, range(4))), BATCH * 4
    if cores == 1:
        return lambda: make(0), BATCH
    # Processes that start with the call and return nothing: the workers of a loader would work ahead, unseen.
    pool = ProcessPoolExecutor(cores, multiprocessing.get_context("fork"), _Worker.start, (make,))
    pools.enter_context(pool)
    return lambda: list(pool.map(_Worker.run, range(2 * cores))), BATCH * 2 * cores


class _Worker:
    """What a process of the pool holds: the function that makes batch i, which only a fork can hand over."""

    @classmethod
    def start(cls, make) -> None:
        gc.freeze()  # this process must not destroy the parent's objects, DALI's threads least of all
        torch.set_num_threads(1)
        cls.make = staticmethod(make)

    @classmethod
    def run(cls, i: int) -> None:
        cls.make(i)


def check(dataset: Dataset, policy, backends, device) -> None:
    """Raises UserError if a backend's views differ from Pillow's, on draws made for this run alone."""
    fresh = make_draws(dataset, "step", int.from_bytes(os.urandom(3), "little"))
    without = replace(policy, ops=tuple(op for op in policy.ops if op != "Equalize") or policy.ops)
    for backend in backends:
        used = without if backend == "dali" else policy  # DALI has an Equalize of its own
        want, got = (views_of(dataset.train_x, fresh, used, 1, name, dataset.flip, device) for name in ("pil", backend))
        limit = 0 if backend == "native" or device.type == "cpu" else 1e-3
        if (got != want).float().mean() > limit:
            raise UserError(f"{backend} does not make the views that Pillow makes: no point in timing it")


# ---- loader: whole batches, and how long a step waits for them


def loader(options) -> int:
    """Batches per second of `make_batches`, and how long a step that computes for `busy` milliseconds waits for one."""
    dataset, device = load_images(options.dataset, options.data_dir), torch.device(options.device)
    split = make_split(dataset, 4 * len(dataset.classes), 0)
    steps = StepViews(dataset, split, options.augment, 0, options.batch_size, options.uratio)
    count = options.batch_size * (1 + 2 * options.uratio)
    work, busy = torch.randn(256, 256, device=device), options.busy / 1e3
    records = []
    for backend in available(options):
        batches = make_batches(steps, 0, 10**6, backend, device, num_workers=options.num_workers)

        def step(batches=batches):
            end = time.perf_counter() + busy
            while time.perf_counter() < end:
                work @ work
            synchronize(device.type)
            return seconds(lambda: next(batches), device.type)

        for _ in range(3):
            next(batches)
        alone = statistics.median(seconds(lambda b=batches: next(b), device.type) for _ in range(options.rounds))
        wait = statistics.median(step() for _ in range(options.rounds))
        batches.close()
        records.append({"bench": "loader", "dataset": dataset.name, "policy": options.augment, "backend": backend,
                        "device": str(device), "views": count, "ms_per_batch": round(1e3 * alone, 3),
                        "views_per_second": round(count / alone), "wait_ms": round(1e3 * wait, 3),
                        "wait_percent": round(100 * wait / (wait + busy), 2)})  # fmt: skip
    _table(options, records, ("backend", "views", "ms_per_batch", "views_per_second", "wait_ms", "wait_percent"))
    return 0


# ---- what both share


def available(options) -> list[str]:
    """The backends to measure; prints why one that is asked for cannot be used here."""
    backends = []
    for backend in options.backend or BACKENDS:
        try:
            backends.append(choose_backend(backend, options.device)[0])
        except UserError as error:
            left_out = json.dumps({"backend": backend, "left_out": str(error)})
            print(left_out if options.json else f"{backend} is left out: {error}", flush=True)
    return backends


def _table(options, records: list[dict], columns) -> None:
    if options.json:
        print(*map(json.dumps, records), sep="\n", end="\n" if records else "")
    else:
        print(aligned(columns, [[record.get(column, "") for column in columns] for record in records]))
