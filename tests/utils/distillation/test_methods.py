"""The methods against double-precision NumPy evaluations of their papers' equations, and against torchdistill."""

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics.utils.distillation import DistillationLoss, feature_method, methods, registry, response_method
from ultralytics.utils.distillation.registry import choose

BATCH, CLASSES = 6, 5
RESPONSES, FEATURES = sorted(methods("response_method")), sorted(methods("feature_method"))
RELATIONS = ("rkd", "sp", "cc")


def draw(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def call(kind, name, student, teacher, settings=None, **known):
    own = {"temperature": known["temperature"]} if "temperature" in known and name in {"nkd", "lskd"} else {}
    (choice,) = choose(f"{kind}_method", {name: {**own, **(settings or {})}})
    return choice(student, teacher, **known)


def softmax(x, axis=-1):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def divergence(p, q):
    """Evaluate sum_i p_i log(p_i / q_i)."""
    return float(sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def pearson(x, y):
    return np.corrcoef(x, y)[0, 1]


def numpy_kl(s, t, labels, tau):
    return tau**2 * np.mean([divergence(softmax(b / tau), softmax(a / tau)) for a, b in zip(s, t, strict=True)])


def numpy_dkd(s, t, labels, tau, alpha=1.0, beta=8.0):
    total = 0
    for a, b, y in zip(s, t, labels, strict=True):
        p, q = softmax(a / tau), softmax(b / tau)
        target = divergence([q[y], 1 - q[y]], [p[y], 1 - p[y]])
        others = divergence(softmax(np.delete(b, y) / tau), softmax(np.delete(a, y) / tau))
        total += alpha * target + beta * others
    return tau**2 * total / len(s)


def numpy_nkd(s, t, labels, tau, gamma=1.5):
    total = 0
    for a, b, y in zip(s, t, labels, strict=True):
        total -= softmax(b)[y] * np.log(softmax(a)[y])
        others = softmax(np.delete(b, y) / tau) * np.log(softmax(np.delete(a, y) / tau))
        total -= gamma * tau**2 * others.sum()
    return total / len(s)


def numpy_dist(s, t, labels, tau, beta=2.0, gamma=2.0):
    p, q = softmax(s / tau), softmax(t / tau)
    inter = np.mean([1 - pearson(p[b], q[b]) for b in range(len(s))])
    intra = np.mean([1 - pearson(p[:, c], q[:, c]) for c in range(s.shape[1])])
    return tau**2 * (beta * inter + gamma * intra)


def numpy_mse(s, t, labels, tau):
    return ((s - t) ** 2).sum() / s.size


def standardised(x):
    return np.stack([(row - row.mean()) / row.std(ddof=1) for row in x])


def numpy_lskd(s, t, labels, tau, inner=numpy_kl):
    return inner(standardised(s), standardised(t), labels, tau)


NUMPY_RESPONSES = {
    "kl": (numpy_kl, {}),
    "dkd": (numpy_dkd, {}),
    "dkd, weighed otherwise": (lambda *x: numpy_dkd(*x, alpha=0.5, beta=2.0), {"alpha": 0.5, "beta": 2.0}),
    "nkd": (numpy_nkd, {}),
    "nkd, weighed otherwise": (lambda *x: numpy_nkd(*x, gamma=0.5), {"gamma": 0.5}),
    "dist": (numpy_dist, {}),
    "dist, weighed otherwise": (lambda *x: numpy_dist(*x, beta=1.0, gamma=0.0), {"beta": 1, "gamma": 0}),
    "mse": (numpy_mse, {}),
    "lskd": (numpy_lskd, {}),
    "lskd of dkd": (
        lambda *x: numpy_lskd(*x, inner=lambda *y: 0.5 * numpy_dkd(*y, beta=2.0)),
        {"method": {"dkd": {"beta": 2.0, "weight": 0.5}}},
    ),
}


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("case", NUMPY_RESPONSES)
def test_responses_match_numpy(case, tau):
    expected, settings = NUMPY_RESPONSES[case]
    s, t = draw(BATCH, CLASSES, scale=3), draw(BATCH, CLASSES, seed=1, scale=3)
    labels = torch.arange(BATCH) % CLASSES
    value = call("response", case.split(",")[0].split()[0], s, t, settings, labels=labels, temperature=tau)
    np.testing.assert_allclose(value.item(), expected(s.numpy(), t.numpy(), labels.numpy(), tau), rtol=1e-6)


def test_every_response_method_is_compared():
    assert {case.split(",")[0].split()[0] for case in NUMPY_RESPONSES} == set(RESPONSES)


def huber(x):
    return np.where(np.abs(x) < 1, x**2 / 2, np.abs(x) - 0.5).mean()


def numpy_rkd(s, t, distance=25.0, angle=50.0):
    def distances(x):
        d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        return d / d[~np.eye(len(x), dtype=bool)].mean()

    def angles(x):
        cosines = np.zeros((len(x),) * 3)
        for i, j, k in np.ndindex(*cosines.shape):
            a, b = x[j] - x[i], x[k] - x[i]
            norms = np.linalg.norm(a) * np.linalg.norm(b)
            cosines[i, j, k] = a @ b / norms if norms else 0
        return cosines

    s, t = s.mean((2, 3)), t.mean((2, 3))
    return distance * huber(distances(s) - distances(t)) + angle * huber(angles(s) - angles(t))


def numpy_sp(s, t):
    grams = []
    for x in (s, t):
        g = np.array([[(a * b).sum() for b in x] for a in x])
        grams.append(g / np.linalg.norm(g, axis=1, keepdims=True))
    return np.linalg.norm(grams[0] - grams[1]) ** 2 / len(s) ** 2


def numpy_cc(s, t, gamma=0.4):
    kernels = []
    for x in (s, t):
        x = x.mean((2, 3))
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
        terms = [(2 * gamma) ** p / f * (x @ x.T) ** p for p, f in enumerate((1, 1, 2))]
        kernels.append(np.exp(-2 * gamma) * sum(terms))
    return np.linalg.norm(kernels[0] - kernels[1]) ** 2 / len(s) ** 2


def numpy_attention(s, t):
    total = 0
    for a, b in zip(s, t, strict=True):
        q, r = ((x**2).mean(0).ravel() for x in (a, b))
        total += ((q / np.linalg.norm(q) - r / np.linalg.norm(r)) ** 2).sum()
    return total / len(s)


def numpy_pkd(s, t):
    return np.mean([1 - pearson(s[:, c].ravel(), t[:, c].ravel()) for c in range(s.shape[1])])


def numpy_cwd(s, t, tau=4.0):
    values = [
        divergence(softmax(t[b, c].ravel() / tau), softmax(s[b, c].ravel() / tau)) for b, c in np.ndindex(*s.shape[:2])
    ]
    return tau**2 * np.mean(values)


NUMPY_FEATURES = {
    "mse": (lambda s, t: ((s - t) ** 2).mean(), {}),
    "fitnets": (lambda s, t: ((s - t) ** 2).mean(), {}),
    "attention": (numpy_attention, {}),
    "rkd": (numpy_rkd, {}),
    "rkd, distances alone": (lambda s, t: numpy_rkd(s, t, 2.0, 0.0), {"distance": 2, "angle": 0}),
    "sp": (numpy_sp, {}),
    "cc": (numpy_cc, {}),
    "cc, wider": (lambda s, t: numpy_cc(s, t, 0.1), {"gamma": 0.1}),
    "pkd": (numpy_pkd, {}),
    "cwd": (numpy_cwd, {}),
    "cwd, sharper": (lambda s, t: numpy_cwd(s, t, 1.0), {"temperature": 1.0}),
}


@pytest.mark.parametrize("case", NUMPY_FEATURES)
def test_features_match_numpy(case):
    """Of maps that are adapted already."""
    expected, settings = NUMPY_FEATURES[case]
    s, t = draw(BATCH, 4, 3, 3), draw(BATCH, 4, 3, 3, seed=1)
    value = call("feature", case.split(",")[0], s, t, settings)
    np.testing.assert_allclose(value.item(), expected(s.numpy(), t.numpy()), rtol=1e-6)


def test_vid_matches_numpy():
    torch.manual_seed(0)
    loss = DistillationLoss([3], [4], response_distill=False, attention_distill=False, feature_method="vid").double()
    s, t = draw(BATCH, 3, 2, 2), draw(BATCH, 4, 2, 2, seed=1)
    adapter = loss.adapters[0]
    nn.init.normal_(adapter["scale"].weight)
    x = s.numpy()
    for i in (0, 2, 4):
        w, b = (adapter["mean"][i].state_dict()[k].numpy() for k in ("weight", "bias"))
        x = np.einsum("oi,bihw->bohw", w[:, :, 0, 0], x) + b[None, :, None, None]
        x = np.maximum(x, 0) if i < 4 else x
    variance = np.log1p(np.exp(adapter["scale"].weight.detach().numpy()[0]))[None, :, None, None] + 1e-5
    expected = ((t.numpy() - x) ** 2 / (2 * variance) + np.log(variance) / 2).mean()
    logits = torch.zeros(BATCH, CLASSES, dtype=torch.float64)
    np.testing.assert_allclose(loss(logits, logits, [s], [t])[0].item(), expected, rtol=1e-6)


def test_vid_begins_with_variances_of_5():
    loss = DistillationLoss([3], [4], response_distill=False, attention_distill=False, feature_method="vid")
    assert torch.allclose(nn.functional.softplus(loss.adapters[0]["scale"].weight), torch.full((1, 4), 5.0))


def test_srrl_matches_numpy():
    s, t, w = draw(BATCH, 4, 3, 3), draw(BATCH, 4, 3, 3, seed=1), draw(CLASSES, 4, seed=2)
    value = call("feature", "srrl", s, t, {"alpha": 0.5, "beta": 2.0}, classify=lambda x: x.mean((2, 3)) @ w.T)
    a, b = s.numpy().mean((2, 3)), t.numpy().mean((2, 3))
    expected = 0.5 * ((a - b) ** 2).mean() + 2.0 * ((a @ w.numpy().T - b @ w.numpy().T) ** 2).mean()
    np.testing.assert_allclose(value.item(), expected, rtol=1e-6)


def test_every_feature_method_is_compared():
    assert {case.split(",")[0] for case in NUMPY_FEATURES} | {"vid", "srrl"} == set(FEATURES)


def test_torchdistill_agrees():
    """Where it has the same loss.

    Its kl and lskd are not scaled by temperature**2, its attention is a mean over the 9 positions, its correlation
    congruence is not squared, and its sp, left out, divides the rows by their L1 norm where the paper has the L2 norm.
    """
    losses = pytest.importorskip("torchdistill.losses.mid_level")
    s, t = draw(BATCH, CLASSES, scale=3).float(), draw(BATCH, CLASSES, seed=1, scale=3).float()
    path = ("x", "output", "x", "output")
    answers = {"x": {"output": s}}, {"x": {"output": t}}
    kl = losses.LogitStdKDLoss(*path, temperature=2.0, eps=1e-7, beta=1.0)
    assert call("response", "lskd", s, t, labels=None, temperature=2.0).item() == pytest.approx(
        4 * kl(*answers).item(), rel=1e-5
    )
    kd = losses.KDLoss(*path, temperature=4.0, alpha=0.0)
    assert call("response", "kl", s, t, temperature=4.0).item() == pytest.approx(
        16 * kd(*answers, targets=torch.zeros(BATCH).long()).item(), rel=1e-5
    )
    dist = losses.DISTLoss(*path, beta=2.0, gamma=2.0, tau=4.0)
    assert call("response", "dist", s, t, temperature=4.0).item() == pytest.approx(dist(*answers).item(), rel=1e-5)

    maps = draw(BATCH, 4, 3, 3).float(), draw(BATCH, 7, 3, 3, seed=1).float()
    whole = [{"x": {"output": x}} for x in maps]
    place = {"path": "x", "io": "output"}
    attention = losses.ATLoss({"pair": {"student": place, "teacher": place}}, "code")
    assert call("feature", "attention", *maps).item() == pytest.approx(9 * attention(*whole).item(), rel=1e-5)
    pooled = [{"x": {"output": x.mean((2, 3))}} for x in maps]
    unit = [{"x": {"output": nn.functional.normalize(x["x"]["output"])}} for x in pooled]
    rkd = losses.RKDLoss("x", "x", 25.0, 50.0, "mean")
    assert call("feature", "rkd", *maps).item() == pytest.approx(rkd(*pooled).item(), rel=1e-5)
    cc = losses.CCKDLoss("x", "x", {"type": "gaussian", "gamma": 0.4, "max_p": 2}, "sum")
    assert call("feature", "cc", *maps).item() == pytest.approx((cc(*unit).item() / BATCH) ** 2, rel=1e-5)


@pytest.mark.parametrize("name", [x for x in RESPONSES if x != "nkd"])
def test_responses_are_zero_at_equality(name):
    x = draw(BATCH, CLASSES)
    assert abs(call("response", name, x, x, labels=torch.zeros(BATCH).long(), temperature=4.0).item()) < 1e-9


@pytest.mark.parametrize("name", [x for x in FEATURES if x not in {"vid", "srrl"}])
def test_features_are_zero_at_equality(name):
    x = draw(BATCH, 4, 3, 3)
    assert abs(call("feature", name, x, x).item()) < 1e-9


def test_invariances():
    """What the papers claim that a method does not see."""
    s, t = draw(BATCH, CLASSES), draw(BATCH, CLASSES, seed=1)
    known = {"labels": torch.zeros(BATCH).long(), "temperature": 4.0}
    for name in ("kl", "dkd", "nkd", "dist", "lskd"):  # a constant added to all logits of an image
        assert call("response", name, s + 7, t, **known).item() == pytest.approx(
            call("response", name, s, t, **known).item(), rel=1e-9
        )
    scaled = call("response", "lskd", 5 * s, t, **known).item()  # the size of the logits
    assert scaled == pytest.approx(call("response", "lskd", s, t, **known).item(), rel=1e-5)
    s, t = draw(BATCH, 4, 3, 3), draw(BATCH, 4, 3, 3, seed=1)
    for name in ("attention", "rkd", "sp", "cc", "pkd"):  # the size of the maps
        assert call("feature", name, 5 * s, t).item() == pytest.approx(call("feature", name, s, t).item(), rel=1e-6)
    for name in ("attention", "rkd", "sp", "cc"):  # which channel is which
        assert call("feature", name, s[:, [2, 0, 3, 1]], t).item() == pytest.approx(
            call("feature", name, s, t).item(), rel=1e-9
        )
    assert call("feature", "rkd", s + 3, t).item() == pytest.approx(call("feature", "rkd", s, t).item(), rel=1e-6)


@pytest.mark.parametrize("name", RESPONSES)
def test_gradients_of_responses(name):
    s, t = draw(3, 4).requires_grad_(), draw(3, 4, seed=1)
    known = {"labels": torch.tensor([0, 3, 1]), "temperature": 2.0}
    assert torch.autograd.gradcheck(lambda x: call("response", name, x, t, **known), s)


@pytest.mark.parametrize("name", FEATURES)
def test_gradients_of_features(name):
    torch.manual_seed(0)
    loss = DistillationLoss(
        [3],
        [4],
        response_distill=False,
        attention_distill=False,
        feature_method=name,
        classify=lambda x: x.mean((2, 3)),
    ).double()
    s, t, logits = draw(3, 3, 2, 2).requires_grad_(), draw(3, 4, 2, 2, seed=1), draw(3, 2)
    parameters = list(loss.adapters.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: loss(logits, logits, [x], [t])[0], (s, *parameters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 2, 1000])
@pytest.mark.parametrize("name", RESPONSES)
def test_responses_hold_at_logits_of_10000(name, classes, dtype):
    """Value and gradient are finite where student and teacher are sure of different classes."""
    s, t = torch.full((2, 3, classes), -1e4).unbind()
    s[:, -1], t[:, 0] = 1e4, 1e4
    s.requires_grad_()
    loss = DistillationLoss([], [], response_method=name, feature_distill=False, attention_distill=False)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        total, items = loss(s.to(dtype), t.to(dtype), labels=torch.zeros(3).long())
    total.backward()
    assert total.isfinite()
    assert s.grad.isfinite().all()
    assert items["response_loss"] > 0 or classes < 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("name", FEATURES)
def test_features_are_finite(name, scale, batch, dtype):
    s, t = (draw(batch, 3, 2, 2, scale=scale).to(dtype).requires_grad_(), draw(batch, 4, 2, 2, seed=1, scale=scale))
    loss = DistillationLoss(
        [3],
        [4],
        response_distill=False,
        attention_distill=False,
        feature_method=name,
        classify=lambda x: x.mean((2, 3)),
    )
    if batch == 1:
        loss.eval()  # BatchNorm is told nothing by one vector
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        total, _ = loss(torch.zeros(batch, 2), torch.zeros(batch, 2), [s], [t.to(dtype)])
    total.backward()
    assert total.isfinite()
    assert s.grad.isfinite().all()
    assert (name in RELATIONS and batch == 1) or s.grad.any() or scale == 0 or name in {"srrl", "vid"}


@pytest.mark.parametrize("name", ["dist", "pkd", "rkd"])
def test_gradients_are_bounded_where_nothing_varies(name):
    """Rounding has no direction, and must not take the whole gradient that a step may have."""
    if name == "dist":
        s = torch.zeros(8, 10, requires_grad=True)
        loss = call("response", name, s, draw(8, 10).float(), temperature=4.0)
    elif name == "pkd":
        s = torch.full((8, 4, 3, 3), 0.1, requires_grad=True)
        loss = call("feature", name, s, draw(8, 4, 3, 3, seed=1).float())
    else:  # two images alike to the student, and not to the teacher
        s = draw(8, 4, 1, 1).float()[[0, 1, 2, 3, 4, 5, 6, 0]].requires_grad_()
        loss = call("feature", name, s, draw(8, 4, 1, 1, seed=1).float())
    loss.backward()
    assert s.grad.abs().max() < 1e4


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("kl", 4),
        ("nkd", 1),
        ("lskd", 2),
        ({"nkd": {"temperature": 3}}, 3),
        ({"kl": {"temperature": 3}}, 3),
        ("mse", None),
    ],
)
def test_temperature_is_the_papers_unless_given(value, expected):
    """That of the training is for methods whose papers leave it open."""
    loss = DistillationLoss([], [], response_method=value, feature_distill=False, attention_distill=False)
    assert loss.temperature_of("response_loss") == expected
    s, t, labels = draw(3, 4).float(), draw(3, 4, seed=1).float(), torch.tensor([0, 3, 1])
    (name,) = [value] if isinstance(value, str) else value
    known = {"labels": labels, **({"temperature": float(expected)} if expected else {})}
    assert loss(s, t, labels=labels)[1]["response_loss"].item() == pytest.approx(
        call("response", name, s, t, **known).item(), rel=1e-6
    )


def test_methods_that_need_labels_say_so():
    loss = DistillationLoss([], [], response_method="dkd", feature_distill=False, attention_distill=False)
    with pytest.raises(ValueError, match="need labels"):
        loss(draw(2, 3), draw(2, 3))


def test_several_methods_have_an_item_each_and_their_shares():
    losses = {"mse": 1.0, "rkd": {"weight": 0.5, "angle": 0}}
    loss = DistillationLoss([3], [4], response_method={"kl": 1, "dkd": {"weight": 2, "beta": 1}}, feature_method=losses)
    assert loss.weights == {
        "response_kl_loss": 0.1,
        "response_dkd_loss": 2.0,
        "feature_mse_loss": 25.0,
        "feature_rkd_loss": 0.5,
        "attention_loss": 10.0,
    }
    s, t = draw(BATCH, CLASSES).float(), draw(BATCH, CLASSES, seed=1).float()
    maps = [draw(BATCH, 3, 2, 2).float()], [draw(BATCH, 4, 2, 2, seed=1).float()]
    labels = torch.arange(BATCH) % CLASSES
    total, items = loss(s, t, *maps, labels)
    assert total.item() == pytest.approx(sum(loss.weights[k] * v.item() for k, v in items.items()), rel=1e-6)
    known = {"labels": labels, "temperature": 4.0}
    assert items["response_dkd_loss"].item() == pytest.approx(
        call("response", "dkd", s, t, {"beta": 1}, **known).item(), rel=1e-6
    )
    given = DistillationLoss([3], [4], feature_method=losses, feature_weight=8, attention_weight=0)
    assert given.weights == {"response_loss": 0.1, "feature_mse_loss": 8.0, "feature_rkd_loss": 4.0}


def test_levels_and_adapters_of_a_method():
    def adapters(method, levels=([3, 8], [4, 8])):
        return DistillationLoss(*levels, feature_method=method).adapters

    assert [type(x) for x in adapters("mse")] == [nn.Conv2d, nn.Conv2d]
    assert [type(x) for x in adapters("cwd")] == [nn.Conv2d, nn.Identity]
    assert len(adapters("rkd")) == 0
    assert [type(x) for x in adapters({"vid": 1, "mse": 1})] == [nn.ModuleDict] * 2 + [nn.Conv2d] * 2
    torch.manual_seed(0)
    loss = DistillationLoss([3, 8], [4, 8], response_distill=False, attention_distill=False, feature_method="sp")
    maps = [draw(4, 3, 4, 4), draw(4, 8, 2, 2)], [draw(4, 4, 4, 4), draw(4, 8, 2, 2, seed=1)]
    logits = torch.zeros(4, 2, dtype=torch.float64)
    assert loss(logits, logits, *maps)[1]["feature_loss"] == call("feature", "sp", maps[0][1], maps[1][1])


def test_a_method_that_needs_a_head_says_so():
    with pytest.raises(ValueError, match=r"srrl.*needs the head"):
        DistillationLoss([3], [4], feature_method="srrl")


def test_a_method_of_ones_own(monkeypatch):
    monkeypatch.setattr(registry, "_METHODS", {k: dict(v) for k, v in registry._METHODS.items()})

    @response_method("cosine", weight=3.0)
    def cosine(student, teacher, *, power=1.0):
        return (1 - nn.functional.cosine_similarity(student, teacher)).pow(power).mean()

    @feature_method("mean", last=True, adapter=lambda student, teacher: nn.Conv2d(student, teacher, 1))
    def mean(student, teacher):
        return (student.mean() - teacher.mean()).square()

    loss = DistillationLoss([3], [4], response_method={"cosine": {"power": 2}}, feature_method="mean")
    assert loss.weights == {"response_loss": 3.0, "feature_loss": 1.0, "attention_loss": 10.0}
    s, t = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert loss(s, -t, [torch.ones(1, 3, 2, 2)], [torch.ones(1, 4, 2, 2)])[1]["response_loss"] == 1.0
