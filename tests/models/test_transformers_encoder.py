"""Vision towers of transformers: the tokens of each block, the image processor's values, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, Siglip2VisionConfig, ViTConfig, ViTMAEConfig

from minigpt4.config.parts import TransformersEncoderConfig
from minigpt4.errors import ConfigError, WeightsError
from minigpt4.models.transformers_encoder import TransformersEncoder, blocks_of
from minigpt4.processors.image import ImageSpec
from tests.towers import IMAGE, MEAN, SIZES, STD, TOWERS, write_tower

PREFIX = {"dinov2 with registers": 5, "dinov3": 3, "siglip": 0, "whole siglip": 0}
"""Class token and registers; every other tower has a class token alone."""


def encoder(path: Path, **settings: Any) -> TransformersEncoder:
    return TransformersEncoder.from_config(TransformersEncoderConfig(path=str(path), **settings)).eval()


def pixels(side: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("kind", TOWERS)
def test_the_tokens_are_those_of_the_block_and_of_the_norm(kind, tmp_path):
    write_tower(kind, tmp_path)
    whole: Any = AutoModel.from_pretrained(tmp_path).eval()
    tower = getattr(whole, "vision_model", whole)
    expected = tower(pixels(), output_hidden_states=True)
    prefix = PREFIX.get(kind, 1)
    for layer in (-3, -2, -1):
        hidden = expected.hidden_states[layer]
        plain = encoder(tmp_path, layer=layer, class_token="keep")
        torch.testing.assert_close(plain(pixels()), hidden)
        assert (plain.num_prefix_tokens, plain.grid, plain.feature_dim) == (prefix, (4, 4), 16)
        patches = encoder(tmp_path, layer=layer)
        torch.testing.assert_close(patches(pixels()), hidden[:, prefix:])
        assert (patches.num_prefix_tokens, patches.num_patches) == (0, 16)
        norm = next(m for n, m in tower.named_children() if "norm" in n and n != "pre_layrnorm")
        normed = encoder(tmp_path, layer=layer, post_norm=True)
        torch.testing.assert_close(normed(pixels()), norm(hidden)[:, prefix:])
    if kind in ("siglip", "dinov2", "dinov3", "vit"):
        torch.testing.assert_close(normed(pixels()), expected.last_hidden_state[:, prefix:])


@pytest.mark.parametrize("kind", ["whole clip", "vit"])
def test_nothing_is_kept_that_is_not_used(kind, tmp_path):
    found = encoder(write_tower(kind, tmp_path), layer=-2)
    found(pixels()).sum().backward()
    assert [name for name, parameter in found.named_parameters() if parameter.grad is None] == []
    assert len({name.split("layers.")[1][0] for name, _ in found.named_parameters() if "layers." in name}) == 2


def test_images_are_those_of_the_folders_image_processor(tmp_path):
    write_tower("clip", tmp_path)
    own = encoder(tmp_path).image_spec
    assert own == ImageSpec(32, 32, tuple(MEAN), tuple(STD), "bilinear")  # type: ignore[arg-type]
    set_here = encoder(tmp_path, image_size=32, mean=[0.1] * 3, std=[1.0] * 3).image_spec
    assert (set_here.mean, set_here.std, set_here.interpolation) == ((0.1,) * 3, (1.0,) * 3, "bilinear")
    file = tmp_path / "preprocessor_config.json"
    values = json.loads(file.read_text())
    cropped = {**values, "size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "resample": 3}
    file.unlink()
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": cropped, "processor_class": "X"}))
    assert encoder(tmp_path).image_spec == ImageSpec(32, 32, tuple(MEAN), tuple(STD), "bicubic")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["clip", "siglip", "dinov2", "dinov3", "vit"])
def test_another_image_size_has_another_grid(kind, tmp_path):
    found = encoder(write_tower(kind, tmp_path), image_size=48)
    assert (found.grid, found(pixels(48)).shape) == ((6, 6), (2, 36, 16))


def test_the_precision_is_that_of_the_config(tmp_path):
    found = encoder(write_tower("siglip", tmp_path), dtype="bfloat16", post_norm=True)
    assert found(pixels()).dtype == torch.bfloat16
    assert {parameter.dtype for parameter in found.parameters()} == {torch.bfloat16}


def test_what_is_wrong_with_a_folder_is_named(tmp_path):
    write_tower("siglip", tmp_path / "tower")
    with pytest.raises(WeightsError, match=r"no config.json found; set model.vision_encoder.path to a folder"):
        encoder(tmp_path)
    with pytest.raises(ConfigError, match=r"layer: -4 is before the first of 3 blocks; the first is -3"):
        encoder(tmp_path / "tower", layer=-4)
    file = tmp_path / "tower" / "preprocessor_config.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in values.items() if key != "image_std"}))
    with pytest.raises(ConfigError, match=r"vision_encoder.std: .*tower has no image_std in .*; set it"):
        encoder(tmp_path / "tower")
    file.write_text(json.dumps({**values, "rescale_factor": 1.0}))
    with pytest.raises(ConfigError, match=r"does not scale pixels to 0..1; set mean and std"):
        encoder(tmp_path / "tower")
    file.unlink()
    with pytest.raises(ConfigError, match=r"image_size: .*tower has no image size in preprocessor_config.json or"):
        encoder(tmp_path / "tower")
    config = json.loads((tmp_path / "tower" / "config.json").read_text())
    (tmp_path / "tower" / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))
    with pytest.raises(WeightsError, match=r"tensors of SiglipVisionModel are missing or of another shape|cannot be"):
        encoder(tmp_path / "tower")


def test_code_in_a_folder_is_never_run(tmp_path):
    write_tower("siglip", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    trap = "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
    (tmp_path / "trap.py").write_text(trap)
    own = {"AutoConfig": "trap.Config", "AutoModel": "trap.Model"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "my_tower", "auto_map": own}))
    with pytest.raises(WeightsError, match=r"cannot be loaded as a vision tower"):
        encoder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "auto_map": own}))
    assert encoder(tmp_path)(pixels()).shape == (2, 16, 16)  # a leftover, as many folders have it
    assert not (tmp_path / "ran").exists()


def test_towers_without_a_grid_of_patches_are_refused(tmp_path):
    processor = {"size": {"height": 32, "width": 32}, "image_mean": MEAN, "image_std": STD}

    def write(config: Any) -> Path:
        folder = tmp_path / config.model_type
        AutoModel.from_config(config).save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
        return folder

    with pytest.raises(ConfigError, match=r"siglip2_vision_model\): does not take images of 32 x 32 pixels as one"):
        encoder(write(Siglip2VisionConfig(**SIZES, patch_size=8, num_patches=16)))
    with pytest.raises(ConfigError, match=r"is not a grid of 4 x 4 patches; use a plain vision transformer"):
        encoder(write(ViTMAEConfig(**SIZES, **IMAGE)))
    rows = nn.Module()
    rows.config = ViTConfig(num_hidden_layers=2)  # type: ignore[assignment]
    rows.first, rows.second = (nn.ModuleList([nn.Identity(), nn.Identity()]) for _ in range(2))
    with pytest.raises(ConfigError, match=r"Module is not one row of blocks, so `layer` cannot be counted"):
        blocks_of(rows)
