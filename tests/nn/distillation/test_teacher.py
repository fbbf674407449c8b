"""What a teacher answers, and which answers are refused in which words."""

import math
import re
from types import SimpleNamespace

import pytest
import timm
import torch
import torchvision
from teachers import exported, seen
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode
from ultralytics.nn.distillation.classifier import ClassificationTeacher as Teacher
from ultralytics.nn.distillation.classifier import TeacherEnsemble
from ultralytics.nn.tasks import load_checkpoint

DIGITS = [str(i) for i in range(10)]


def test_answers_as_the_checkpoint_does(teacher):
    """Fusing changes nothing beyond rounding: the logits and maps are the unfused network's."""
    frozen = Teacher(teacher)
    levels = frozen.find_levels(32, 3)
    frozen.levels = [levels["model.6"], levels["model.4"]]
    x = torch.rand(3, 3, 32, 32)
    logits, (stride16, stride8) = frozen(x)
    model, _ = load_checkpoint(teacher)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(x)[1], rtol=1e-3, atol=1e-4)
        for layer in model.model[:5]:
            x = layer(x)
        torch.testing.assert_close(stride8, x, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(stride16, model.model[6](model.model[5](x)), rtol=1e-3, atol=1e-4)
    assert frozen.names == DIGITS
    assert not any(m._forward_hooks for m in frozen.model.modules())


def test_without_logits_the_pass_ends_at_the_last_level(teacher):
    frozen = Teacher(teacher)
    levels = frozen.find_levels(32, 3)
    frozen.levels = [levels["model.6"], levels["model.4"]]
    x, ran = torch.rand(3, 3, 32, 32), []
    for i in (6, 7):
        frozen.model.model[i].register_forward_hook(lambda *_, i=i: ran.append(i))
    _, expected = frozen(x)
    assert ran == [6, 7]
    logits, maps = TeacherEnsemble([frozen, Teacher(teacher)])(x, head=False)
    assert ran == [6, 7, 6]
    assert logits.shape == (3, 0)
    assert all(torch.equal(a, b) for a, b in zip(maps, expected, strict=True))
    assert [len(m._forward_hooks) for m in frozen.model.model[4:8]] == [0, 0, 1, 1]


def compiles(monkeypatch):
    """Replace the compiler by one that leaves networks as they are and counts their forward passes."""
    shapes = []

    def attempt_compile(module, device, mode):
        module.register_forward_hook(lambda module, args, output: shapes.append((mode, tuple(args[0].shape))))
        return module

    monkeypatch.setattr("ultralytics.nn.distillation.teacher.attempt_compile", attempt_compile)
    return shapes


def test_batches_of_the_compiled_shape_are_answered_by_the_compiled_network(teacher, monkeypatch):
    shapes = compiles(monkeypatch)
    frozen = Teacher(teacher)
    frozen.levels = [frozen.find_levels(32, 3)["model.4"]]
    x = torch.rand(5, 3, 32, 32)
    expected = frozen(x)
    for _ in range(2):
        TeacherEnsemble([frozen]).compile("default", x.shape)
        logits, (stride8,) = frozen(x)
        assert torch.equal(logits, expected[0])
        assert torch.equal(stride8, expected[1][0])
    assert torch.equal(frozen(x, head=False)[1][0], expected[1][0])
    torch.testing.assert_close(frozen(x[:3])[0], expected[0][:3])
    assert shapes == [("default", (5, 3, 32, 32))] * 3
    with torch.no_grad():
        frozen.model.model[0].conv.weight.zero_()  # the weights are there once
    assert not torch.equal(frozen(x)[0], expected[0])
    assert not any(m._forward_hooks for m in frozen.model.modules())
    frozen.compile("default", (3, 3, 32, 32))
    frozen(x[:3])
    assert shapes[-1] == ("default", (3, 3, 32, 32))


@pytest.mark.parametrize(("mode", "kept"), [("reduce-overhead", True), ("default", False)])
def test_answers_outlive_the_memory_of_cuda_graphs(mode, kept, teacher, monkeypatch):
    """A graph answers in the same memory each time, and shares it with those of other networks."""

    def attempt_compile(module, device, mode):
        memory = {}

        def replay(images, logits):
            answer, maps = module(images, logits)
            new = [*(answer or ()), *maps]
            same = memory.setdefault(logits, [x.clone() for x in new])
            for old, x in zip(same, new, strict=True):
                old.copy_(x)
            return (tuple(same[:-1]) if logits else None), same[-1:]

        return replay

    monkeypatch.setattr("ultralytics.nn.distillation.teacher.attempt_compile", attempt_compile)
    frozen = Teacher(teacher)
    frozen.levels = [frozen.find_levels(32, 3)["model.4"]]
    first, second = torch.rand(2, 3, 3, 32, 32)
    expected, (expected_map,) = frozen(first)
    frozen.compile(mode, first.shape)
    logits, (stride8,) = frozen(first)
    frozen(second)
    assert torch.equal(logits, expected) == kept
    assert torch.equal(stride8, expected_map) == kept
    frozen.compile(mode, second.shape)
    (stride8,) = frozen(second, head=False)[1]
    assert torch.equal(stride8, frozen(second)[1][0])


@pytest.mark.slow
def test_the_compiler_changes_nothing_beyond_rounding_and_leaves_out_what_is_not_asked_for(teacher):
    frozen = Teacher(teacher)
    levels = frozen.find_levels(32, 3)
    frozen.levels = [levels["model.4"], levels["model.3"]]
    x = torch.rand(4, 3, 32, 32)
    expected, expected_maps = frozen(x)
    frozen.compile(True, x.shape)
    assert hasattr(frozen._compiled, "_orig_mod")
    _, (whole,) = run_and_get_code(frozen, x)
    for _ in range(2):
        logits, maps = frozen(x)
        torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(maps, expected_maps, rtol=1e-3, atol=1e-4)
    (_, maps), (code,) = run_and_get_code(frozen, x, head=False)
    torch.testing.assert_close(maps, expected_maps, rtol=1e-3, atol=1e-4)
    assert code.count("convolution") < 0.6 * whole.count("convolution")
    assert "addmm" in whole
    assert "addmm" not in code


def test_is_frozen_and_fused(teacher):
    frozen = Teacher(teacher)
    logits, features = frozen(torch.rand(2, 3, 32, 32))
    assert not logits.requires_grad
    assert features == []
    assert not any(p.requires_grad for p in frozen.model.parameters())
    assert not any(m.training for m in frozen.model.modules())
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in frozen.model.modules())


class Casts(TorchDispatchMode):
    """Counts the tensors that are brought to another type."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        found = operator(*args, **(kwargs or {}))
        self.count += operator.overloadpacket is torch.ops.aten._to_copy and found.dtype != args[0].dtype
        return found


class Cosine(torch.nn.Module):
    """Computes with the weights of its layer before autocast has cast them."""

    def __init__(self):
        super().__init__()
        self.stem, self.linear = torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.stem(x).mean((2, 3)) @ torch.nn.functional.normalize(self.linear.weight).T


@pytest.mark.parametrize("kind", ["yolo", "resnet", "vit", "cosine"])
def test_under_autocast_weights_are_cast_once(kind, teacher):
    """What it says stays the same bit for bit; so does a network that computes with its weights as they are."""
    makers = {
        "resnet": lambda: seen(timm.create_model("resnet18", num_classes=3)),
        "vit": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32).eval(),
        "cosine": Cosine,
    }
    frozen = Teacher(makers[kind]() if kind in makers else teacher)
    frozen.vet(32, 3)
    frozen.levels = list(frozen.find_levels(32, 3).values())[-1:]
    side = 48 if kind == "vit" else 32  # which sees its own size whatever the student's is
    images, precision = torch.rand(4, 3, side, side), torch.autocast("cpu", torch.bfloat16)
    alone = frozen(images)[0]
    with precision, Casts() as before:
        expected, maps = frozen(images)
    with precision:
        frozen.cast(images[:2])
    with precision, Casts() as after:
        answer, features = frozen(images)
    assert torch.equal(answer, expected)
    assert all(torch.equal(a, b) for a, b in zip(features, maps, strict=True))
    assert torch.equal(frozen(images)[0], alone)
    assert after.count == before.count if kind == "cosine" else after.count < before.count / 2
    frozen.to(torch.device("cpu"))
    with precision:
        assert torch.equal(frozen(images)[0], expected)


@pytest.mark.parametrize(
    ("device", "side", "kind", "expected"),
    [
        ("cpu", 64, "ultralytics", False),
        ("cpu", 96, "ultralytics", True),
        ("cpu", 96, "other", False),  # not measured
        ("cuda", 32, "ultralytics", True),
        ("cuda", 32, "other", True),
        ("cuda", 32, "without", False),
        ("mps", 96, "ultralytics", False),
    ],
)
def test_which_networks_get_channels_last(device, side, kind, expected, teacher):
    others = {"other": seen(torchvision.models.resnet18(num_classes=3)), "without": Answer(scores, ["a", "b", "c"])}
    frozen = Teacher(others.get(kind, teacher))
    frozen._side = side
    assert frozen.prefers_channels_last(torch.device(device)) == expected


@pytest.mark.parametrize(("imgsz", "expected"), [(64, False), (96, True)])
def test_memory_format(imgsz, expected, teacher):
    """Channels last where that was measured to be faster; the answers are the same up to rounding."""
    plain, fast = Teacher(teacher), Teacher(teacher)
    fast.vet(imgsz, 3)
    for each in (plain, fast):
        each.to(torch.device("cpu"))
        each.levels = list(each.find_levels(imgsz, 3).values())[-3:]
    weight = fast.model.model[1].conv.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == expected
    assert plain.model.model[1].conv.weight.is_contiguous()
    images = torch.rand(4, 3, imgsz, imgsz)
    for a, b in zip((plain(images)[0], *plain(images)[1]), (fast(images)[0], *fast(images)[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("logits", [True, False])
@pytest.mark.parametrize(
    ("count", "imgsz", "own_size", "sizes"),
    [
        (16, 32, None, [16]),  # 16 x 32 x 32 pixels are the most at once
        (17, 32, None, [9, 8]),
        (40, 32, None, [14, 13, 13]),
        (8, 32, 64, [4, 4]),  # of the size that it sees
        (7, 128, None, [3, 2, 2]),  # never one image alone
        (3, 128, None, [3]),
        (1, 256, None, [1]),
    ],
)
def test_large_batches_are_answered_in_pieces(count, imgsz, own_size, sizes, logits, teacher, monkeypatch):
    monkeypatch.setattr("ultralytics.nn.distillation.teacher.PIXELS_AT_ONCE", 16 * 32 * 32)
    pieces, whole = (
        Teacher(teacher, imgsz=own_size).to(torch.device("cpu")),
        Teacher(teacher, imgsz=own_size),
    )
    seen = []
    for each in (pieces, whole):
        each.levels = list(each.find_levels(imgsz, 3).values())[-3:]
    pieces.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    images = torch.rand(count, 3, imgsz, imgsz)
    found, expected = pieces(images, logits), whole(images, logits)
    assert seen == sizes
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [x.stride() for x in found[1]] == [x.stride() for x in expected[1]]


@pytest.mark.parametrize("where", ["vetted", "another device", "an exported file", "compiled for"])
def test_batches_are_answered_whole(where, teacher, monkeypatch, tmp_path):
    """Where two images have to be, where it gains nothing, or where the network is compiled for so many."""
    monkeypatch.setattr("ultralytics.nn.distillation.teacher.PIXELS_AT_ONCE", 32)
    compiles(monkeypatch)
    whole = Teacher(exported(tmp_path, teacher, "onnx") if where == "an exported file" else teacher)
    seen, images = [], torch.rand(6, 3, 32, 32)
    whole.model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    if where == "vetted":
        whole.vet(32, 3)
        assert seen == [2]
        return
    if where == "another device":
        assert whole.to(torch.device("meta")).pixels_at_once == math.inf
        return
    whole.to(torch.device("cpu"))
    if where == "compiled for":
        whole.compile(True, images.shape)
        whole(images[:5])
        assert seen == [3, 2]  # those of another shape are not
        seen.clear()
    whole(images)
    assert seen == [6]


def test_images_are_brought_to_the_teachers_own_size_mean_and_standard_deviation():
    given = []

    class Recorder(torch.nn.Module):
        names = ("a", "b")

        def forward(self, x):
            given.append(x)
            return x.mean((2, 3))[:, :2]

    images = torch.rand(2, 3, 64, 64)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.25, 0.5]
    Teacher(Recorder())(images)
    assert given.pop() is images  # upstream's convention is the default: 0 to 1, mean 0, standard deviation 1
    Teacher(Recorder(), mean=mean, std=std)(images)
    for channel in range(3):
        torch.testing.assert_close(given[0][:, channel], (images[:, channel] - mean[channel]) / std[channel])
    given.clear()
    Teacher(Recorder(), imgsz=32)(images)
    assert given[0].shape == (2, 3, 32, 32)
    torch.testing.assert_close(given[0].mean((2, 3)), images.mean((2, 3)), rtol=0.02, atol=0.02)


class Answer(torch.nn.Module):
    """A network that answers what it is told."""

    def __init__(self, answer, names=None):
        super().__init__()
        self.answer = answer
        if names:
            self.names = names

    def forward(self, x):
        return self.answer(x)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda x: x.mean(), "answers 2 images with ()"),
        (lambda x: x, "answers 2 images with (2, 3, 32, 32)"),
        (lambda x: {"out": x}, "answers 2 images with dict"),
        (lambda x: x.mean((2, 3)) * float("nan"), "NaN or infinite"),
        (lambda x: x.mean((2, 3)) / 0, "NaN or infinite"),
        (lambda x: x.mean((2, 3))[:, :2], "gives 2 logits per image, but has 3 class names"),
        (lambda x: x.reshape(2, 3, 224, 224), "cannot process a batch of 2 images of 3x32x32 (RuntimeError"),
    ],
)
def test_a_wrong_answer_is_refused(answer, words):
    with pytest.raises(ValueError, match=re.escape(words)) as e:
        Teacher(Answer(answer, ["a", "b", "c"])).vet(32, 3)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("names", "error"), [("cat", TypeError), ("none.yaml", FileNotFoundError), ({0: "a", 2: "b"}, ValueError)]
)
def test_names_that_are_none_are_refused(names, error, teacher):
    with pytest.raises(error, match="'teacher_names=") as e:
        Teacher(teacher, names=names)
    assert "\n" not in str(e.value)


def test_probabilities_are_read_as_logits(tmp_path):
    """An exported classifier that ends in a softmax teaches what its logits would."""
    for transform in (lambda x: x, lambda x: x.softmax(1)):
        frozen = Teacher(Answer(lambda x, f=transform: f(x.mean((2, 3)) * 5), ["a", "b", "c"]))
        frozen.vet(32, 3)
        images = torch.rand(2, 3, 32, 32)
        expected = (images.mean((2, 3)) * 5 / 4).softmax(1)
        torch.testing.assert_close((frozen(images)[0] / 4).softmax(1), expected)


def test_a_probability_of_zero_stays_finite():
    frozen = Teacher(Answer(lambda x: torch.tensor([[1.0, 0.0, 0.0]]).expand(len(x), 3), ["a", "b", "c"]))
    frozen.vet(32, 3)
    assert frozen(torch.rand(2, 3, 32, 32))[0].isfinite().all()


def scores(x):
    return x.mean((2, 3)) * 8 - 4


@pytest.mark.parametrize(
    ("answer", "output", "meaning"),
    [
        (scores, None, "logits"),
        (lambda x: scores(x).log_softmax(1), None, "logits"),
        (lambda x: (scores(x).softmax(1) * 255).round() / 255 * 1.003, None, "probabilities"),  # as int8 gives them
        (lambda x: scores(x).softmax(1), "probabilities", "probabilities"),
        (lambda x: scores(x).sigmoid(), "sigmoid", "sigmoid"),
        (lambda x: (x.flatten(1)[:, :7], scores(x)), None, "logits"),  # an embedding first
        (lambda x: {"embedding": x.flatten(1)[:, :7], "scores": scores(x), "map": x}, None, "logits"),
        (lambda x: {"first": x.flatten(1)[:, :3], "second": scores(x)}, "second", "logits"),
        (lambda x: (x.flatten(1)[:, :3], scores(x)), "1", "logits"),
        (lambda x: {"probabilities": x.flatten(1)[:, :3], "logits": scores(x)}, "logits", "logits"),
        (lambda x: {"logits": x.flatten(1)[:, :3], "probabilities": scores(x).softmax(1)}, *["probabilities"] * 2),
        (lambda x: SimpleNamespace(logits=scores(x), loss=None), None, "logits"),  # as transformers do
    ],
)
def test_answers_are_read_as_what_they_are(answer, output, meaning):
    frozen = Teacher(Answer(answer, ["a", "b", "c"]), output=output)
    frozen.vet(32, 3)
    assert frozen.meaning == meaning
    images = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(frozen(images)[0].softmax(1), scores(images).softmax(1), atol=0.01, rtol=0.01)


def bright(count):
    """Images that differ as those of a dataset do, and noise does not."""
    return torch.linspace(0, 1, count)[:, None, None, None] * torch.rand(count, 3, 32, 32)


@pytest.mark.parametrize(
    ("answer", "meaning"),
    [
        (lambda x: scores(x).sigmoid(), "sigmoid"),
        (lambda x: scores(x).softmax(1), "probabilities"),
        (scores, "logits"),
        (lambda x: scores(x).log_softmax(1), "logits"),
        (lambda x: (scores(x) + 4) / 8, "sigmoid"),  # nothing that logits would say
        (lambda x: scores(x) / 8 + 0.5 + (x.mean((1, 2, 3))[:, None] < 0.3), "logits"),  # in that range for noise alone
    ],
)
def test_images_of_the_dataset_tell_what_answers_are(answer, meaning):
    """Noise says too little: next to all of it is alike."""
    images = bright(8)
    frozen = Teacher(Answer(answer, ["a", "b", "c"]))
    frozen.vet(32, 3, images)
    assert frozen.meaning == meaning
    unseen = Teacher(Answer(answer, ["a", "b", "c"]))
    unseen.vet(32, 3)
    assert unseen.meaning == meaning.replace("sigmoid", "logits")
    told = Teacher(Answer(answer, ["a", "b", "c"]), output="logits")
    told.vet(32, 3, images)
    torch.testing.assert_close(told(images)[0], answer(images))


@pytest.mark.parametrize("images", [None, bright(8)])
def test_one_score_tells_two_classes(images):
    given, images = images, torch.rand(4, 3, 32, 32)
    told = [(torch.sigmoid, "sigmoid"), (torch.sigmoid, "probabilities")]
    for transform, output in [(lambda z: z, None), *told, *([] if given is None else [(torch.sigmoid, None)])]:
        frozen = Teacher(Answer(lambda x, f=transform: f(scores(x)[:, :1]), ["no", "yes"]), output=output)
        frozen.vet(32, 3, given)
        torch.testing.assert_close(frozen(images)[0].softmax(1)[:, 1], scores(images)[:, 0].sigmoid())


def test_what_is_recognised_is_said_and_what_is_rounded():
    rounded = Teacher(Answer(lambda x: (scores(x).softmax(1) * 20).round() / 20, ["a", "b", "c"]))
    rounded.vet(32, 3)
    (note,) = TeacherEnsemble([rounded]).align(["a", "b", "c"])
    assert "its answers are read as probabilities" in note
    assert ("rounded" in note) == rounded.rounded
    assert not TeacherEnsemble([Teacher(Answer(scores, ["a", "b", "c"]))]).align(["a", "b", "c"])


def test_an_output_that_is_not_there_is_refused():
    frozen = Teacher(Answer(lambda x: {"one": scores(x), "two": x}, ["a", "b", "c"]), output="three")
    with pytest.raises(ValueError, match=r"'teacher_output=three' is none of .*which has \['one', 'two'\]") as e:
        frozen.vet(32, 3)
    assert "teacher_imgsz" not in str(e.value)
    with pytest.raises(ValueError, match="which has one without a name"):
        Teacher(Answer(scores, ["a", "b", "c"]), output="three").vet(32, 3)


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_must_fit(channels, teacher):
    with pytest.raises(ValueError, match=f"takes images of 3 channels, but the dataset's have {channels}"):
        Teacher(teacher).vet(32, channels)


def test_mean_and_standard_deviation_are_per_channel(teacher):
    with pytest.raises(ValueError, match="'teacher_mean' and 'teacher_std' need 1 or 3 values"):
        Teacher(teacher, mean=[0.5, 0.5]).vet(32, 3)


def test_several_judge_the_classes_that_all_know():
    a = Teacher(Answer(lambda x: x.flatten(1)[:, :4], ["a", "b", "c", "d"]))
    b = Teacher(Answer(lambda x: x.flatten(1)[:, 4:7], ["c", "b", "x"]))
    both = TeacherEnsemble([a, b], [1, 3], temperature=2.0)
    notes = both.align(["a", "b", "c", "e"])
    assert both.classes == [1, 2]
    assert both.weights == [0.25, 0.75]
    assert any("2 of 4 classes" in note and "'a', 'e'" in note for note in notes)
    x = torch.rand(5, 1, 2, 4)
    logits, _ = both(x)
    one, other = x.flatten(1)[:, [1, 2]], x.flatten(1)[:, [5, 4]]
    expected = 0.25 * (one / 2).softmax(1) + 0.75 * (other / 2).softmax(1)
    torch.testing.assert_close((logits / 2).softmax(1), expected)


def test_a_teacher_without_names_says_what_to_give():
    with pytest.raises(ValueError, match=r"does not say which classes.*teacher_names=ImageNet\.yaml"):
        TeacherEnsemble([Teacher(Answer(lambda x: x.mean((2, 3))))]).align(["a", "b"])


def test_judged_images_are_spread_evenly_and_of_known_classes():
    data = [{"img": torch.full((3, 8, 8), i / 10), "cls": i % 4} for i in range(10)]
    ensemble = TeacherEnsemble([Teacher(Answer(lambda x: x.mean((2, 3)), ["a", "d", "x"]))])
    ensemble.align(["a", "b", "c", "d"])
    (logits,), labels = ensemble.judge(data, batch=3)
    assert labels.tolist() == [0, 1, 0, 1, 0]  # of images 0, 3, 4, 7, 8
    torch.testing.assert_close(logits[:, 0], torch.tensor([0.0, 0.3, 0.4, 0.7, 0.8]))
    assert ensemble.judge(data, limit=2)[1].tolist() == [0]  # of images 0 and 9, which is of class 1
