"""The training step reads nothing back from the device, and has one graph."""

import functools
import sys

import pytest
import torch
import torch._dynamo.testing
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from normatch.config import make_config, method_class
from normatch.training.state import Meter, State
from normatch.training.step import TrainStep

SYNCHRONIZING = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "item"}


class NoReadBack(TorchDispatchMode):
    """Fails on every operation whose result the host would have to wait for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in SYNCHRONIZING, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


def make_state(**keys):
    supervised = keys.get("method") == "supervised"
    config = make_config(backbone="wrn-10-1", batch_size=4, **({} if supervised else {"uratio": 2}), **keys)
    state = State(config, method_class(config.method), torch.device(config.device))
    state.method.train()
    return state


def prepared(**keys):
    torch.manual_seed(0)
    state = make_state(device="cpu", **keys)
    n = 4 if keys.get("method") == "supervised" else 4 + 2 * 8
    x = torch.randn(n, 3, 32, 32).to(memory_format=torch.channels_last)
    batch = {"images": x, "y": torch.arange(4), "u_y": torch.arange(n - 4)[: (n - 4) // 2] % 10}
    return state, batch


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"third_voter": "flow", "hard_label": True},
        {"third_voter": "sampled"},
        {"compat": "reference"},
        {"method": "fixmatch"},
        {"method": "supervised"},
    ],
    ids=["normatch", "two flows", "sampled", "reference", "fixmatch", "supervised"],
)
def test_no_read_back(keys, monkeypatch):
    # The check reads values on the CPU, but not on a GPU. (`normatch.ops.gmm_log_prob` is the function.)
    monkeypatch.setattr(sys.modules["normatch.ops.gmm_log_prob"], "_check_no_nan", lambda *arguments: None)
    state, batch = prepared(**keys)
    step = TrainStep(state)
    with NoReadBack():
        for _ in range(2):
            state.begin_step()
            state.meter.add(step([batch]))
    assert state.step == 2 and state.meter.read()["loss"] > 0


def test_the_guard_finds_a_read_back():
    with pytest.raises(AssertionError, match="waits"), NoReadBack():
        torch.ones(1).item()


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"method": "fixmatch"},
        {"compat": "reference"},
        {"precision": "bf16"},
        {"third_voter": "sampled", "mixing": True},
    ],
    ids=["normatch", "fixmatch", "reference", "bf16", "sampled and mixing"],
)
def test_the_whole_step_is_one_graph_and_is_compiled_once(keys, monkeypatch):
    torch._dynamo.reset()
    state, batch = prepared(**keys)
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counted))
    step = TrainStep(state, "default")
    for _ in range(4):
        state.begin_step()
        state.meter.add(step([batch]))
    assert counted.frame_count == 1 and state.meter.read()["loss"] > 0


def test_what_the_graph_changes_stays_at_its_address():
    """Else a CUDA graph would refuse to be captured: only the batch may come from elsewhere."""
    torch._dynamo.reset()
    state, batch = prepared()
    moving = []

    def backend(graph, inputs):
        for node in graph.graph.find_nodes(op="placeholder"):
            facts = node.meta.get("tensor_dict", {})
            if "_dynamo_static_input_type" not in facts and not isinstance(node.meta["example_value"], nn.Parameter):
                moving.append(tuple(node.meta["example_value"].shape))
        return graph

    step = TrainStep(state, "default")
    step.whole = torch.compile(step._whole, backend=backend, fullgraph=True)
    state.begin_step()
    step([batch])
    assert sorted(moving) == sorted(tuple(value.shape) for name, value in batch.items() if name != "u_index")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", [None, "default", "reduce-overhead"])
def test_nothing_waits_for_the_gpu(mode):
    state = make_state(device="cuda")
    batches, step = state.batches(0), TrainStep(state, mode)
    for number in range(6):
        torch.cuda.set_sync_debug_mode("error" if number > 3 else "default")  # the first ones allocate and compile
        try:
            state.begin_step()
            state.meter.add(step([next(batches)]))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert state.meter.read()["loss"] > 0


def test_metrics_are_averaged_over_steps_and_left_out_where_nothing_was_counted():
    meter = Meter()
    for total, count in ((3.0, 1.0), (5.0, 3.0)):
        meter.add({"a": torch.tensor([total, count]), "b": torch.zeros(2)})
    assert meter.read() == {"a": 2.0}
