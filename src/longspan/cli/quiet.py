"""What keeps transformers from talking between the lines of a command's own output."""


def quiet_transformers() -> None:
    """No loading reports and no bars for reading and writing weights; what matters is raised as an error."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
