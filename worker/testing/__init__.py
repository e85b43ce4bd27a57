"""For the tests of host projects: clients without servers, and real servers of a test's own.

    def test_a_user_without_credit_hears_nothing():
        billing = FakeBilling({"user-42": "basic"})
        billing.set_balance("user-42", "premium_voice", used=100_000)
        assert speak(billing, "user-42", "Hello").status == 402

The package needs the extra `testing`, real servers the extra `testing-servers`.

- `billing`: `FakeBilling` and `AsyncFakeBilling`; `controls`: what a test does to their world, and reads there
- `world`: the servers and workers of a fake; `memory`: its Redis; `ledger`: its Postgres; `books`: its workers
- `fixtures`: for pytest; `local`: real servers, for one test at a time
"""

try:
    from worker.testing.billing import AsyncFakeBilling, FakeBilling
except ImportError as error:
    raise ImportError(f"a package is missing ({error}): pip install 'meterfall-client[testing]'") from error

__all__ = ["AsyncFakeBilling", "FakeBilling"]
