"""`longspan train`: fine-tuning on a task, language models, and the run that made the reader that longspan ships."""

from __future__ import annotations

import os
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from longspan.cli.quiet import quiet_transformers

app = typer.Typer(help="Train a model.", no_args_is_help=True)


@app.callback()
def _options() -> None: ...


@app.command()
def reader(
    base: Annotated[str, typer.Option(help="Directory or hub name of a BERT-like sentence encoder to start from.")],
    data: Annotated[Path, typer.Option(help="Folder with boolq_articles, fever, multirc and xquad.")],
    output: Annotated[Path, typer.Option(help="Directory for checkpoints and the model; a run found there goes on.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 1500,
    batch: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 8,
    learning_rate: Annotated[float, typer.Option(help="Of the encoder; the scorers learn faster.")] = 1e-4,
    bf16: Annotated[
        bool | None, typer.Option(help="Compute in bfloat16. Default: where the processor has instructions for it.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the data order and every random choice.")] = 0,
) -> None:
    """Train the evidence reader of `longspan answer`."""
    from longspan.training.reader import ReaderTraining, train_reader

    config = ReaderTraining(
        base=base,
        data=str(data),
        output=str(output),
        steps=steps,
        batch=batch,
        learning_rate=learning_rate,
        bf16=bf16,
        threads=threads,
        seed=seed,
    )
    typer.echo(f"wrote {train_reader(config)}")


@app.command()
def task(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory or hub name of a checkpoint to start from.")],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Directory for checkpoints and the model; a run found there goes on.")
    ],
    name: Annotated[
        str | None,
        typer.Option("--task", help="A task of SuperGLUE (boolq, cb, copa, ...), imdb or 20newsgroups."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder with SuperGLUE's folders, for its tasks.")] = None,
    train: Annotated[
        Path | None, typer.Option(help="Or a file with rows to train on: .csv, .tsv, .tab or .jsonl.")
    ] = None,
    dev: Annotated[
        Path | None, typer.Option(help="Rows that choose the best checkpoint. Default: a tenth of --train.")
    ] = None,
    test: Annotated[Path | None, typer.Option(help="Rows that are read at the end.")] = None,
    text_column: Annotated[
        str, typer.Option(help="Name of the column, or its number from 0 in a file whose first row names none.")
    ] = "text",
    label_column: Annotated[str, typer.Option(help="Column of the labels.")] = "label",
    text_pair_column: Annotated[str | None, typer.Option(help="Column of a second text, for pairs.")] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(help="Longest row; the rest is cut. More than MODEL reads makes it long. Default: what it reads."),
    ] = None,
    window: Annotated[int, typer.Option(help="Tokens that a token of a model made long sees, both sides.")] = 512,
    epochs: Annotated[float, typer.Option(help="Passes over the training rows.")] = 3.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, in place of --epochs.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows that a process computes at a time.")] = 16,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="The highest; it rises first and falls then.")] = 3e-5,
    evaluate_steps: Annotated[
        int | None, typer.Option(min=1, help="Steps between readings of dev. Default: once a pass.")
    ] = None,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
    bf16: Annotated[
        bool | None, typer.Option(help="Compute in bfloat16. Default: where the processor has instructions for it.")
    ] = None,
    new_head: Annotated[
        bool, typer.Option(help="Draw the classifier anew where MODEL has one for other labels.")
    ] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")] = None,
    seed: Annotated[int, typer.Option(help="Decides splits, order and every random choice.")] = 0,
) -> None:
    """Fine-tune a model on a task, and keep the weights that are best on its dev split."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from longspan.tasks.fine_tune import chosen_task, fine_tune
    from longspan.tasks.text_files import Columns

    quiet_transformers()
    columns = Columns(text=text_column, label=label_column, text_pair=text_pair_column)
    chosen = chosen_task(name, data=data, train=train, dev=dev, test=test, columns=columns, seed=seed)
    done = fine_tune(
        model,
        chosen,
        output=out,
        max_tokens=max_tokens,
        window=window,
        new_head=new_head,
        epochs=epochs,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        learning_rate=learning_rate,
        evaluate_steps=evaluate_steps,
        save_steps=save_steps,
        bf16=bf16,
        seed=seed,
    )
    if os.environ.get("RANK", "0") != "0":  # under torchrun the first process speaks for all
        return
    typer.echo(f"wrote {done.model}, the best of {done.steps} steps (step {done.best_step})")
    for split, figures in (("dev", done.dev), ("test", done.test)):
        if figures is not None:
            typer.echo(f"{split}: " + ", ".join(f"{figure} {value:.4f}" for figure, value in figures.items()))
    if done.predictions is not None:
        typer.echo(f"wrote {done.predictions}")


class Tokenization(str, Enum):
    """What a token is."""

    character = "character"
    byte = "byte"
    bpe = "bpe"


SequenceParallel = Annotated[
    int, typer.Option(min=1, help="Processes that share each row; torchrun starts a multiple of so many.")
]
ShardWeights = Annotated[
    bool, typer.Option("--shard-weights", help="Each process keeps a share of weights and optimizer (FSDP).")
]
Timeout = Annotated[int, typer.Option(min=1, help="Seconds that a process waits for another one.")]


@app.command()
def lm(
    recipe: Annotated[str, typer.Option(help="longformer-tiny, longformer-small, longformer-large or longnet-tiny.")],
    data: Annotated[
        Path,
        typer.Option(help="text8, enwik8, another text file, or a folder of .txt files (train, dev, test, or any)."),
    ],
    output: Annotated[
        Path | None,
        typer.Option(help="Directory for checkpoints and the model; a run found there goes on. Default: RECIPE-DATA."),
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="Folder of token files, which runs may share. Default: OUTPUT-tokens.")
    ] = None,
    tokenizer: Annotated[
        Tokenization | None, typer.Option(help="What a token is. Default: a byte for enwik8, else a character.")
    ] = None,
    vocab_size: Annotated[int, typer.Option(min=257, help="Of --tokenizer bpe.")] = 8192,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Steps altogether; each phase keeps its share. Default: the recipe's.")
    ] = None,
    accumulate: Annotated[
        int | None,
        typer.Option(min=1, help="Batches that a step is computed in, to save memory. Default: the recipe's."),
    ] = None,
    evaluate_steps: Annotated[int, typer.Option(min=1, help="Steps between readings of dev.")] = 500,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
    log_steps: Annotated[int, typer.Option(min=1, help="Steps between lines of progress.")] = 20,
    bf16: Annotated[
        bool | None, typer.Option(help="Compute in bfloat16. Default: where the processor has instructions for it.")
    ] = None,
    sequence_parallel: SequenceParallel = 1,
    shard_weights: ShardWeights = False,
    timeout: Timeout = 60,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the schedule and its cost, and stop.")] = False,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")] = None,
    seed: Annotated[
        int, typer.Option(help="Decides the weights to begin with, the order and every random choice.")
    ] = 0,
) -> None:
    """Train a language model by a recipe, phase by phase."""
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    from longspan.distributed.processes import first_process_first, join_processes, lost_processes_told
    from longspan.recipes.language_models import recipe_of
    from longspan.training.language import LanguageTraining, cost_lines, train_language_model
    from longspan.training.texts import find_texts
    from longspan.training.token_files import make_token_files

    quiet_transformers()
    chosen = recipe_of(recipe)
    texts = find_texts(data)
    output = output or Path(f"{recipe}-{texts.name.removesuffix('.txt')}")
    kind = tokenizer.value if tokenizer else "byte" if texts.name == "enwik8" else "character"
    curriculum = chosen.curriculum if steps is None else chosen.curriculum.in_steps(steps)
    if dry_run:
        torch.manual_seed(seed)
        vocabulary = {"byte": 256, "bpe": vocab_size}.get(kind, 27)
        for line in cost_lines(curriculum, chosen.model(vocabulary)):
            typer.echo(line)
        return
    join_processes(timeout)
    with lost_processes_told(timeout), first_process_first():
        made = make_token_files(
            texts, tokens or output.with_name(f"{output.name}-tokens"), kind, vocab_size=vocab_size, tell=_tell
        )
    settings: dict[str, Any] = chosen.settings | ({} if accumulate is None else {"accumulate": accumulate})
    config = LanguageTraining(
        output=str(output),
        curriculum=curriculum,
        evaluate_steps=evaluate_steps,
        save_steps=save_steps,
        log_steps=log_steps,
        bf16=bf16,
        sequence_parallel=sequence_parallel,
        shard_weights=shard_weights,
        timeout_seconds=timeout,
        seed=seed,
        **settings,
    )
    torch.manual_seed(seed)  # a run that goes on begins with the same weights
    done = train_language_model(chosen.model(len(made.tokenizer)), made, config, tell=_tell)
    _report_language_model(done)


@app.command()
def mlm(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Masked language model, such as `longspan convert` made long.")
    ],
    out: Annotated[
        Path, typer.Argument(metavar="OUT", help="Directory for checkpoints and the model; a run found there goes on.")
    ],
    data: Annotated[Path, typer.Option(help="A text file, or a folder of .txt files (train, dev, test, or any).")],
    tokens: Annotated[
        Path | None, typer.Option(help="Folder of token files, which runs may share. Default: OUT-tokens.")
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=3, help="Tokens of a row. Default: what MODEL reads, at most 4,096.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 3000,
    batch: Annotated[int, typer.Option(min=1, help="Rows a step.")] = 64,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches that a step is computed in, to save memory.")] = 32,
    learning_rate: Annotated[float, typer.Option(help="The highest; it rises first and falls then to 0.")] = 3e-5,
    warmup_steps: Annotated[int | None, typer.Option(min=0, help="Default: 500, at most a tenth of the steps.")] = None,
    masked: Annotated[float, typer.Option(help="Share of the tokens that is hidden.")] = 0.15,
    evaluate_steps: Annotated[int, typer.Option(min=1, help="Steps between readings of dev.")] = 500,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 200,
    log_steps: Annotated[int, typer.Option(min=1, help="Steps between lines of progress.")] = 20,
    bf16: Annotated[
        bool | None, typer.Option(help="Compute in bfloat16. Default: where the processor has instructions for it.")
    ] = None,
    sequence_parallel: SequenceParallel = 1,
    shard_weights: ShardWeights = False,
    timeout: Timeout = 60,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")] = None,
    seed: Annotated[int, typer.Option(help="Decides the order, what is hidden and every random choice.")] = 0,
) -> None:
    """Go on with masked language modeling at a model's new length; its global projections follow its local ones."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from longspan.training.masked import MaskedTraining, train_masked

    quiet_transformers()
    config = MaskedTraining(
        source=model,
        data=str(data),
        output=str(out),
        tokens=None if tokens is None else str(tokens),
        length=length,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        learning_rate=learning_rate,
        warmup_steps=warmup_steps,
        masked=masked,
        evaluate_steps=evaluate_steps,
        save_steps=save_steps,
        log_steps=log_steps,
        bf16=bf16,
        sequence_parallel=sequence_parallel,
        shard_weights=shard_weights,
        timeout_seconds=timeout,
        seed=seed,
    )
    _report_language_model(train_masked(config, tell=_tell))


def _tell(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # under torchrun the first process speaks for all
        typer.echo(line, err=True)


def _report_language_model(done: Any) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    typer.echo(
        f"wrote {done.model}: {done.bits:.4f} bits per {done.unit} on dev, after {done.tokens / 1e6:,.1f} M tokens at "
        f"{done.tokens_per_second:,.0f} tokens/s, {done.peak_memory_gib:.2f} GiB at most"
    )
    typer.echo(f"wrote {done.model.parent / 'curves.png'}")
