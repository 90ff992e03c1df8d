"""The batches of a run: everything a training step needs, as a function of the step's number alone."""

import sys
from difflib import get_close_matches

import numpy as np
import torch
from torch.utils.data import DataLoader

from .augment import POLICIES, View, draw_parameters, strong_views, weak_views
from .data import LABELED, UNLABELED, Dataset, Split, sample_order
from .errors import UserError


class StepViews(torch.utils.data.Dataset):
    """step -> the step's batch, B labelled and U = uratio * B unlabelled images, as a dict of CPU tensors:

        x         (B, H, W, 3) uint8   weak views of labelled images
        y         (B,) int64           their labels
        u_weak    (U, H, W, 3) uint8   weak views of unlabelled images
        u_strong  (U, H, W, 3) uint8   strong views of the same images
        u_index   (U,) int64           where they are in the training set
        u_y       (U,) int64           their labels, -1 where unknown: for diagnostics only

    With uratio = 0 (supervised) only x and y. A step's batch is the same in any process and after any resume.
    """

    def __init__(self, dataset: Dataset, split: Split, policy: str, seed: int, batch_size: int, uratio: int):
        if policy not in POLICIES:
            near = get_close_matches(str(policy), POLICIES, n=1, cutoff=0)[0]
            raise UserError(f"unknown policy '{policy}': did you mean '{near}'? There are {', '.join(POLICIES)}")
        if batch_size < 1 or uratio < 0:
            raise UserError(f"batch_size {batch_size} must be at least 1, uratio {uratio} at least 0")
        total, pool = len(dataset.train_images), len(split.unlabeled)
        if batch_size > total:
            raise UserError(f"batch_size {batch_size} is larger than {dataset.name} with its {total} training images")
        if uratio * batch_size > pool:
            raise UserError(
                f"uratio {uratio} x batch_size {batch_size} is {uratio * batch_size} images, more than the "
                f"pool of {pool} unlabelled ones: take a smaller batch_size or uratio"
            )
        self.dataset, self.split = dataset, split
        self.policy, self.seed = POLICIES[policy], seed
        self.batch_size, self.uratio = batch_size, uratio

    def __getitem__(self, step: int) -> dict[str, torch.Tensor]:
        labels = self.dataset.train_labels
        index, visit = self.draw(LABELED, step)
        batch = {"x": self._views(index, visit, View.LABELED_WEAK), "y": labels[index]}
        if self.uratio:
            index, visit = self.draw(UNLABELED, step)
            batch["u_weak"] = self._views(index, visit, View.UNLABELED_WEAK)
            batch["u_strong"] = self._views(index, visit, View.UNLABELED_STRONG)
            batch["u_index"], batch["u_y"] = index, labels[index]
        return {key: torch.from_numpy(value) for key, value in batch.items()}

    def draw(self, stream: int, step: int):
        """-> (n,), (n,) int64: a step's images in the training set, and how often each was drawn before."""
        pool = self.split.labeled if stream == LABELED else self.split.unlabeled
        count = self.batch_size * (1 if stream == LABELED else self.uratio)
        start = step * count
        order = sample_order(len(pool), self.seed, stream, start, count)
        return pool[order], np.arange(start, start + count) // len(pool)

    def _views(self, index, visit, view: View):
        images = self.dataset.train_images[index]
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
    )
