"""A model with methods that break, for the tests of worker processes: those import it by its name."""

import os
import signal
from pathlib import Path

import torch
from transformers import BertForSequenceClassification

from longspan.errors import NotFiniteError


class Fragile(BertForSequenceClassification):
    def __init__(self, config):
        super().__init__(config)
        self.cores = sorted(os.sched_getaffinity(0))

    def where(self):
        """(process id, cores while loading, threads, the memory map of the weights)."""
        maps = Path("/proc/self/smaps").read_text().split("VmFlags")
        weights = [part for part in maps if "model.safetensors" in part]
        return os.getpid(), self.cores, torch.get_num_threads(), weights

    def echo(self, value):
        return value

    def fail(self):
        raise NotFiniteError("scores")

    def give_what_cannot_travel(self):
        return lambda: None

    def die(self):
        os.kill(os.getpid(), signal.SIGKILL)

    def die_once(self, marker):
        if not Path(marker).exists():
            Path(marker).touch()
            self.die()
        return os.getpid()
