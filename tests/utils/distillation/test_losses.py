"""The losses against double-precision NumPy evaluations of their formulas, closed forms and gradient checks."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics.utils.distillation import (
    DistillationLoss,
    attention_loss,
    average_logits,
    compress_logits,
    feature_loss,
    response_loss,
    restore_logits,
)
from ultralytics.utils.distillation.features import pair_maps, standardize

TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


def numpy_response(s, t, temperature):
    """Evaluate tau^2 / B * sum_b KL(softmax(t_b / tau) || softmax(s_b / tau))."""

    def softmax(x):
        e = np.exp(x - x.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    p, q = softmax(t / temperature), softmax(s / temperature)
    return temperature**2 * (p * np.log(p / q)).sum() / len(s)


def numpy_pool(x, height, width):
    """Average a (B, C, h, w) array over the adaptive windows from floor(i*h/H) to ceil((i+1)*h/H)."""
    h, w = x.shape[2:]
    out = np.empty((*x.shape[:2], height, width))
    for i in range(height):
        for j in range(width):
            rows = slice(i * h // height, -(-(i + 1) * h // height))
            columns = slice(j * w // width, -(-(j + 1) * w // width))
            out[:, :, i, j] = x[:, :, rows, columns].mean((2, 3))
    return out


def numpy_same_size(s, t):
    size = min(s.shape[2], t.shape[2]), min(s.shape[3], t.shape[3])
    return numpy_pool(s, *size), numpy_pool(t, *size)


def numpy_feature(ss, ts):
    pairs = [numpy_same_size(s, t) for s, t in zip(ss, ts, strict=True)]
    return np.mean([((s - t) ** 2).mean() for s, t in pairs])


def numpy_standardized(t):
    """Evaluate (t - mean) / deviation per channel, over images and positions."""
    channels = [t[:, c] for c in range(t.shape[1])]
    return np.stack([(x - x.mean()) / np.sqrt(((x - x.mean()) ** 2).mean()) for x in channels], axis=1)


def numpy_attention(ss, ts):
    def attention(x):
        a = (x**2).mean(1).reshape(len(x), -1)
        return a / np.maximum(np.linalg.norm(a, axis=1, keepdims=True), 1e-12)

    pairs = [numpy_same_size(s, t) for s, t in zip(ss, ts, strict=True)]
    return np.mean([((attention(s) - attention(t)) ** 2).sum() / len(s) for s, t in pairs])


def maps(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def arrays(tensors):
    return [x.double().numpy() for x in tensors]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("classes", [1, 2, 10, 1000])
def test_response_matches_numpy(batch, classes, temperature):
    s, t = maps((batch, classes), (batch, classes))
    expected = numpy_response(*arrays((3 * s, 3 * t)), temperature)
    np.testing.assert_allclose(response_loss(3 * s, 3 * t, temperature).item(), expected, **TOLERANCE)


SHAPES = [
    ([(2, 4, 1, 1)], [(2, 4, 1, 1)]),
    ([(1, 3, 28, 28), (1, 8, 7, 7)], [(1, 3, 28, 28), (1, 8, 7, 7)]),
    ([(3, 2, 14, 14)], [(3, 2, 7, 7)]),  # the student's map is larger
    ([(3, 2, 4, 4)], [(3, 2, 9, 10)]),  # the teacher's, by no whole factor
    ([(2, 5, 3, 8)], [(2, 5, 6, 4)]),  # each along one side
]


@pytest.mark.parametrize(("student_shapes", "teacher_shapes"), SHAPES)
@pytest.mark.parametrize(("loss", "reference"), [(feature_loss, numpy_feature), (attention_loss, numpy_attention)])
def test_map_losses_match_numpy(loss, reference, student_shapes, teacher_shapes):
    s, t = maps(*student_shapes, seed=1), maps(*teacher_shapes, seed=2)
    np.testing.assert_allclose(loss(s, t).item(), reference(arrays(s), arrays(t)), **TOLERANCE)


def test_attention_takes_any_channels():
    s, t = maps((2, 3, 5, 5)), maps((2, 11, 5, 5), seed=1)
    np.testing.assert_allclose(attention_loss(s, t).item(), numpy_attention(arrays(s), arrays(t)), **TOLERANCE)


def test_equal_inputs_give_zero():
    (logits,), features = maps((5, 10)), maps((5, 4, 6, 6), (5, 8, 3, 3))
    assert response_loss(logits, logits).item() == pytest.approx(0, abs=1e-6)
    assert response_loss(logits, logits + 100).item() == pytest.approx(0, abs=1e-4)  # softmax ignores a shift
    assert feature_loss(features, features).item() == 0
    assert attention_loss(features, features).item() == 0
    assert attention_loss(features, [3 * x for x in features]).item() == pytest.approx(0, abs=1e-6)  # and Q a scale


def test_kl_has_the_teacher_as_reference():
    """KL(t || s) in closed form for two classes; the other direction gives another number."""
    s, t = torch.tensor([[0.0, 0.0]]), torch.tensor([[np.log(9.0), 0.0]])
    expected = 0.9 * np.log(0.9 / 0.5) + 0.1 * np.log(0.1 / 0.5)
    reverse = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    assert response_loss(s, t, 1.0).item() == pytest.approx(expected, rel=1e-5)
    assert response_loss(t, s, 1.0).item() == pytest.approx(reverse, rel=1e-5)


def test_temperature_limits():
    """Hot, the loss becomes half the squared distance of centred logits over C (eq. 4); cold, a logit gap."""
    s, t = maps((4, 10), (4, 10), dtype=torch.float64)
    centred = (t - t.mean(1, keepdim=True)) - (s - s.mean(1, keepdim=True))
    hot = centred.square().sum(1).mean() / (2 * 10)
    assert response_loss(s, t, 1e3).item() == pytest.approx(hot.item(), rel=1e-2)
    tau = 1e-3
    cold = tau * (s.amax(1) - s.gather(1, t.argmax(1, keepdim=True))[:, 0]).mean()
    assert response_loss(s, t, tau).item() == pytest.approx(cold.item(), rel=1e-3)


def test_gradients_by_finite_differences():
    s, t = maps((3, 5), (3, 5), dtype=torch.float64)
    features_s = [x.requires_grad_() for x in maps((2, 3, 4, 4), (2, 4, 2, 2), dtype=torch.float64, seed=3)]
    features_t = maps((2, 3, 2, 2), (2, 4, 5, 5), dtype=torch.float64, seed=4)
    assert torch.autograd.gradcheck(lambda x: response_loss(x, t, 3.0), s.requires_grad_())
    assert torch.autograd.gradcheck(lambda *x: feature_loss(x, features_t), features_s)
    assert torch.autograd.gradcheck(lambda *x: attention_loss(x, features_t), features_s)


@pytest.mark.parametrize("student_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("teacher_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats_change_nothing(student_format, teacher_format):
    """Losses and gradients are those of PyTorch's own functions, and a map's gradient has the map's format."""
    loss = DistillationLoss([6], [4], response_distill=False)
    (s,), (t,) = maps((3, 6, 8, 8)), maps((3, 4, 8, 8), seed=1)
    s = s.to(memory_format=student_format).requires_grad_()
    logits = torch.zeros(3, 2)
    total, items = loss(logits, logits, [s], [t.to(memory_format=teacher_format)])
    adapter = loss.adapters[0]
    energies = [x.square().mean(1).flatten(1) for x in (s, t)]
    unit = [e / e.norm(dim=1, keepdim=True) for e in energies]
    expected = {
        "feature_loss": nn.functional.mse_loss(adapter(s), standardize(t)),
        "attention_loss": (unit[0] - unit[1]).square().sum(1).mean(),
    }
    torch.testing.assert_close(items, {k: v.detach() for k, v in expected.items()})
    reference = sum(loss.weights[k] * v for k, v in expected.items())
    inputs = [s, *adapter.parameters()]
    gradients = torch.autograd.grad(total, inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad(reference, inputs), rtol=1e-4, atol=1e-5)
    assert gradients[0].is_contiguous(memory_format=student_format)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 40.0, 1e6])
@pytest.mark.parametrize("shape", [(5, 4, 3, 3), (32, 1280, 1, 1), (2, 3, 2, 1)])
def test_standardized_maps_have_no_unit(shape, unit):
    """Also of a map before its activation, of many channels at one position, and in units of any size."""
    (t,) = maps(shape)
    found = standardize(t * unit + 3 * unit)
    np.testing.assert_allclose(found.numpy(), numpy_standardized(t.double().numpy()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_channel_that_says_nothing_is_zero(dtype):
    """Dead, constant, or constant but for rounding in the teacher's precision; not one that fires once."""
    t = torch.zeros(8, 4, 2, 2)
    t[:, 1], t[:, 2] = 7.0, 100 + 0.1 * torch.randn(8, 2, 2)
    t[3, 3, 0, 0] = 1e-3
    found = standardize(t.to(dtype).float())
    assert found[:, :3].abs().max() == 0
    assert found[3, 3, 0, 0].item() == pytest.approx(np.sqrt(31), rel=1e-4)


def test_too_few_values_say_nothing():
    """Of three images at one position no deviation can be known, so they pull at nothing."""
    loss = DistillationLoss([6, 6], [4, 4], response_distill=False, attention_distill=False)
    ss, ts = maps((3, 6, 1, 1), (3, 6, 2, 2)), maps((3, 4, 1, 1), (3, 4, 2, 2), seed=1)
    assert standardize(ts[0]).abs().max() == 0
    for x in ss:
        x.requires_grad_()
    loss(torch.zeros(3, 2), torch.zeros(3, 2), ss, ts)[0].backward()
    assert ss[0].grad.abs().max() == 0
    assert ss[1].grad.abs().max() > 0
    assert standardize(torch.zeros(0, 3, 2, 2)).shape == (0, 3, 2, 2)


@pytest.mark.parametrize(("method", "same"), [("mse", True), ("fitnets", False)])
def test_the_unit_of_the_teachers_maps(method, same):
    """`mse` has no unit, so its weight means the same for every teacher; `fitnets` has the teacher's."""
    loss = DistillationLoss([6], [4], response_distill=False, attention_distill=False, feature_method=method)
    (s,), (t,) = maps((3, 6, 8, 8)), maps((3, 4, 8, 8), seed=1)
    logits = torch.zeros(3, 2)
    values = [loss(logits, logits, [s], [unit * t])[0].item() for unit in (1, 40)]
    assert (values[1] == pytest.approx(values[0], rel=1e-5)) == same


def test_maps_are_compared_in_one_format():
    (s,), (t,) = maps((3, 6, 8, 8)), maps((3, 4, 8, 8), seed=1)
    ((student, teacher),) = pair_maps([s], [t.to(memory_format=torch.channels_last)])  # a frozen student's, too
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in (student, teacher))
    ((student, teacher),) = pair_maps([s], [t])
    assert student is s
    assert teacher.is_contiguous()


def test_no_images_have_an_empty_gradient():
    s = torch.zeros(0, 4, 3, 3, requires_grad=True)
    (gradient,) = torch.autograd.grad(feature_loss([s], [torch.zeros(0, 4, 3, 3)]), s)
    assert gradient.shape == s.shape


def test_gradient_stays_of_one_size_over_temperatures():
    """The factor tau^2 cancels the 1/tau^2 by which softening shrinks the gradient."""
    norms = []
    for temperature in (10.0, 20.0, 40.0):
        s, t = maps((8, 10), (8, 10))
        response_loss(s.requires_grad_(), t, temperature).backward()
        norms.append(s.grad.norm().item())
    assert max(norms) / min(norms) < 1.1


def test_teacher_gets_no_gradient():
    s, t = maps((2, 3, 4, 4), (2, 3, 4, 4))
    logits_s, logits_t = maps((2, 5), (2, 5))
    for x in (s, t, logits_s, logits_t):
        x.requires_grad_()
    total = response_loss(logits_s, logits_t) + feature_loss([s], [t]) + attention_loss([s], [t])
    total.backward()
    assert s.grad.norm() > 0
    assert logits_s.grad.norm() > 0
    assert t.grad is None
    assert logits_t.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_extremes_are_finite(dtype):
    """Logits of +-1e4, all-zero maps, B = 1 and C = 1 give finite values and gradients."""
    s = torch.tensor([[1e4, -1e4, 0.0]], dtype=dtype, requires_grad=True)
    t = torch.tensor([[-1e4, 1e4, 0.0]], dtype=dtype)
    zeros = torch.zeros(1, 1, 2, 2, dtype=dtype, requires_grad=True)
    one = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    large = torch.full((1, 1, 2, 2), 1e4, dtype=dtype)
    losses = [
        response_loss(s, t),
        response_loss(one, one.detach()),
        attention_loss([zeros], [torch.zeros_like(zeros)]),
        attention_loss([zeros], [large]),
        feature_loss([zeros], [large]),
    ]
    assert [loss.dtype for loss in losses] == [torch.float32] * 5
    sum(losses).backward()
    assert all(loss.isfinite() for loss in losses)
    assert all(x.grad.isfinite().all() for x in (s, one, zeros))
    assert losses[1].item() == 0
    # All of the teacher's probability is at its largest logit, where the student's logarithm is the gap over 4
    gap = (s.double()[0, 0] - s.double()[0, 1]).item()
    assert losses[0].item() == pytest.approx(16 * gap / 4, rel=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: response_loss(torch.zeros(2, 3), torch.zeros(2, 4)), ["(2, 3)", "(2, 4)"]),
        (lambda: response_loss(torch.zeros(3), torch.zeros(3)), ["(3,)"]),
        (lambda: feature_loss([torch.zeros(2, 3, 4, 4)], [torch.zeros(2, 5, 4, 4)]), ["(2, 3, 4, 4)", "(2, 5, 4, 4)"]),
        (lambda: feature_loss([torch.zeros(1, 3, 4, 4)], [torch.zeros(2, 3, 4, 4)]), ["(1, 3, 4, 4)", "(2, 3, 4, 4)"]),
        (lambda: attention_loss([torch.zeros(2, 3, 4)], [torch.zeros(2, 3, 4)]), ["(2, 3, 4)"]),
        (lambda: attention_loss([torch.zeros(2, 3, 4, 4)], []), ["(2, 3, 4, 4)", "[]"]),
        (lambda: feature_loss([], []), ["[]"]),
        (lambda: DistillationLoss([8, 16], [8]), ["[8, 16]", "[8]"]),
        (
            lambda: DistillationLoss([8], [16])(
                torch.zeros(2, 3), torch.zeros(2, 3), [torch.zeros(2, 4, 2, 2)], [torch.zeros(2, 16, 2, 2)]
            ),
            ["[8]", "(2, 4, 2, 2)"],
        ),
    ],
)
def test_disagreeing_shapes_are_named(call, words):
    with pytest.raises(ValueError, match=r"shape|levels") as error:
        call()
    assert all(word in str(error.value) for word in words)


def inputs(dtype=torch.float32):
    logits = maps((4, 10), (4, 10), dtype=dtype)
    return (
        *logits,
        maps((4, 8, 8, 8), (4, 16, 4, 4), dtype=dtype, seed=1),
        maps((4, 12, 8, 8), (4, 24, 2, 2), dtype=dtype, seed=2),
    )


def test_module_is_the_weighted_sum():
    loss = DistillationLoss([8, 16], [12, 24], temperature=2.0, feature_weight=0.5, attention_weight=7.0)
    assert [(a.in_channels, a.out_channels, a.kernel_size) for a in loss.adapters] == [
        (8, 12, (1, 1)),
        (16, 24, (1, 1)),
    ]
    s, t, ss, ts = inputs()
    total, items = loss(s, t, ss, ts)
    adapted = [
        np.einsum("oi,bihw->bohw", a.weight.detach().double().numpy()[..., 0, 0], x)
        + a.bias.detach().double().numpy()[:, None, None]
        for a, x in zip(loss.adapters, arrays(ss), strict=True)
    ]
    expected = {
        "response_loss": numpy_response(*arrays((s, t)), 2.0),
        "feature_loss": np.mean(
            [((a - numpy_standardized(b)) ** 2).mean() for a, b in map(numpy_same_size, adapted, arrays(ts))]
        ),
        "attention_loss": numpy_attention(arrays(ss), arrays(ts)),
    }
    assert list(items) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(items[name].item(), value, **TOLERANCE)
        assert not items[name].requires_grad
    np.testing.assert_allclose(
        total.item(),
        0.1 * expected["response_loss"] + 0.5 * expected["feature_loss"] + 7 * expected["attention_loss"],
        rtol=1e-4,
    )
    total.backward()
    assert all(a.weight.grad.norm() > 0 for a in loss.adapters)


@pytest.mark.parametrize(
    ("switches", "names", "adapters"),
    [
        ({}, ["response_loss", "feature_loss", "attention_loss"], 2),
        ({"feature_distill": False}, ["response_loss", "attention_loss"], 0),
        ({"feature_weight": 0.0}, ["response_loss", "attention_loss"], 0),
        ({"attention_distill": False}, ["response_loss", "feature_loss"], 2),
        ({"attention_weight": 0.0}, ["response_loss", "feature_loss"], 2),
        ({"response_distill": False}, ["feature_loss", "attention_loss"], 2),
        ({"feature_distill": False, "attention_distill": False}, ["response_loss"], 0),
    ],
)
def test_module_computes_what_is_on(switches, names, adapters):
    loss = DistillationLoss([8, 16], [12, 24], **switches)
    assert list(loss(*inputs())[1]) == names
    assert len(loss.adapters) == adapters


def test_response_alone_needs_no_maps():
    s, t, *_ = inputs()
    total, items = DistillationLoss([], [], feature_distill=False, attention_distill=False)(s, t)
    assert total.item() == pytest.approx(0.1 * items["response_loss"].item())
    assert items["response_loss"].item() == pytest.approx(response_loss(s, t).item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_does_not_lower_the_precision(dtype):
    """Half-precision inputs under autocast give the float32 result of the same values."""
    loss = DistillationLoss([8, 16], [12, 24])
    halves = inputs(dtype)
    expected, _ = loss(*[x.float() if torch.is_tensor(x) else [y.float() for y in x] for x in halves])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = loss(*halves)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)


def test_one_step_moves_the_student_as_the_formula_does():
    """An optimizer step through the module and one through a plain re-computation give the same weights."""
    t, ts = maps((4, 10))[0], maps((4, 6, 3, 3), seed=5)
    x = maps((4, 3, 3, 3), seed=6)[0]

    def student():
        torch.manual_seed(1)
        return nn.Conv2d(3, 5, 1), nn.Linear(45, 10), DistillationLoss([5], [6])

    def step(compute):
        conv, linear, loss = student()
        parameters = [*conv.parameters(), *linear.parameters(), *loss.parameters()]
        features = conv(x)
        optimizer = torch.optim.SGD(parameters, lr=0.1)
        compute(loss, linear(features.flatten(1)), features).backward()
        optimizer.step()
        return torch.cat([p.detach().flatten() for p in parameters])

    def plain(loss, logits, features):
        p = (t / 4).softmax(1)
        response = 16 * (p * (p.log() - (logits / 4).softmax(1).log())).sum() / 4
        adapter = loss.adapters[0]
        adapted = torch.einsum("oi,bihw->bohw", adapter.weight[..., 0, 0], features) + adapter.bias[:, None, None]
        q_s, q_t = (y.square().mean(1).flatten(1) for y in (features, ts[0]))
        q_s, q_t = (q / q.square().sum(1, keepdim=True).sqrt() for q in (q_s, q_t))
        attention = (q_s - q_t).square().sum() / 4
        return (
            loss.weights["response_loss"] * response
            + loss.weights["feature_loss"] * (adapted - standardize(ts[0])).square().mean()
            + loss.weights["attention_loss"] * attention
        )

    ours = step(lambda loss, logits, features: loss(logits, t, [features], ts)[0])
    torch.testing.assert_close(ours, step(plain), rtol=1e-5, atol=1e-6)


def test_response_of_no_images_is_zero_and_has_a_gradient():
    s = torch.zeros(0, 5, requires_grad=True)
    loss = response_loss(s, torch.zeros(0, 5))
    loss.backward()
    assert loss == 0
    assert s.grad.shape == (0, 5)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weights", [[0.5, 0.5], [0.2, 0.7, 0.1]])
def test_average_logits_soften_to_the_mean_distribution(weights, temperature):
    logits = [3 * x for x in maps(*[(6, 10)] * len(weights), dtype=torch.float64)]
    powers = [np.exp(x / temperature) for x in arrays(logits)]
    expected = sum(w * p / p.sum(1, keepdims=True) for w, p in zip(weights, powers, strict=True))
    softened = (average_logits(logits, weights, temperature) / temperature).softmax(1)
    np.testing.assert_allclose(softened.numpy(), expected, rtol=1e-9)


def test_average_of_one_is_itself_and_extremes_stay_finite():
    (x,) = maps((4, 3))
    assert average_logits([x], [1.0]) is x
    far = torch.tensor([[1e4, -1e4]]), torch.tensor([[-1e4, 1e4]])
    torch.testing.assert_close(average_logits(far, [0.5, 0.5], 1.0).softmax(1), torch.tensor([[0.5, 0.5]]))
    assert average_logits([x.half(), x.half()], [0.5, 0.5]).dtype == torch.float32


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_compressed_logits_keep_the_mass(temperature):
    """At the temperature: the top probabilities, and the sum of the others, against a NumPy evaluation."""
    logits = torch.randn(6, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    values, indices, rest = compress_logits(logits, 20, temperature)
    restored = (restore_logits(values, indices, rest, 200) / temperature).softmax(1).numpy()
    powers = np.exp(logits.numpy() / temperature)
    expected = powers / powers.sum(1, keepdims=True)
    order = np.argsort(-expected, 1)
    top, others = order[:, :20], order[:, 20:]
    np.testing.assert_allclose(np.take_along_axis(restored, top, 1), np.take_along_axis(expected, top, 1), rtol=1e-9)
    shares = np.take_along_axis(restored, others, 1)
    np.testing.assert_allclose(shares.sum(1), np.take_along_axis(expected, others, 1).sum(1), rtol=1e-9)
    np.testing.assert_allclose(shares.std(1), 0, atol=1e-12)


def test_compressed_extremes_stay_finite():
    logits = torch.full((1, 200), -1e4).index_fill(1, torch.tensor([3]), 1e4)
    restored = restore_logits(*compress_logits(logits, 10), 200)
    torch.testing.assert_close(restored, logits)


@pytest.mark.parametrize("method", ["mse", "fitnets"])
def test_adapters_are_fitted_by_ridge_regression(method):
    """As NumPy solves it: the bias free, weights held by the channels' mean square, the more the fewer positions."""
    loss = DistillationLoss([3, 5], [4, 2], feature_method=method, attention_distill=False)
    generator = torch.Generator().manual_seed(0)

    def maps(channels, size):
        return [torch.randn(6, c, size, size, generator=generator) * 3 + 1 for c in channels]

    batches = [(maps([3, 5], 4), maps([4, 2], 4)) for _ in range(3)]
    loss.fit_adapters(batches)
    for level, adapter in enumerate(loss.adapters):
        x, y = (
            np.concatenate(
                [m[level].double().numpy().transpose(0, 2, 3, 1).reshape(-1, m[level].shape[1]) for m in side]
            )
            for side in zip(*batches, strict=True)
        )
        if method == "mse":  # each batch is standardised by itself
            y = np.concatenate([(part - part.mean(0)) / part.std(0) for part in np.split(y, 3)])
        x = np.concatenate([np.ones((len(x), 1)), x], 1)
        square = x.T @ x
        penalty = (
            (0.01 + (x.shape[1] - 1) / len(x))
            * np.mean(np.diag(square)[1:])
            * np.diag([0.0] + [1.0] * (x.shape[1] - 1))
        )
        solved = np.linalg.solve(square + penalty, x.T @ y)
        np.testing.assert_allclose(adapter.bias.detach().numpy(), solved[0], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(adapter.weight.detach().numpy()[:, :, 0, 0], solved[1:].T, rtol=1e-3, atol=1e-4)


def test_fitted_adapters_say_what_is_there_to_say():
    """Teacher maps that are made of the student's are matched; of unrelated ones no adapter says more than the mean."""
    student = [torch.randn(16, 8, 6, 6)]
    mixing = torch.randn(12, 8)
    related = [torch.einsum("oc,bchw->bohw", mixing, student[0]) * 40 + 7]
    unrelated = [torch.randn(16, 12, 6, 6)]
    for teacher, low, high in ((related, 0, 0.01), (unrelated, 0.9, 1.0)):
        loss = DistillationLoss([8], [12], attention_distill=False, response_distill=False)
        before = loss.losses(torch.zeros(16, 0), torch.zeros(16, 0), student, teacher)["feature_loss"].item()
        loss.fit_adapters([(student, teacher)] * 2)
        after = loss.losses(torch.zeros(16, 0), torch.zeros(16, 0), student, teacher)["feature_loss"].item()
        assert low <= after <= high < before


def test_what_is_no_convolution_to_the_teachers_maps_is_not_fitted():
    loss = DistillationLoss([8], [12], feature_method="vid", attention_distill=False)
    before = copy.deepcopy(loss.state_dict())
    loss.fit_adapters([([torch.randn(4, 8, 6, 6)], [torch.randn(4, 12, 6, 6)])])
    assert all(torch.equal(before[k], v) for k, v in loss.state_dict().items())


def test_a_student_that_says_nothing_gets_the_mean():
    loss = DistillationLoss([8], [12], feature_method="fitnets", attention_distill=False)
    teacher = torch.randn(4, 12, 6, 6) + 3
    loss.fit_adapters([([torch.zeros(4, 8, 6, 6)], [teacher])])
    assert loss.adapters[0].bias.detach() == pytest.approx(teacher.mean((0, 2, 3)).numpy(), rel=1e-4)
    assert not loss.adapters[0].weight.any()
