"""Kept answers: what was written is read, what was not is missing, and what is damaged is asked for again."""

import multiprocessing
import os
import time

import pytest
import torch
from ultralytics.nn.distillation import cache as teacher_cache
from ultralytics.nn.distillation.cache import CachedTeacher, TeacherCache, cache_key

KINDS = [((5,), torch.float16), ((2, 3, 3), torch.float16), ((4,), torch.int32)]


def batch(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(count, *shape, generator=generator).to(dtype)
        if dtype.is_floating_point
        else torch.randint(0, 100_000, (count, *shape), generator=generator, dtype=dtype)
        for shape, dtype in KINDS
    ]


@pytest.fixture(params=["memory", "file"])
def where(request, tmp_path):
    return None if request.param == "memory" else tmp_path / "cache.bin"


def test_what_was_written_is_read(where):
    cache = TeacherCache(10, 3, KINDS, where)
    written = batch(4)
    cache.write([0, 9, 5, 5], [0, 2, 1, 2], written)
    found, read = cache.read([5, 0, 9, 5, 5], [2, 0, 2, 1, 0])
    assert found.tolist() == [True, True, True, True, False]
    for a, b in zip(read, written, strict=True):
        assert torch.equal(a[:4], b[[3, 0, 1, 2]])
        assert a.dtype == b.dtype
    assert (cache.hits, cache.misses) == (4, 1)
    assert cache.size == 30 * (10 + 36 + 16 + 4)


def test_nothing_is_there_at_first(where):
    found, _ = TeacherCache(4, 1, KINDS, where).read(range(4), [0] * 4)
    assert not found.any()


def test_it_is_complete_once_every_record_was_written(where):
    cache = TeacherCache(3, 2, KINDS, where)
    for row in range(6):
        assert not cache.complete
        cache.write([row // 2], [row % 2], batch(1))
    assert cache.complete


def test_a_gpu_copies_from_memory_that_is_pinned(monkeypatch):
    asked, empty = [], torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *size, pin_memory=False, **given: asked.append(pin_memory) or empty(*size, **given)
    )
    for pinned in (True, False):
        cache = TeacherCache(2, 1, [((3,), torch.float16), ((2, 2), torch.float16)], pinned=pinned)
        cache.write([0], [0], [torch.ones(1, 3).half(), torch.ones(1, 2, 2).half()])
        assert [x.sum().item() for x in cache.read([0], [0])[1]] == [3, 4]
    assert asked[-4:] == [True, True, False, False]


def test_what_is_not_finite_is_not_kept(where):
    cache, tensors = TeacherCache(4, 1, KINDS, where), batch(3)
    tensors[0][1, 2] = torch.nan
    tensors[1][2, 0, 0, 0] = torch.inf
    cache.write([0, 1, 2], [0, 0, 0], tensors)
    assert cache.read([0, 1, 2], [0, 0, 0])[0].tolist() == [True, False, False]


def test_a_file_is_read_by_the_next_run(tmp_path):
    TeacherCache(10, 3, KINDS, tmp_path / "cache.bin").write([1, 2], [0, 1], batch(2))
    found, read = TeacherCache(10, 3, KINDS, tmp_path / "cache.bin").read([1, 2, 3], [0, 1, 0])
    assert found.tolist() == [True, True, False]
    assert torch.equal(read[1][:2], batch(2)[1])


def test_every_damaged_byte_is_noticed(tmp_path):
    file = tmp_path / "cache.bin"
    TeacherCache(1, 1, KINDS, file).write([0], [0], batch(1))
    content = file.read_bytes()
    for i in range(len(content)):
        file.write_bytes(content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :])
        assert not TeacherCache(1, 1, KINDS, file).read([0], [0])[0].any()
    for length in (0, 1, len(content) - 1):  # a write cut short
        file.write_bytes(content[:length])
        assert not TeacherCache(1, 1, KINDS, file).read([0], [0])[0].any()
        file.write_bytes(content[:length] + bytes(len(content) - length))
        assert not TeacherCache(1, 1, KINDS, file).read([0], [0])[0].any()


def test_a_record_in_anothers_place_is_noticed(tmp_path):
    file = tmp_path / "cache.bin"
    TeacherCache(2, 1, KINDS, file).write([0], [0], batch(1))
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] * 2)
    assert TeacherCache(2, 1, KINDS, file).read([0, 1], [0, 0])[0].tolist() == [True, False]


def write_some(file, start, seed):
    """Write every image of a share, twice, as a loader of another order would."""
    start.wait()
    cache = TeacherCache(400, 2, KINDS, file)
    for _ in range(2):
        for i in range(seed, 400, 2):
            cache.write([i], [1], [x[i : i + 1] for x in batch(400)])


def test_processes_share_a_file(tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    shares = [0, 1, 0]  # two write the same
    writers = [context.Process(target=write_some, args=(tmp_path / "c.bin", start, share)) for share in shares]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    found, read = TeacherCache(400, 2, KINDS, tmp_path / "c.bin").read(range(400), [1] * 400)
    assert found.all()
    assert all(torch.equal(a, b) for a, b in zip(read, batch(400), strict=True))


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch):
    with pytest.raises(MemoryError, match="are needed and"):
        TeacherCache(10**9, 10**3, KINDS)
    monkeypatch.setattr(os, "posix_fallocate", lambda *args: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):
        TeacherCache(10, 3, KINDS, tmp_path / "cache.bin")


class Counting:
    """A teacher whose answers say which images it was asked about."""

    def __init__(self, classes=5):
        self.asked, self.classes = [], classes

    def __call__(self, images):
        self.asked.append(images[:, 0, 0, 0].tolist())
        logits = torch.randn(len(images), self.classes, generator=torch.Generator().manual_seed(0))
        return logits + images[:, 0, 0, :1], [images.repeat(1, 4, 1, 1) * 2]


@pytest.fixture
def images():
    return torch.arange(6.0).reshape(6, 1, 1, 1).expand(6, 1, 2, 2).contiguous()


def test_the_teacher_is_asked_once(images, where):
    teacher = Counting()
    cached = CachedTeacher(teacher, images[:1], 6, 2, 4.0, where)
    teacher.asked.clear()
    index, view = torch.arange(6), torch.tensor([0, 1, 0, 1, 0, 1])
    first = cached(images[:4], index[:4], view[:4])
    second = cached(images, index, view)
    assert teacher.asked == [[0, 1, 2, 3], [4, 5]]
    cached(images, index, 1 - view)
    assert teacher.asked[2:] == [[0, 1, 2, 3, 4, 5]]
    assert torch.equal(first[0], second[0][:4])
    assert torch.equal(second[1][0], images.repeat(1, 4, 1, 1).half() * 2)
    assert (cached.cache.hits, cached.cache.misses) == (4, 12)
    assert "held 4 of 16 answers" in cached.report


class Slow(Counting):
    """Takes 20 ms for each image."""

    def __call__(self, images):
        time.sleep(0.02 * len(images))
        return super().__call__(images)


def test_the_time_saved_is_that_of_the_answers_found(images, tmp_path):
    """Whether or not some are missing, as one asked alone costs more than in a batch."""
    file, index, view = tmp_path / "cache.bin", torch.arange(6), torch.zeros(6)
    CachedTeacher(Slow(), images, 6, 1, 4.0, file)(images, index, view)
    content = bytearray(file.read_bytes())
    for damaged in (False, True):
        cached = CachedTeacher(Slow(), images, 6, 1, 4.0, file)
        if damaged:
            content[0] ^= 1
            file.write_bytes(content)
        for _ in range(25):
            cached(images, index, view)
        assert cached.cache.misses == damaged
        assert "it spared the teacher about 3 s" in cached.report


@pytest.mark.parametrize(("loading", "said"), [(3.0, "The data loader took 75% of the time"), (0.5, None)])
def test_a_slow_loader_is_named(loading, said, images, monkeypatch):
    cached = CachedTeacher(Counting(), images[:1], 6, 1, 4.0)
    clock = iter((0, loading, loading + 1, 90, 90 + loading, 91 + loading))  # validation between two epochs
    monkeypatch.setattr("ultralytics.nn.distillation.cache.time.perf_counter", lambda: next(clock))
    for event in ("on_train_epoch_start", "on_train_batch_start", "on_train_batch_end") * 2:
        cached.lap(event)
    assert (cached.waiting, cached.training) == (2 * loading, 2)
    assert ("data loader" in cached.report) == (said is not None)
    assert said is None or said in cached.report


def test_answers_of_many_classes_are_compressed(images):
    teacher = Counting(1000)
    cached = CachedTeacher(teacher, images[:1], 6, 1, 4.0)
    index, view = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    expected = (teacher(images)[0] / 4).softmax(1)
    for _ in range(2):
        softened = (cached(images, index, view)[0] / 4).softmax(1)
        top = expected.topk(teacher_cache.TOP, 1).indices
        torch.testing.assert_close(softened.gather(1, top), expected.gather(1, top), rtol=2e-3, atol=0)
    assert cached.cache.size < 6 * 1000


def test_other_losses_than_kl_get_all_logits(images):
    cached = CachedTeacher(Counting(1000), images[:1], 6, 1, 4.0, compress=False)
    logits, _ = cached(images, torch.arange(6), torch.zeros(6, dtype=torch.int64))
    assert torch.equal(logits, Counting(1000)(images)[0].half())


def test_answers_beyond_half_precision_stay_finite(images):
    def loud(x):
        return torch.tensor([[1e6, -1e6]]).expand(len(x), 2), [torch.full((len(x), 1, 1, 1), -1e6)]

    cached = CachedTeacher(loud, images[:1], 6, 1, 4.0)
    logits, (features,) = cached(images, torch.arange(6), torch.zeros(6, dtype=torch.int64))
    assert logits.tolist() == [[65504.0, -65504.0]] * 6
    assert features.unique().tolist() == [-65504.0]
    assert cached.cache.read([0], [0])[0].all()


def test_the_key_names_everything():
    parts = {"teacher": "abc", "images": [["a", 1]], "views": 2}
    assert cache_key(**parts) == cache_key(**parts)
    others = [{**parts, "teacher": "abd"}, {**parts, "images": [["a", 2]]}, {**parts, "views": 3}]
    assert len({cache_key(**x) for x in [parts, *others]}) == 4
