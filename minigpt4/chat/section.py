"""The `chat` section: how answers are decoded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ChatSection:
    """Decoding settings; greedy by default, so that the same question gets the same answer."""

    max_new_tokens: int = 300
    """Longest answer in tokens."""
    temperature: float = 0.0
    """Softmax temperature of sampling; 0 is greedy."""
    top_p: float = 1.0
    """Sampling keeps the likeliest tokens up to this total probability."""
    top_k: int = 0
    """Sampling keeps this many of the likeliest tokens; 0 keeps all."""
    repetition_penalty: float = 1.0
    """Divides the scores of tokens already in the answer; 1 is off."""
    num_beams: int = 1
    """Beams of a search for the likeliest answer as a whole, instead of token by token; 1 is off. Not with sampling."""
    length_penalty: float = 1.0
    """Beam search divides an answer's log probability by its length to this power; above 0 favours long ones."""
    seed: int = 42
    """Seed of sampling."""

    def __post_init__(self) -> None:
        """Refuse values that no decoding can use, and take 1 for 1.0: transformers' processors insist on floats."""
        for name in ("temperature", "top_p", "repetition_penalty", "length_penalty"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, found {self.max_new_tokens}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, found {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], found {self.top_p}")
        if self.num_beams < 1:
            raise ValueError(f"num_beams must be at least 1, found {self.num_beams}")
        if self.num_beams > 1 and self.temperature > 0:
            raise ValueError(
                f"num_beams {self.num_beams} needs temperature 0, found {self.temperature}: beams do not sample"
            )
        if self.top_k < 0 or self.repetition_penalty <= 0:
            raise ValueError("top_k must not be negative and repetition_penalty must be positive")
