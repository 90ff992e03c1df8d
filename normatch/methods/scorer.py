"""The one scorer: for evaluations during a run, for `normatch eval`, and for whatever else judges a trained method."""

import torch
from torch.nn import functional as F

from ..data.base import standardize
from ..errors import UserError
from ..flows import FlowOutput
from . import distributed


@torch.inference_mode()
def count(method, x, labels, mean, std, batch_size: int = 500) -> dict[str, dict]:
    """x: (N, H, W, 3) uint8 or (N, D) numpy rows, labels: (N,) numpy -> voter's name -> counts over all processes:

        confusion  (K, K), a row for each true class, a column for each predicted one
        top5       samples whose class is among the five most probable
        loss       the mean cross-entropy, nats
        log_prob   the mean log p(x), nats, of voters that are densities

    method: in evaluation mode. Each process counts its share. One pass over the samples, read back once, at its end.
    """
    weight = next(method.parameters())
    share = slice(distributed.rank(), None, distributed.ranks())
    x, labels = torch.from_numpy(x[share]), torch.from_numpy(labels[share])
    matrices, totals, densities = {}, {}, set()
    for part, y in zip(x.split(batch_size), labels.split(batch_size), strict=True):
        y = y.to(weight.device)
        outputs = method.class_log_prob(standardize(part.to(weight.device), mean, std, weight.dtype))
        if not isinstance(outputs, dict) or not outputs:
            raise UserError(f"class_log_prob of {type(method).__name__} must return a dict, voter's name -> (N, K)")
        for name, out in outputs.items():
            log_prob = torch.zeros((), device=weight.device)
            if isinstance(out, FlowOutput):
                densities.add(name)
                out, log_prob = out.class_log_prob, out.log_prob
            k = out.shape[1]
            if name not in matrices:
                matrices[name] = torch.zeros(k * k, dtype=torch.long, device=weight.device)
                totals[name] = torch.zeros(3, dtype=torch.float64, device=weight.device)
            matrices[name].index_add_(0, k * y + out.argmax(1), torch.ones_like(y))
            top5 = (out.topk(min(5, k)).indices == y[:, None]).sum().double()
            loss = F.cross_entropy(out, y, reduction="sum").double()
            totals[name] += torch.stack((top5, loss, log_prob.double().sum()))
    counts = {}
    for name in matrices:
        matrix = distributed.sum_(matrices[name]).view(k, k).cpu()
        n = max(1, int(matrix.sum()))
        top5, loss, log_prob = distributed.sum_(totals[name]).tolist()
        counts[name] = {"confusion": matrix, "top5": top5, "loss": loss / n}
        if name in densities:
            counts[name]["log_prob"] = log_prob / n
    return counts


def scores(counts: dict[str, dict], prefix: str = "test") -> dict[str, float]:
    """What `count` returns -> {`PREFIX_accuracy` in percent, `PREFIX_loss`, `PREFIX_log_prob` of a density}.

    The names of every voter but the first end in its own: `test_accuracy_flow`.
    """
    result = {}
    for name, counted in counts.items():
        suffix = f"_{name}" if result else ""
        matrix = counted["confusion"]
        result[f"{prefix}_accuracy{suffix}"] = 100 * matrix.trace().item() / max(1, matrix.sum().item())
        for figure in ("loss", "log_prob"):
            if figure in counted:
                result[f"{prefix}_{figure}{suffix}"] = counted[figure]
    return result
