import io
import math

import pytest
import torch
from torch import nn

from gigagan.config import (
    HealthConfig,
    TextConfig,
)
from gigagan.training import guard as module
from gigagan.training.guard import Alarm, Divergence, Guard

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
