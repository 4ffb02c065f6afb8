"""Projectors: what becomes `llama_proj`, from query features to image embeds.

Input: `query_features` (I, Q, Dq). Output: `image_embeds` (I, Q, Dl). One linear layer is the default.
"""

from __future__ import annotations

from torch import Tensor, nn

from minigpt4.config.parts import LinearConfig, MlpConfig


class Linear(nn.Linear):
    """One linear layer Dq -> Dl, initialised as `nn.Linear` is."""

    Config = LinearConfig

    @classmethod
    def from_config(cls, config: LinearConfig, feature_dim: int, hidden_size: int) -> Linear:
        """Build the layer.

        Args:
            config: its settings.
            feature_dim: Dq.
            hidden_size: Dl.
        """
        return cls(feature_dim, hidden_size, bias=config.bias)


class Mlp(nn.Module):
    """Two linear layers with the exact GELU between them: Dq -> Dl -> Dl.

    Source: `mlp2x_gelu` of LLaVA-1.5 (Liu et al. 2023). The layers have the names of transformers' LLaVA.
    """

    Config = MlpConfig

    def __init__(self, feature_dim: int, hidden_size: int, bias: bool = True) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(feature_dim, hidden_size, bias=bias)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(hidden_size, hidden_size, bias=bias)

    @classmethod
    def from_config(cls, config: MlpConfig, feature_dim: int, hidden_size: int) -> Mlp:
        """Build the layers; see `Linear.from_config`."""
        return cls(feature_dim, hidden_size, bias=config.bias)

    def forward(self, query_features: Tensor) -> Tensor:
        """Return `image_embeds` (I, Q, Dl)."""
        return self.linear_2(self.act(self.linear_1(query_features)))
