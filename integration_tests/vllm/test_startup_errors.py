"""What cannot start ends in one clear sentence."""

from __future__ import annotations

import json

import pytest

from trimtab.core.errors import BadInput
from trimtab.hosts.vllm import options
from trimtab.hosts.vllm.dry_engine import DryEngine
from trimtab.hosts.vllm.scheduler import Scheduler

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"trimtab": {"urgncy": {}}}, "no plugin 'urgncy' is installed"),
        ({"trimtab": {"urgency": {"ordr": "edd"}}}, "trimtab.urgency: .*ordr.*'order'"),
        ({"trimtab": {"urgency": {"order": "fastest"}}}, "trimtab.urgency: .*fastest"),
        ({"trimtab": ["urgency"]}, "--additional-config, trimtab: it is a list"),
        ({"trimtab": {"urgency": 3}}, "trimtab.urgency"),
    ],
)
def test_a_wrong_configuration_is_refused(config, sentence):
    with pytest.raises(BadInput, match=sentence):
        DryEngine(Scheduler, additional_config=config)


def test_other_entries_of_the_configuration_are_left_alone():
    assert options.enabled({"other": {"a": 1}}) == {}
    assert options.enabled(json.loads('{"trimtab": {}}')) == {}
    assert options.policies({"other": 1}) == []
