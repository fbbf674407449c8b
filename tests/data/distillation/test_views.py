"""Views repeat: the same picture for the same image and view, whoever asks, and no other random stream moves."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from ultralytics.data import ClassificationDataset
from ultralytics.data.distillation.views import RepeatableViews
from ultralytics.utils import DEFAULT_CFG, IterableSimpleNamespace


@pytest.fixture
def dataset(digits):
    args = IterableSimpleNamespace(**{**vars(DEFAULT_CFG), "imgsz": 32})
    return ClassificationDataset(str(digits / "train"), args, augment=True)


def test_views_repeat_and_differ(dataset):
    views = RepeatableViews(dataset, 3)
    seen = {}
    for epoch in range(6):
        views.epoch.fill_(epoch)
        for i in (0, 7):
            sample = views[i]
            assert (sample["index"], sample["view"], sample["cls"]) == (i, epoch % 3, dataset[i]["cls"])
            if epoch >= 3:
                assert torch.equal(sample["img"], seen[i, epoch - 3])
            seen[i, epoch] = sample["img"]
    for i in (0, 7):
        assert not torch.equal(seen[i, 0], seen[i, 1])
        assert not torch.equal(seen[i, 1], seen[i, 2])


def test_views_are_drawn_as_ever(dataset):
    """Means over many draws of crop, flip, colour and erasing agree with the dataset's own."""
    views = RepeatableViews(dataset, 400)
    own = torch.stack([dataset[3]["img"] for _ in range(400)])
    repeated = []
    for epoch in range(400):
        views.epoch.fill_(epoch)
        repeated.append(views[3]["img"])
    repeated = torch.stack(repeated)
    for of_each in (
        lambda x: x.mean((1, 2, 3)),
        lambda x: x.std((1, 2, 3)),
        lambda x: x[..., :16].mean((1, 2, 3)) - x[..., 16:].mean((1, 2, 3)),  # which a flip turns round
    ):
        error = of_each(own).std() / 400**0.5
        assert abs(of_each(own).mean() - of_each(repeated).mean()) < 5 * error


def test_other_random_streams_stay_where_they_are(dataset):
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    RepeatableViews(dataset, 3)[5]
    assert torch.equal(before[0], torch.get_rng_state())
    assert (before[1] == np.random.get_state()[1]).all()
    assert before[2] == random.getstate()


def test_they_do_not_depend_on_other_random_streams(dataset):
    views = RepeatableViews(dataset, 3)
    first = views[5]["img"]
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)
    assert torch.equal(first, views[5]["img"])


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_loader_workers_see_the_epoch(start, dataset):
    views = RepeatableViews(dataset, 3)
    loader = DataLoader(views, 50, num_workers=2, persistent_workers=True, multiprocessing_context=start)
    for epoch in range(2):
        views.epoch.fill_(epoch)
        batch = next(iter(loader))
        assert batch["view"].tolist() == [epoch] * 50
        assert torch.equal(batch["img"][4], views[4]["img"])


def test_it_is_the_dataset_for_anyone_else(dataset):
    views = RepeatableViews(dataset, 3)
    assert len(views) == len(dataset) == 200
    assert views.samples is dataset.samples
    with pytest.raises(AttributeError):
        views.mosaic  # noqa: B018
