"""Training with every source of teachers, on real images."""

import os
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from helpers import DISTILLATION_LOSSES, plain, rows, same, train, weights, write_digits
from PIL import Image
from teachers import NAMES, SOURCES, Centroids, arguments, seen
from torchvision.transforms.functional import to_tensor
from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.models.yolo.classify.distill_task import _images_in
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import LOGGER


@pytest.fixture
def said(monkeypatch):
    """What the trainer logs, by level."""
    lines = {"info": [], "warning": []}
    for level, kept in lines.items():
        log = getattr(LOGGER, level)
        monkeypatch.setattr(LOGGER, level, lambda m, *a, kept=kept, log=log: (kept.append(str(m)), log(m, *a)))
    return lines


LOGITS_ONLY = ("torchscript", "onnx")


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_teaches(source, overrides, teacher, tmp_path, said):
    given = arguments(source, tmp_path, teacher)
    trainer = train({**overrides, **given, "fraction": 0.3})
    (row,) = rows(trainer)
    losses = [name for name in DISTILLATION_LOSSES if f"train/{name}" in row]
    assert losses == (["response_loss"] if source in LOGITS_ONLY else list(DISTILLATION_LOSSES))
    assert all(0 < float(row[f"train/{name}"]) < 1e4 for name in losses)
    assert any("switched off" in line for line in said["warning"]) == (source in LOGITS_ONLY)
    assert any("Feature and attention losses use the first of the teachers" in x for x in said["info"]) == (
        source == "several"
    )
    if source == "timm_convnext":
        assert any("teacher  timm:convnext_atto@w.pth " in line for line in said["info"])
    recorded = yaml.safe_load((trainer.save_dir / "args.yaml").read_text())
    assert recorded["feature_distill"] == (source not in LOGITS_ONLY)
    if source != "module":  # args.yaml starts the same run again
        again = {k: recorded[k] for k in ("teacher", "teacher_imgsz", "teacher_trusted", "teacher_weights")}
        twin = DistillationClassificationTrainer(overrides={**overrides, **again, "project": str(tmp_path / "again")})
        assert twin.teacher.source == trainer.teacher.source
    assert not hasattr(load_checkpoint(trainer.best)[0], "distill_adapters")


@pytest.mark.parametrize("source", ["timm_vit", "timm_convnext"])
@pytest.mark.parametrize("term", ["feature", "attention"])
def test_transformers_and_convnexts_teach_features(term, source, overrides, teacher, tmp_path):
    """Each of the two losses alone gives every layer of a yolo11n below the last matched map a gradient."""
    gradients = {}

    class Recorder(DistillationClassificationTrainer):
        def optimizer_step(self):
            gradients.update(
                {n: p.grad.abs().sum().item() for n, p in self.model.named_parameters() if p.grad is not None}
            )
            super().optimizer_step()

    off = {f"{other}_distill": False for other in ("response", "feature", "attention") if other != term}
    alone = {**overrides, **arguments(source, tmp_path, teacher), **off, "distill_alpha": 1.0, "distill_beta": 0.0}
    trainer = train({**alone, "fraction": 0.3}, Recorder)
    backbone = {n: g for n, g in gradients.items() if n.startswith("model.") and int(n.split(".")[1]) <= 4}
    assert len(backbone) > 20
    assert all(g > 0 for g in backbone.values())
    assert [s.stride for s, _ in trainer.levels] == ([16] if source == "timm_vit" else [8, 16, 32])
    assert float(rows(trainer)[0][f"train/{term}_loss"]) > 0


def test_named_layers_of_a_foreign_teacher(overrides, teacher, tmp_path):
    given = {
        **arguments("timm_convnext", tmp_path, teacher),
        "distill_layers": [[4, "model.6"], ["stages.1", "stages.2"]],
    }
    trainer = train({**overrides, **given, "fraction": 0.2})
    assert [(s.name, t.name) for s, t in trainer.levels] == [("model.4", "stages.1"), ("model.6", "stages.2")]
    with pytest.raises(ValueError, match=r"names layer 'stages\.7', but the teacher's .* named like \['stages\."):
        train({**overrides, **given, "distill_layers": [[4], ["stages.7"]]})


@pytest.mark.parametrize("key", ["feature_distill", "attention_distill"])
def test_features_asked_of_a_teacher_without_any_are_refused(key, overrides, teacher, tmp_path):
    file = arguments("onnx", tmp_path, teacher)["teacher"]
    with pytest.raises(ValueError, match=f"gives logits only, but '{key}=True'"):
        DistillationClassificationTrainer(overrides={**overrides, "teacher": file, key: True})
    assert not Path(overrides["project"]).exists()


def test_a_module_is_copied_and_not_written_anywhere(overrides):
    network = Centroids()
    before = network.means.clone()
    settings = {**overrides, "teacher": network.train(), "feature_distill": False, "attention_distill": False}
    trainer = train({**settings, "fraction": 0.2, "save_period": 1, "epochs": 2})
    assert network.training
    assert network.means.requires_grad
    assert torch.equal(before, network.means)
    assert yaml.safe_load((trainer.save_dir / "args.yaml").read_text())["teacher"] == "module:Centroids"
    stopped = trainer.wdir / "epoch0.pt"
    with pytest.raises(ValueError, match="was a network given in Python: give it again"):
        DistillationClassificationTrainer(overrides={"resume": str(stopped)})
    again = train({"resume": str(stopped), "teacher": network})
    assert again.start_epoch == 1
    assert float(rows(again)[-1]["train/response_loss"]) > 0


def test_a_module_cannot_be_reached_from_several_processes(overrides):
    with pytest.raises(ValueError, match="'device=0,1' starts a process per device"):
        DistillationClassificationTrainer(overrides={**overrides, "teacher": Centroids(), "device": "0,1"})


RESPONSE = {"feature_distill": False, "attention_distill": False}
ORDER = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]


def first_step(overrides, **given):
    """Return the batch, the student's logits, the teacher's and the loss items of a run's first training step."""
    seen = {}

    def on_start(trainer):
        criterion = trainer.model.criterion

        def recorded(predictions, batch):
            total, items = criterion(predictions, batch)
            if not seen:
                seen.update(
                    images=batch["img"].clone(),
                    labels=batch["cls"].clone().numpy(),
                    student=predictions.detach().double().numpy(),
                    items={k: float(v) for k, v in items.items()},
                    total=total.item(),
                )
            return total, items

        trainer.model.criterion = recorded

    train({**overrides, **RESPONSE, **given, "fraction": 0.5}, on_train_start=on_start)
    return seen


def softmax(x):
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def kl(teacher, student, temperature):
    return temperature**2 * np.mean(np.sum(teacher * np.log(teacher / student), 1))


@pytest.mark.parametrize(
    ("names", "columns", "classes"),
    [
        (NAMES, range(10), range(10)),
        ([NAMES[i] for i in ORDER], [ORDER.index(c) for c in range(10)], range(10)),
        ([f" {n}_" for n in NAMES], range(10), range(10)),
        (NAMES[:6], range(6), range(6)),
        ([*"abcd", *NAMES[:6]], range(4, 10), range(6)),
    ],
    ids=["same", "permuted", "spelt differently", "subset", "overlap"],
)
def test_response_over_matched_classes_is_the_hand_computed_one(names, columns, classes, overrides):
    teacher = Centroids(names)
    seen = first_step(overrides, teacher=teacher, temperature=3.0)
    logits = teacher(seen["images"]).detach().double().numpy()[:, list(columns)]
    judged = np.isin(seen["labels"], list(classes))
    assert judged.all() == (len(classes) == 10)
    student = seen["student"][judged][:, list(classes)]
    expected = kl(softmax(logits[judged] / 3), softmax(student / 3), 3)
    assert seen["items"]["response_loss"] == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert seen["total"] == pytest.approx(0.3 * seen["items"]["loss"] + 0.07 * expected, rel=1e-6, abs=1e-6)


def test_a_teacher_that_knows_more_is_renormalised(overrides, tmp_path):
    data = write_digits(tmp_path / "six", names=NAMES[:6])
    teacher = Centroids()
    seen = first_step({**overrides, "data": str(data)}, teacher=teacher, temperature=3.0)
    probabilities = softmax(teacher(seen["images"]).detach().double().numpy() / 3)[:, :6]
    probabilities /= probabilities.sum(1, keepdims=True)
    expected = kl(probabilities, softmax(seen["student"] / 3), 3)
    assert seen["items"]["response_loss"] == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_several_teachers_average_their_aligned_probabilities(overrides):
    first, second = Centroids(), Centroids([NAMES[i] for i in ORDER], ORDER)
    second.means.data *= 0.5
    seen = first_step(overrides, teacher=[first, second], teacher_weights=[3, 1], temperature=3.0)
    one, other = (softmax(t(seen["images"]).detach().double().numpy() / 3) for t in (first, second))
    mean = 0.75 * one + 0.25 * other[:, [ORDER.index(c) for c in range(10)]]
    expected = kl(mean, softmax(seen["student"] / 3), 3)
    assert seen["items"]["response_loss"] == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("names", "known"), [([*"abcdefghij"], 0), (["0", *"bcdefghij"], 1)])
def test_fewer_than_two_shared_classes_teach_no_response(names, known, overrides, teacher):
    network = Centroids(names)
    with pytest.raises(ValueError, match=f"knows {known} of the dataset's 10 classes"):
        DistillationClassificationTrainer(overrides={**overrides, "teacher": network})
    assert not Path(overrides["project"]).exists()


def test_feature_maps_alone_need_no_class_names(overrides, teacher, tmp_path):
    file = arguments("timm_convnext", tmp_path, teacher)["teacher"]
    for names in (None, [f"other {c}" for c in range(10)]):
        settings = {**overrides, "teacher": file, "teacher_names": names, "response_distill": False, "fraction": 0.2}
        trainer = train(settings)
        assert list(trainer.loss_names) == ["loss", "feature_loss", "attention_loss"]


def test_a_batch_without_a_known_class_teaches_nothing(overrides):
    """Only classes 8 and 9 are known; batches of 2 often hold neither."""
    names, losses = [*"abcdefgh", "8", "9"], {True: [], False: []}

    class Watched(DistillationClassificationTrainer):
        def preprocess_batch(self, batch):
            self.known = bool((batch["cls"] >= 8).any())
            return super().preprocess_batch(batch)

    trainer = train(
        {**overrides, **RESPONSE, "teacher": Centroids(names), "batch": 2, "fraction": 0.3},
        Watched,
        on_train_batch_end=lambda t: losses[t.known].append(t.loss_items["response_loss"].item()),
    )
    assert set(losses[False]) == {0.0}
    assert min(losses[True]) > 0
    assert np.isfinite(float(rows(trainer)[0]["train/response_loss"]))
    assert all(v.isfinite().all() for v in weights(trainer.last).values())


def test_self_distillation_starts_when_told(overrides, tmp_path):
    """Until then training is bit for bit plain; afterwards the EMA teaches, and leaves nothing behind."""
    kept = {}

    def keep(name):
        def on_epoch_end(trainer):
            if trainer.epoch == 0:
                kept[name] = {
                    k: v.clone() for k, v in trainer.model.state_dict().items() if not k.startswith("distill_adapters")
                }

        return on_epoch_end

    settings = {**overrides, "teacher": "self", "self_distill_start": 1, "epochs": 2}
    ours = train({**settings, "save_period": 1}, on_train_epoch_end=keep("ours"))
    theirs = {**plain(overrides), "epochs": 2, "project": str(tmp_path / "plain")}
    train(theirs, ClassificationTrainer, on_train_epoch_end=keep("theirs"))
    assert same(kept["ours"], kept["theirs"])
    before, after = rows(ours)
    assert [float(before[f"train/{name}"]) for name in DISTILLATION_LOSSES] == [0, 0, 0]
    assert all(float(after[f"train/{name}"]) > 0 for name in DISTILLATION_LOSSES)
    assert [float(row["distill/alpha"]) for row in (before, after)] == [0, 0.7]
    assert not any(m._forward_hooks for m in ours.ema.ema.modules())
    again = train({"resume": str(ours.wdir / "epoch0.pt")})
    assert again.teacher.source == "self"
    assert float(rows(again)[-1]["train/response_loss"]) > 0


@pytest.mark.parametrize(("alpha", "beta"), [(0.7, 0.3), (0.3, 1.0)])
def test_self_distillation_above_the_labels_is_warned_of(alpha, beta, overrides, said):
    settings = {**overrides, "teacher": "self", "distill_alpha": alpha, "distill_beta": beta}
    DistillationClassificationTrainer(overrides=settings)
    assert any("holds the student" in line for line in said["warning"]) == (alpha > beta)


def test_self_distillation_that_never_starts_is_refused(overrides):
    with pytest.raises(ValueError, match="silent in all of 'epochs=3', with 'self_distill_start=3'"):
        DistillationClassificationTrainer(
            overrides={**overrides, "teacher": "self", "self_distill_start": 3, "epochs": 3}
        )


@pytest.mark.parametrize(("scale", "warned"), [(1, False), (1000, True)])
def test_an_answer_that_says_what_labels_say_is_warned_of(scale, warned, overrides, said):
    network = Centroids()
    network.forward = lambda x: Centroids.forward(network, x) * scale
    train({**overrides, **RESPONSE, "teacher": network, "fraction": 0.1})
    warnings = [line for line in said["warning"] if "says little more than labels do at 'temperature=4'" in line]
    assert len(warnings) == warned
    assert all("0.0% of the greatest entropy" in line and "raise 'temperature'" in line for line in warnings)


@pytest.mark.parametrize("output", ["logits", "sigmoid", None])
def test_an_answer_that_says_nothing_at_this_temperature_is_warned_of(output, overrides, said):
    """Scores between 0 and 1, each for itself, are alike once they are softened as logits; they are recognised."""
    network = Centroids()
    network.forward = lambda x: Centroids.forward(network, x).add(3).sigmoid()
    train({**overrides, **RESPONSE, "teacher": network, "teacher_output": output, "fraction": 0.2})
    warnings = [line for line in said["warning"] if "says next to nothing at 'temperature=4'" in line]
    assert [("'teacher_output'" in line) for line in warnings] == ([True] if output == "logits" else [])


def test_a_trusted_checkpoint_may_hold_another_librarys_network(overrides, tmp_path):
    """Whole, as training scripts of others save it."""
    network = seen(timm.create_model("resnet18", num_classes=10))
    torch.save({"model": network}, tmp_path / "whole.pt")
    given = {"teacher": str(tmp_path / "whole.pt"), "teacher_trusted": True, "teacher_names": NAMES}
    trainer = DistillationClassificationTrainer(overrides={**overrides, **given})
    images = torch.rand(2, 3, 32, 32)
    expected = network((images - trainer.teacher.first._mean) / trainer.teacher.first._std)
    torch.testing.assert_close(trainer.teacher(images)[0], expected)
    assert trainer.args.teacher == str(tmp_path / "whole.pt")


def test_what_an_answer_is_is_told_by_images_of_the_dataset(digits, overrides):
    """A damaged one is left to training, which names it."""
    folder = Path(shutil.copytree(digits, Path(overrides["project"]).parent / "digits"))
    network, seen = Centroids(), []
    network.forward = lambda x: seen.append(x) or Centroids.forward(network, x)
    for name in "01234567":
        (folder / "train" / name / "._.png").write_bytes(b"of a Mac")  # hidden
    damaged, other = islice(_images_in(folder / "train" / "0"), 2)
    os.truncate(damaged, 20)
    DistillationClassificationTrainer(overrides={**overrides, **RESPONSE, "teacher": network, "data": str(folder)})
    assert [x.shape for x in seen] == [(8, 3, 32, 32)]
    for image, name in zip(seen[0], "12345670", strict=True):
        file = other if name == "0" else next(_images_in(folder / "train" / name))
        assert torch.equal(image, to_tensor(Image.open(file).convert("RGB")))


class Sized(Centroids):
    """Knows digits at one size alone, as a network that was trained at another."""

    def forward(self, x):
        return super().forward(x) if x.shape[-1] == 32 else torch.arange(10.0).expand(len(x), 10) + x[:, 0, :1, 0]


@pytest.mark.parametrize(("trained", "given"), [(32, None), (32, 32), (64, None), (None, None)])
def test_a_teacher_that_knows_more_at_the_size_of_its_training_is_warned_of(trained, given, overrides, said):
    trainer = DistillationClassificationTrainer(
        overrides={**overrides, **RESPONSE, "teacher": Sized(), "imgsz": 64, "teacher_imgsz": given, "fraction": 0.2}
    )
    trainer.teacher.first.trained_imgsz = trained
    trainer.train()
    warnings = [line for line in said["warning"] if "which it was trained at" in line]
    assert len(warnings) == ((trained, given) == (32, None))
    assert all("Set 'teacher_imgsz=32'" in line and "student's 64 pixels" in line for line in warnings)
    assert trainer.teacher.first.imgsz == given


class Constant(torch.nn.Module):
    """A teacher that answers every image alike."""

    names = NAMES

    def forward(self, x):
        return torch.arange(10.0).expand(len(x), 10)


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (Constant(), "names 10.0% of 50 validation images correctly, as it answers every image alike"),
        (Centroids([NAMES[i - 1] for i in range(10)]), "always naming the most frequent class 10.0%"),
        (Centroids(), None),
    ],
    ids=["constant", "worse than guessing", "good"],
)
def test_a_teacher_with_nothing_to_teach_is_reported(teacher, words, overrides, said):
    settings = {**overrides, **RESPONSE, "teacher": teacher, "fraction": 0.2}
    train(settings)
    warnings = [line for line in said["warning"] if "nothing to teach" in line]
    if words:
        assert len(warnings) == 1
        assert words in warnings[0]
    else:
        assert not warnings
        measured = [line for line in said["info"] if "validation images correctly." in line]
        assert float(measured[0].split("names ")[1].split("%")[0]) > 80
    said["warning"].clear()
    said["info"].clear()
    train({**settings, "teacher_check": False, "project": f"{overrides['project']}-unchecked"})
    assert not any("validation images correctly" in line for line in said["warning"] + said["info"])


def test_a_student_as_good_as_its_teacher_is_warned_of(overrides, said):
    plain = {k: v for k, v in overrides.items() if k != "teacher"} | {"epochs": 8, "warmup_epochs": 0}
    trained = ClassificationTrainer(overrides=plain)
    trained.train()
    assert trained.metrics["metrics/accuracy_top1"] > 0.25
    teachers = {"poor": Centroids([*NAMES[:2], *NAMES[3:], NAMES[2]]), "good": Centroids()}  # two digits right, or all
    for teacher, pretrained, count in (("poor", True, 1), ("poor", False, 0), ("good", True, 0)):
        said["warning"].clear()
        given = {"model": str(trained.last), "pretrained": pretrained, "teacher": teachers[teacher]}
        DistillationClassificationTrainer(overrides={**overrides, **RESPONSE, **given})._setup_train()
        assert sum("what it would learn may make it worse" in line for line in said["warning"]) == count


def test_checking_the_teacher_changes_nothing(overrides, tmp_path):
    settings = {**overrides, "teacher": Centroids(), **RESPONSE}
    checked = train(settings)
    unchecked = train({**settings, "teacher_check": False, "project": str(tmp_path / "unchecked")})
    assert same(weights(checked.last), weights(unchecked.last))
