import io
import json
import math
import subprocess
import sys

import pytest
import torch
from PIL import Image
from torch import nn

from gigagan.config import (
    DiscriminatorConfig,
    GeneratorConfig,
    HealthConfig,
    TextConfig,
    UpsamplerConfig,
)
from gigagan.models.attention import SelfAttention, split_heads
from gigagan.models.discriminator import Discriminator
from gigagan.models.encoders import TextFeatures
from gigagan.models.generator import Generator
from gigagan.models.layers import AdaptiveConv, pyramid, rms_normalize
from gigagan.models.upsampler import Upsampler
from gigagan.training import guard as module
from gigagan.training.guard import Alarm, Divergence, Guard, StallWatch, vital_signs, write_report

CPU = torch.device("cpu")
HEALTH = HealthConfig(settle_steps=3, patience=2, max_rollbacks=2, rollback_rate=0.5)
GOOD = {"d/real": 0.6, "d/fake": 0.7, "d/logit_real": 0.3, "d/logit_fake": -0.4, "d/r1": 0.05}
TEXT = TextConfig(encoder="test:words", encoder_width=11, pooled_width=11, width=16, head_width=8)
STYLE = {"head_width": 8, "latent_dim": 5, "style_dim": 12, "text": TEXT}


def norm(value):
    return torch.tensor(float(value))


def settled(value=2.0, config=HEALTH):
    made = Guard(config, CPU)
    for name in ("d", "g"):
        for _ in range(config.settle_steps):
            assert made.judge(name, norm(value)) == 0
    return made


def bad_steps(made, name="d"):
    return made.figures()[f"health/skipped_{name}"]


# Steps.


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_step_that_is_not_finite_is_bad_from_the_first_on(value):
    assert Guard(HEALTH, CPU).judge("d", norm(value)) == 1


def test_the_verdict_is_a_scalar_float_on_the_device_as_the_fused_optimizer_wants_it():
    found_inf = Guard(HEALTH, CPU).judge("g", norm(1))
    assert (found_inf.shape, found_inf.dtype, found_inf.device) == ((), torch.float32, CPU)


def test_an_exploding_norm_is_bad_only_once_the_mean_has_settled():
    made = Guard(HEALTH, CPU)
    assert made.judge("d", norm(3e4)) == 0
    made = settled(3.0)
    assert made.judge("d", norm(3.0 * 19)) == 0
    assert made.judge("g", norm(3.0 * 21)) == 1
    assert made.judge("d", norm(3e4)) == 1


def test_bad_steps_leave_the_running_mean_alone_and_good_ones_move_it():
    made = settled(2.0)
    before = made.state_dict()["norms"]["d/plain"]
    for value in (math.nan, 2e4):
        made.judge("d", norm(value))
    assert made.state_dict()["norms"]["d/plain"] == before
    made.judge("d", norm(8.0))
    after = made.state_dict()["norms"]["d/plain"]
    # The fourth good step weighs a quarter: the geometric mean of 2, 2, 2, 8.
    assert after["log_mean"].exp().item() == pytest.approx((2 * 2 * 2 * 8) ** (1 / 4))
    assert after["num_good"] == 4


def test_the_running_mean_forgets_at_the_rate_of_its_decay():
    running = module.RunningNorm(torch.tensor(0.0), torch.tensor(1_000))
    moved = running.follow(norm(math.e), torch.tensor(True))
    assert moved.log_mean.item() == pytest.approx(1 - module.MEAN_DECAY)


def test_a_norm_of_zero_is_good_and_does_not_enter_the_mean():
    made = settled(2.0)
    assert made.judge("g", norm(0)) == 0
    assert made.judge("g", norm(2)) == 0


def test_steps_with_r1_are_compared_with_their_like():
    made = settled(1.0)
    for _ in range(3):
        assert made.judge("d", norm(50), kind="r1") == 0
    assert made.judge("d", norm(50), kind="r1") == 0
    assert made.judge("d", norm(50)) == 1


def test_the_fused_optimizer_skips_a_bad_step_exactly_and_takes_the_next():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    groups = [{"params": net[0].parameters()}, {"params": net[1].parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.3, fused=True)
    made = Guard(HEALTH, CPU)

    def step(x):
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        size = nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        optimizer.found_inf = made.judge("d", size)
        optimizer.step()

    def everything():
        moments = [v.clone() for s in optimizer.state.values() for v in s.values()]
        return [p.detach().clone() for p in net.parameters()] + moments

    corrupt = torch.full((7, 3), math.nan)
    step(corrupt)  # bad before there are any moments
    assert all(torch.isfinite(x).all() for x in everything())
    for _ in range(3):
        step(torch.randn(7, 3))
    before = everything()
    for x in (corrupt, 1e4 * torch.randn(7, 3)):
        step(x)
        assert all(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    step(torch.randn(7, 3))
    assert not any(torch.equal(a, b) for a, b in zip(before, everything(), strict=True))
    assert all(s["step"] == 4 for s in optimizer.state.values())
    made.check(GOOD, 28)
    assert bad_steps(made) == 3


# Lines of the log.


def test_a_healthy_line_raises_no_alarm():
    assert settled().check(GOOD, 320) == []


def test_skipped_steps_are_fatal_above_their_share_of_a_line_and_counted_since_the_start():
    made = settled()  # three good steps of each network
    for value in (math.nan, 2e4, math.nan):
        made.judge("d", norm(value))
    # What skipped steps measured is in the averages, and harms nothing.
    assert made.check(GOOD | {"d/real": math.nan}, 320) == []
    assert made.figures()["health/skipped_share_d"] == 0.5
    for value in (2, math.nan, math.nan):
        made.judge("d", norm(value))
    [alarm] = made.check(GOOD, 640)
    assert alarm == Alarm("health/skipped_share_d", 2 / 3, 0.5, 640, is_fatal=True)
    assert (bad_steps(made, "d"), bad_steps(made, "g")) == (5, 0)
    assert made.figures()["health/norm_limit_g"] == pytest.approx(20 * 2.0)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"g/adversarial": math.nan}, "g/adversarial"),
        ({"d/fake": math.inf}, "d/fake"),
        ({"d/logit_fake": 51.0}, "|d/logit_real − d/logit_fake|"),
        ({"d/logit_fake": -50.0}, "|d/logit_real − d/logit_fake|"),
        ({"d/r1": 101.0}, "d/r1"),
    ],
)
def test_a_diverged_figure_is_fatal_in_its_line(change, name):
    made = settled()
    made.check(GOOD, 320)
    [alarm] = made.check(GOOD | change, 640)
    assert alarm.is_fatal
    assert alarm.name == name
    assert name in str(Divergence([alarm]))
    assert "640" in str(alarm)


def test_an_alarm_says_figure_value_and_limit():
    said = str(Alarm("d/r1", 123.456, 100.0, 6_400, is_fatal=True))
    assert said == "d/r1 = 123.5 is beyond its limit 100 at 6,400 images"


def test_an_overconfident_discriminator_is_warned_of_once_when_it_begins_and_once_when_it_ends():
    made = settled()
    won = GOOD | {"d/real": 0.01, "d/fake": 0.019}
    heard = [made.check(line, 320 * i) for i, line in enumerate([won, GOOD, won, won, won, GOOD])]
    assert [len(alarms) for alarms in heard] == [0, 0, 0, 1, 0, 1]
    [begins], [ends] = heard[3], heard[5]
    assert (begins.is_fatal, begins.is_over, begins.value) == (False, False, 0.019)
    assert ends.is_over
    assert made.num_warnings == {"max(d/real, d/fake)": 1}


@pytest.mark.parametrize(
    ("name", "bad", "good"),
    [
        ("health/selection_entropy", 0.04, 0.06),
        ("health/attention_self_g", 0.96, 0.94),
        ("health/attention_self_d", math.nan, 0.2),
        ("health/z_effect", 0.009, 0.011),
    ],
)
def test_a_vital_sign_is_warned_of_once_when_it_begins_and_once_when_it_ends(name, bad, good):
    made = Guard(HEALTH, CPU)
    looks = [{name: good}, {name: bad}, {name: bad}, {}, {name: good}, {name: bad}]
    heard = [made.check_vitals(vitals, 320) for vitals in looks]
    assert [len(alarms) for alarms in heard] == [0, 1, 0, 0, 1, 1]
    assert not any(alarm.is_fatal for alarms in heard for alarm in alarms)
    assert made.num_warnings == {name: 2}


# Rollbacks and state.


def test_each_rollback_lowers_the_rate_until_none_is_left():
    made, alarms = Guard(HEALTH, CPU), [Alarm("d/r1", 123.0, 100.0, 900, is_fatal=True)]
    made.roll_back(alarms, 900, 600)
    made.roll_back(alarms, 700, 600)
    assert (made.num_rollbacks, made.rate_factor, made.can_roll_back) == (2, 0.25, False)
    assert [entry["rate_factor"] for entry in made.history] == [0.5, 0.25]
    with pytest.raises(Divergence, match="d/r1 = 123") as error:
        made.roll_back(alarms, 800, 600)
    assert error.value.alarms == alarms


def lived():
    made = settled()
    made.check_vitals({"health/z_effect": 0.001}, 5)
    made.check(GOOD | {"d/real": 0.01, "d/fake": 0.01}, 7)
    made.judge("d", norm(math.nan))
    made.judge("d", norm(40), kind="r1")
    made.roll_back([Alarm("d/r1", 123.0, 100.0, 9, is_fatal=True)], 9, 4)
    return made


def test_a_resumed_guard_judges_as_one_that_never_stopped():
    first, second = lived(), Guard(HEALTH, CPU)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    for made in (first, second):
        made.judge("d", norm(3))
        made.judge("d", norm(41), kind="r1")
        made.judge("d", norm(50))
    won = GOOD | {"d/real": 0.01, "d/fake": 0.01}
    heard = [made.check(won, 11) for made in (first, second)]
    assert heard[0] == heard[1]
    assert [alarm.name for alarm in heard[0]] == ["max(d/real, d/fake)"]
    assert first.check_vitals({"health/z_effect": 0.001}, 12) == []
    assert second.check_vitals({"health/z_effect": 0.001}, 12) == []
    assert first.state_dict() == second.state_dict()
    assert first.figures() == second.figures()


def test_going_back_to_a_checkpoint_forgets_no_rollback_and_no_skipped_step():
    made = settled()
    checkpoint = made.state_dict()
    for _ in range(2):
        made.judge("d", norm(math.nan))
        made.roll_back([], 9, 4)
        made.load_state_dict(checkpoint)
    assert (made.num_rollbacks, made.rate_factor, len(made.history)) == (2, 0.25, 2)
    made.check(GOOD, 320)
    assert bad_steps(made) == 2
    # The line under way is the checkpoint's.
    assert made.figures()["health/skipped_share_d"] == 0


def test_a_report_can_be_read_and_parsed(tmp_path):
    run = tmp_path / "run7"
    (run / "samples").mkdir(parents=True)
    for position in (3, 5, 8):
        Image.new("RGB", (2, 3)).save(run / f"samples/samples-{position:09d}.png")
    lines = [json.dumps({"images": 10 * i, "d/real": 0.1 * i, "d/r1": math.nan}) for i in range(30)]
    (run / "metrics.jsonl").write_text("\n".join(lines) + '\n{"images": 300, "d/re')
    alarms = [Alarm("d/real", math.nan, math.inf, 290, is_fatal=True)]
    page = write_report(run, alarms, lived().history)
    text = page.read_text()
    assert page == run / "divergence/report.md"
    assert "Run run7 diverged at 290 images" in text
    assert "d/real = nan is not finite" in text
    assert "At 9 images back to 4, learning rate × 0.5" in text
    assert "| 290 | 2.9 | nan |" in text
    assert "| 90 |" not in text
    assert sorted(p.name for p in page.parent.glob("*.png")) == [
        "samples-000000005.png",
        "samples-000000008.png",
    ]

    def refuse(word):
        raise AssertionError(f"{word} is not JSON")

    report = json.loads((page.parent / "report.json").read_text(), parse_constant=refuse)
    assert len(report["last_lines"]) == 20
    assert report["alarms"][0]["value"] == "nan"


def test_a_run_that_wrote_nothing_yet_has_a_report_too(tmp_path):
    assert "There are none." in write_report(tmp_path, [], []).read_text()


# A process that hangs.

HANGS = """
import sys, time
from pathlib import Path
from gigagan.training.guard import StallWatch

def wait_for_nobody():
    time.sleep(60)

with StallWatch(Path(sys.argv[1]), float(sys.argv[2])) as watch:
    watch.beat()
    if sys.argv[3] == "pause":
        watch.pause()
        time.sleep(1.5)
    elif sys.argv[3] == "beat":
        for _ in range(5):
            time.sleep(0.3)
            watch.beat()
    else:
        wait_for_nobody()
"""


def hang(folder, seconds, how):
    return subprocess.run(
        [sys.executable, "-c", HANGS, str(folder), str(seconds), how],
        capture_output=True, text=True, timeout=50, check=False,
    )  # fmt: skip


def test_a_process_that_hangs_ends_and_names_the_function_in_a_file(tmp_path):
    done = hang(tmp_path, 1, "hang")
    assert done.returncode != 0
    assert "wait_for_nobody" in (tmp_path / "stall.txt").read_text()
    assert str(tmp_path / "stall.txt") in done.stderr


@pytest.mark.parametrize("how", ["pause", "beat"])
def test_a_process_that_goes_on_or_pauses_is_left_alone(tmp_path, how):
    assert hang(tmp_path, 1, how).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_watch_of_zero_seconds_does_nothing(tmp_path):
    with StallWatch(tmp_path, 0) as watch:
        watch.beat()
        watch.pause()
    assert list(tmp_path.iterdir()) == []


def test_traces_of_an_earlier_attempt_stay_and_are_pointed_at(tmp_path, capsys):
    (tmp_path / "stall-rank3.txt").write_text("earlier")
    StallWatch(tmp_path, 60, rank=3).close()
    assert (tmp_path / "stall-rank3.txt").read_text() == "earlier"
    assert "stall-rank3.txt" in capsys.readouterr().err


# Vital signs.


def networks():
    torch.manual_seed(1)
    g = Generator(
        GeneratorConfig(channels=(8, 16), kernels=(3, 2), blocks=(1, 2), attention=(0, 1), **STYLE)
    )
    d = Discriminator(
        DiscriminatorConfig(
            channels=(8, 8), levels=2, blocks=(1, 0), attention=(0, 1), head_width=8, text=TEXT
        )
    )
    return g, d


def batch(size=3, side=8):
    random = torch.Generator().manual_seed(2)
    draw = lambda *shape: torch.randn(*shape, generator=random)  # noqa: E731
    features = TextFeatures(draw(size, 4, 11), torch.ones(size, 4).bool(), draw(size, 11))
    return draw(size, 5), features, pyramid(draw(size, 3, side, side), 2)


def test_vital_signs_have_a_value_for_each_part_of_the_networks():
    found = vital_signs(*networks(), *batch())
    assert set(found) == {
        "health/selection_entropy",
        "health/attention_self_g",
        "health/attention_self_d",
        "health/z_effect",
        "health/weight_norm_g",
        "health/weight_norm_d",
    }
    assert 0.05 < found["health/selection_entropy"] < 1
    assert 0 < found["health/attention_self_g"] < 0.95
    assert found["health/z_effect"] > 0.01


def test_a_selection_that_always_takes_one_filter_has_no_entropy_and_an_even_one_all():
    one = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    assert module.selection_entropy(one) == 0
    assert module.selection_entropy(torch.full((2, 3), 1 / 3)) == pytest.approx(1)


def test_selection_entropy_sees_a_network_that_uses_one_filter_of_each_bank():
    g, d = networks()
    for layer in g.modules():
        if isinstance(layer, AdaptiveConv) and layer.to_select is not None:
            layer.to_select.bias.data[1] = 50.0
    found = vital_signs(g, d, *batch())
    assert found["health/selection_entropy"] < 0.05
    assert Guard(HEALTH, CPU).check_vitals(found, 1)[0].name == "health/selection_entropy"


@pytest.mark.parametrize("style_dim", [None, 7])
def test_self_weight_is_the_diagonal_of_the_attention_that_the_layer_applies(style_dim):
    torch.manual_seed(3)
    layer = SelfAttention(6, head_width=3, scale=0.4, style_dim=style_dim)
    x_BLC = torch.randn(2, 5, 6)
    style_BS = None if style_dim is None else torch.randn(2, style_dim)
    tokens = rms_normalize(x_BLC)
    if style_BS is not None:
        token = rms_normalize(layer.style_token(style_BS))
        tokens = torch.cat([tokens, token[:, None]], dim=1)
    keys = split_heads(layer.to_qk(tokens), 3)
    squares = (keys[:, :, :5, None] - keys[:, :, None]).square().sum(-1)
    weights_BHLM = (-0.4 * squares).softmax(-1)
    expected = sum(weights_BHLM[:, :, i, i].mean() for i in range(5)) / 5
    torch.testing.assert_close(module.self_weight(layer, x_BLC, style_BS), expected)


def test_a_generator_that_ignores_its_latent_has_no_z_effect():
    g, d = networks()
    first = g.mapping.layers[0]
    first.weight.data[:, :5] = 0
    assert vital_signs(g, d, *batch())["health/z_effect"] < 1e-9


def test_looking_at_vital_signs_leaves_hooks_modes_gradients_and_random_numbers_as_found():
    g, d = networks()
    d.eval()
    g.levels[0].eval()
    before = [m.training for net in (g, d) for m in net.modules()]
    state = torch.get_rng_state()
    z_BZ, features, real = batch()
    vital_signs(g, d, z_BZ, features, real)
    with pytest.raises(ValueError, match="pyramid levels"):
        vital_signs(g, d, z_BZ, features, real[:1])
    assert [m.training for net in (g, d) for m in net.modules()] == before
    assert not any(m._forward_pre_hooks for net in (g, d) for m in net.modules())
    assert all(p.grad is None and p.requires_grad for p in g.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_vital_signs_of_an_upsampler_are_taken_on_its_small_images():
    torch.manual_seed(4)
    up = Upsampler(
        UpsamplerConfig(
            input_resolution=8, down_channels=(8, 16), up_channels=(16, 8, 8), kernels=(1, 3, 2),
            blocks=(1, 1, 1), attention=(1, 0, 0), **STYLE,
        )
    )  # fmt: skip
    z_BZ, features, real = batch(side=16)
    small = real[1], torch.randn(real[1].shape)
    d = networks()[1]
    # Its discriminator is not asked for a resolution of its own here.
    found = vital_signs(up, d, z_BZ, features, batch()[2], small)
    assert 0 < found["health/selection_entropy"] < 1
    assert 0 < found["health/attention_self_g"] < 1
    assert found["health/z_effect"] >= 0


def test_vital_signs_of_compiled_networks_are_those_of_plain_ones():
    g, d = networks()
    z_BZ, features, real = batch()
    expected = vital_signs(g, d, z_BZ, features, real)
    for level in g.levels:
        level.compile(backend="eager")
    g(z_BZ, features)
    assert vital_signs(g, d, z_BZ, features, real) == expected
