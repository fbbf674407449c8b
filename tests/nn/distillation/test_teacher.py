"""What a teacher answers, and which answers are refused in which words."""

import math

import pytest
import timm
import torch
import torchvision
from teachers import Answer, exported, seen
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


def test_what_is_compiled_has_its_weights_cast_too(teacher, monkeypatch):
    shapes = compiles(monkeypatch)
    frozen, images = Teacher(teacher), torch.rand(4, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        frozen.cast(images[:2])
        with Casts() as alone:
            expected, _ = frozen(images)
        frozen.compile("default", images.shape)
        with Casts() as compiled:
            answer, _ = frozen(images)
    assert shapes == [("default", (4, 3, 32, 32))]
    assert torch.equal(answer, expected)
    assert compiled.count == alone.count


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
    others = {
        "other": seen(torchvision.models.resnet18(num_classes=3)),
        "without": Answer(lambda x: x.mean((2, 3)), ["a", "b", "c"]),
    }
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


@pytest.mark.parametrize(
    ("names", "error"), [("cat", TypeError), ("none.yaml", FileNotFoundError), ({0: "a", 2: "b"}, ValueError)]
)
def test_names_that_are_none_are_refused(names, error, teacher):
    with pytest.raises(error, match="'teacher_names=") as e:
        Teacher(teacher, names=names)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("channels", [1, 4])
def test_channels_must_fit(channels, teacher):
    with pytest.raises(ValueError, match=f"takes images of 3 channels, but the dataset's have {channels}"):
        Teacher(teacher).vet(32, channels)


def test_mean_and_standard_deviation_are_per_channel(teacher):
    with pytest.raises(ValueError, match="'teacher_mean' and 'teacher_std' need 1 or 3 values"):
        Teacher(teacher, mean=[0.5, 0.5]).vet(32, 3)
