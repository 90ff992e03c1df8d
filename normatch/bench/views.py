"""`normatch bench augment` and `normatch bench loader`: views a second, by every backend, in one process."""

import gc
import json
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import torch

from .. import ops, reference
from ..augment.dali import Views
from ..augment.draws import View
from ..augment.policy import find_policy
from ..data import Dataset, load_images, make_split
from ..errors import UserError
from ..training.loader import StepViews, choose_backend, make_batches


def augment_arguments(parser) -> None:
    parser.add_argument("--dataset", default="digits", help="the images to make views of (default: digits)")
    parser.add_argument("--data_dir", help="folder that holds the data set")
    parser.add_argument("--augment", default="kekmodel", help="policy (default: kekmodel)")
    parser.add_argument(
        "--backend", action="append", choices=("native", "dali", "pil"), help="one or more (default: all)"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--rounds", type=int, default=15, help="measurements, of which the median counts (default: 15)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of a table")


def loader_arguments(parser) -> None:
    augment_arguments(parser)
    parser.add_argument("--batch_size", type=int, default=64, help="labelled images a step (default: 64)")
    parser.add_argument("--uratio", type=int, default=7, help="unlabelled images for each of them (default: 7)")
    parser.add_argument("--num_workers", type=int, help="of pil (default: as in training)")
    parser.add_argument("--busy", type=float, default=50.0, help="milliseconds a step computes (default: 50)")


# ---- augment: the views alone

KINDS = {"weak": (View.UNLABELED_WEAK,), "strong": (View.UNLABELED_STRONG,),
         "step": (View.LABELED_WEAK, *[View.UNLABELED_WEAK] * 7, *[View.UNLABELED_STRONG] * 7)}  # fmt: skip
BATCH = 960


def augment(options) -> int:
    """Microseconds a normalised float32 view of each kind, on one core and on all; checked against Pillow first."""
    dataset = load_images(options.dataset, options.data_dir)
    policy, device = find_policy(options.augment), torch.device(options.device)
    backends = options.backend or ["native", "dali", "pil"]
    for backend in list(backends):
        try:
            choose_backend(backend, device)
        except UserError as error:
            backends.remove(backend)
            _say(options, {"backend": backend, "left_out": str(error)})
    _check(dataset, policy, backends, device)
    every = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    threads = torch.get_num_threads()
    records = []
    try:
        for cores in sorted({1, len(every)}):
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, every[:cores])  # DALI's threads, started below, inherit it
            torch.set_num_threads(cores)
            for kind in KINDS:
                times = {b: [] for b in backends}
                with ExitStack() as pools:
                    makers = {b: _maker(b, dataset, policy, kind, cores, device, pools) for b in backends}
                    for round_ in range(options.rounds + 2):  # the first two warm up
                        for backend, make in makers.items():  # side by side, so that a busy machine hits all alike
                            start = time.perf_counter()
                            count = make()
                            if device.type == "cuda":
                                torch.cuda.synchronize()
                            if round_ > 1:
                                times[backend].append((time.perf_counter() - start) / count)
                            if backend == "dali":
                                time.sleep(0.2)  # it works ahead: not in the others' time
                    del makers
                for backend in backends:
                    seconds = statistics.median(times[backend])
                    records.append(
                        {
                            "bench": "augment",
                            "dataset": dataset.name,
                            "policy": options.augment,
                            "kind": kind,
                            "backend": backend,
                            "device": str(device),
                            "cores": cores,
                            "us_per_view": round(1e6 * seconds, 3),
                            "views_per_second": round(1 / seconds),
                        }
                    )
    finally:
        torch.set_num_threads(threads)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, every)
    for record in records:
        same = {
            r["backend"]: r["us_per_view"]
            for r in records
            if (r["kind"], r["cores"]) == (record["kind"], record["cores"])
        }
        for other in ("pil", "dali"):
            if other in same and record["backend"] != other:
                record[f"times_{other}"] = round(same[other] / record["us_per_view"], 2)
    _table(options, records, ("cores", "kind", "backend", "us_per_view", "views_per_second", "times_pil", "times_dali"))
    return 0


def _draws(dataset: Dataset, kind: str, round_: int) -> np.ndarray:
    rng = np.random.default_rng(round_)
    rows = rng.integers(0, len(dataset.train_x), BATCH)
    views = np.resize(np.array([int(v) for v in KINDS[kind]]), BATCH)
    return np.stack([rows, rows, np.full(BATCH, round_), views], 1)


def _maker(backend: str, dataset: Dataset, policy, kind: str, cores: int, device: torch.device, pools: ExitStack):
    """A function that makes some views and returns how many; `pools` ends the processes that it needs."""
    images = torch.from_numpy(dataset.train_x).to(device)
    settings = (dataset.mean, dataset.std, torch.float32, dataset.flip)
    prepared = [_draws(dataset, kind, i) for i in range(4)]
    if backend == "native":
        on_device = [torch.from_numpy(d).to(device) for d in prepared]

        def make():
            for draws in on_device:
                ops.augment_views(images, draws, policy, 0, *settings)
            return BATCH * len(on_device)

        return make
    if backend == "dali":
        endless = (prepared[i % 4] for i in range(10**9))
        views = Views(dataset.train_x, policy, 0, BATCH, endless, device, dataset.mean, dataset.std, dataset.flip,
                      num_threads=cores)  # fmt: skip

        def make():
            for _ in range(12):  # of which two at most were made before the clock started
                next(views)
            return 12 * BATCH

        return make
    plain = _Plain(dataset, policy, prepared)
    if cores == 1:
        return lambda: plain(0)
    # Processes that start with the call and hand nothing back: workers of a loader would work ahead, unseen.
    pool = ProcessPoolExecutor(cores, multiprocessing.get_context("fork"), _Plain.keep, (plain,))
    pools.enter_context(pool)
    return lambda: sum(pool.map(_Plain.kept, range(2 * cores)))


class _Plain:
    """Makes views by Pillow, also in a worker process: call number -> how many."""

    def __init__(self, dataset: Dataset, policy, draws):
        self.dataset, self.policy, self.draws = dataset, policy, draws

    def __call__(self, i: int) -> int:
        d = self.dataset
        draws = torch.from_numpy(self.draws[i % len(self.draws)])
        images = torch.from_numpy(d.train_x)
        reference.augment_views(images, draws, self.policy, 0, d.mean, d.std, torch.float32, d.flip)
        return BATCH

    def keep(self) -> None:
        gc.freeze()  # nothing of the parent's is this process's to destroy, DALI's threads least of all
        torch.set_num_threads(1)
        _Plain.mine = self

    @staticmethod
    def kept(i: int) -> int:
        return _Plain.mine(i)


def _check(dataset: Dataset, policy, backends, device) -> None:
    """Raises UserError where a backend's views are not Pillow's, on draws made for this run alone."""
    fresh = _draws(dataset, "step", int.from_bytes(os.urandom(3), "little"))
    images = torch.from_numpy(dataset.train_x)
    without = replace(policy, ops=tuple(op for op in policy.ops if op != "Equalize") or policy.ops)
    for backend in backends:
        used = without if backend == "dali" else policy  # DALI's Equalize is its own
        want = reference.augment_views(images, torch.from_numpy(fresh), used, 1, dtype=torch.uint8, flip=dataset.flip)
        got = views_of(dataset.train_x, fresh, used, 1, backend, dataset.flip, device)
        limit = 0 if backend == "native" or device.type == "cpu" else 1e-3
        if (got != want).float().mean() > limit:
            raise UserError(f"{backend} does not make the views that Pillow makes: no point in timing it")


def views_of(images: np.ndarray, draws: np.ndarray, policy, seed: int, backend: str, flip: bool, device="cpu"):
    """(M, H, W, 3) uint8, (N, 4) -> (N, 3, H, W) uint8 on the host, by the backend named."""
    if backend == "dali":
        ((_, views),) = Views(images, policy, seed, len(draws), [draws], device, flip=flip)
        return views.cpu().clone()
    make = ops.augment_views if backend == "native" else reference.augment_views
    device = torch.device(device if backend == "native" else "cpu")
    views = make(torch.from_numpy(images).to(device), torch.from_numpy(draws).to(device), policy, seed,
                 dtype=torch.uint8, flip=flip)  # fmt: skip
    return views.cpu()


# ---- loader: whole batches, and how long a step waits for them


def loader(options) -> int:
    """Batches a second of `make_batches`, and the wait of a step that computes for `busy` milliseconds meanwhile."""
    dataset, device = load_images(options.dataset, options.data_dir), torch.device(options.device)
    classes = len(dataset.classes)
    split = make_split(dataset, 4 * classes, 0)
    steps = StepViews(dataset, split, options.augment, 0, options.batch_size, options.uratio)
    count = options.batch_size * (1 + 2 * options.uratio)
    work = torch.randn(256, 256, device=device)
    records = []
    for backend in options.backend or ["native", "dali", "pil"]:
        try:
            batches = make_batches(steps, 0, 10**6, backend, device, num_workers=options.num_workers)
        except UserError as error:
            _say(options, {"backend": backend, "left_out": str(error)})
            continue
        for _ in range(3):
            next(batches)
        alone, waits = [], []
        for _ in range(options.rounds):
            start = time.perf_counter()
            next(batches)
            if device.type == "cuda":
                torch.cuda.synchronize()
            alone.append(time.perf_counter() - start)
        for _ in range(options.rounds):
            end = time.perf_counter() + options.busy / 1e3
            while time.perf_counter() < end:
                work @ work
            if device.type == "cuda":
                torch.cuda.synchronize()
            start = time.perf_counter()
            next(batches)
            waits.append(time.perf_counter() - start)
        batches.close()
        seconds, wait = statistics.median(alone), statistics.median(waits)
        share = wait / (wait + options.busy / 1e3)
        records.append({"bench": "loader", "dataset": dataset.name, "policy": options.augment, "backend": backend,
                        "device": str(device), "views": count, "ms_per_batch": round(1e3 * seconds, 3),
                        "views_per_second": round(count / seconds), "wait_ms": round(1e3 * wait, 3),
                        "wait_percent": round(100 * share, 2)})  # fmt: skip
    _table(options, records, ("backend", "views", "ms_per_batch", "views_per_second", "wait_ms", "wait_percent"))
    return 0


# ---- printing


def _say(options, record: dict) -> None:
    print(json.dumps(record) if options.json else f"{record['backend']} is left out: {record['left_out']}", flush=True)


def _table(options, records: list[dict], columns) -> None:
    if options.json:
        for record in records:
            print(json.dumps(record))
        return
    rows = [columns, *([str(r.get(c, "")) for c in columns] for r in records)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)))
