"""Average, schedule and optimizer steps against the recorded numbers of the published training loops."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normatch.config import make_config, method_class
from normatch.errors import UserError
from normatch.flows import FlowHead
from normatch.methods.base import Task
from normatch.methods.classifier import decay_groups
from normatch.training.optim import EMA, Optimizer, clipped, lr_factor
from normatch.training.state import State
from normatch.training.step import TrainStep


def flow_groups(head, **keys):
    """The groups that NorMatch makes of this flow head."""
    config = make_config(method="normatch", backbone="wrn-10-1", couplings=1, **keys)
    method = method_class("normatch")(Task((3, 8, 8), ["0", "1"]), config)
    method.flows = nn.ModuleList([head])
    return method.groups()[2:]  # after the two of the classifier


def norm_of(gradients):
    return torch.cat([g.flatten() for g in gradients]).norm()


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
        ema.update()
    for name, value in ema.module.state_dict().items():
        assert np.abs(value.double().numpy() - data[f"out64/{name}"]).max() <= gap, name


def test_ema_is_its_own_module():
    model = nn.Linear(2, 2)
    ema = EMA(model, 0.5)
    with torch.no_grad():
        model.weight.add_(1)
    before = ema.module.weight.clone()
    assert not torch.equal(ema.module.weight, model.weight)
    ema.update()
    assert torch.allclose(ema.module.weight, before + 0.5) and not ema.module.weight.requires_grad
    assert not ema.module.training


@pytest.mark.parametrize("case", ["c10", "warm", "flow"])
def test_schedule(golden, case):
    data = golden("schedule")
    total, warmup, base = (float(data[f"in/{case}/{k}"]) for k in ("total", "warmup", "base_lr"))
    got = [base * lr_factor("cosine-7-16", int(step), int(total), warmup) for step in data[f"in/{case}/steps"]]
    assert got == pytest.approx(data[f"out/{case}/lr"].tolist(), rel=1e-12)
    first = [base * lr_factor("cosine-7-16", step, int(total), warmup) for step in range(61)]
    assert first == pytest.approx(data[f"out/{case}/lr_first_61_calls"].tolist(), rel=1e-12)


@pytest.mark.parametrize("variant", ["flow_accumulate", "flow_zeroed"])
def test_flow_optimizer(golden, variant):
    """Ten steps; `flow_accumulate` never clears the prior's gradients, as published."""
    data = golden("optim_steps")
    initial = {
        k.removeprefix("in/init/"): torch.tensor(v).double() for k, v in data.items() if k.startswith("in/init/")
    }
    prior = [initial[f"prior.{k}"] for k in ("means", "inv_cov_stds", "weights")]
    head = FlowHead.from_reference({k: v for k, v in initial.items() if k.startswith("net.")}, *prior).eval()
    cfg = {k.removeprefix("cfg/"): float(v) for k, v in data.items() if k.startswith("cfg/")}
    keys = {"flow_lr": 1e-3, "weight_decay": cfg["wdecay"], "clip": cfg["clip_norm"]}
    compat = "reference" if variant == "flow_accumulate" else "none"
    optimizer = Optimizer(flow_groups(head, compat=compat, **keys))
    nets, norms = len(optimizer.groups[0]["params"]), []
    for step in range(10):
        factor = lr_factor("cosine-7-16", step, int(cfg["total_steps"]), cfg["warmup"])
        assert 1e-3 * factor == pytest.approx(float(data[f"out64/{variant}/lr"][step]), rel=1e-9)
        optimizer.set_lr(factor)
        x, u = (torch.tensor(data[f"in/step{step}/{k}"]).double() for k in "xu")
        loss_f = F.cross_entropy(head(x).class_log_prob, torch.tensor(data[f"in/step{step}/y"]))
        loss = cfg["lambda_flow"] * loss_f - cfg["lambda_num"] * head(u).log_prob.mean()
        # Both recorded variants clip the networks' gradients alone; with a norm below 50 nothing is changed by it.
        gradients = torch.autograd.grad(loss, optimizer.trained)
        norms.append(norm_of(gradients[:nets]))
        optimizer.step(gradients)
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
    everything = sum(p.numel() for p in head.parameters()) ** 0.5
    prior = sum(p.numel() for p in head.prior_parameters())
    for compat, expected in (("reference", (everything**2 - prior) ** 0.5), ("none", everything)):
        groups = flow_groups(head, compat=compat, flow_lr=0.0, weight_decay=0.0, clip=1.0)
        assert [group.get("clip", 0.0) for group in groups] == [1.0, 0.0][: len(groups)]
        optimizer = Optimizer(groups)
        ones = [torch.ones_like(p) for p in optimizer.trained]
        assert norm_of(ones[: len(groups[0]["params"])]).item() == pytest.approx(expected)
        for _ in range(2):
            optimizer.step(ones)
        sums = [value for state in optimizer.state_dict() for value in state.get("gradient_sum", ())]
        assert len(sums) == 3 * (compat == "reference")
        assert all((value == 2).all() for value in sums), "as published they pile up"
        scaled = optimizer.state[0]["exp_avg"][0] / (1 - 0.9**2)
        assert torch.allclose(scaled, torch.full_like(scaled, 1 / expected))


def test_clipping_bounds_the_common_norm_and_changes_no_argument():
    gradients = [torch.full((3,), 2.0), torch.full((2, 2), 2.0)]
    small = clipped(gradients, 1.0)
    assert norm_of(small).item() == pytest.approx(1, rel=1e-6)
    assert all((g == 2).all() for g in gradients) and torch.allclose(small[0], small[1][0, 0])
    assert all(map(torch.equal, clipped(gradients, 100.0), gradients))


def test_a_parameter_without_a_gradient_stays():
    used, unused = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = Optimizer([{"params": [unused, used], "optimizer": "sgd", "lr": 1.0, "weight_decay": 0.1}])
    optimizer.step([None, torch.ones(2, 2)])
    assert torch.equal(unused, torch.ones(2, 2)) and torch.allclose(used, torch.tensor(1 - 1.9 * 1.1))


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
    recipe = {"optimizer": "sgd", "lr": cfg["lr"]}
    optimizer = Optimizer([{**group, **recipe} for group in decay_groups(net, cfg["wdecay"])])
    for step in range(10):
        optimizer.set_lr(lr_factor("cosine-7-16", step, int(cfg["total_steps"]), cfg["warmup"]))
        logits = net(torch.tensor(data[f"in/step{step}/img"]).double())
        loss = F.cross_entropy(logits, torch.tensor(data[f"in/step{step}/img_y"]))
        optimizer.step(torch.autograd.grad(loss, optimizer.trained))
    for name, value in net.state_dict().items():
        want = data[f"out64/sgd_kek/{name}"]
        assert np.abs(value.numpy() - want).max() <= 1e-9 * np.abs(want).max(), name


def test_the_configuration_reaches_the_step():
    """Five steps against torch.optim, with rates, warm-up, decay, clipping and average spelled out."""
    keys = {"lr": 0.1, "flow_lr": 0.01, "warmup": 2, "weight_decay": 0.2, "clip": 0.05, "ema_decay": 0.6}
    keys |= {"batch_size": 4, "uratio": 1, "steps": 10, "warmup_flow": 0, "dropout": 0.0, "precision": "fp64"}
    config = make_config(method="normatch", backbone="wrn-10-1", device="cpu", **keys)
    state = State(config, method_class("normatch"), torch.device("cpu"))
    state.method.train()
    twin = copy.deepcopy(state.method)
    averaged = [p.detach().clone() for p in twin.parameters()]
    weights = list(twin.classifier.parameters())
    groups = ([p for p in weights if p.ndim > 1], 0.2), ([p for p in weights if p.ndim == 1], 0.0)
    groups = [{"params": params, "weight_decay": decay} for params, decay in groups]
    sgd = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True)
    flow = list(twin.flows.parameters())
    adamw = torch.optim.AdamW(flow, lr=0.01, weight_decay=0.2)
    batch = {"images": torch.randn(12, 3, 32, 32), "y": torch.arange(4), "u_y": torch.arange(4)}
    step = TrainStep(state)
    for number, factor in enumerate((0, 0.5, *(np.cos(7 / 16 * np.pi * done / 8) for done in range(3)))):
        for group in sgd.param_groups:
            group["lr"] = 0.1 * factor
        adamw.param_groups[0]["lr"] = 0.01 * factor
        twin.zero_grad()
        twin(batch, torch.tensor(number))[0].backward()
        assert nn.utils.clip_grad_norm_(flow, 0.05) > 0.05
        sgd.step()
        adamw.step()
        averaged = [0.6 * old + 0.4 * p.detach() for old, p in zip(averaged, twin.parameters(), strict=True)]
        assert state.begin_step() == pytest.approx(0.1 * factor)
        step([batch])
    for wanted, module in ((list(twin.parameters()), state.method), (averaged, state.average.module)):
        for (name, got), want in zip(module.named_parameters(), wanted, strict=True):
            assert torch.allclose(got, want, rtol=1e-7, atol=1e-9), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_compiled_step_counts_like_an_eager_one(dtype):
    """In a graph of its own, as with several processes or parts of a batch."""
    torch._dynamo.reset()
    gradients = [torch.randn(3, 2, dtype=dtype), torch.randn(2, dtype=dtype)]
    moved = []
    for compiled in (False, True):
        parameters = [nn.Parameter(torch.ones_like(g)) for g in gradients]
        adamw = Optimizer([{"params": parameters, "optimizer": "adamw", "lr": 1e-2, "weight_decay": 0.1}])
        step = torch.compile(adamw.step, backend="aot_eager", fullgraph=True) if compiled else adamw.step
        for _ in range(3):
            step(gradients)
        assert all(count == 3 for count in adamw.state[0]["step"])
        moved.append(torch.cat([p.detach().flatten() for p in parameters]))
    assert torch.allclose(*moved, rtol=1e-6 if dtype == torch.float32 else 1e-14)


def test_groups_without_parameters_are_left_out_and_bad_ones_refused():
    p = nn.Parameter(torch.ones(2))
    optimizer = Optimizer([{"params": iter([p]), "optimizer": "sgd", "lr": 1.0}, {"params": [], "optimizer": "sgd"}])
    optimizer.step([torch.ones(2)])
    assert optimizer.trained == [p] and p.tolist() == pytest.approx([-0.9, -0.9])
    for group in ({"optimizer": "rmsprop", "lr": 1.0}, {"optimizer": "sgd"}):
        with pytest.raises(UserError, match="one of sgd, adam"):
            Optimizer([{"params": [p], **group}])


def test_the_reference_recipe_trains_with_a_fixed_prior():
    config = make_config("digits", compat="reference", trainable_prior=False)
    method = method_class("normatch")(Task((3, 32, 32), [str(k) for k in range(10)]), config)
    assert [group["optimizer"] for group in Optimizer(method.groups()).groups] == ["sgd", "sgd", "adamw"]
