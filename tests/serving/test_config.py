"""What a server may be started with."""

from typing import Any

import pytest

from flowroll.errors import InvalidRequestError
from flowroll.serving import ServerConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("port", -1),
        ("port", 65536),
        ("max_queue", -1),
        ("max_connections", 0),
        ("max_body_bytes", 0),
        ("max_score_body_bytes", 0),
        ("max_weights_body_bytes", 0),
        ("weights_idle_s", 0),
        ("min_send_bytes_per_s", 0),
        ("max_unsent_bytes", 0),
        ("receive_timeout_s", 0),
        ("grace_s", -1.0),
        ("weights_roots", ("/no/such/folder",)),
        ("weights_roots", (__file__,)),
        ("api_key", ""),
        ("api_key", "a\nb"),
    ],
)
def test_a_bad_setting_is_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError, match=f"{field} must"):
        ServerConfig(model="x", **{field: value})


def test_a_refused_api_key_is_not_shown() -> None:
    with pytest.raises(InvalidRequestError) as refused:
        ServerConfig(model="x", api_key="pass\tword")
    assert "word" not in refused.value.message.replace("text", "")


def test_an_api_key_is_not_part_of_the_settings_text() -> None:
    assert "s3cret" not in repr(ServerConfig(model="x", api_key="s3cret"))


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, is_loopback: bool) -> None:
    assert ServerConfig(model="x", host=host).is_loopback is is_loopback


def test_the_default_is_loopback() -> None:
    assert ServerConfig(model="x").is_loopback
