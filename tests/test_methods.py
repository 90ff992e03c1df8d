"""The losses of one step against the recorded numbers of the published training loops."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normatch.config import make_config, method_class
from normatch.flows import FlowHead, FlowOutput
from normatch.methods.base import Task
from normatch.methods.normatch import consensus, sampled_classifier
from normatch.methods.terms import align, consistency, ramp

NORMATCH_VARIANTS = ["onehot", "soft", "three_two", "three_sampled"]


class RecordedFlow(nn.Module):
    """Stands in for a flow head: gives the recorded class log-densities of its rows."""

    def __init__(self, logits_x, logits_u, log_prob):
        super().__init__()
        self.class_log_prob = torch.cat((logits_x, logits_u))
        # L_n is the mean of -log_prob over the unlabeled rows.
        self.log_prob = torch.cat((log_prob.new_zeros(len(logits_x)), -log_prob.expand(len(logits_u))))

    def forward(self, features):
        return FlowOutput(features, features[:, 0], self.class_log_prob, self.log_prob)


def make_method(config, classes=10):
    return method_class(config.method)(Task((3, 32, 32), [str(k) for k in range(classes)]), config)


def step_of(method, features, logits, y, u_y, step):
    """-> loss, metrics of a step whose networks give these features and logits."""
    method.classify = lambda images: (features, logits)
    return method({"images": None, "y": y, "u_y": u_y}, step)


def near(got, want, what):
    got = np.asarray(got.detach() if isinstance(got, torch.Tensor) else got)
    assert np.abs(got - want).max() <= 1e-9 * max(np.abs(want).max(), 1e-300), what


@pytest.mark.parametrize("setting", ["A", "B", "E0"])
@pytest.mark.parametrize("variant", NORMATCH_VARIANTS)
@pytest.mark.parametrize("alignment", ["noda", "da"])
@pytest.mark.parametrize("compat", ["reference", "none"])
def test_normatch_step(golden, monkeypatch, setting, variant, alignment, compat):
    data = golden("normatch_step_k10")
    case = f"{setting}/{variant}_{alignment}"
    if f"out64/{case}/total" not in data:
        pytest.skip("the published three-voter script has no window of another length: nothing is recorded")
    inputs = {k.removeprefix("in/"): torch.tensor(v) for k, v in data.items() if k.startswith("in/")}
    inputs = {k: v.double().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    cfg = {k.rpartition("/")[2]: float(v) for k, v in data.items() if k.startswith(f"cfg/{setting}/")}
    config = make_config(
        "cifar10-40",
        method="normatch",
        T=cfg["T"],
        lambda_u=cfg["lambda_u"],
        lambda_flow=cfg["lambda_flow"],
        lambda_flow_unsup=cfg["lambda_num"],
        da_window=int(cfg["da_cache"]),
        dist_align=alignment == "da",
        hard_label=variant != "soft",
        third_voter={"three_two": "flow", "three_sampled": "sampled"}.get(variant, "none"),
        compat=compat,
    )
    method = make_method(config).double()
    one = RecordedFlow(inputs["flow_logits_x"], inputs["flow_logits_u"], inputs["loss_num"])
    two = RecordedFlow(inputs["flow2_logits_x"], inputs["flow2_logits_u"], inputs["loss_num"])
    method.flows = nn.ModuleList([one, two] if variant == "three_two" else [one])
    monkeypatch.setattr("normatch.methods.normatch.sampled_classifier", lambda flow, z: inputs["sampled_logits_u"])
    with torch.no_grad():
        method.da_queue[-5:] = inputs["queue"]

    y = inputs["y"]
    logits = torch.cat([inputs[k] for k in ("logits_x", "logits_u_w", "logits_u_s")])
    features = torch.zeros(len(logits), 8, dtype=torch.float64)
    u_y = torch.zeros(56, dtype=torch.long)
    # The recorded epoch is one of 1,024 steps; the ramp of both behaviors agrees at its start.
    loss, metrics = step_of(method, features, logits, y, u_y, int(cfg["epoch"]) * 1024)
    loss.backward()

    near(loss, data[f"out64/{case}/total"], "total")
    for name, metric in (("L_x", "loss_x"), ("L_u", "loss_u"), ("L_f", "loss_flow")):
        # metrics are kept in fp32
        assert metrics[metric][0].item() == pytest.approx(float(data[f"out64/{case}/{name}"]), rel=1e-6)
    assert metrics["mask_ratio"][0] / 56 == pytest.approx(data[f"out64/{case}/weight"].mean(), rel=1e-6)
    assert inputs["logits_u_w"].grad is None or not inputs["logits_u_w"].grad.any()

    for key in (k for k in data if k.startswith((f"grad64/{case}/", f"grad64/{setting}/{variant}_{alignment}/"))):
        name = key.rpartition("/")[2]
        got, want = inputs[name].grad, data[key]
        if compat == "none" and name in ("flow_logits_u", "flow2_logits_u", "sampled_logits_u"):
            want = np.zeros_like(want)  # the leak of L_u into the flow is the only gradient there
            assert not got.any() if got is not None else True
        else:
            near(torch.zeros_like(inputs[name]) if got is None else got, want, name)


def test_weight_and_pseudo_labels(golden):
    data = golden("normatch_step_k10")
    q = torch.tensor(data["in/logits_u_w"]).double().softmax(1)
    votes = [torch.tensor(data["in/flow_logits_u"]).double()]
    weight, pseudo_label, agree = consensus(q, votes)
    near(weight, data["out64/A/onehot_noda/weight"], "weight")
    assert torch.equal(pseudo_label, q.argmax(1))
    assert (weight[agree] == 1).all() and (weight[~agree] < 1).all() and agree.any() and (~agree).any()


def test_sampled_classifier(golden):
    data = {k.rpartition("/")[2]: v for k, v in golden("normatch_step_k10").items() if "sampled_classifier" in k}
    z, samples, weights = (torch.tensor(data[k]).double() for k in ("z", "samples", "weights"))
    flow = FlowHead(z.shape[1], len(weights)).double()
    with torch.no_grad():
        flow.means.zero_()
        flow.mixture_logits.copy_(weights)
    logits = sampled_classifier(flow, z, noise=samples)  # sigma = 1 and means = 0: the sample is the noise
    assert np.abs(logits.detach().numpy() - data["logits"]).max() <= 3e-7 * np.abs(data["logits"]).max()  # fp32 record


def test_alignment_makes_the_marginal_uniform():
    q = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.7, 0.3]], dtype=torch.float64)
    aligned, queue = align(q, torch.zeros(3, 2, dtype=torch.float64))
    assert torch.allclose(aligned.sum(1), torch.ones(3, dtype=torch.float64))
    assert torch.equal(queue[-1], q.mean(0)) and not queue[:-1].any()
    ratio = aligned[:, 0] / aligned[:, 1] * (q.mean(0)[0] / q.mean(0)[1])
    assert torch.allclose(ratio, q[:, 0] / q[:, 1])


def test_alignment_survives_a_class_that_nobody_predicts():
    aligned, _ = align(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.zeros(4, 2))
    assert torch.equal(aligned, torch.tensor([[1.0, 0.0], [1.0, 0.0]]))


def test_ramp():
    steps = [0, 512, 1024, 3 * 1024, 5 * 1024, 10**6]
    assert [float(ramp(s, 5120, staircase=True)) for s in steps] == pytest.approx([0, 0, 0.2, 0.6, 1, 1])
    assert [float(ramp(s, 5120)) for s in steps] == pytest.approx([0, 0.1, 0.2, 0.6, 1, 1])
    assert ramp(0, 0) == 1


@pytest.mark.parametrize("setting", ["T1_t95", "T05_t95", "T08_t60"])
@pytest.mark.parametrize("variant", ["kek", "lee_hard", "lee_soft"])
def test_fixmatch_step(golden, setting, variant):
    data = golden("fixmatch_step_k10")
    inputs = {k.removeprefix("in/"): torch.tensor(v) for k, v in data.items() if k.startswith("in/")}
    inputs = {k: v.double().requires_grad_() if v.is_floating_point() else v for k, v in inputs.items()}
    T, threshold, lambda_u = (float(data[f"cfg/{setting}/{k}"]) for k in ("T", "threshold", "lambda_u"))
    config = make_config(
        "cifar10-40",
        method="fixmatch",
        T=T,
        p_cutoff=threshold,
        lambda_u=lambda_u,
        hard_label=variant != "lee_soft",
        compat="reference" if variant == "kek" else "none",
    )
    logits = torch.cat([inputs[k] for k in ("logits_x", "logits_u_w", "logits_u_s")])
    features, u_y = torch.zeros(len(logits), 8), torch.zeros(56, dtype=torch.long)
    loss, metrics = step_of(make_method(config), features, logits, inputs["y"], u_y, 0)
    loss.backward()

    want = {k.rpartition("/")[2]: v for k, v in data.items() if k.startswith(f"out64/{variant}/{setting}/")}
    near(loss, want["total"], "total")
    assert metrics["loss_x"][0].item() == pytest.approx(float(want["L_x"]), rel=1e-6)
    assert metrics["loss_u"][0].item() == pytest.approx(float(want["L_u"]), rel=1e-6)
    mask_mean = want["mask"].mean() if "mask" in want else want["mask_mean"]
    assert metrics["mask_ratio"][0] / 56 == pytest.approx(float(mask_mean))
    for name in ("logits_x", "logits_u_s"):
        near(inputs[name].grad, data[f"grad64/{variant}/{setting}/{name}"], name)
    assert not inputs["logits_u_w"].grad.any()


def test_fixmatch_pseudo_labels(golden):
    data = golden("fixmatch_step_k10")
    weak, strong = (torch.tensor(data[f"in/logits_u_{k}"]).double() for k in "ws")
    _, mask, confidence, pseudo_label = consistency(
        weak, strong, T=0.5, p_cutoff=0.95, hard_label=True, mask_temperature=0.5
    )
    assert np.array_equal(mask.numpy(), data["out64/kek/T05_t95/mask"])
    assert np.array_equal(pseudo_label.numpy(), data["out64/kek/T05_t95/pseudo"])
    assert torch.equal(mask.bool(), confidence >= 0.95)


def test_supervised_is_the_cross_entropy():
    logits, y = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    loss, _ = step_of(make_method(make_config(method="supervised"), 4), torch.zeros(6, 8), logits, y, y[:0], 0)
    assert torch.equal(loss, F.cross_entropy(logits, y))


@pytest.mark.parametrize("name", ["normatch", "fixmatch"])
def test_unknown_labels_are_left_out_of_the_metrics(name):
    torch.manual_seed(0)
    method = make_method(make_config(method=name), 4)
    u_y = torch.tensor([0, -1, -1, 3, -1, -1])
    logits = torch.randn(2 + 12, 4)
    logits[2, 0] = logits[5, 3] = 50.0  # the two known ones are predicted right
    features = torch.randn(14, method.classifier.features)
    _, metrics = step_of(method, features, logits, torch.tensor([0, 1]), u_y, 0)
    assert metrics["pseudo_label_accuracy"].tolist() == [2, 2]
