"""What the SLURM profiles request, from the expressions in them."""

import pytest
import yaml

DAY = 24 * 60
"""Minutes that most clusters' partitions allow."""


@pytest.mark.parametrize("name", ["slurm", "slurm-gres"])
def test_no_submission_asks_for_more_than_a_day(repository, name):
    """Not on the last attempt either, and not for grouped jobs."""
    base = yaml.safe_load((repository / "profiles/slurm/config.yaml").read_text())
    profile = base | yaml.safe_load((repository / f"profiles/{name}/config.yaml").read_text())
    attempts = range(1, profile["retries"] + 2)
    members: dict[str, list[str]] = {}
    for rule, group in profile["groups"].items():
        members.setdefault(group, []).append(rule)
    grouped = {rule for rules in members.values() for rule in rules}
    submissions = [*members.values(), *([r] for r in profile["set-resources"] if r not in grouped)]
    asked = {**{rule: {} for rule in grouped}, **profile["set-resources"]}
    for rules in submissions:
        for attempt in attempts:
            minutes = 0
            for rule in rules:
                wanted = {**profile["default-resources"], **asked[rule]}["runtime"]
                times = profile["group-components"].get(rule, 1)
                minutes += times * eval(str(wanted), {"attempt": attempt})
            assert minutes <= DAY, (rules, attempt, minutes)


def test_a_training_gets_no_more_time_when_it_goes_on(repository):
    """It resumes; a job that requests more than a partition's limit would wait forever."""
    for name in ("slurm", "slurm-gres"):
        profile = yaml.safe_load((repository / f"profiles/{name}/config.yaml").read_text())
        assert profile["set-resources"]["train"]["runtime"] == 720
