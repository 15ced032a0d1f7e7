"""The command line: presets, overrides, and refusals in one line."""

import dataclasses

import pytest

from sparse_coding.config import PRESETS, as_json, parse_config, validate
from sparse_coding.errors import UserError


def test_flags_override_the_preset_and_nothing_else():
    cfg = parse_config(["--preset", "offline", "--ratios", "2", "4", "--seed", "7"])
    assert cfg == dataclasses.replace(PRESETS["offline"], ratios=(2, 4), seed=(7,))


def test_no_argument_means_the_demo():
    assert parse_config([]) == PRESETS["demo"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_valid_and_knows_its_name(name):
    assert validate(PRESETS[name]).preset == name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "--preset huge is unknown; it must be one of: demo, offline"),
        (["--ratios", "0"], "--ratios 0 is not possible; it must be from 1 to 4,096"),
        (["--ratios", "2", "2"], "--ratios names a value twice"),
        (["--context-length", "1"], "--context-length 1 is not possible; it must be 3 or more"),
        (["--target-l0", "0"], "--target-l0 0.0 is not possible; it must be more than 0"),
        (["--heldout-fraction", "1"], "--heldout-fraction 1.0 is not possible"),
        (["--resume", "--overwrite"], "--resume and --overwrite contradict each other"),
        (["--ratios"], "--ratios needs at least one value"),
        (["--name", ".."], "--name .. is not possible; it must be the name of one folder"),
        (["--name", "x" * 201], "of at most 200 bytes"),
        (["--name", "\udcff" * 201], "of at most 200 bytes"),  # of a terminal that is not UTF-8
        (["--no-cache", "--buffer-tokens", "99"], "--buffer-tokens 99 hold no batch of"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(arguments, message):
    with pytest.raises(UserError) as error:
        parse_config(arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_flag_is_an_error(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_config(["--ratioss", "2"])
    assert exit_.value.code != 0
    assert "--ratioss" in capsys.readouterr().err


def test_a_false_flag_means_false():
    assert parse_config(["--no-cache"]).cache is False
    assert parse_config(["--cache"]).cache is True


def test_a_configuration_is_plain_json():
    content = as_json(PRESETS["demo"])
    assert content["output"] == "outputs"
    assert content["ratios"] == [1, 2, 4, 8, 16, 32]
