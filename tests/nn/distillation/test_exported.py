"""ONNX files as they come: of other programs, with several outputs, with weights beside them, on a GPU."""

import hashlib

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from ultralytics.nn.distillation.classifier import ClassificationTeacher as Teacher

WEIGHTS = np.arange(12, dtype=np.float32).reshape(3, 4) / 3


def write(file, dtype=TensorProto.FLOAT, channels_last=False, embedding=False, shape=(None, None), channels=3, **how):
    """Write a graph that gives 4 logits, the mean colour times WEIGHTS; before them, if told so, the mean colour."""
    batch, side = shape
    sides = [side or "h", side or "w"]
    given = helper.make_tensor_value_info(
        "images", dtype, [batch or "n", *([*sides, channels] if channels_last else [channels, *sides])]
    )
    nodes = [
        helper.make_node("Cast", ["images"], ["x"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["x"], ["colour"], axes=[1, 2] if channels_last else [2, 3], keepdims=0),
        helper.make_node("MatMul", ["colour", "weights"], ["logits"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 4])]
    if embedding:
        outputs.insert(0, helper.make_tensor_value_info("colour", TensorProto.FLOAT, ["n", 3]))
    graph = helper.make_graph(nodes, "g", [given], outputs, [numpy_helper.from_array(WEIGHTS, "weights")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.save(model, file, **how)
    return str(file)


def expected(images):
    return images.mean((2, 3)) @ torch.from_numpy(WEIGHTS)


def test_bytes_are_not_normalised(tmp_path):
    teacher = Teacher(write(tmp_path / "t.onnx", dtype=TensorProto.UINT8), names=list("abcd"), mean=[0.5])
    with pytest.raises(ValueError, match=r"from 0 to 255, and normalises them itself\. Leave out 'teacher_mean'"):
        teacher.vet(16, 3)


@pytest.mark.parametrize("name", ["t.pt", "t"])
def test_a_sound_file_of_another_name_is_not_called_damaged(name, tmp_path):
    file = write(tmp_path / "t.onnx")
    (tmp_path / "t.onnx").rename(tmp_path / name)
    with pytest.raises(TypeError, match="holds an ONNX model") as e:
        Teacher(file.replace("t.onnx", name))
    assert "damaged" not in str(e.value)
    assert "its name does not end in '.onnx': give it a name, or a link of a name, that does" in str(e.value)


@pytest.mark.parametrize(
    "made",
    [
        {},
        {"dtype": TensorProto.FLOAT16},
        {"dtype": TensorProto.DOUBLE},
        {"channels_last": True, "shape": (None, 16)},
        {"channels_last": True},
        {"shape": (2, 16)},
        {"embedding": True},
    ],
    ids=str,
)
def test_images_reach_the_graph_as_it_takes_them(made, tmp_path):
    teacher = Teacher(write(tmp_path / "t.onnx", **made), names=list("abcd"))
    teacher.vet(16, 3)
    images = torch.rand(5, 3, 16, 16)
    torch.testing.assert_close(teacher(images)[0], expected(images), atol=2e-3, rtol=2e-3)
    assert teacher.channels == 3


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("batch", [None, 2])
def test_what_a_file_leaves_open_is_tried(batch, channels_last, tmp_path):
    teacher = Teacher(write(tmp_path / "t.onnx", channels="c", channels_last=channels_last, shape=(batch, None)))
    images = torch.rand(5, 3, 16, 16)
    torch.testing.assert_close(teacher(images)[0], expected(images))


def test_bytes_are_from_0_to_255(tmp_path):
    teacher = Teacher(write(tmp_path / "t.onnx", dtype=TensorProto.UINT8), names=list("abcd"))
    images = torch.rand(5, 3, 16, 16)
    torch.testing.assert_close(teacher(images)[0], 255 * expected(images), atol=1.5, rtol=0)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"dtype": TensorProto.INT8}, r"type tensor\(int8\), whose scale is not known.*float32, or of uint8"),
        ({"shape": (None, 4096)}, "declares an input of shape"),
    ],
)
def test_inputs_that_cannot_be_given_are_refused(made, words, tmp_path):
    with pytest.raises(TypeError, match=words):
        Teacher(write(tmp_path / "t.onnx", **made))


def test_an_output_is_chosen_by_its_name(tmp_path):
    file = write(tmp_path / "t.onnx", embedding=True)
    images = torch.rand(2, 3, 16, 16)
    teacher = Teacher(file, names=list("abc"), output="colour")
    teacher.vet(16, 3)
    torch.testing.assert_close(teacher(images)[0], images.mean((2, 3)))
    with pytest.raises(ValueError, match=r"'teacher_output=probs' is none of .*\['colour', 'logits'\]"):
        Teacher(file, output="probs").vet(16, 3)


@pytest.mark.parametrize("name", ["t.onnx.data", f"{'long' * 40}.data"])
def test_weights_beside_the_file_are_part_of_what_it_is(name, tmp_path):
    how = {"save_as_external_data": True, "location": name, "size_threshold": 0}
    file = write(tmp_path / "t.onnx", **how)
    data = tmp_path / name
    content = (tmp_path / "t.onnx").read_bytes() + data.read_bytes()
    assert Teacher(file).content_hash == hashlib.sha256(content).hexdigest()
    data.write_bytes((2 * WEIGHTS).tobytes())
    assert Teacher(file).content_hash != hashlib.sha256(content).hexdigest()
    images = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(Teacher(file)(images)[0], 2 * expected(images))
    data.unlink()
    with pytest.raises(FileNotFoundError, match=f"has weights in '{data}', which is not there. Copy that file, too."):
        Teacher(file)
    whole = write(tmp_path / "whole.onnx")
    assert Teacher(whole).content_hash == hashlib.sha256((tmp_path / "whole.onnx").read_bytes()).hexdigest()


def test_a_note_that_is_named_as_a_place_of_weights_is_none(tmp_path):
    file = write(tmp_path / "t.onnx")
    model = onnx.load(file)
    note = model.metadata_props.add()
    note.key, note.value = "location", "Plant 3"
    onnx.save(model, file)
    content = (tmp_path / "t.onnx").read_bytes()
    (tmp_path / "Plant 3").write_text("not of the network")
    assert Teacher(file).content_hash == hashlib.sha256(content).hexdigest()
    (tmp_path / "Plant 3").unlink()
    assert Teacher(file).content_hash == hashlib.sha256(content).hexdigest()


def test_a_cache_of_links_holds_the_weights_beside_too(tmp_path):
    """As Hugging Face's: a folder of links to files that are named by their hashes."""
    (tmp_path / "blobs").mkdir(), (tmp_path / "snapshot").mkdir()
    write(tmp_path / "t.onnx", save_as_external_data=True, location="t.onnx_data", size_threshold=0)
    for name, blob in (("t.onnx", "3ece"), ("t.onnx_data", "77aa")):
        (tmp_path / name).rename(tmp_path / "blobs" / blob)
        (tmp_path / "snapshot" / name).symlink_to(f"../blobs/{blob}")
    images = torch.rand(2, 3, 16, 16)
    teacher = Teacher(str(tmp_path / "snapshot" / "t.onnx"))
    torch.testing.assert_close(teacher(images)[0], expected(images))
    content = b"".join((tmp_path / "blobs" / blob).read_bytes() for blob in ("3ece", "77aa"))
    assert teacher.content_hash == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("available", [True, False])
def test_it_runs_on_the_gpu_of_the_images(available, tmp_path, monkeypatch):
    """Each process on its own one, where ONNX Runtime has one."""
    network = Teacher(write(tmp_path / "t.onnx")).model
    asked = []
    providers = ["CUDAExecutionProvider"] * available + ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: providers)
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda file, options, providers: asked.append(providers))
    network.device = torch.device("cuda", 1)
    network._open()
    gpu = [("CUDAExecutionProvider", {"device_id": 1})] * available
    assert asked == [[*gpu, "CPUExecutionProvider"]]
