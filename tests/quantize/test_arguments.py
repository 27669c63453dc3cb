"""Arguments of a QuantizeModule that are refused; what they mean is tested in test_module.py."""

from __future__ import annotations

import pytest

from gptq_plugin import QuantizeConfig
from gptq_plugin.options.known_names import field_defaults
from gptq_plugin.quantize.arguments import check_fields

DEFAULTS = field_defaults(QuantizeConfig)


def test_all_fields_at_their_defaults_are_no_request_beside_a_configuration():
    check_fields(QuantizeConfig(bits=3), DEFAULTS)
    assert DEFAULTS["bits"] == 4 and DEFAULTS["dynamic"] == {} and set(DEFAULTS) == set(QuantizeConfig().to_dict())


@pytest.mark.parametrize(
    ("given", "named"),
    [({**DEFAULTS, "bits": 3, "seed": 1}, "bits, seed"), ({"bits": 4}, "bits"), ({**DEFAULTS, "sym": False}, "sym")],
    ids=["two of all", "a default given alone", "a switch"],
)
def test_fields_that_are_asked_for_beside_a_configuration_are_refused_by_name(given, named):
    with pytest.raises(TypeError, match=f"not both: got {named} beside config"):
        check_fields(QuantizeConfig(bits=3), given)


def test_an_unknown_field_is_refused_with_the_nearest_before_the_values_are_looked_at():
    with pytest.raises(ValueError, match="unknown option 'bitz': did you mean 'bits'"):
        check_fields(None, {"bitz": 4, "bits": 5})
