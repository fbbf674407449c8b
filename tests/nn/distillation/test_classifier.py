"""What a classifier's answer is: which of several, and logits, probabilities or other scores; and several as one."""

import re
from types import SimpleNamespace

import pytest
import torch
from teachers import Answer
from ultralytics.nn.distillation.classifier import ClassificationTeacher as Teacher
from ultralytics.nn.distillation.classifier import TeacherEnsemble


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
        (lambda x: scores(x)[..., None, None], None, "logits"),  # as a head of convolutions gives them
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
        (lambda x: {"features": x.flatten(1)[:, :3], "logits": scores(x)}, None, "logits"),
    ],
)
def test_answers_are_read_as_what_they_are(answer, output, meaning):
    frozen = Teacher(Answer(answer, ["a", "b", "c"]), output=output)
    frozen.vet(32, 3)
    assert frozen.meaning == meaning
    images = torch.rand(4, 3, 32, 32)
    torch.testing.assert_close(frozen(images)[0].softmax(1), scores(images).softmax(1), atol=0.01, rtol=0.01)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (lambda x: (x.flatten(1)[:, :7], scores(x)), "of its outputs '1' is read. 'teacher_output' names another"),
        (lambda x: {"features": x.flatten(1)[:, :3], "scores": scores(x)}, "'features' is read, as 2 look alike."),
        (lambda x: {"features": x.flatten(1)[:, :3], "logits": scores(x)}, None),
        (lambda x: (scores(x),), None),
        (scores, None),
    ],
)
def test_which_of_several_outputs_is_read_is_said(answer, said):
    frozen = Teacher(Answer(answer, ["a", "b", "c"]))
    frozen.vet(32, 3)
    notes = TeacherEnsemble([frozen]).align(["a", "b", "c"])
    assert [said in note for note in notes] == ([] if said is None else [True])


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


def in_steps(x, steps, classes):
    """Probabilities of many classes, most of them small, as so many steps of 8 bits count them."""
    spread = torch.linspace(-1, 1, classes).cos() * 3 * (1 + x.mean((1, 2, 3))[:, None])
    return (spread.softmax(1) * steps).round()


@pytest.mark.parametrize(
    ("answer", "classes", "meaning"),
    [
        (lambda x: scores(x).softmax(1) * 100, 3, "probabilities"),
        (lambda x: (scores(x).softmax(1) * 255).round().to(torch.uint8), 3, "probabilities"),
        (lambda x: (scores(x).softmax(1) * 256).round().clamp(0, 255), 3, "probabilities"),
        (lambda x: in_steps(x, 256, 300) / 256, 300, "probabilities"),
        (lambda x: (in_steps(x, 256, 300) / 256).half(), 300, "probabilities"),
        (lambda x: in_steps(x, 255, 300), 300, "probabilities"),
        (lambda x: scores(x).softmax(1) * 37, 3, "logits"),  # of no known scale
        (lambda x: scores(x) + 34, 3, "logits"),  # about 100 in all, but not always
        (lambda x: in_steps(x, 256, 300) / 256 * (0.5 + x.mean((1, 2, 3))[:, None]), 300, "sigmoid"),  # no one whole
    ],
)
def test_probabilities_are_told_by_what_they_sum_to(answer, classes, meaning):
    images = bright(8)
    frozen = Teacher(Answer(answer, [str(i) for i in range(classes)]))
    frozen.vet(32, 3, images)
    assert frozen.meaning == meaning
    read, said = frozen(images)[0], answer(images).float()
    assert read.is_floating_point()
    if meaning == "probabilities":
        torch.testing.assert_close(read.softmax(1), said / said.sum(1, keepdim=True), atol=1e-4, rtol=1e-3)
    if meaning == "logits":
        torch.testing.assert_close(read, said)


@pytest.mark.parametrize(
    ("answer", "whole"),
    [
        (lambda x: scores(x).sigmoid(), 1),
        (lambda x: (scores(x).sigmoid() * 255).round(), 255),
        (lambda x: (scores(x).sigmoid() * 255).round().to(torch.uint8), 255),
        (lambda x: (scores(x)[:, :1].sigmoid() * 255).round().to(torch.uint8), 255),
    ],
)
def test_scores_each_for_itself_are_brought_to_logits(answer, whole):
    images = bright(8)
    single = answer(images).shape[1] == 1
    frozen = Teacher(Answer(answer, ["no", "yes"] if single else ["a", "b", "c"]))
    frozen.vet(32, 3, images)
    assert (frozen.meaning, frozen.whole) == ("sigmoid", whole)
    read = frozen(images)[0][:, 1:] if single else frozen(images)[0]
    expected = scores(images)[:, : read.shape[1]]
    torch.testing.assert_close(read.sigmoid(), expected.sigmoid(), atol=0.5 / 255, rtol=0)


@pytest.mark.parametrize(("off", "meaning"), [(0.0005, "probabilities"), (0.002, "sigmoid"), (0.04, "sigmoid")])
def test_float_scores_that_all_but_sum_to_one_are_no_rounded_probabilities(off, meaning):
    """As those of a network fitted with a loss of each class for itself: the better it is, the nearer to 1."""

    def answer(x):
        return scores(x).softmax(1) * (1 + off * (2 * x.mean((1, 2, 3))[:, None] - 1))

    images = bright(8)
    frozen = Teacher(Answer(answer, ["a", "b", "c"]))
    frozen.vet(32, 3, images)
    assert (frozen.meaning, frozen.rounded) == (meaning, False)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_probabilities_in_half_precision_sum_to_one_within_theirs(kind):
    images = bright(8)
    frozen = Teacher(Answer(lambda x: scores(x).softmax(1).to(kind), ["a", "b", "c"]))
    frozen.vet(32, 3, images)
    assert frozen.meaning == "probabilities"


def test_two_images_do_not_tell_a_scale():
    frozen = Teacher(Answer(lambda x: scores(x).softmax(1) * 100, ["a", "b", "c"]))
    frozen.vet(32, 3)
    assert frozen.meaning == "logits"


@pytest.mark.parametrize("output", ["logits", "sigmoid", "0", "nonsense"])
def test_what_is_known_is_not_told(output, teacher):
    with pytest.raises(ValueError, match=f"'teacher_output={output}' is for networks of others.* is Ultralytics' own"):
        Teacher(teacher, output=output).vet(32, 3)


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
