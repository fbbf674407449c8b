"""Images that cannot be read are named, and what is kept beside them is made anew."""

import pickle
import shutil

import numpy as np
import pytest
import torch
from helpers import spoil_pixels
from ultralytics.data import ClassificationDataset
from ultralytics.data.distillation.wrapped import ReadableDataset, alike
from ultralytics.utils import DEFAULT_CFG, IterableSimpleNamespace


@pytest.fixture
def folder(digits, tmp_path):
    return shutil.copytree(digits / "train", tmp_path / "train", ignore=shutil.ignore_patterns("*.cache"))


def open_dataset(folder, **settings):
    args = IterableSimpleNamespace(**{**vars(DEFAULT_CFG), "imgsz": 32, **settings})
    return ReadableDataset(ClassificationDataset(str(folder), args))


def test_a_damaged_image_is_named(folder):
    file = sorted((folder / "0").iterdir())[3]
    spoil_pixels(file)
    dataset = open_dataset(folder)
    assert len(dataset) == 200  # its header is sound
    with pytest.raises(OSError, match=rf"'{file}' cannot be read as an image.*remove it"):
        dataset[3]
    assert dataset[4]["img"].shape == (3, 32, 32)


@pytest.mark.parametrize("damage", ["cut", "emptied"])
def test_a_damaged_copy_is_made_anew(damage, folder):
    dataset = open_dataset(folder, cache="disk")
    sound = dataset[5]["img"]
    (copy,) = folder.rglob("*.npy")
    whole = copy.read_bytes()
    copy.write_bytes(whole[:100] if damage == "cut" else b"")
    assert torch.equal(dataset[5]["img"], sound)
    assert copy.read_bytes() == whole
    assert np.load(copy).shape == (32, 32, 3)


def test_it_is_the_dataset_for_anyone_else(folder):
    dataset = pickle.loads(pickle.dumps(open_dataset(folder)))
    assert dataset.samples is dataset.dataset.samples
    with pytest.raises(AttributeError):
        dataset.mosaic  # noqa: B018


def test_images_of_one_size_that_follow_each_other_go_together():
    sizes = [4, 4, 4, 6, 6, 4]
    dataset = [{"img": torch.zeros(3, size, 4), "n": i} for i, size in enumerate(sizes)]
    found = [(indices, [sample["n"] for sample in samples]) for indices, samples in alike(dataset, range(6), 2)]
    assert found == [([0, 1], [0, 1]), ([2], [2]), ([3, 4], [3, 4]), ([5], [5])]
    assert [indices for indices, _ in alike(dataset, [5, 0, 3], 8)] == [[5, 0], [3]]
