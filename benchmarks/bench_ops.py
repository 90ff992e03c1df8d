"""Every op, direction and size of `normatch bench kernels` (normatch/bench/kernels.py), on pytest-benchmark."""

import pytest
import torch
from conftest import DEVICE

from normatch.bench.kernels import cases
from normatch.bench.measure import check_agreement, make_call, operations

CASES = [(case, provider) for case in cases() for provider in case.providers]


@pytest.mark.parametrize(("case", "provider"), CASES, ids=[f"{case.name} {name}" for case, name in CASES])
def test_ops(measure, case, provider):
    torch._dynamo.reset()
    torch.manual_seed(0)
    inputs = case.inputs(DEVICE)
    check_agreement(case, provider, inputs)
    call = make_call(case.providers[provider], inputs, case.direction, case.loss)
    count = None if "compiled" in provider else operations(call)
    dtype = str(case.dtype).removeprefix("torch.")
    measure(case.name, provider, call, case.bytes, case.flop, operations=count, dtype=dtype, direction=case.direction)
