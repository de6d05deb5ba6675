import numpy as np
import pytest
import torch

from longspan.training.curriculum import Curriculum, Phase
from longspan.training.token_rows import TrainingRows, dev_batches, hidden_tokens, next_token

TOKENS = np.arange(1000, dtype=np.uint16)
PHASES = Curriculum(
    phases=(
        Phase(steps=20, length=16, batch=4, learning_rate=1.0),
        Phase(steps=5, length=32, batch=2, learning_rate=1.0),
    )
)


def rows(parts=1, seed=0, tokens=TOKENS):
    return TrainingRows(tokens, PHASES, next_token(), parts=parts, seed=seed)


def test_items_are_the_batches_of_the_phases():
    data = rows()
    assert len(data) == 25
    assert [tuple(data[item]["input_ids"].shape) for item in (0, 19, 20, 24)] == [(4, 16), (4, 16), (2, 32), (2, 32)]
    ids, labels = data[3]["input_ids"], data[3]["labels"]
    assert (ids.diff() == 1).all()  # a stretch of the text
    assert (labels[:, 0] == -100).all() and (labels[:, 1:] == ids[:, 1:]).all()


def test_an_item_is_the_same_whatever_was_read_before():
    forward, backward = rows(), rows()
    items = [forward[item]["input_ids"] for item in range(25)]
    for item in reversed(range(25)):
        assert torch.equal(backward[item]["input_ids"], items[item])
    assert not torch.equal(rows(seed=1)[0]["input_ids"], items[0])


def test_parts_of_a_step_are_its_rows():
    whole, halves = rows(), rows(parts=2)
    for step in (0, 7, 19, 22):
        parts = [halves[2 * step + part]["input_ids"] for part in (0, 1)]
        assert torch.equal(torch.cat(parts), whole[step]["input_ids"])


def test_a_pass_reads_every_row_once_and_the_next_one_cuts_elsewhere():
    starts = torch.cat([rows()[item]["input_ids"][:, 0] for item in range(20)]).tolist()
    count = (len(TOKENS) - 15) // 16
    assert len(set(starts[:count])) == count
    assert len({start % 16 for start in starts[:count]}) == 1
    assert starts[count] % 16 != starts[0] % 16


def test_a_text_of_one_row_is_read_whole():
    data = rows(tokens=TOKENS[:32])
    assert data[24]["input_ids"].tolist() == [list(range(32))] * 2
    with pytest.raises(ValueError, match="has 31 tokens and phase 2 reads rows of 32: give more text"):
        rows(tokens=TOKENS[:31])
    with pytest.raises(ValueError, match="phase 1 has 4 rows a step, which 3 batches"):
        rows(parts=3)


def test_dev_is_read_from_its_beginning_in_equal_batches():
    batches = dev_batches(TOKENS, 16, 4, 200, next_token())
    assert [batch["input_ids"].shape for batch in batches] == [(4, 16)] * 3
    assert torch.cat([batch["input_ids"] for batch in batches]).flatten().tolist() == list(range(192))
    assert dev_batches(TOKENS[:40], 16, 4, 200, next_token())[0]["input_ids"].shape == (2, 16)
    with pytest.raises(ValueError, match="dev split has 15 tokens, less than one row of 16"):
        dev_batches(TOKENS[:15], 16, 4, 200, next_token())


def test_hidden_tokens_are_decided_by_the_seed_and_never_special(tokenizer):
    objective = hidden_tokens(tokenizer, 0.3)
    ids = torch.randint(50, 60, (8, 30))
    batch, again = objective.make(ids, 5), objective.make(ids, 5)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(batch["labels"], objective.make(ids, 6)["labels"])
    hidden = batch["labels"] != -100
    assert batch["input_ids"].shape == (8, 32) and 0.2 < hidden.float().mean() < 0.4
    assert not hidden[:, 0].any() and not hidden[:, -1].any()
    assert (batch["input_ids"][:, 0] == tokenizer.cls_token_id).all()
    assert (batch["input_ids"][:, -1] == tokenizer.sep_token_id).all()
    inside = batch["input_ids"][:, 1:-1]
    assert torch.equal(batch["labels"][:, 1:-1][hidden[:, 1:-1]], ids[hidden[:, 1:-1]])
    assert torch.equal(inside[~hidden[:, 1:-1]], ids[~hidden[:, 1:-1]])
    assert (inside[hidden[:, 1:-1]] == tokenizer.mask_token_id).float().mean() > 0.6


def test_masking_needs_a_tokenizer_that_masks(tokenizer):
    from longspan.models.text_tokenizers import byte_tokenizer

    with pytest.raises(ValueError, match="needs a tokenizer with a mask token"):
        hidden_tokens(byte_tokenizer())
    with pytest.raises(ValueError, match=r"must lie between 0 and 1; got 1\.0"):
        hidden_tokens(tokenizer, 1.0)


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_of_a_batch_are_its_rows_in_stretches(shards):
    whole, cut = rows(parts=2), TrainingRows(TOKENS, PHASES, next_token(), parts=2, seed=0, shards=shards)
    assert len(cut) == shards * len(whole)
    dev, dev_cut = (dev_batches(TOKENS, 16, 4, 200, next_token(), shards=count) for count in (1, shards))
    for batches, parts in ((whole, cut), (dev, dev_cut)):
        for item in (0, 1, len(batches) - 1):
            own = [parts[item * shards + shard] for shard in range(shards)]
            for name in ("input_ids", "labels"):
                assert torch.equal(torch.cat([part[name] for part in own], 1), batches[item][name])
            assert max(len(part["input_ids"][0]) for part in own) - min(len(part["input_ids"][0]) for part in own) <= 1
