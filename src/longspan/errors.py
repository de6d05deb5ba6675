"""What a caller can get wrong, as types. Each is also the built-in error that code without longspan would expect."""


class DocumentError(ValueError):
    """A document that holds no text: empty, binary, or in another encoding."""


class QuestionError(ValueError):
    """A question that is empty, or too long for the model."""


class CheckpointError(OSError):
    """A model directory or hub name that gives no usable reader."""


class NotFiniteError(ValueError):
    """A model whose output is NaN or infinite."""

    def __init__(self, output: str):
        super().__init__(
            f"the model gives NaN or infinite {output}, so it cannot rank answers; check that its weights are complete "
            "and, if it runs in half precision, try dtype float32."
        )
