"""Action strings: what they mean, and one exact line for what they can't mean."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from sana_jax.camera import SCHEMES, ActionScheme, Smoothing, find_scheme, keys_to_motion, parse_action
from sana_jax.errors import UserError


def refused(action, scheme="v1", **keywords) -> str:
    with pytest.raises(UserError) as refusal:
        parse_action(action, scheme, **keywords)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def test_keys_of_every_frame():
    held = parse_action(" W-2 , dW-1，none-2,\tii-1")
    assert [sorted(keys) for keys in held] == [["w"], ["w"], ["d", "w"], [], [], ["i"]]


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("", "action '' is empty; write segments of keys and frames such as w-80,dw-40,none-8"),
        (" \n", r"action ' \n' is empty; write segments of keys and frames such as w-80,dw-40,none-8"),
        (None, "action None is not allowed; write a text such as w-80,dw-40,none-8"),
        (
            "w-3,",
            "action 'w-3,', segment 2 is empty; leave out the comma at the end, or write keys and frames such as "
            "w-80,dw-40,none-8",
        ),
        (
            "w-3,,d-2",
            "action 'w-3,,d-2', segment 2 is empty; leave out one comma, or write keys and frames such as "
            "w-80,dw-40,none-8",
        ),
        (
            "w3",
            "action 'w3', segment 1 'w3' has no hyphen; write keys, a hyphen and a number of frames, such as "
            "w-80,dw-40,none-8",
        ),
        ("d-2,w-", "action 'd-2,w-', segment 2 'w-' has no number of frames; write one after the hyphen, such as w-8"),
        ("w-0", "action 'w-0', segment 1 'w-0' cannot last '0' frames; write a whole number from 1 on"),
        ("w-００", "action 'w-００', segment 1 'w-００' cannot last '００' frames; write a whole number from 1 on"),
        ("w-1.5", "action 'w-1.5', segment 1 'w-1.5' cannot last '1.5' frames; write a whole number from 1 on"),
        ("w-²", "action 'w-²', segment 1 'w-²' cannot last '²' frames; write a whole number from 1 on"),
        (
            "w--3",
            "action 'w--3', segment 1 'w--3' has a negative number of frames, -3; write a whole number from 1 on",
        ),
        ("-3", "action '-3', segment 1 '-3' has no keys; write none-3 to hold the camera still"),
        ("-", "action '-', segment 1 '-' has no keys; write none-N to hold the camera still"),
        (
            "w-3,qwx-2",
            "action 'w-3,qwx-2', segment 2 'qwx-2' has keys that are not known, 'q', 'x'; scheme v1 has w forward, "
            "s back, a left, d right, j yaw left, l yaw right, i pitch up, k pitch down, and the word none",
        ),
        ("w-999999", "longer than 100000 frames"),
        ("w-" + "9" * 5000, "longer than 100000 frames"),
        ("z" * 500 + "-3", "has keys that are not known, 'z';"),
    ],
)
def test_malformed_strings(action, message):
    text = refused(action)
    assert text == message if "longer" not in message and "z" not in message else message in text
    assert len(text) < 400


def test_a_long_string():
    assert len(parse_action("w-99999")) == 99999


def test_frames_that_are_asked_for():
    assert len(parse_action("w-5,none-3", num_frames=9)) == 8
    start = "action 'w-5,none-3' makes 9 frames (the image, and 8 of motion), not the "
    assert refused("w-5,none-3", num_frames=7) == (f"{start}7 that are asked for: shorten it by 2, or ask for 9 frames")
    assert refused("w-5,none-3", num_frames=17) == (
        f"{start}17 that are asked for: add ,none-8 to hold the camera at the end, or ask for 9 frames"
    )
    assert len(parse_action("w-5,none-3,none-8", num_frames=17)) == 16


def test_schemes_differ_in_what_keys_do():
    held = parse_action("a-1,d-1,j-1,l-1")
    turn, move = math.radians(1.2), 0.05
    expected = [[0, -move, 0, 0], [0, move, 0, 0], [0, 0, -turn, 0], [0, 0, turn, 0]]
    np.testing.assert_allclose(keys_to_motion(held, "v1"), expected)
    turn, move = math.radians(0.6), 0.025
    expected = [[0, 0, -turn, 0], [0, 0, turn, 0], [0, -move, 0, 0], [0, move, 0, 0]]
    np.testing.assert_allclose(keys_to_motion(held, find_scheme("v2", smooth=False)), expected)


def test_v2_comes_and_goes_smoothly():
    held = parse_action("w-2,dw-3,w-20,none-40", "v2")
    motion = keys_to_motion(held, "v2")
    yaw = np.rad2deg(motion[:, 2])
    np.testing.assert_allclose(motion[:25, 0], 0.025)  # a key that is newly held acts at once
    np.testing.assert_allclose(yaw[:5], [0, 0, 0.6, 0.6, 0.6])
    release = math.exp(-1 / 16)
    np.testing.assert_allclose(yaw[5:], 0.6 * release ** np.arange(1, 61), rtol=1e-12)
    np.testing.assert_allclose(motion[25:, 0], 0.025 * release ** np.arange(1, 41), rtol=1e-12)
    # letting go of one of two opposite keys is no new key: the other one takes over within its press time
    takes_over = keys_to_motion(parse_action("ws-3,w-30", "v2"), "v2")[3:, 0]
    np.testing.assert_allclose(takes_over, 0.025 * (1 - math.exp(-1 / 16 / 0.45) ** np.arange(1, 31)), rtol=1e-12)
    np.testing.assert_array_equal(keys_to_motion(held, find_scheme("v2", smooth=False))[5:, 2], 0)


def test_limits_of_pitch():
    first = np.rad2deg(np.cumsum(keys_to_motion(parse_action("i-90"), "v1")[:, 3]))
    assert first.max() == pytest.approx(84.0)  # the step that would pass 85 degrees is left out
    second = np.rad2deg(np.cumsum(keys_to_motion(parse_action("k-130,i-10", "v2"), "v2")[:, 3]))
    assert second.min() == pytest.approx(-60.0)
    assert second[-1] > -60 + 5


def test_own_schemes():
    scheme = find_scheme("v1", translation_speed=1, rotation_speed=2.0, pitch_limit=10.0)
    assert (scheme.translation_speed, scheme.rotation_speed, scheme.pitch_limit) == (1, 2.0, 10.0)
    assert scheme.smoothing is None
    assert find_scheme("v1", smooth=True).smoothing == Smoothing()
    assert find_scheme(scheme) is scheme
    assert all(scheme.name == name and isinstance(scheme, ActionScheme) for name, scheme in SCHEMES.items())
    only_forward = dataclasses.replace(scheme, name="walk", keys={"f": "forward"})
    assert parse_action("F-2", only_forward) == (frozenset("f"),) * 2
    assert "scheme walk has f forward, and the word none" in refused("w-1", only_forward)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"translation_speed": -1.0}, "translation_speed -1.0 is not allowed; choose a number from 0"),
        ({"translation_speed": float("nan")}, "translation_speed nan is not allowed; choose a number from 0"),
        ({"rotation_speed": 180}, "rotation_speed 180 is not allowed; choose a number from 0 to 90"),
        ({"translation_speed": True}, "translation_speed True is not allowed; choose a number from 0"),
        ({"pitch_limit": 90.0}, "pitch_limit 90.0 is not allowed; choose a number from 0 to 89"),
        (
            {"scheme": "v3"},
            "scheme 'v3' is not known; choose one of v1 (diffusers 0.42.1), v2 (NVlabs/Sana since the",
        ),
        ({"scheme": ["v1"]}, "scheme ['v1'] is not known; choose one of"),
    ],
)
def test_schemes_that_are_not_allowed(keywords, message):
    with pytest.raises(UserError) as refusal:
        find_scheme(**{"scheme": "v1", **keywords})
    assert str(refusal.value).startswith(message)
    with pytest.raises(UserError, match=r"press_time 0\.0 is not allowed; choose a number above 0"):
        Smoothing(press_time=0.0)
