"""FlowGMM in scikit-learn's conventions."""

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from tqdm import tqdm

from ..config import checked
from ..data import Split, from_arrays, standardize
from ..methods.flowgmm import FlowGMM
from .state import State
from .step import TrainStep


class FlowGMMClassifier(ClassifierMixin, BaseEstimator):
    """X: (n, D) numbers, y: (n,) labels, -1 for rows without one: FlowGMM (Izmailov et al. 2020) on a table.

    A RealNVP carries the rows, standardized, to a latent space with a Gaussian for each class. It starts from the
    identity with the Gaussians on the classes (`means="spread"`), and with noise on the rows in training; without
    these, few labels in few dimensions end with most rows in the wrong Gaussian (docs/flowgmm.md has the figures).

    couplings, hidden: the number of couplings and the width of their networks.
    steps, lr, weight_decay: of AdamW, with a cosine schedule.
    batch_size: unlabeled rows per step, about; up to 100 labeled ones join them.
    noise: its standard deviation, in those of the features.
    means, means_r: where the Gaussians stand, one of the rules of `methods.means.place_means`, and its scale.
    means_trainable: whether they move.
    label_weight, lambda_u: weights of -log p(x, y) of labeled rows and of -log p(x) of all.
    random_state: seeds weights, batches and noise.   device: where to train.   verbose: show a progress bar.

    Fitted: `classes_` (K,), `n_features_in_`, `model_`, the averaged flow with its mixture, `loss_`, the last mean
    loss in nats. Raises ValueError for fewer than two features or rows, for NaN, for a constant column, where no row
    has a label, and for parameters that cannot be. -1 is therefore no label of a class; among names it is the number
    -1 in an array of objects.
    """

    def __init__(
        self,
        couplings: int = 6,
        hidden: int = 64,
        steps: int = 1000,
        lr: float = 1e-3,
        weight_decay: float = 1e-5,
        batch_size: int = 256,
        noise: float = 0.3,
        means: str = "spread",
        means_r: float = 10.0,
        means_trainable: bool = False,
        label_weight: float = 1.0,
        lambda_u: float = 1.0,
        random_state=None,
        device: str = "cpu",
        verbose: bool = False,
    ):
        self.couplings, self.hidden = couplings, hidden
        self.steps, self.lr, self.weight_decay, self.batch_size = steps, lr, weight_decay, batch_size
        self.noise, self.means, self.means_r, self.means_trainable = noise, means, means_r, means_trainable
        self.label_weight, self.lambda_u = label_weight, lambda_u
        self.random_state, self.device, self.verbose = random_state, device, verbose

    def fit(self, X, y):
        """X: (n, D), y: (n,) -> self."""
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {self.batch_size}")
        X, y = validate_data(self, X, y, dtype=np.float32, ensure_min_samples=2, ensure_min_features=2)
        known = np.array([label != -1 for label in y], bool)
        if not known.any():
            raise ValueError("no row has a label: all of y is -1")
        named = y[known] if y.dtype.kind != "O" else np.array(y[known].tolist())
        check_classification_targets(named)
        if named.dtype.kind in "US" and "-1" in named:
            raise ValueError(
                "y holds the text '-1': for rows without a label it takes the number, in an array of objects"
            )
        self.classes_ = np.unique(named)
        labels = np.full(len(y), -1, np.int64)
        labels[known] = np.searchsorted(self.classes_, named)
        columns = tuple(getattr(self, "feature_names_in_", ()))
        dataset = from_arrays(X, labels, classes=[str(c) for c in self.classes_], name="X", columns=columns)
        split = Split(np.flatnonzero(known), np.arange(len(X)), np.empty(0, np.int64))
        config = self._config(len(X), len(split.labeled))
        device = torch.device(self.device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            state = State(config, FlowGMM, device, dataset=dataset, split=split)
            steps = tqdm(state.batches(0), total=config.steps, desc="FlowGMM", unit="step", disable=not self.verbose)
            step = TrainStep(state)
            for batch in steps:
                state.begin_step()
                metrics = step([batch])
        self.loss_ = metrics["loss"][0].item()
        if not (np.isfinite(self.loss_) and state.finite()):
            raise ValueError("the loss became NaN or infinite: take a smaller lr")
        self.model_ = state.average.module.density.cpu()
        self.mean_, self.scale_ = dataset.mean, dataset.std
        return self

    def _config(self, rows: int, labeled: int):
        batch = min(labeled, 100)
        names = ("couplings", "hidden", "steps", "lr", "weight_decay", "noise", "means", "means_r", "means_trainable",
                 "label_weight", "lambda_u")  # fmt: skip
        return checked(
            {
                "method": "flowgmm",
                "augment": "none",
                "zero_init": True,
                "dropout": 0.0,
                "optimizer": "adamw",
                "schedule": "cosine",
                "clip": 100.0,
                "ema_decay": 0.99,
                "batch_size": batch,
                "uratio": max(1, min(self.batch_size // batch, rows // batch)),
                "seed": int(check_random_state(self.random_state).randint(2**31 - 1)),
                **{name: getattr(self, name) for name in names},
            },
            FlowGMM,
        )

    def predict(self, X):
        """X: (n, D) -> (n,) labels, those of the most probable classes."""
        choice = self._output(X).class_log_prob.argmax(1).numpy()
        return self.classes_[choice]

    def predict_proba(self, X):
        """X: (n, D) -> (n, K) p(y | x), columns as in `classes_`."""
        return self._output(X).class_log_prob.double().softmax(1).numpy()

    def score_samples(self, X):
        """X: (n, D) -> (n,) log p(x) in nats, in the units of X."""
        log_prob = self._output(X).log_prob.double().numpy()
        return log_prob - np.log(self.scale_.astype(np.float64)).sum()

    def sample(self, n_samples=1, label=None):
        """-> (n, D) rows drawn from the density, of class `label`, one of `classes_`, or of all."""
        check_is_fitted(self)
        if label is not None and label not in self.classes_:
            raise ValueError(f"label must be one of {list(self.classes_)}, not {label!r}")
        generator = torch.Generator().manual_seed(int(check_random_state(self.random_state).randint(2**31 - 1)))
        k = None if label is None else int(np.searchsorted(self.classes_, label))
        return self.model_.sample(n_samples, k, generator).numpy() * self.scale_ + self.mean_

    @torch.inference_mode()
    def _output(self, X):
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float32, reset=False)
        return self.model_(standardize(torch.from_numpy(X), self.mean_, self.scale_))
