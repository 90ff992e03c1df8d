"""Pictures of a trained flow: they show what they say, and the temperature is an honest one."""

import re

import numpy as np
import torch
from matplotlib.colors import to_hex

from normatch.config import make_config
from normatch.flows import FlowOutput
from normatch.methods.flowgmm import FlowGMM
from normatch.tools.flow_figures import latent_figure, plane_figure, reliability, samples_figure, temperature
from normatch.tools.plot import COLORS
from normatch.training.state import State


class Levels(torch.nn.Module):
    """z = x, and samples of class k are k / 4 everywhere."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def sample(self, n, label):
        self.asked.append(label)
        return torch.full((n, 4), label / 4)

    def forward(self, x):
        return FlowOutput(x, None, None, None)

    def inverse(self, z):
        return z


def test_pictures_show_what_they_say():
    # The grids have to be in float64, too.
    moons = State(make_config("moons", hidden=32, precision="fp64"), FlowGMM, torch.device("cpu"))
    x, y = torch.from_numpy(moons.dataset.train_x).double(), torch.full((1000,), -1)
    y[moons.split.labeled] = torch.from_numpy(moons.dataset.train_labels[moons.split.labeled])
    model = moons.average.module.density
    with torch.inference_mode():
        figure = plane_figure(model, x, y)
        panels = figure.axes
        titles = [axes.get_title().split()[0] for axes in panels[:6]]
        assert titles == ["Data,", "In", "Decision", "Samples", "Through", "Density"]
        marks = [c for c in panels[0].collections if len(c.get_offsets()) == 5]  # the labeled points of each class
        for label, mark in enumerate(marks[-2:]):
            assert np.allclose(sorted(mark.get_offsets().tolist()), sorted(x[y == label].tolist()))
            assert to_hex(mark.get_facecolor()[0]) == COLORS[label]

        model, ends = Levels(), torch.tensor([[0.0] * 4, [0.9] * 4] * 3)
        figure = samples_figure(model, ends, ["a", "b", "c"], lambda rows: rows.view(-1, 1, 2, 2), columns=4)
    drawn, lines = (axes.images[0].get_array() for axes in figure.axes)
    assert model.asked == [0, 1, 2] and drawn.shape == lines.shape == (9, 12)
    assert drawn[0::3, 0].tolist() == [0, 0.25, 0.5] and np.allclose(lines[0, 0::3], [0, 0.3, 0.6, 0.9])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b", "c"]


def test_temperature_undoes_a_scaling_and_reliability_sees_it():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=generator)
    y = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert abs(temperature(7 * logits, y) / 7 - 1) < 0.1
    *_, honest = reliability(logits.softmax(1), y)
    *_, boastful = reliability((7 * logits).softmax(1), y)
    assert honest < 0.03 < 0.2 < boastful


class Logits(torch.nn.Module):
    """x: (n, K) are the class log-densities."""

    def forward(self, x):
        return FlowOutput(x, x.new_zeros(len(x)), x, x.logsumexp(1))

    def class_means(self):
        return torch.eye(3)

    def width(self):
        return torch.tensor(0.5)


def test_the_temperature_is_judged_by_rows_that_it_was_not_fitted_on():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 3, generator=generator)
    y = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    y[1::2] = logits[1::2].argmin(1)  # every other row is always wrong
    figure = latent_figure(Logits(), (7 * logits, y), (7 * logits, y), logits, ["a", "b", "c"])
    label = figure.axes[1].get_legend().get_texts()[1].get_text()
    tau, ece = (float(part) for part in re.findall(r"[0-9.]+", label))
    assert abs(tau / 7 - 1) < 0.15 and ece > 0.4
    assert figure.axes[0].texts[1].get_text() == f"{2**0.5 / 0.5:.1f}"  # between the means, in widths
