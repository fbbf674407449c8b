"""A trainer that is killed at a given instant, and the processes that run it."""

import multiprocessing
import os
import signal
import threading

from ultralytics.models.distillation import TRAINERS

PHASES = ("training", "validation", "writing", "finishing")


class Mortal:
    """A trainer that gets a SIGKILL some seconds after a phase has begun, as if from outside."""

    death: tuple[str, float] | None = None  # phase, seconds

    def _begin(self, phase):
        if self.death and phase == self.death[0]:
            threading.Timer(self.death[1], os.kill, (os.getpid(), signal.SIGKILL)).start()
            self.death = None

    def _model_train(self):
        super()._model_train()
        self._begin("training")

    def validate(self):
        self._begin("validation")
        return super().validate()

    def save_model(self):
        self._begin("writing")
        return super().save_model()

    def final_eval(self):
        self._begin("finishing")
        super().final_eval()


def _train(task, arguments, death, pipe, start):
    trainer_class = type("Trainer", (Mortal, TRAINERS[task]), {"death": death})
    try:
        if start is not None:
            start.wait()
        trainer = trainer_class(overrides=arguments)
        trainer.train()
        pipe.send(str(trainer.save_dir))
    except Exception as e:
        pipe.send(e)


class Process:
    """A run in a process of its own."""

    context = multiprocessing.get_context("forkserver")  # imports torch and ultralytics once
    context.set_forkserver_preload(["mortal", "polars", "torchvision.models"])

    def __init__(self, arguments, death=None, start=None, task="classify"):
        self.pipe, theirs = self.context.Pipe(duplex=False)
        self.process = self.context.Process(target=_train, args=(task, arguments, death, theirs, start))
        self.process.start()
        theirs.close()

    def end(self):
        """Wait, and return the run's folder, the error that it ended with, or None if it was killed."""
        self.process.join(300)
        assert self.process.exitcode in {0, -signal.SIGKILL}
        return self.pipe.recv() if self.process.exitcode == 0 else None
