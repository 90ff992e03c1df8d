"""The rules that place the means of the mixture, against their definitions."""

import pytest
import torch

from normatch.errors import UserError
from normatch.flows import RealNVPTabular
from normatch.methods.means import MEANS, place_means, regular_simplex


def placed(rule, r=2.0, classes=3, features=6, shape=None):
    torch.manual_seed(0)
    flow = RealNVPTabular(features, couplings=2, hidden=8, layers=1)
    x, y = torch.randn(9, features), torch.arange(9) % classes
    return place_means(rule, r, classes, flow, x, y, shape), flow, x, y


@pytest.mark.parametrize("rule", MEANS)
def test_every_rule_places_a_mean_for_each_class(rule):
    means, *_ = placed(rule, shape=(1, 3, 2) if rule == "split_dims_v2" else (6,))
    assert means.shape == (3, 6) and means.isfinite().all() and torch.pdist(means).min() > 1e-3
    twice, *_ = placed(rule, r=4.0, shape=(1, 3, 2) if rule == "split_dims_v2" else (6,))
    if rule != "spread":  # which only pushes apart what is nearer than r
        torch.testing.assert_close(twice, 2 * means)


def test_means_that_are_known_in_closed_form():
    diagonal, *_ = placed("diagonal", r=3.5, classes=2, features=2)
    assert diagonal.tolist() == [[-3.5, -3.5], [3.5, 3.5]]
    circle, *_ = placed("circle", r=3.5, classes=3, features=2)
    torch.testing.assert_close(circle.norm(dim=1), torch.full((3,), 3.5))
    torch.testing.assert_close(circle[0], torch.tensor([3.5, 0.0]))
    antipodal, *_ = placed("antipodal", r=1.0, classes=2)
    torch.testing.assert_close(antipodal[0], -antipodal[1])
    assert abs(antipodal[0].norm() - 3.75) < 1e-5
    pixels, *_ = placed("pixel_const", r=1.0, classes=10, features=12)
    assert pixels[:, 0].tolist() == list(range(-4, 6))
    stripes, *_ = placed("split_dims_v2", r=1.0, classes=10, features=3 * 4 * 2, shape=(3, 4, 2))
    channel = stripes.view(10, 3, 8).sum(2).argmax(1)
    assert channel.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]  # 3 + 3 + 4
    for classes, features in ((4, 3), (4, 9), (5, 2), (2, 2)):
        points = regular_simplex(classes, features)
        distances = torch.cdist(points, points)
        assert abs(distances[distances > 1e-6].min() - 1) < 1e-5
        if features >= classes - 1:
            torch.testing.assert_close(torch.pdist(points), torch.ones(classes * (classes - 1) // 2))


def test_means_from_data_are_class_means():
    means, flow, x, y = placed("from_latent", r=1.0)
    z = flow(x)[0]
    torch.testing.assert_close(means, torch.stack([z[y == k].mean(0) for k in range(3)]))
    means, flow, x, y = placed("from_data", r=1.0)
    torch.testing.assert_close(means, torch.stack([x[y == k].mean(0) for k in range(3)]))
    means, flow, x, y = placed("from_z", r=1.0)
    torch.testing.assert_close(means[1], flow(x[y == 1].mean(0, keepdim=True))[0][0])
    means, flow, x, y = placed("random_data", r=1.0)
    torch.testing.assert_close(means[2], flow(x)[0][2])
    means, *_ = placed("spread", r=20.0)
    assert abs(torch.pdist(means).mean() - 20) < 1e-3 and means.mean(0).abs().max() < 1e-4


def test_an_image_with_too_few_rows_for_stripes_is_refused():
    with pytest.raises(UserError, match="no stripe for each"):
        placed("split_dims_v2", shape=(1, 2, 3))
