from tests.training.conftest import articles, data  # noqa: F401
