"""MLflow's model registry: a version per evaluated pair of networks, and which is the champion.

    version   = base + upsampler, known by their sha256; a second evaluation adds its numbers to it
    protocol  = what must be equal for two evaluations to be compared, see protocol.py
    champion  = an alias; an evaluation moves it to the better of two versions under one protocol

An evaluation never moves it on a tie, on NaN, or where the champion was not measured by the same
protocol. A person moves it with `python -m flows champion set` and `rollback`; what was passed over
so is withdrawn and never elected again. Weights stay in the store; a version says where they are.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from flows.record import card, lineage, scrub
from flows.record.comparable import Score, protocol_of, score_of
from flows.record.tracking import Tracker, found_by
from flows.stage import StageOutput
from flows.storage.store import Resolved, Store

ALIAS = "champion"
ROLES = ("base", "upsampler")
RESULTS = "results.json"
ARTIFACTS = "registered"
"""Folder of the evaluation's artifacts that a version points to."""
DESCRIPTION_LENGTH = 5000
"""Longest description that MLflow's database takes."""
PREVIOUS, SINCE, REASON, WITHDRAWN = (
    f"{ALIAS}.{what}" for what in ("previous", "since", "reason", "withdrawn")
)
"""Tags of versions that were champion, or shall not be."""
SCORE = "score."
"""Tag of a version: this and a protocol hold the deciding metric, its value and the run."""


class RegistryError(RuntimeError):
    """What was asked of the registry cannot be done; the message says what can."""


@dataclass(frozen=True)
class Pair:
    """What an evaluation measured: the outputs that hold its networks, by role."""

    outputs: Mapping[str, card.Output]

    @property
    def sha256(self) -> dict[str, str]:
        """Digest of each snapshot."""
        found = {
            r: lineage.sha256_of(o.manifest, lineage.SNAPSHOT) for r, o in self.outputs.items()
        }
        return {role: digest or "" for role, digest in found.items()}

    @property
    def tags(self) -> dict[str, str]:
        """How a version names its networks."""
        digests = self.sha256
        tags = {
            "pair": hashlib.sha256("".join(digests[role] for role in ROLES).encode()).hexdigest()
        }
        for role, output in self.outputs.items():
            tags[f"{role}.uri"] = scrub.text(lineage.uri(output.place, lineage.SNAPSHOT))
            tags[f"{role}.sha256"] = digests[role]
            tags[f"{role}.key"] = output.manifest.key
        return tags


def register_evaluation(
    tracker: Tracker, store: Store, resolved: Resolved, output: StageOutput, run_id: str
) -> str:
    """Register what an evaluation measured and let it stand for champion; says what happened.

    Done twice it is done once, so a run that was cut off here is made good by the next one.
    """
    networks = {role: resolved.inputs[role] for role in ROLES}
    pair = Pair({role: card.Output(i.place, i.manifest) for role, i in networks.items()})
    return tracker.retry(lambda: _register(tracker, store, pair, output, run_id), output.path)


def _register(tracker: Tracker, store: Store, pair: Pair, output: StageOutput, run_id: str) -> str:
    judged = card.find(store, f"{output.stage}/{output.key}")
    assert judged is not None, "it was committed a moment ago, or looked up"
    results = judged.json(RESULTS)
    registry = Registry(tracker.client, tracker.name)
    protocol, score = protocol_of(results, judged.manifest), score_of(results)
    version = registry.find(pair)
    if version is None or not version.tags.get(SCORE + protocol, "").endswith(run_id):
        text = card.render(tracker.name, store, judged, pair.outputs)
        version = registry.register(pair, run_id, text)
        registry.record_scores(version, protocol, score, results, run_id)
    registry.update_location(version, pair)
    said = f"{tracker.name} version {version.version}: {registry.elect(protocol)}"
    tracker.client.set_tag(run_id, "registry", said)
    return said


class Registry:
    """One registered model, as versions and the alias `champion`."""

    def __init__(self, client: MlflowClient, name: str):
        self.client = client
        self.name = name

    def versions(self) -> list[ModelVersion]:
        """All versions, the oldest first."""
        found = found_by(self.client.search_model_versions, f"name = '{self.name}'")
        return sorted(found, key=lambda version: int(version.version))

    def others(self) -> list[str]:
        """Names of the registered models of this record."""
        found = self.client.search_registered_models(max_results=100)
        return sorted(model.name for model in found)

    def find(self, pair: Pair) -> ModelVersion | None:
        """The version of a pair."""
        wanted = pair.tags["pair"]
        return next((v for v in self.versions() if v.tags.get("pair") == wanted), None)

    def champion(self) -> ModelVersion | None:
        """The version that the alias names."""
        try:
            return self.client.get_model_version_by_alias(self.name, ALIAS)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def register(self, pair: Pair, run_id: str, text: str) -> ModelVersion:
        """The version of a pair, made if there is none, with its model card.

        It points to artifacts of the evaluation, which say where the weights are: a tracking
        server refuses paths of its own disk as a source.
        """
        self._publish(pair, run_id, text)
        if (old := self.find(pair)) is not None:
            self.client.update_model_version(self.name, old.version, _described(text))
            return old
        self._ensure()
        new = self.client.create_model_version(
            self.name,
            source=f"{self.client.get_run(run_id).info.artifact_uri}/{ARTIFACTS}",
            run_id=run_id,
            tags=pair.tags,
            description=_described(text),
        )
        first = self.find(pair)
        if first is not None and first.version != new.version:
            # Another evaluation of the pair was a moment earlier: the older one stays.
            self.client.delete_model_version(self.name, new.version)
            return first
        return new

    def record_scores(
        self,
        version: ModelVersion,
        protocol: str,
        score: Score,
        results: Mapping[str, Any],
        run_id: str,
    ) -> None:
        """Write an evaluation's numbers to a version; the score last, for it counts."""
        tags = {name: f"{value:.6g}" for name, value in results["metrics"].items()}
        tags |= {"protocol": protocol, "protocol.name": results.get("protocol", {}).get("name", "")}
        tags |= {
            "evaluation.run_id": run_id,
            SCORE + protocol: f"{score.metric} {score.value!r} {run_id}",
        }
        for key, value in tags.items():
            self._tag(version, key, value)

    def update_location(self, version: ModelVersion, pair: Pair) -> None:
        """Let a version say where its networks are now: a store may be moved."""
        for key, value in pair.tags.items():
            if version.tags.get(key) != value:
                self._tag(version, key, value)

    def elect(self, protocol: str) -> str:
        """Make the best version under a protocol champion; says what was decided.

        No lock is needed: who moves the alias looks again afterwards, so of two that finish
        together the later one sees both, and the better one stays.
        """
        said = ""
        while True:
            champion = self.champion()
            best = self._best(protocol)
            if best is None:
                return said or "no champion: nothing was measured that decides"
            score = score_under(best, protocol)
            if champion is None:
                said = self._promote(best, None, f"first, {score.metric} {score.value:.6g}")
                continue
            held = score_under(champion, protocol)
            if math.isnan(held.value):
                return said or (
                    f"champion stays version {champion.version}, which was not measured by "
                    f"protocol {protocol}: `python -m flows champion set {best.version}` moves it"
                )
            if not score.beats(held):
                return said or (
                    f"champion stays version {champion.version} ({held.metric} {held.value:.6g})"
                )
            reason = f"{score.metric} {score.value:.6g} < {held.value:.6g} by protocol {protocol}"
            said = self._promote(best, champion, reason)

    def choose(self, number: str) -> str:
        """Make a version champion by hand; better ones are withdrawn, or they would win again."""
        wanted = self._version(number)
        champion = self.champion()
        if champion is not None and champion.version == wanted.version:
            return f"version {number} is champion already"
        self._restore(wanted)
        for version in self.versions():
            if version.version != wanted.version and _is_better(version, wanted):
                self._withdraw(version, f"passed over for version {number} by hand")
        return self._promote(wanted, champion, "by hand")

    def roll_back(self) -> str:
        """Give the title back to the champion before this one, which is withdrawn."""
        champion = self.champion()
        if champion is None:
            raise RegistryError(
                f"{self.name} has no champion to roll back: name one with "
                "`python -m flows champion set VERSION`"
            )
        previous = champion.tags.get(PREVIOUS)
        if not previous:
            raise RegistryError(
                f"version {champion.version} of {self.name} is its first champion: name another "
                "with `python -m flows champion set VERSION`"
            )
        target = self._version(previous)
        self._withdraw(champion, f"rolled back to version {previous}")
        self._restore(target)
        return self._move(target, champion, f"rolled back from version {champion.version}")

    def _best(self, protocol: str) -> ModelVersion | None:
        measured = [
            version
            for version in self.versions()
            if not version.tags.get(WITHDRAWN)
            and not math.isnan(score_under(version, protocol).value)
        ]
        return min(measured, key=lambda v: score_under(v, protocol).value, default=None)

    def _promote(self, version: ModelVersion, old: ModelVersion | None, reason: str) -> str:
        if old is not None:
            self._tag(version, PREVIOUS, str(old.version))
        return self._move(version, old, reason)

    def _move(self, version: ModelVersion, old: ModelVersion | None, reason: str) -> str:
        self._tag(version, SINCE, _now())
        self._tag(version, REASON, reason)
        self.client.set_registered_model_alias(self.name, ALIAS, version.version)
        return f"champion: version {old.version if old else 'none'} → {version.version} ({reason})"

    def _tag(self, version: ModelVersion, key: str, value: str) -> None:
        self.client.set_model_version_tag(self.name, version.version, key, value)

    def _withdraw(self, version: ModelVersion, reason: str) -> None:
        self._tag(version, WITHDRAWN, f"{reason}, {_now()}")

    def _restore(self, version: ModelVersion) -> None:
        if version.tags.get(WITHDRAWN):
            self.client.delete_model_version_tag(self.name, version.version, WITHDRAWN)

    def _version(self, number: str) -> ModelVersion:
        for version in self.versions():
            if str(version.version) == number:
                return version
        there = ", ".join(str(version.version) for version in self.versions()) or "none"
        raise RegistryError(f"{self.name} has no version {number!r}: there are {there}")

    def _ensure(self) -> None:
        try:
            self.client.create_registered_model(
                self.name, description="Text to image: a base generator and its upsampler."
            )
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _publish(self, pair: Pair, run_id: str, text: str) -> None:
        self.client.log_text(run_id, text, f"{ARTIFACTS}/model_card.md")
        self.client.log_dict(run_id, pair.tags, f"{ARTIFACTS}/pair.json")


def score_under(version: ModelVersion, protocol: str) -> Score:
    """A version's deciding number by a protocol; NaN where it has none."""
    metric, value, _ = (*version.tags.get(SCORE + protocol, "").split(), "", "nan", "")[:3]
    return Score(metric, float(value))


def _is_better(version: ModelVersion, other: ModelVersion) -> bool:
    protocols = [tag.removeprefix(SCORE) for tag in version.tags if tag.startswith(SCORE)]
    return any(score_under(version, p).beats(score_under(other, p)) for p in protocols)


def _described(text: str) -> str:
    if len(text) <= DESCRIPTION_LENGTH:
        return text
    more = f"\n\n… the whole card: artifact `{ARTIFACTS}/model_card.md` of the evaluation's run."
    return text[: DESCRIPTION_LENGTH - len(more)].rpartition("\n")[0] + more


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
