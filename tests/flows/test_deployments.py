"""infra/prefect.yaml: every deployment loads, and is what bootstrap and README speak of."""

import pytest
import yaml
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.utilities.importtools import from_qualified_name
from prefect.utilities.templating import apply_values

from flows.bootstrap import DEPLOYMENTS
from flows.config import PipelineConfig, StageName, presets
from flows.settings import POOL

DOCUMENT = yaml.safe_load(DEPLOYMENTS.read_text())
NAMES = [deployment["name"] for deployment in DOCUMENT["deployments"]]


def test_there_is_one_deployment_a_preset_and_one_a_stage():
    of_presets = {"full-pipeline" if name == "demo" else name for name in presets()}
    assert sorted(NAMES) == sorted({*StageName, *of_presets})


@pytest.mark.parametrize("deployment", DOCUMENT["deployments"], ids=NAMES)
def test_every_entrypoint_is_a_module_and_loads(deployment):
    assert ":" not in deployment["entrypoint"]
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    assert isinstance(flow, Flow)
    expected = deployment["name"] if deployment["name"] in list(StageName) else "full-pipeline"
    assert flow.name == expected
    assert flow.persist_result


@pytest.mark.parametrize("deployment", DOCUMENT["deployments"], ids=NAMES)
def test_the_parameters_of_every_deployment_are_valid(deployment):
    outputs = {}
    for step in DOCUMENT["build"]:
        ((function, inputs),) = step.items()
        outputs[inputs["id"]] = from_qualified_name(function)(preset=inputs["preset"])
    flow = load_flow_from_entrypoint(deployment["entrypoint"])
    parameters = flow.validate_parameters(apply_values(deployment["parameters"], outputs))
    preset = deployment["name"] if deployment["name"] in presets() else "demo"
    assert parameters["config"] == PipelineConfig.preset(preset)


def test_the_pool_is_the_workers():
    assert {deployment["work_pool"]["name"] for deployment in DOCUMENT["deployments"]} == {POOL}
