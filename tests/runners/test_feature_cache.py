"""Training from cached features is training from images: same losses, same checkpoints, exact resume."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from minigpt4 import Chat, load_model
from minigpt4.cli import main
from minigpt4.config import load_config
from minigpt4.errors import CheckpointError, ConfigError, FeatureCacheError
from minigpt4.runners.cache import CacheCount, CacheRunner
from tests.conftest import COLOURS, read_metrics
from tests.datasets.parts import write_conversations, write_shards
from tests.runners.parts import PROCESSES, losses, series, train, weights, write


def cache(values: dict[str, Any], file: Path, dtype: str = "float32") -> CacheCount:
    """Write the cache of a config."""
    config = load_config(write(values, file))
    return CacheRunner.from_config(config, dtype, batch_size=5).run()


def with_cache(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    changed = copy.deepcopy(values)
    changed["datasets"]["feature_cache"] = str(folder)
    return changed


@pytest.fixture
def mixed(tiny_values: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """A config with three kinds of data sets, and a validation set."""
    tiny_values["datasets"]["train"] |= {
        "rows": {"type": "conversations", "path": str(write_conversations(tmp_path / "rows", 9)), "weight": 0.7},
        "web": {"type": "web_pairs", "urls": write_shards(tmp_path / "web", 2, 6), "shuffle_buffer": 3},
    }
    tiny_values["datasets"]["validation"] = {"pairs": dict(tiny_values["datasets"]["train"]["pairs"])}
    tiny_values["run"] |= {"validate_every_steps": 2, "validation_samples": 8}
    return tiny_values


def without_encoder(values: dict[str, Any]) -> dict[str, Any]:
    """Name an encoder whose weights are not on this machine."""
    changed = copy.deepcopy(values)
    changed["model"]["vision_encoder"]["weights"] = "gone/eva.pth"
    return changed


def assert_same_run(direct: Path, cached: Path, tolerance: float) -> None:
    torch.testing.assert_close(losses(cached), losses(direct), rtol=tolerance, atol=tolerance)
    keys = ("validation_loss", "validation_loss_shuffled_images")
    ours, theirs = ([[line[k] for k in keys] for line in read_metrics(f) if keys[0] in line] for f in (cached, direct))
    assert len(theirs) > 0
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=tolerance, atol=tolerance)
    manifests = [json.loads((f / "checkpoints/latest/manifest.json").read_text()) for f in (direct, cached)]
    for manifest in manifests:
        manifest.pop("checksums")
    assert manifests[0] == manifests[1]


@pytest.mark.slow
@pytest.mark.parametrize("resampler", ["merge", "qformer", "prefix"])
def test_training_from_cached_features_is_the_same_computation(mixed, tmp_path, resampler):
    sizes: dict[str, dict[str, Any]] = {
        "merge": {"neighbours": 4},
        "qformer": {"weights": "random", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        "prefix": {"num_query_tokens": 4, "components": 8},
    }
    mixed["model"]["resampler"] = {"type": resampler, **sizes[resampler]}
    count = cache(mixed | {"datasets": {**mixed["datasets"], "feature_cache": str(tmp_path / "cache")}}, tmp_path / "c")
    assert (count.images, count.failed, count.bad_samples) == (12 + 9 + 12, 0, 0)
    train(mixed, tmp_path / "direct")
    train(with_cache(mixed, tmp_path / "cache"), tmp_path / "cached")
    assert_same_run(tmp_path / "direct", tmp_path / "cached", 1e-6)
    # What was trained from the cache sees images, and its second stage trains from the cache again.
    model = load_model(tmp_path / "cached/checkpoints/latest", device="cpu")
    assert isinstance(Chat(model).session([Image.new("RGB", (40, 40), COLOURS["red"])]).ask("What is it?"), str)
    for name in ("direct", "cached") if resampler == "prefix" else ():
        second = copy.deepcopy(mixed if name == "direct" else with_cache(mixed, tmp_path / "cache"))
        second["model"]["init_from"] = str(tmp_path / name / "checkpoints/latest")
        train(second, tmp_path / f"{name}2")
    if resampler == "prefix":  # whose calibration the first stage has saved
        assert_same_run(tmp_path / "direct2", tmp_path / "cached2", 1e-6)


def test_features_in_bfloat16_train_almost_the_same(mixed, tmp_path):
    count = cache(with_cache(mixed, tmp_path / "cache"), tmp_path / "c", "bfloat16")
    train(mixed, tmp_path / "direct")
    train(with_cache(mixed, tmp_path / "cache"), tmp_path / "cached", num_workers=0)
    assert_same_run(tmp_path / "direct", tmp_path / "cached", 1e-2)
    assert not torch.equal(losses(tmp_path / "direct"), losses(tmp_path / "cached"))
    assert count.bytes < 33 * 1600


@pytest.mark.slow
def test_workers_read_the_cache_too(mixed, tmp_path):
    cache(with_cache(mixed, tmp_path / "cache"), tmp_path / "c")
    train(mixed, tmp_path / "direct", num_workers=2)
    train(with_cache(mixed, tmp_path / "cache"), tmp_path / "cached", num_workers=2)
    assert_same_run(tmp_path / "direct", tmp_path / "cached", 1e-6)
    (tmp_path / "rows/images/3.png").write_bytes((tmp_path / "rows/images/4.png").read_bytes() + b"changed")
    with pytest.raises(FeatureCacheError, match=r"has no features of .*3\.png: the image is new or has changed"):
        train(with_cache(mixed, tmp_path / "cache"), tmp_path / "again", num_workers=2, total_steps=40)


@pytest.mark.slow
def test_a_cache_serves_another_language_model_without_the_encoder_and_resumes_exactly(mixed, other_llm, tmp_path):
    cache(with_cache(mixed, tmp_path / "cache"), tmp_path / "c")
    made_with = tmp_path / "cache/made_with.json"
    values = with_cache(mixed, tmp_path / "cache")
    values["model"]["language_model"]["path"] = str(other_llm)
    train(values, tmp_path / "whole")
    # The encoder is never built: weights that are not here are not missed.
    described = json.loads(made_with.read_text())
    described["origin"]["vision_encoder"] |= {
        "seed": None,
        "weights": {"weights": {"path": "gone/eva.pth", "files": []}},
    }
    made_with.write_text(json.dumps(described))
    gone = without_encoder(values)
    train(gone, tmp_path / "parts", total_steps=2)
    train(gone, tmp_path / "parts", resume=True)
    assert series(tmp_path / "parts")[2:] == series(tmp_path / "whole")[2:]
    assert all(torch.equal(weights(tmp_path / "parts")[k], v) for k, v in weights(tmp_path / "whole").items())
    with pytest.raises(CheckpointError, match=r"datasets\.feature_cache"):
        train(mixed | {"model": values["model"]}, tmp_path / "parts", resume=True, total_steps=8)


def change(values: dict[str, Any], key: str, value: Any) -> None:
    *path, last = key.split(".")
    for name in path:
        values = values.setdefault(name, {})
    values[last] = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.vision_encoder.image_size", 56, r"model.vision_encoder.image_size: 56 \(cached with 28\)"),
        ("model.vision_encoder.depth", 1, r"model.vision_encoder.depth: 1 \(cached with 2\)"),
        ("model.resampler.neighbours", 2, r"model.resampler.neighbours: 2 \(cached with 4\)"),
        ("processors.image", {"resize": "letterbox"}, r"image_processor.resize: letterbox \(cached with stretch\)"),
        ("run.seed", 7, r"model.vision_encoder.seed: 7 \(cached with 42\)"),
    ],
)
def test_other_parts_than_those_of_the_cache_are_refused(tiny_values, tmp_path, key, value, message):
    cache(with_cache(tiny_values, tmp_path / "cache"), tmp_path / "c")
    values = with_cache(tiny_values, tmp_path / "cache")
    change(values, key, value)
    with pytest.raises(FeatureCacheError, match=message):
        train(values, tmp_path / "run")
    with pytest.raises(FeatureCacheError, match=message):
        cache(values, tmp_path / "c")
    assert not (tmp_path / "run/config.yaml").exists()


def test_changed_weights_of_the_encoder_are_refused(tiny_values, tmp_path):
    from minigpt4.config.parts import EvaViTGConfig
    from minigpt4.models.vision import EvaViTG

    encoder = EvaViTG(EvaViTGConfig(**{k: v for k, v in tiny_values["model"]["vision_encoder"].items() if k != "type"}))
    state = {name: tensor for name, tensor in encoder.vit.state_dict().items() if not name.endswith("k_bias")}
    torch.save(state, tmp_path / "eva.pth")
    tiny_values["model"]["vision_encoder"]["weights"] = str(tmp_path / "eva.pth")
    cache(with_cache(tiny_values, tmp_path / "cache"), tmp_path / "c")
    values = with_cache(tiny_values, tmp_path / "cache")
    train(values, tmp_path / "run")
    shutil.copy(tmp_path / "eva.pth", tmp_path / "copy.pth")  # the same content, later and elsewhere
    values["model"]["vision_encoder"]["weights"] = str(tmp_path / "copy.pth")
    train(values, tmp_path / "run2")
    next(iter(state.values())).view(-1)[0] += 1  # a single value
    torch.save(state, tmp_path / "copy.pth")
    with pytest.raises(FeatureCacheError, match=r"copy.pth is not the file that made the features"):
        train(values, tmp_path / "run3")


@pytest.mark.slow
def test_a_changed_data_set_or_image_is_refused_and_caching_again_adds_what_is_new(mixed, tmp_path):
    values = with_cache(mixed, tmp_path / "cache")
    cache(values, tmp_path / "c")
    (tmp_path / "rows/images/2.png").write_bytes((tmp_path / "rows/images/3.png").read_bytes() + b"!")
    with pytest.raises(FeatureCacheError, match=r"has no features of .*2\.png: the image is new or has changed"):
        train(values, tmp_path / "run", total_steps=30)
    with (tmp_path / "rows/rows.jsonl").open("a") as rows:
        rows.write('\n{"image": "images/0.png", "caption": "another row"}')
    with pytest.raises(FeatureCacheError, match=r"rows: not cached, or changed since"):
        train(values, tmp_path / "run2")
    count = cache(values, tmp_path / "c")
    assert (count.images, count.new) == (34, 1)
    train(values, tmp_path / "run3", total_steps=8)


@pytest.mark.slow
def test_images_that_cannot_be_read_are_skipped_and_counted_as_without_a_cache(mixed, tmp_path):
    (tmp_path / "rows/images/5.png").write_bytes(b"not an image")
    mixed["run"] |= {"total_steps": 8, "max_skipped_fraction": 1.0}
    values = with_cache(mixed, tmp_path / "cache")
    count = cache(values, tmp_path / "c")
    assert (count.images, count.failed) == (32, 1)
    train(mixed, tmp_path / "direct")
    train(values, tmp_path / "cached")
    assert_same_run(tmp_path / "direct", tmp_path / "cached", 1e-6)
    skipped = [[line.get("skipped/image") for line in read_metrics(tmp_path / name)] for name in ("direct", "cached")]
    assert skipped[0] == skipped[1]
    assert skipped[0][-2]


def test_trained_image_parts_are_refused(tiny_values, tmp_path):
    values = with_cache(tiny_values, tmp_path / "cache")
    cache(values, tmp_path / "c")
    values["model"]["trainable"] = ["llama_proj", "vision_encoder"]
    with pytest.raises(ConfigError, match=r"model.trainable names vision_encoder"):
        train(values, tmp_path / "run")
    tiny_values["model"]["trainable"] = ["llama_proj", "vision_encoder"]
    train(tiny_values, tmp_path / "stage1")
    values["model"] |= {"trainable": ["llama_proj"], "init_from": str(tmp_path / "stage1/checkpoints/latest")}
    with pytest.raises(FeatureCacheError, match=r"its training changed vision_encoder"):
        train(values, tmp_path / "run")
    with pytest.raises(FeatureCacheError, match=r"its training changed vision_encoder"):
        cache(with_cache(values, tmp_path / "cache2"), tmp_path / "c")


def test_the_command_says_the_size_before_it_begins_and_refuses_a_full_disk(tiny_values, tmp_path, capsys, monkeypatch):
    file = write(tiny_values, tmp_path / "job")
    assert main(["cache", str(file)]) == 1
    assert "datasets.feature_cache: is required" in capsys.readouterr().err
    arguments = ["cache", str(file), "--options", f"datasets.feature_cache={tmp_path / 'cache'}"]
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
        assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "needs about 0.00 GB more, but its disk has 0.00 GB free" in error
    assert not list((tmp_path / "cache").glob("shard*"))
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "about 12 images x 1,536 bytes" in shown.err
    assert "features of 12 images, 12 of them new" in shown.out
    assert main(arguments) == 0
    assert "features of 12 images, 0 of them new" in capsys.readouterr().out


def _cache_in_process(file: str) -> None:
    raise SystemExit(main(["cache", file, "--dtype", "float32", "--batch-size", "3"]))


@pytest.mark.slow
def test_killed_at_any_instant_the_cache_is_the_one_of_an_uninterrupted_job(mixed, tmp_path):
    whole, killed = (with_cache(mixed, tmp_path / name) for name in ("whole", "killed"))
    cache(whole, tmp_path / "c")
    file = tmp_path / "killed.yaml"
    file.write_text(yaml.safe_dump(killed))
    generator, kills = random.Random(0), 0
    while True:
        process = PROCESSES.Process(target=_cache_in_process, args=(str(file),), daemon=False)
        process.start()
        process.join(generator.random() * 0.05 * (kills + 1))
        if not process.is_alive():
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0
    assert kills >= 2
    train(whole, tmp_path / "run_whole")
    train(killed, tmp_path / "run_killed")
    torch.testing.assert_close(losses(tmp_path / "run_killed"), losses(tmp_path / "run_whole"), rtol=1e-6, atol=1e-6)
