"""The `server` section: what the service allows."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ServerSection:
    """Limits of the service; each is one that a client is told about when it meets it."""

    max_rows: int = 16
    """Requests decoded together."""
    max_waiting: int = 64
    """Requests that may wait beside those; the next one is refused with status 429."""
    max_body_megabytes: float = 20.0
    """Largest request."""
    body_seconds: float = 60.0
    """Longest time in which a request must have arrived."""
    max_text_characters: int = 200_000
    """Longest text of a request, all messages together; counted before anything is tokenised."""
    max_images: int = 8
    """Images of a request, all messages together."""
    max_pixels: int = 25_000_000
    """Largest image, in pixels."""
    max_new_tokens: int = 2048
    """Longest answer that a request may ask for, in tokens."""
    image_urls: bool = False
    """Whether the service fetches images from http(s) addresses; never from private ones."""
    image_url_seconds: float = 10.0
    """Longest time to fetch one image."""
    image_url_megabytes: float = 10.0
    """Largest image that is fetched."""
    shutdown_seconds: float = 30.0
    """How long answers in progress may go on after the service was told to stop."""

    def __post_init__(self) -> None:
        """Refuse limits that let nothing through."""
        least = {"max_waiting": 0, "max_rows": 1, "max_text_characters": 1, "max_images": 0, "max_pixels": 1}
        least |= {"max_new_tokens": 1, "shutdown_seconds": 0}
        wrong = [
            f"{name} must be at least {low}, found {getattr(self, name)}"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        positive = ("max_body_megabytes", "body_seconds", "image_url_seconds", "image_url_megabytes")
        wrong += [
            f"{name} must be above 0, found {getattr(self, name)}" for name in positive if getattr(self, name) <= 0
        ]
        if wrong:
            raise ValueError("; ".join(wrong))
