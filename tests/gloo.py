"""The trainer in several processes on the CPU: only device and process group are not those of GPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from torch import nn
from ultralytics.engine import validator
from ultralytics.models.yolo.classify.distill_train import DistillationClassificationTrainer
from ultralytics.models.yolo.obb.distill_train import DistillationOBBTrainer
from ultralytics.nn.autobackend import AutoBackend
from ultralytics.utils import RANK
from ultralytics.utils.dist import find_free_network_port
from ultralytics.utils.torch_utils import unwrap_model

TESTS = Path(__file__).parent


class OnCPU(nn.parallel.DistributedDataParallel):
    """DDP takes no device indices on the CPU."""

    def __init__(self, module, device_ids=None, **kwargs):
        super().__init__(module, **kwargs)


class Gloo:
    """Says into files beside the run folders what each process did."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = {"save_model": 0, "save_metrics": 0, "teacher": 0}
        if RANK == -1:
            self.world_size, self.ddp = 2, True  # as device=0,1 makes it

    def _setup_ddp(self):
        dist.init_process_group("gloo", rank=RANK, world_size=self.world_size)
        nn.parallel.DistributedDataParallel = OnCPU
        # The final validation asks for this process's CUDA device
        validator.get_torch_device_backend = lambda device: SimpleNamespace(current_device=lambda: 0)
        validator.AutoBackend = lambda device, **kwargs: AutoBackend(device=torch.device("cpu"), **kwargs)

    def _setup_train(self):
        super()._setup_train()
        self.begun = {k: v.clone() for k, v in unwrap_model(self.model).state_dict().items()}

    def preprocess_batch(self, batch):
        self.calls["teacher"] += 1
        return super().preprocess_batch(batch)

    def save_metrics(self, metrics):
        self.calls["save_metrics"] += 1
        super().save_metrics(metrics)

    def save_model(self):
        self.calls["save_model"] += 1
        saved = super().save_model()
        if os.environ.get("STOP_AFTER") == str(self.epoch):
            raise RuntimeError("stopped as the test wants it")
        return saved

    def final_eval(self):
        cached = getattr(self.distiller, "cached", None)
        report = {
            "weights": unwrap_model(self.model).state_dict(),
            "begun": self.begun,
            "calls": self.calls,
            "teacher": self.teacher.content_hash,
            "start_epoch": self.start_epoch,
            "batch": self.train_loader.batch_size,
            "world_size": self.world_size,
            "save_dir": str(self.save_dir),
            **({"hits": cached.cache.hits, "misses": cached.cache.misses} if cached else {}),
        }
        torch.save(report, Path(self.args.project) / f"rank{RANK}.pt")
        super().final_eval()


class GlooTrainer(Gloo, DistillationClassificationTrainer):
    """Of a classifier."""


class GlooOBBTrainer(Gloo, DistillationOBBTrainer):
    """Of oriented boxes."""


class GlooCompiledTrainer(GlooTrainer):
    """Traces the student as `compile=True` does, without a compiler, which takes minutes."""

    def _setup_train(self):
        compile_network = torch.compile
        torch.compile = lambda network, **given: compile_network(network, backend="eager")
        super()._setup_train()


class GradientTrainer(GlooTrainer):
    """Computes the gradient of one batch of 16 images, each process of its share, with BatchNorm as in evaluation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if RANK == -1:
            self.world_size, self.ddp = 0, False

    def _do_train(self):
        if RANK != -1:
            self._setup_ddp()
        DistillationClassificationTrainer._setup_train(self)
        self.model.eval()  # statistics of a half batch are not those of the whole
        student = getattr(self.model, "module", self.model)
        for module in student.modules():
            module.training = isinstance(module, (type(student), type(student.model[-1])))  # logits, not probabilities
        torch.manual_seed(0)  # each process begins with weights of its own, and DDP takes the first's
        for parameter in student.parameters():
            nn.init.normal_(parameter.data, std=0.05)
        images = [self.test_loader.dataset[i] for i in range(0, 48, 3)]  # not augmented
        share = images[max(RANK, 0) :: max(self.world_size, 1)]
        batch = {k: torch.stack([torch.as_tensor(x[k]) for x in share]) for k in ("img", "cls")}
        loss, _ = self.model(self.preprocess_batch(batch))
        loss.backward()
        gradients = {n: p.grad for n, p in student.named_parameters()}
        torch.save(gradients, Path(self.args.project) / f"gradient{RANK}.pt")


def launch(trainer_class, settings, nodes=1, processes=2):
    """Run one trainer in several processes by torchrun, as on several hosts, and return their output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(nodes)]
    command += ["--nproc_per_node", str(processes), "--master_addr", "127.0.0.1"]
    command += ["--master_port", str(find_free_network_port())]
    hosts = [
        subprocess.Popen(
            [*command, "--node_rank", str(rank), str(TESTS / "gloo.py"), trainer_class, json.dumps(settings)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])},
        )
        for rank in range(nodes)
    ]
    outputs = [host.communicate(timeout=300)[0] for host in hosts]
    assert all(host.returncode == 0 for host in hosts), outputs
    return outputs


def reports(settings):
    """Return what two processes have said."""
    return [torch.load(Path(settings["project"]) / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def parameters(state):
    """Leave out BatchNorm's statistics, which each process has of its own, as in upstream's training."""
    return {k: v for k, v in state.items() if "running" not in k and "num_batches" not in k}


def note_epoch(trainer):
    """Write down, as a user's callback, which process ended which epoch."""
    with (Path(trainer.args.project) / "callback.txt").open("a") as file:
        file.write(f"{RANK} {trainer.epoch}\n")


if __name__ == "__main__":
    import gloo  # by its name, as it is pickled

    getattr(gloo, sys.argv[1])(overrides=json.loads(sys.argv[2])).train()
