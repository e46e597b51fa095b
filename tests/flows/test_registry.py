"""Which evaluated pair is the champion, on a database file."""

import contextlib
import math
import threading

import pytest
from mlflow.exceptions import MlflowException

from flows.__main__ import main
from flows.config import PipelineConfig
from flows.record import registry
from flows.record.comparable import Score, score_of
from flows.record.lineage import SNAPSHOT
from flows.record.registry import Registry, RegistryError, register_evaluation
from flows.record.tracking import Tracker
from flows.stages import evaluate
from flows.storage.store import Store
from tests.flows.conftest import new_record
from tests.flows.outputs import RULES, evaluated

OTHER_RULES = RULES | {"crop": "none"}


@pytest.fixture
def tracker(config):
    return Tracker(config.name, config.store_path)


@pytest.fixture
def judge(config, tracker):
    """Register an evaluation; returns what was said."""

    def run(number, kid, **options):
        made = evaluated(config, number, kid, **options)
        run_id = tracker.start_stage(
            evaluate.STAGE, made.output.key, {}, parent=None, fresh=True, tags={}
        )
        store = Store.of(config)
        said = register_evaluation(tracker, store, made.resolved, made.output, run_id)
        assert tracker.client.get_run(run_id).data.tags["registry"] == said
        return said

    return run


@pytest.fixture
def models(tracker):
    return Registry(tracker.client, tracker.name)


def champion(models):
    found = models.champion()
    return int(found.version) if found else None


def test_a_version_names_both_snapshots_their_digests_keys_numbers_and_rules(judge, models, config):
    judge(1, 0.25)
    (version,) = models.versions()
    made = evaluated(config, 1, 0.25)
    assert version.tags["base.uri"] == (made.base.path / SNAPSHOT).as_uri()
    assert version.tags["upsampler.key"] == made.upsampler.key
    assert len(version.tags["base.sha256"]) == 64
    assert version.tags["base.sha256"] != version.tags["upsampler.sha256"]
    assert (version.tags["kid"], version.tags["protocol.name"]) == ("0.25", "rules-64")
    assert version.tags[f"score.{version.tags['protocol']}"].startswith("kid 0.25 ")
    names = {a.path for a in models.client.list_artifacts(version.run_id, "registered")}
    assert names == {"registered/model_card.md", "registered/pair.json"}
    assert version.description.startswith(f"# {models.name}: a base generator")


def test_the_better_number_takes_the_title_and_says_from_whom(judge, models):
    assert "none → 1 (first, kid 0.3)" in judge(1, 0.3)
    assert "version 1 → 2 (kid 0.2 < 0.3 by protocol" in judge(2, 0.2)
    assert champion(models) == 2
    tags = models.champion().tags
    assert tags["champion.previous"] == "1"
    assert "0.2 < 0.3" in tags["champion.reason"]


@pytest.mark.parametrize("kid", [0.2, 0.4, math.nan, None])
def test_ties_worse_numbers_and_none_leave_the_title(judge, models, kid):
    judge(1, 0.2)
    judge(2, kid)
    assert champion(models) == 1
    assert len(models.versions()) == 2


def test_without_a_number_nobody_is_champion(judge, models):
    assert "no champion" in judge(1, math.nan)
    assert champion(models) is None


def test_other_rules_take_no_title_and_say_so(judge, models):
    judge(1, 0.3)
    assert "was not measured by protocol" in judge(2, 0.1, rules=OTHER_RULES)
    assert champion(models) == 1


def test_a_pair_evaluated_again_is_the_same_version_with_both_numbers(judge, models):
    judge(1, 0.3, weights="equal")
    judge(2, 0.3, weights="equal")
    judge(3, 0.1, weights="equal", rules=OTHER_RULES)
    (version,) = models.versions()
    assert len([tag for tag in version.tags if tag.startswith("score.")]) == 2


def test_a_champion_measured_by_the_new_rules_too_can_be_beaten_under_them(judge, models):
    judge(1, 0.3, weights="first")
    judge(2, 0.4, weights="first", rules=OTHER_RULES)
    judge(3, 0.35, rules=OTHER_RULES)
    assert champion(models) == 2


def test_considered_twice_it_is_registered_once(tracker, config, models):
    made = evaluated(config, 1, 0.3)
    stage = evaluate.STAGE
    run_id = tracker.start_stage(stage, made.output.key, {}, parent=None, fresh=True, tags={})
    store = Store.of(config)
    for _ in range(2):
        register_evaluation(tracker, store, made.resolved, made.output, run_id)
    assert [version.version for version in models.versions()] == [1]


def test_what_broke_off_between_version_and_title_is_made_good(judge, models, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "elect", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            judge(1, 0.3)
    assert champion(models) is None
    judge(1, 0.3)
    assert (champion(models), len(models.versions())) == (1, 1)


def test_of_evaluations_that_finish_together_the_best_wins(config, runs, monkeypatch):
    tracker = Tracker(config.name, config.store_path)
    models = Registry(tracker.client, tracker.name)
    kids = [0.5, 0.2, 0.4, 0.3]
    made = {n: evaluated(config, n, kid) for n, kid in enumerate(kids, 1)}
    runs_of = {
        n: tracker.start_stage(evaluate.STAGE, m.output.key, {}, parent=None, fresh=True, tags={})
        for n, m in made.items()
    }
    models._ensure()
    together = threading.Barrier(len(kids))
    errors = []
    moved = Registry._move
    held = threading.Barrier(len(kids))

    def all_at_once(self, version, old, reason):
        with contextlib.suppress(threading.BrokenBarrierError):
            held.wait(5)  # all have read the old champion before any moves the title
        return moved(self, version, old, reason)

    monkeypatch.setattr(Registry, "_move", all_at_once)

    def one(n):
        together.wait()
        made_by = Store.of(config), made[n].resolved, made[n].output, runs_of[n]
        try:
            register_evaluation(tracker, *made_by)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(n,)) for n in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len(models.versions()) == len(kids)
    protocol = models.versions()[0].tags["protocol"]
    assert registry.score_under(models.champion(), protocol).value == 0.2


def test_rolling_back_gives_the_title_to_the_one_before_and_lasts(judge, models):
    for number, kid in enumerate([0.3, 0.2, 0.1], 1):
        judge(number, kid)
    assert "version 3 → 2" in models.roll_back()
    assert "rolled back to version 2" in models.versions()[2].tags["champion.withdrawn"]
    judge(4, 0.25)  # worse than the champion, and the withdrawn one is not called back
    assert champion(models) == 2
    models.roll_back()
    assert champion(models) == 1
    with pytest.raises(RegistryError, match="is its first champion"):
        models.roll_back()


def test_a_title_given_by_hand_lasts_until_something_new_is_better(judge, models):
    for number, kid in enumerate([0.3, 0.2], 1):
        judge(number, kid)
    assert "2 → 1 (by hand)" in models.choose("1")
    judge(3, 0.4)
    assert champion(models) == 1
    judge(4, 0.25)
    assert champion(models) == 4
    models.choose("2")
    assert champion(models) == 2
    assert "champion.withdrawn" not in models.champion().tags


def test_a_version_that_is_not_there_is_named_with_those_that_are(judge, models):
    with pytest.raises(RegistryError, match="no champion to roll back"):
        models.roll_back()
    judge(1, 0.3)
    with pytest.raises(RegistryError, match="no version '7': there are 1"):
        models.choose("7")


def test_many_pictures_are_judged_by_fid_and_few_by_kid():
    metrics = {"fid": 9.0, "kid": 0.1}
    few = {"protocol": RULES, "metrics": metrics}
    many = {"protocol": RULES | {"num_generated": 30_000, "num_real": 10_000}, "metrics": metrics}
    assert score_of(few) == Score("kid", 0.1)
    assert score_of(many) == Score("fid", 9.0)


def test_a_registry_that_refuses_is_an_error_of_the_evaluation(judge, monkeypatch):
    def refuse(*_, **__):
        raise MlflowException("not allowed", error_code=7)

    monkeypatch.setattr("mlflow.MlflowClient.create_model_version", refuse)
    with pytest.raises(MlflowException, match="not allowed"):
        judge(1, 0.3)


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`python -m flows champion …` on a record with two versions; returns status and output."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store = tmp_path / "store"
    config = PipelineConfig(store=str(store))
    new_record(tmp_path / "mlflow.db")
    tracker = Tracker(config.name, store)
    for number, kid in enumerate([0.3, 0.2], 1):
        made = evaluated(config, number, kid)
        stage, key = evaluate.STAGE, made.output.key
        run_id = tracker.start_stage(stage, key, {}, parent=None, fresh=True, tags={})
        register_evaluation(tracker, Store.of(config), made.resolved, made.output, run_id)

    def run(*arguments):
        capsys.readouterr()
        status = main(["champion", *arguments, "--store", str(store)])
        said = capsys.readouterr()
        return status, " ".join((said.out + said.err).split())

    return run


def test_the_command_shows_sets_and_rolls_back(command):
    status, said = command()
    assert status == 0
    assert "2 champion kid 0.2" in said
    assert command("set", "1") == (0, "champion: version 2 → 1 (by hand)")
    assert command("rollback") == (0, "champion: version 1 → 2 (rolled back from version 1)")
    assert "rolled back to version 2" in command()[1]


def test_the_command_refuses_what_it_does_not_understand(command):
    for arguments in (["set"], ["rollback", "1"], ["set", "9"]):
        status, said = command(*arguments)
        assert status == 1
        assert "error:" in said


def test_the_command_names_the_models_that_there_are_instead(command):
    for arguments in ([], ["rollback"], ["set", "1"]):
        status, said = command("--preset", "smoke", *arguments)
        assert status == 1
        assert "mlflow.db has no version of smoke" in said
        assert said.endswith(": there are versions of gigagan (--preset demo)")


def test_the_command_makes_no_record_where_there_is_none(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for arguments in (["champion"], ["compare", "--no-open"]):
        assert main([*arguments, "--store", str(tmp_path / "new/store")]) == 1
        assert f"no record at sqlite:///{tmp_path}/new/mlflow.db" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.flow
@pytest.mark.usefixtures("prefect_server")
def test_a_pipeline_that_could_not_register_fails_and_is_made_good_by_the_same_command(
    config, ran, monkeypatch
):
    from flows.stages.full_pipeline import full_pipeline

    def refuse(*_):
        raise RegistryError("the registry is read-only")

    with monkeypatch.context() as patch:
        patch.setattr(registry, "_register", refuse)
        with pytest.raises(RegistryError, match="read-only"):
            full_pipeline(config=config)
    tracker = Tracker(config.name, config.store_path)
    (failed,) = tracker.client.search_runs([tracker.experiment("evaluate")])
    assert failed.info.status == "FAILED"
    ran.clear()
    full_pipeline(config=config)
    assert ran == []  # the evaluation itself was kept
    (version,) = Registry(tracker.client, tracker.name).versions()
    assert version.run_id == failed.info.run_id
    assert tracker.client.get_run(version.run_id).info.status == "FINISHED"
    assert len(tracker.client.get_run(version.run_id).inputs.model_inputs) == 2
