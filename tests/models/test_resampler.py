"""Resamplers: shapes, values and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import Idefics3Config
from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

from minigpt4.config.parts import (
    MergeConfig,
    PatchesConfig,
    PixelShuffleConfig,
    PoolConfig,
    PrefixConfig,
    QFormerConfig,
)
from minigpt4.errors import ConfigError, WeightsError
from minigpt4.models.resampler import Merge, Patches, PixelShuffle, Pool, Prefix, QFormer, Resampler
from tests.models import parts

ENCODER = parts.vision()  # 1 + 16 patches of width 16
QFORMER: dict[str, Any] = {"num_query_tokens": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def patches(images: int = 2) -> torch.Tensor:
    return torch.randn(images, 17, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["merge", "pool", "prefix", "qformer"])
def test_shapes_are_those_of_the_attributes(kind):
    resampler = parts.resampler(kind, ENCODER).eval()
    found = resampler(patches())
    assert found.shape == (2, resampler.num_query_tokens, resampler.feature_dim)
    for n in range(2):
        torch.testing.assert_close(resampler(patches()[n : n + 1])[0], found[n])


def test_a_qformer_in_bfloat16_gives_the_features_of_float32():
    found = []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        settings: dict[str, Any] = {**QFORMER, "num_hidden_layers": 6, "intermediate_size": 64, "dtype": dtype}
        resampler = QFormer.from_config(QFormerConfig(weights="random", **settings), ENCODER).eval()
        with torch.no_grad():
            found.append(resampler(patches().to(resampler.query_tokens.dtype)))
    assert [features.dtype for features in found] == [torch.float32, torch.bfloat16]
    assert 0 < (found[1].float() - found[0]).norm() < 0.02 * found[0].norm()


def test_merge_joins_neighbours_and_drops_the_class_token():
    given = patches()
    found = Merge(MergeConfig(neighbours=4), ENCODER)(given)
    assert found.shape == (2, 4, 64)
    assert torch.equal(found[1, 2], torch.cat([given[1, 1 + 8 + n] for n in range(4)]))


def test_merge_needs_patches_that_divide():
    with pytest.raises(ConfigError, match=r"neighbours: 16 patches are not divisible by 5"):
        Merge(MergeConfig(neighbours=5), ENCODER)


def test_pool_is_the_normalised_mean_of_each_cell_with_its_place():
    given = patches()
    plain = Pool(PoolConfig(grid=2, position_features=False), ENCODER)(given)
    grid = given[0, 1:].reshape(4, 4, 16)
    for cell, (row, column) in enumerate([(0, 0), (0, 2), (2, 0), (2, 2)]):
        mean = grid[row : row + 2, column : column + 2].mean((0, 1))
        torch.testing.assert_close(plain[0, cell], F.layer_norm(mean, (16,)))
    placed = Pool(PoolConfig(grid=2), ENCODER)(given)
    assert torch.equal(placed[..., :16], plain)
    assert torch.equal(placed[0, :, 16:] > 0, torch.eye(4).bool())


def test_pool_cannot_be_finer_than_the_patches():
    with pytest.raises(ConfigError, match=r"grid: 5 is finer than the encoder's \(4, 4\)"):
        Pool(PoolConfig(grid=5), ENCODER)


def test_qformer_attends_to_patches_in_every_second_layer():
    resampler = QFormer(QFormerConfig(weights="random", **{**QFORMER, "num_hidden_layers": 4}), 24)
    layers = resampler.qformer.encoder.layer
    assert [hasattr(layer, "crossattention") for layer in layers] == [True, False, True, False]
    assert layers[0].crossattention.attention.key.in_features == 24
    assert not any("word_embed" in n or "position_embed" in n for n, _ in resampler.named_parameters())


def published(resampler: Resampler) -> dict[str, torch.Tensor]:
    """Return its tensors under BLIP-2's names, with some of the text branch."""
    tensors = {}
    for name, tensor in resampler.state_dict().items():
        theirs = name.replace("attention.attention.", "attention.self.").replace("layernorm.", "embeddings.LayerNorm.")
        tensors["Qformer.bert." + theirs.removeprefix("qformer.") if theirs != "query_tokens" else theirs] = tensor
    text = {"embeddings.word_embeddings.weight", "encoder.layer.0.intermediate.dense.weight"}
    return tensors | {f"Qformer.bert.{name}": torch.ones(2) for name in text} | {"t5_proj.weight": torch.ones(3)}


def test_qformer_loads_the_published_names(tmp_path):
    source = parts.resampler("qformer", ENCODER)
    file = tmp_path / "blip2.pth"
    torch.save({"model": published(source)}, file)
    settings = {**QFORMER, "intermediate_size": 24, "dtype": "float32"}
    loaded = QFormer.from_config(QFormerConfig(weights=str(file), **settings), ENCODER)
    assert loaded.source == str(file)
    assert torch.equal(loaded.eval()(patches()), source.eval()(patches()))
    tensors = published(source)
    del tensors["query_tokens"]
    torch.save({"model": tensors}, file)
    with pytest.raises(WeightsError, match="1 missing: query_tokens"):
        QFormer.from_config(QFormerConfig(weights=str(file), **settings), ENCODER)


def salient(given: torch.Tensor) -> torch.Tensor:
    """Return the input of the prefix, computed patch by patch; the first token is the encoder's class token."""
    found = []
    for image in given[:, 1:]:
        away = [patch - image.mean(0) for patch in image]
        total = sum(float(a @ a) for a in away)
        found.append(sum((float(a @ a) / total) * a for a in away))
    return F.layer_norm(torch.stack(found), (given.shape[-1],))


def test_prefix_gives_each_token_the_same_features_in_its_own_columns():
    prefix = Prefix(PrefixConfig(num_query_tokens=3, components=5, scale=0.5), ENCODER)
    found = prefix(patches()).unflatten(-1, (3, 6))
    for token in range(3):
        torch.testing.assert_close(
            found[:, token, token, :5], 0.5 * salient(patches())[:, :5]
        )  # nothing calibrated yet
        torch.testing.assert_close(found[:, token, token, 5], torch.full((2,), 0.5 * 5**0.5))
        assert not found[:, token, [n for n in range(3) if n != token]].any()


def test_prefix_depends_on_the_object_and_not_on_the_size_of_its_background():
    prefix = Prefix(PrefixConfig(components=16), ENCODER)
    thing, ground = patches(2)[0, 1], patches(2)[1, 1]
    small, large = ground.repeat(2, 17, 1).split(1)
    small[:, 5], large[:, 5:8] = thing, thing
    torch.testing.assert_close(prefix(small), prefix(large))
    assert prefix(ground.repeat(1, 17, 1)).isfinite().all()  # an image without an object


def test_prefix_whitens_the_principal_directions_of_the_images():
    mixed = torch.randn(200, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([3.0, 1.0, 0.1])
    given = patches(200) * 1e-4
    given[:, 1] += mixed @ torch.randn(3, 16, generator=torch.Generator().manual_seed(2))
    prefix = Prefix(PrefixConfig(num_query_tokens=2, components=2, scale=1.0), ENCODER)
    prefix.calibrate(given)
    found = prefix(given).unflatten(-1, (2, 3))[:, 0, 0, :2]
    torch.testing.assert_close(found.mean(0), torch.zeros(2), atol=1e-4, rtol=0)
    torch.testing.assert_close(torch.cov(found.T, correction=0), torch.eye(2), atol=1e-2, rtol=0)


def test_prefix_cannot_have_more_components_than_features():
    with pytest.raises(ConfigError, match="components: 17 is more than the width of the features, 16"):
        Prefix(PrefixConfig(components=17), ENCODER)


def test_patches_are_tokens_as_they_are():
    given = torch.randn(2, 17, 16)
    resampler = Patches(PatchesConfig(), ENCODER)
    assert (resampler.num_query_tokens, resampler.feature_dim) == (17, 16)
    assert torch.equal(resampler(given), given)


def test_pixel_shuffle_is_that_of_idefics3():
    config = Idefics3Config(
        vision_config={"hidden_size": 16, "num_attention_heads": 2},
        text_config={"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2},
        scale_factor=2,
    )
    given = torch.randn(2, 17, 16)
    resampler = PixelShuffle(PixelShuffleConfig(factor=2), ENCODER)
    assert (resampler.num_query_tokens, resampler.feature_dim) == (4, 64)
    theirs = Idefics3Connector(config).pixel_shuffle(given[:, 1:], 2)
    assert torch.equal(resampler(given), theirs)
    first = given[:, [1, 2, 5, 6]].flatten(1)  # the patches of the first square, behind the class token
    assert torch.equal(resampler(given)[:, 0], first)
    assert torch.equal(PixelShuffle(PixelShuffleConfig(factor=1), ENCODER)(given), given[:, 1:])
    with pytest.raises(ConfigError, match=r"factor: 4 x 4 patches are not divisible by 3"):
        PixelShuffle(PixelShuffleConfig(factor=3), ENCODER)
