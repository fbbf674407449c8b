"""Real training with every method, with schedules, mixed images, balanced losses and without labels."""

import math
import shutil
from pathlib import Path

import pytest
import torch
from helpers import DISTILLATION_LOSSES, rows, same, train, weights, write_digits
from teachers import seen
from torch import nn
from torch.nn import functional as F
from ultralytics import YOLO
from ultralytics.engine.distillation.criterion import LESSON
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.nn.tasks import load_checkpoint
from ultralytics.utils import LOGGER, YAML
from ultralytics.utils.distillation import feature_method, methods, registry, response_method

NONE = {"response_distill": False, "feature_distill": False, "attention_distill": False}
METHODS = [
    *(({"response_distill": True, "response_method": name}, "response_loss") for name in methods("response_method")),
    *(({"feature_distill": True, "feature_method": name}, "feature_loss") for name in methods("feature_method")),
]


@pytest.mark.parametrize(("chosen", "item"), METHODS, ids=lambda x: str(x) if isinstance(x, str) else None)
def test_every_method_trains_the_backbone(chosen, item, overrides):
    """Alone, without the labels' loss."""
    moved = {}

    def on_start(trainer):
        moved.setdefault("before", {k: v.clone() for k, v in trainer.model.state_dict().items()})

    trainer = train(
        {**overrides, **NONE, **chosen, "distill_beta": 0.0, "fraction": 0.4}, on_train_batch_start=on_start
    )
    (row,) = rows(trainer)
    assert math.isfinite(float(row[f"train/{item}"]))
    assert not trainer.skipped
    after = trainer.model.state_dict()
    # At 32 px the last level has one position, where methods that compare positions have nothing to say
    trained = [k for k, v in moved["before"].items() if v.ndim == 4 and k.startswith(("model.0", "model.4"))]
    assert all((after[k] - moved["before"][k]).abs().max() > 1e-4 for k in trained)
    assert not any("distill" in name for name in load_checkpoint(trainer.best)[0].state_dict())


def test_several_methods_in_one_run_and_on_a_command_line(overrides):
    """Written as YAML flow mappings, as in Ultralytics' own command line lists are."""
    trainer = train(
        {
            **overrides,
            "feature_method": "{mse: 1.0, rkd: {weight: 0.5, angle: 0}}",
            "response_method": "{dkd: {beta: 2}}",
            "attention_distill": False,
        }
    )
    (row,) = rows(trainer)
    assert {k for k in row if k.startswith("train/")} == {
        f"train/{k}" for k in ("loss", "response_loss", "feature_mse_loss", "feature_rkd_loss")
    }
    assert trainer.distillation_loss.weights["feature_rkd_loss"] == 0.5
    assert trainer.args.feature_method == {"mse": 1.0, "rkd": {"weight": 0.5, "angle": 0}}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"response_method": "kll"}, "kll' is not known, but 'kl' is"),
        ({"feature_method": {"rkd": {"angel": 1}}}, "no hyper-parameter 'angel'"),
        ({"mixup": 0.7, "cutmix": 0.7}, "must not exceed 1"),
        ({"mixup": 0.7, "teacher_cache": "ram"}, "Leave out one or the other"),
        ({"distill_balance": "auto", "compile": True}, "Give one of them"),
        ({"distill_beta": 0, "close_distill": 1}, "no loss to train with in the last epochs"),
        ({"epochs": 2, "close_distill": 2}, "silent in all of 'epochs=2', with .* and 'close_distill=2'"),
        ({"distill_schedule": "step"}, "'distill_schedule=step' is an invalid value"),
        ({"temperature_end": 0}, "'temperature_end=0' is an invalid value"),
        ({"quantize": 8, "feature_method": "pkd"}, "would quantize the adapters"),
        ({"feature_method": {"mse": 0}}, "leaves no method with a share above 0"),
        ({"response_method": {"kl": 0}}, "set 'response_distill=False'"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_file(given, words, overrides):
    with pytest.raises(ValueError, match=words):
        DistillationClassificationTrainer(overrides={**overrides, **given})
    assert not Path(overrides["project"]).exists()


def test_methods_of_the_last_level_take_the_deepest_layer(overrides):
    """In whatever order the layers are named; the head of the teacher needs it so."""
    trainer = train({**overrides, "feature_method": "srrl", "distill_layers": [9, 4], "fraction": 0.2})
    assert [student.name for student, _ in trainer.levels] == ["model.4", "model.9"]
    assert float(rows(trainer)[0]["train/feature_loss"]) > 0


@pytest.mark.parametrize(
    "given",
    [{"freeze": 7}, {"feature_method": "rkd", "attention_distill": False, "distill_layers": [4, 9]}],
    ids=["freeze", "last level"],
)
def test_balance_where_losses_do_not_meet_in_the_first_map(given, overrides):
    trainer = train({**overrides, "distill_balance": "auto", "fraction": 0.2, **given})
    assert not trainer.skipped
    assert float(rows(trainer)[0]["train/feature_loss"]) > 0


def test_a_method_needs_the_head_of_a_yolo(overrides):
    with pytest.raises(ValueError, match="srrl' needs the head"):
        train({**overrides, "feature_method": "srrl", "distill_layers": [4, 6]})
    assert not Path(overrides["project"]).exists()


def test_schedules_are_in_force_and_logged(overrides):
    asked = []
    trainer = DistillationClassificationTrainer(
        overrides={
            **overrides,
            "fraction": 0.2,
            "epochs": 5,
            "distill_warmup": 1,
            "distill_schedule": "linear",
            "close_distill": 1,
            "temperature": 6,
            "temperature_end": 2,
        }
    )
    ask = trainer.teacher.__class__.__call__

    class Counting(trainer.teacher.__class__):
        def __call__(self, *args, **kwargs):
            asked.append(trainer.epoch)
            return ask(self, *args, **kwargs)

    # From here on: before the first epoch the adapters are fitted to the teacher's maps
    trainer.add_callback("on_train_start", lambda trainer: setattr(trainer.teacher, "__class__", Counting))
    trainer.train()
    logged = [(float(row["distill/alpha"]), float(row["distill/temperature"])) for row in rows(trainer)]
    # Of 0.7: half in the warm-up, then what a line from 1 towards 0 after the fourth epoch leaves
    expected = [(0.35, 6), (0.7 * 0.75, 5), (0.7 * 0.5, 4), (0.7 * 0.25, 3), (0, 2)]
    assert logged == [pytest.approx(x, rel=1e-5) for x in expected]
    assert set(asked) == {0, 1, 2, 3}
    assert float(rows(trainer)[-1]["train/response_loss"]) == 0
    assert float(rows(trainer)[3]["train/response_loss"]) > 0


def test_the_weight_in_force_reaches_the_loss(overrides):
    """The total of a batch is made of the epoch's weight."""
    totals = []

    def on_end(trainer):
        items = {k: v.item() for k, v in trainer.loss_items.items()}
        loss, alpha = trainer.distillation_loss, 0.7 * (trainer.epoch + 1) / 3
        expected = 0.3 * items["loss"] + alpha * sum(w * items[k] for k, w in loss.weights.items())
        totals.append((trainer.loss.item(), pytest.approx(expected, rel=1e-5)))

    train({**overrides, "fraction": 0.2, "epochs": 2, "distill_warmup": 2}, on_train_batch_end=on_end)
    assert totals
    assert all(total == expected for total, expected in totals)


@pytest.mark.parametrize("how", ["mixup", "cutmix"])
def test_mixed_images_reach_both_networks_with_mixed_labels(how, overrides):
    seen = []

    class Watched(DistillationClassificationTrainer):
        def preprocess_batch(self, batch):
            images, labels = batch["img"].clone(), batch["cls"].clone()
            batch = super().preprocess_batch(batch)
            seen.append((images, labels, batch))
            return batch

    losses = []
    trainer = train(
        {**overrides, how: 1.0, "distill_alpha": 0.0, "distill_beta": 1.0},
        Watched,
        on_train_batch_end=lambda t: losses.append(t.loss_items["loss"].item()),
    )
    for images, labels, batch in seen:
        mixed = batch[LESSON].targets["cls"]
        assert torch.allclose(mixed.sum(1), torch.ones(len(mixed)))
        share = mixed[labels != labels.roll(1), labels[labels != labels.roll(1)]][0]
        expected = share * F.one_hot(labels, 10) + (1 - share) * F.one_hot(labels.roll(1), 10)
        assert torch.allclose(mixed, expected, atol=1e-5)
        if how == "mixup":
            assert torch.allclose(batch["img"], share * images + (1 - share) * images.roll(1, 0), atol=1e-4)
        else:
            kept = (batch["img"] == images).all(1).float().mean((1, 2)).min()
            assert kept >= share - 0.01
            assert ((batch["img"] == images) | (batch["img"] == images.roll(1, 0))).all()
    assert len(losses) == len(seen) > 0
    assert all(math.isfinite(x) for x in losses)
    assert (trainer.save_dir / "weights" / "best.pt").exists()


def test_the_teacher_answers_the_mixed_images_and_some_batches_stay_as_they_are(overrides):
    kinds = []

    class Watched(DistillationClassificationTrainer):
        def preprocess_batch(self, batch):
            batch = super().preprocess_batch(batch)
            logits, _ = self.teacher(batch["img"])
            assert torch.equal(logits, batch[LESSON].answer()[0])
            kinds.append("cls" in batch[LESSON].targets)
            return batch

    trainer = train({**overrides, "batch": 8, "mixup": 0.3, "cutmix": 0.3}, Watched)
    assert set(kinds) == {True, False}
    assert all(float(rows(trainer)[0][f"train/{name}"]) > 0 for name in DISTILLATION_LOSSES)


def test_a_teacher_of_some_classes_judges_mixtures_of_those(overrides, tmp_path):
    """Methods that look at the label find it among the classes that the teacher knows."""
    names = [str(c) for c in range(7)]
    known = write_digits(tmp_path / "seven", names=names)
    teacher = train_teacher(known, tmp_path)

    class Watched(DistillationClassificationTrainer):
        def preprocess_batch(self, batch):
            batch = super().preprocess_batch(batch)
            shares = batch[LESSON].targets.get("cls", F.one_hot(batch["cls"], 10))
            expected = (shares[:, :7].sum(1) > 0.9999).nonzero()[:, 0]
            assert torch.equal(batch[LESSON].known, expected)
            return batch

    settings = {**overrides, "teacher": teacher, "response_method": "dkd", "mixup": 0.5, "batch": 16}
    trainer = train(settings, Watched)
    assert float(rows(trainer)[0]["train/response_loss"]) > 0
    assert not trainer.skipped


def train_teacher(data, tmp_path):
    from helpers import TRAINING
    from ultralytics.models.yolo.classify import ClassificationTrainer

    settings = {**TRAINING, "model": "yolo11n-cls.yaml", "data": str(data), "project": str(tmp_path / "teachers")}
    return str(train(settings, ClassificationTrainer).best)


def test_balanced_losses_pull_equally(overrides):
    """Measured here again: the gradients where the losses meet, times their factors, have the label's norm."""
    pulls = []

    def check(losses, shared):
        norms = {k: torch.autograd.grad(v, shared, retain_graph=True)[0].norm().item() for k, v in losses.items()}
        factors = measure(losses, shared)
        pulls.append({k: norms[k] * factors[k].item() for k in norms})
        return factors

    def on_start(trainer):
        nonlocal measure
        balance = trainer.model.criterion.balance
        if measure is None:
            balance.every, balance.momentum = 1, 0.0
            measure = balance.__call__
            trainer.model.criterion.balance = check

    measure = None
    trainer = train({**overrides, "distill_balance": "auto"}, on_train_batch_start=on_start)
    assert len(pulls) == 7
    for pull in pulls:
        assert set(pull) == {"loss", *DISTILLATION_LOSSES}
        assert list(pull.values()) == [pytest.approx(pull["loss"], rel=1e-3)] * 4
    assert trainer.distillation_loss.weights == dict.fromkeys(DISTILLATION_LOSSES, 1.0)


@pytest.mark.slow
def test_a_balanced_run_that_is_resumed_ends_as_a_whole_one(overrides):
    settings = {**overrides, "distill_balance": "auto", "epochs": 3, "workers": 0, "mixup": 0.5}
    whole = train(settings)

    class Stopped(Exception):
        pass

    def stop(trainer):
        if trainer.epoch == 0:
            raise Stopped

    parted = DistillationClassificationTrainer(overrides=settings)
    parted.add_callback("on_model_save", stop)
    with pytest.raises(Stopped):
        parted.train()
    again = train({"resume": str(parted.last)})
    assert same(weights(whole.last), weights(again.last))


def test_training_without_labels(overrides, tmp_path):
    """Folders of images that say nothing; validation has the teacher's classes, some of them, in folders."""
    digits = Path(overrides["data"])
    data = tmp_path / "unlabelled"
    (data / "train" / "pile").mkdir(parents=True)
    for i, file in enumerate(sorted((digits / "train").rglob("*.png"))):
        (data / "train" / "pile" / f"{i}.png").write_bytes(file.read_bytes())
    for name in ("3", "7"):
        (data / "val" / name).mkdir(parents=True)
        for file in (digits / "val" / name).iterdir():
            (data / "val" / name / file.name).write_bytes(file.read_bytes())
    (data / "val" / ".ipynb_checkpoints").mkdir()
    (data / "val" / ".ipynb_checkpoints" / "0.png").write_bytes((data / "train" / "pile" / "0.png").read_bytes())
    settings = {**overrides, "data": str(data), "distill_beta": 0.0, "epochs": 4}
    trainer = train(settings)
    assert trainer.model.names == {i: str(i) for i in range(10)}
    assert sorted({label for _, label, *_ in trainer.test_loader.dataset.samples}) == [3, 7]
    assert all(Path(file).parent.name == str(label) for file, label, *_ in trainer.test_loader.dataset.samples)
    assert {label for _, label, *_ in trainer.train_loader.dataset.samples} == {0}
    assert float(rows(trainer)[-1]["train/response_loss"]) < 0.7 * float(rows(trainer)[0]["train/response_loss"])
    assert YOLO(trainer.best).val(data=overrides["data"], imgsz=32, plots=False, verbose=False).top5 > 0
    assert {float(row["train/loss"]) for row in rows(trainer)} == {0.0}
    with pytest.raises(ValueError, match="response_method=dkd' needs them"):
        DistillationClassificationTrainer(overrides={**settings, "response_method": "dkd"})
    (data / "val" / "eleven").mkdir()
    (data / "val" / "eleven" / "0.png").write_bytes((data / "train" / "pile" / "0.png").read_bytes())
    with pytest.raises(ValueError, match=r"none of them: \['eleven'\]. Name its folders like the .* 'teacher_names'"):
        DistillationClassificationTrainer(overrides=settings)


@pytest.mark.parametrize("known", [True, False])
def test_folders_that_upstream_made_of_ndjson_are_named_by_it(known, overrides, tmp_path):
    """They are indices; without labels a name that the teacher does not know is refused, and not that of a folder."""
    digits, data = Path(overrides["data"]), tmp_path / "ndjson"
    shutil.copytree(digits / "train" / "5", data / "train" / "0")
    shutil.copytree(digits / "val" / "7", data / "val" / "0")
    names = {0: "7"}
    if not known:
        shutil.copytree(digits / "val" / "3", data / "val" / "1")
        names[1] = "eleven"
    YAML.save(data / ".ndjson.yaml", {"names": names})
    settings = {**overrides, "data": str(data), "distill_beta": 0.0}
    if not known:
        with pytest.raises(ValueError, match=r"of them: \['eleven'\]. Name the teacher's classes like those, with"):
            DistillationClassificationTrainer(overrides=settings)
        return
    trainer = train(settings)
    assert trainer.model.names == {i: str(i) for i in range(10)}
    labels = {(Path(file).parent.name, label) for file, label, *_ in trainer.test_loader.dataset.samples}
    assert labels == {("0", 7)}


def test_labels_are_used_where_the_teacher_knows_the_folders(overrides):
    trainer = DistillationClassificationTrainer(overrides={**overrides, "distill_beta": 0.0})
    assert trainer.plan.labelled


@pytest.mark.parametrize("shards", [["0"], ["0", "1"]])
def test_piles_that_bear_the_names_of_classes_are_no_labels(shards, overrides, tmp_path):
    """Where `val` has other classes than the folders of `train`, these say nothing."""
    digits, data = Path(overrides["data"]), tmp_path / "shards"
    for shard in shards:
        shutil.copytree(digits / "train" / "5", data / "train" / shard)
    for name in ("3", "7"):
        shutil.copytree(digits / "val" / name, data / "val" / name)
    trainer = DistillationClassificationTrainer(overrides={**overrides, "data": str(data), "distill_beta": 0.0})
    assert not trainer.plan.labelled
    assert len(trainer.data["names"]) == 10


def test_images_without_a_folder_are_told_where_to_go(overrides, tmp_path):
    for split in ("train", "val"):
        shutil.copytree(Path(overrides["data"]) / split / "3", tmp_path / "data" / split)
    with pytest.raises(FileNotFoundError, match="no class folders in 'train'"):
        DistillationClassificationTrainer(overrides={**overrides, "data": str(tmp_path / "data"), "distill_beta": 0.0})


def test_several_teachers_are_averaged_at_the_temperature_in_force(overrides):
    seen = []
    train(
        {
            **overrides,
            "teacher": [overrides["teacher"]] * 2,
            "temperature_end": 2,
            "epochs": 2,
            "fraction": 0.2,
        },
        on_train_batch_start=lambda t: seen.append((t.epoch, t.teacher.temperature, t.distillation_loss.temperature)),
    )
    assert set(seen) == {(0, 4.0, 4.0), (1, 2.0, 2.0)}


def test_a_method_of_ones_own_trains(overrides, monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", {k: dict(v) for k, v in registry._METHODS.items()})

    @response_method("cosine")
    def cosine(student, teacher):
        return 1 - F.cosine_similarity(student, teacher).mean()

    @feature_method("mean")
    def mean(student, teacher):
        return (student.mean() - teacher.mean()).square()

    trainer = train({**overrides, "response_method": "cosine", "feature_method": "mean"})
    assert 0 < float(rows(trainer)[0]["train/response_loss"]) < 2
    assert float(rows(trainer)[0]["train/feature_loss"]) > 0


def test_a_temperature_without_an_effect_is_named(overrides, monkeypatch):
    said = []
    monkeypatch.setattr(LOGGER, "warning", lambda message, *args: said.append(str(message)))
    for method, warned in (("nkd", True), ("mse", True), ("kl", False), ({"nkd": 1, "dist": 1}, False)):
        said.clear()
        DistillationClassificationTrainer(overrides={**overrides, "response_method": method, "temperature": 3})
        assert any("'temperature=3' has no effect" in line for line in said) == warned
    said.clear()
    DistillationClassificationTrainer(overrides={**overrides, "response_method": "nkd"})
    assert not any("has no effect" in line for line in said)


class InAnyUnit(nn.Module):
    """A network whose maps come in a unit, which its head undoes."""

    def __init__(self, unit):
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 8, 8), nn.BatchNorm2d(12), nn.ReLU())
        self.maps, self.classifier = nn.Conv2d(12, 20, 3, 2, 1), nn.Linear(20, 10)
        self.names = [str(c) for c in range(10)]
        with torch.no_grad():
            for weight, factor in (
                (self.maps.weight, unit),
                (self.maps.bias, unit),
                (self.classifier.weight, 1 / unit),
            ):
                weight *= factor

    def forward(self, x):
        return self.classifier(self.maps(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize(("method", "alike"), [("mse", True), ("fitnets", False)])
def test_the_unit_of_a_teachers_maps_changes_nothing(method, alike, overrides):
    """To rounding: standardised, a teacher of 40 times as large maps is the same teacher."""
    states, losses = [], []
    for unit in (1, 40):
        given = {"teacher": seen(InAnyUnit(unit), 32), "feature_method": method, "distill_layers": [[6], ["maps"]]}
        trainer = train({**overrides, **given, "lr0": 1e-4, "fraction": 0.5})
        states.append(torch.cat([v.flatten().float() for v in weights(trainer.last).values()]))
        losses.append([float(rows(trainer)[0][f"train/{name}"]) for name in DISTILLATION_LOSSES])
    difference = (states[0] - states[1]).norm() / states[0].norm()
    assert (losses[0] == pytest.approx(losses[1], rel=1e-3)) == alike
    assert (difference < 1e-4) == alike
