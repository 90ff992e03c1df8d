"""Average, schedule and optimiser steps against the recorded numbers of the published training loops."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normatch.classifier import update_flows
from normatch.flows import FlowHead
from normatch.optim import EMA, cosine_7_16, decay_groups


@pytest.mark.parametrize(("dtype", "gap"), [(torch.float64, 1e-12), (torch.float32, 4 * 3e-7)])
def test_ema(golden, dtype, gap):
    data = golden("ema")
    model = nn.Sequential(
        nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4)
    ).to(dtype)

    def load(prefix):
        model.load_state_dict(
            {k.removeprefix(prefix): torch.tensor(v) for k, v in data.items() if k.startswith(prefix)}
        )

    load("in/init/")
    ema = EMA(model, float(data["in/decay"]))
    for step in range(int(data["in/steps"])):
        load(f"in/step{step}/")
        ema.update(model)
    for name, value in ema.module.state_dict().items():
        assert np.abs(value.double().numpy() - data[f"out64/{name}"]).max() <= gap, name


def test_ema_is_its_own_module():
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1)
    before = ema.module.weight.clone()
    assert not torch.equal(ema.module.weight, model.weight)
    ema.update(model)
    assert torch.allclose(ema.module.weight, before + 0.5) and not ema.module.weight.requires_grad
    assert not ema.module.training


@pytest.mark.parametrize("case", ["c10", "warm", "flow"])
def test_schedule(golden, case):
    data = golden("schedule")
    total, warmup, base = (float(data[f"in/{case}/{k}"]) for k in ("total", "warmup", "base_lr"))
    got = [base * cosine_7_16(int(step), int(total), warmup) for step in data[f"in/{case}/steps"]]
    assert got == pytest.approx(data[f"out/{case}/lr"].tolist(), rel=1e-12)
    first = [base * cosine_7_16(step, int(total), warmup) for step in range(61)]
    assert first == pytest.approx(data[f"out/{case}/lr_first_61_calls"].tolist(), rel=1e-12)


@pytest.mark.parametrize("variant", ["flow_accumulate", "flow_zeroed"])
def test_flow_optimiser(golden, variant):
    """Ten steps; `flow_accumulate` never clears the prior's gradients, as published."""
    data = golden("optim_steps")
    initial = {
        k.removeprefix("in/init/"): torch.tensor(v).double() for k, v in data.items() if k.startswith("in/init/")
    }
    prior = [initial[f"prior.{k}"] for k in ("means", "inv_cov_stds", "weights")]
    head = FlowHead.from_reference({k: v for k, v in initial.items() if k.startswith("net.")}, *prior).eval()
    cfg = {k.removeprefix("cfg/"): float(v) for k, v in data.items() if k.startswith("cfg/")}
    flows = nn.ModuleList([head])
    optimizer = torch.optim.AdamW(flows.parameters(), lr=1e-3, weight_decay=cfg["wdecay"])
    norms = []
    for step in range(10):
        lr = 1e-3 * cosine_7_16(step, int(cfg["total_steps"]), cfg["warmup"])
        assert lr == pytest.approx(float(data[f"out64/{variant}/lr"][step]), rel=1e-9)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x, u = (torch.tensor(data[f"in/step{step}/{k}"]).double() for k in "xu")
        loss_f = F.cross_entropy(head(x).class_log_prob, torch.tensor(data[f"in/step{step}/y"]))
        loss = cfg["lambda_flow"] * loss_f - cfg["lambda_num"] * head(u).log_prob.mean()
        loss.backward()
        # Both recorded variants clip the networks' gradients alone; with a norm below 50 nothing is changed by it.
        norms += update_flows(flows, optimizer, cfg["clip_norm"], reference=variant == "flow_accumulate")
    if variant == "flow_accumulate":
        assert torch.stack(norms).tolist() == pytest.approx(
            data[f"out64/{variant}/grad_norm_before_clip"].tolist(), rel=1e-9
        )

    want = {k.removeprefix(f"out64/{variant}/"): v for k, v in data.items() if k.startswith(f"out64/{variant}/")}

    prior = [torch.tensor(want[f"prior.{k}"]) for k in ("means", "inv_cov_stds", "weights")]
    recorded = FlowHead.from_reference({k: v for k, v in want.items() if k.startswith("net.")}, *prior)
    for name, parameter in head.named_parameters():
        final = recorded.get_parameter(name)
        assert (parameter - final).abs().max() <= 1e-9 * final.abs().max(), name


def test_clip_includes_the_prior_unless_published():
    head = FlowHead(4, 2, couplings=1)
    for p in head.parameters():
        p.grad = torch.ones_like(p)
    flows, optimizer = nn.ModuleList([head]), torch.optim.SGD(head.parameters(), lr=0.0)
    everything = sum(p.numel() for p in head.parameters()) ** 0.5
    prior = sum(p.numel() for p in head.prior_parameters())
    (norm,) = update_flows(flows, optimizer, 0.0, reference=True)
    assert norm.item() == pytest.approx((everything**2 - prior) ** 0.5)
    assert all(p.grad is not None for p in head.prior_parameters()), "the published gradients pile up"
    for p in head.parameters():
        p.grad = torch.ones_like(p)
    (norm,) = update_flows(flows, optimizer, 0.0, reference=False)
    assert norm.item() == pytest.approx(everything)
    assert all(p.grad is None for p in head.parameters())


def test_sgd(golden):
    """Ten Nesterov steps of a small network: biases and norms are not decayed."""
    data = golden("optim_steps")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.fc = nn.Conv2d(2, 3, 3, bias=False), nn.Linear(3, 4)
            self.bn1 = nn.BatchNorm2d(3, momentum=0.001)

        def forward(self, x):
            return self.fc(F.leaky_relu(self.bn1(self.conv1(x)), 0.1).mean((2, 3)))

    net = Net().double()
    initial = {k.removeprefix("in/init_net/"): torch.tensor(v) for k, v in data.items() if k.startswith("in/init_net/")}
    net.load_state_dict(initial)
    cfg = {k.removeprefix("cfg/"): float(v) for k, v in data.items() if k.startswith("cfg/")}
    optimizer = torch.optim.SGD(decay_groups(net, cfg["wdecay"]), lr=cfg["lr"], momentum=0.9, nesterov=True)
    for step in range(10):
        for group in optimizer.param_groups:
            group["lr"] = cfg["lr"] * cosine_7_16(step, int(cfg["total_steps"]), cfg["warmup"])
        logits = net(torch.tensor(data[f"in/step{step}/img"]).double())
        loss = F.cross_entropy(logits, torch.tensor(data[f"in/step{step}/img_y"]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, value in net.state_dict().items():
        want = data[f"out64/sgd_kek/{name}"]
        assert np.abs(value.numpy() - want).max() <= 1e-9 * np.abs(want).max(), name
