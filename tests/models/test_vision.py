"""Image encoders: EVA as MiniGPT-4 uses it, and timm's backbones by name."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from minigpt4.config.parts import EvaViTGConfig, PoolConfig, QFormerConfig, TimmConfig
from minigpt4.devices import fast_dtype
from minigpt4.errors import ConfigError, UnknownNameError, WeightsError
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.models.resampler import Pool, QFormer
from minigpt4.models.vision import EvaViTG, TimmEncoder
from tests.models import parts

SMALL = ("test_vit", "test_convnext", "test_efficientnet", "test_resnet")
EVA: dict[str, Any] = {"image_size": 28, "patch_size": 7, "embed_dim": 16, "depth": 2, "num_heads": 2}


def timm_encoder(name: str, weights: str = "random", **settings: Any) -> TimmEncoder:
    torch.manual_seed(0)
    return TimmEncoder.from_config(TimmConfig(name=name, weights=weights, **{"dtype": "float32", **settings})).eval()


def perturbed(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return weights that differ from every initialisation."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: t + torch.rand(t.shape, generator=generator) if t.is_floating_point() else t
        for name, t in model.state_dict().items()
    }


def test_eva_keeps_the_class_token_and_has_no_final_norm():
    encoder = parts.vision().eval()
    images = parts.pixels(2, 0)
    assert encoder.num_patches == 17
    assert encoder.grid == (4, 4)
    assert encoder(images).shape == (2, 17, 16)
    hidden = encoder.vit.patch_embed(images)
    hidden = torch.cat([encoder.vit.cls_token.expand(2, -1, -1), hidden], 1) + encoder.vit.pos_embed
    for block in encoder.vit.blocks:
        hidden = block(hidden)
        assert {m.eps for m in block.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    torch.testing.assert_close(encoder(images), F.layer_norm(hidden, (16,), eps=1e-5))


@pytest.mark.parametrize("name", ["eva_vit_g", "test_vit", "test_efficientnet"])
def test_features_in_bfloat16_are_those_in_float32(name):
    found = []
    for dtype in ("float32", "bfloat16"):
        torch.manual_seed(0)
        sizes: dict[str, Any] = {**EVA, "embed_dim": 64, "depth": 8}
        encoder = (
            EvaViTG.from_config(EvaViTGConfig(weights="random", dtype=dtype, **sizes)).eval()
            if name == "eva_vit_g"
            else timm_encoder(name, dtype=dtype, image_size=64)
        )
        images = torch.randn(4, 3, encoder.image_spec.height, encoder.image_spec.width)
        with torch.no_grad():
            found.append(encoder(images).float())
        kept = {m.weight.dtype for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)}
        assert kept <= {torch.float32}
    whole, half = found
    assert 0 < (half - whole).norm() < 0.02 * whole.norm()


def test_the_default_precision_is_the_fast_one_of_this_machine():
    encoder = EvaViTG.from_config(EvaViTGConfig(weights="random", **EVA))
    resampler = QFormer.from_config(QFormerConfig(weights="random", num_query_tokens=2), encoder)
    held = {p.dtype for p in (*encoder.vit.parameters(), *resampler.parameters())}
    assert held == {fast_dtype()}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_ln_vision_is_computed_in_float32(dtype):
    encoder = EvaViTG.from_config(EvaViTGConfig(weights="random", dtype=dtype, **EVA)).eval()
    assert encoder.ln_vision.weight.dtype == torch.float32
    found = encoder(parts.pixels(1, 0))
    assert found.dtype == getattr(torch, dtype)
    tokens = encoder.vit.forward_features(parts.pixels(1, 0).to(found.dtype)).float()
    assert torch.equal(found, F.layer_norm(tokens, (16,), eps=1e-5).to(found.dtype))


def test_eva_loads_the_published_layout(tmp_path):
    source = parts.vision(depth=3)
    tensors = perturbed(source.vit)
    extra = {"norm.weight": torch.ones(16), "norm.bias": torch.ones(16), "head.weight": torch.ones(5, 16)}
    torch.save(tensors | extra, tmp_path / "eva.pth")
    norm = {"ln_vision.weight": torch.rand(16), "ln_vision.bias": torch.rand(16), "query_tokens": torch.ones(1)}
    torch.save({"model": norm}, tmp_path / "blip2.pth")
    config = EvaViTGConfig(
        weights=str(tmp_path / "eva.pth"), ln_vision_weights=str(tmp_path / "blip2.pth"), dtype="float32", **EVA
    )
    encoder = EvaViTG.from_config(config)
    for name, tensor in encoder.vit.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name
    assert torch.equal(encoder.ln_vision.weight, norm["ln_vision.weight"])
    del tensors["blocks.1.attn.proj.weight"]
    torch.save(tensors, tmp_path / "eva.pth")
    with pytest.raises(WeightsError, match=r"1 missing: blocks.1.attn.proj.weight"):
        EvaViTG.from_config(config)


@pytest.mark.parametrize("name", SMALL)
def test_shapes_of_backbones_are_those_of_the_attributes(name):
    encoder = timm_encoder(name)
    own = encoder.backbone.pretrained_cfg
    spec = encoder.image_spec
    assert (spec.height, spec.width) == own["input_size"][1:]
    assert (spec.mean, spec.std) == (own["mean"], own["std"])
    found = encoder(torch.rand(2, 3, spec.height, spec.width))
    assert found.shape == (2, encoder.num_patches, encoder.feature_dim)
    assert not encoder.num_prefix_tokens


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize(("kind", "match"), [("pth", "names"), ("safetensors", "names"), ("pth", "order")])
def test_backbones_load_their_files_by_name_and_by_order(name, kind, match, tmp_path):
    tensors = perturbed(timm.create_model(name))
    given = {f"tensor {n}": t for n, t in enumerate(tensors.values())} if match == "order" else tensors
    file = tmp_path / f"weights.{kind}"
    save_file(given, file) if kind == "safetensors" else torch.save(given, file)
    encoder = timm_encoder(name, str(file), weights_match=match)
    assert encoder.source == str(file)
    for key, tensor in encoder.backbone.state_dict().items():
        assert torch.equal(tensor, tensors[key]), key


def test_the_norm_after_the_pooling_becomes_that_of_the_patches(tmp_path):
    tensors = perturbed(timm.create_model("test_vit2"))
    torch.save(tensors, tmp_path / "weights.pth")
    encoder = timm_encoder("test_vit2", str(tmp_path / "weights.pth"))
    assert torch.equal(encoder.backbone.norm.weight, tensors["fc_norm.weight"])


def test_a_file_of_another_backbone_is_an_error(tmp_path):
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(WeightsError, match=r"weights do not fit VisionTransformer.*missing.*unexpected: conv1"):
        timm_encoder("test_vit", str(tmp_path / "weights.pth"))
    with pytest.raises(WeightsError, match=r"has \d+ tensors, VisionTransformer has \d+"):
        timm_encoder("test_vit", str(tmp_path / "weights.pth"), weights_match="order")


def test_patches_run_row_by_row():
    encoder = timm_encoder("test_resnet", image_size=64)
    maps = encoder.backbone.forward_features(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    found = encoder(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    rows, columns = encoder.grid
    for y in range(rows):
        for x in range(columns):
            torch.testing.assert_close(found[0, y * columns + x], maps[0, :, y, x])


@pytest.mark.parametrize(("name", "levels"), [("test_resnet", [1, 3]), ("test_vit", [0, 1])])
def test_feature_levels_are_normalised_and_joined_on_the_coarsest_grid(name, levels):
    encoder = timm_encoder(name, image_size=64, feature_levels=levels)
    images = torch.rand(1, 3, 64, 64)
    maps = encoder.backbone.forward_intermediates(images, indices=levels, intermediates_only=True, output_fmt="NCHW")
    assert encoder.feature_dim == sum(m.shape[1] for m in maps)
    assert encoder.grid == tuple(min(m.shape[2:] for m in maps))
    found = encoder(images)
    begin = 0
    for level in maps:
        expected = F.adaptive_avg_pool2d(
            F.layer_norm(level.movedim(1, -1), level.shape[1:2]).movedim(-1, 1), encoder.grid
        )
        part = found[..., begin : begin + level.shape[1]]
        torch.testing.assert_close(part, expected.flatten(2).transpose(1, 2))
        begin += level.shape[1]


def test_image_size_and_normalisation_of_the_config_win():
    encoder = timm_encoder("test_vit", image_size=64, mean=[0.1, 0.2, 0.3], std=[1.0, 2.0, 3.0])
    spec = encoder.image_spec
    assert (spec.height, spec.mean, spec.std) == (64, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0))
    assert encoder.grid == (4, 4)


def test_the_error_for_an_unknown_backbone_names_similar_ones():
    with pytest.raises(UnknownNameError, match=r"timm has no model 'tset_vit'. Similar: .*test_vit"):
        timm_encoder("tset_vit")
    with pytest.raises(UnknownNameError, match=r"'test_vit.none'. Similar: test_vit.r160_in1k"):
        timm_encoder("test_vit.none")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"feature_levels": [9]}, r"test_vit returns no feature maps .*feature_levels \[9\]: .*out of range"),
        ({"image_size": 65}, r"image_size 65 .*divisible"),
        ({"mean": [0.5]}, r"vision_encoder.mean: 1 values; give one for each of R, G and B"),
    ],
)
def test_the_error_for_wrong_backbone_settings_names_them(settings, message):
    with pytest.raises(ConfigError, match=message):
        timm_encoder("test_vit", **settings)


def test_running_means_of_a_trained_encoder_are_part_of_what_is_trained():
    encoder = timm_encoder("test_efficientnet", image_size=32)
    model = MiniGPT4(encoder, Pool(PoolConfig(grid=1), encoder), parts.language_model(), ["vision_encoder"])
    frozen = {
        name
        for part in ("vision_encoder", "resampler")
        for name, _ in model.frozen_tensors(part, model.trained_names())
    }
    model.train()
    name, tensor = next((n, t.clone()) for n, t in model.named_buffers() if n.endswith("running_mean"))
    model.query_features(torch.rand(2, 3, 32, 32))
    assert not torch.equal(model.trained_state()[name], tensor)
    assert not frozen
