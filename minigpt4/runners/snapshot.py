"""What a run saves and restores: trained tensors, optimiser, counters, random numbers, data positions.

Input: the parts of a run. Output: a checkpoint folder that can be used, and resumed from as if the run had never
stopped.
"""

from __future__ import annotations

import logging
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from minigpt4 import __version__
from minigpt4.assets import ASSETS, mentioned
from minigpt4.checkpoints.assemble import load_trained
from minigpt4.checkpoints.manifest import FORMAT, Manifest, PartIdentity
from minigpt4.checkpoints.start import Start
from minigpt4.checkpoints.store import CONFIG, CheckpointStore, read_state
from minigpt4.config import Config, differences, load_saved_config
from minigpt4.errors import CheckpointError, TrainingError
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.runners.distributed import gather_objects
from minigpt4.runners.state import Interval, Progress, TrainingState

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Provenance:
    """What the checkpoints of a run come from; see the attributes of `Manifest`."""

    parts: dict[str, PartIdentity]
    stage: int
    data: str


@dataclass
class Snapshots:
    """Saves and restores the state of one run.

    Attributes:
        config: of the run.
        store: where checkpoints go.
        accelerator: the run's.
        model: not wrapped.
        optimizer: as accelerate prepared it.
        provenance: frozen parts, stage and data.
    """

    config: Config
    store: CheckpointStore
    accelerator: Accelerator
    model: MiniGPT4
    optimizer: AcceleratedOptimizer
    provenance: Provenance

    def save(self, state: TrainingState) -> None:
        """Write a checkpoint; every rank must call this.

        Raises:
            CheckpointError: it cannot be written.
            TrainingError: a trained tensor has values that are not finite.
        """
        tensors = self.model.trained_state()
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            kept = self.store.latest()
            raise TrainingError(
                f"step {state.progress.step}: {', '.join(broken[:5])} has values that are not finite and is not saved; "
                f"the last checkpoint is {kept.name if kept else 'missing'}. Lower run.learning_rate"
            )
        places = gather_objects(self.accelerator, (state.positions, state.given))
        random_states = gather_objects(self.accelerator, random_state())
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            values = {
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "progress": state.progress.to_dict(),
                "window": asdict(state.interval),
                "positions": {reader: at for positions, _ in places for reader, at in positions.items()},
                "given": {reader: number for _, given in places for reader, number in given.items()},
                "random_states": random_states,
                "readers": self._readers(),
                "sorted_sources": True,
                "attention": state.attention,
            }
            path = self.store.save(
                state.progress.step,
                tensors,
                self._manifest(state.progress),
                self.config.to_yaml(),
                values,
            )
            _log.info("saved %s", path)
        self.accelerator.wait_for_everyone()

    def restore(self, folder: Path, state: TrainingState) -> None:
        """Restore a checkpoint of this run: model, optimiser, random numbers, and `state`.

        Raises:
            CheckpointError: it does not fit this run.
        """
        start, values = Start.at(folder), read_state(folder)
        self._check(folder, values)
        if start.manifest.data and start.manifest.data != self.provenance.data:
            _log.warning("%s: the training data has changed since; the run continues with the new data", folder)
        names = list(load_saved_config(folder / CONFIG).datasets.train)
        if "sorted_sources" not in values and names != sorted(names):
            _log.warning(
                "%s: was written when data sets were mixed in the order of the YAML; now they are sorted by name, so "
                "the order of the samples changes from here on",
                folder,
            )
        load_trained(self.model, start)
        settings = [{key: value for key, value in g.items() if key != "params"} for g in self.optimizer.param_groups]
        self.optimizer.load_state_dict(values["optimizer"])
        for group, values_now in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(values_now)  # only the moments are restored; rates, decays and epsilon are this config's
        if self.accelerator.scaler is not None and values["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        restore_random_state(values["random_states"][self.accelerator.process_index])
        _log.info("resumed from %s", folder)
        rank, workers = self.accelerator.process_index, max(1, self.config.run.num_workers)
        state.progress = Progress.from_dict(values["progress"])
        state.interval = Interval(**values["window"])
        state.attention = values.get("attention", {})
        state.positions = {reader: at for reader, at in values["positions"].items() if reader // workers == rank}
        state.given = {reader: values.get("given", {}).get(reader, 0) for reader in state.positions}

    def _check(self, folder: Path, values: dict[str, Any]) -> None:
        """Refuse a checkpoint from which the run would not continue as if it had never stopped."""
        theirs, ours = values["readers"], self._readers()
        if theirs != ours:
            raise CheckpointError(
                f"{folder}: was read by {theirs[0]} rank(s) with {theirs[1]} worker(s) each, this run has {ours[0]} "
                f"with {ours[1]}; the order of the data would change. Resume with the same numbers, or start a new "
                "run with model.init_from"
            )
        theirs_config = load_saved_config(folder / CONFIG)
        changed = differences(theirs_config, self.config, "model", "processors", "conversation", "datasets", "compat")
        if bool(theirs_config.datasets.feature_cache) != bool(self.config.datasets.feature_cache):
            changed.append("datasets.feature_cache")
        names = ["seed", "group_by_length", "pack"] + ["batch_size_per_rank"] * (self.config.run.group_by_length > 1)
        before, now = theirs_config.run, self.config.run
        changed += [f"run.{name}" for name in names if getattr(before, name) != getattr(now, name)]
        if changed:
            raise CheckpointError(
                f"{folder}: the config has changed since ({', '.join(changed)}). "
                "Resume with the same settings, or start a new run with model.init_from and another run.output_dir"
            )

    def _readers(self) -> list[int]:
        return [self.accelerator.num_processes, self.config.run.num_workers]

    def _manifest(self, progress: Progress) -> Manifest:
        used = {name: self.config.values.get(name) for name in ("model", "datasets")}  # evaluation's are not trained on
        return Manifest(
            format=FORMAT,
            version=__version__,
            step=progress.step,
            total_steps=self.config.run.total_steps,
            template=self.config.conversation.template,
            trained={name: list(tensor.shape) for name, tensor in self.model.trained_state().items()},
            parts=self.provenance.parts,
            samples=progress.samples,
            tokens=progress.tokens,
            notes=[f"{n}: {ASSETS[n].about} ({ASSETS[n].licence})" for n in mentioned(used)],
            stage=self.provenance.stage,
            data=self.provenance.data,
        )


def random_state() -> dict[str, Any]:
    """Return this process's random state as plain values and tensors."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.accelerator.is_available():
        state["accelerator"] = torch.get_device_module().get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "accelerator" in state and torch.accelerator.is_available():
        torch.get_device_module().set_rng_state(state["accelerator"])
