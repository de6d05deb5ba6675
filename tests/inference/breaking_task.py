"""A task without a model, whose documents can make it break; worker processes and actors import it by its name."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow

from longspan.inference.corpus_worker import Task


@dataclass(frozen=True, kw_only=True)
class Lengths(Task):
    """How many characters a document has. What it says is done: fail, cannot, die, or die once (see `marker`)."""

    marker: str = ""
    name: ClassVar = "lengths"

    def check(self):
        if self.marker == "nowhere":
            raise ValueError("the marker is nowhere")

    def columns(self):
        return {"process": pyarrow.int64()}

    def load(self):
        if self.marker == "broken":
            raise OSError("the task is broken")
        return self.read

    def read(self, texts):
        for text in texts:
            if text == "fail":
                raise RuntimeError("out of memory")
            if text == "cannot":
                raise NotImplementedError("no kernel for this processor")
            if text == "die" or (text == "die once" and not Path(self.marker).exists()):
                Path(self.marker).touch()
                os.kill(os.getpid(), signal.SIGKILL)
        return [{"tokens": len(text), "process": os.getpid()} for text in texts]
