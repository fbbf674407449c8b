"""What a run asks: several teachers as one, and the student's own average in the place of one."""

import copy

import pytest
import torch
from ultralytics.nn.distillation.classifier import ClassificationTeacher, TeacherEnsemble
from ultralytics.nn.distillation.taps import match_levels
from ultralytics.nn.distillation.teachers import SelfTeacher, Teachers
from ultralytics.nn.tasks import load_checkpoint

NAMES = [str(c) for c in range(10)]
CPU = torch.device("cpu")


@pytest.fixture
def network(teacher):
    return load_checkpoint(teacher)[0].float().eval()


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_the_students_average_answers_as_it_is_now(network, images):
    """The network itself, not a copy, and unfused: what it has learned since is in the answer."""
    own = SelfTeacher(ClassificationTeacher)
    own.follow(network)
    names = set(network.state_dict())
    logits, features = own.to(CPU)(images)
    with torch.no_grad():
        assert torch.equal(logits, network(images)[1])
        network.model[-1].linear.bias += 1
    assert features == []
    assert torch.allclose(own(images)[0], logits + 1, atol=1e-5)
    assert set(network.state_dict()) == names
    assert not any(m._forward_hooks for m in network.modules())


def test_it_gives_the_maps_of_its_levels(network, teacher, images):
    levels = ClassificationTeacher(teacher).find_levels(32, 3)
    matched = [level for _, level in match_levels(levels, levels)]
    own = SelfTeacher(ClassificationTeacher)
    own.levels = matched
    own.follow(network)
    logits, features = own.to(CPU)(images, head=False)
    assert logits.shape == (4, 0)
    assert [x.shape[1] for x in features] == [level.channels for level in matched]


def test_it_follows_another_network(network, images):
    """As upstream makes a new average when it recovers from NaN."""
    own = SelfTeacher(ClassificationTeacher)
    other = copy.deepcopy(network)
    with torch.no_grad():
        other.model[-1].linear.bias += 1
    own.follow(network)
    first, _ = own.to(CPU)(images)
    own.follow(other)
    assert torch.allclose(own.to(CPU)(images)[0], first + 1, atol=1e-5)


def test_there_is_nothing_to_know_of_it():
    own = SelfTeacher(ClassificationTeacher)
    assert (own.source, own.content_hash, tuple(own.members), own.known_classes) == ("self", None, (), None)
    assert own.find_levels(32, 3, {"model.4": "the student's"}) == {"model.4": "the student's"}
    assert own.classes is None
    assert own.align(NAMES) == []
    assert own.classes == list(range(10))
    assert own.vet(32, 3) is None


def test_several_are_asked_as_one(teacher, images):
    members = [ClassificationTeacher(teacher) for _ in range(2)]
    joined = Teachers(members).to(CPU)
    assert joined.source == [str(teacher)] * 2
    assert joined.content_hash == [members[0].content_hash] * 2
    assert torch.equal(joined(images)[0], members[0](images)[0])
    joined.levels = list(members[0].find_levels(32, 3).values())[:1]
    assert members[0].levels == joined.levels
    assert members[1].levels == ()
    assert len(joined(images)[1]) == 1


@pytest.mark.parametrize(("names", "known"), [(NAMES, None), ([*"01234567", "x", "y"], list(range(8)))])
def test_what_a_teacher_of_some_classes_knows(names, known, teacher):
    joined = TeacherEnsemble([ClassificationTeacher(teacher, names=names)])
    assert joined.known_classes is None
    joined.align(NAMES)
    assert joined.known_classes is None if known is None else joined.known_classes.tolist() == known
