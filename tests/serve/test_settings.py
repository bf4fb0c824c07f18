import pytest

from clipdit_serve.settings import ServeSettings, check_bind


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_this_machine_may_bind_without_a_key(host: str):
    check_bind(host, ServeSettings(), insecure=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "10.0.0.1", "example.org", "localhost.example.org", ""])
def test_any_other_bind_needs_a_key_or_to_be_asked_for(host: str):
    with pytest.raises(ValueError, match=r"no key is set. Set CLIPDIT_API_KEY, bind to 127.0.0.1, or say --insecure"):
        check_bind(host, ServeSettings(), insecure=False)
    check_bind(host, ServeSettings(), insecure=True)
    check_bind(host, ServeSettings(api_key="k"), insecure=False)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_batch": 0}, "max_batch is 0; wanted more than 0"),
        ({"queue": -1}, "queue is -1"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"max_wait_ms": -1.0}, "max_wait_ms is -1.0; wanted 0 or more"),
        ({"max_jobs": -1}, "max_jobs is -1; wanted 0 or more"),
        ({"job_keep_s": 0.0}, "job_keep_s is 0.0; wanted more than 0"),
        ({"api_key": ""}, "the API key"),
        ({"api_key": "a\nb"}, "the API key"),
        ({"api_key": "schlüssel"}, "the API key"),
    ],
)
def test_settings_that_cannot_be_are_refused(given: dict, said: str):
    with pytest.raises(ValueError, match=said):
        ServeSettings(**given)
