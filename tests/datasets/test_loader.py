"""Mixtures and batches: shares, order, resume, ranks, and what is skipped."""

from __future__ import annotations

import json
import logging
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from minigpt4.batch import Batch
from minigpt4.config import load_config
from minigpt4.conversation.encoder import ConversationEncoder
from minigpt4.datasets.conversations import Conversations
from minigpt4.datasets.loader import StreamPlan, build_loader, fixed_batches
from minigpt4.datasets.mixture import Mixture
from minigpt4.datasets.source import Example, Source
from minigpt4.datasets.web_pairs import WebPairs
from minigpt4.errors import ConfigError, DataError
from tests.datasets.parts import (
    answers,
    encoder,
    image_bytes,
    processor,
    web_pairs,
    write_conversations,
    write_prompts,
    write_shard,
    write_shards,
)


def build_sources(folder: Path) -> dict[str, Source]:
    rows = Conversations.Config(
        path=str(write_conversations(folder / "rows", 17)), prompts=write_prompts(folder), weight=2.0
    )
    web = web_pairs(write_shards(folder / "web", shards=3, each=10), shuffle_buffer=8, weight=6.0)
    return {"web": web, "rows": Conversations.from_config(rows, name="rows")}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    return build_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def mixture(sources: dict[str, Source]) -> Mixture:
    return Mixture(sources)


@pytest.fixture(scope="module")
def encode() -> ConversationEncoder:
    return encoder(template="vicuna_v0")


def batches(mixture: Mixture, encode: ConversationEncoder, count: int, **plan: Any) -> list[Batch]:
    settings = StreamPlan(**{"seed": 5, "batch_size": 3, "pad_id": 0, **plan})
    loader = iter(build_loader(mixture, encode, processor(), settings))
    return [next(loader) for _ in range(count)]


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert [b.ids for b in found] == [b.ids for b in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one.reader, one.position, one.skipped) == (other.reader, other.position, other.skipped)
        for name in ("input_ids", "targets", "attention_mask", "image_mask", "position_ids", "pixel_values"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name


# Mixture


def test_weights_are_the_shares(mixture: Mixture) -> None:
    items = list(islice(mixture.stream(1, 0, 1), 2000))
    of_web = sum(answer.startswith("caption") for answer in answers(items))
    assert abs(of_web / 2000 - 0.75) < 0.04
    assert items == list(islice(mixture.stream(1, 0, 1), 2000))
    other_reader = answers(list(islice(mixture.stream(1, 1, 2), 50)))
    assert [a[:3] for a in answers(items[:50])] != [a[:3] for a in other_reader]


@pytest.mark.parametrize("start", [1, 40, 333])
def test_a_mixture_starts_anywhere(mixture: Mixture, start: int) -> None:
    unbroken = list(islice(mixture.stream(8, 1, 3), start + 20))
    assert list(islice(mixture.stream(8, 1, 3, start), 20)) == unbroken[start:]


def test_a_mixture_needs_sources() -> None:
    with pytest.raises(DataError, match="no data set to read"):
        Mixture({})


# Batches


def test_a_batch_is_whole(mixture: Mixture, encode: ConversationEncoder) -> None:
    (batch,) = batches(mixture, encode, 1)
    assert batch.pixel_values is not None
    assert batch.pixel_values.shape == (3, 3, 8, 8)
    assert batch.images_per_row.tolist() == [1, 1, 1]
    assert int(batch.image_mask.sum()) == 3 * encode.tokens_per_image
    assert batch.num_supervised > 0
    assert (batch.reader, batch.position, batch.skipped) == (0, 3, {})


@pytest.mark.slow
@pytest.mark.parametrize("cut", [1, 2, 5, 8])
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_equals_uninterrupted(mixture: Mixture, encode: ConversationEncoder, workers: int, cut: int) -> None:
    if workers and cut not in (2, 5):
        pytest.skip("two cuts, even and odd, are enough with processes")
    unbroken = batches(mixture, encode, cut + 5, num_workers=workers)
    positions = {batch.reader: batch.position for batch in unbroken[:cut]}
    resumed = batches(mixture, encode, 5, num_workers=workers, positions=positions, consumed=cut)
    assert_same(resumed, unbroken[cut:])


@pytest.mark.parametrize("cut", [1, 4, 5, 6])
def test_a_run_resumes_inside_a_group(mixture: Mixture, encode: ConversationEncoder, cut: int) -> None:
    unbroken = batches(mixture, encode, cut + 5, group=3)
    last = unbroken[cut - 1]
    assert last.given == cut % 3
    resumed = batches(mixture, encode, 5, group=3, positions={0: last.position}, given={0: last.given}, consumed=cut)
    assert_same(resumed, unbroken[cut:])


@pytest.mark.slow
def test_a_run_resumes_inside_the_groups_of_its_workers(mixture: Mixture, encode: ConversationEncoder) -> None:
    unbroken = batches(mixture, encode, 8, group=2, num_workers=2)
    seen = {batch.reader: batch for batch in unbroken[:3]}
    assert [batch.given for batch in seen.values()] == [0, 1]
    places = {"positions": {r: b.position for r, b in seen.items()}, "given": {r: b.given for r, b in seen.items()}}
    resumed = batches(mixture, encode, 5, group=2, num_workers=2, consumed=3, **places)
    assert_same(resumed, unbroken[3:])


def test_a_group_has_the_samples_of_the_stream_and_less_padding(mixture: Mixture, encode: ConversationEncoder) -> None:
    plain, grouped = batches(mixture, encode, 8), batches(mixture, encode, 8, group=4)
    for first in (0, 4):
        ids = [sorted(i for b in found[first : first + 4] for i in b.ids) for found in (plain, grouped)]
        assert ids[0] == ids[1]
    assert plain[0].ids != grouped[0].ids
    positions = [sum(batch.input_ids.numel() for batch in found) for found in (plain, grouped)]
    assert positions[1] < positions[0]


def test_skipped_samples_of_a_group_are_counted_once(tmp_path: Path, encode: ConversationEncoder) -> None:
    rows = [{"image": f"{n}.png" if n % 3 else "none.png", "caption": f"{n} " * (1 + n % 5)} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for n in range(12):
        (tmp_path / f"{n}.png").write_bytes(image_bytes(n, "PNG"))
    config = Conversations.Config(path=str(tmp_path / "rows.jsonl"))
    mixture = Mixture({"rows": Conversations.from_config(config, name="rows")})
    whole = batches(mixture, encode, 4, batch_size=2, group=2)
    assert whole[2].skipped["missing image"] > 0
    places: dict[str, Any] = {"positions": {0: whole[2].position}, "given": {0: whole[2].given}}
    resumed = batches(mixture, encode, 1, batch_size=2, group=2, consumed=3, **places)
    assert_same(resumed, whole[3:])


def test_packed_batches_have_the_same_samples(mixture: Mixture, encode: ConversationEncoder) -> None:
    padded, packed = batches(mixture, encode, 4), batches(mixture, encode, 4, pack=150)
    for one, other in zip(padded, packed, strict=True):
        assert sorted(one.ids) == sorted(other.ids)
        assert other.num_supervised == one.num_supervised
        assert other.input_ids.shape[1] <= 150
        assert (one.reader, one.position) == (other.reader, other.position)
    assert sum(len(batch) for batch in packed) < sum(len(batch) for batch in padded)


def test_a_sample_longer_than_a_packed_row_is_skipped(mixture: Mixture, encode: ConversationEncoder) -> None:
    lengths = sorted(int(n) for batch in batches(mixture, encode, 6) for n in batch.attention_mask.sum(1))
    longest = lengths[len(lengths) // 2]
    found = batches(mixture, encode, 6, pack=longest)
    assert sum(batch.skipped["too long"] for batch in found if batch.skipped) > 0
    assert max(batch.input_ids.shape[1] for batch in found) <= longest


def test_workers_and_ranks_are_disjoint_readers(sources: dict[str, Source], encode: ConversationEncoder) -> None:
    rows = Mixture({"rows": sources["rows"]})
    found = [batches(rows, encode, 4, batch_size=1, rank=rank, world_size=2, num_workers=2) for rank in (0, 1)]
    assert [[b.reader for b in of_rank] for of_rank in found] == [[0, 1, 0, 1], [2, 3, 2, 3]]
    ids = [batch.ids[0] for of_rank in found for batch in of_rank]
    assert len(set(ids)) == len(ids) == 8
    alone = [item.id for item in islice(rows.stream(5, 0, 1), 8) if isinstance(item, Example)]
    assert sorted(ids) == sorted(alone)


# What is skipped


@pytest.fixture
def spoilt(tmp_path: Path) -> Source:
    """Ten rows, of which six are bad in three ways."""
    file = write_conversations(tmp_path, 10)
    for number in (1, 6, 7):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"no image")
    (tmp_path / "images" / "2.png").write_bytes(image_bytes(2, "PNG")[:50])
    (tmp_path / "images" / "3.png").unlink()
    lines = file.read_text().splitlines()
    lines[4] = json.dumps({"image": "images/4.png", "caption": ""})
    file.write_text("\n".join(lines))
    config = Conversations.Config(path=str(file), prompts=write_prompts(tmp_path))
    return Conversations.from_config(config, name="spoilt")


@pytest.mark.parametrize("workers", [0, 1])
def test_skips_are_counted_and_logged(
    spoilt: Source, encode: ConversationEncoder, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        found = batches(Mixture({"spoilt": spoilt}), encode, 10, num_workers=workers)
    counts = sum((Counter(batch.skipped) for batch in found), Counter())
    assert set(counts) == {"image", "caption", "missing image"}
    assert min(counts.values()) >= 6
    assert found[-1].position == sum(counts.values()) + 30
    assert "rows.jsonl:5: the caption is empty" in caplog.text
    assert ".png: this is not an image" in caplog.text
    assert len(caplog.records) == 5
    assert caplog.text.count("only counted") == 1


def test_a_row_too_long_is_a_counted_skip(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"caption": "short"}\n' + json.dumps({"caption": "long " * 50}))
    config = Conversations.Config(path=str(file), prompts="", images="optional")
    mixture = Mixture({"own": Conversations.from_config(config, name="own")})
    found = batches(mixture, encoder(max_tokens=40), 2, batch_size=1)
    assert sum(batch.skipped.get("too long", 0) for batch in found) >= 1
    assert found[0].pixel_values is None
    assert found[0].images_per_row.tolist() == [0]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_are_all_bad_end_the_stream(tmp_path: Path, encode: ConversationEncoder, workers: int) -> None:
    file = write_shard(tmp_path / "a.tar", [{"__key__": str(n), "jpg": b"x", "txt": b"t"} for n in range(20)])
    mixture = Mixture({"web": web_pairs([str(file)])})
    with pytest.raises(DataError, match=r"^1000 samples in a row could not be used \(image: 1000\); the last") as e:
        batches(mixture, encode, 1, num_workers=workers)
    assert "a.tar/" in str(e.value)
    assert "Traceback" not in str(e.value)


# Validation


def test_fixed_batches_are_the_same_each_time(sources: dict[str, Source], encode: ConversationEncoder) -> None:
    first, again = (
        list(fixed_batches(sources, encode, processor(), samples=10, batch_size=4, pad_id=0)) for _ in range(2)
    )
    assert_same(first, again)
    assert [len(batch) for batch in first] == [4, 4, 2]
    assert first[0].ids == ["00000.tar/000000000", "rows.jsonl:1", "00000.tar/000000001", "rows.jsonl:2"]
    every = list(fixed_batches(sources, encode, processor(), samples=1000, batch_size=50, pad_id=0))
    assert sum(len(batch) for batch in every) == 47


def test_fixed_batches_leave_out_and_count(spoilt: Source, encode: ConversationEncoder) -> None:
    found = list(fixed_batches({"s": spoilt}, encode, processor(), samples=10, batch_size=5, pad_id=0))
    assert [len(batch) for batch in found] == [1, 3]
    assert found[0].skipped == {"image": 2, "missing image": 1, "caption": 1}
    assert found[1].skipped == {"image": 2}


def test_fixed_batches_of_nothing(tmp_path: Path, encode: ConversationEncoder) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    config = Conversations.Config(path=str(tmp_path / "rows.jsonl"), prompts="", images="optional")
    source = Conversations.from_config(config, name="own")
    with pytest.raises(DataError, match="not one sample of own can be used"):
        list(fixed_batches({"own": source}, encode, processor(), samples=4, batch_size=2, pad_id=0))


# Config


def test_sections_are_read_from_yaml(tmp_path: Path, tiny_values: dict[str, Any], write_config: Any) -> None:
    write_shards(tmp_path, shards=1, each=2)
    laion = {"type": "web_pairs", "urls": [f"{tmp_path}/*.tar"], "weight": 115, "text": {"type": "blip_caption"}}
    validation = {
        "own": {"type": "conversations", "path": f"{tmp_path}/rows.jsonl"},
        "shapes": {"type": "easy_vqa", "path": "asset:easy_vqa", "form": "captions", "image_range": [3600, 4000]},
        "aligned": {"type": "aligned_pairs", "path": str(tmp_path)},
    }
    file = write_config(tiny_values | {"datasets": {"train": {"laion": laion}, "validation": validation}})
    config = load_config(file)
    source = config.datasets.train["laion"].build(name="laion")
    assert isinstance(source, WebPairs)
    assert (source.name, source.weight) == ("laion", 115)
    assert source.process_text("A Cat.") == "a cat"
    assert config.datasets.validation["shapes"].config.image_range == (3600, 4000)
    assert config.datasets.validation["own"].config.text.type == "text"
    assert config.processors.image.type == "image"
    with pytest.raises(ConfigError, match=r"datasets\.train\.laion\.weight must be above 0"):
        load_config(file, ["datasets.train.laion.weight=-1"])
