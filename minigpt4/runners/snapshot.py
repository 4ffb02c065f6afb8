"""What a run saves and takes up again: trained tensors, optimiser, counters, random numbers, data positions.

Input: the parts of a run. Output: a checkpoint folder that can be used, and resumed from as if the run had never
stopped.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from minigpt4 import __version__
from minigpt4.assets import ASSETS, mentioned
from minigpt4.checkpoints.assemble import load_trained
from minigpt4.checkpoints.manifest import FORMAT, Manifest, PartIdentity
from minigpt4.checkpoints.start import Start
from minigpt4.checkpoints.store import CONFIG, CheckpointStore, read_state
from minigpt4.config import Config, differences, load_config
from minigpt4.errors import CheckpointError
from minigpt4.models.minigpt4 import MiniGPT4
from minigpt4.runners.launch import gather_objects, random_state, restore_random_state
from minigpt4.runners.progress import Progress, Window

_log = logging.getLogger(__name__)


@dataclass
class RunState:
    """How far a run is, on this rank.

    Attributes:
        progress: counters over all ranks.
        window: sums since the last line of metrics.
        positions: items that each reader of this rank has consumed.
    """

    progress: Progress = field(default_factory=Progress)
    window: Window = field(default_factory=Window)
    positions: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Origin:
    """What the checkpoints of a run come from; see `Manifest`."""

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
        origin: frozen parts, stage and data.
    """

    config: Config
    store: CheckpointStore
    accelerator: Accelerator
    model: MiniGPT4
    optimizer: AcceleratedOptimizer
    origin: Origin

    def save(self, state: RunState) -> None:
        """Write a checkpoint; every rank takes part.

        Raises:
            CheckpointError: the disk refuses.
        """
        positions = {k: v for part in gather_objects(self.accelerator, state.positions) for k, v in part.items()}
        random_states = gather_objects(self.accelerator, random_state())
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            values = {
                "optimizer": self.optimizer.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "progress": state.progress.state(),
                "window": state.window.state(),
                "positions": positions,
                "random_states": random_states,
                "readers": self._readers(),
            }
            path = self.store.save(
                state.progress.step,
                self.model.trained_state(),
                self._manifest(state.progress),
                self.config.to_yaml(),
                values,
            )
            _log.info("saved %s", path)
        self.accelerator.wait_for_everyone()

    def restore(self, folder: Path) -> RunState:
        """Take up the state of a checkpoint of this run.

        Raises:
            CheckpointError: it does not fit this run.
        """
        start, values = Start.at(folder), read_state(folder)
        self._check(folder, values)
        if start.manifest.data and start.manifest.data != self.origin.data:
            _log.warning("%s: the training data has changed since; the run goes on with the new data", folder)
        load_trained(self.model, start)
        settings = [{key: value for key, value in g.items() if key != "params"} for g in self.optimizer.param_groups]
        self.optimizer.load_state_dict(values["optimizer"])
        for group, wanted in zip(self.optimizer.param_groups, settings, strict=True):
            group.update(wanted)  # the moments go on; rates, decays and epsilon are those of this config
        if self.accelerator.scaler is not None and values["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        restore_random_state(values["random_states"][self.accelerator.process_index])
        _log.info("resumed from %s", folder)
        progress = Progress.from_state(values["progress"])
        rank, workers = self.accelerator.process_index, max(1, self.config.run.num_workers)
        own = {reader: position for reader, position in values["positions"].items() if reader // workers == rank}
        return RunState(progress, Window(**values["window"]), own)

    def _check(self, folder: Path, values: dict[str, Any]) -> None:
        """Refuse what would not go on as if the run had never stopped."""
        theirs, ours = values["readers"], self._readers()
        if theirs != ours:
            raise CheckpointError(
                f"{folder}: was read by {theirs[0]} rank(s) with {theirs[1]} worker(s) each, this run has {ours[0]} "
                f"with {ours[1]}; the order of the data would change. Resume with the same numbers, or start a new "
                "run with model.init_from"
            )
        theirs_config = load_config(folder / CONFIG)
        changed = differences(theirs_config, self.config, "model", "processors", "conversation", "datasets", "compat")
        if theirs_config.run.seed != self.config.run.seed:
            changed.append("run.seed")
        if changed:
            raise CheckpointError(
                f"{folder}: the config has changed since ({', '.join(changed)}), and the run would not be one run. "
                "Resume with the same settings, or start a new run with model.init_from and another run.output_dir"
            )

    def _readers(self) -> list[int]:
        return [self.accelerator.num_processes, self.config.run.num_workers]

    def _manifest(self, progress: Progress) -> Manifest:
        used = {name: self.config.values.get(name) for name in ("model", "datasets")}  # not what only evaluation reads
        return Manifest(
            format=FORMAT,
            version=__version__,
            step=progress.step,
            total_steps=self.config.run.total_steps,
            template=self.config.conversation.template,
            trained={name: list(tensor.shape) for name, tensor in self.model.trained_state().items()},
            parts=self.origin.parts,
            samples=progress.samples,
            tokens=progress.tokens,
            notes=[f"{n}: {ASSETS[n].about} ({ASSETS[n].licence})" for n in mentioned(used)],
            stage=self.origin.stage,
            data=self.origin.data,
        )
