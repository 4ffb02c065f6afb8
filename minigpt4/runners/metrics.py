"""Numbers out: `metrics.jsonl`, always; the trackers of accelerate, where asked for."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import uuid
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from minigpt4.checkpoints.store import write_whole
from minigpt4.config.sections import TrackingConfig
from minigpt4.errors import ConfigError, MissingDependencyError, TrainingError

_log = logging.getLogger(__name__)

FILE = "metrics.jsonl"
WANDB_ID = "wandb_id"


def wanted_trackers(tracking: TrackingConfig) -> list[str]:
    """Return accelerate's names of the trackers asked for.

    Raises:
        MissingDependencyError: a tracker's package is not installed; accelerate would drop it in silence.
        ConfigError: there is no login for wandb.
    """
    extras = {"wandb": "", "tensorboard": "tensorboard"}
    names = [name for name in extras if getattr(tracking, name)]
    for name in names:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:  # a mere folder of that name, as `wandb` leaves behind, has no origin
            raise MissingDependencyError(name, f"tracking.{name}", extras[name])
    if tracking.wandb:
        _check_wandb_login()
    return names


def _check_wandb_login() -> None:
    """Raise ConfigError if wandb would ask for a login, which it does only after the model is loaded."""
    import wandb

    settings = wandb.setup().settings
    if settings.mode in ("offline", "disabled", "dryrun") or wandb.api.api_key:
        return
    wandb.teardown()  # it reads the environment once; the next try must read it again
    raise ConfigError(
        "tracking.wandb: there is no login: run `wandb login`, or set the variable WANDB_API_KEY, or WANDB_MODE=offline"
    )


class MetricsLog:
    """Writes one JSON object per logged step, on rank 0, and passes the same numbers to the trackers."""

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self.accelerator = accelerator
        self.file = folder / FILE

    def start(self, tracking: TrackingConfig, run_name: str, config: dict[str, Any], step: int) -> None:
        """Open the trackers for a run that continues after `step`."""
        if not self.accelerator.log_with:
            return
        init: dict[str, Any] = {}
        if tracking.wandb and self.accelerator.is_main_process:
            name = tracking.run_name or run_name
            init["wandb"] = {"name": name, "dir": str(self.file.parent), "id": self._wandb_id(step), "resume": "allow"}
        flat = {key: value for key, value in _flat(config) if isinstance(value, (int, float, str, bool))}
        try:
            self.accelerator.init_trackers(tracking.project, config=flat, init_kwargs=init)
        except Exception as error:  # each tracker has its own kinds: no network, no permission, a full disk
            raise TrainingError(f"tracking: a tracker cannot be started: {error}") from error

    def _wandb_id(self, step: int) -> str:
        """Return the id of the run at wandb, kept in the run folder, so that a resumed run is the same one there.

        A run that begins anew in an old folder is another one: wandb takes no step twice.
        """
        file = self.file.with_name(WANDB_ID)
        known = file.read_text(encoding="utf-8") if step and file.is_file() else ""
        if not known:
            known = uuid.uuid4().hex
            file.write_text(known, encoding="utf-8")
        return known

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Write the numbers of a step; what is not finite is null in the file, since JSON has no word for it."""
        if self.accelerator.is_main_process:
            plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
            try:
                with self.file.open("a", encoding="utf-8") as out:
                    out.write(json.dumps({"step": step, **plain}) + "\n")
            except OSError as error:
                raise TrainingError(f"step {step}: {self.file} cannot be written: {error.strerror}") from error
        numbers = {k: v for k, v in values.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        if self.accelerator.log_with:
            self.accelerator.log(numbers, step=step)

    def forget_after(self, step: int) -> None:
        """Drop the lines of steps after `step`, which are about to be written again; also a line cut by a kill."""
        if not self.accelerator.is_main_process or not self.file.is_file():
            return
        lines = self.file.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if _step_of(line) <= step]
        if len(kept) < len(lines):
            _log.info("%s: dropped %d lines after step %d", self.file, len(lines) - len(kept), step)
        write_whole(self.file, "".join(f"{line}\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _flat(values: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for key, value in values.items():
        name = f"{prefix}{key}"
        pairs += _flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return pairs
