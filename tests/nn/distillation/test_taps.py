"""Which feature levels networks share, for every classifier that upstream can build, and how they are read."""

import pytest
import timm
import torch
import torchvision
from ultralytics.nn.distillation.taps import FeatureLevel, FeatureTaps, find_levels, match_levels
from ultralytics.nn.tasks import ClassificationModel


def build(name):
    if "cls-resnet18" in name:  # upstream's file asks for pretrained weights, which would be downloaded
        from ultralytics.nn.tasks import yaml_model_load

        config = yaml_model_load(name)
        config["backbone"][0][3][2] = None
        return ClassificationModel(config, nc=10, verbose=False)
    return ClassificationModel(name, nc=10, verbose=False)


def names(model, imgsz=64):
    levels = find_levels(model, imgsz)
    return {s.stride: s.name for s, _ in match_levels(levels, levels)}


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("yolov8n-cls.yaml", (4, 6, 8)),
        ("yolov8m-cls.yaml", (4, 6, 8)),
        ("yolo11n-cls.yaml", (4, 6, 9)),
        ("yolo11x-cls.yaml", (4, 6, 9)),
        ("yolo12n-cls.yaml", (4, 6, 8)),
        ("yolo26n-cls.yaml", (4, 6, 9)),
        ("yolo26s-cls.yaml", (4, 6, 9)),
        ("yolov8-cls-resnet50.yaml", (2, 3, 4)),
    ],
)
@pytest.mark.parametrize("imgsz", [32, 224])
def test_levels_are_the_last_layers_before_each_down_sampling(name, layers, imgsz):
    assert names(build(name), imgsz) == {8: f"model.{layers[0]}", 16: f"model.{layers[1]}", 32: f"model.{layers[2]}"}


def test_levels_inside_a_torchvision_backbone():
    assert names(build("yolo11-cls-resnet18.yaml")) == {8: "model.0.m.5", 16: "model.0.m.6", 32: "model.0"}


@pytest.mark.parametrize("teacher", ["yolov8s-cls.yaml", "yolov8-cls-resnet50.yaml", "yolo11-cls-resnet18.yaml"])
@pytest.mark.parametrize("student", ["yolo11n-cls.yaml", "yolo26n-cls.yaml"])
def test_pairs_of_families_match_by_stride(student, teacher):
    pairs = match_levels(find_levels(build(student), 64), find_levels(build(teacher), 64))
    assert [(s.stride, t.stride) for s, t in pairs] == [(8, 8), (16, 16), (32, 32)]
    assert [(s.height, t.height) for s, t in pairs] == [(8, 8), (4, 4), (2, 2)]


def test_looking_leaves_no_trace():
    model = build("yolo11n-cls.yaml").train()
    model.model[3].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.random.get_rng_state()
    find_levels(model, 32)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training
    assert not model.model[3].training
    assert not any(m._forward_hooks for m in model.modules())


def test_named_layers():
    student, teacher = find_levels(build("yolo11n-cls.yaml"), 64), find_levels(build("yolov8n-cls.yaml"), 64)
    same = match_levels(student, teacher, ([2, 6], [2, 6]))
    assert [(s.name, t.name) for s, t in same] == [("model.2", "model.2"), ("model.6", "model.6")]
    each = match_levels(student, teacher, ([9, 4], [8, 4]))
    assert [(s.name, t.name) for s, t in each] == [("model.4", "model.4"), ("model.9", "model.8")]  # finest first
    with pytest.raises(ValueError, match=r"layer 9, but the teacher has feature maps at layers \[0, 1, .*8\]"):
        match_levels(student, teacher, ([9], [9]))
    with pytest.raises(ValueError, match="layer 10, but the student"):
        match_levels(student, teacher, ([10], [4]))  # the head


def test_no_common_stride_names_both():
    one = {"a": FeatureLevel("a", 8, 4, 4, 4), "b": FeatureLevel("b", 16, 4, 2, 2)}
    other = {"c": FeatureLevel("c", 14, 4, 2, 2)}
    with pytest.raises(ValueError, match=r"student has \[8, 16\], the teacher \[14\]"):
        match_levels(one, other)


def test_taps_read_once_and_come_off():
    model = build("yolo11n-cls.yaml").eval()
    levels = find_levels(model, 32)
    taps = FeatureTaps(model, [levels["model.6"], levels["model.4"]])
    x = torch.rand(2, 3, 32, 32)
    model(x)
    maps = taps.take()
    expected = x
    for layer in model.model[:5]:
        expected = layer(expected)
    torch.testing.assert_close(maps[1], expected)
    torch.testing.assert_close(maps[0], model.model[6](model.model[5](expected)))
    taps.take()  # of the layers run by hand above
    with pytest.raises(KeyError):
        taps.take()  # nothing is kept alive between steps
    taps.remove()
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("library", "name", "imgsz", "levels"),
    [
        (torchvision.models, "resnet18", 64, {8: "layer2", 16: "layer3", 32: "layer4"}),
        (torchvision.models, "resnet18", 32, {8: "layer2", 16: "layer3", 32: "layer4"}),  # pooling makes no level
        (torchvision.models, "mobilenet_v3_small", 64, {8: "features.3", 16: "features.8", 32: "features"}),
        (torchvision.models, "convnext_tiny", 64, {8: "features.3", 16: "features.5", 32: "features"}),
        (torchvision.models, "swin_t", 64, {8: "features.3", 16: "features.5", 32: "norm"}),  # channels last
        (torchvision.models, "vit_b_16", 224, {16: "encoder"}),
        (timm, "resnet18", 64, {8: "layer2", 16: "layer3", 32: "layer4"}),
        (timm, "convnext_atto", 64, {8: "stages.1", 16: "stages.2", 32: "stages"}),
        (timm, "vit_tiny_patch16_224", 224, {16: "norm"}),
        (timm, "deit_tiny_distilled_patch16_224", 224, {16: "norm"}),  # two tokens before those of the image
        (timm, "vit_small_patch32_224", 224, {32: "norm"}),
        (timm, "beit_base_patch16_224", 224, {16: "blocks.11"}),  # blocks in a list that is no module of its own
        (timm, "pit_ti_224", 224, {16: "transformers.1.blocks", 32: "transformers.2.blocks"}),
        (torchvision.models, "squeezenet1_1", 32, {32: "features"}),  # the head's map of classes is no feature
    ],
)
def test_levels_of_any_network(library, name, imgsz, levels):
    make = timm.create_model if library is timm else library.get_model
    found = find_levels(make(name), imgsz)
    matched = {s.stride: s for s, _ in match_levels(found, found) if s.stride <= 32}  # above, 1x1 maps after pooling
    assert levels.items() <= {stride: level.name for stride, level in matched.items()}.items()
    assert matched.keys() & {8, 16, 32} - {8} <= levels.keys()
    assert all(level.height == level.width == imgsz // stride for stride, level in matched.items() if stride in levels)


def test_tokens_become_the_map_of_their_patches():
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=3).eval()
    levels = find_levels(model, 64)
    taps = FeatureTaps(model, [levels["blocks.5"], levels["patch_embed"], levels["patch_embed.proj"]])
    x, kept = torch.rand(2, 3, 64, 64), {}
    model.blocks[5].register_forward_hook(lambda m, a, out: kept.update(tokens=out))
    model(x)
    block, embedded, convolved = taps.take()
    assert kept["tokens"].shape == (2, 17, 192)
    assert block.shape == (2, 192, 4, 4)
    for row in range(4):
        for column in range(4):
            torch.testing.assert_close(block[:, :, row, column], kept["tokens"][:, 1 + 4 * row + column])
    torch.testing.assert_close(embedded, convolved)  # the embedding is the convolution's map, flattened


def test_channels_last_maps_are_turned():
    model = torchvision.models.swin_t(num_classes=3).eval()
    level = find_levels(model, 64)["features.3"]
    assert (level.channels, level.height, level.width) == (192, 8, 8)
    output = torch.rand(2, 8, 8, 192)
    torch.testing.assert_close(level.as_map(output), output.movedim(3, 1))


def test_dotted_names_are_checked_and_the_nearest_offered():
    student = find_levels(build("yolo11n-cls.yaml"), 64)
    teacher = find_levels(torchvision.models.resnet18(), 64)
    pairs = match_levels(student, teacher, ([4, "model.6.cv2"], ["layer2.0", "layer3"]))
    assert [(s.name, t.name) for s, t in pairs] == [("model.4", "layer2.0"), ("model.6.cv2", "layer3")]
    with pytest.raises(ValueError, match=r"layer 'layer9', but the teacher's .*'layer[1-4]'"):
        match_levels(student, teacher, ([4], ["layer9"]))
    with pytest.raises(ValueError, match=r"layer '6', but the teacher's .*\['layer2', 'layer3', 'layer4'\]"):
        match_levels(student, teacher, ([4], [6]))  # no numbered layers there


def test_a_wrapped_network_has_the_levels_of_the_network():
    network = torchvision.models.squeezenet1_1()
    levels = find_levels(torch.nn.Sequential(torch.nn.Identity(), network), 64)
    assert [name.removeprefix("1.") for name in levels] == list(find_levels(network, 64))
    assert not any("classifier" in name for name in levels)
