"""The distillation arguments: what is accepted, what is refused and in which words."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from ultralytics.cfg.distillation import DistillationArgs, parse_arguments
from ultralytics.nn.distillation.class_names import read_names


def test_defaults():
    args = DistillationArgs()
    assert (args.distill_alpha, args.distill_beta, args.temperature) == (0.7, 0.3, 4.0)
    assert args.response_distill is args.feature_distill is args.attention_distill is True
    assert args.teacher is None
    assert args.distill_layers is None


@pytest.mark.parametrize(
    ("key", "value", "read"),
    [
        ("distill_alpha", "0.7", 0.7),
        ("distill_alpha", 0, 0),
        ("distill_beta", 1, 1),
        ("temperature", "2", 2),
        ("feature_distill", "False", False),
        ("attention_distill", "true", True),
        ("feature_weight", 0, 0),
        ("distill_layers", "4,6,9", (4, 6, 9)),
        ("distill_layers", [[2, 4], [3, 6]], [[2, 4], [3, 6]]),
        ("distill_layers", "None", None),
        ("temperature", np.float32(2), 2.0),
        ("feature_distill", np.bool_(False), False),
        ("feature_method", "{mse: 1e-1}", {"mse": 0.1}),
        ("teacher_output", 1, "1"),
        ("teacher_output", "1", "1"),
        ("teacher_output", "[1, logits]", ["1", "logits"]),
        ("teacher_output", "None", None),
        ("feature_method", {"mse": np.float64(2)}, {"mse": 2.0}),
        ("baseline", "1", "1"),
        ("teacher", "1.pt", "1.pt"),
        ("teacher", "[a.pt, timm:b@c.pth]", ["a.pt", "timm:b@c.pth"]),
        ("teacher", ["a.pt", Path("b.pt")], ["a.pt", "b.pt"]),
        ("teacher_names", "[no, 1, hot dog]", ["no", "1", "hot dog"]),
        ("teacher_names", "names.yaml", "names.yaml"),
        ("teacher_names", {0: "a"}, {0: "a"}),
        ("teacher_names", {np.int64(0): np.str_("a")}, {0: "a"}),
        ("teacher_names", np.array(["a", "b"]), ["a", "b"]),
        ("teacher_names", [np.str_("a"), np.int64(1)], ["a", 1]),
        ("teacher_imgsz", "224", 224),
        ("teacher_mean", "[0.5, 0.4, 0.3]", [0.5, 0.4, 0.3]),
        ("distill_layers", "[[4, 6], [layer2, layer3]]", [[4, 6], ["layer2", "layer3"]]),
        ("distill_layers", "[4, 6]", [4, 6]),
        ("teacher", Path("a") / "b.pt", str(Path("a") / "b.pt")),
    ],
)
def test_values_are_read(key, value, read):
    got = getattr(DistillationArgs(**{key: value}), key)
    assert got == read
    assert type(got) is type(read)
    assert yaml.safe_dump(got) == yaml.safe_dump(read)  # plain values, as args.yaml and checkpoints hold


@pytest.mark.parametrize(
    ("given", "student", "teacher"),
    [([4, 6], [4, 6], [4, 6]), ([[4, 6]], [4, 6], [4, 6]), (([2, 4], [3, 6]), [2, 4], [3, 6])],
)
def test_layers_of_both_networks(given, student, teacher):
    assert DistillationArgs(distill_layers=given).layers == (student, teacher)
    assert DistillationArgs().layers is None


@pytest.mark.parametrize(
    ("key", "value", "error", "values"),
    [
        ("distill_alpha", 1.5, ValueError, "between 0.0 and 1.0"),
        ("distill_alpha", "-0.1", ValueError, "between 0.0 and 1.0"),
        ("distill_beta", float("nan"), ValueError, "between 0.0 and 1.0"),
        ("distill_beta", "much", TypeError, "int or float"),
        ("distill_beta", None, TypeError, "int or float"),
        ("temperature", 0, ValueError, "greater than 0"),
        ("temperature", float("inf"), ValueError, "greater than 0"),
        ("temperature", True, TypeError, "int or float"),
        ("feature_distill", 1, TypeError, "bool"),
        ("attention_distill", "yes", TypeError, "bool"),
        ("feature_weight", -1, ValueError, "0 or greater"),
        ("attention_weight", [1], TypeError, "int or float"),
        ("teacher", 3, TypeError, "nn.Module"),
        ("teacher", "", ValueError, "a file, `torchvision:NAME`"),
        ("teacher", torch.nn.Linear, TypeError, "nn.Module"),
        ("teacher", [], ValueError, "a list of these"),
        ("teacher", ["a.pt", 3], TypeError, "nn.Module"),
        ("teacher_names", 3, TypeError, "list, dict or str"),
        ("teacher_names", [], ValueError, "class names"),
        ("teacher_imgsz", 0, ValueError, "greater than 0"),
        ("teacher_output", True, TypeError, "None, str"),
        ("teacher_output", 1.5, TypeError, "None, str"),
        ("teacher_output", "", ValueError, "an output's name"),
        ("teacher_imgsz", 32.5, TypeError, "int"),
        ("teacher_mean", "grey", TypeError, "int, float"),
        ("teacher_std", 0, ValueError, "greater than 0"),
        ("teacher_weights", 0.5, TypeError, "list"),
        ("teacher_weights", [0.5, -1], ValueError, "greater than 0"),
        ("teacher_trusted", 1, TypeError, "bool"),
        ("self_distill_start", -1, ValueError, "0 or greater"),
        ("self_distill_start", 1.5, TypeError, "int"),
        ("distill_layers", 4, TypeError, "a list of int"),
        ("distill_layers", [""], ValueError, "module names"),
        ("distill_layers", [4.0], TypeError, "a list of int"),
        ("distill_layers", [], ValueError, "0 or greater"),
        ("distill_layers", [-1], ValueError, "0 or greater"),
        ("distill_layers", [[4], [4, 6]], ValueError, "as many"),
        ("distill_layers", [[4], [4], [4]], ValueError, "as many"),
        ("distill_layers", [[], []], ValueError, "0 or greater"),
    ],
)
def test_wrong_values_are_named(key, value, error, values):
    with pytest.raises(error) as e:
        DistillationArgs(**{key: value})
    assert f"'{key}={value}'" in str(e.value)
    assert values in str(e.value)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"teacher": ["self", "a.pt"]}, "'teacher=self' teaches alone"),
        ({"teacher": ["a.pt", "b.pt"], "teacher_weights": [1]}, "each of 2 teachers"),
        ({"teacher": ["a.pt", "b.pt"], "teacher_imgsz": [32, 32, 32]}, "3 entries, but there are 2 teachers"),
        ({"teacher": ["a.pt", "b.pt"], "teacher_names": ["x", "y", "z"]}, "3 entries, but there are 2 teachers"),
        ({"teacher": "a.pt", "teacher_imgsz": [32, 64]}, "several entries for one teacher"),
        ({"teacher": "a.pt", "teacher_output": ["logits", "y"]}, "several entries for one teacher"),
    ],
)
def test_what_is_given_per_teacher_must_fit(given, words):
    with pytest.raises(ValueError, match=words):
        DistillationArgs(**given)


def test_one_value_serves_all_teachers_or_each_has_its_own():
    args = DistillationArgs(
        teacher=["a.pt", "b.pt"],
        teacher_imgsz=[32, None],
        teacher_output=[None, "sigmoid"],
        teacher_names="n.yaml",
        teacher_mean=0.5,
    )
    first, second = args.per_teacher()
    assert first == {
        **{"source": "a.pt", "names": "n.yaml", "imgsz": 32, "mean": [0.5], "std": None, "trusted": False},
        **{"grows_head": False, "output": None},
    }
    assert second["output"] == "sigmoid"
    assert (second["source"], second["names"], second["imgsz"]) == ("b.pt", "n.yaml", None)
    each = DistillationArgs(teacher=["a.pt", "b.pt"], teacher_imgsz=64, teacher_names=[["x", "y"], None]).per_teacher()
    assert [(x["names"], x["imgsz"]) for x in each] == [(["x", "y"], 64), (None, 64)]
    assert DistillationArgs(teacher="a.pt", teacher_names=["x", "y"]).per_teacher()[0]["names"] == ["x", "y"]


def test_no_loss_is_refused():
    with pytest.raises(ValueError, match="'distill_alpha=0' and 'distill_beta=0'"):
        DistillationArgs(distill_alpha=0, distill_beta=0)
    with pytest.raises(ValueError, match=r"are off\. Switch one on"):
        DistillationArgs(response_distill=False, feature_weight=0, attention_distill=False)
    DistillationArgs(response_distill=False, feature_distill=False, attention_distill=False, distill_alpha=0)


def test_split_leaves_its_argument_alone():
    overrides = {"teacher": "a.pt", "temperature": 2.0, "epochs": 3, "imgsz": 32}
    given, rest = DistillationArgs.split(overrides)
    assert given == {"teacher": "a.pt", "temperature": 2.0}
    assert rest == {"epochs": 3, "imgsz": 32}
    assert overrides == {"teacher": "a.pt", "temperature": 2.0, "epochs": 3, "imgsz": 32}


def test_distill_model_is_another_name_for_teacher():
    for overrides in (
        {"distill_model": "a.pt"},
        {"distill_model": "a.pt", "teacher": None},
        {"distill_model": "a.pt", "teacher": Path("a.pt")},
    ):
        given, rest = DistillationArgs.split(overrides)
        assert str(given["teacher"]) == "a.pt"
        assert rest["distill_model"] is None
    with pytest.raises(ValueError, match=r"distill_model=a.pt.*teacher=b.pt"):
        DistillationArgs.split({"distill_model": "a.pt", "teacher": "b.pt"})


@pytest.mark.parametrize(
    ("key", "nearest"), [("temprature", "temperature"), ("distil_alpha", "distill_alpha"), ("epoch", "epochs")]
)
def test_misspelt_keys_get_the_nearest_valid_ones(key, nearest):
    with pytest.raises(SyntaxError) as e:
        DistillationArgs.split({key: 1})
    assert f"'{key}' is not a valid YOLO argument" in e.value.msg
    assert nearest in e.value.msg


def test_arguments_in_upstream_syntax():
    line = ["epochs=3", "teacher", "=", "a.pt", "feature_distill=False", "distill_layers=[4,", "6]", "cos_lr"]
    assert parse_arguments(line) == {
        "epochs": 3,
        "teacher": "a.pt",
        "feature_distill": False,
        "distill_layers": [4, 6],
        "cos_lr": True,
    }
    with pytest.raises(SyntaxError, match="'train' is not a valid argument"):
        parse_arguments(["train"])


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[1e3, 2]", ["1e3", "2"]),
        ("[0x10, 1_0]", ["0x10", "1_0"]),
        ("[01, no]", ["01", "no"]),
        ("['a b', \"c\"]", ["a b", "c"]),
        ("['it\\'s', 'b']", ["it's", "b"]),  # as Python writes it
        ("{0: 1_0, 1: 2}", ["1_0", "2"]),
        ("{0: a, 1: 1.0}", ["a", "1.0"]),
    ],
)
def test_names_on_a_command_line_are_as_they_were_written(text, names):
    given = DistillationArgs(**parse_arguments([f"teacher_names={text}"])).teacher_names
    assert read_names(given) == names


def test_nothing_on_a_command_line_is_nothing():
    assert parse_arguments(["teacher_names=None", "teacher=None"]) == {"teacher_names": None, "teacher": None}
    digest = "12" * 30 + "1e12"  # no number
    assert parse_arguments([f"teacher_hash={digest}"]) == {"teacher_hash": digest}
