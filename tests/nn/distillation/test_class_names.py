"""Class names: where they are read from, and how a teacher's are matched to a dataset's."""

import pytest
import yaml
from ultralytics.nn.distillation.class_names import imagenet_names, match_classes, read_names
from ultralytics.utils import ROOT, YAML

IMAGENET = YAML.load(ROOT / "cfg/datasets/ImageNet.yaml")


@pytest.mark.parametrize("names", [["a", "b"], {0: "a", 1: "b"}, {"1": "b", "0": "a"}])
def test_names_are_read(names, tmp_path):
    assert read_names(names) == ["a", "b"]
    for content in ([names] if isinstance(names, dict) else []) + [{"path": "x", "names": names}]:
        (tmp_path / "names.yaml").write_text(yaml.safe_dump(content))
        assert read_names(tmp_path / "names.yaml") == ["a", "b"]


@pytest.mark.parametrize(
    ("names", "error"),
    [([], TypeError), (3, TypeError), ([None], TypeError), ({0: "a", 2: "b"}, ValueError), ({"x": "a"}, ValueError)],
)
def test_what_names_no_classes_is_refused(names, error):
    with pytest.raises(error, match="Class names"):
        read_names(names)


def test_names_in_yaml_are_what_is_written(tmp_path):
    file = tmp_path / "names.yaml"
    for text in ("names: [01, 08, no, 1e3, 1.50, ~]", 'names: {0: 01, 1: 08, 2: no, 3: "1e3", 4: 1.50, 5: ~}'):
        file.write_text(text)
        assert read_names(file) == ["01", "08", "no", "1e3", "1.50", "~"]
        assert read_names(text.removeprefix("names: ")) == read_names(file)  # as on the command line
    file.write_text("names: [a, b")
    with pytest.raises(TypeError, match=r"names.yaml' is no YAML of class names"):
        read_names(file)


def test_a_missing_file_of_names(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_names(tmp_path / "names.yaml")


@pytest.mark.parametrize(
    ("teacher", "dataset", "match"),
    [
        (["a", "b", "c"], ["a", "b", "c"], {0: 0, 1: 1, 2: 2}),
        (["b", "c", "a"], ["a", "b", "c"], {0: 2, 1: 0, 2: 1}),
        (["x", "c", "y", "a"], ["a", "b", "c"], {0: 3, 2: 1}),
        (["Hot Dog", "fire_truck", " CAT "], ["cat", "hotdog", "Fire truck"], {0: 2, 1: 0, 2: 1}),
        (["a", "A"], ["A", "a"], {0: 1, 1: 0}),  # letters: both know the same names
        (["a"], ["b"], {}),
        (["crane", "crane", "dog"], ["dog"], {0: 2}),  # what the dataset does not have may be ambiguous
        (["caf\u00e9", "\u212bngstrom"], ["Cafe\u0301", "A\u030angstrom"], {0: 0, 1: 1}),  # composed or not
        (["1", "False", "8"], ["08", "no", "01"], {1: 1, 2: 0}),  # as upstream's YAML reads 01 and no, unlike 08
        (["8", "010", "a: b"], ["010", "8", "a: b", "07"], {0: 1, 1: 0, 2: 2}),  # what is the same comes first
        ([str(i) for i in range(3, 13)], [f"{i:03}" for i in range(3, 13)], {i: i for i in range(10)}),
        (["8", "dog"], ["010", "cat"], {}),  # no eight, though YAML reads one
        (["90", "dog"], ["1:30", "cat"], {}),
    ],
)
def test_classes_are_matched_by_name(teacher, dataset, match):
    assert match_classes(teacher, dataset) == match


@pytest.mark.parametrize(
    ("teacher", "dataset", "pairs"),
    [
        (["cat", "Cat", "dog"], ["cat", "dog"], ["'cat' and 'cat'", "'cat' and 'Cat'"]),
        (["hotdog"], ["hot dog", "hot_dog"], ["'hot dog' and 'hotdog'", "'hot_dog' and 'hotdog'"]),
    ],
)
def test_ambiguous_matches_are_listed(teacher, dataset, pairs):
    with pytest.raises(ValueError, match="teacher_names") as e:
        match_classes(teacher, dataset)
    assert all(pair in str(e.value) for pair in pairs)
    assert "dog' and 'dog" not in str(e.value)


@pytest.mark.parametrize("spelling", ["names", "map"])
def test_imagenet_identifiers_find_their_classes(spelling):
    """Folders of ImageNette, whichever of upstream's two spellings the teacher has."""
    dataset = ["n01440764", "n02102040", "n03888257"]
    assert match_classes(list(IMAGENET[spelling].values()), dataset) == {0: 0, 1: 217, 2: 701}
    assert match_classes(dataset[::-1], dataset) == {0: 2, 1: 1, 2: 0}  # a teacher trained on those folders
    assert match_classes([f"x{i}" for i in range(1000)], dataset) == {}


def test_imagenet_by_words():
    assert match_classes(imagenet_names(), ["Goldfish", "golden_retriever"]) == {0: 1, 1: 207}
