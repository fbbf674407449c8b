"""The losses of other libraries are the same work as ours."""

import pytest
import torch
from helpers import load_benchmark
from ultralytics import YOLO
from ultralytics.utils.distillation import response_loss

peers = load_benchmark("peers")


@pytest.mark.parametrize("peer", peers.PEERS)
def test_peers_do_the_same_work(peer, teacher):
    """Their loss on a batch is 0.3 x cross-entropy + 0.7 x response, as ours is."""
    pytest.importorskip(peer)
    student, frozen = (YOLO(teacher).model.eval() for _ in range(2))
    with torch.no_grad():
        student.model[-1].linear.weight *= 0.5
    batch = {"img": torch.rand(4, 3, 32, 32), "cls": torch.arange(4)}
    total, _ = peers.PEERS[peer](student, frozen)(batch)
    student.eval()
    s, t = student(batch["img"])[1], frozen(batch["img"])[1]
    expected = 0.3 * torch.nn.functional.cross_entropy(s, batch["cls"]) + 0.7 * response_loss(s, t)
    torch.testing.assert_close(total, expected)
