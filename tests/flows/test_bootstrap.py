"""flows/serve/prefect.yaml: every deployment loads, and is what bootstrap and README speak of."""

import pytest
from prefect.flows import Flow, load_flow_from_entrypoint

from flows.config import PipelineConfig, StageName, presets
from flows.serve.bootstrap import about, deployments
from flows.serve.settings import POOL

DEPLOYMENTS = deployments()
FLOWS = ["full-pipeline", *StageName]


def _name(deployment: dict) -> str:
    """FLOW/PRESET, as `prefect deployment run` takes it."""
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    return f"{flow.name}/{deployment['name']}"


NAMES = [_name(deployment) for deployment in DEPLOYMENTS]


def test_every_flow_has_a_deployment_with_every_preset():
    presets_of = {flow: [flow if name == "demo" else name for name in presets()] for flow in FLOWS}
    assert sorted(NAMES) == sorted(f"{flow}/{name}" for flow in FLOWS for name in presets_of[flow])


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=NAMES)
def test_every_entrypoint_is_a_module_and_loads(deployment):
    assert ":" not in deployment["entrypoint"]
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    assert isinstance(flow, Flow)
    assert flow.persist_result
    schema = flow.parameters.model_dump_for_openapi()["properties"]
    names = ["overrides", "stages", "force", "upstream", "config"]
    assert list(schema) == [name for name in names if name in schema]
    assert all(parameter.get("description") for parameter in schema.values())
    assert "Args" not in about(flow)


@pytest.mark.parametrize("entrypoint", sorted({one["entrypoint"] for one in DEPLOYMENTS}))
def test_every_flow_with_its_form_is_what_prefect_makes_of_its_function(entrypoint):
    flow = load_flow_from_entrypoint(entrypoint)
    assert vars(flow) == vars(Flow(flow.fn, name=flow.name, persist_result=True))


@pytest.mark.parametrize("deployment", DEPLOYMENTS, ids=NAMES)
def test_the_parameters_of_every_deployment_are_valid(deployment):
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    parameters = flow.validate_parameters(deployment["parameters"])
    preset = deployment["name"] if deployment["name"] in presets() else "demo"
    assert parameters["config"] == PipelineConfig.preset(preset)


def test_a_worker_runs_flows_in_the_folder_of_bootstrap(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for deployment in deployments():
        assert deployment["work_pool"]["job_variables"] == {"working_dir": str(tmp_path)}


def test_the_pool_is_the_workers():
    assert {deployment["work_pool"]["name"] for deployment in DEPLOYMENTS} == {POOL}
