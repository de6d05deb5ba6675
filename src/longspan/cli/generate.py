"""`longspan generate`: what a language model writes after a prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from longspan.cli.quiet import quiet_transformers


def generate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub name of a language model.")],
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to write.")] = 500,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; higher is wilder.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from so many likeliest tokens only.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Draw from the likeliest tokens that together have this probability.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed writes the same text.")] = 0,
) -> None:
    """Write on from a prompt, a token at a time."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from longspan.inference.generate import Sampling, generate_text
    from longspan.tasks.language import load_language_model

    quiet_transformers()
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    loaded, tokenizer = load_language_model(model)
    pending = [prompt]  # is echoed once it is known to be readable

    def write(text: str) -> None:
        while pending:
            typer.echo(pending.pop(), nl=False)
        typer.echo(text, nl=False)

    done = generate_text(loaded, tokenizer, prompt, sampling, write=write)
    typer.echo()
    typer.echo(f"{done.tokens:,} tokens in {done.seconds:.1f} s, {done.tokens / done.seconds:,.0f} a second", err=True)
