import pytest
from tests.training.small_data import write_small_data

from longspan.training.evidence_rows import load_articles


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    return write_small_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def articles(data, tokenizer, tmp_path_factory):
    return load_articles(data, tmp_path_factory.mktemp("cache"), tokenizer)
